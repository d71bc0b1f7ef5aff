"""The section of the quickstart's report on the any-to-any stage."""

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
    "two digits": ("interleaved text and pictures", 6),
    "video": ("videos continued: the given last frame, then two drawn frames", 12),
    "sound": ("sounds made on request", 6),
}


def any_to_any_numbers(folder: Path, understood: Path) -> dict[str, Any]:
    """The entry "any_to_any" of report.json.

    Args:
        folder: the quickstart's folder; its `creations` have already been judged.
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
        folder: the quickstart's folder.
        report: the content of report.json.
    """
    made, judges = report["any_to_any"], report["any_to_any"]["judges"]
    return (
        "<p>One model reads and writes pictures and sounds as codes of the Llama's vocabulary. scikit-learn "
        f"classifiers, trained on held-out media (accuracy on the training media: {judges['digits']:.1%} for digits, "
        f"{judges['sounds']:.1%} for sounds), recognise the requested content in {made['drawn_as_asked']:.1%} of the "
        f"digits, {made['two_drawn_as_asked']:.1%} of the pairs of digits, {made['videos_continued']:.1%} of the "
        f"videos and {made['sounds_as_asked']:.1%} of the sounds. {made['grammatical']:.1%} of {made['answers']} "
        f"answers follow the grammar; without enforcement, {made['grammatical_by_itself']:.1%} would. The model's "
        f"answers match exactly for {made['understood']:.1%} of the held-out questions about pictures and "
        f"{made['sounds_understood']:.1%} of those about sounds; those of the model with encoders for "
        f"{report['modalities']['image']['accuracy']:.1%} and {report['modalities']['audio']['accuracy']:.1%}.</p>"
        f"{_creations(folder)}"
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
