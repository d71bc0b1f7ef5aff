"""The quickstart's report: report.json for machines, report.html (self-contained) for people."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.quickstart.creations_page import any_to_any_numbers, any_to_any_section
from examples.quickstart.instructions import FORMS, KINDS, follows, score
from examples.quickstart.markup import curve, media_html
from examples.quickstart.prepare import MODALITIES
from megatron_anymal.data.records import TextPart
from megatron_anymal.data.shard_index import ShardIndex

# Run -> title of its curves.
RUNS = {
    "llama": "Llama on text",
    "align": "Alignment, tensor parallel",
    "align_video": "Alignment, pipeline parallel",
    "sft": "Instruction tuning, sequence parallel",
    "dpo": "Preferences, context parallel",
    "any_to_any": "Any-to-any, two replicas",
}
# Run evaluated on the held-out conversations -> its stage.
STAGES = {"align_video": "before instruction tuning", "sft": "after instruction tuning", "dpo": "after DPO"}
EXAMPLES = 6

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}td,th{padding:.3em .9em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}.cards{display:flex;flex-wrap:wrap;gap:1em}
.card{width:15em;border:1px solid #ddd;border-radius:6px;padding:.7em}.card img,.card video{width:100%;
image-rendering:pixelated}.card audio{width:100%}.small{width:8em}.good{color:#186a3b}.bad{color:#a93226}
svg{background:#fafafa}"""


def write_report(folder: Path, evaluation: Path, understood: Path, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Write FOLDER/report.json and FOLDER/report.html.

    Args:
        evaluation: output file of `anymal evaluate --permute-media --untrained --out`. Its output files for the
            conversations are in FOLDER, see `answers_file`.
        understood: output file of `anymal evaluate --out` with the any-to-any model. The media that this model made are
            in FOLDER/creations.
        seconds: durations of install, train, any_to_any and total, in seconds.

    Returns:
        The content of report.json.
    """
    result = json.loads(evaluation.read_text())
    scores = result["scores"]
    lines, given = _held_out_conversations(folder), {run: _given(answers_file(folder, run)) for run in STAGES}
    before, sft, dpo = (score(lines, given[run]) for run in STAGES)
    report = {
        "modalities": {
            name: {
                "accuracy": scores["trained"][name]["accuracy"],
                "before": scores["untrained"][name]["accuracy"],
                "permuted": scores["permuted"][name]["accuracy"],
                "chance": scores["trained"][name]["chance"],
                "samples": scores["trained"][name]["samples"],
            }
            for name in MODALITIES
        },
        "sft": {
            "followed_before": before["followed"],
            "followed_after": sft["followed"],
            "followed_after_new_words": sft["followed_new_words"],
            "accuracy_before": before["accuracy"],
            "accuracy_after": sft["accuracy"],
            "questions": len(lines),
        },
        "dpo": {
            "preference_accuracy": _last(folder / "dpo" / "metrics.jsonl", "val_rewards/accuracy"),
            "accuracy_before": sft["accuracy"],
            "accuracy_after": dpo["accuracy"],
            "followed_after": dpo["followed"],
            "opening_before": sft["opening"],
            "opening_after": dpo["opening"],
        },
        "language_model_hash": {
            "before": _hashes(folder / "align")["before"],
            "after": _hashes(folder / "dpo")["after"],
        },
        "any_to_any": any_to_any_numbers(folder, understood),
        "seconds": dict(seconds),
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    (folder / "report.html").write_text(_page(folder, report, result["answers"]["trained"], lines, given))
    return report


def answers_file(folder: Path, run: str) -> Path:
    """Output file of `anymal evaluate --out` with a run's answers to the held-out conversations."""
    return folder / f"conversations_{run}.json"


def _held_out_conversations(folder: Path) -> list[dict[str, Any]]:
    manifests = [folder / "media" / f"instructions_{kind}_held_out.jsonl" for kind in KINDS]
    return [json.loads(line) for manifest in manifests for line in manifest.read_text(encoding="utf-8").splitlines()]


def _given(evaluation: Path) -> dict[str, str]:
    return {row["key"]: row["given"] for row in json.loads(evaluation.read_text())["answers"]["trained"]}


def _last(metrics: Path, name: str) -> float:
    return [row[name] for row in map(json.loads, metrics.read_text().splitlines()) if name in row][-1]


def _hashes(run: Path) -> dict[str, str]:
    return json.loads((run / "language_model.json").read_text())


def _page(
    folder: Path,
    report: Mapping[str, Any],
    answers: Sequence[Mapping[str, str]],
    lines: Sequence[Mapping[str, Any]],
    given: Mapping[str, Mapping[str, str]],
) -> str:
    body = [f"<h1>Quickstart</h1>{_summary(report)}"]
    for name in MODALITIES:
        body.append(f"<h2>{name}: held-out samples</h2>{_cards(folder, name, answers)}")
    body.append(f"<h2>Conversations: held-out samples</h2>{_conversations(folder, lines, given)}")
    body.append(f"<h2>Any-to-any</h2>{any_to_any_section(folder, report)}<h2>Curves</h2>")
    body += [curve(folder / run / "metrics.jsonl", title) for run, title in RUNS.items()]
    body += [curve(folder / "dpo" / "metrics.jsonl", RUNS["dpo"], what) for what in ("rewards", "val_rewards")]
    body.append(curve(folder / "any_to_any" / "metrics.jsonl", RUNS["any_to_any"], "target_loss"))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Quickstart</title><style>{_STYLE}</style>"
        f"<body>{''.join(body)}</body></html>"
    )


