"""Projectors against plain torch written from their descriptions: outputs and gradients on one and two ranks."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear
from ranks import run_ranks

from megatron_anymal.config import ConfigError, ProjectorConfig, RunConfig
from megatron_anymal.model.projectors import build_projector
from megatron_anymal.model.unsharded_weights import Weight, leave_unset, whole_name
from megatron_anymal.parallel import initialize

HIDDEN = 12
# Number of features, their width, and the projector.
CASES: dict[str, tuple[int, int, ProjectorConfig]] = {
    "resampler": (5, 6, ProjectorConfig("resampler", 2, 3, hidden_size=8, num_attention_heads=4, ffn_multiplier=2)),
    "resampler-own-width": (4, 8, ProjectorConfig("resampler", 1, 7, num_attention_heads=2)),
    "linear-one-to-one": (3, 6, ProjectorConfig("linear", 1, 3)),
    "linear-joined-and-filled": (7, 6, ProjectorConfig("linear", 1, 3)),
    "linear-several-each": (2, 6, ProjectorConfig("linear", 1, 4)),
    "linear-deep": (4, 6, ProjectorConfig("linear", 3, 2, hidden_size=10)),
}
PIECES = 3
IMPLEMENTATIONS = ("local", "transformer_engine")


def setting(tp: int) -> ModelParallelConfig:
    """Join the job and return the projectors' parallel configuration."""
    config = RunConfig()
    config.trainer.precision, config.trainer.devices = "32", tp
    config.model.tensor_model_parallel_size = tp
    config.model.language_model.config = {"vocab_size": 8}
    config.data.tokenizer = "unused"
    initialize(config)
    return ModelParallelConfig(tensor_model_parallel_size=tp, params_dtype=torch.float32)


class NormLinear(ColumnParallelLinear):
    """Stands in for Transformer Engine's class, which needs a GPU: the same parameters under the same names."""

    def __init__(self, inputs: int, outputs: int, parallel: ModelParallelConfig):
        super().__init__(inputs, outputs, config=parallel, init_method=leave_unset)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(inputs))
        self.layer_norm_bias = torch.nn.Parameter(torch.zeros(inputs))

    def forward(self, x: torch.Tensor) -> Any:
        rows = F.layer_norm(x, x.shape[-1:], self.layer_norm_weight, self.layer_norm_bias)
        return super().forward(rows)


def use_stand_in() -> None:
    """Install it as the module that would import Transformer Engine's class."""
    sys.modules["megatron_anymal.model.transformer_engine"] = SimpleNamespace(NormLinear=NormLinear)  # type: ignore[assignment]


def weights_of(module: torch.nn.Module) -> list[Weight]:
    # A model chunk without layers, needed only for the names.
    decoder = SimpleNamespace(layers=[])
    model: Any = SimpleNamespace(
        get_submodule=lambda name: SimpleNamespace(decoder=decoder, share_embeddings_and_output_weights=False)
    )
    return [
        Weight(
            whole_name(model, name),
            parameter,
            split_dim=int(parameter.partition_dim) if getattr(parameter, "tensor_model_parallel", False) else None,  # type: ignore[arg-type]
            blocks=1,
            rows=None,
        )
        for name, parameter in module.named_parameters()
    ]


def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Random weight determined by its name; norm weights and the gain are about 1."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    value = torch.randn(shape, generator=generator)
    return 1 + 0.3 * value if name == "gain" or "norm.weight" in name else 0.4 * value


