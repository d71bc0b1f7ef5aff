"""The export of a checkpoint: the files are written next to the target, verified, and put in place."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from checkpoint_tools.disk import check_space
from checkpoint_tools.exporting.card import write_card
from checkpoint_tools.exporting.model_files import TOKENIZER_SETTINGS, write_llama_files, write_model_files
from checkpoint_tools.exporting.shard_files import write_shards
from checkpoint_tools.exporting.weights import LLAMA, ExportedWeights
from checkpoint_tools.verifying.chat_ids import compare_chat_ids
from checkpoint_tools.verifying.comparison import verify
from checkpoint_tools.verifying.samples import choose_samples
from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.store import Manifest
from megatron_anymal.checkpoint.trust import config_of
from megatron_anymal.config import RunConfig
from megatron_anymal.data.tokenizer import Tokenizer
from megatron_anymal.processes.process_memory import peak_resident_bytes

_GIB = 1 << 30
# Allowance for the tokenizer and code, on top of the weights.
_SPARE = 64 << 20


def export(arguments: argparse.Namespace, folder: Path, out: Path) -> None:
    """Export the checkpoint in `folder` to `out`, as the command's arguments say.

    Raises:
        CheckpointError, ConfigError, DataError, TensorFileError: the checkpoint cannot be exported.
        VerificationError, ChatIdsError: the export differs from the trainer's model or token ids.
        OSError: the disk is full or cannot be written.
    """
    begun, memory = time.monotonic(), peak_resident_bytes()
    manifest = store.read_manifest(folder)
    # The Llama alone needs no plug-ins.
    trusted = arguments.trust_plugins or arguments.llama_only
    config = config_of(manifest, folder, trust_plugins=trusted)
    llama_only = arguments.llama_only or not (config.model.modalities or config.model.discrete)
    staging = out.parent / f".{out.name}.exporting"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with _checksums_compared(folder, manifest):
            samples = None
            if not arguments.no_verify:
                samples = choose_samples(config.model, config.data, arguments.data, arguments.samples, llama_only)
            staging.mkdir(parents=True)
            adapter, files = _write(arguments, staging, folder, manifest, config, llama_only)
        memory = peak_resident_bytes() - memory
        seconds = time.monotonic() - begun
        if (staging / TOKENIZER_SETTINGS).is_file():
            tokenizer = Tokenizer(config.data.tokenizer)
            modalities = {} if llama_only else config.model.modalities
            count = compare_chat_ids(staging, tokenizer, modalities, config.data)
            print(f"chat template: {count} conversation(s) produce the token ids of training")
        verification = None if samples is None else verify(folder, config, staging, samples)
        if verification:
            (staging / "verification.json").write_text(json.dumps(verification, indent=1) + "\n")
        write_card(
            staging,
            manifest,
            llama_only=llama_only,
            adapter=adapter,
            files=files,
            results=_last_results(folder, manifest.step),
            verification=verification,
        )
        store.sync_tree(staging)
        _put_in_place(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    moved = sum((out / name).stat().st_size for name in files)
    print(f"peak memory above the baseline at start: {memory / 1e6:,.0f} MB")
    print(
        f"{out} written: {len(files)} weight file(s){', adapters ' + adapter if adapter else ''}, "
        f"{moved / 1e9:.2f} GB in {seconds:.1f} s, {moved / 1e6 / seconds:,.0f} MB/s"
    )


@contextlib.contextmanager
def _checksums_compared(folder: Path, manifest: Manifest) -> Iterator[None]:
    """Verify the checksums of a checkpoint's files: small files before the block, weight files in parallel with it.

    Raises:
        CheckpointError: on entry or exit, if a file is missing or was changed.
    """
    large = [name for name in manifest.files if name.endswith((".distcp", ".safetensors"))]
    for name in sorted(manifest.files.keys() - set(large)):
        store.verify_file(folder, name, manifest.files[name])
    failed = threading.Event()

    def compare() -> None:
        for name in large:
            if not failed.is_set():
                store.verify_file(folder, name, manifest.files[name])

    with ThreadPoolExecutor(1) as executor:
        compared = executor.submit(compare)
        try:
            yield
        except BaseException:
            failed.set()
            raise
        compared.result()


def _put_in_place(staging: Path, out: Path) -> None:
    """Rename a finished folder into place; the old one is deleted last, so a kill never leaves a partial folder."""
    old = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    staging.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _write(
    arguments: argparse.Namespace,
    staging: Path,
    folder: Path,
    manifest: Manifest,
    config: RunConfig,
    llama_only: bool,
) -> tuple[str, dict[str, str]]:
    """Write everything except the model card.

    Returns:
        How adapters were exported ("" if there are none), and weight file -> SHA-256.
    """
    separate = arguments.adapter == "separate"
    weights = ExportedWeights(
        folder, manifest, config.model, config.trainer.precision, llama_only=llama_only, merge=not separate
    )
    for part, count in weights.left_out.items():
        print(f"left out: {part}, {count} tensor(s)")
    check_space(staging, sum(math.prod(shape) * dtype.itemsize for dtype, shape in weights.entries.values()) + _SPARE)
    if llama_only:
        write_llama_files(
            staging, config.data.tokenizer, weights.llama.exported, weights.llama.vocabulary, weights.entries
        )
    else:
        write_model_files(staging, config.model, config.data.tokenizer, weights.llama.exported, weights.entries)
    files = write_shards(staging, weights.entries, iter(weights), int(arguments.max_shard_gib * _GIB))
    if not weights.adapters.pairs:
        return "", files
    if separate:
        prefix = "" if llama_only else LLAMA
        written = weights.adapters.write(staging / "adapter", prefix, weights.entry, weights.read)
        files |= {f"adapter/{name}": digest for name, digest in written.items()}
    return arguments.adapter, files


def _last_results(folder: Path, step: int) -> dict[str, float]:
    """Return the last validation metrics at or before a step, from the metrics of the checkpoint's run."""
    metrics = folder.parent.parent / "metrics.jsonl"
    if not metrics.is_file():
        return {}
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    validations = [row for row in rows if "val_loss" in row and row["step"] <= step]
    return {name: value for name, value in validations[-1].items() if name.startswith("val_")} if validations else {}
