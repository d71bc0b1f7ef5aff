"""A base in NF4 against bitsandbytes' own linear layers, in transformers and peft."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import peft
import pytest
import torch
from nf4_base import NEEDS_BITSANDBYTES, PROJECTIONS, SHAPE, make_llama, rounded_to_nf4
from ranks import run_ranks
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from benchmarks.measuring import PeakMemory, saved_for_backward, storages
from megatron_anymal.config import LoraConfig, RunConfig
from megatron_anymal.data.micro_batch import MicroBatch
from megatron_anymal.model import nf4_weights
from megatron_anymal.model.anymal import AnyMALModel
from megatron_anymal.model.build import assemble, build_models
from megatron_anymal.model.hf_llama import to_hf
from megatron_anymal.model.llama_shape import read_llama_config
from megatron_anymal.model.lora import add_lora
from megatron_anymal.model.nf4_weights import NF4Weight
from megatron_anymal.model.quantized_weights import is_quantized, stored_tensors, unquantized
from megatron_anymal.model.unsharded_weights import gather_weights, hash_weights, list_weights, load_weights
from megatron_anymal.parallel import initialize

pytestmark = NEEDS_BITSANDBYTES
LINEARS = 4 * SHAPE["num_hidden_layers"]
# Tensor-parallel size, sequence parallelism, pipeline stages.
LAYOUTS = {"one": (1, False, 1), "tp2": (2, False, 1), "tp2 sp": (2, True, 1), "pp2": (1, False, 2)}
R, ALPHA = 4, 8.0
PARENTS = {"linear_qkv": "self_attn", "linear_proj": "self_attn", "linear_fc1": "mlp", "linear_fc2": "mlp"}
TOKENS = torch.randint(SHAPE["vocab_size"], (24,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_llama(tmp_path_factory.mktemp("llama"))


def configured(folder: str, layout: str = "one", precision: str = "32", quantization: str = "nf4") -> RunConfig:
    config, (tensor, sequence, stages) = RunConfig(), LAYOUTS[layout]
    config.trainer.precision, config.trainer.devices = precision, tensor * stages
    config.model.tensor_model_parallel_size, config.model.sequence_parallel = tensor, sequence
    config.model.pipeline_model_parallel_size = stages
    config.model.language_model.path, config.model.base_quantization = folder, quantization
    config.data.tokenizer = "unused"
    return config


def built(config: RunConfig) -> AnyMALModel:
    hf = read_llama_config(config.model.language_model)
    [model] = build_models(config.model, config.trainer.precision, hf, initialize(config), {}, lambda models: None)
    return model


def held_weights(model: nn.Module) -> list[NF4Weight]:
    return [parameter for parameter in model.parameters() if isinstance(parameter, NF4Weight)]


# ---------------------------------------------------------------------------------------------------- values


def gathered(folder: str, layout: str, precision: str) -> tuple[int, dict[str, np.ndarray] | None]:
    config = configured(folder, layout, precision)
    model, hf = built(config), read_llama_config(config.model.language_model)
    whole = gather_weights([model], "language_model.")
    held = sum(is_quantized(parameter) for parameter in model.parameters())
    if whole is None:
        return held, None
    return held, {n: t.float().numpy() for name, w in whole.items() for n, t in to_hf(name, hf, w).items()}


@pytest.mark.parametrize("precision", ["32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_are_those_of_bitsandbytes_under_every_layout(folder: str, layout: str, precision: str) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    source = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
    results = run_ranks(LAYOUTS[layout][0] * LAYOUTS[layout][2], gathered, folder, layout, precision)
    assert {held for held, _ in results} == {LINEARS // LAYOUTS[layout][2]}
    weights = results[0][1]
    assert weights is not None and weights.keys() == source.keys()
    for name, weight in source.items():
        expected = weight
        if name.split(".")[-2] in PROJECTIONS:
            # Scales and products are fp32, in bf16 too.
            expected = rounded_to_nf4(weight.float()).to(dtype)
            assert not torch.equal(expected, weight)
        np.testing.assert_array_equal(weights[name], expected.float().numpy(), err_msg=name)


def hashes(folder: str, layout: str) -> list[str]:
    """Hashes of the base: unquantized, in NF4 as read and as set from whole weights, and with one bit changed."""
    plain = built(configured(folder, layout, quantization=""))
    whole: Any = [gather_weights([plain])]
    torch.distributed.broadcast_object_list(whole)
    held = built(configured(folder, layout))
    digests = [hash_weights([model], "language_model.") for model in (plain, held)]
    load_weights([held], whole[0])
    digests.append(hash_weights([held], "language_model."))
    held_weights(held)[3].packed[5, 1] ^= 1
    digests.append(hash_weights([held], "language_model."))
    held_weights(held)[3].packed[5, 1] ^= 1
    held_weights(held)[2].scales[4] *= 2
    return [*digests, hash_weights([held], "language_model.")]


@pytest.mark.parametrize("layout", ["one", "tp2"])
def test_its_hash_is_that_of_the_values_it_was_made_from(folder: str, layout: str) -> None:
    for plain, read, loaded, bit, scale in run_ranks(LAYOUTS[layout][0], hashes, folder, layout):
        assert plain == read == loaded and len({plain, bit, scale}) == 3


# ---------------------------------------------------------------------------------------------------- QLoRA


def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    seed = int.from_bytes(name.encode(), "little") % 2**31
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ours(folder: str, layout: str) -> dict[str, Any]:
    """Logits, and gradients of the input embeddings and of adapters, of a loss over one document."""
    model = built(configured(folder, layout))
    add_lora([model], LoraConfig(R, ALPHA))
    for weight in list_weights(model):
        if ".lora." in weight.name:
            with torch.no_grad():
                weight.parameter.copy_(weight.local_part(drawn(short(weight.name), weight.shape)))
    gpt: Any = model.language_model
    embedded: list[Tensor] = []
    gpt.embedding.register_forward_hook(lambda module, inputs, out: embedded.append(leaf(out)) or embedded[0])
    logits = model.whole_logits(model(MicroBatch.unlabelled([TOKENS.tolist()], {}))[0])
    torch.nn.functional.cross_entropy(logits[:-1], TOKENS[1:]).backward()
    gradients = {}
    for weight in list_weights(model):
        if weight.parameter.requires_grad:
            gradient = weight.parameter.grad
            assert gradient is not None
            if getattr(weight.parameter, "sequence_parallel", False):
                torch.distributed.all_reduce(gradient)
            gradients[short(weight.name)] = weight.gather(gradient).numpy()
    return {"logits": logits.detach().numpy(), "gradients": gradients, "inputs": embedded[0].grad.numpy()[:, 0]}


def leaf(out: Tensor) -> Tensor:
    return out.detach().requires_grad_()


def short(name: str) -> str:
    """Our name of an adapter weight, shortened to layers.0.self_attn.q_proj.A."""
    _, _, _, number, _, linear, _, projection, which = name.split(".")
    return f"layers.{number}.{PARENTS[linear]}.{projection}.{which}"


@pytest.fixture(scope="module")
def theirs(folder: str) -> dict[str, Any]:
    """The same from transformers and peft, with bitsandbytes' linear layers."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=False,
    )
    base = LlamaForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.float32, device_map="cpu"
    )
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=R, lora_alpha=int(ALPHA), target_modules=list(PROJECTIONS))
    ).eval()
    kinds = {type(module).__module__ for module in model.modules() if "Linear4bit" in type(module).__name__}
    assert kinds == {"bitsandbytes.nn.modules", "peft.tuners.lora.bnb"}

    def hf_name(name: str) -> str:
        head, _, tail = name.partition(".lora_")
        return f"layers.{head.split('layers.')[1]}.{tail[0]}"

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(drawn(hf_name(name), tuple(weight.shape)))
    inputs = model.get_input_embeddings()(TOKENS[None]).detach().requires_grad_()
    logits = model(inputs_embeds=inputs).logits[0]
    torch.nn.functional.cross_entropy(logits[:-1], TOKENS[1:]).backward()
    gradients = {hf_name(n): p.grad.numpy() for n, p in model.named_parameters() if p.requires_grad}
    return {"logits": logits.detach().numpy(), "gradients": gradients, "inputs": inputs.grad[0].numpy()}


