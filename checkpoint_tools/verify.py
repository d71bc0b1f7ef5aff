"""`python -m checkpoint_tools.verify --checkpoint CHECKPOINT --export FOLDER`: an export beside the model it came from.

The trainer's own model and the exported folder, loaded by its own code in a process that cannot import the trainer,
are given the same samples of every modality, and one with all of them together. Token ids and encoder inputs must be
the same, logits the same within rounding. Both compute in fp32 on the weights as the run had them.
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

# Largest difference of two logits, as a share of the largest logit (and of 1 where logits are small).
TOLERANCE = 1e-5


class VerificationError(Exception):
    """The export does not compute what the trainer's model does. The message says where."""


@dataclass
class _Group:
    """Samples of one kind, compared."""

    count: int = 0
    tokens: int = 0
    max_difference: float = 0.0
    largest_logit: float = 0.0
    same_choice: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print; return the exit code (1: they differ, 2: it could not be done)."""
    parser = argparse.ArgumentParser(prog="python -m checkpoint_tools.verify", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="a checkpoint's folder, or its run's folder")
    parser.add_argument("--export", required=True, help="what checkpoint_tools.export_hf made of it")
    parser.add_argument("--data", action="append", default=[], help="prepared folders; default: the run's")
    parser.add_argument("--samples", type=int, default=2, help="samples of each modality")
    parser.add_argument(FLAG, action="store_true", help="import plug-ins that the checkpoint names")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the export's code, whatever it is")
    arguments = parser.parse_args(argv)
    try:
        folder, export = store.resolve(arguments.checkpoint), Path(arguments.export)
        if not (export / "config.json").is_file():
            raise ConfigError(f"--export={str(export)!r} holds no config.json. Name a folder made by export_hf.")
        config = config_of(store.read_manifest(folder, verify=True), folder, trust_plugins=arguments.trust_plugins)
        if not arguments.trust_remote_code and (foreign := foreign_code(export)):
            raise ConfigError(
                f"--export={str(export)!r}: {foreign[0]} is not this installation's code, and would run. Export again, "
                "or read it and allow it with --trust-remote-code."
            )
        llama_only = json.loads((export / "config.json").read_text())["model_type"] == "llama"
        samples = choose_samples(config, arguments.data, arguments.samples, llama_only)
        verify(folder, config, export, samples)
        if (export / "tokenizer_config.json").is_file() and config.data.tokenizer:
            compare_chat_ids(export, Tokenizer(config.data.tokenizer), config, llama_only=llama_only)
    except (VerificationError, ChatIdsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (CheckpointError, ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def verify(folder: Path, config: RunConfig, export: Path, samples: Sequence[VerificationSample]) -> dict[str, Any]:
    """Compare an export with the checkpoint in `folder`, and print a line for each kind of samples.

    Returns:
        For the model card and verification.json: transformers' version, the type that was computed in, a row for each
        kind of samples.

    Raises:
        VerificationError: the exported folder cannot be loaded, or differs.
    """
    with tempfile.TemporaryDirectory(prefix="anymal_verify_") as scratch:
        out = Path(scratch)
        version = _run_export(export, samples, out)
        native = NativeModel(folder, config, llama_only=all(sample.prompt is None for sample in samples))
        groups: dict[str, _Group] = {}
        for number, sample in enumerate(samples):
            here = native.run(sample)
            there = torch.load(out / f"{number}.pt", weights_only=True)
            _compare(sample, here, there, groups.setdefault(sample.group, _Group()))
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
            f"verified {row['samples']}: {row['count']} sample(s), {row['tokens']} tokens, largest difference "
            f"{row['max_difference']:.1e} of logits up to {row['largest_logit']:.1f}, same likeliest token "
            f"{row['same_choice']:.1%}"
        )
    return {"transformers": version, "dtype": "fp32", "tolerance": TOLERANCE, "rows": rows}


def _run_export(export: Path, samples: Sequence[VerificationSample], out: Path) -> str:
    """Let the exported folder compute all logits; returns transformers' version."""
    prompts = [sample.to_json(out / f"media_{number}") for number, sample in enumerate(samples)]
    (out / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    command = [sys.executable, "-I", exported_logits.__file__, str(export), str(out / "prompts.json"), str(out)]
    done = subprocess.run([*command, "float32"], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise VerificationError(f"the exported folder cannot be run by its own code: {last}")
    return (out / "transformers").read_text()


def _compare(sample: VerificationSample, here: dict[str, Any], there: dict[str, Any], group: _Group) -> None:
    where = f"{sample.group}, sample {sample.key!r}"
    if here["tokens"].tolist() != there["tokens"].tolist():
        raise VerificationError(f"{where}: the exported processor makes other token ids.")
    _same_media(where, here["media"], there["media"])
    ours, theirs = here["logits"], there["logits"]
    difference, largest = float((ours - theirs).abs().max()), float(ours.abs().max())
    # Written so that a logit that is no number fails.
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
        raise VerificationError(f"{where}: the exported processor finds the media {sorted(there)}, not {sorted(here)}.")
    for name, pieces in here.items():
        if not torch.equal(pieces, there[name]):
            raise VerificationError(f"{where}: the exported processor prepares {name!r} in another way.")


if __name__ == "__main__":
    sys.exit(main())
