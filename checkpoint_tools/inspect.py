"""`python -m checkpoint_tools.inspect CHECKPOINT`: what a checkpoint holds, and whether its files are unchanged."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.store import CheckpointError
from megatron_anymal.quiet import quiet_libraries


def main(argv: Sequence[str] | None = None) -> int:
    """Print step, data, base and tensors; return the exit code (2: no such checkpoint, or a damaged one)."""
    parser = argparse.ArgumentParser(prog="python -m checkpoint_tools.inspect", description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint's folder, or its run's folder for the newest valid one")
    arguments = parser.parse_args(argv)
    quiet_libraries()
    try:
        folder = store.resolve(arguments.checkpoint)
        manifest = store.read_manifest(folder, verify=True)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum((folder / name).stat().st_size for name in manifest.files)
    print(f"{folder}\nstep {manifest.step}, {manifest.consumed_samples:,} samples consumed")
    print(f"{len(manifest.files)} files, {size / 1e6:,.1f} MB, all checksums hold")
    print(f"frozen Llama: {manifest.base_hash or 'none, the checkpoint holds the Llama'}")
    print(f"data: {manifest.data_fingerprint}")
    for name, shape, kind in _tensors(str(folder)):
        print(f"  {name:70s} {kind:9s} {'x'.join(map(str, shape)):>16s} {math.prod(shape):>14,}")
    return 0


def _tensors(folder: str) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, whole shape, type) of every weight, sorted; the optimizer's state is left out."""
    from megatron.core import dist_checkpointing

    found = dist_checkpointing.load_tensors_metadata(folder)
    return [
        (name, tuple(tensor.global_shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in sorted(found.items())
        if not name.startswith("optimizer.")
    ]


if __name__ == "__main__":
    sys.exit(main())
