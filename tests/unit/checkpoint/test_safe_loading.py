"""Pickles in a checkpoint: expected contents are read, anything else is refused and none of it is executed.

The harmless payload of these tests creates a marker folder.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from ranks import run_ranks
from tiny import make_config
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_anymal.checkpoint import safe_loading
from megatron_anymal.checkpoint.metadata import ALLOWED, ITEM_BYTES, CheckpointContents, read_metadata
from megatron_anymal.checkpoint.safe_loading import check_pickles
from megatron_anymal.checkpoint.store import CheckpointError
from megatron_anymal.checkpoint.tensor_stream import StreamReader, StreamWriter, write_index
from megatron_anymal.dependencies.megatron_line import OLDER
from megatron_anymal.parallel import initialize


class MakeFolder:
    """Creates a folder when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def write(folder: Path) -> None:
    """Write a checkpoint with a tensor and an entry that is not a tensor."""
    folder.mkdir()
    file = StreamWriter(folder / "part_0.distcp")
    file.add("weight", (2, 3), (0, 0), torch.ones(2, 3))
    torch.save([torch.ones(2)], folder / "object")
    file.add_object("scaling", (folder / "object").read_bytes())
    (folder / "object").unlink()
    write_index(folder, [file.close()], {"step": 5})


def in_metadata(folder: Path, payload: Any) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = payload
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def in_place_of_metadata(folder: Path, payload: Any) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(payload))


def in_common(folder: Path, payload: Any) -> None:
    torch.save({"step": payload}, folder / "common.pt")


def in_object(folder: Path, payload: Any) -> None:
    file = StreamWriter(folder / "part_0.distcp")
    file.add("weight", (2, 3), (0, 0), torch.ones(2, 3))
    torch.save([payload], folder / "object")
    file.add_object("scaling", (folder / "object").read_bytes())
    write_index(folder, [file.close()], {"step": 5})


PLACES = {
    "metadata": (in_metadata, r"\.metadata' cannot be read \(it refers to posix\.mkdir, which is not part"),
    "whole-metadata": (in_place_of_metadata, r"it refers to posix\.mkdir"),
    "common": (in_common, r"common\.pt': 'common\.pt' is damaged, or holds more than data .*posix.mkdir"),
    "object": (in_object, r"part_0\.distcp': 'scaling' is damaged, or holds more than data .*posix.mkdir"),
}


@pytest.mark.parametrize("name", PLACES)
def test_code_in_a_pickle_is_refused_and_does_not_run(name: str, tmp_path: Path) -> None:
    insert, expected_message = PLACES[name]
    folder, marker = tmp_path / "checkpoint", tmp_path / "marker"
    write(folder)
    check_pickles(folder)
    insert(folder, MakeFolder(marker))
    with pytest.raises(CheckpointError, match=expected_message):
        check_pickles(folder)
    with pytest.raises(CheckpointError, match=expected_message):
        safe_loading.load({}, folder)
    if "metadata" in name:
        with pytest.raises(CheckpointError, match=expected_message):
            StreamReader(folder)
    assert not marker.exists()


def test_the_payload_would_run(tmp_path: Path) -> None:
    """The payload does run in torch's own reader of `.metadata`, which megatron-core calls."""
    write(tmp_path / "checkpoint")
    in_metadata(tmp_path / "checkpoint", MakeFolder(tmp_path / "marker"))
    dcp.FileSystemReader(str(tmp_path / "checkpoint")).read_metadata()
    assert (tmp_path / "marker").exists()


def test_files_outside_of_the_folder_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint")
    for path in ("../secret", "/etc/hostname"):
        metadata = pickle.loads((tmp_path / "checkpoint" / ".metadata").read_bytes())
        for info in metadata.storage_data.values():
            info.relative_path = path
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(CheckpointError, match=f"refers to '{path}', a file outside"):
            StreamReader(tmp_path / "other")


