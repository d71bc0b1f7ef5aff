"""Unsharded names and values of weights, and the mapping between a rank's shard and the whole weight.

Initial values, HuggingFace weights, hashes and archives all use whole weights, of some of which a rank holds a shard.
The names are those of the local layer specification, with layers numbered over the whole model.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Optional

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_anymal.model.quantized_weights import is_quantized, read_source, remember_source, source_hash, unquantized
from megatron_anymal.processes.child_processes import share_of_cores
from megatron_anymal.safetensors_io import raw_bytes

_CPU = torch.device("cpu")
# Maximum number of threads in which a rank hashes weights.
_MOST_THREADS = 4
# Weights with at least this many elements are initialized on the device that holds them.
_LARGE = 1 << 24
# Transformer Engine keeps a norm's weight in the following linear layer.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_FUSED_IN_PROJECTORS = re.compile(r"(input|output|ffn)_(?:linear|up)\.layer_norm_(weight|bias)$")


@dataclass(frozen=True)
class Weight:
    """A parameter of this rank in relation to the whole model."""

    # Name in the whole model.
    name: str
    # This rank's slice.
    parameter: nn.Parameter
    # Dimension that is split over the tensor-parallel ranks; None if every rank holds the whole weight.
    split_dim: Optional[int]
    # 2 if gate and up projection are concatenated and split separately.
    blocks: int
    # Rows of the whole weight without vocabulary padding; None if the weight has no vocabulary dimension.
    rows: Optional[int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole weight."""
        shape = list(self.parameter.shape)
        if self.split_dim is not None:
            shape[self.split_dim] *= parallel_state.get_tensor_model_parallel_world_size()
        if self.rows is not None:
            shape[0] = self.rows
        return tuple(shape)

    def local_part(self, whole: Tensor) -> Tensor:
        """This rank's slice of the whole weight, with the parameter's shape.

        Args:
            whole: [*shape].

        Raises:
            ValueError: `whole` has another shape.
        """
        if tuple(whole.shape) != self.shape:
            raise ValueError(f"{self.name} has shape {list(whole.shape)}; the model expects {list(self.shape)}.")
        if self.split_dim is None:
            return whole
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        rank = parallel_state.get_tensor_model_parallel_rank()
        if self.rows is not None:
            padding = self.parameter.size(0) * ranks - self.rows
            whole = torch.cat([whole, whole.new_zeros(padding, *whole.shape[1:])])
        blocks = whole.chunk(self.blocks, dim=self.split_dim)
        return torch.cat([block.chunk(ranks, dim=self.split_dim)[rank] for block in blocks], dim=self.split_dim)

    def set(self, whole: Tensor) -> None:
        """Set this rank's slice from the whole weight, [*shape]; not of a quantized weight, see `set_from`.

        Raises:
            ValueError: `whole` has another shape.
        """
        assert not is_quantized(self.parameter)
        with torch.no_grad():
            self.parameter.copy_(self.local_part(whole))

    def set_from(self, read: Callable[[], Tensor], *, hash_later: bool = False) -> None:
        """Set this rank's slice, quantized or not, from a whole weight that can be read again.

        Args:
            read: returns the whole weight, [*shape]. It is called again where the unquantized values of a quantized
                weight are needed.
            hash_later: hash the values of a quantized weight when their hash is asked for, and not at once. For values
                that are cheap to compute again and may be replaced.

        Raises:
            ValueError: the weight has another shape.
        """
        whole = read()
        if not is_quantized(self.parameter):
            self.set(whole)
            return
        with torch.no_grad():
            self.parameter.copy_(self.local_part(whole))
        name, dtype = self.name, self.parameter.dtype

        def source() -> Tensor:
            return read().to(dtype)

        if hash_later:
            remember_source(self.parameter, source, lambda: hash_weight(name, source()))
        else:
            digest = hash_weight(name, whole.to(dtype))
            remember_source(self.parameter, source, lambda: digest)

    def source(self) -> Tensor:
        """Read the values, [*shape], that a quantized weight was made from; in the parameter's dtype, on any device.

        Raises:
            ConfigError, CheckpointError, TensorFileError, OSError: they cannot be read any more.
            ValueError: they, or the quantized values, have changed since.
        """
        whole = read_source(self.parameter)
        if hash_weight(self.name, whole) != source_hash(self.parameter):
            raise ValueError(
                f"The unquantized values of {self.name} have changed since they were read. Restore the files of the "
                "Llama that the run started with."
            )
        return whole

    def gather(self, local: Optional[Tensor] = None) -> Tensor:
        """Gather the whole weight (or gradient, or any tensor of the parameter's shape) from the tensor-parallel ranks.

        Collective over them.

        Args:
            local: the shape of the parameter; None: its value.

        Returns:
            [*shape], not quantized.
        """
        local = unquantized(self.parameter if local is None else local).detach().contiguous()
        if self.split_dim is None:
            return local
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        shards = [torch.empty_like(local) for _ in range(ranks)]
        dist.all_gather(shards, local, group=parallel_state.get_tensor_model_parallel_group())
        shares = [shard.chunk(self.blocks, dim=self.split_dim) for shard in shards]
        whole = torch.cat([shares[r][b] for b in range(self.blocks) for r in range(ranks)], dim=self.split_dim)
        return whole if self.rows is None else whole[: self.rows]