@pytest.mark.parametrize("layout", ["one", "tp2", "tp2 sp"])
def test_adapters_on_it_learn_as_in_peft(folder: str, theirs: dict[str, Any], layout: str) -> None:
    for results in run_ranks(LAYOUTS[layout][0], ours, folder, layout):
        np.testing.assert_allclose(results["logits"], theirs["logits"], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(results["inputs"], theirs["inputs"], rtol=1e-5, atol=1e-5)
        assert results["gradients"].keys() == theirs["gradients"].keys() and len(results["gradients"]) == 4 * 7 * 2
        for name, gradient in theirs["gradients"].items():
            assert np.abs(gradient).max() > 1e-3, name
            np.testing.assert_allclose(results["gradients"][name], gradient, rtol=1e-5, atol=1e-5, err_msg=name)


# ---------------------------------------------------------------------------------------------------- memory


def kept(folder: str) -> dict[str, Any]:
    """Bytes of the base and of what a pass keeps with and without NF4, and how dequantized copies come and go."""
    measurements: dict[str, Any] = {}
    for quantization in ("", "nf4"):
        model = built(configured(folder, quantization=quantization)).train()
        hidden = torch.randn(len(TOKENS), 1, SHAPE["hidden_size"], requires_grad=True)
        pack = model._packing(MicroBatch.unlabelled([TOKENS.tolist()], {}))
        decoder: Any = model.language_model.decoder

        def forward(decoder: Any = decoder, hidden: Tensor = hidden, pack: Any = pack) -> Tensor:
            return decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=pack)

        measurements[quantization] = sum(saved_for_backward(forward, model.parameters())[0].values())
    held = held_weights(model)
    measurements["bytes"] = sum(storages(held).values()), sum(weight.numel() for weight in held)
    copies: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    dequantize = NF4Weight.dequantize

    def noted(weight: NF4Weight) -> Tensor:
        alive.append(sum(copy() is not None for copy in copies))
        values = dequantize(weight)
        copies.append(weakref.ref(values.untyped_storage()))
        return values

    NF4Weight.dequantize = noted  # type: ignore[method-assign]
    out = forward()
    forwards = len(copies)
    out.sum().backward()
    measurements["copies"] = forwards, len(copies) - forwards, max(alive), sum(copy() is not None for copy in copies)
    return measurements


