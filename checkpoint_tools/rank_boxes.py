"""Boxes (slices) of a checkpoint's tensors that each rank of a layout reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transformers import LlamaConfig

from megatron_anymal.checkpoint.store import CheckpointError, Manifest
from megatron_anymal.checkpoint.tensor_stream import StreamReader
from megatron_anymal.config import ModelConfig
from megatron_anymal.dry_run.simulate import weights_of_stages
from megatron_anymal.model.hf_llama import checkpoint_position
from megatron_anymal.model.unsharded_weights import Weight

# Key, then offset and size in every dimension.
Box = tuple[str, tuple[int, ...], tuple[int, ...]]


def boxes_of_ranks(model: ModelConfig, precision: str, manifest: Manifest, folder: Path) -> dict[str, list[Box]]:
    """Map each rank's file name to its boxes; every value of the checkpoint is in exactly one box of one rank.

    A weight replicated over the tensor-parallel ranks is stored in the first rank's file, a tied output layer in the
    file of the embedding. The optimizer state of a weight is stored in the same file as the weight.

    Args:
        model: the section with the new layout.
        precision: `trainer.precision`.

    Raises:
        ConfigError: the parallel sizes do not divide the model.
        CheckpointError: the shape of a tensor does not match the configuration.
    """
    tensor_size = model.tensor_model_parallel_size
    boxes: dict[str, list[Box]] = {}
    cut: dict[str, list[tuple[int, int, Weight]]] = {}
    seen: set[str] = set()
    hf = LlamaConfig.from_dict(manifest.llama)
    for stage, weights in enumerate(weights_of_stages(model, precision, hf)):
        for rank in range(tensor_size):
            boxes[_file(stage, rank)] = []
        for weight in weights:
            if weight.name not in seen:
                seen.add(weight.name)
                key, layer = checkpoint_position(weight.name)
                cut.setdefault(key, []).append((stage, -1 if layer is None else layer, weight))
    for key, stored in StreamReader(folder).tensors.items():
        weight_key = _weight_key(key, cut)
        if weight_key is None:
            boxes[_file(0, 0)].append((key, (0,) * len(stored.shape), stored.shape))
            continue
        for stage, layer, weight in cut[weight_key]:
            stacked = layer >= 0
            shape = stored.shape[1:] if stacked else stored.shape
            if not _fits(weight, shape, tensor_size):
                raise CheckpointError(
                    f"{str(folder)!r} holds {key!r} with the shape {list(stored.shape)}, which does not match its "
                    "configuration."
                )
            for rank, offset, size in _parts(weight, shape, tensor_size):
                layer_offset, layer_size = ((layer,), (1,)) if stacked else ((), ())
                boxes[_file(stage, rank)].append((key, (*layer_offset, *offset), (*layer_size, *size)))
    return boxes


def _file(stage: int, rank: int) -> str:
    return f"pipeline_{stage:03d}_tensor_{rank:03d}.distcp"


def _weight_key(key: str, cut: dict[str, list[tuple[int, int, Weight]]]) -> str | None:
    """The weight that an entry is or belongs to: optimizer.state.exp_avg.KEY belongs to KEY."""
    while key not in cut:
        _, _, key = key.partition(".")
        if not key:
            return None
    return key


def _fits(weight: Weight, shape: tuple[int, ...], tensor_size: int) -> bool:
    """Whether a stored shape matches the weight; vocabulary padding depends on the layout that wrote it."""
    whole = _padded(weight, tensor_size)
    if weight.rows is None:
        return shape == whole
    return len(shape) == len(whole) and shape[1:] == whole[1:] and shape[0] >= weight.rows


def _padded(weight: Weight, tensor_size: int) -> tuple[int, ...]:
    shape = list(weight.parameter.shape)
    if weight.split_dim is not None:
        shape[weight.split_dim] *= tensor_size
    return tuple(shape)


def _parts(
    weight: Weight, shape: tuple[int, ...], tensor_size: int
) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Yield (rank, offset, size) for each slice of a stored weight."""
    if weight.split_dim is None:
        yield 0, (0,) * len(shape), shape
        return
    dim = weight.split_dim
    block = _padded(weight, tensor_size)[dim] // weight.blocks
    share = block // tensor_size
    for rank in range(tensor_size):
        for number in range(weight.blocks):
            begin = number * block + rank * share
            # Vocabulary padding may differ between the layouts: the last rank takes all remaining stored rows.
            end = shape[dim] if weight.rows is not None and rank == tensor_size - 1 else begin + share
            begin, end = min(begin, shape[dim]), min(end, shape[dim])
            if begin < end:
                offset, size = [0] * len(shape), list(shape)
                offset[dim], size[dim] = begin, end - begin
                yield rank, tuple(offset), tuple(size)