def list_weights(model: nn.Module) -> list[Weight]:
    """List the weights of this rank's part of an AnyMALModel, in its order."""
    vocab_size: Any = model.vocab_size
    discrete: Any = model.discrete
    weights = []
    parameter: Any
    for name, parameter in model.named_parameters():
        split = getattr(parameter, "tensor_model_parallel", False)
        rows = vocab_size if name.endswith(("word_embeddings.weight", "output_layer.weight")) else None
        weights.append(
            Weight(
                name=whole_name(model, name),
                parameter=parameter,
                split_dim=int(parameter.partition_dim) if split else None,
                blocks=2 if name.endswith("mlp.linear_fc1.weight") and name.startswith("language_model.") else 1,
                rows=discrete.added if name.startswith("discrete.") else rows,
            )
        )
    return weights


def whole_name(model: nn.Module, name: str) -> str:
    """Return the name in the whole model of a parameter or module of this rank's part of an AnyMALModel."""
    llama: Any = model.get_submodule("language_model")
    first_layer = llama.decoder.layers[0].layer_number - 1 if len(llama.decoder.layers) else 0
    if llama.share_embeddings_and_output_weights and name == "language_model.output_layer.weight":
        return "language_model.embedding.word_embeddings.weight"
    if llama.share_embeddings_and_output_weights and name == "discrete.head.weight":
        return "discrete.embedding.weight"
    match = re.match(r"(language_model\.decoder\.layers\.)(\d+)\.(.*)", name)
    if not match:
        return _FUSED_IN_PROJECTORS.sub(r"\1_norm.\2", name)
    rest = FUSED_NORMS.get(match[3], match[3])
    return f"{match[1]}{int(match[2]) + first_layer}.{rest}"


def set_initial_values(weights: Iterable[Weight], seed: int, default_std: float) -> None:
    """Draw each weight by `initial_value`. A parameter's `init_std` overrides `default_std`; one-dimensional weights
    keep the values they were built with (norms 1, biases 0).
    """
    for weight in weights:
        if weight.parameter.dim() < 2:
            continue
        std = getattr(weight.parameter, "init_std", default_std)
        draw = partial(initial_value, weight.name, weight.shape, seed, std, weight.parameter.device)
        weight.set_from(draw, hash_later=True)


def initial_value(name: str, shape: tuple[int, ...], seed: int, std: float, device: torch.device = _CPU) -> Tensor:
    """Draw a whole weight, [*shape], from a normal distribution seeded by (seed, name); the same under every layout.

    Args:
        device: draws large weights (a random 70B would take one CPU core twelve minutes); GPUs of the same model draw
            the same values.
    """
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    drawn_on = device if math.prod(shape) >= _LARGE else _CPU
    generator = torch.Generator(drawn_on).manual_seed(int.from_bytes(key[:8], "little") >> 1)
    return torch.randn(shape, generator=generator, device=drawn_on) * std


