"""`python -m checkpoint_tools.inspect CHECKPOINT`: print a checkpoint's contents and verify its files."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.metadata import Stored, read_metadata
from megatron_anymal.checkpoint.store import CheckpointError, Manifest

_OPTIMIZER = "optimizer."


def main(argv: Sequence[str] | None = None) -> int:
    """Print step, data, base and components; return the exit code (2: no such checkpoint, or it is damaged)."""
    parser = argparse.ArgumentParser(prog="python -m checkpoint_tools.inspect", description=__doc__)
    parser.add_argument("checkpoint", help="checkpoint folder, or run folder for its newest valid checkpoint")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    arguments = parser.parse_args(argv)
    try:
        folder = store.resolve(arguments.checkpoint)
        manifest = store.read_manifest(folder, verify=True)
        tensors = read_metadata(folder).tensors
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum((folder / name).stat().st_size for name in manifest.files)
    print(f"{folder}\nstep {manifest.step}, {manifest.consumed_samples:,} samples consumed")
    print(f"{len(manifest.files)} files, {_megabytes(size)}, all checksums match")
    print(f"base: {_base(folder, manifest)}")
    print(f"data: {manifest.data_fingerprint or 'none'}")
    _print_parts(tensors)
    for line in _encoder_folders(folder, manifest):
        print(line)
    if arguments.tensors:
        for name, stored in tensors.items():
            shape = "x".join(map(str, stored.shape))
            print(f"  {name:70s} {stored.dtype:9s} {shape:>16s} {math.prod(stored.shape):>14,}")
    return 0


def _base(folder: Path, manifest: Manifest) -> str:
    """Describe where the Llama's weights come from."""
    if not manifest.base_hash:
        source = folder / "source.json"
        if source.is_file():
            came_from = json.loads(source.read_text())["llama"]["folder"]
            return f"none, the checkpoint holds the Llama imported from {came_from}"
        return "none, the checkpoint holds the Llama"
    lm = manifest.config["model"]["language_model"]
    where = lm.get("path") or lm.get("checkpoint") or "initialized from model.language_model.config and model.seed"
    return f"frozen Llama {manifest.base_hash}, {where}"


def _print_parts(tensors: dict[str, Stored]) -> None:
    """Print tensor counts and sizes per component, and those of the optimizer."""
    parts: dict[str, list[Stored]] = {}
    for name, stored in tensors.items():
        parts.setdefault(_part(name), []).append(stored)
    for part, members in sorted(parts.items(), key=lambda item: (item[0] == "optimizer", item[0])):
        count, size = sum(math.prod(s.shape) for s in members), sum(s.size for s in members)
        what = "values" if part == "optimizer" else "parameters"
        print(f"  {part:24s} {len(members):6d} tensors {count:>16,} {what:10s} {_megabytes(size):>14s}")


def _part(name: str) -> str:
    if name.startswith(_OPTIMIZER):
        return "optimizer"
    if ".lora." in name:
        return "adapters"
    if name.startswith("language_model."):
        return "Llama"
    return ".".join(name.split(".")[:2])


def _encoder_folders(folder: Path, manifest: Manifest) -> list[str]:
    """One line per encoder that was imported along with the Llama."""
    files_by_encoder: dict[str, list[str]] = {}
    for name in manifest.files:
        first, _, rest = name.partition("/")
        if first == "encoders" and rest:
            files_by_encoder.setdefault(rest.split("/")[0], []).append(name)
    return [
        f"  encoder folder {folder / 'encoders' / name}: {len(files)} files, "
        f"{_megabytes(sum((folder / file).stat().st_size for file in files))}"
        for name, files in sorted(files_by_encoder.items())
    ]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
