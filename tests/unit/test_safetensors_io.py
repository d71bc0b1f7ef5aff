"""safetensors files: byte-identical to the safetensors library's reader and writer; every kind of damage is
reported."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_anymal.hf_weights import HFWeights
from megatron_anymal.safetensors_io import SafetensorsFile, SafetensorsWriter, TensorFileError

KINDS = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]


def random_bits() -> dict[str, torch.Tensor]:
    """A tensor of every dtype with arbitrary bit patterns (including infinities and NaN), plus unusual shapes."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        str(kind): torch.randint(256, (3, 5 * kind.itemsize), generator=generator, dtype=torch.uint8).view(kind)
        for kind in KINDS
    }
    tensors["flag"] = torch.tensor([True, False, True])
    tensors["scalar"] = torch.tensor(7.0)
    tensors["empty"] = torch.zeros(0, 4)
    tensors["four"] = torch.randn(2, 3, 1, 4)
    return tensors


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(a, b)


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = random_bits()
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    tensor_file = SafetensorsFile(tmp_path / "a.safetensors")
    assert (
        set(tensor_file) == set(tensors)
        and len(tensor_file) == len(tensors)
        and tensor_file.metadata == {"format": "pt"}
    )
    for name, tensor in tensors.items():
        assert same(tensor_file[name], tensor), name
        entry = tensor_file.entry(name)
        assert (entry.dtype, entry.shape, entry.size) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        pieces = list(tensor_file.pieces(name))
        assert same(torch.cat(pieces) if pieces else tensor.reshape(-1), tensor.reshape(-1))
    # A copy: modifying it changes neither the file nor the next read.
    tensor_file["four"].fill_(1.0)
    assert same(tensor_file["four"], tensors["four"])


def test_inside_a_larger_file(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(4)}
    save_file(tensors, tmp_path / "a.safetensors")
    whole = tmp_path / "whole"
    whole.write_bytes(b"x" * 513 + (tmp_path / "a.safetensors").read_bytes() + b"behind it")
    tensor_file = SafetensorsFile(whole, 513)
    assert all(same(tensor_file[name], tensor) for name, tensor in tensors.items())


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    tensors = random_bits()
    tensors["turned"] = torch.randn(4, 3).t()
    path = tmp_path / "b.safetensors"
    entries = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, entries, {"format": "pt"}) as writer:
        for name, tensor in tensors.items():
            writer.append(name, tensor)
    assert writer.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    with safe_open(path, framework="pt") as theirs:
        assert set(theirs.keys()) == set(tensors) and theirs.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            assert same(theirs.get_tensor(name), tensor), name
    assert all(same(SafetensorsFile(path)[name], tensor) for name, tensor in tensors.items())


def test_the_writer_refuses_other_tensors(tmp_path: Path) -> None:
    entries = {"a": (torch.float32, (2, 3)), "b": (torch.float32, (1,))}
    for name, tensor in (("b", torch.zeros(1)), ("a", torch.zeros(3, 2)), ("a", torch.zeros(2, 3).double())):
        writer = SafetensorsWriter(tmp_path / "c.safetensors", entries)
        with pytest.raises(TensorFileError, match="the next tensor should be"):
            writer.append(name, tensor)
        with pytest.raises(TensorFileError, match="2 tensors were not written"):
            writer.close()


def rewrite_header(path: Path, change: dict[str, object]) -> None:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header["b"].update(change)
    changed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + raw[8 + length :])


def overwrite(path: Path, offset: int, data: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(data)] = data
    path.write_bytes(bytes(raw))