def _summary(report: Mapping[str, Any]) -> str:
    names = ("accuracy", "before", "permuted", "chance")
    rows = [
        f"<tr><td>{modality}</td>{''.join(f'<td>{row[n]:.1%}</td>' for n in names)}<td>{row['samples']}</td></tr>"
        for modality, row in report["modalities"].items()
    ]
    hashes = report["language_model_hash"]
    same = "are identical" if hashes["before"] == hashes["after"] else "DIFFER"
    return (
        "<p>Exact-match accuracy of greedy answers on held-out samples: after alignment, before it, and with the media "
        "swapped between samples.</p><table><tr><th></th><th>after</th><th>before</th><th>media swapped</th>"
        f"<th>chance</th><th>samples</th></tr>{''.join(rows)}</table>"
        f"<p>The Llama's weights before and after training {same} (<code>{hashes['after'][:16]}</code>). "
        f"Training took {report['seconds']['train']:.0f} s of {report['seconds']['total']:.0f} s in total.</p>"
        f"{_of_chats(report)}"
    )


def _of_chats(report: Mapping[str, Any]) -> str:
    sft, dpo = report["sft"], report["dpo"]
    return (
        f"<p>In {sft['questions']} held-out conversations, {sft['followed_before']:.1%} of the answers had the "
        f"requested form before instruction tuning and {sft['followed_after']:.1%} after it (requests in new words: "
        f"{sft['followed_after_new_words']:.1%}). Form and content were correct in {sft['accuracy_before']:.1%} before "
        f"and {sft['accuracy_after']:.1%} after.</p><p>Preferences: {dpo['preference_accuracy']:.1%} of held-out pairs "
        f"are ranked correctly. {dpo['opening_before']:.1%} of the answers begin with a polite opening before DPO, "
        f"{dpo['opening_after']:.1%} after it; {dpo['accuracy_after']:.1%} are correct in form and content.</p>"
    )


def _cards(folder: Path, name: str, answers: Sequence[Mapping[str, str]]) -> str:
    index = ShardIndex(str(folder / "data" / f"{name}_held_out"))
    by_key = {row["key"]: row for row in answers if row["modality"] == name}
    cards = []
    # Spread the examples over the data set, which may be ordered.
    for number in range(0, len(index), max(1, len(index) // EXAMPLES))[:EXAMPLES]:
        parts = index.parts(number)
        [media] = index.read_media(number, parts, [0])
        row = by_key[index.key(number)]
        asked = " ".join(part.text for part in parts[:-1] if isinstance(part, TextPart))
        verdict = "good" if row["given"] == row["expected"] else "bad"
        cards.append(
            f"<div class=card>{media_html(name, media.data, media.extension)}<div>{html.escape(asked)}</div>"
            f"<b class={verdict}>{html.escape(row['given'])}</b>"
            f"<div>expected: {html.escape(row['expected'])}</div></div>"
        )
    return f"<div class=cards>{''.join(cards)}</div>"


def _conversations(folder: Path, lines: Sequence[Mapping[str, Any]], given: Mapping[str, Mapping[str, str]]) -> str:
    """One example card per form, from different modalities as far as possible."""
    cards = []
    for number, form in enumerate(FORMS):
        fitting = [line for line in lines if line["form"] == form]
        line = next((line for line in fitting if line["key"].startswith(KINDS[number % len(KINDS)])), fitting[0])
        *asked, answer = line["messages"]
        shown = [_message(folder, message) for message in asked]
        for run, when in STAGES.items():
            verdict = "good" if follows(form, given[run][line["key"]]) else "bad"
            shown.append(f"<div>{when}: <b class={verdict}>{html.escape(given[run][line['key']])}</b></div>")
        shown.append(f"<div>expected: {html.escape(answer['content'])}</div>")
        cards.append(f"<div class=card>{''.join(shown)}</div>")
    return f"<div class=cards>{''.join(cards)}</div>"


def _message(folder: Path, message: Mapping[str, Any]) -> str:
    content = message["content"]
    shown = []
    for part in [{"text": content}] if isinstance(content, str) else content:
        if "text" in part:
            shown.append(f"{message['role']}: {html.escape(part['text'])}")
        else:
            path = folder / "media" / part["media"]
            shown.append(media_html(part["modality"], path.read_bytes(), path.suffix[1:]))
    return f"<div>{''.join(shown)}</div>"
