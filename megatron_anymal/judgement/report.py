"""The results of a comparison as files: JSON, Markdown and an HTML page without scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_anymal.judgement.rubrics import RUBRICS


def write_report(folder: Path, result: Mapping[str, Any]) -> list[Path]:
    """Write results.json, results.md and results.html; return their paths.

    Args:
        result: of results.compute.

    Raises:
        OSError: a file cannot be written.
    """
    texts = {
        "results.json": json.dumps(result, indent=1, ensure_ascii=False) + "\n",
        "results.md": render("results.md.j2", result, escape=False),
        "results.html": render("results.html.j2", result, escape=True),
    }
    paths = []
    for name, text in texts.items():
        part = folder / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        paths.append(part.replace(folder / name))
    return paths


def summary(result: Mapping[str, Any]) -> str:
    """The results in a few lines for the console."""
    pairwise = result["pairwise"]
    head = f"{result['judgements']} judgement(s) of {result['judged_items']} of {result['items']} items"
    if pairwise is None:
        return f"{head}: nothing to report yet"
    shares = ", ".join(
        f"{label} {percent(pairwise[key])}"
        for label, key in (("A wins", "a_wins"), ("tie", "tie"), ("B wins", "b_wins"))
    )
    return f"{head}: {shares}"


def percent(estimate: Mapping[str, float]) -> str:
    """A share with its interval: 52.0 % (41.0 to 63.0)."""
    return f"{100 * estimate['value']:.1f} % ({100 * estimate['low']:.1f} to {100 * estimate['high']:.1f})"


def score(estimate: Mapping[str, float]) -> str:
    """A mean score with its interval: 1.52 (1.41 to 1.63)."""
    return f"{estimate['value']:.2f} ({estimate['low']:.2f} to {estimate['high']:.2f})"


def render(template: str, result: Mapping[str, Any], *, escape: bool) -> str:
    """Fill one of the package's templates."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megatron_anymal.judgement"),
        autoescape=escape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": percent, "score": score, "cell": _cell}
    return environment.get_template(template).render({**result, "rubrics": RUBRICS, "means": result["rubrics"]})


def _cell(text: object) -> str:
    """A text in a cell of a Markdown table."""
    return str(text).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
