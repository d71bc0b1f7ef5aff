"""The page of `anymal evaluate --task`: scores, the paper's numbers, and examples with their media. One HTML file that
needs no scripts, external files or network."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_anymal.cli.data_page.charts import bar
from megatron_anymal.cli.data_page.markup import count, notes, short, table, text
from megatron_anymal.cli.data_page.style import STYLE
from megatron_anymal.evaluation.comparison import Difference
from megatron_anymal.evaluation.media_cells import MediaItem
from megatron_anymal.evaluation.report import difference_rows, paper_rows, score_rows
from megatron_anymal.evaluation.samples import TaskSample
from megatron_anymal.modalities.libraries import library

# Examples per task: this many with the lowest values of the first metric, and as many with the highest.
EXAMPLES = 6
# Largest side of a picture, in pixels.
_SIDE = 256
_PICTURES = ("png", "jpg", "jpeg", "webp", "gif", "bmp")


def write_page(
    file: Path,
    results: Mapping[str, Any],
    samples: Mapping[str, Sequence[TaskSample]],
    differences: Sequence[Difference] = (),
    against: str = "",
) -> None:
    """Write the page.

    Args:
        file: path of the page; an existing file is replaced.
        results: as returned by `evaluation.results`.
        samples: task -> its samples, in the order of the results' answers.

    Raises:
        OSError: the file cannot be written.
        DataError: a picture of an example cannot be read.
    """
    head, rows = score_rows(results)
    body = [table(head, [list(map(text, row)) for row in rows], "Scores in percent, with standard errors", texts=2)]
    if differences:
        head, rows = difference_rows(differences, results)
        caption = f"Differences from {short(against)}: paired bootstrap over the samples"
        body.append(table(head, [list(map(text, row)) for row in rows], caption, texts=2))
    body += [_task(name, result, samples[name]) for name, result in results["tasks"].items()]
    title = f"Evaluation of {short(results['checkpoint'])}"
    links = "".join(f"<a href='#{text(n)}'>{text(r['title'])}</a>" for n, r in results["tasks"].items())
    file.write_text(
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{title}</title><style>{STYLE}</style></head><body><nav aria-label=Tasks>{links}</nav>"
        f"<main><h1>{title}</h1>{''.join(body)}</main></body></html>\n",
        encoding="utf-8",
    )


def _task(name: str, result: Mapping[str, Any], samples: Sequence[TaskSample]) -> str:
    parts = [f"<h2 id='{text(name)}'>{text(result['title'])}</h2>"]
    parts += [f"<p class=quiet>{text(entry)}</p>" for entry in (result["source"], result["notes"]) if entry]
    about = [("samples", count(result["samples"])), ("outputs without a parsable answer", count(result["unparsed"]))]
    parts.append(notes(about))
    for metric in result["scores"]:
        compared = paper_rows(result, metric)
        if len(compared) > 1:
            title, where = result["scores"][metric]["title"], result["paper"]["where"]
            caption = f"{text(title)}, compared with the paper ({text(where)})"
            cells = [[text(model), bar(max(0.0, value), 100, f"{value:.1f}")] for model, value in compared]
            parts.append(table(["model", "score"], cells, caption))
    if result["breakdown"]:
        names = list(result["scores"])
        cells = [
            [text(group or "none"), count(part["samples"]), *(f"{part[name]:.1f}" for name in names)]
            for group, part in result["breakdown"].items()
        ]
        parts.append(table(["subset", "samples", *map(text, names)], cells, "Scores by subset"))
    metric = next(iter(result["scores"]))
    return "".join(parts) + "".join(
        _example(result["answers"][number], samples[number]) for number in chosen(result["answers"], metric)
    )


def chosen(answers: Sequence[Mapping[str, Any]], metric: str) -> list[int]:
    """Positions of the answers shown: the lowest values, then the highest, each once."""
    order = sorted(range(len(answers)), key=lambda number: answers[number]["values"][metric])
    return list(dict.fromkeys([*order[:EXAMPLES], *order[-EXAMPLES:]]))


def _example(row: Mapping[str, Any], sample: TaskSample) -> str:
    values = ", ".join(f"{name} {value:.2f}" for name, value in row["values"].items())
    pairs = [("question", row["question"])] if row["question"] else []
    pairs += [("options", "; ".join(row["options"]))] if row["options"] else []
    pairs += [("expected", "; ".join(dict.fromkeys(row["references"]))), ("model's text", row["text"])]
    pairs += [("read as", row["answer"])] if row["answer"] != row["text"] else []
    pictures = "".join(_media(item) for item in sample.media)
    shown = notes([(name, short(value, 600) or "\u2205") for name, value in pairs])
    return f"<article><h3>{short(row['key'])} <small>{text(values)}</small></h3>{pictures}{shown}</article>"


def _media(item: MediaItem) -> str:
    """A picture; for any other file, its name and size."""
    file = item.read()
    if file.extension not in _PICTURES:
        return f"<p class=quiet>{short(item.name)}: {count(len(file.data))} bytes</p>"
    try:
        picture = library("PIL.Image").open(io.BytesIO(file.data)).convert("RGB")
    except OSError as error:
        return f"<p class=why>{short(item.name)}: {text(error)}</p>"
    picture.thumbnail((_SIDE, _SIDE))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=80)
    data = base64.b64encode(out.getvalue()).decode()
    return f"<p><img src='data:image/jpeg;base64,{data}' alt='{short(item.name)}'></p>"
