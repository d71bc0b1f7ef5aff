"""The guide to several alignments in one run: its configuration is valid, and its numbers are the measured ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml
from commands import blocks

from megatron_anymal.config.compose import from_dict
from megatron_anymal.config.validation import check

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guides" / "multiplex.md").read_text()


def test_configuration_is_valid() -> None:
    [text] = blocks(PAGE, "yaml")
    given = yaml.safe_load(text)["model"]["multiplex"]
    modalities = {name: {"encoder": {"type": "clip"}, "placeholder": f"<{name}>"} for name in given}
    config = from_dict(
        {
            "trainer": {"max_steps": 100_000},
            "model": {
                "language_model": {"config": {"hidden_size": 64}},
                "modalities": modalities,
                "multiplex": given,
            },
            "data": {"tokenizer": "t", "train": {name: {"path": name} for name in ("image_text", "audio_text")}},
        }
    )
    check(config)
    assert config.model.multiplex["audio"].max_steps == 1000


def test_measured_numbers() -> None:
    [name] = re.findall(r"`(benchmarks/results/\S+-multiplex\.json)`", PAGE)
    report, text = json.loads((ROOT / name).read_text()), " ".join(PAGE.split())
    assert f"one run takes {report['ratio']['fastest']:.2f} of the time of four runs" in text
    assert f"the plans predict {report['floor']:.2f} (" in text
    assert f"the predicted ratio is {report['floor_with_ends']:.2f}." in text
    assert report["ratio"]["fastest"] <= report["bar"] == 0.8 and report["losses_apart"] < 1e-6
