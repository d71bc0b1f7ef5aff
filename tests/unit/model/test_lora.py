"""LoRA adapters on the Llama against peft's on transformers' LlamaForCausalLM, in double precision."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from ranks import run_ranks
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from megatron_anymal.config import ConfigError, LoraConfig, RunConfig
from megatron_anymal.data.micro_batch import MicroBatch
from megatron_anymal.data.records import PlannedMicroBatch
from megatron_anymal.model.anymal import AnyMALModel
from megatron_anymal.model.build import build_models
from megatron_anymal.model.hf_llama import from_hf
from megatron_anymal.model.llama_shape import read_llama_config
from megatron_anymal.model.lora import LoraDropout, add_lora, initialise_lora, merge_lora, merged_weights
from megatron_anymal.model.unsharded_weights import gather_weights, list_weights
from megatron_anymal.parallel import initialize

# Two groups of four query heads, narrower than the hidden size; all sizes differ.
LLAMA: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
PARENTS = {"linear_qkv": "self_attn", "linear_proj": "self_attn", "linear_fc1": "mlp", "linear_fc2": "mlp"}
# The same targets in our notation and in peft's.
TARGETS: dict[str, tuple[list[str], Any]] = {
    "all": (["*"], ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    "queries and values": (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
    "keys, up and down": (["[ku]p*_proj", "k_proj", "down_proj"], ["k_proj", "up_proj", "down_proj"]),
    "of one layer": (
        ["layers.1.self_attn.o_proj", "*.1.mlp.g*"],
        r".*layers\.1\.(self_attn\.o_proj|mlp\.gate_proj)",
    ),
}
R, ALPHA, SHARE, SEED, STEP = 8, 32.0, 0.3, 7, 11
# Tensor-parallel size and sequence parallelism; "fused" has norms inside the linear layers.
LAYOUTS = {"tp1": (1, False), "tp2": (2, False), "tp2 sp": (2, True), "tp2 sp fused": (2, True)}
# Positions of a micro-batch's documents in the global batch -> their lengths.
BATCHES = [{4: 9, 1: 1, 6: 14}, {2: 11, 0: 13}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved Llama with norm weights other than 1."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    return str(path)


def drawn(name: str, shape: tuple[int, ...], std: float = 0.2) -> Tensor:
    """Random values that depend only on the name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * std


def tokens_of(sample_id: int, length: int) -> Tensor:
    return torch.randint(0, 40, (length,), generator=torch.Generator().manual_seed(sample_id))


def angles(positions: Tensor) -> Tensor:
    """Rotary angles [..., head size] in double precision; single-precision cosines differ in the last bit."""
    half = positions[..., None] * 10000.0 ** (-torch.arange(0, 6, 2, dtype=torch.float64) / 6)
    return torch.cat([half, half], dim=-1)


def probe_of(sample_id: int, length: int) -> Tensor:
    """Weights of a document's logits in its loss."""
    return drawn(f"probe {sample_id}", (length, 40), 1.0)


# ---------------------------------------------------------------------------------------------------- peft


