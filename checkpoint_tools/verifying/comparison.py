"""Comparison of an exported folder with its checkpoint: token ids, encoder inputs and logits."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint_tools.verifying import exported_logits
from checkpoint_tools.verifying.native_logits import NativeModel
from checkpoint_tools.verifying.samples import VerificationSample
from megatron_anymal.config import RunConfig

# Largest allowed difference between two logits, relative to the largest logit, or to 1 if that is smaller.
TOLERANCE = 1e-5


class VerificationError(Exception):
    """The export and the trainer's model disagree; the message names the sample."""


@dataclass
class _SampleGroup:
    """Comparison results for one group of samples."""

    count: int = 0
    tokens: int = 0
    max_difference: float = 0.0
    largest_logit: float = 0.0
    same_choice: int = 0


def verify(folder: Path, config: RunConfig, export: Path, samples: Sequence[VerificationSample]) -> dict[str, Any]:
    """Compare an export with the checkpoint in `folder`, and print one line per group of samples.

    Returns:
        Contents of verification.json and of the model card's section: transformers' version, compute dtype, and one row
        per group of samples.

    Raises:
        VerificationError: the exported folder cannot be loaded, or its outputs differ.
    """
    with tempfile.TemporaryDirectory(prefix="anymal_verify_") as scratch:
        out = Path(scratch)
        version = _run_export(export, samples, out)
        llama_only = all(sample.prompt is None for sample in samples)
        merge = not (export / "adapter").is_dir()
        native = NativeModel(folder, config, llama_only=llama_only, merge=merge)
        groups: dict[str, _SampleGroup] = {}
        for number, sample in enumerate(samples):
            native_output = native.run(sample)
            export_output = torch.load(out / f"{number}.pt", weights_only=True)
            _compare(sample, native_output, export_output, groups.setdefault(sample.group, _SampleGroup()))
    rows = [
        {
            "samples": name,
            "count": group.count,
            "tokens": group.tokens,
            "max_difference": group.max_difference,
            "largest_logit": group.largest_logit,
            "same_choice": group.same_choice / group.tokens,
        }
        for name, group in groups.items()
    ]
    for row in rows:
        print(
            f"verified {row['samples']}: {row['count']} sample(s), {row['tokens']} tokens, logits differ by at most "
            f"{row['max_difference']:.1e} (largest logit {row['largest_logit']:.1f}), top-1 agreement "
            f"{row['same_choice']:.1%}"
        )
    return {"transformers": version, "dtype": "fp32", "tolerance": TOLERANCE, "rows": rows}


def _run_export(export: Path, samples: Sequence[VerificationSample], out: Path) -> str:
    """Compute all logits with the exported folder's own code; return transformers' version."""
    prompts = [sample.to_json(out / f"media_{number}") for number, sample in enumerate(samples)]
    (out / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    command = [sys.executable, "-I", exported_logits.__file__, str(export), str(out / "prompts.json"), str(out)]
    done = subprocess.run([*command, "float32"], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise VerificationError(f"the exported folder cannot be run with its own code: {last}")
    return (out / "transformers").read_text()


def _compare(sample: VerificationSample, native: dict[str, Any], exported: dict[str, Any], group: _SampleGroup) -> None:
    where = f"{sample.group}, sample {sample.key!r}"
    if native["tokens"].tolist() != exported["tokens"].tolist():
        raise VerificationError(f"{where}: the exported processor produces different token ids.")
    _same_media(where, native["media"], exported["media"])
    ours, theirs = native["logits"], exported["logits"]
    difference, largest = float((ours - theirs).abs().max()), float(ours.abs().max())
    # `not <=` rather than `>`, so that NaN logits fail.
    if not difference <= TOLERANCE * max(1.0, largest):
        raise VerificationError(
            f"{where}: logits differ by up to {difference:.2e} (largest logit {largest:.2f}, allowed "
            f"{TOLERANCE * max(1.0, largest):.0e}). The export is wrong."
        )
    group.count += 1
    group.tokens += len(ours)
    group.max_difference = max(group.max_difference, difference)
    group.largest_logit = max(group.largest_logit, largest)
    group.same_choice += int((ours.argmax(-1) == theirs.argmax(-1)).sum())


def _same_media(where: str, native: dict[str, Tensor], exported: dict[str, Tensor]) -> None:
    if native.keys() != exported.keys():
        media = f"media {sorted(exported)}, not {sorted(native)}"
        raise VerificationError(f"{where}: the exported processor returns {media}.")
    for name, pieces in native.items():
        if not torch.equal(pieces, exported[name]):
            raise VerificationError(f"{where}: the exported processor preprocesses {name!r} differently.")
