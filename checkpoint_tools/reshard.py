"""`python -m checkpoint_tools.reshard --checkpoint C --out D ...`: split a checkpoint for the ranks of another layout.

Any checkpoint loads under any layout as it is; after resharding, each rank reads only its own file. To continue a run
from the result, write it where the run looks for checkpoints: --out RUN/checkpoints/step_00000500.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoint_tools.disk import check_space, what_failed
from megatron_anymal import lean_imports
from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.store import CheckpointError, Manifest
from megatron_anymal.config import ConfigError, RunConfig

_MB = 1_000_000


def main(argv: Sequence[str] | None = None) -> int:
    """Reshard; return the exit code (2: resharding failed and nothing was changed)."""
    parser = argparse.ArgumentParser(prog="python -m checkpoint_tools.reshard", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder, or run folder for the newest one")
    parser.add_argument("--out", required=True, type=Path, help="checkpoint folder to create")
    parser.add_argument("--tensor-model-parallel-size", required=True, type=int, metavar="T")
    parser.add_argument("--pipeline-model-parallel-size", required=True, type=int, metavar="P")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint in --out")
    parser.add_argument("--trust-plugins", action="store_true", help="run plug-ins named by the checkpoint")
    arguments = parser.parse_args(argv)
    try:
        _reshard(arguments)
    except (CheckpointError, ConfigError) as error:
        message = str(error)
    except OSError as error:
        message = what_failed(error, arguments.out, "Free up space, or choose another location. Nothing was kept.")
    else:
        return 0
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _reshard(arguments: argparse.Namespace) -> None:
    lean_imports.install()
    from checkpoint_tools.rank_boxes import boxes_of_ranks
    from megatron_anymal.checkpoint.safe_loading import check_pickles

    out: Path = arguments.out.absolute()
    sizes = arguments.tensor_model_parallel_size, arguments.pipeline_model_parallel_size
    if min(sizes) < 1:
        raise ConfigError(f"The parallel sizes {sizes} must be at least 1.")
    if out.exists() and not (arguments.overwrite and (out / store.MANIFEST).is_file()):
        raise ConfigError(f"--out={str(out)!r} exists. Choose another folder, or add --overwrite for a checkpoint.")
    folder = store.resolve(arguments.checkpoint)
    if folder.absolute() == out:
        raise ConfigError("--out is the checkpoint itself. Choose another folder.")
    manifest = store.read_manifest(folder, verify=True)
    # Pickle files are copied unchanged.
    check_pickles(folder)
    config = _laid_out(folder, manifest, *sizes, trust_plugins=arguments.trust_plugins)
    boxes = boxes_of_ranks(config.model, config.trainer.precision, manifest, folder)
    size = sum((folder / name).stat().st_size for name in manifest.files)
    out.parent.mkdir(parents=True, exist_ok=True)
    check_space(out, size)
    staging = out.parent / f".{out.name}.resharding"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        digests = _write(folder, manifest, boxes, staging)
        store.commit(staging, out, replace(manifest, config=config.to_dict(), files={}), digests)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"{out}: {len(boxes)} files for tensor- and pipeline-parallel sizes {sizes[0]} and {sizes[1]}")


def _laid_out(folder: Path, manifest: Manifest, tensor_size: int, stages: int, *, trust_plugins: bool) -> RunConfig:
    """The checkpoint's configuration with new parallel sizes and without settings specific to the old ones."""
    from megatron_anymal.checkpoint.trust import config_of

    config = config_of(manifest, folder, trust_plugins=trust_plugins)
    m = config.model
    m.tensor_model_parallel_size, m.pipeline_model_parallel_size = tensor_size, stages
    m.virtual_pipeline_model_parallel_size = 1
    m.num_layers_in_first_pipeline_stage = m.num_layers_in_last_pipeline_stage = 0
    m.sequence_parallel = m.sequence_parallel and tensor_size > 1
    replica = tensor_size * stages * m.context_parallel_size
    if config.world_size % replica:
        config.trainer.num_nodes, config.trainer.devices = 1, replica
    return config


def _write(folder: Path, manifest: Manifest, boxes: dict[str, list[Any]], staging: Path) -> dict[str, str]:
    """Write one file per rank and copy the other files; return the digests of files hashed while writing."""
    from megatron_anymal.checkpoint.metadata import METADATA
    from megatron_anymal.checkpoint.safe_loading import COMMON, FORMAT
    from megatron_anymal.checkpoint.tensor_stream import StreamReader, StreamWriter, write_index
    from megatron_anymal.telemetry import Progress

    reader = StreamReader(folder)
    progress = Progress("resharding", sum(stored.size for stored in reader.tensors.values()) // _MB, "MB")
    written = reported = 0
    files = []
    for number, (name, parts) in enumerate(boxes.items()):
        file = StreamWriter(staging / name)
        try:
            for key, offset, size in parts:
                tensor = reader.read_box(key, offset, size)
                file.add(key, reader.tensors[key].shape, offset, tensor)
                written += tensor.nbytes
                del tensor
                if written // _MB > reported:
                    progress.advance(written // _MB - reported)
                    reported = written // _MB
            for key in reader.objects if number == 0 else ():
                file.add_object(key, reader.read_object(key))
        except BaseException:
            file.abandon()
            raise
        files.append(file.close())
    progress.finish()
    for name in manifest.files:
        if not name.endswith(".distcp") and name not in (METADATA, COMMON, FORMAT):
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, staging / name)
    return write_index(staging, files, reader.common_bytes())


if __name__ == "__main__":
    sys.exit(main())
