"""Operations and rates that a run reports: against torch's counter, over layouts, with cached features."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import train
from ranks import run_ranks
from tiny import LLAMA, make_config, make_conversations, make_shards
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_anymal.config import LoraConfig, RunConfig
from megatron_anymal.model import attention_kernels
from megatron_anymal.model.operations.step import Operations, step_operations
from megatron_anymal.parallel import initialize
from megatron_anymal.planning.layouts import peak as peak_module
from megatron_anymal.planning.layouts.peak import measured_peak, peak_of_run
from megatron_anymal.train.build import TrainState, build
from megatron_anymal.train.loop import fit
from megatron_anymal.train.step import train_step
from megatron_anymal.train.utilization import UTILIZATION_METRICS, Peak, model_costs, step_amounts, trainable_media

CPU = torch.device("cpu")
LAYERS, HIDDEN, FFN, QUERIES, KEYS = 4, 32, 48, 32, 16


class PlainAttention:
    """Attention of one document after the other, from products that torch's counter counts, over whole squares."""

    def __init__(self, documents: attention_kernels.PackedDocuments, device: torch.device) -> None:
        self._segments = documents.segments()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        out = []
        for segment in self._segments:
            index, first = segment.key_index(), segment.first_query
            q = query[first : first + segment.queries].transpose(0, 1)
            k, v = (x[index].repeat_interleave(len(q) // x.size(1), 1).transpose(0, 1) for x in (key, value))
            sees = torch.ones(segment.queries, segment.all_keys).tril(segment.all_keys - segment.queries) > 0
            scores = (q @ k.mT * (scale or q.size(-1) ** -0.5)).masked_fill(~sees, float("-inf"))
            out.append((scores.softmax(-1) @ v).transpose(0, 1))
        return torch.cat(out)


def one_step(config: RunConfig) -> tuple[int, Operations, float, dict[str, float], tuple[int, int]]:
    """In a rank: operations of a step's only pack as torch counts them, and as the run does; those of the latter that
    fused attention or recomputation would repeat in the Llama's attention; the encoder inputs; and tokens and labels.
    """
    attention_kernels.KERNELS["sdpa"] = PlainAttention
    state = build(config, initialize(config))
    if config.job == "dpo":
        with_reference(state)
    plan = state.train_data.planner.plan(0)
    [micro_batch] = [state.train_data.reader[m] for m in plan.of_replica(0)]
    assert plan.padded_length == plan.tokens
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        result = train_step(state, plan, [micro_batch])
    assert result.reference_computed == (config.job == "dpo") and not result.skipped
    costs = model_costs(state)
    amounts = step_amounts(plan, trainable_media(config.model), reference=result.reference_computed)
    fused = amounts.reached.squares * costs.reached.attention.repeated
    fused += amounts.other.squares * costs.other.attention.repeated
    size = plan.tokens, int(plan.targets.sum())
    assert size[1] < size[0]
    return counter.get_total_flops(), step_operations(costs, amounts), fused, dict(amounts.pieces), size


def with_reference(state: TrainState) -> None:
    """Let the run begin as its own reference."""
    from megatron_anymal.model.lora import keep_reference
    from megatron_anymal.train.reference_logprobs import ReferenceAnswers

    keep_reference(state.models)
    state.reference = ReferenceAnswers(None, [], state.layout.device)


@pytest.fixture
def config(tokenizer_folder: str, tmp_path: Path) -> RunConfig:
    """Images and sounds, whose projectors train."""
    data = make_shards(tmp_path / "shards", tokenizer_folder, 32, ("image", "audio"))
    config = make_config(data, tokenizer_folder, tmp_path / "run")
    del config.model.modalities["imu"]
    config.model.modalities["image"].encoder.freeze = config.model.modalities["audio"].encoder.freeze = True
    config.data.seq_length, config.exp_manager.checkpoint.every_n_train_steps = 4096, 0
    return config


def resampler_scores(pieces: float) -> float:
    """Operations that fused attention of the image's resampler repeats: 2 latents over 4 patches and themselves."""
    return pieces * 4 * 2 * (4 + 2) * 16 / 2


def test_alignment_equals_torchs_counter(config: RunConfig) -> None:
    [(counted, operations, fused, pieces, size)] = run_ranks(1, one_step, config)
    # Frozen matrices of a pack that reaches a projector.
    assert operations.linears == pytest.approx(4 * matrices(*size), rel=1e-9)
    # megatron-core's linear layers compute their input's gradient even if it is a frozen encoder's features: those of a
    # sound are 11 frames of 8 channels, filled up to two groups of 6.
    unneeded = pieces["audio"] * 2 * 2 * (6 * 8) * HIDDEN
    again = operations.repeated - fused - resampler_scores(pieces["image"])
    assert again == pytest.approx(0, abs=1e-6) and operations.encoding > 0 and operations.adapters == 0
    # The counter sees whole squares.
    assert counted == pytest.approx(operations.needed + operations.attention + unneeded, rel=1e-9)


def test_a_llama_that_trains_equals_torchs_counter(config: RunConfig, text_shards: str) -> None:
    config.model.modalities, config.model.language_model.freeze = {}, False
    config.data.train["mix"].path = text_shards
    [(counted, operations, fused, _, size)] = run_ranks(1, one_step, config)
    assert operations.linears == pytest.approx(6 * matrices(*size), rel=1e-9)
    assert operations.encoding == operations.projectors == operations.adapters == 0
    # The only repeated operations that the counter sees are the head's logits.
    assert counted == pytest.approx(operations.needed + operations.attention + operations.repeated - fused, rel=1e-9)
    assert operations.repeated - fused == pytest.approx(operations.head / 3)


def test_recomputation_equals_torchs_counter(config: RunConfig) -> None:
    model = config.model
    model.recompute_granularity, model.recompute_method, model.recompute_num_layers = "full", "block", 3
    [plain] = run_ranks(1, one_step, config_without_recompute(config))
    [(counted, operations, fused, _, (tokens, _))] = run_ranks(1, one_step, config)
    assert operations.needed == plain[1].needed
    # The first three of four layers: their linear layers and both halves of the squares once more.
    forward, linears = operations.attention / 3, 3 * 2 * layer() * tokens
    again = operations.repeated - plain[1].repeated
    assert again == pytest.approx(linears + 3 / 4 * forward, rel=1e-9)
    assert counted - plain[0] == pytest.approx(linears + 3 / 4 * 2 * forward, rel=1e-9)
    assert fused == pytest.approx((0.5 + 3 / 4) * forward)


def test_a_recomputed_last_layer_equals_torchs_counter(config: RunConfig) -> None:
    """After its attention, only the positions with a label are computed again."""
    model = config.model
    model.recompute_granularity, model.recompute_method, model.recompute_num_layers = "full", "block", 4
    [plain] = run_ranks(1, one_step, config_without_recompute(config))
    [(counted, operations, _, _, size)] = run_ranks(1, one_step, config)
    forward = operations.attention / 3
    assert operations.repeated - plain[1].repeated == pytest.approx(2 * matrices(*size) + forward, rel=1e-9)
    assert counted - plain[0] == pytest.approx(2 * matrices(*size) + 2 * forward, rel=1e-9)


def config_without_recompute(config: RunConfig) -> RunConfig:
    plain = copy.deepcopy(config)
    plain.model.recompute_granularity = ""
    return plain


def adapters_beyond(r: int, tokens: int, labels: int, passes: int) -> float:
    """What is multiplied although nobody needs it: zeros of the joined Bs of q, k and v and of gate and up (one product
    forward, two back), and the gradient of the first layer's input."""
    zeros = LAYERS * (3 - 1) * r * (QUERIES + 2 * KEYS) * tokens
    zeros += (2 - 1) * r * 2 * FFN * ((LAYERS - 1) * tokens + labels)
    first = HIDDEN * (QUERIES + 2 * KEYS) + 3 * r * HIDDEN
    return 2 * (zeros * passes + first * tokens)


def test_adapters_equal_torchs_counter(config: RunConfig, tokenizer_folder: str, tmp_path: Path) -> None:
    data = make_conversations(tmp_path / "chat", tokenizer_folder, 32, ("image", "text"))
    config.job, config.model.lora, config.data.train["mix"].path = "sft", LoraConfig(r=2), data
    for modality in config.model.modalities.values():
        modality.projector.freeze = True
    [(counted, operations, fused, _, size)] = run_ranks(1, one_step, config)
    first = 2 * HIDDEN * (QUERIES + 2 * KEYS) * size[0]
    assert operations.linears == pytest.approx(4 * matrices(*size) - first, rel=1e-9)
    unneeded = adapters_beyond(2, *size, 3)
    assert operations.adapters > 0 and operations.repeated == pytest.approx(fused)
    assert counted == pytest.approx(operations.needed + operations.attention + unneeded, rel=1e-9)


def test_preference_pairs_equal_torchs_counter(config: RunConfig, tokenizer_folder: str, tmp_path: Path) -> None:
    data = make_conversations(tmp_path / "pairs", tokenizer_folder, 32, ("image",), pairs=True)
    config.job, config.model.lora, config.data.train["mix"].path = "dpo", LoraConfig(r=2), data
    # Only read by the training loop, which this test does without.
    config.model.dpo.share_prompt, config.model.restore_from_path = "never", str(tmp_path)
    for modality in config.model.modalities.values():
        modality.projector.freeze = True
    [(counted, operations, fused, pieces, size)] = run_ranks(1, one_step, config)
    first = 2 * HIDDEN * (QUERIES + 2 * KEYS) * size[0]
    assert operations.linears == pytest.approx(6 * matrices(*size) - first, rel=1e-9)
    unneeded = adapters_beyond(2, *size, 4)
    again = operations.encoding_again + operations.repeated - fused
    assert operations.encoding_again == operations.encoding > 0 and operations.repeated - fused == pytest.approx(
        operations.projectors
    )
    assert set(pieces) == {"image"}
    assert counted == pytest.approx(operations.needed + operations.attention + again + unneeded, rel=1e-9)


def layer() -> int:
    """Parameters of a layer's matrices."""
    assert LLAMA["num_hidden_layers"] == LAYERS
    return 2 * HIDDEN * QUERIES + 2 * HIDDEN * KEYS + 3 * HIDDEN * FFN


def matrices(tokens: int, labels: int) -> int:
    """Pairs of a token and a parameter of the layers' matrices: output projection and feed-forward of the last layer
    are for tokens with a label."""
    last = QUERIES * HIDDEN + 3 * HIDDEN * FFN
    return (LAYERS * layer() - last) * tokens + last * labels


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def needed(run: Path, ranks: int) -> list[float]:
    """Needed operations of each step of a run, from its rates."""
    return [1e12 * row["tflops_per_gpu"] * ranks * row["step_seconds"] for row in rows(run)]


LAYOUTS: dict[str, dict[str, Any]] = {
    "replicas": {},
    "tensor": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "context": {"context_parallel_size": 2},
}


def test_every_layout_counts_the_same(config: RunConfig, tmp_path: Path) -> None:
    config.data.seq_length, config.trainer.max_steps = 48, 2
    run_ranks(1, train, config)
    alone = needed(tmp_path / "run", 1)
    assert len(set(alone)) == len(alone) == 2
    for name, settings in LAYOUTS.items():
        other = copy.deepcopy(config)
        other.trainer.devices, other.exp_manager.explicit_log_dir = 2, str(tmp_path / name)
        for key, value in settings.items():
            setattr(other.model, key, value)
        run_ranks(2, train, other)
        assert needed(tmp_path / name, 2) == pytest.approx(alone, rel=1e-9), name
        for row in rows(tmp_path / name):
            # Part of the forward passes; on a pipeline's first stage only.
            assert 0 < row["encoder_seconds"] < row["forward_seconds"]
            assert row["encoder_tflops"] > 0 and row["llama_tflops"] > 0
            assert row["hardware_tflops_per_gpu"] > row["tflops_per_gpu"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_cached_features_cost_nothing(config: RunConfig, ranks: int, tmp_path: Path) -> None:
    """Two epochs of 32 samples in steps of 8: the second one encodes nothing."""
    config.trainer.max_steps, config.trainer.devices = 8, ranks
    plain = copy.deepcopy(config)
    plain.exp_manager.explicit_log_dir = str(tmp_path / "plain")
    config.data.feature_cache.gib, config.data.feature_cache.folder = 0.01, str(tmp_path / "features")
    run_ranks(ranks, train, plain)
    run_ranks(ranks, train, config)
    without, with_cache = needed(tmp_path / "plain", ranks), needed(tmp_path / "run", ranks)
    assert with_cache[:4] == pytest.approx(without[:4], rel=1e-9)
    [encoding] = run_ranks(1, encoding_of_step, alone(plain))
    difference = [a - b for a, b in zip(without[4:], with_cache[4:])]
    # Which images a step has depends on the permutation; all sixteen are in every epoch.
    assert sum(difference) == pytest.approx(encoding, rel=1e-6)
    assert [row["encoder_tflops"] for row in rows(tmp_path / "run")[4:]] == [0.0] * 4


def alone(config: RunConfig) -> RunConfig:
    one = copy.deepcopy(config)
    one.trainer.devices = 1
    return one


def encoding_of_step(config: RunConfig) -> float:
    """In a rank: operations of encoding all sixteen images once."""
    encoder: Any = build(config, initialize(config)).models[0].encoders["image"]
    return 16 * encoder.flops_per_piece()


def with_peak(config: RunConfig, peak: Peak) -> None:
    """In a rank: train."""
    fit(build(config, initialize(config)), config.run_dir, peak=peak)


def test_shares_of_the_peak(config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config.trainer.max_steps = 1
    run_ranks(1, with_peak, config, Peak(2e12, 1e12, "made up"))
    [row] = rows(tmp_path / "run")
    assert set(UTILIZATION_METRICS) <= row.keys()
    assert row["mfu"] == row["tflops_per_gpu"] / 2 and row["hfu"] == row["hardware_tflops_per_gpu"] / 2
    assert row["encoder_utilization"] == row["encoder_tflops"]
    assert row["llama_utilization"] == row["llama_tflops"] / 2
    out = capfd.readouterr().out
    assert "MFU relative to a peak of 2 TFLOP/s per GPU (made up)" in out
    apart = f"(encoders {row['encoder_utilization']:.1%}, Llama {row['llama_utilization']:.1%})"
    assert f"  {row['tflops_per_gpu']:.3g} TFLOP/s per GPU  MFU {row['mfu']:.1%} {apart}  memory" in out


def test_without_a_peak_there_is_no_share(config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config.trainer.max_steps = 1
    run_ranks(1, train, config)
    [row] = rows(tmp_path / "run")
    assert {name for name in UTILIZATION_METRICS if name in row} == set(UTILIZATION_METRICS[:5])
    out = capfd.readouterr().out
    assert "no MFU: the peak rate is unknown. Set trainer.gpu" in out
    assert f"  {row['tflops_per_gpu']:.3g} TFLOP/s per GPU  memory" in out


def test_the_peak_is_that_of_the_configured_gpu() -> None:
    assert peak_of_run("h100-80gb", "", "bf16", CPU) == Peak(989.4e12, 989.4e12, "bf16, trainer.gpu=h100-80gb")
    assert peak_of_run("h100-80gb", "hybrid", "bf16", CPU) == Peak(1978.9e12, 989.4e12, "fp8, trainer.gpu=h100-80gb")
    assert peak_of_run("h200-141gb", "", "32", CPU) == Peak(1e12 * 66.9, 1e12 * 66.9, "fp32, trainer.gpu=h200-141gb")
    assert peak_of_run("a100-80gb", "hybrid", "bf16", CPU) is None
    assert peak_of_run("", "", "bf16", CPU) is None


def test_on_a_gpu_without_a_name_the_peak_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sequence[Any]] = []

    def product_rate(*given: Any) -> float:
        asked.append(given)
        return 7e14

    monkeypatch.setattr(peak_module, "product_rate", product_rate)
    gpu = torch.device("cuda")
    expected = Peak(7e14, 7e14, "a product of 8192 x 8192 bf16 matrices, measured")
    assert peak_of_run("", "", "bf16", gpu) == expected and peak_of_run("", "hybrid", "bf16", gpu) == expected
    assert asked[0] == (8192, 8192, 8192, gpu, torch.bfloat16)


def test_a_measured_peak_is_that_of_a_product() -> None:
    peak = measured_peak(CPU, "32", 64)
    assert 1e6 < peak.layers == peak.encoders < 1e15 and peak.source == "a product of 64 x 64 fp32 matrices, measured"
