"""Tensors that an import writes, compared with the weights as a model in training loads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoint_tools.importing import spans
from checkpoint_tools.importing.units import all_finite, units_of, write_unit
from megatron_anymal.checkpoint.tensor_stream import StreamReader, StreamWriter, write_index
from megatron_anymal.hf_weights import HFWeights
from megatron_anymal.model.hf_llama import checkpoint_position, chunks_from_hf, from_hf, whole_names, whole_shape
from megatron_anymal.safetensors_io import TensorFileError, raw_bytes

SHAPES = {
    "grouped": {"num_attention_heads": 6, "num_key_value_heads": 3},
    "one key head": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "as many key heads": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "wide heads, tied": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "tie_word_embeddings": True,
    },
}


def llama(folder: Path, dtype: torch.dtype, **shape: object) -> LlamaConfig:
    torch.manual_seed(1)
    hf = LlamaConfig(vocab_size=101, hidden_size=48, intermediate_size=56, num_hidden_layers=3, **shape)  # type: ignore[arg-type]
    LlamaForCausalLM(hf).to(dtype).save_pretrained(folder, max_shard_size="60KB")
    return hf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bytes_are_those_of_whole_tensors(
    shape: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = llama(tmp_path / "llama", dtype, **SHAPES[shape])
    source = HFWeights(tmp_path / "llama")
    # Chunks that end inside rows and heads.
    monkeypatch.setattr(spans, "_PART", 1000)
    moved: list[int] = []
    files = []
    for unit in units_of(hf):
        files.append(write_unit(unit, hf, source, tmp_path, moved.append))
        assert max(moved) <= 1000
        # The same, writing each tensor whole.
        whole = StreamWriter(tmp_path / "whole.distcp")
        for name in unit.names:
            key, layer = checkpoint_position(name)
            size = whole_shape(name, hf)
            for row, chunk in chunks_from_hf(name, hf, source.__getitem__):
                offset = (row, *[0] * (len(size) - 1))
                if layer is None:
                    whole.add(key, size, offset, chunk)
                else:
                    whole.add(key, (hf.num_hidden_layers, *size), (layer, *offset), chunk[None])
        expected = whole.close()
        assert files[-1].chunks == expected.chunks and files[-1].sha256 == expected.sha256
        assert (tmp_path / unit.file).read_bytes() == (tmp_path / "whole.distcp").read_bytes()
    (tmp_path / "whole.distcp").unlink()
    assert sum(moved) == sum(source.entry(name).size for name in source)
    write_index(tmp_path, files, {})
    reader = StreamReader(tmp_path)
    for name in whole_names(hf):
        tensor, expected_tensor = reader.read(*checkpoint_position(name)), from_hf(name, hf, source.__getitem__)
        assert tensor.dtype == expected_tensor.dtype and raw_bytes(tensor) == raw_bytes(expected_tensor), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("index", [0, 700, -1])
def test_one_value_that_is_not_finite_is_found(
    value: float, index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spans, "_PART", 1000)
    hf = llama(tmp_path / "llama", torch.bfloat16, **SHAPES["grouped"])
    model = LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.view(-1)[index] = value
    model.save_pretrained(tmp_path / "harmed")
    with pytest.raises(TensorFileError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight.*NaN or infinite"):
        for unit in units_of(hf):
            write_unit(unit, hf, HFWeights(tmp_path / "harmed"), tmp_path, lambda count: None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_largest_values_are_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    assert all_finite(torch.tensor([largest, largest, -largest, 0.0] * 50, dtype=dtype))


def test_a_name_is_looked_up_without_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama(tmp_path, torch.float32, **SHAPES["grouped"])
    source = HFWeights(tmp_path)

    def refuse(*_: object) -> None:
        raise AssertionError("data was read")

    monkeypatch.setattr("megatron_anymal.safetensors_io.SafetensorsFile._fill", refuse)
    assert "lm_head.weight" in source and "lm_head.bias" not in source
    assert all(name in file for file in source.files.values() for name in file)
