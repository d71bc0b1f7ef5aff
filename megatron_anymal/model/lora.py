"""LoRA for the Llama (Hu et al. 2021): adapters of frozen linear layers, x -> W x + alpha / r B A dropout(x).

megatron-core fuses the q, k and v projections into one linear layer, the gate and up projections into another. The
adapters keep HuggingFace's projections separate: gathered from the ranks, `<linear>.lora.<projection>.A` and `.B` are
peft's `lora_A.weight` [r, in] and `lora_B.weight` [out, r]. In the forward pass they are fused like the layers: the As
are stacked, [R, in] with R = r x projections; each B occupies its own columns and the rows of its outputs, [out, R]. So
only one matrix product with each is applied to the tokens.

Under tensor parallelism adapters are split like their layer:

    column-parallel (qkv, fc1)  A whole on every rank, B split by rows. Under sequence parallelism A x, which is small,
                                is gathered, and a rank's gradient of A comes from its own tokens.
    row-parallel (proj, fc2)    A split by columns, B whole on every rank. A x is summed over the ranks; under sequence
                                parallelism each keeps its own tokens, from which its gradient of B comes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Optional

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_anymal.config import ConfigError, LoraConfig
from megatron_anymal.data.global_order import mix64
from megatron_anymal.model.lora_targets import PROJECTIONS, is_target, short_name
from megatron_anymal.model.neftune import GOLDEN, scramble, signed
from megatron_anymal.model.quantized_weights import unquantized
from megatron_anymal.model.unsharded_weights import list_weights

_COLUMN_PARALLEL = ("self_attention.linear_qkv", "mlp.linear_fc1")


def add_lora(models: Sequence[nn.Module], lora: LoraConfig) -> Optional[LoraDropout]:
    """Freeze the Llama and add adapters to its layers, all of them zero (`initialise_lora` sets their values).

    Args:
        models: this rank's AnyMALModels.

    Returns:
        The dropout, whose `set_tokens` must be called before each micro-batch's forward pass; None without dropout.

    Raises:
        ConfigError: a pattern matches no projection.
    """
    dropout = LoraDropout(lora.dropout) if lora.dropout else None
    for model in models:
        llama: Any = model.get_submodule("language_model")
        _check_targets(lora.targets, llama.config.num_layers)
        llama.requires_grad_(False)
        for layer in llama.decoder.layers:
            # What follows the last layer's attention may compute some positions only.
            selects = llama.selects_output and layer is llama.decoder.layers[-1]
            for path, inside in PROJECTIONS.items():
                of_selected = selects and path != "self_attention.linear_qkv"
                names = [f"layers.{layer.layer_number - 1}.{name}" for name in inside]
                if any(is_target(name, lora.targets) for name in names):
                    linear = layer.get_submodule(path)
                    linear.lora = LoraAdapter(names, path, linear.weight, llama.config, lora, dropout, of_selected)
                    linear.lora.hook = linear.register_forward_hook(_add_output)
        if dropout is not None:
            llama.decoder.register_forward_hook(dropout.follow)
    return dropout


def _check_targets(targets: Sequence[str], layers: int) -> None:
    names = [f"layers.{n}.{name}" for n in range(layers) for inside in PROJECTIONS.values() for name in inside]
    for pattern in targets:
        if not any(is_target(name, [pattern]) for name in names):
            raise ConfigError(
                f"model.lora.targets: {pattern!r} matches no projection of the Llama's {layers} layers. Use names like "
                f"{names[0]!r}, or {short_name(names[0])!r} for every layer."
            )


def initialise_lora(models: Iterable[nn.Module], seed: int) -> None:
    """Draw every A by (seed, name), the same under every layout, from peft's distribution (uniform within 1 / sqrt(in)
    of 0); set every B to zero.
    """
    for weight in (w for model in models for w in list_weights(model) if ".lora." in w.name):
        whole = torch.zeros(weight.shape)
        if weight.name.endswith(".A"):
            key = hashlib.sha256(f"{seed}/{weight.name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
            bound = 1 / math.sqrt(weight.shape[1])
            whole.uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            weight.parameter.copy_(weight.local_part(whole))


@torch.no_grad()
def merged_weights(models: Iterable[nn.Module], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of each whole weight of this rank under `prefix`, with adapters merged into their weights
    and not listed themselves. Collective over the tensor-parallel ranks.
    """
    for model in models:
        adapters = {linear.weight: linear.lora for linear in _adapted(model)}
        for weight in list_weights(model):
            if weight.name.startswith(prefix) and ".lora." not in weight.name:
                adapter = adapters.get(weight.parameter)
                merged = None if adapter is None else adapter.merged(weight.parameter)
                yield weight.name, weight.gather(merged)