def scramble(state: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer."""
    with np.errstate(over="ignore"):
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def kept(name: str, sample_id: int, length: int, channels: int, step: int = STEP) -> np.ndarray:
    """[length, channels]: 1 where dropout keeps a projection's input, in numpy from the definition."""
    state = 0x9E3779B97F4A7C15
    for number in (SEED, step):
        state = (state ^ number) + 0x9E3779B97F4A7C15 & (2**64 - 1)
        state = int(scramble(np.array([state], np.uint64))[0])
    stream = np.uint64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
    with np.errstate(over="ignore"):
        sample = scramble(np.array([sample_id], np.uint64) + np.uint64(state))
        token = scramble(scramble(sample + np.arange(length, dtype=np.uint64)) ^ stream)
        fours = np.arange(-(-channels // 4), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        numbers = scramble(token[:, None] + fours)
    lanes = np.stack([(numbers >> np.uint64(16 * lane)).astype(np.uint16) for lane in range(4)], axis=-1)
    signed = lanes.reshape(length, -1)[:, :channels].view(np.int16).astype(int)
    return (signed >= round(SHARE * 65536) - 32768).astype(float)


class Masked(nn.Module):
    """Stands in for peft's dropout."""

    def __init__(self, name: str):
        super().__init__()
        self.name, self.place = name, 0

    def forward(self, x: Tensor) -> Tensor:
        mask = kept(self.name, self.place, x.size(1), x.size(2))
        return x * torch.from_numpy(mask) / (1 - round(SHARE * 65536) / 65536)


def peft_model(folder: str, targets: Any, dropout: bool) -> Any:
    torch.manual_seed(0)
    base: Any = LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa").double()
    for module in list(base.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LlamaRMSNorm):
                # peft's norm rounds to single precision
                exact = nn.RMSNorm(32, LLAMA["rms_norm_eps"], dtype=torch.float64)
                exact.weight = child.weight
                setattr(module, name, exact)
    base.model.rotary_emb.forward = lambda x, position_ids: (angles(position_ids).cos(), angles(position_ids).sin())
    model = peft.get_peft_model(base, peft.LoraConfig(r=R, lora_alpha=int(ALPHA), target_modules=targets))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(drawn(hf_name(name), tuple(weight.shape)))
    for name, module in model.named_modules():
        if dropout and hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = Masked("layers." + name.split("layers.")[1])
    return model


def hf_name(name: str) -> str:
    """peft's name of an adapter weight, shortened to layers.0.self_attn.q_proj.A."""
    head, _, tail = name.partition(".lora_")
    return "layers." + head.split("layers.")[1] + "." + tail[0]


def peft_answer(folder: str, targets: Any, dropout: bool = False) -> dict[str, Any]:
    model = peft_model(folder, targets, dropout)
    logits: dict[int, np.ndarray] = {}
    for batch in BATCHES:
        for sample_id, length in batch.items():
            for module in model.modules():
                if isinstance(module, Masked):
                    module.place = sample_id
            out = model(tokens_of(sample_id, length)[None]).logits[0]
            (out * probe_of(sample_id, length)).sum().backward()
            logits[sample_id] = out.detach().numpy()
    gradients = {hf_name(n): p.grad.numpy() for n, p in model.named_parameters() if p.requires_grad}
    merged = {n: w.detach() for n, w in model.merge_and_unload().state_dict().items()}
    return {"logits": logits, "gradients": gradients, "merged": merged}


# ---------------------------------------------------------------------------------------------------- ours


def built(folder: str, tp: int = 1, sp: bool = False, pp: int = 1, recompute: tuple[str, ...] = ()) -> AnyMALModel:
    config = RunConfig()
    config.trainer.precision, config.trainer.devices = "32", tp * pp
    config.model.tensor_model_parallel_size, config.model.sequence_parallel = tp, sp
    config.model.pipeline_model_parallel_size = pp
    if recompute:
        config.model.recompute_granularity, config.model.recompute_modules = recompute[0], list(recompute[1:])
    config.model.language_model.path = folder
    config.data.tokenizer = "unused"
    layout = initialize(config)
    hf = read_llama_config(config.model.language_model)
    [model] = build_models(config.model, config.trainer.precision, hf, layout, {}, lambda models: None)
    return model


class FusedNormLinear(ColumnParallelLinear):
    """Behaves like Transformer Engine's LayerNormLinear."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(F.rms_norm(x, (x.size(-1),), self.layer_norm_weight, self.eps), *args, **kwargs)


def fuse_norms(model: AnyMALModel) -> None:
    for layer in model.language_model.decoder.layers:
        for norm, linear in (
            ("input_layernorm", layer.self_attention.linear_qkv),
            ("pre_mlp_layernorm", layer.mlp.linear_fc1),
        ):
            linear.__class__ = FusedNormLinear
            linear.layer_norm_weight, linear.eps = getattr(layer, norm).weight, LLAMA["rms_norm_eps"]
            setattr(layer, norm, nn.Identity())


def adapted(model: AnyMALModel, lora: LoraConfig) -> LoraDropout | None:
    """Give the model the same adapters as the peft model, in double precision."""
    dropout = add_lora([model], lora)
    model.double()
    model.language_model.inv_freq = angles(torch.ones(1))[0, :3]
    for weight in list_weights(model):
        if ".lora." in weight.name:
            with torch.no_grad():
                weight.parameter.copy_(weight.local_part(drawn(short(weight.name), weight.shape)))
    return dropout


def short(name: str) -> str:
    """Our name of an adapter weight, shortened to layers.0.self_attn.q_proj.A."""
    _, _, _, number, _, linear, lora, projection, which = name.split(".")
    assert lora == "lora"
    return f"layers.{number}.{PARENTS[linear]}.{projection}.{which}"


def logits_of(model: Any, documents: Mapping[int, int]) -> Tensor:
    """Logits [T, V / tensor-parallel size] of a pack of documents."""
    tokens = torch.cat([tokens_of(sample_id, length) for sample_id, length in documents.items()])[None]
    zeros = torch.zeros_like(tokens)
    plan = PlannedMicroBatch(STEP, tokens.size(1), ())
    return model(MicroBatch(plan, tuple(documents.values()), tokens, zeros, zeros.float(), zeros, {}, {}))[0]


def name_tokens(dropout: LoraDropout | None, documents: Mapping[int, int]) -> None:
    if dropout is not None:
        places = torch.cat([torch.full((length,), sample_id) for sample_id, length in documents.items()])
        positions = torch.cat([torch.arange(length) for length in documents.values()])
        dropout.set_tokens(SEED, STEP, places, positions)


def learn(model: AnyMALModel, dropout: LoraDropout | None) -> dict[str, Any]:
    """Logits and gradients of the micro-batches; as in a pipeline, all forward passes precede the backward passes."""
    rank, ranks = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model).train()
    wrapped.zero_grad_buffer()
    logits: dict[int, np.ndarray] = {}
    losses = []
    for batch in BATCHES:
        name_tokens(dropout, batch)
        local = logits_of(wrapped, batch)
        probe = torch.cat([probe_of(sample_id, length) for sample_id, length in batch.items()])
        losses.append((local * probe.chunk(ranks, dim=1)[rank]).sum())
        whole = gathered(local.detach())
        logits.update(zip(batch, (part.numpy() for part in whole.split(list(batch.values())))))
    for loss in losses:
        loss.backward()
    finalize_model_grads([wrapped], None)
    gradients = {}
    for weight in list_weights(model):
        if weight.parameter.requires_grad:
            gradients[short(weight.name)] = weight.gather(weight.parameter.main_grad).numpy()
    return {"logits": logits, "gradients": gradients}


def gathered(logits: Tensor) -> Tensor:
    parts = [torch.empty_like(logits) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
    dist.all_gather(parts, logits.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, dim=1)


def answer(folder: str, layout: str, lora: LoraConfig, recompute: tuple[str, ...] = ()) -> dict[str, Any]:
    model = built(folder, *LAYOUTS[layout], recompute=recompute)
    if layout.endswith("fused"):
        fuse_norms(model)
    dropout = adapted(model, lora)
    results = learn(model, dropout)
    model.eval()
    with torch.no_grad():
        results["merged"] = {name: weight.numpy() for name, weight in merged_weights([model])}
        results["one"] = [
            name for name, _ in merged_weights([model], "language_model.decoder.layers.1.mlp.linear_fc1.w")
        ]
        evaluated = gathered(logits_of(model, BATCHES[0]))
        merge_lora([model])
        results["after"] = {weight.name: weight.gather().numpy() for weight in list_weights(model)}
        results["difference"] = float((gathered(logits_of(model, BATCHES[0])) - evaluated).abs().max())
    return results


RECOMPUTE = {"full": ("full",), "mlp": ("selective", "mlp")}


def answers(folder: str, layouts: list[str]) -> dict[tuple[str, str], dict[str, Any]]:
    """(layout, case) -> results of the model."""
    results = {}
    for layout in layouts:
        for case, (targets, _) in TARGETS.items():
            results[layout, case] = answer(folder, layout, LoraConfig(R, ALPHA, 0.0, targets))
        dropping = LoraConfig(R, ALPHA, SHARE)
        results[layout, "dropout"] = answer(folder, layout, dropping)
        if "fused" not in layout:
            for case, recompute in RECOMPUTE.items():
                results[layout, case] = answer(folder, layout, dropping, recompute)
    return results


@pytest.fixture(scope="module")
def ours(folder: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        **run_ranks(1, answers, folder, ["tp1"])[0],
        **run_ranks(2, answers, folder, ["tp2", "tp2 sp", "tp2 sp fused"])[1],
    }


@pytest.fixture(scope="module")
def theirs(folder: str) -> dict[str, dict[str, Any]]:
    results = {case: peft_answer(folder, targets) for case, (_, targets) in TARGETS.items()}
    return {**results, "dropout": peft_answer(folder, TARGETS["all"][1], dropout=True)}


def assert_same(actual: Mapping[Any, Any], expected: Mapping[Any, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-9, atol=1e-9 * np.abs(value).max(), err_msg=str(name))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [*TARGETS, "dropout"])
def test_logits_and_gradients_equal_pefts(layout: str, case: str, ours: Any, theirs: Any) -> None:
    actual, expected = ours[layout, case], theirs[case]
    assert_same(actual["logits"], expected["logits"])
    assert_same(actual["gradients"], expected["gradients"])
    assert min(np.abs(g).max() for g in actual["gradients"].values()) > 0.01


def test_the_cases_differ(theirs: Any) -> None:
    last = [answer["logits"][0] for answer in theirs.values()]
    assert all(np.abs(a - b).max() > 0.01 for i, a in enumerate(last) for b in last[:i])


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "fused" not in name])
@pytest.mark.parametrize("case", RECOMPUTE)
def test_recomputed_layers_drop_the_same_again(layout: str, case: str, ours: Any, theirs: Any) -> None:
    assert_same(ours[layout, case]["logits"], theirs["dropout"]["logits"])
    assert_same(ours[layout, case]["gradients"], theirs["dropout"]["gradients"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", TARGETS)
def test_merged_weights_equal_pefts(layout: str, case: str, ours: Any, theirs: Any) -> None:
    results, hf = ours[layout, case], LlamaConfig(**LLAMA)
    assert_same(
        results["merged"], {name: from_hf(name, hf, theirs[case]["merged"].__getitem__) for name in results["merged"]}
    )
    assert len(results["merged"]) == 3 + 2 * 6
    assert results["one"] == ["language_model.decoder.layers.1.mlp.linear_fc1.weight"]
    # Merged in place: the same weights, no adapters, the same logits.
    assert_same(results["after"], results["merged"])
    assert results["difference"] < 1e-10


# ------------------------------------------------------------------------------------------ initial values


def beginnings(folder: str, layouts: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """Per (tp, pp) layout: initial weights, frozen and trainable names, and the difference from the base model's
    logits."""
    results = {}
    for name, (tp, pp) in layouts.items():
        model = built(folder, tp, False, pp)
        before = gather_weights([model])
        model.language_model.requires_grad_(True)
        add_lora([model], LoraConfig(R))
        initialise_lora([model], seed=3)
        seen: dict[str, Any] = {
            "frozen": sorted(w.name for w in list_weights(model) if not w.parameter.requires_grad),
            "shapes": {w.name: w.shape for w in list_weights(model)},
        }
        if pp == 1:
            with torch.no_grad():
                plain = gathered(logits_of(built(folder, tp, False, pp), BATCHES[0]))
                seen["difference"] = float((gathered(logits_of(model.train(), BATCHES[0])) - plain).abs().max())
        after = gather_weights([model])
        if before is not None and after is not None:
            seen["base"] = all(torch.equal(after[n], w) for n, w in before.items())
            seen["adapters"] = {n: w.numpy() for n, w in after.items() if n not in before}
        results[name] = seen
    return results


@pytest.fixture(scope="module")
def begun(folder: str) -> dict[str, list[dict[str, Any]]]:
    one = run_ranks(1, beginnings, folder, {"one": (1, 1)})
    two = run_ranks(2, beginnings, folder, {"tp2": (2, 1), "pp2": (1, 2)})
    return {"one": [one[0]["one"]], **{name: [rank[name] for rank in two] for name in ("tp2", "pp2")}}


@pytest.mark.parametrize("layout", ["one", "tp2", "pp2"])
def test_adapters_begin_as_nothing_beside_an_untouched_llama(layout: str, begun: Any) -> None:
    first = begun[layout][0]
    assert first["base"] and first.get("difference", 0.0) == 0.0
    for seen in begun[layout]:
        assert seen["frozen"] == sorted(name for name in seen["shapes"] if ".lora." not in name)
    adapters = first["adapters"]
    assert_same(adapters, begun["one"][0]["adapters"])
    assert len(adapters) == 2 * 7 * 2
    values = {name: value for name, value in adapters.items() if name.endswith(".A")}
    assert not any(value.any() for name, value in adapters.items() if name.endswith(".B"))
    assert len({value.tobytes() for value in values.values()}) == 14


def test_first_values_are_distributed_as_pefts(begun: Any, folder: str) -> None:
    adapters = begun["one"][0]["adapters"]
    model = peft.get_peft_model(
        LlamaForCausalLM.from_pretrained(folder), peft.LoraConfig(r=R, target_modules=TARGETS["all"][1])
    )
    theirs = {hf_name(n): w.detach().numpy() for n, w in model.named_parameters() if "lora_" in n}
    initial_values = {short(name): value for name, value in adapters.items()}
    assert {n: v.shape for n, v in initial_values.items()} == {n: v.shape for n, v in theirs.items()}
    for name, value in theirs.items():
        if name.endswith(".A"):
            bound = value.shape[1] ** -0.5
            for drawn_values in (value, initial_values[name]):
                assert 0.95 * bound < np.abs(drawn_values).max() <= bound
                assert abs(drawn_values.std() / bound - 3**-0.5) < 0.08


# ------------------------------------------------------------------------------------------------ dropout


def masks(step: int, stream: int) -> np.ndarray:
    dropout = LoraDropout(SHARE)
    dropout.set_tokens(SEED, step, torch.arange(8).repeat_interleave(100), torch.arange(100).repeat(8))
    return dropout.dropped(stream, (0, 1), 0, 90).numpy()


def test_the_share_is_dropped_evenly_and_never_twice_alike() -> None:
    first, other_step, other_stream = masks(0, 1), masks(1, 1), masks(0, 2)
    deviation = (SHARE * (1 - SHARE)) ** 0.5
    assert abs(first.mean() - SHARE) < 5 * deviation / first.size**0.5
    for axis in (0, 1):
        means = first.mean(axis)
        assert np.abs(means - SHARE).max() < 6 * deviation / first.shape[axis] ** 0.5
    centred = [mask.ravel() - SHARE for mask in (first, other_step, other_stream)]
    # Neighbouring tokens, channels and samples are uncorrelated too.
    centred += [np.roll(first, shift, axis).ravel() - SHARE for shift, axis in ((1, 0), (100, 0), (1, 1), (4, 1))]
    for i, one in enumerate(centred):
        for other in centred[:i]:
            assert abs((one * other).mean()) < 6 * deviation**2 / first.size**0.5


def test_any_part_of_the_mask_can_be_asked_for() -> None:
    dropout = LoraDropout(SHARE)
    dropout.set_tokens(SEED, STEP, torch.zeros(20, dtype=torch.int64), torch.arange(20))
    whole = dropout.dropped(5, (0, 1), 0, 30)
    for first, channels in ((0, 30), (15, 15), (7, 1), (4, 8), (29, 1)):
        part = dropout.dropped(5, (1, 4), first, channels)
        assert torch.equal(part, whole[5:10, first : first + channels])


# ------------------------------------------------------------------------------------------------- errors


def refused(folder: str) -> list[str]:
    messages = []
    for targets in (["q_proj", "layers.2.*"], ["query"]):
        try:
            add_lora([built(folder)], LoraConfig(R, targets=targets))
        except ConfigError as error:
            messages.append(str(error))
    model = built(folder)
    dropout = add_lora([model], LoraConfig(R, dropout=0.1))
    for documents in (None, {0: 5}, {0: 50}):
        if documents:
            name_tokens(dropout, documents)
        try:
            logits_of(model.train(), BATCHES[0])
        except AssertionError as error:
            messages.append(str(error))
    logits_of(model.eval(), BATCHES[0])
    return messages


def test_what_cannot_work_is_said(folder: str) -> None:
    layer, name, unnamed, fewer, more = run_ranks(1, refused, folder)[0]
    assert "model.lora.targets" in layer and "'layers.2.*'" in layer and "2 layers" in layer
    assert "'query'" in name and "'q_proj'" in name and "layers.0.self_attn.q_proj" in name
    assert "set_tokens" in unnamed and all("for another micro-batch" in message for message in (fewer, more))


def merged_in_bf16(folder: str) -> list[tuple[np.ndarray, np.ndarray]]:
    model = built(folder)
    add_lora([model], LoraConfig(R, ALPHA))
    initialise_lora([model], seed=0)
    model.bfloat16()
    pairs = []
    for weight in list_weights(model):
        if weight.name.endswith("linear_fc2.lora.down_proj.B"):
            linear = model.get_submodule(weight.name.partition(".lora.")[0])
            with torch.no_grad():
                weight.parameter.normal_(std=0.1)
            a, b = linear.lora.down_proj.A.float(), linear.lora.down_proj.B.float()
            expected = (linear.weight.float() + ALPHA / R * (b @ a)).bfloat16()
            [(_, merged)] = merged_weights([model], weight.name.partition(".lora.")[0] + ".weight")
            assert merged.dtype == torch.bfloat16 and not torch.equal(merged, linear.weight)
            pairs.append((merged.float().numpy(), expected.detach().float().numpy()))
    return pairs


def test_merging_rounds_once(folder: str) -> None:
    pairs = run_ranks(1, merged_in_bf16, folder)[0]
    assert len(pairs) == 2
    for merged, expected in pairs:
        np.testing.assert_array_equal(merged, expected)
