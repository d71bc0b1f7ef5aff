"""Projectors map an encoder's features to soft tokens in the language model's embedding space (AnyMAL section 3.1).

They are built from megatron-core's parallel linear layers, with weights split over the tensor-parallel ranks; with
Transformer Engine, a norm and the following linear layer are one fused module. Both projectors end with an RMS norm of
the soft tokens whose single learned gain is initialized to the root mean square of the text embeddings.

Shapes: n pieces, F features of width w per piece, T soft tokens per piece, h the projector's width, H the language
model's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megatron_anymal.config import ConfigError, ProjectorConfig
from megatron_anymal.model.unsharded_weights import leave_unset

_EPSILON = 1e-6


def build_projector(
    name: str,
    config: ProjectorConfig,
    parallel: ModelParallelConfig,
    implementation: str,
    features: int,
    width: int,
    hidden_size: int,
) -> MegatronModule:
    """Build the projector of one modality.

    Args:
        name: the modality's name in the configuration, for messages.
        parallel: sizes and dtype; sequence parallelism must be off.
        implementation: "local" or "transformer_engine".
        features: the encoder's features per piece.
        width: their width.
        hidden_size: the language model's.

    Raises:
        ConfigError: the sizes do not match the encoder or the tensor-parallel size.
    """
    where = f"model.modalities.{name}.projector"
    if config.type == "resampler":
        return PerceiverResampler(where, config, parallel, implementation, features, width, hidden_size)
    return LinearProjector(where, config, parallel, features, width, hidden_size)


class PerceiverResampler(MegatronModule):
    """Learned latents read a piece's features through cross-attention (Perceiver Resampler, Flamingo section 3.1.1).

    In every layer the latents attend to the features and to themselves, followed by a feed-forward block. A learned
    position embedding distinguishes the features (for video also their time, since frames are concatenated).

    Raises:
        ConfigError: the width cannot be divided by the heads, or the heads by the tensor-parallel ranks.
    """

    def __init__(
        self,
        where: str,
        config: ProjectorConfig,
        parallel: ModelParallelConfig,
        implementation: str,
        features: int,
        width: int,
        hidden_size: int,
    ):
        super().__init__(config=parallel)
        h = config.hidden_size or width
        heads, ranks = config.num_attention_heads, parallel.tensor_model_parallel_size
        if h % heads or heads % ranks:
            raise ConfigError(
                f"{where}: its width {h} must be divisible by num_attention_heads={heads}, and the heads by "
                f"model.tensor_model_parallel_size={ranks}."
            )
        self.input_norm, self.input_linear = _norm_and_column(width, h, parallel, implementation)
        # Almost the scale of the normalized features, so that positions are distinguishable from the first step.
        self.position_embedding = _parameter((features, h), 0.5, parallel)
        self.latents = _parameter((config.num_tokens, h), 1.0, parallel)
        self.layers = nn.ModuleList(
            _ResamplerLayer(h, heads, config.ffn_multiplier, parallel, implementation) for _ in range(config.num_layers)
        )
        self.output_norm, self.output_linear = _norm_and_column(h, hidden_size, parallel, implementation)
        self.gain = _gain(parallel)

    def forward(self, features: Tensor) -> Tensor:
        """[n, F, w] -> [n, T, H]."""
        x, _ = self.input_linear(self.input_norm(features))
        x = gather_from_tensor_model_parallel_region(x) + self.position_embedding
        latents = self.latents.expand(len(x), -1, -1)
        for layer in self.layers:
            latents = layer(latents, x)
        out, _ = self.output_linear(self.output_norm(latents))
        return _to_rms(gather_from_tensor_model_parallel_region(out), self.gain)


class _ResamplerLayer(MegatronModule):
    def __init__(self, h: int, heads: int, ffn_multiplier: int, parallel: ModelParallelConfig, implementation: str):
        super().__init__(config=parallel)
        self.head_size, self.local_heads = h // heads, heads // parallel.tensor_model_parallel_size
        # Each output feeds two linear layers, so neither norm can be fused with one.
        self.latent_norm = _layer_norm(h, parallel)
        self.feature_norm = _layer_norm(h, parallel)
        # Without biases, as in Flamingo: a key bias would only shift all scores equally.
        self.query = _column(h, h, parallel, bias=False)
        self.key = _column(h, h, parallel, bias=False)
        self.value = _column(h, h, parallel, bias=False)
        self.attention_output = _row(h, h, parallel, bias=False)
        self.ffn_norm, self.ffn_up = _norm_and_column(h, ffn_multiplier * h, parallel, implementation)
        self.ffn_down = _row(ffn_multiplier * h, h, parallel)

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        """latents [n, T, h], features [n, F, h] -> [n, T, h]."""
        own = self.latent_norm(latents)
        both = torch.cat([self.feature_norm(features), own], dim=1)
        query, key, value = (
            self._heads(linear(x)[0]) for linear, x in ((self.query, own), (self.key, both), (self.value, both))
        )
        read = F.scaled_dot_product_attention(query, key, value)
        latents = latents + self.attention_output(read.transpose(1, 2).flatten(2))[0]
        up, _ = self.ffn_up(self.ffn_norm(latents))
        return latents + self.ffn_down(F.gelu(up))[0]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.local_heads, self.head_size)).transpose(1, 2)


class LinearProjector(MegatronModule):
    """One linear layer (or several, with GELU in between) from features to soft tokens.

    If there are more features than soft tokens, neighboring features are concatenated (the last group is padded with
    zeros); if there are fewer, each feature yields several soft tokens. All positions share the same weights.

    Raises:
        ConfigError: there are fewer features than soft tokens, and the tokens are not a multiple of them.
    """

    def __init__(
        self,
        where: str,
        config: ProjectorConfig,
        parallel: ModelParallelConfig,
        features: int,
        width: int,
        hidden_size: int,
    ):
        super().__init__(config=parallel)
        self.tokens, self.hidden_size = config.num_tokens, hidden_size
        if features < self.tokens and self.tokens % features:
            raise ConfigError(
                f"{where}.num_tokens={self.tokens} is not a multiple of the encoder's {features} features per piece, "
                "but each feature must yield the same number of soft tokens."
            )
        self.groups = min(features, self.tokens)
        group_size = -(-features // self.groups)
        self.fill = group_size * self.groups - features
        inner = config.hidden_size or width
        sizes = [width * group_size, *[inner] * (config.num_layers - 1)]
        out_size = hidden_size * self.tokens // self.groups
        self.linears = nn.ModuleList(
            _column(a, b, parallel, gather_output=True) for a, b in zip(sizes, [*sizes[1:], out_size])
        )
        self.gain = _gain(parallel)

    def forward(self, features: Tensor) -> Tensor:
        """[n, F, w] -> [n, T, H]."""
        x = F.pad(features, (0, 0, 0, self.fill)).reshape(len(features), self.groups, -1)
        # megatron-core would sum the gradient of frozen features over the tensor-parallel ranks, too.
        first: Any = self.linears[0]
        first.allreduce_dgrad = x.requires_grad and self.config.tensor_model_parallel_size > 1
        for number, linear in enumerate(self.linears):
            x, _ = linear(F.gelu(x) if number else x)
        return _to_rms(x.reshape(len(features), self.tokens, self.hidden_size), self.gain)


def _to_rms(x: Tensor, gain: Tensor) -> Tensor:
    return (F.rms_norm(x.float(), (x.size(-1),), eps=_EPSILON) * gain).to(x.dtype)


def _device() -> torch.device:
    return torch.device("cuda")


def _parameter(shape: tuple[int, ...], std: float, parallel: ModelParallelConfig) -> nn.Parameter:
    parameter: Any = nn.Parameter(torch.empty(shape, dtype=parallel.params_dtype, device=_device()))
    parameter.init_std = std
    return parameter


def _gain(parallel: ModelParallelConfig) -> nn.Parameter:
    # Set to the text embeddings' root mean square once those have their values (model.build).
    return nn.Parameter(torch.ones(1, dtype=parallel.params_dtype, device=_device()))


def _layer_norm(size: int, parallel: ModelParallelConfig) -> nn.LayerNorm:
    return nn.LayerNorm(size, dtype=parallel.params_dtype, device=_device())


def _norm_and_column(
    inputs: int, outputs: int, parallel: ModelParallelConfig, implementation: str
) -> tuple[nn.Module, Any]:
    """Build a norm and the following linear layer; with Transformer Engine, the linear layer does both."""
    if implementation != "transformer_engine":
        return _layer_norm(inputs, parallel), _column(inputs, outputs, parallel)
    from megatron_anymal.model.transformer_engine import NormLinear

    linear = NormLinear(inputs, outputs, parallel)
    linear.weight.init_std = 1.0 / math.sqrt(inputs)
    return nn.Identity(), linear


def _column(
    inputs: int, outputs: int, parallel: ModelParallelConfig, gather_output: bool = False, bias: bool = True
) -> Any:
    linear = ColumnParallelLinear(
        inputs, outputs, config=parallel, init_method=leave_unset, bias=bias, gather_output=gather_output
    )
    linear.weight.init_std = 1.0 / math.sqrt(inputs)
    return linear


def _row(inputs: int, outputs: int, parallel: ModelParallelConfig, bias: bool = True) -> Any:
    linear = RowParallelLinear(
        inputs,
        outputs,
        config=parallel,
        init_method=leave_unset,
        bias=bias,
        input_is_parallel=True,
        skip_bias_add=False,
    )
    linear.weight.init_std = 1.0 / math.sqrt(inputs)
    return linear
