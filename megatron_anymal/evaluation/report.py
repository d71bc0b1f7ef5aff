"""Results as Markdown: scores beside the paper's, breakdowns, and differences from another result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_anymal.evaluation.comparison import Difference

# Models of the paper that every table shows.
PAPER_MODELS = ("AnyMAL", "AnyMAL 8B", "AnyMAL 13B", "AnyMAL 70B")


def score_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of scores, with the paper's values of AnyMAL and its table or section."""
    models = [model for model in PAPER_MODELS if any(model in row for _, row in _papers(results))]
    head = ["task", "metric", "score", "samples", *(f"{model} (paper)" for model in models), "where"]
    rows = []
    for result in results["tasks"].values():
        for name, score in result["scores"].items():
            paper = (result["paper"] or {}).get("values", {}).get(name, {})
            error = score["standard_error"]
            shown = f"{score['value']:.1f}" + (f" ± {error:.1f}" if error is not None else "")
            printed = [f"{paper[model]:.1f}" if model in paper else "" for model in models]
            where = result["paper"]["where"] if paper else ""
            rows.append([result["title"], score["title"], shown, str(result["samples"]), *printed, where])
    return head, rows


def paper_rows(result: Mapping[str, Any], name: str) -> list[tuple[str, float]]:
    """This score and all of the paper's, the best first."""
    values = {**(result["paper"] or {}).get("values", {}).get(name, {}), "this model": result["scores"][name]["value"]}
    return sorted(values.items(), key=lambda pair: -pair[1])


def difference_rows(differences: Sequence[Difference], results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of differences."""
    head = ["task", "metric", "difference", "95 % interval", "p", "samples"]
    rows = []
    for one in differences:
        result = results["tasks"][one.task]
        title, interval = result["scores"][one.metric]["title"], f"{one.low:+.2f} to {one.high:+.2f}"
        rows.append([result["title"], title, f"{one.difference:+.2f}", interval, f"{one.p:.4f}", str(one.samples)])
    return head, rows


def markdown(results: Mapping[str, Any], differences: Sequence[Difference] = (), against: str = "") -> str:
    """The whole report."""
    lines = ["# Evaluation", "", f"Checkpoint: `{results['checkpoint']}`", "", *_table(*score_rows(results))]
    if results["caption_tokens"] == "python" and any("cider" in r["scores"] for r in results["tasks"].values()):
        lines += ["", "Captions were split in Python, because there is no Java: scores may differ slightly."]
    if differences:
        lines += ["", f"## Against `{against}`", "", "Paired bootstrap over the samples.", ""]
        lines += _table(*difference_rows(differences, results))
    for result in results["tasks"].values():
        lines += ["", f"## {result['title']}", ""]
        if result["unparsed"]:
            lines += [f"{result['unparsed']} of {result['samples']} texts hold no answer; they count as wrong.", ""]
        if result.get("rejected"):
            codes = ", ".join(f"{code} {count}" for code, count in result["rejected"].items())
            lines += [f"{sum(result['rejected'].values())} queries were rejected ({codes}); they count as wrong.", ""]
        if result["notes"]:
            lines += [" ".join(result["notes"].split()), ""]
        for name in result["scores"]:
            compared = paper_rows(result, name)
            if len(compared) > 1:
                title = f"{result['scores'][name]['title']} ({result['paper']['where']})"
                lines += [*_table(["model", title], [[model, f"{value:.1f}"] for model, value in compared]), ""]
        if result["breakdown"]:
            names = list(result["scores"])
            rows = [
                [group, str(part["samples"]), *(f"{part[name]:.1f}" for name in names)]
                for group, part in result["breakdown"].items()
            ]
            lines += _table(["part", "samples", *(result["scores"][name]["title"] for name in names)], rows)
    return "\n".join(lines).rstrip() + "\n"


def _papers(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    return [
        pair for result in results["tasks"].values() if result["paper"] for pair in result["paper"]["values"].items()
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, ["---"] * len(head), *rows)]
    return [f"| {' | '.join(row)} |" for row in cells]
