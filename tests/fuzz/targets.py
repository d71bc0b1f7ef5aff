"""Readers of mutated files: each target creates cases from a random generator, and each case returns its outcome."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import tarfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fuzz import corpus
from fuzz.mutations import Damaged, Members, damage, damage_shard
from megatron_anymal.checkpoint.store import CheckpointError, read_manifest
from megatron_anymal.checkpoint.tensor_stream import StreamReader
from megatron_anymal.config import ConfigError
from megatron_anymal.data.index_builder import IndexOptions
from megatron_anymal.data.index_folder import make_index
from megatron_anymal.data.left_out import LeftOut
from megatron_anymal.data.manifest import write_shards
from megatron_anymal.data.records import DataError
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.modalities import MODALITIES, MediaError, Modality, build_modality
from megatron_anymal.safetensors_io import SafetensorsFile, SafetensorsWriter, TensorFileError

# Errors that a damaged file may raise. Any other exception counts as a traceback.
EXPECTED = (DataError, MediaError, ConfigError, CheckpointError, TensorFileError)


@dataclass(frozen=True)
class Case:
    """A mutated file and the function that reads it."""

    # The mutated file and the mutation.
    label: str
    # Returns "read", "named", "refused", or "silent: ..." with the undetected loss.
    run: Callable[[], str]


class Shards:
    """Shards with damaged bytes, headers or order. Every sample must be delivered complete or named in the ledger."""

    def __init__(self, folder: Path, tokenizer: str):
        self._folder, self._options = folder / "shards", IndexOptions(tokenizer)
        self._corpora = [corpus.plain_members(), corpus.json_members(), corpus.conversation_members()]

    def case(self, rng: random.Random) -> Case:
        """Create a damaged shard."""
        members = rng.choice(self._corpora)
        damaged = damage_shard(rng, members)
        return Case(f"shard of {members[0][0]}, {damaged.how}", lambda: self._run(members, damaged))

    def _run(self, members: Members, damaged: Damaged) -> str:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        (self._folder / "0.tar").write_bytes(damaged.data)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                make_index(str(self._folder), self._options, max_bad_share=1.0)
        except DataError:
            return "refused"
        index = ShardIndex(str(self._folder))
        ledger = index.left_out()
        lost = self._lost(members, index, ledger)
        if lost and not damaged.zeroes_the_end(members):
            return f"silent: {', '.join(sorted(lost))} neither delivered nor named; ledger {[e.code for e in ledger]}"
        return "named" if ledger else "read"

    @staticmethod
    def _lost(members: Members, index: ShardIndex, ledger: list[LeftOut]) -> set[str]:
        """Return samples that were not delivered with all their media and are not covered by the ledger."""
        wanted: dict[str, int] = {}
        for name, _ in members:
            key, _, ending = name.partition(".")
            wanted[key] = wanted.get(key, 0) + (ending.rpartition(".")[2] not in ("txt", "json"))
        delivered = {index.key(n): int(index.samples["media_count"][n]) for n in range(len(index))}
        lost = {key for key, count in wanted.items() if delivered.get(key) != count}
        if any(not entry.key for entry in ledger):
            return set()
        return lost - {entry.key for entry in ledger}


class Media:
    """Damaged media files. A truncated file must not be read as a shorter one."""

    def __init__(self) -> None:
        self._files = corpus.media()
        self._modalities: dict[str, Modality] = {kind: build_modality(kind, s) for kind, s in corpus.SECTIONS.items()}
        self._sizes = [MODALITIES[kind].probe(data, ending, given) for kind, ending, data, given in self._files]

    def case(self, rng: random.Random) -> Case:
        """One damaged file."""
        number = rng.randrange(len(self._files))
        kind, ending, data, attributes = self._files[number]
        damaged = damage(rng, data)

        def run() -> str:
            try:
                pieces = self._modalities[kind].load(damaged.data, ending, attributes)
            except MediaError:
                return "named"
            assert torch.isfinite(pieces).all()
            size, whole = MODALITIES[kind].probe(damaged.data, ending, attributes), self._sizes[number]
            if damaged.how == "cut" and size[0] < 0.98 * whole[0] and not _is_text(ending):
                return f"silent: {whole} is read as {size} from {len(damaged.data)} of {len(data)} bytes"
            return "read"

        return Case(f"{kind} .{ending}, {damaged.how}", run)


def _is_text(ending: str) -> bool:
    """Whether a truncated file of this format is a valid shorter file."""
    return ending == "csv"


class Manifests:
    """Damaged manifests. Every line must become a sample, or the manifest must be refused."""

    def __init__(self, folder: Path):
        self._folder, self._files = folder / "manifests", corpus.manifests()
        self._folder.mkdir(parents=True)
        for kind, ending, data, _ in corpus.media():
            if ending in ("png", "flac"):
                (self._folder / f"{'a' if kind == 'image' else 'b'}.{ending}").write_bytes(data)

    def case(self, rng: random.Random) -> Case:
        """Create a damaged manifest."""
        ending, data = rng.choice(self._files)
        damaged = damage(rng, data)

        def run() -> str:
            out = self._folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            manifest = self._folder / f"manifest{ending}"
            manifest.write_bytes(damaged.data)
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    write_shards(str(manifest), str(out))
            except DataError:
                left = list(out.glob("*.part"))
                return f"silent: {left[0].name} was not removed" if left else "refused"
            with tarfile.open(out / "shard-000000.tar") as tar:
                written = sum(name.endswith(".json") for name in tar.getnames())
            # In a CSV file, a quote may join two lines.
            if ending == ".jsonl" or b'"' not in damaged.data:
                lines = (
                    damaged.data.replace(b"\r", b"\n").split(b"\n") if ending == ".csv" else damaged.data.split(b"\n")
                )
                wanted = sum(bool(line.strip()) for line in lines) - (ending == ".csv")
                if written != wanted:
                    return f"silent: {written} samples of {wanted} lines"
            return "read"

        return Case(f"manifest {ending}, {damaged.how}", run)


class Checkpoints:
    """Checkpoints with one damaged file. Checksums must detect it, and readers may only raise expected errors."""

    def __init__(self, folder: Path, checkpoint: Path):
        self._source, self._copy = checkpoint, folder / "checkpoint"
        self._files = sorted(p.relative_to(checkpoint) for p in checkpoint.rglob("*") if p.is_file())

    def case(self, rng: random.Random) -> Case:
        """Create a checkpoint with a damaged file."""
        name = rng.choice(self._files)
        original = (self._source / name).read_bytes()
        damaged = damage(rng, original)

        def run() -> str:
            shutil.rmtree(self._copy, ignore_errors=True)
            shutil.copytree(self._source, self._copy)
            (self._copy / name).write_bytes(damaged.data)
            with contextlib.suppress(*EXPECTED):
                reader = StreamReader(self._copy)
                for tensor in reader.tensors:
                    reader.read(tensor)
            try:
                read_manifest(self._copy, verify=True)
            except CheckpointError:
                return "refused"
            same = damaged.data == original or _same_json(original, damaged.data)
            return "read" if same else f"silent: {name} was changed and passed verification"

        return Case(f"checkpoint {name}, {damaged.how}", run)


def _same_json(one: bytes, other: bytes) -> bool:
    """Whether two files contain the same JSON value."""
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


class Weights:
    """Damaged safetensors files."""

    def __init__(self, folder: Path):
        self._path = folder / "model.safetensors"
        tensors = {f"layer.{n}": torch.arange(n + 3, dtype=torch.float32) for n in range(5)}
        shapes: Any = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        with SafetensorsWriter(self._path, shapes) as writer:
            for name, tensor in tensors.items():
                writer.append(name, tensor)
        self._data = self._path.read_bytes()

    def case(self, rng: random.Random) -> Case:
        """One damaged file."""
        damaged = damage(rng, self._data)

        def run() -> str:
            self._path.write_bytes(damaged.data)
            try:
                file = SafetensorsFile(self._path)
                for name in file:
                    file[name]
            except TensorFileError:
                return "refused"
            return "read"

        return Case(f"safetensors, {damaged.how}", run)


class Targets:
    """All targets, chosen at random by weight."""

    def __init__(self, folder: Path, tokenizer: str, checkpoint: Path | None):
        self._all: list[tuple[int, Any]] = [
            (40, Shards(folder, tokenizer)),
            (40, Media()),
            (12, Manifests(folder)),
            (3, Weights(folder)),
        ]
        if checkpoint:
            self._all.append((5, Checkpoints(folder, checkpoint)))

    def case(self, seed: int, number: int) -> Case:
        """Return the case of a seed and number, which is the same in every process."""
        rng = random.Random(f"{seed}/{number}")
        [target] = rng.choices([target for _, target in self._all], [weight for weight, _ in self._all])
        made: Case = target.case(rng)
        return made


def outcome(case: Case) -> str:
    """Run a case and return "read", "named", "refused", "silent: ..." or "traceback: ..."."""
    try:
        return case.run()
    except EXPECTED:
        return "refused"
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"traceback: {error!r:.200} at {Path(frame.filename).name}:{frame.lineno}"