@torch.no_grad()
def merge_lora(models: Iterable[nn.Module]) -> None:
    """Merge the adapters into their weights and remove them, which leaves a plain Llama."""
    for model in models:
        for linear in _adapted(model):
            linear.weight.copy_(linear.lora.merged(linear.weight))
            linear.lora.hook.remove()
            del linear.lora


def keep_reference(models: Iterable[nn.Module]) -> None:
    """Keep a frozen copy of the current adapters as the reference of a DPO policy (AnyMAL section E.3).

    The base is shared. Disabling the adapters instead would give the base model, which is not the reference.
    """
    for projection in _projections(models):
        projection.kept = projection.A.detach().clone(), projection.B.detach().clone()


@contextmanager
def as_reference(models: Iterable[nn.Module]) -> Iterator[None]:
    """Run the models with the adapters saved by `keep_reference`."""
    projections = _projections(models)
    for projection in projections:
        projection.gives_kept = True
    try:
        yield
    finally:
        for projection in projections:
            projection.gives_kept = False


def _projections(models: Iterable[nn.Module]) -> list[_Projection]:
    return [module for model in models for module in model.modules() if isinstance(module, _Projection)]


def _adapted(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(getattr(module, "lora", None), LoraAdapter)]


def _add_output(linear: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    """Forward hook of a linear layer with adapters."""
    x = inputs[0]
    if hasattr(linear, "layer_norm_weight"):
        # Transformer Engine's layer normalizes x itself and does not return the result.
        x = F.rms_norm(x, (x.size(-1),), linear.layer_norm_weight, linear.eps)
    return linear.lora(x, output[0]), output[1]


class LoraAdapter(nn.ModuleDict):
    """The adapters of one linear layer: its submodule `lora`, whose children are named after the projections."""

    def __init__(
        self,
        names: Sequence[str],
        layer: str,
        weight: Tensor,
        config: TransformerConfig,
        lora: LoraConfig,
        dropout: Optional[LoraDropout],
        of_selected: bool,
    ):
        """
        Args:
            names: all of the layer's projections.
            layer: the layer's name in its Transformer layer.
            weight: this rank's shard of the layer's weight, [out, in].
            of_selected: whether the layer computes only the positions of `output_positions`, if there are any.
        """
        super().__init__()
        self.hook: Any = None
        self.scaling = lora.alpha / lora.r
        self._r, self._dropout, self._of_selected = lora.r, dropout, of_selected
        self._column_parallel, self._sequence_parallel = layer in _COLUMN_PARALLEL, config.sequence_parallel
        self._groups, rows = _output_rows(layer, weight.size(0), config)
        # Number of output rows of every projection of the layer, including those without an adapter.
        self._rows = dict(zip(map(short_name, names), rows))
        self._streams = {short_name(name): _stream(name) for name in names if is_target(name, lora.targets)}
        for name in self._streams:
            self[name] = _Projection(lora.r, self._rows[name], weight, self._column_parallel, self._sequence_parallel)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Add the adapters' output to the layer's output.

        Args:
            x: [tokens, 1, in], the layer's (normalized) input.
            output: [tokens, 1, out], the layer's output. Under sequence parallelism it has more tokens than x for a
                column-parallel layer, which gathers them, and fewer for a row-parallel one.

        Returns:
            The shape of `output`.
        """
        scaling = self.scaling
        if self.training and self._dropout is not None:
            parts = [F.linear(self._drop(x, name), self._weights(name)[0]) for name in self._streams]
            inner = torch.cat(parts, dim=-1)
            scaling /= self._dropout.kept
        else:
            inner = F.linear(x, self._down())
        inner = self._exchange(inner)
        return torch.addmm(output.flatten(0, 1), inner.flatten(0, 1), self._up().t(), alpha=scaling).view_as(output)

    def merged(self, weight: Tensor) -> Tensor:
        """Return this rank's shard [out, in] of the layer's weight with the adapters added: summed in fp64, rounded."""
        change = self._up().double() @ self._down().double()
        return (unquantized(weight).double() + self.scaling * change).to(weight.dtype)

    def _down(self) -> Tensor:
        """Stack the As, [R, in]."""
        return torch.cat([self._weights(name)[0] for name in self._streams])

    def _up(self) -> Tensor:
        """Assemble the Bs, [out, R]: each in its own columns and in the rows of its projection's outputs."""
        like = next(self.parameters())
        width, column, blocks = self._r * len(self._streams), 0, []
        for name, rows in self._rows.items():
            if name in self._streams:
                blocks.append(F.pad(self._weights(name)[1], (column, width - column - self._r)))
                column += self._r
            else:
                blocks.append(like.new_zeros(rows, width))
        return torch.cat([block.unflatten(0, (self._groups, -1)) for block in blocks], dim=1).flatten(0, 1)

    def _exchange(self, inner: Tensor) -> Tensor:
        """Exchange A x so that it covers the tokens of the layer's output on this rank, [tokens, 1, R]."""
        if self._column_parallel:
            if self._sequence_parallel:
                return gather_from_sequence_parallel_region(inner)
            return copy_to_tensor_model_parallel_region(inner)
        if self._sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(inner)
        return reduce_from_tensor_model_parallel_region(inner)

    def _drop(self, x: Tensor, name: str) -> Tensor:
        assert self._dropout is not None
        rank = parallel_state.get_tensor_model_parallel_rank()
        # A row-parallel layer's input is split by channels; a column-parallel one's may be split by tokens.
        part = (0, 1)
        if self._column_parallel and self._sequence_parallel:
            part = (rank, parallel_state.get_tensor_model_parallel_world_size())
        first_channel = 0 if self._column_parallel else rank * x.size(-1)
        mask = self._dropout.dropped(
            self._streams[name], part, first_channel, x.size(-1), of_selected=self._of_selected
        )
        assert len(mask) == len(x), "set_tokens was called for another micro-batch"
        return x.masked_fill(mask.unsqueeze(1), 0.0)

    def _weights(self, name: str) -> tuple[Tensor, Tensor]:
        return self[name]()


class _Projection(nn.Module):
    """This rank's shards of one projection's A and B."""

    def __init__(self, r: int, rows: int, weight: Tensor, column_parallel: bool, sequence_parallel: bool):
        super().__init__()
        # Not weight.new_zeros, which for a quantized weight makes a quantized tensor.
        plain: Any = {"dtype": weight.dtype, "device": weight.device}
        a: Any = nn.Parameter(torch.zeros(r, weight.size(1), **plain))
        b: Any = nn.Parameter(torch.zeros(rows, r, **plain))
        split, whole, dim = (b, a, 0) if column_parallel else (a, b, 1)
        set_tensor_model_parallel_attributes(split, True, dim, 1)
        # Makes megatron-core sum its gradient over the ranks that share the sequence.
        whole.sequence_parallel = sequence_parallel
        self.A, self.B = a, b
        # A and B as saved for the reference, and whether forward returns them instead of the current ones.
        self.kept: Optional[tuple[Tensor, Tensor]] = None
        self.gives_kept = False

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return A and B. Always access them through this call, before which megatron-core waits for the parameter
        all-gather."""
        if self.gives_kept:
            assert self.kept is not None, "call keep_reference first"
            return self.kept
        return self.A, self.B


def _output_rows(layer: str, rows: int, config: TransformerConfig) -> tuple[int, list[int]]:
    """Return how the projections divide a rank's rows of a linear layer's weight: the number of consecutive groups, and
    each projection's number of rows over all groups (within a group the projections are in order).
    """
    if layer == "self_attention.linear_qkv":
        assert config.num_query_groups is not None and config.kv_channels is not None
        groups = config.num_query_groups // parallel_state.get_tensor_model_parallel_world_size()
        keys = groups * config.kv_channels
        return groups, [rows - 2 * keys, keys, keys]
    parts = len(PROJECTIONS[layer])
    return 1, [rows // parts] * parts


class LoraDropout:
    """Dropout of the adapters' inputs by a hash of (seed, step, projection, sample, token, channel).

    It is the same under every layout and when a layer is recomputed, without any RNG state. One hash gives the 16-bit
    numbers of four channels, so the dropout rate is rounded to a multiple of 1 / 65536.
    """

    def __init__(self, share: float):
        self._threshold = min(round(share * 2**16), 2**16 - 1) - 2**15
        # Expected share of an input that is kept.
        self.kept = 1 - (self._threshold + 2**15) / 2**16
        # Keys of all tokens, and of those at which the last layer computes its output.
        self._tokens: Optional[tuple[Tensor, Tensor]] = None

    def set_tokens(
        self, seed: int, step: int, sample_ids: Tensor, positions: Tensor, selected: Optional[Tensor] = None
    ) -> None:
        """Set the tokens of the micro-batch whose forward pass through this model chunk comes next.

        Args:
            sample_ids: [T] int64 on the model's device, position of each token's sample in the global batch; T counts
                the tokens of all the tensor-parallel ranks that share a sequence.
            positions: [T] int64, each token's position in its document.
            selected: [R] int64, see `output_positions.output_positions`.
        """
        keys = scramble(scramble(sample_ids + signed(mix64(seed, step))) + positions)
        self._tokens = keys, keys if selected is None else keys[selected]

    def follow(self, decoder: nn.Module, inputs: Any, output: Tensor) -> None:
        """Forward hook of the decoder: when a micro-batch's backward pass reaches it, restore that micro-batch's tokens
        for recomputed layers (a pipeline has set others in the meantime).

        Args:
            output: the decoder's hidden states, of any shape.
        """
        if output.requires_grad:
            output.register_hook(partial(self._resume, self._tokens))

    def _resume(self, tokens: Optional[tuple[Tensor, Tensor]], gradient: Tensor) -> None:
        self._tokens = tokens

    def dropped(
        self, stream: int, part: tuple[int, int], first_channel: int, channels: int, *, of_selected: bool = False
    ) -> Tensor:
        """Return which elements are dropped, [tokens, channels].

        Args:
            stream: a number unique to the projection.
            part: (n, m) for the n-th of m equal parts of the tokens.
            of_selected: of the tokens at which the last layer computes its output.
        """
        assert self._tokens is not None, "call set_tokens before the forward pass"
        number, parts = part
        keys = scramble(self._tokens[of_selected].unflatten(0, (parts, -1))[number] ^ stream)
        first = first_channel // 4
        groups = torch.arange(first, -(-(first_channel + channels) // 4), device=keys.device)
        numbers = scramble(torch.add(keys[:, None], groups, alpha=GOLDEN)).view(torch.int16)
        return numbers[:, first_channel - 4 * first :][:, :channels] < self._threshold


def _stream(name: str) -> int:
    return signed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
