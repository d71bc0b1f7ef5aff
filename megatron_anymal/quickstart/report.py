"""The quickstart's report: report.json for machines, report.html (self-contained) for people."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_anymal.data.shards import ShardIndex
from megatron_anymal.data.types import MediaPart, TextPart
from megatron_anymal.quickstart.prepare import MODALITIES

RUNS = {"llama": "Llama on text", "align": "Alignment, tensor parallel", "align_video": "Alignment, pipeline parallel"}
EXAMPLES = 6
_COLOURS = ("#1f618d", "#b9770e", "#196f3d", "#922b21", "#6c3483", "#5f6a6a")

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}td,th{padding:.3em .9em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}.cards{display:flex;flex-wrap:wrap;gap:1em}
.card{width:15em;border:1px solid #ddd;border-radius:6px;padding:.7em}.card img,.card video{width:100%;
image-rendering:pixelated}.card audio{width:100%}.good{color:#186a3b}.bad{color:#a93226}svg{background:#fafafa}"""


def write_report(folder: Path, evaluation: Path, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Write FOLDER/report.json and FOLDER/report.html.

    Args:
        evaluation: what `anymal evaluate --permute-media --untrained --out` wrote.
        seconds: install, train, total.

    Returns:
        The content of report.json.
    """
    result = json.loads(evaluation.read_text())
    scores = result["scores"]
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
        "language_model_hash": {
            "before": _hashes(folder / "align")["before"],
            "after": _hashes(folder / "align_video")["after"],
        },
        "seconds": dict(seconds),
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    (folder / "report.html").write_text(_page(folder, report, result["answers"]["trained"]))
    return report


def _hashes(run: Path) -> dict[str, str]:
    return json.loads((run / "language_model.json").read_text())


def _page(folder: Path, report: Mapping[str, Any], answers: Sequence[Mapping[str, str]]) -> str:
    body = [f"<h1>Quickstart</h1>{_summary(report)}"]
    for name in MODALITIES:
        body.append(f"<h2>{name}: held-out samples</h2>{_cards(folder, name, answers)}")
    body.append("<h2>Curves</h2>")
    body += [_curve(folder / run / "metrics.jsonl", title) for run, title in RUNS.items()]
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
    same = "are the same" if hashes["before"] == hashes["after"] else "DIFFER"
    return (
        "<p>Exact greedy answers on samples that were never trained on: after alignment, before it, and with the media "
        "exchanged among the samples.</p><table><tr><th></th><th>after</th><th>before</th><th>media exchanged</th>"
        f"<th>guessing</th><th>samples</th></tr>{''.join(rows)}</table>"
        f"<p>The Llama's weights before and after {same} (<code>{hashes['after'][:16]}</code>). "
        f"Training took {report['seconds']['train']:.0f} s of {report['seconds']['total']:.0f} s.</p>"
    )


def _cards(folder: Path, name: str, answers: Sequence[Mapping[str, str]]) -> str:
    index = ShardIndex(str(folder / "data" / f"{name}_held_out"))
    by_key = {row["key"]: row for row in answers if row["modality"] == name}
    cards = []
    # Spread over the set, which may be ordered.
    for number in range(0, len(index), max(1, len(index) // EXAMPLES))[:EXAMPLES]:
        parts = index.parts(number)
        [media] = index.read_media(number, parts, [0])
        row = by_key[index.key(number)]
        asked = " ".join(part.text for part in parts[:-1] if isinstance(part, TextPart))
        verdict = "good" if row["given"] == row["expected"] else "bad"
        cards.append(
            f"<div class=card>{_media(media.part, media.data, media.extension)}<div>{html.escape(asked)}</div>"
            f"<b class={verdict}>{html.escape(row['given'])}</b>"
            f"<div>expected: {html.escape(row['expected'])}</div></div>"
        )
    return f"<div class=cards>{''.join(cards)}</div>"


def _media(part: MediaPart, data: bytes, extension: str) -> str:
    encoded = base64.b64encode(data).decode()
    if part.modality == "image":
        return f"<img src='data:image/{extension};base64,{encoded}' alt=''>"
    if part.modality == "video":
        return f"<video src='data:video/mp4;base64,{encoded}' autoplay loop muted controls></video>"
    if part.modality == "audio":
        return f"<audio src='data:audio/flac;base64,{encoded}' controls></audio>"
    signals = np.load(io.BytesIO(data))
    return _lines([signals[:, channel].tolist() for channel in range(signals.shape[1])], 220, 110)


def _curve(metrics: Path, title: str) -> str:
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    names = sorted({key for row in rows for key in row if key.startswith("loss/")})
    series = [[row[name] for row in rows if name in row] for name in names]
    legend = "  ".join(
        f"<b style='color:{_COLOURS[number % len(_COLOURS)]}'>{name.removeprefix('loss/')}</b> {values[-1]:.3f}"
        for number, (name, values) in enumerate(zip(names, series))
    )
    high, last = max(max(s) for s in series), rows[-1]["step"]
    return (
        f"<h3>{title}</h3><div>loss, from {high:.2f} (top) to 0, over {last} steps</div>"
        f"{_lines(series, 640, 180, low=0.0)}<p>at the end: {legend}</p>"
    )


def _lines(series: Sequence[Sequence[float]], width: int, height: int, low: float | None = None) -> str:
    """Curves as an inline picture, all on one scale that starts at `low` (or their smallest value)."""
    low = min(min(s) for s in series) if low is None else low
    high = max(max(s) for s in series)
    drawn = []
    for number, values in enumerate(series):
        points = " ".join(
            f"{width * i / max(1, len(values) - 1):.1f},{height * (1 - (v - low) / max(1e-9, high - low)):.1f}"
            for i, v in enumerate(values)
        )
        drawn.append(f"<polyline points='{points}' fill=none stroke='{_COLOURS[number % len(_COLOURS)]}'/>")
    return f"<svg viewBox='-4 -4 {width + 8} {height + 8}' width={width}>{''.join(drawn)}</svg>"