def inputs_of(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    features, width, config = CASES[name]
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(PIECES, features, width, generator=generator)
    return x, torch.randn(PIECES, config.num_tokens, HIDDEN, generator=generator)


def run_all(tp: int, implementation: str) -> dict[str, dict[str, np.ndarray]]:
    """Per case: output, gradient of the input, and gathered gradients of all weights."""
    parallel = setting(tp)
    use_stand_in()
    answers = {}
    for name, (features, width, config) in CASES.items():
        projector = build_projector("m", config, parallel, implementation, features, width, HIDDEN)
        fused = sum(isinstance(module, NormLinear) for module in projector.modules())
        resampler = config.type == "resampler" and implementation == "transformer_engine"
        assert fused == (2 + config.num_layers if resampler else 0)
        weights = weights_of(projector)
        with torch.no_grad():
            for weight in weights:
                weight.parameter.copy_(weight.local_part(draw(weight.name, weight.shape)))
        x, direction = inputs_of(name)
        x.requires_grad_()
        out = projector(x)
        out.backward(direction)
        assert x.grad is not None
        tensors = {"output": out.detach(), "input gradient": x.grad}
        tensors.update({w.name: w.gather(w.parameter.grad) for w in weights})
        answers[name] = {key: tensor.numpy() for key, tensor in tensors.items()}
    return answers


class Plain:
    """The same projectors in double precision, with weights looked up by name."""

    def __init__(self, config: ProjectorConfig, features: int, width: int):
        self.config, self.features, self.width = config, features, width
        self.weights: dict[str, torch.Tensor] = {}

    def weight(self, name: str, *shape: int) -> torch.Tensor:
        if name not in self.weights:
            self.weights[name] = draw(name, shape).double().requires_grad_()
        return self.weights[name]

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        size = x.size(-1)
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.weight(f"{name}.weight", size) + self.weight(f"{name}.bias", size)

    def linear(self, name: str, x: torch.Tensor, out: int, bias: bool = True) -> torch.Tensor:
        y = x @ self.weight(f"{name}.weight", out, x.size(-1)).T
        return y + self.weight(f"{name}.bias", out) if bias else y

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.weight("gain", 1)

    def resampler(self, x: torch.Tensor) -> torch.Tensor:
        config = self.config
        h = config.hidden_size or self.width
        x = self.linear("input_linear", self.norm("input_norm", x), h)
        x = x + self.weight("position_embedding", self.features, h)
        latents = self.weight("latents", config.num_tokens, h).expand(len(x), -1, -1)
        for number in range(config.num_layers):
            at = f"layers.{number}"
            own = self.norm(f"{at}.latent_norm", latents)
            seen = torch.cat([self.norm(f"{at}.feature_norm", x), own], 1)
            q = self.linear(f"{at}.query", own, h, bias=False)
            k = self.linear(f"{at}.key", seen, h, bias=False)
            v = self.linear(f"{at}.value", seen, h, bias=False)
            heads = []
            for columns in torch.arange(h).chunk(config.num_attention_heads):
                scores = q[..., columns] @ k[..., columns].transpose(1, 2) / math.sqrt(len(columns))
                heads.append(scores.softmax(-1) @ v[..., columns])
            latents = latents + self.linear(f"{at}.attention_output", torch.cat(heads, -1), h, bias=False)
            up = self.linear(f"{at}.ffn_up", self.norm(f"{at}.ffn_norm", latents), config.ffn_multiplier * h)
            latents = latents + self.linear(f"{at}.ffn_down", F.gelu(up), h)
        return self.finish(self.linear("output_linear", self.norm("output_norm", latents), HIDDEN))

    def linear_projector(self, x: torch.Tensor) -> torch.Tensor:
        config = self.config
        if self.features >= config.num_tokens:
            joined = math.ceil(self.features / config.num_tokens)
            filled = torch.zeros(len(x), joined * config.num_tokens, self.width, dtype=x.dtype)
            filled[:, : self.features] = x
            x = torch.stack([filled[:, t * joined : (t + 1) * joined].flatten(1) for t in range(config.num_tokens)], 1)
        each = max(1, config.num_tokens // self.features)
        for number in range(config.num_layers):
            last = number == config.num_layers - 1
            size = each * HIDDEN if last else config.hidden_size or self.width
            x = self.linear(f"linears.{number}", F.gelu(x) if number else x, size)
        return self.finish(x.reshape(len(x), config.num_tokens, HIDDEN))


def plain_answers(name: str) -> dict[str, np.ndarray]:
    features, width, config = CASES[name]
    plain = Plain(config, features, width)
    x, direction = inputs_of(name)
    x = x.double().requires_grad_()
    out = plain.resampler(x) if config.type == "resampler" else plain.linear_projector(x)
    out.backward(direction.double())
    gradients = {key: weight.grad for key, weight in plain.weights.items()}
    tensors: dict[str, Any] = {"output": out.detach(), "input gradient": x.grad, **gradients}
    return {key: tensor.numpy() for key, tensor in tensors.items()}


@pytest.fixture(scope="module")
def ours() -> dict[tuple[int, str], list[dict[str, dict[str, np.ndarray]]]]:
    """Results of every rank, by tensor-parallel size and implementation."""
    return {(tp, whose): run_ranks(tp, run_all, tp, whose) for tp in (1, 2) for whose in IMPLEMENTATIONS}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_plain_torch(name: str, tp: int, implementation: str, ours: Any) -> None:
    expected = plain_answers(name)
    for rank in ours[tp, implementation]:
        assert rank[name].keys() == expected.keys()
        for key, value in expected.items():
            assert np.abs(value).max() > 0, key
            np.testing.assert_allclose(
                rank[name][key], value, rtol=1e-4, atol=2e-6 * np.abs(value).max() + 1e-6, err_msg=key
            )


def refusals(tp: int, cases: list[tuple[int, int, ProjectorConfig]]) -> list[str]:
    parallel = setting(tp)
    messages = []
    for features, width, config in cases:
        try:
            build_projector("eye", config, parallel, "local", features, width, HIDDEN)
            messages.append("no error")
        except ConfigError as error:
            messages.append(str(error))
    return messages


def test_sizes_that_do_not_fit_are_refused() -> None:
    heads = "model.modalities.eye.projector"
    one = run_ranks(
        1,
        refusals,
        1,
        [
            (4, 8, ProjectorConfig("resampler", 1, 2, num_attention_heads=3)),
            (3, 8, ProjectorConfig("linear", 1, 4)),
        ],
    )[0]
    assert heads in one[0] and "width 8" in one[0] and "num_attention_heads=3" in one[0]
    assert f"{heads}.num_tokens=4" in one[1] and "3 features" in one[1]
    for messages in run_ranks(2, refusals, 2, [(4, 6, ProjectorConfig("resampler", 1, 2, num_attention_heads=3))]):
        assert "num_attention_heads=3" in messages[0] and "tensor_model_parallel_size=2" in messages[0]
