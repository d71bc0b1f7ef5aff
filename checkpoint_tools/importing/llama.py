"""Import of a HuggingFace Llama: staged next to the target, resumable file by file, committed atomically."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from checkpoint_tools.disk import check_space
from checkpoint_tools.importing.units import Unit, units_of, write_unit
from checkpoint_tools.importing.workers import run_workers
from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.store import Manifest
from megatron_anymal.checkpoint.tensor_stream import StoredFile, write_index
from megatron_anymal.config import ConfigError, LanguageModelConfig, RunConfig
from megatron_anymal.hf_weights import HFWeights
from megatron_anymal.model.hf_llama import account
from megatron_anymal.model.llama_shape import read_llama_config
from megatron_anymal.safetensors_io import TensorFileError
from megatron_anymal.telemetry import Progress

SOURCE = "source.json"
# Allowance for file headers and the index, on top of the weights.
_SPARE = 64 << 20
_MB = 1_000_000
# Tokenizer files of the tokenizers library, of SentencePiece, and of BPE with a vocabulary file.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class _Staging:
    """Staging directory of an import: `checkpoint` becomes the result, `records` has one record per finished file."""

    root: Path

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint"

    def begin(self, source: dict[str, Any]) -> list[StoredFile]:
        """Resume an interrupted import of the same source, or start afresh.

        Returns:
            The finished files.
        """
        source_file = self.root / SOURCE
        try:
            same = json.loads(source_file.read_text()) == source
        except (OSError, ValueError):
            same = False
        if not same:
            if source_file.exists():
                print("The source changed since the import began: starting afresh.", flush=True)
            for path in (self.root / "records", self.checkpoint):
                shutil.rmtree(path, ignore_errors=True)
        (self.root / "records").mkdir(parents=True, exist_ok=True)
        self.checkpoint.mkdir(exist_ok=True)
        _write_whole(source_file, source)
        finished = []
        for record in sorted((self.root / "records").glob("*.json")):
            body = json.loads(record.read_text())
            path = self.checkpoint / body["name"]
            if path.is_file() and path.stat().st_size == body["bytes"]:
                finished.append(StoredFile.from_dict(body))
        return finished

    def record(self, file: StoredFile) -> None:
        """Record that a file is finished."""
        size = (self.checkpoint / file.name).stat().st_size
        _write_whole(self.root / "records" / f"{file.name}.json", {**file.to_dict(), "bytes": size})


def import_llama(folder: Path, out: Path, encoders: dict[str, Path], processes: int) -> None:
    """Import a HuggingFace folder as a checkpoint folder, or resume an interrupted import.

    Args:
        out: an existing checkpoint there is replaced once the new one is complete.
        encoders: modality -> HuggingFace folder, copied into the checkpoint.
        processes: number of worker processes.

    Raises:
        ConfigError, CheckpointError, TensorFileError, WorkerError, OSError: the message is one line for the user.
    """
    out = out.absolute()
    # Workers are forked from this process, so it must not have running threads.
    torch.set_num_threads(1)
    begun = time.monotonic()
    hf = _read_config(folder)
    weights = HFWeights(folder)
    for note in account(hf, weights):
        print(note)
    for config in (folder / "adapter_config.json", folder / "adapter" / "adapter_config.json"):
        if config.is_file():
            print(f"left out: the adapters of {config}. To include them, merge them before the import.")
    staging = _Staging(out.parent / f".{out.name}.importing")
    staging.root.mkdir(parents=True, exist_ok=True)
    with open(staging.root / "lock", "w") as lock:
        _take(lock, staging.root)
        source = _fingerprint(folder, encoders)
        done = staging.begin(source)
        left = _left(units_of(hf), done)
        if done:
            print(f"Resuming: {len(done)} of {len(done) + len(left)} files are finished.", flush=True)
        check_space(out, sum(unit.size(hf, weights) for unit in left) + _SPARE)
        moved = _write(processes, left, hf, weights, staging)
        lines = _copy_encoders(encoders, staging.checkpoint / "encoders")
        _write_whole(staging.checkpoint / SOURCE, source)
        _commit(hf, folder, staging, out)
    shutil.rmtree(staging.root)
    print("\n".join(lines + [""]) if lines else "", end="")
    seconds = time.monotonic() - begun
    print(
        f"{out}: {len(weights)} tensors imported, {moved / 1e9:.2f} GB in {seconds:.1f} s, "
        f"{moved / 1e6 / seconds:,.0f} MB/s"
    )


def _read_config(folder: Path) -> LlamaConfig:
    try:
        return read_llama_config(LanguageModelConfig(path=str(folder)))
    except (ConfigError, TensorFileError):
        raise
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ConfigError(f"{str(folder / 'config.json')!r} is damaged ({error}). Download it again.") from None


def _take(lock: Any, root: Path) -> None:
    """Lock a staging directory; retries, since workers of a killed import hold the lock for a moment longer."""
    for _ in range(20):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.1)
    raise ConfigError(f"Another import is writing to {str(root)!r}. Wait for it to finish, or choose another --out.")


def _fingerprint(folder: Path, encoders: dict[str, Path]) -> dict[str, Any]:
    """Name, size and modification time of every source file."""

    def of(folder: Path) -> dict[str, Any]:
        files = sorted(path for path in folder.iterdir() if path.suffix in {".json", ".safetensors"})
        return {
            "folder": str(folder.absolute()),
            "files": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files},
        }

    return {"llama": of(folder), "encoders": {name: of(path) for name, path in sorted(encoders.items())}}


def _left(units: list[Unit], done: list[StoredFile]) -> list[Unit]:
    names = {file.name for file in done}
    return [unit for unit in units if unit.file not in names]


def _write(processes: int, left: list[Unit], hf: LlamaConfig, weights: HFWeights, staging: _Staging) -> int:
    """Write the remaining units; return their size in bytes."""
    moved = sum(unit.size(hf, weights) for unit in left)
    progress = Progress("importing", moved // _MB, "MB")
    seen = 0

    def work(unit: Unit, advance: Callable[[int], None]) -> None:
        staging.record(write_unit(unit, hf, weights, staging.checkpoint, advance))

    def advance(count: int) -> None:
        nonlocal seen
        before, seen = seen, seen + count
        if seen // _MB > before // _MB:
            progress.advance(seen // _MB - before // _MB)

    peaks = run_workers(processes, left, work, advance)
    if left:
        progress.finish()
        largest = max(weights.entry(name).size for name in weights)
        print(
            f"peak memory above the baseline at start: {', '.join(f'{peak / 1e6:,.0f}' for peak in sorted(peaks))} MB "
            f"in {len(peaks)} process(es); the largest tensor has {largest / 1e6:,.0f} MB",
            flush=True,
        )
    return moved


def _copy_encoders(encoders: dict[str, Path], target: Path) -> list[str]:
    if not encoders:
        return []
    from checkpoint_tools.importing.encoders import import_encoder

    shutil.rmtree(target, ignore_errors=True)
    lines = []
    for name, folder in encoders.items():
        lines += import_encoder(name, folder, target / name)
    return lines


def _commit(hf: LlamaConfig, folder: Path, staging: _Staging, out: Path) -> None:
    """Turn the finished files into a checkpoint and move it into place."""
    records = [json.loads(path.read_text()) for path in (staging.root / "records").glob("*.json")]
    files = [StoredFile.from_dict(record) for record in records]
    common = {"step": 0, "content_metadata": {}}
    known = write_index(staging.checkpoint, files, common)
    llama = hf.to_dict()
    manifest = Manifest(
        step=0,
        consumed_samples=0,
        config=_config(llama, folder).to_dict(),
        llama=llama,
        base_hash="",
        data_fingerprint="",
        files={},
    )
    # Present if an earlier import was interrupted right here.
    (staging.checkpoint / store.MANIFEST).unlink(missing_ok=True)
    old = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        # Rename first: deletion takes time, and a kill must not leave a half-deleted folder under this name.
        out.rename(old)
    store.commit(staging.checkpoint, out, manifest, known)
    shutil.rmtree(old, ignore_errors=True)


def _config(llama: dict[str, Any], folder: Path) -> RunConfig:
    """Configuration of a run that would produce this checkpoint: an unfrozen Llama at step 0."""
    known = set(LlamaConfig().to_dict()) | {"rope_theta"}
    config = RunConfig()
    config.model.language_model = LanguageModelConfig(
        config={key: value for key, value in llama.items() if key in known}, freeze=False
    )
    if any((folder / name).is_file() for name in _TOKENIZERS):
        config.data.tokenizer = str(folder.absolute())
    return config


def _write_whole(path: Path, body: Any) -> None:
    """Write JSON atomically."""
    unfinished = path.with_name(f".{path.name}.part")
    with unfinished.open("w") as file:
        json.dump(body, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
