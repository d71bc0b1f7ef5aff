"""Checkpoints written and read tensor by tensor, with torch's own reader and writer as the oracle."""

from __future__ import annotations

import hashlib
import io
import json
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megatron_anymal.checkpoint.store import CheckpointError
from megatron_anymal.checkpoint.tensor_stream import StoredFile, StreamReader, StreamWriter, write_index
from megatron_anymal.safetensors_io import raw_bytes

STACKED, PLAIN = "decoder.layers.weight", "embedding.weight"


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        STACKED: torch.randn(3, 8, 6, generator=generator).bfloat16(),
        PLAIN: torch.randn(7, 4, generator=generator),
        "step": torch.tensor(5),
        "empty": torch.zeros(0, 4),
    }


def write(folder: Path) -> dict[str, str]:
    """Write the stacked tensor in six chunks, cut along two dimensions, to two files with an index; return the file
    digests."""
    folder.mkdir(exist_ok=True)
    whole = tensors()
    records = []
    for number in range(2):
        file = StreamWriter(folder / f"part_{number}.distcp")
        for layer in range(3):
            rows = whole[STACKED][layer : layer + 1, number * 4 : number * 4 + 4]
            file.add(STACKED, (3, 8, 6), (layer, number * 4, 0), rows)
        for name in (PLAIN, "step", "empty") if number else ():
            file.add(name, whole[name].shape, [0] * whole[name].dim(), whole[name])
        records.append(StoredFile.from_dict(json.loads(json.dumps(file.close().to_dict()))))
    return write_index(folder, records, {"step": 5})


def test_torch_reads_what_was_written(tmp_path: Path) -> None:
    digests = write(tmp_path)
    assert digests == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in tmp_path.iterdir()}
    assert set(digests) == {".metadata", "common.pt", "metadata.json", "part_0.distcp", "part_1.distcp"}
    loaded_tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    dcp.load(loaded_tensors, checkpoint_id=str(tmp_path), no_dist=True)
    for name, tensor in tensors().items():
        assert torch.equal(loaded_tensors[name], tensor), name
    assert torch.load(tmp_path / "common.pt") == {"step": 5}


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "one") == write(tmp_path / "two")


def test_reads_wholes_layers_and_boxes(tmp_path: Path) -> None:
    write(tmp_path)
    reader = StreamReader(tmp_path)
    whole = tensors()
    assert set(reader.tensors) == set(whole) and reader.objects == {}
    for name, tensor in whole.items():
        stored = reader.tensors[name]
        assert (reader.dtype(name), stored.shape, stored.size) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        assert torch.equal(reader.read(name), tensor), name
    for layer in range(3):
        assert torch.equal(reader.read(STACKED, layer=layer), whole[STACKED][layer])
    assert torch.equal(reader.read_box(STACKED, (1, 2, 3), (2, 5, 3)), whole[STACKED][1:, 2:7, 3:])
    with pytest.raises(CheckpointError, match="has 3 layers, but no layer 3"):
        reader.read(STACKED, layer=3)


def test_a_layer_needs_its_own_chunks_only(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "part_1.distcp").unlink()
    reader = StreamReader(tmp_path)
    assert torch.equal(reader.read_box(STACKED, (2, 0, 0), (1, 3, 6)), tensors()[STACKED][2:, :3])
    with pytest.raises(CheckpointError, match=r"part_1\.distcp' cannot be read"):
        reader.read(STACKED, layer=2)


def test_reads_what_torch_wrote(tmp_path: Path) -> None:
    # A non-contiguous view is stored with its strides.
    state = {**tensors(), "turned": torch.randn(5, 3).t(), "object": {"a": [1, 2]}}
    dcp.save(state, checkpoint_id=str(tmp_path), no_dist=True)
    reader = StreamReader(tmp_path)
    assert list(reader.objects) in (["object.a"], ["object"])
    for name in reader.tensors:
        assert torch.equal(reader.read(name), state[name]), name
    # Entries that are not tensors are copied unchanged.
    copy = tmp_path / "copy"
    copy.mkdir()
    file = StreamWriter(copy / "all.distcp")
    for name in reader.objects:
        file.add_object(name, reader.read_object(name))
    write_index(copy, [file.close()], {})
    again = StreamReader(copy)
    assert list(again.objects) == list(reader.objects)
    assert [again.read_object(n) for n in again.objects] == [reader.read_object(n) for n in reader.objects]


def test_chunks_that_do_not_make_a_tensor_are_refused(tmp_path: Path) -> None:
    def index(*chunks: tuple[tuple[int, ...], tuple[int, ...], Tensor]) -> None:
        file = StreamWriter(tmp_path / "a.distcp")
        for shape, offset, tensor in chunks:
            file.add("w", shape, offset, tensor)
        write_index(tmp_path, [file.close()], {})

    one = torch.zeros(1, 3)
    with pytest.raises(CheckpointError, match="3 of 6 values of 'w' exist"):
        index(((2, 3), (0, 0), one))
    with pytest.raises(CheckpointError, match=r"'w' at .* is duplicated"):
        index(((2, 3), (0, 0), one), ((2, 3), (0, 0), one))
    with pytest.raises(CheckpointError, match="disagree"):
        index(((2, 3), (0, 0), one), ((3, 3), (1, 0), one))
    with pytest.raises(CheckpointError, match="disagree"):
        index(((2, 3), (0, 0), one), ((2, 3), (1, 0), one.double()))


def test_damage_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    reader = StreamReader(tmp_path)
    part = tmp_path / "part_1.distcp"
    data = part.read_bytes()
    part.write_bytes(data[: reader.tensors[PLAIN].chunks[0].begin + 100])
    with pytest.raises(CheckpointError, match=r"part_1\.distcp' is damaged at 'embedding\.weight'"):
        reader.read(PLAIN)
    (tmp_path / ".metadata").write_bytes(b"\x80")
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match=r"\.metadata' cannot be read"):
            StreamReader(folder)


def test_a_full_disk_is_the_error_that_is_raised(tmp_path: Path) -> None:
    # torch.save would only report an unexpected stream position.
    file = StreamWriter(tmp_path / "a.distcp")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            file.add("w", (1, 100_000), (0, 0), torch.zeros(1, 100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    file.abandon()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool])
@pytest.mark.parametrize("size", [(), (0, 4), (1,), (1, 7, 3), (5, 33, 17), (300, 700)])
def test_a_chunk_is_what_torch_save_writes(tmp_path: Path, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(len(size))).to(dtype)
    options = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensor, saved := io.BytesIO())
    finally:
        torch.serialization.set_crc32_options(options)
    raw, offset = memoryview(raw_bytes(tensor)), [0] * len(size)
    for number, parts in enumerate(([raw], [raw[:5], raw[5:6], raw[6:]])):
        file = StreamWriter(tmp_path / f"{number}.distcp")
        file.add_values("w", dtype, size, offset, size, parts)
        # The same tensor as a second chunk, from memory and as a slice of a larger tensor.
        file.add("v", size, offset, torch.stack([tensor, tensor])[1])
        stored = file.close()
        assert (tmp_path / stored.name).read_bytes() == saved.getvalue() * 2
        assert [(chunk.begin, chunk.length) for chunk in stored.chunks] == [
            (0, saved.tell()),
            (saved.tell(), saved.tell()),
        ]
