"""The benchmarked kernels of Transformer Engine are built and called as it defines them."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from ranks import run_ranks
from te_emulation import MARKS, install

from benchmarks.gpu.parts import PartSizes, make_parts

pytestmark = MARKS
ENGINE, EAGER = "Transformer Engine", "eager torch"


def compare() -> dict[str, float]:
    """Largest difference from eager torch, for the parts that the emulation computes."""
    import transformer_engine.pytorch.ops.basic.rmsnorm as rmsnorm

    from megatron_anymal import cpu_shim

    cpu_shim.install()
    install()
    # The original adds an index to "cuda", the device that the CPU shim reports.
    rmsnorm.canonicalize_device = lambda device: torch.device("cpu")
    sizes = PartSizes((5, 3), hidden=32, ffn=16, heads=4, key_value_heads=2, head_size=8, vocabulary=40)
    parts = make_parts(sizes, torch.device("cpu"), torch.float32)
    apart = {}
    for name in ("RMSNorm", "packed attention"):
        part = parts[name]
        engine, eager = (part.candidates[one](**part.given)(*part.inputs) for one in (ENGINE, EAGER))
        apart[name] = float((engine - eager).abs().max())
    return apart


def test_norm_and_attention_equal_eager_torch() -> None:
    [apart] = run_ranks(1, compare)
    assert apart.keys() == {"RMSNorm", "packed attention"} and max(apart.values()) < 1e-5


def called() -> list[str]:
    """The parts whose kernels need a GPU: called with the parameters that they have."""
    import transformer_engine.pytorch.attention.rope as rope
    import transformer_engine.pytorch.cross_entropy as cross_entropy

    from megatron_anymal import cpu_shim

    cpu_shim.install()
    install()
    sizes = PartSizes((5, 3), hidden=32, ffn=16, heads=4, key_value_heads=2, head_size=8, vocabulary=40)
    parts = make_parts(sizes, torch.device("cpu"), torch.float32)
    assert type(parts["SwiGLU"].candidates[ENGINE]()).__name__ == "SwiGLU"
    part_names = []
    kernels: list[tuple[str, Any, str]] = [
        ("RoPE", rope, "apply_rotary_pos_emb"),
        ("cross-entropy", cross_entropy, "parallel_cross_entropy"),
    ]
    for name, module, function in kernels:
        part = parts[name]
        with mock.patch.object(module, function, autospec=True) as kernel:
            kernel.return_value = part.inputs[0]
            part.candidates[ENGINE](**part.given)(*part.inputs)
            kernel.assert_called_once()
        part_names.append(name)
    return part_names


def test_others_are_called_with_the_parameters_they_have() -> None:
    assert run_ranks(1, called) == [["RoPE", "cross-entropy"]]