DAMAGE = {
    "empty": (lambda p: p.write_bytes(b""), "too short for a header"),
    "cut-in-header": (lambda p: p.write_bytes(p.read_bytes()[:40]), "header would be"),
    "cut-in-data": (lambda p: p.write_bytes(p.read_bytes()[:-3]), "bytes long and should be"),
    "too-long": (lambda p: p.write_bytes(p.read_bytes() + b"x"), "bytes long and should be"),
    "huge-header": (lambda p: overwrite(p, 0, b"\xff" * 8), "header would be"),
    "no-json": (lambda p: overwrite(p, 8, b"\xff\xfe"), "header is damaged"),
    "list": (lambda p: p.write_bytes(struct.pack("<Q", 2) + b"[]"), "header is damaged"),
    "unknown-type": (lambda p: rewrite_header(p, {"dtype": "Q7"}), "'b' has the unknown type 'Q7'"),
    "hole": (lambda p: rewrite_header(p, {"data_offsets": [32, 64]}), "its header puts 'b' of 32 bytes at"),
    "overlap": (lambda p: rewrite_header(p, {"data_offsets": [20, 52]}), "its header puts 'b' of 32 bytes at"),
    "shape": (lambda p: rewrite_header(p, {"shape": [2, 3]}), "its header puts 'b' of 24 bytes at"),
    "negative": (lambda p: rewrite_header(p, {"shape": [-2, -4]}), "not a whole number"),
    "fraction": (lambda p: rewrite_header(p, {"shape": [2.5, 4]}), "not a whole number"),
    "no-places": (lambda p: rewrite_header(p, {"data_offsets": None}), "header is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(6), "b": torch.zeros(2, 4)}, path)
    harm, expected_message = DAMAGE[damage]
    harm(path)
    with pytest.raises(TensorFileError) as error:
        SafetensorsFile(path)
    assert expected_message in str(error.value) and str(path) in str(error.value) and "again" in str(error.value)


def test_a_file_that_shrinks_and_one_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(6), "b": torch.zeros(2, 4)}, path)
    tensor_file = SafetensorsFile(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4)
    assert len(tensor_file["a"]) == 6
    with pytest.raises(TensorFileError, match="ends inside 'b'"):
        tensor_file["b"]
    with pytest.raises(TensorFileError, match="cannot be read"):
        SafetensorsFile(tmp_path / "none.safetensors")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Tensors a and b in one file and c in another, with an index."""
    save_file({"a": torch.zeros(2), "b": torch.ones(3)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"c": torch.full((4,), 2.0)}, tmp_path / "model-00002-of-00002.safetensors")
    write_index(tmp_path, {"a": 1, "b": 1, "c": 2})
    return tmp_path


def write_index(folder: Path, places: dict[str, int]) -> None:
    weight_map = {name: f"model-0000{number}-of-00002.safetensors" for name, number in places.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_sharded_folder_is_one_mapping(sharded: Path) -> None:
    weights = HFWeights(sharded)
    assert sorted(weights) == ["a", "b", "c"] and len(weights) == 3 and list(weights.files) == sorted(weights.files)
    assert weights["c"].tolist() == [2.0] * 4 and weights.entry("b").shape == (3,)
    assert weights.file_of("c") == "model-00002-of-00002.safetensors"


SECOND = "model-00002-of-00002.safetensors"
FOLDER_DAMAGE = {
    "half-the-files": (lambda f: (f / SECOND).unlink(), f"lacks 1 of 2 files .* {SECOND}"),
    "no-index": (lambda f: (f / "model.safetensors.index.json").unlink(), "and no model.safetensors.index.json"),
    "bad-index": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "index.json' is damaged"),
    "path-in-index": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}'),
        "index.json' is damaged",
    ),
    "doubled": (lambda f: save_file({"c": torch.zeros(4), "a": torch.zeros(2)}, f / SECOND), "'a' is in both"),
    "not-in-file": (
        lambda f: write_index(f, {"a": 1, "b": 1, "c": 2, "d": 2}),
        "tensor 'd' in .*, but it is not there",
    ),
    "in-other-file": (lambda f: write_index(f, {"a": 1, "b": 2, "c": 2}), "tensor 'b' in .*, but it is not there"),
    "not-in-index": (lambda f: write_index(f, {"a": 1, "c": 2}), "'b' in 'model-00001.* is not in"),
    "left-over": (lambda f: save_file({"c": torch.zeros(4)}, f / "model.safetensors"), "'model.safetensors' is not in"),
}


@pytest.mark.parametrize("damage", FOLDER_DAMAGE)
def test_a_damaged_folder_is_named(damage: str, sharded: Path) -> None:
    harm, expected_message = FOLDER_DAMAGE[damage]
    harm(sharded)
    with pytest.raises(TensorFileError, match=expected_message):
        HFWeights(sharded)


def test_other_formats_are_refused_with_the_mend(tmp_path: Path) -> None:
    with pytest.raises(TensorFileError, match=r"holds no model\.safetensors"):
        HFWeights(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"pickle")
    with pytest.raises(TensorFileError, match="save_pretrained"):
        HFWeights(tmp_path)
