"""The page on operations lists all metrics, and its example is what the code counts."""

from __future__ import annotations

import re

from commands import PAGES
from transformers import LlamaConfig

from megatron_anymal.config import ModelConfig
from megatron_anymal.model.operations.costs import llama_costs
from megatron_anymal.planning.layouts.hardware import load_hardware
from megatron_anymal.train.utilization import UTILIZATION_METRICS

PAGE = PAGES["docs/operations/utilization.md"]
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def test_metrics_are_listed() -> None:
    table = PAGE.partition("| metric |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) == {*UTILIZATION_METRICS, "forward_seconds"}


def test_the_example_is_counted() -> None:
    text = PAGE.partition("## Example")[2]
    layers, head = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336), 128256 * 4096
    last = 4096**2 + 3 * 4096 * 14336
    words = f"{layers:,} parameters in its layers, {last:,} of them after the last attention, and {head:,} in its head"
    assert words in text.replace("\n", " ")
    costs = llama_costs(ModelConfig(), LlamaConfig(**LLAMA_8B), reached=True)
    tokens, labels = 300 * 1000, 40 * 1000
    amounts = (
        (tokens, costs.linears), (labels, costs.last_linears), (1000 * 300**2, costs.attention), (labels, costs.head)
    )  # fmt: skip
    parts = [units * (cost.forward + cost.backward) for units, cost in amounts]
    shown = [float(number) for number in re.findall(r"= ([\d.]+e\d+) \|", text)]
    assert shown == [float(f"{count:.3g}") for count in parts]
    rate = sum(parts) / (4 * 8)
    assert f"{rate / 1e12:.0f} TFLOP/s per GPU" in text.replace("\n", " ")
    assert f"{rate / load_hardware('h100-80gb').peak('bf16'):.1%}".replace("%", " %") in text
