"""The part of the quickstart's report on the any-to-any stage."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.quickstart.markup import media_html

# Kind of request for media -> its title, and how many answers to it are shown.
REQUESTS = {
    "digit": ("digits drawn on request", 40),
    "two digits": ("text and pictures in turn", 6),
    "video": ("videos continued: the last frame given, then two drawn ones", 12),
    "sound": ("sounds made on request", 6),
}


def any_to_any_numbers(folder: Path, understood: Path) -> dict[str, Any]:
    """The entry "any_to_any" of report.json.

    Args:
        folder: of the quickstart; its `creations` are judged already.
        understood: output file of `anymal evaluate --out` with the any-to-any model.
    """
    scores = json.loads(understood.read_text())["scores"]["trained"]
    made = json.loads((folder / "creations" / "scores.json").read_text())
    return {
        "drawn_as_asked": made["as_asked"]["digit"],
        "understood": scores["picture"]["accuracy"],
        "grammatical": made["grammatical"],
        "grammatical_by_itself": made["grammatical_by_itself"],
        "answers": made["answers"],
        "two_drawn_as_asked": made["as_asked"]["two digits"],
        "videos_continued": made["as_asked"]["video"],
        "sounds_as_asked": made["as_asked"]["sound"],
        "sounds_understood": scores["sound"]["accuracy"],
        "judges": made["judges"],
    }


def any_to_any_section(folder: Path, report: Mapping[str, Any]) -> str:
    """The page's section on the any-to-any stage, without its heading.

    Args:
        folder: of the quickstart.
        report: the content of report.json.
    """
    made, judges = report["any_to_any"], report["any_to_any"]["judges"]
    return (
        "<p>Pictures and sounds as codes of the Llama's vocabulary, read and written by one model. Classifiers of "
        f"scikit-learn, trained on held-out media ({judges['digits']:.1%} and {judges['sounds']:.1%} on the training "
        f"media), find what was asked for in {made['drawn_as_asked']:.1%} of the digits, "
        f"{made['two_drawn_as_asked']:.1%} of the pairs of digits, {made['videos_continued']:.1%} of the videos and "
        f"{made['sounds_as_asked']:.1%} of the sounds. {made['grammatical']:.1%} of {made['answers']} answers "
        f"obey the grammar; without enforcement, {made['grammatical_by_itself']:.1%} would. The model answers "
        f"{made['understood']:.1%} of the held-out questions about pictures and {made['sounds_understood']:.1%} of "
        f"those about sounds exactly; the model with encoders answers {report['modalities']['image']['accuracy']:.1%} "
        f"and {report['modalities']['audio']['accuracy']:.1%}.</p>{_creations(folder)}"
    )


def _creations(folder: Path) -> str:
    """Examples of what the any-to-any model made, by kind of request."""
    rows = json.loads((folder / "creations" / "answers.json").read_text())
    shown = []
    for kind, (title, count) in REQUESTS.items():
        cards = [_creation(folder, row) for row in rows if row["asked"] == kind][:count]
        shown.append(f"<h3>{title}</h3><div class=cards>{''.join(cards)}</div>")
    return "".join(shown)


def _creation(folder: Path, row: Mapping[str, Any]) -> str:
    shown = [media_html("image", (folder / "media" / row["last"]).read_bytes(), "png")] if "last" in row else []
    for part in row["parts"]:
        if "text" in part:
            shown.append(html.escape(part["text"]))
        else:
            file = folder / "creations" / part["media"]
            shown.append(media_html("image" if file.suffix == ".png" else "audio", file.read_bytes(), file.suffix[1:]))
    asked = row["messages"][0]["content"][-1]["text"]
    return f"<div class='card small'><div>{html.escape(asked)}</div>{''.join(shown)}</div>"
