"""Reference that every layout must match: AnyMAL's three jobs in plain torch, on one process, one sample at a time.

Written from the definitions (AnyMAL section 3; Llama; Perceiver Resampler; LoRA; AdamW), without megatron-core and
without the package's model, losses and optimizer. It shares with the package only the encoders (transformers models or
plain torch, which no layout splits) and NEFTune's random numbers, drawn for one document at a time.

Weights have the engine's names of unsharded weights, as returned by `gather_weights`.

Shapes: L tokens of a sample, H the Llama's hidden size, V its vocabulary size, n encoder inputs (pieces), F features of
width w and T soft tokens per encoder input.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_anymal.config import ProjectorConfig, RunConfig
from megatron_anymal.modalities import build_modality, load_plugins
from megatron_anymal.model.encoders import build_encoder
from megatron_anymal.model.neftune import neftune_noise
from megatron_anymal.train.optim import learning_rate
from parity.objective import backward
from parity.samples import Sample, read_steps

_EMBEDDING = "language_model.embedding.word_embeddings.weight"
_HEAD = "language_model.output_layer.weight"


@dataclass(frozen=True)
class Trace:
    """Record of a run. Gradients and weights are keyed by the names of the unsharded weights."""

    # Per step: the mean loss of the batch, before the update.
    losses: list[float]
    # Per step: the gradient of every trainable weight, before clipping.
    gradients: list[dict[str, np.ndarray]]
    # Trainable weights after the last step.
    weights: dict[str, np.ndarray]


def run_reference(
    config: RunConfig,
    weights: Mapping[str, Any],
    trainable: Collection[str],
    steps: int,
    dtype: torch.dtype = torch.float32,
) -> Trace:
    """Train for `steps` steps from the given weights. Needs no process group.

    Args:
        config: configuration of the run to compare with. Its layout is ignored.
        weights: all unsharded initial weights (tensors or arrays) by name. DPO's reference model uses the same ones.
        trainable: names of the weights to train.
        dtype: float32, or float64 to distinguish rounding from errors.
    """
    load_plugins(config.model.plugins)
    lm = config.model.language_model
    hf = LlamaConfig.from_pretrained(lm.path) if lm.path else LlamaConfig(**lm.config)
    model = Reference(config, hf, weights, trainable, dtype)
    reference = Reference(config, hf, weights, (), dtype).eval() if config.job == "dpo" else None
    optimizer = AdamW(config, {name: p for name, p in model.named_parameters() if p.requires_grad})
    losses, gradients = [], []
    for step, batch in enumerate(read_steps(config, steps)):
        losses.append(backward(model, config, batch, reference))
        gradients.append(optimizer.gradients())
        optimizer.step(learning_rate(config.model.optim, config.trainer.max_steps, step))
    return Trace(losses, gradients, {name: _array(p) for name, p in optimizer.parameters.items()})


class Reference(nn.Module):
    """The whole model. Its parameters have the names of the unsharded weights."""

    def __init__(
        self,
        config: RunConfig,
        hf: LlamaConfig,
        weights: Mapping[str, Any],
        trainable: Collection[str] = (),
        dtype: torch.dtype = torch.float32,
    ):
        """Copy the given weights into the model.

        Raises:
            ValueError: `trainable` names a weight that does not exist.
        """
        super().__init__()
        if unknown := sorted(set(trainable) - set(weights)):
            raise ValueError(f"There are no weights {unknown} to train.")
        self.hf, self.sections, self.lora = hf, config.model.modalities, config.model.lora
        self.neftune, self.seed = config.model.neftune, config.model.seed
        self.encoders = nn.ModuleDict(
            {
                name: build_encoder(section.encoder, build_modality(name, section).piece_shape)
                for name, section in self.sections.items()
            }
        ).to(dtype)
        for name in weights:
            value = torch.as_tensor(weights[name]).detach().to(dtype, copy=True)
            _put(self, name, nn.Parameter(value, requires_grad=name in trainable))
        self._names = {name for name, _ in self.named_parameters()}
        assert self._names == set(weights), f"weights not given: {sorted(self._names - set(weights))}"
        # Angles are computed in fp32 for every dtype, as in other implementations.
        self._inverse_frequencies = LlamaRotaryEmbedding(config=hf).inv_freq.float()

    def forward(self, sample: Sample) -> Tensor:
        """Logits [L, V] of one sample."""
        x = self._rows(_EMBEDDING, "discrete.embedding.weight")[sample.tokens]
        for name, pieces in sample.pieces.items():
            soft = self.soft_tokens(name, pieces).flatten(0, 1)
            assert len(soft) == len(sample.positions[name]), f"{name}: placeholders and soft tokens differ in number"
            x[sample.positions[name]] = soft
        if self.training and self.neftune.alpha:
            x = x + self._noise(sample).to(x.dtype)
        for number in range(self.hf.num_hidden_layers):
            x = self._llama_layer(x, f"language_model.decoder.layers.{number}")
        x = self._rms_norm(x, "language_model.decoder.final_layernorm")
        if self.hf.tie_word_embeddings:
            return x @ self._rows(_EMBEDDING, "discrete.embedding.weight").T
        return x @ self._rows(_HEAD, "discrete.head.weight").T

    def _rows(self, llama: str, discrete: str) -> Tensor:
        """The whole vocabulary's rows [V, H]: the Llama's, then those of marks and codes."""
        return torch.cat([self.weight(name) for name in (llama, discrete) if name in self._names])

    def _noise(self, sample: Sample) -> Tensor:
        """NEFTune's noise [L, H] for this document."""
        length = len(sample.tokens)
        noisy = torch.ones(length, dtype=torch.bool)
        if self.neftune.embeddings == "text":
            for positions in sample.positions.values():
                noisy[positions] = False
        return neftune_noise(
            self.seed,
            sample.step,
            torch.full((length,), sample.document),
            torch.arange(length),
            torch.full((length,), length),
            self.neftune.alpha,
            self.hf.hidden_size,
            torch.float32,
            noisy,
        )

    def soft_tokens(self, name: str, pieces: Tensor) -> Tensor:
        """Encode and project a modality's encoder inputs [n, *piece_shape] to soft tokens [n, T, H]."""
        encoder = self.encoders[name]
        with torch.set_grad_enabled(any(p.requires_grad for p in encoder.parameters())):
            features = encoder(pieces)
        project = self._resampler if self.sections[name].projector.type == "resampler" else self._linear_projector
        x = project(features, f"projectors.{name}", self.sections[name].projector)
        return _over_rms(x, 1e-6) * self.weight(f"projectors.{name}.gain")

    def weight(self, name: str) -> Tensor:
        """Return a weight by its full name."""
        return self.get_parameter(name)

    # Llama

    def _llama_layer(self, x: Tensor, name: str) -> Tensor:
        x = x + self._self_attention(self._rms_norm(x, f"{name}.input_layernorm"), f"{name}.self_attention")
        y = self._rms_norm(x, f"{name}.pre_mlp_layernorm")
        gate, up = (y @ self._adapted(f"{name}.mlp.linear_fc1", ("gate_proj", "up_proj")).T).chunk(2, dim=-1)
        return x + (gate * torch.sigmoid(gate) * up) @ self._adapted(f"{name}.mlp.linear_fc2", ("down_proj",)).T

    def _self_attention(self, x: Tensor, name: str) -> Tensor:
        """Causal grouped-query attention of one document, [L, H] -> [L, H]."""
        length, groups, size = len(x), self.hf.num_key_value_heads, self.hf.head_dim
        per_group = self.hf.num_attention_heads // groups
        # The weight's rows, group by group: the query heads, the key head and the value head of the group.
        projections = ("q_proj", "k_proj", "v_proj")
        weight = self._adapted(f"{name}.linear_qkv", projections, (per_group * size, size, size))
        qkv = (x @ weight.T).view(length, groups, per_group + 2, size)
        query, key, value = qkv.split([per_group, 1, 1], dim=2)
        query, key = self._rotate(query), self._rotate(key)
        scores = torch.einsum("igqd,jgd->gqij", query, key.squeeze(2)) / math.sqrt(size)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        shares = torch.softmax(scores.masked_fill(future, -math.inf), dim=-1)
        read = torch.einsum("gqij,jgd->igqd", shares, value.squeeze(2))
        return read.reshape(length, -1) @ self._adapted(f"{name}.linear_proj", ("o_proj",)).T

    def _adapted(self, name: str, projections: Sequence[str], rows: Sequence[int] = ()) -> Tensor:
        """Return a weight plus its low-rank adapters: alpha / r x B A for each projection (Hu et al., 2021).

        Args:
            projections: the projections stacked in the weight, in order.
            rows: rows of each projection per group, if the weight interleaves them; by default, the projections are
                concatenated.
        """
        weight = self.weight(f"{name}.weight")
        if f"{name}.lora.{projections[0]}.A" not in self._names:
            return weight
        added = [self.weight(f"{name}.lora.{p}.B") @ self.weight(f"{name}.lora.{p}.A") for p in projections]
        if rows:
            added = [part.unflatten(0, (-1, count)) for part, count in zip(added, rows)]
            together = torch.cat(added, dim=1).flatten(0, 1)
        else:
            together = torch.cat(added)
        return weight + together * (self.lora.alpha / self.lora.r)

    def _rotate(self, x: Tensor) -> Tensor:
        """Apply RoPE to [L, ..., d]. The two halves of a head hold the two coordinates of each rotated pair."""
        angles = torch.outer(torch.arange(len(x), dtype=torch.float32), self._inverse_frequencies)
        angles = angles.view(len(x), *[1] * (x.dim() - 2), -1)
        cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1)

    def _rms_norm(self, x: Tensor, name: str) -> Tensor:
        return _over_rms(x, self.hf.rms_norm_eps) * self.weight(f"{name}.weight")

    # Projectors

    def _resampler(self, features: Tensor, name: str, config: ProjectorConfig) -> Tensor:
        """Perceiver resampler: [n, F, w] -> [n, T, H]."""
        x = self._linear(self._layer_norm(features, f"{name}.input_norm"), f"{name}.input_linear")
        x = x + self.weight(f"{name}.position_embedding")
        latents = self.weight(f"{name}.latents").expand(len(x), -1, -1)
        for number in range(config.num_layers):
            layer = f"{name}.layers.{number}"
            own = self._layer_norm(latents, f"{layer}.latent_norm")
            read = torch.cat([self._layer_norm(x, f"{layer}.feature_norm"), own], dim=1)
            latents = latents + self._cross_attention(own, read, layer, config.num_attention_heads)
            up = self._linear(self._layer_norm(latents, f"{layer}.ffn_norm"), f"{layer}.ffn_up")
            latents = latents + self._linear(_gelu(up), f"{layer}.ffn_down")
        return self._linear(self._layer_norm(latents, f"{name}.output_norm"), f"{name}.output_linear")

    def _cross_attention(self, reader: Tensor, read: Tensor, name: str, heads: int) -> Tensor:
        query = self._linear(reader, f"{name}.query").unflatten(2, (heads, -1))
        key = self._linear(read, f"{name}.key").unflatten(2, (heads, -1))
        value = self._linear(read, f"{name}.value").unflatten(2, (heads, -1))
        scores = torch.einsum("nihd,njhd->nhij", query, key) / math.sqrt(query.size(-1))
        attended = torch.einsum("nhij,njhd->nihd", torch.softmax(scores, dim=-1), value)
        return self._linear(attended.flatten(2), f"{name}.attention_output")

    def _linear_projector(self, features: Tensor, name: str, config: ProjectorConfig) -> Tensor:
        """Linear projector: [n, F, w] -> [n, T, H]. Joins adjacent features, or makes several soft tokens from each."""
        pieces, count, width = features.shape
        groups = min(count, config.num_tokens)
        joined = math.ceil(count / groups)
        x = torch.cat([features, features.new_zeros(pieces, joined * groups - count, width)], dim=1)
        x = x.view(pieces, groups, joined * width)
        for number in range(config.num_layers):
            x = self._linear(_gelu(x) if number else x, f"{name}.linears.{number}")
        return x.reshape(pieces, config.num_tokens, self.hf.hidden_size)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.weight(f"{name}.weight").T
        return y + self.weight(f"{name}.bias") if f"{name}.bias" in self._names else y

    def _layer_norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return _over_rms(centred, 1e-5) * self.weight(f"{name}.weight") + self.weight(f"{name}.bias")