def test_no_dequantized_copy_outlives_its_product(folder: str) -> None:
    [measurements] = run_ranks(1, kept, folder)
    size, elements = measurements["bytes"]
    assert elements == SHAPE["num_hidden_layers"] * (128 * 256 + 128 * 128 + 3 * 128 * 256)
    assert size == elements * 0.5625
    assert measurements["nf4"] == measurements[""]
    assert measurements["copies"] == (LINEARS, LINEARS, 0, 0)


def peak_of_building(folder: str) -> tuple[int, int]:
    config = configured(folder)
    initialize(config)
    hf = read_llama_config(config.model.language_model)
    with PeakMemory() as memory:
        [model] = assemble(config.model, config.trainer.precision, hf, {})
    return memory.peak, sum(storages(model.parameters()).values())


def test_building_never_holds_the_unquantized_model(folder: str) -> None:
    [(peak, stored)] = run_ranks(1, peak_of_building, folder)
    layer = 4 * (128 * 256 + 128 * 128 + 3 * 128 * 256)
    # Each layer has its own in fp32 until it is replaced.
    assert stored < peak < stored + 1.1 * layer < 4 * layer


def quantized_in_parts(folder: str) -> tuple[bool, bool]:
    whole = NF4Weight.empty(torch.empty(96, 128))
    source = torch.randn(96, 128)
    whole.copy_(source)
    nf4_weights._BLOCKS_AT_ONCE = 5
    parts = NF4Weight.empty(torch.empty(96, 128))
    parts.copy_(source)
    same = all(torch.equal(a, b) for a, b in zip(stored_tensors(whole), stored_tensors(parts)))
    return same, torch.equal(unquantized(whole), rounded_to_nf4(source))


def test_quantizing_in_parts_changes_nothing(folder: str) -> None:
    assert run_ranks(1, quantized_in_parts, folder) == [(True, True)]


def refusals(folder: str) -> list[str]:
    weight = NF4Weight.empty(torch.empty(4, 64))
    weight.copy_(torch.randn(4, 64))
    messages = []
    for change in (
        lambda: weight.mul_(2),
        lambda: weight.copy_(torch.randn(64)),
        lambda: NF4Weight.empty(torch.empty(4, 96)),
    ):
        with pytest.raises((TypeError, ValueError)) as refused:
            change()
        messages.append(str(refused.value))
    return messages


def test_it_is_changed_only_as_a_whole(folder: str) -> None:
    [[changed, shape, rows]] = run_ranks(1, refusals, folder)
    assert "A weight in NF4 cannot be changed by aten.mul_" in changed
    assert "A weight of shape [4, 64] cannot be set from [64]" in shape
    assert "rows of a multiple of 64 elements, not 96" in rows
