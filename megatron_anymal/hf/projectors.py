"""The projectors in plain torch: the modules of model/projectors.py with the same weights, unsharded.

Shapes: n pieces, F features of width w per piece, T soft tokens per piece, h the projector's width, H the language
model's.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_anymal.config import ProjectorConfig

_EPSILON = 1e-6


def build_projector(config: ProjectorConfig, features: int, width: int, hidden_size: int) -> nn.Module:
    """Build a modality's projector, for `features` x `width` from the encoder and the LM's `hidden_size`."""
    if config.type == "resampler":
        return AnyMALPerceiverResampler(config, features, width, hidden_size)
    return AnyMALLinearProjector(config, features, width, hidden_size)


class AnyMALPerceiverResampler(nn.Module):
    """Learned latents cross-attend to the features of a piece (Perceiver Resampler, Flamingo section 3.1.1)."""

    def __init__(self, config: ProjectorConfig, features: int, width: int, hidden_size: int):
        super().__init__()
        h = config.hidden_size or width
        self.input_norm = nn.LayerNorm(width)
        self.input_linear = nn.Linear(width, h)
        self.position_embedding = nn.Parameter(0.5 * torch.randn(features, h))
        self.latents = nn.Parameter(torch.randn(config.num_tokens, h))
        self.layers = nn.ModuleList(
            _AnyMALResamplerLayer(h, config.num_attention_heads, config.ffn_multiplier)
            for _ in range(config.num_layers)
        )
        self.output_norm = nn.LayerNorm(h)
        self.output_linear = nn.Linear(h, hidden_size)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, features: Tensor) -> Tensor:
        """[n, F, w] -> [n, T, H]."""
        x = self.input_linear(self.input_norm(features)) + self.position_embedding
        latents = self.latents.expand(len(x), -1, -1)
        for layer in self.layers:
            latents = layer(latents, x)
        return _to_rms(self.output_linear(self.output_norm(latents)), self.gain)


class _AnyMALResamplerLayer(nn.Module):
    def __init__(self, h: int, heads: int, ffn_multiplier: int):
        super().__init__()
        self.heads = heads
        self.latent_norm = nn.LayerNorm(h)
        self.feature_norm = nn.LayerNorm(h)
        self.query = nn.Linear(h, h, bias=False)
        self.key = nn.Linear(h, h, bias=False)
        self.value = nn.Linear(h, h, bias=False)
        self.attention_output = nn.Linear(h, h, bias=False)
        self.ffn_norm = nn.LayerNorm(h)
        self.ffn_up = nn.Linear(h, ffn_multiplier * h)
        self.ffn_down = nn.Linear(ffn_multiplier * h, h)

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        """latents [n, T, h], features [n, F, h] -> [n, T, h]."""
        own = self.latent_norm(latents)
        both = torch.cat([self.feature_norm(features), own], dim=1)
        query, key, value = (
            self._split(linear(x)) for linear, x in ((self.query, own), (self.key, both), (self.value, both))
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        latents = latents + self.attention_output(attended.transpose(1, 2).flatten(2))
        return latents + self.ffn_down(F.gelu(self.ffn_up(self.ffn_norm(latents))))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class AnyMALLinearProjector(nn.Module):
    """Linear layers from features to soft tokens; neighbouring features are joined, or each gives several tokens."""

    def __init__(self, config: ProjectorConfig, features: int, width: int, hidden_size: int):
        super().__init__()
        self.tokens, self.hidden_size = config.num_tokens, hidden_size
        self.groups = min(features, self.tokens)
        joined = -(-features // self.groups)
        self.fill = joined * self.groups - features
        sizes = [width * joined, *[config.hidden_size or width] * (config.num_layers - 1)]
        sizes.append(hidden_size * self.tokens // self.groups)
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, features: Tensor) -> Tensor:
        """[n, F, w] -> [n, T, H]."""
        x = F.pad(features, (0, 0, 0, self.fill)).reshape(len(features), self.groups, -1)
        for number, linear in enumerate(self.linears):
            x = linear(F.gelu(x) if number else x)
        return _to_rms(x.reshape(len(features), self.tokens, self.hidden_size), self.gain)


def _to_rms(x: Tensor, gain: Tensor) -> Tensor:
    return (F.rms_norm(x.float(), (x.size(-1),), eps=_EPSILON) * gain).to(x.dtype)