@pytest.mark.parametrize("text", ["{}", "[]", "no JSON", None])
def test_other_formats_are_refused(text: str | None, tmp_path: Path) -> None:
    write(tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "metadata.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(CheckpointError, match=r"metadata\.json' cannot be read"):
        check_pickles(tmp_path / "checkpoint")
    path.write_text(json.dumps({"sharded_backend": "zarr", "common_backend": "torch"}))
    with pytest.raises(CheckpointError, match=r"the format is .*zarr.*; only"):
        check_pickles(tmp_path / "checkpoint")


def save_with_megatron_core(folder: Path) -> None:
    """In a rank: save tensors of every dtype that a run has, an object, and the common state."""
    initialize(make_config("unused", "unused", folder))
    types = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.float8_e4m3fn)
    tensors = {f"t{n}": ShardedTensor.from_rank_offsets(f"t{n}", torch.ones(2, 3).to(t)) for n, t in enumerate(types)}
    scaling = ShardedObject("scaling", [torch.ones(2)], (1,), (0,))
    folder.mkdir()
    dist_checkpointing.save({**tensors, "scaling": scaling, "step": 5}, str(folder))


def save_with_torch(folder: Path) -> None:
    dcp.save({"weight": torch.ones(2, 3), "object": [1]}, checkpoint_id=str(folder), no_dist=True)


class Noting(pickle._Unpickler):
    """Python's own unpickler, recording the globals it is asked for."""

    asked: ClassVar[set[tuple[str, str]]] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.asked.add((module, name))
        return super().find_class(module, name)


@pytest.mark.skipif(
    version("megatron-core") != OLDER.version,
    reason="megatron-core 0.19 itself saves without common.pt, a format that this package neither writes nor reads",
)
def test_the_list_is_what_checkpoints_consist_of(tmp_path: Path) -> None:
    """The allowed globals are exactly those in checkpoints of megatron-core, of torch and of this package."""
    run_ranks(1, save_with_megatron_core, tmp_path / "theirs")
    write(tmp_path / "ours")
    save_with_torch(tmp_path / "torchs")
    for name in ("theirs", "ours"):
        check_pickles(tmp_path / name)
    for name in ("theirs", "ours", "torchs"):
        data = (tmp_path / name / ".metadata").read_bytes()
        Noting(io.BytesIO(data)).load()
        assert_same(read_metadata(tmp_path / name), pickle.loads(data))
    needed = Noting.asked
    dtypes = {one for one in needed if one[0] == "torch" and isinstance(getattr(torch, one[1]), torch.dtype)}
    assert needed - dtypes == ALLOWED.keys()


def assert_same(contents: CheckpointContents, expected: Metadata) -> None:
    """Check what was read without torch's classes against what they hold."""
    assert contents.tensors.keys() | contents.objects.keys() == expected.state_dict_metadata.keys()
    for name, stored in contents.tensors.items():
        entry = expected.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        assert getattr(torch, stored.dtype) == entry.properties.dtype and stored.shape == tuple(entry.size)
        assert len(stored.chunks) == len(entry.chunks)
        for chunk, file, theirs in zip(stored.chunks, stored.files, entry.chunks):
            assert (chunk.offset, chunk.size) == (tuple(theirs.offsets), tuple(theirs.sizes))
            info = expected.storage_data[MetadataIndex(name, theirs.offsets)]
            assert (file, chunk.begin, chunk.length) == (info.relative_path, info.offset, info.length)
    for name, span in contents.objects.items():
        info = expected.storage_data[MetadataIndex(name)]
        assert (span.file, span.begin, span.length) == (info.relative_path, info.offset, info.length)


def test_item_sizes_are_those_of_torch() -> None:
    dtypes = [value for value in vars(torch).values() if isinstance(value, torch.dtype)]
    names = {str(dtype).removeprefix("torch."): dtype for dtype in dtypes}
    assert {name: names[name].itemsize for name in ITEM_BYTES} == ITEM_BYTES
    # Left out: quantized types, and those that take less than a byte.
    assert {name for name in names.keys() - ITEM_BYTES.keys() if not name.startswith(("q", "uint", "int", "bits"))} <= {
        "complex32",
        "bcomplex32",
        "float4_e2m1fn_x2",
    }
