"""The page on `anymal plan` shows what its command prints, all options, all GPUs and the stored accuracy."""

from __future__ import annotations

import json
import re
from pathlib import Path

from commands import PAGES, ROOT, run

from megatron_anymal.cli.layout_search import _parser
from megatron_anymal.planning.layouts.hardware import known_gpus

PAGE = PAGES["docs/guides/plan.md"]


def test_the_output_is_that_of_the_command(tmp_path: Path) -> None:
    [(command, shown)] = re.findall(
        r"^```bash\n(anymal plan --config-name[^\n]*)\n```\n\n```text\n(.*?)^```", PAGE, re.S | re.M
    )
    assert shown in run(command, tmp_path)
    assert (tmp_path / "planned.yaml").is_file() and (tmp_path / "planned.html").is_file()


def test_options_and_gpus_are_listed() -> None:
    table = PAGE.partition("## Options")[2].partition("\n\n## ")[0]
    listed = set(re.findall(r"`(--[a-z-]+)`", table))
    options = {text for action in _parser()._actions for text in action.option_strings if text.startswith("--")}
    assert listed >= options - {"--help", "--config-name", "--config-path"}
    assert all(name in table for name in known_gpus())


def test_accuracy_is_that_of_the_results() -> None:
    stored = json.loads((ROOT / "benchmarks" / "results" / "2026-11-29-plan-accuracy.json").read_text())
    for row in stored["published"]["rows"]:
        line = f"| {row['name']} | {row['published']:.2f} s | {row['predicted']:.2f} s | {100 * row['error']:+.0f} % |"
        assert line in PAGE, line
    assert f"{100 * stored['published']['mean_error']:.1f} %" in PAGE
    measured = json.loads((ROOT / "benchmarks" / "results" / "2026-11-29-plan-ranking.json").read_text())
    flowing = " ".join(PAGE.split())
    assert f"{measured['rank_correlation']:.2f} over {len(measured['rows'])} layouts" in flowing
    alone = measured["rank_correlation_of_pipelines"]
    assert f"{alone:.2f} over the {measured['pipelines']} without tensor" in flowing
    assert f"is {100 * measured['shortfall']:.1f} % slower" in flowing
    assert f"load average {measured['load'][1]:.0f})" in flowing
    assert f"instead of {1e3 * measured['costs']['4']['collective']:.1f})" in flowing