def gather_weights(
    models: Iterable[nn.Module], prefix: str = "", *, from_sources: bool = False
) -> Optional[dict[str, Tensor]]:
    """Gather all whole weights on rank 0 (None elsewhere), on the CPU, by name. Collective over all processes.

    Args:
        from_sources: return the values that quantized weights were made from, in the run's precision, and not those
            they have.

    Returns:
        Each weight [*shape].

    Raises:
        ConfigError, CheckpointError, TensorFileError, OSError, ValueError: see `Weight.source`; on rank 0, after the
            exchange.
    """
    mine: dict[str, Tensor] = {}
    failure: Optional[Exception] = None
    for weight in _selected(models, prefix):
        if not (from_sources and is_quantized(weight.parameter)):
            whole = weight.gather()
            if _speaks_for_replica():
                mine[weight.name] = whole.cpu()
        elif _speaks_for_replica() and failure is None:
            try:
                mine[weight.name] = weight.source().cpu()
            except (ValueError, OSError) as error:
                failure = error
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.gather_object((mine, failure), gathered if dist.get_rank() == 0 else None, dst=0)
    if dist.get_rank() != 0:
        return None
    for _, failed in gathered:
        if failed is not None:
            raise failed
    return {name: tensor for weights, _ in gathered for name, tensor in weights.items()}


def load_weights(models: Iterable[nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Set every weight of this rank from whole weights.

    Raises:
        ValueError: one is missing or has another shape.
    """
    for weight in _selected(models, ""):
        if weight.name not in tensors:
            raise ValueError(f"The weights lack {weight.name}.")
        weight.set_from(partial(tensors.__getitem__, weight.name))


def hash_weights(models: Iterable[nn.Module], prefix: str) -> str:
    """Hash the whole weights under `prefix` except adapters: names, shapes, dtypes and bytes; the same under every
    layout.

    A base of 70B takes one core one to two minutes, so the ranks that hold the same layers share the weights out, and
    each hashes its share in a few threads.

    Collective over all processes; every rank gets the hash.
    """
    weights = [weight for weight in _selected(models, prefix) if ".lora." not in weight.name]
    data_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    me = data_rank, parallel_state.get_tensor_model_parallel_rank()
    digests: dict[str, str] = {}
    threads = min(_MOST_THREADS, share_of_cores())
    with ThreadPoolExecutor(threads) as pool:
        under_way: dict[str, Future[str]] = {}
        for weight, owner in zip(weights, _owners([math.prod(weight.shape) for weight in weights])):
            if is_quantized(weight.parameter):
                if owner == me:
                    digests[weight.name] = source_hash(weight.parameter)
            elif owner[0] == data_rank:
                whole = weight.gather()
                if owner == me:
                    under_way[weight.name] = pool.submit(hash_weight, weight.name, whole.cpu())
                    # Each holds a whole weight.
                    if len(under_way) > threads:
                        next(iter(under_way.values())).result()
                        digests |= _finished(under_way)
        digests |= {name: digest.result() for name, digest in under_way.items()}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, digests)
    return hash_together({name: digest for rank_digests in gathered for name, digest in rank_digests.items()})


def _finished(under_way: dict[str, Future[str]]) -> dict[str, str]:
    """Take the digests that are complete out of those under way."""
    return {name: under_way.pop(name).result() for name in [name for name, one in under_way.items() if one.done()]}


def _owners(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Share weights out among the ranks of a pipeline stage: the largest first, each to the rank with the least.

    Args:
        sizes: number of elements of each weight, the same on all these ranks.

    Returns:
        (data rank, tensor rank) for each weight.
    """
    replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    ranks = product(range(replicas), range(parallel_state.get_tensor_model_parallel_world_size()))
    loads = [(0, rank) for rank in ranks]
    owners: dict[int, tuple[int, int]] = {}
    for number in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        load, owners[number] = loads[0]
        heapq.heapreplace(loads, (load + sizes[number], owners[number]))
    return [owners[number] for number in range(len(sizes))]


def hash_weight(name: str, whole: Tensor) -> str:
    """Hash one whole weight, of any shape: name, shape, dtype and bytes."""
    head = f"{name} {tuple(whole.shape)} {whole.dtype}".encode()
    digest = hashlib.sha256(head)
    digest.update(raw_bytes(whole.cpu()))
    return digest.hexdigest()


def hash_together(digests: Mapping[str, str]) -> str:
    """Combine the hashes of many weights into one, independently of their order."""
    body = "\n".join(f"{name} {digest}" for name, digest in sorted(digests.items()))
    return hashlib.sha256(body.encode()).hexdigest()


def _selected(models: Iterable[nn.Module], prefix: str) -> Iterator[Weight]:
    for model in models:
        yield from (weight for weight in list_weights(model) if weight.name.startswith(prefix))


def _speaks_for_replica() -> bool:
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    )


def leave_unset(weight: Tensor) -> None:
    """No-op `init_method` for megatron-core, for any shape: values are loaded, or drawn with `set_initial_values`."""
