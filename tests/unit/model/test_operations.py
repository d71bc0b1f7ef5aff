"""Operations of a step against counts derived by hand for published models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig

from megatron_anymal.config import DiscreteConfig, LoraConfig, ModelConfig, ProjectorConfig
from megatron_anymal.data.step_plan import BatchMedia, StepPlan
from megatron_anymal.model.memory.run_sizes import chunks_of_stages
from megatron_anymal.model.memory.sizes import Recompute
from megatron_anymal.model.operations.costs import Cost, LlamaCosts, ModelCosts, llama_costs, media_costs
from megatron_anymal.model.operations.step import Documents, StepAmounts, step_operations
from megatron_anymal.train.utilization import step_amounts

LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)
LLAMA_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
)
# Parameters of q and o, of k and v, and of gate, up and down; then those of the output layer.
LAYERS_8B = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
HEAD_8B = 128256 * 4096
# Output projection and feed-forward of the last layer, which are computed for labels; all other matrices.
LAST_8B, LAST_70B = 4096 * 4096 + 3 * 4096 * 14336, 8192 * 8192 + 3 * 8192 * 28672
LAYERS_70B = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
HEAD_70B = 128256 * 8192
EARLIER_8B, EARLIER_70B = LAYERS_8B - LAST_8B, LAYERS_70B - LAST_70B
# Attention forward, per squared length: two products of two operations for each channel, over half of the square.
SQUARE_8B, SQUARE_70B = 32 * 4096 * 2, 80 * 8192 * 2
EVERY_PROJECTION = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def section(*, freeze: bool = True, r: int = 0, targets: list[str] | None = None, **more: Any) -> ModelConfig:
    model = ModelConfig(lora=LoraConfig(r=r, alpha=2.0 * r, targets=targets or EVERY_PROJECTION), **more)
    model.language_model.freeze = freeze
    return model


def both(model: ModelConfig, hf: LlamaConfig, recompute: Recompute | None = None) -> tuple[LlamaCosts, LlamaCosts]:
    """Costs of documents with something trainable before the Llama, and of all others."""
    chunks = [chunk.layers for stage in chunks_of_stages(model, hf) for chunk in stage]
    reached, other = (
        llama_costs(model, hf, reached=reached, recompute=recompute or Recompute(), chunks=chunks)
        for reached in (True, False)
    )
    return reached, other


def test_alignment_of_an_8b_llama() -> None:
    """A frozen ViT-L/14, a resampler of 64 latents that trains, two captions of images and a text without media."""
    vit = 24 * (2 * 257 * 12 * 1024**2 + 4 * 257**2 * 1024) + 2 * 256 * 3 * 14 * 14 * 1024
    projector = ProjectorConfig(type="resampler", num_layers=6, num_tokens=64, hidden_size=1024, ffn_multiplier=4)
    projector.freeze = False
    image = media_costs(projector, 256, 1024, vit, 4096, encoder_trains=False)
    amounts = StepAmounts(
        reached=Documents(320 + 200, 320**2 + 200**2, 40 + 60), other=Documents(100, 100**2, 80), pieces={"image": 2}
    )
    operations = step_operations(ModelCosts(*both(section(), LLAMA_8B), {"image": image}), amounts)
    # The text's gradient reaches nothing that trains.
    hand = 4 * (EARLIER_8B * 520 + LAST_8B * 100) + 2 * (EARLIER_8B * 100 + LAST_8B * 80)
    assert operations.linears == pytest.approx(hand)
    assert operations.head == pytest.approx(4 * HEAD_8B * 100 + 2 * HEAD_8B * 80)
    assert operations.attention == pytest.approx(SQUARE_8B * (3 * (320**2 + 200**2) + 100**2))
    assert (
        operations.encoding == 2 * vit
        and operations.encoder_gradients == operations.adapters == operations.encoding_again == 0
    )
    # Queries, outputs and feed-forward of 64 latents, keys and values of 320 tokens; input and output layers.
    layer = (64 + 64 + 320 + 320 + 8 * 64) * 1024**2
    size = 256 * 1024**2 + 6 * layer + 64 * 1024 * 4096
    scores = 6 * 4 * 64 * 320 * 1024
    assert operations.projectors == pytest.approx(2 * (6 * size + 3 * scores))
    parts = (operations.linears, operations.head, operations.attention, operations.encoding, operations.projectors)
    assert operations.needed == pytest.approx(sum(parts), rel=1e-12)
    # Fused attention computes half of its forward pass again, in Llama and resampler.
    assert operations.repeated == pytest.approx(SQUARE_8B * (320**2 + 200**2) / 2 + 2 * scores / 2)
    assert operations.computed == operations.needed + operations.repeated


def test_lora_on_a_70b_llama() -> None:
    """With frozen projectors, nothing before the first layer trains."""
    _, costs = both(section(r=64), LLAMA_70B)
    # Inputs and outputs of q, k and v, o, gate and up, down.
    last = 64 * (16384 + 2 * 36864 + 36864)
    adapters = 80 * (64 * (16384 + 2 * 9216) + last) - last
    first_qkv, first_down = 8192 * (8192 + 2 * 1024), 3 * 64 * 8192
    assert costs.linears == Cost(2.0 * EARLIER_70B, 2.0 * (EARLIER_70B - first_qkv))
    assert costs.adapters == Cost(2.0 * adapters, 4.0 * adapters - 2.0 * first_down)
    assert costs.last_linears == Cost(2.0 * LAST_70B, 2.0 * LAST_70B)
    assert costs.last_adapters == Cost(2.0 * last, 4.0 * last)
    assert costs.attention == Cost(SQUARE_70B, 2.0 * SQUARE_70B, SQUARE_70B / 2)
    assert costs.head == Cost(2.0 * HEAD_70B, 2.0 * HEAD_70B)
    documents = Documents(4096, 1024**2 * 4, 900)
    operations = step_operations(ModelCosts(costs, costs, {}), StepAmounts(Documents(), documents, {}))
    hand = 4096 * (4 * EARLIER_70B - 2 * first_qkv + 6 * adapters - 2 * first_down)
    hand += 4 * 1024**2 * 3 * SQUARE_70B + 900 * (4 * HEAD_70B + 4 * LAST_70B + 6 * last)
    assert operations.needed == pytest.approx(hand, rel=1e-12)
    # A projector that trains takes the gradient through the first layer, too.
    through, _ = both(section(r=64), LLAMA_70B)
    assert through.linears == Cost(2.0 * EARLIER_70B, 2.0 * EARLIER_70B)
    assert through.adapters == Cost(2.0 * adapters, 4.0 * adapters)


def plan_of(documents: list[tuple[int, int]], **given: Any) -> StepPlan:
    number = len(documents)
    values: dict[str, Any] = {
        "targets": np.zeros(number, np.int64),
        "shared": np.zeros(number, np.int64),
        "media": BatchMedia((), np.zeros(number + 1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64)),
        "dropped": (),
        **given,
    }
    return StepPlan(0, np.zeros(number), np.arange(number), np.array(documents), micro_batches=((),), **values,
                    padded_length=0, document_multiple=1)  # fmt: skip


def test_preference_pairs_of_an_8b_llama() -> None:
    """A pair with a shared prompt and an image, through the policy and the reference; frozen encoder and projector."""
    media = BatchMedia(("image",), np.array([0, 1]), np.array([0]), np.array([3]))
    plan = plan_of([(400, 500)], targets=np.array([290]), shared=np.array([299]), media=media)
    amounts = step_amounts(plan, frozenset(), reference=True)
    tokens = 299 + 101 + 201
    squares = 299**2 + (400**2 - 299**2) + (500**2 - 299**2)
    assert amounts.other == Documents(tokens, squares, 290) and amounts.reached == Documents()
    assert amounts.pieces == {"image": 3}
    linear = media_costs(
        ProjectorConfig(type="linear", num_layers=1, num_tokens=64, freeze=True), 64, 1024, 1e9, 4096,
        encoder_trains=False,
    )  # fmt: skip
    operations = step_operations(ModelCosts(*both(section(r=8), LLAMA_8B), {"image": linear}), amounts)
    last = 8 * (8192 + 2 * 18432 + 18432)
    adapters = 32 * (8 * (8192 + 2 * 5120) + last) - last
    first_qkv, first_down = 4096 * (4096 + 2 * 1024), 3 * 8 * 4096
    # Forward twice, and the gradients of the policy.
    assert operations.linears == pytest.approx(tokens * (6 * EARLIER_8B - 2 * first_qkv) + 290 * 6 * LAST_8B)
    assert operations.adapters == pytest.approx(tokens * (8 * adapters - 2 * first_down) + 290 * 8 * last)
    assert operations.attention == pytest.approx(squares * 4 * SQUARE_8B)
    assert operations.head == pytest.approx(290 * 6 * HEAD_8B)
    projected = 3 * 2 * 64 * 1024 * 4096
    assert operations.projectors == projected and operations.encoding == operations.encoding_again == 3e9
    assert operations.repeated == pytest.approx(squares * SQUARE_8B / 2 + projected)
    # With stored log-probabilities only the policy runs.
    stored = step_operations(
        ModelCosts(*both(section(r=8), LLAMA_8B), {"image": linear}), step_amounts(plan, frozenset(), reference=False)
    )
    assert stored.linears == pytest.approx(tokens * (4 * EARLIER_8B - 2 * first_qkv) + 290 * 4 * LAST_8B)
    assert stored.encoding_again == 0


def test_a_llama_that_trains() -> None:
    reached, other = both(section(freeze=False), LLAMA_8B)
    # 6 N per token, whether or not anything before it trains; its head computes the logits twice.
    assert reached == other
    assert reached.linears == Cost(2.0 * EARLIER_8B, 4.0 * EARLIER_8B)
    assert reached.last_linears == Cost(2.0 * LAST_8B, 4.0 * LAST_8B)
    assert reached.head == Cost(2.0 * HEAD_8B, 4.0 * HEAD_8B, 2.0 * HEAD_8B)


def test_layers_before_the_first_adapter_have_no_backward_pass() -> None:
    _, costs = both(section(r=4, targets=["layers.30.mlp.down_proj"]), LLAMA_8B)
    layer = LAYERS_8B / 32
    # In layer 30 only the adapter's own gradients, then the whole last layer.
    assert costs.linears == Cost(2.0 * EARLIER_8B, 2.0 * (layer - LAST_8B))
    assert costs.last_linears == Cost(2.0 * LAST_8B, 2.0 * LAST_8B)
    down, up = 4 * 14336, 4 * 4096
    assert costs.adapters == Cost(2.0 * (down + up), 2.0 * down + 4.0 * up)
    assert costs.attention.backward == pytest.approx(2 * SQUARE_8B / 32)
    # Without any adapter or projector that trains there is nothing to learn.
    _, frozen = both(section(), LLAMA_8B)
    assert (
        frozen.linears.backward == frozen.attention.backward == frozen.head.backward == frozen.attention.repeated == 0
    )
    assert frozen.last_linears == Cost(2.0 * LAST_8B)


def test_the_last_layer_computes_all_positions_in_fp8() -> None:
    costs, _ = both(section(fp8="hybrid"), LLAMA_8B)
    assert costs.linears == Cost(2.0 * LAYERS_8B, 2.0 * LAYERS_8B) and costs.last_linears == Cost()


@pytest.mark.parametrize(
    ("recompute", "layers", "attention"),
    [
        (Recompute("full", (), "block", 3), 3 / 16, 0.5 + 3 / 16),
        (Recompute("full", (), "uniform", 2), 1.0, 1.5),
        (Recompute("selective", ("core_attn",)), 0.0, 1.5),
        (Recompute("selective", ("core_attn", "mlp")), 3 * 4096 * 14336 * 32 / LAYERS_8B, 1.5),
        (Recompute(), 0.0, 0.5),
    ],
)
def test_recomputation_counts_as_repeated(recompute: Recompute, layers: float, attention: float) -> None:
    """In each of two stages of 16 layers; none of it counts as needed."""
    model = section(pipeline_model_parallel_size=2)
    costs, other = both(model, LLAMA_8B, recompute)
    assert costs.linears.repeated + costs.last_linears.repeated == pytest.approx(layers * 2 * LAYERS_8B)
    assert costs.attention.repeated == pytest.approx(attention * SQUARE_8B)
    plain, _ = both(section(), LLAMA_8B)
    assert (costs.linears.forward, costs.linears.backward) == (plain.linears.forward, plain.linears.backward)
    # Passes without gradients recompute nothing.
    assert other.linears.repeated == other.attention.repeated == 0


@pytest.mark.parametrize(("rows", "products"), [("none", (2, 2)), ("new", (2, 3)), ("all", (3, 3))])
def test_heads_with_codes(rows: str, products: tuple[int, int]) -> None:
    model = section(freeze=False, discrete={"image": DiscreteConfig(codebooks=[1022])}, discrete_rows=rows)
    costs, _ = both(model, LLAMA_8B)
    hand = 2 * HEAD_8B * products[0] + 2 * 1024 * 4096 * products[1]
    assert costs.head.forward + costs.head.backward == hand


def test_linear_projectors() -> None:
    """Two layers over 16 groups of 4 features: the first one's input is not trained."""
    config = ProjectorConfig(type="linear", num_layers=2, num_tokens=16, hidden_size=512)
    config.freeze = False
    first, second = 16 * 4 * 768 * 512, 16 * 512 * 4096
    costs = media_costs(config, 64, 768, 5e9, 4096, encoder_trains=False)
    assert costs.projector == Cost(2.0 * (first + second), 2.0 * (first + 2 * second))
    trained = media_costs(config, 64, 768, 5e9, 4096, encoder_trains=True)
    assert trained.projector == Cost(2.0 * (first + second), 4.0 * (first + second))
    assert trained.encoder == Cost(5e9, 1e10)
    config.freeze = True
    assert media_costs(config, 64, 768, 5e9, 4096, encoder_trains=False).projector.backward == 0
    assert media_costs(config, 64, 768, 5e9, 4096, encoder_trains=True).projector.backward == 2.0 * (first + second)


def test_amounts_are_those_of_the_samples_that_are_kept() -> None:
    """Image, text, codes and a sample that is left out, whose media are not encoded."""
    items = np.array([0, 1, 2, 0]), np.array([2, 5, 40, 9])
    media = BatchMedia(("image", "audio", "speech"), np.array([0, 2, 2, 3, 4]), *items)
    plan = plan_of([(100, 0), (50, 0), (60, 0), (900, 0)], targets=np.array([10, 20, 30, 0]), media=media, dropped=(3,))
    amounts = step_amounts(plan, frozenset(["audio"]), reference=False)
    assert amounts.reached == Documents(100, 100**2, 10)
    assert amounts.other == Documents(110, 50**2 + 60**2, 50)
    assert amounts.pieces == {"image": 2, "audio": 5, "speech": 40}
    assert step_amounts(plan, frozenset(["speech"]), reference=False).reached == Documents(60, 60**2, 30)
