"""`python -m checkpoint_tools.verify --checkpoint CHECKPOINT --export FOLDER`: compare an export with its checkpoint.

The trainer's own model and the exported folder, loaded by its own code in a process that cannot import the trainer,
run on the same samples of every modality and on one sample that combines all of them. Token ids and encoder inputs must
be identical, logits equal up to rounding. Both compute in fp32 on the weights as the run had them.
"""

from __future__ import annotations

import argparse
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
from checkpoint_tools.verifying.chat_ids import ChatIdsError, compare_chat_ids
from checkpoint_tools.verifying.native_logits import NativeModel
from checkpoint_tools.verifying.samples import VerificationSample, choose_samples
from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.store import CheckpointError
from megatron_anymal.checkpoint.trust import FLAG, config_of
from megatron_anymal.config import ConfigError, RunConfig
from megatron_anymal.data.records import DataError
from megatron_anymal.data.tokenizer import Tokenizer
from megatron_anymal.hf.remote_code import foreign_code

# Largest allowed difference between two logits, relative to the largest logit, or to 1 if that is smaller.
TOLERANCE = 1e-5


class VerificationError(Exception):
    """The export and the trainer's model disagree; the message names the sample."""


@dataclass
class _Group:
    """Comparison results for one group of samples."""

    count: int = 0
    tokens: int = 0
    max_difference: float = 0.0
    largest_logit: float = 0.0
    same_choice: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print the results; return the exit code (1: they differ, 2: they cannot be compared)."""
    parser = argparse.ArgumentParser(prog="python -m checkpoint_tools.verify", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder, or run folder for the newest one")
    parser.add_argument("--export", required=True, help="folder that checkpoint_tools.export_hf wrote for it")
    parser.add_argument("--data", action="append", default=[], help="prepared folder (repeatable); default: the run's")
    parser.add_argument("--samples", type=int, default=2, help="number of samples per modality")
    parser.add_argument(FLAG, action="store_true", help="run plug-ins named by the checkpoint")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the export's code even if it is unknown")
    arguments = parser.parse_args(argv)
    try:
        folder, export = store.resolve(arguments.checkpoint), Path(arguments.export)
        if not (export / "config.json").is_file():
            raise ConfigError(f"--export={str(export)!r} has no config.json. Pass a folder written by export_hf.")
        config = config_of(store.read_manifest(folder, verify=True), folder, trust_plugins=arguments.trust_plugins)
        if not arguments.trust_remote_code and (foreign := foreign_code(export)):
            raise ConfigError(
                f"--export={str(export)!r}: {foreign[0]} differs from this installation's code and would be executed. "
                "Export again, or review the file and allow it with --trust-remote-code."
            )
        llama_only = json.loads((export / "config.json").read_text())["model_type"] == "llama"
        samples = choose_samples(config.model, config.data, arguments.data, arguments.samples, llama_only)
        verify(folder, config, export, samples)
        if (export / "tokenizer_config.json").is_file() and config.data.tokenizer:
            modalities = {} if llama_only else config.model.modalities
            compare_chat_ids(export, Tokenizer(config.data.tokenizer), modalities, config.data)
    except (VerificationError, ChatIdsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (CheckpointError, ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


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
        native = NativeModel(folder, config, llama_only=all(sample.prompt is None for sample in samples))
        groups: dict[str, _Group] = {}
        for number, sample in enumerate(samples):
            native_output = native.run(sample)
            export_output = torch.load(out / f"{number}.pt", weights_only=True)
            _compare(sample, native_output, export_output, groups.setdefault(sample.group, _Group()))
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


def _compare(sample: VerificationSample, here: dict[str, Any], there: dict[str, Any], group: _Group) -> None:
    where = f"{sample.group}, sample {sample.key!r}"
    if here["tokens"].tolist() != there["tokens"].tolist():
        raise VerificationError(f"{where}: the exported processor produces different token ids.")
    _same_media(where, here["media"], there["media"])
    ours, theirs = here["logits"], there["logits"]
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


def _same_media(where: str, here: dict[str, Tensor], there: dict[str, Tensor]) -> None:
    if here.keys() != there.keys():
        raise VerificationError(f"{where}: the exported processor returns media {sorted(there)}, not {sorted(here)}.")
    for name, pieces in here.items():
        if not torch.equal(pieces, there[name]):
            raise VerificationError(f"{where}: the exported processor preprocesses {name!r} differently.")


if __name__ == "__main__":
    sys.exit(main())
