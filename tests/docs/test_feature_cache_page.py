"""docs/guides/feature-cache.md: its command and configuration work, and its numbers are measured ones."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import yaml
from commands import PAGES, ROOT, blocks, commands, run

from megatron_anymal.config.compose import from_dict
from megatron_anymal.config.validation import check

PAGE = PAGES["docs/guides/feature-cache.md"]


def test_command_runs(quickstart_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(quickstart_folder, tmp_path / "runs" / "quickstart")
    [command] = commands(PAGE)
    first, second = run(command, tmp_path), run(command, tmp_path)
    stored = int(re.findall(r"(\d+) pieces encoded", first)[0])
    assert stored > 0 and "encoding media" in first
    assert (
        "0 pieces encoded" in second
        and f"{stored + int(re.findall('([0-9]+) already', first)[0])} already cached" in second
    )


def test_configuration_is_valid() -> None:
    [text] = blocks(PAGE, "yaml")
    given = yaml.safe_load(text)
    given["data"]["tokenizer"] = "tokenizer"
    image = {"encoder": {"type": "clip"}, "placeholder": "<|reserved_special_token_0|>"}
    config = from_dict(
        {**given, "model": {"language_model": {"config": {"hidden_size": 64}}, "modalities": {"image": image}}}
    )
    check(config)
    assert config.data.feature_cache.names(["image"]) == ["image"]


def test_measured_numbers() -> None:
    [name] = re.findall(r"`(benchmarks/results/\S+-feature-cache\.json)`", PAGE)
    report, text = json.loads((ROOT / name).read_text()), " ".join(PAGE.split())
    assert f"{report['encoder_share']:.0%} of a step" in text.replace(" %", "%")
    assert f"{report['speedup']['median']:.2f} times" in text
    assert f"{report['hit_share']:.1%} of encoding" in text.replace(" %", "%")
    assert f"{report['reading']['bytes_per_second'] / 1e9:.1f} GB" in text
    assert report["speedup"]["median"] >= 1.35 and report["hit_share"] <= 0.03
    assert report["reading"]["entries"] == 10_000 and report["reading"]["bytes_per_second"] >= 1e9