class AdamW:
    """Gradient clipping by the global norm, then Adam with decoupled weight decay (Loshchilov and Hutter, 2019).

    As in megatron-core, one-dimensional weights and biases are not decayed.
    """

    def __init__(self, config: RunConfig, parameters: Mapping[str, nn.Parameter]):
        self.parameters = dict(parameters)
        self._optim, self._max_norm = config.model.optim, config.trainer.gradient_clip_val
        self._first = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self._second = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self._steps = 0

    def gradients(self) -> dict[str, np.ndarray]:
        """Return copies of the gradients, with zeros for weights that the batch did not use."""
        return {name: _array(_gradient(p)) for name, p in self.parameters.items()}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update every parameter."""
        gradients = {name: _gradient(p) for name, p in self.parameters.items()}
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        scale = min(1.0, self._max_norm / (norm + 1e-6)) if self._max_norm else 1.0
        self._steps += 1
        beta1, beta2 = self._optim.betas
        for name, parameter in self.parameters.items():
            gradient, first, second = gradients[name] * scale, self._first[name], self._second[name]
            first.copy_(beta1 * first + (1 - beta1) * gradient)
            second.copy_(beta2 * second + (1 - beta2) * gradient.square())
            mean, square = first / (1 - beta1**self._steps), second / (1 - beta2**self._steps)
            decay = 0.0 if parameter.dim() == 1 or name.endswith(".bias") else self._optim.weight_decay
            parameter.sub_(rate * (mean / (square.sqrt() + self._optim.eps) + decay * parameter))


def _over_rms(x: Tensor, epsilon: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy().copy()


def _put(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Register `parameter` under a dotted name, and create the missing modules on the path."""
    module = root
    *path, last = name.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    # A GRU keeps a list of its weights, which assignment updates but register_parameter does not.
    setattr(module, last, parameter)
