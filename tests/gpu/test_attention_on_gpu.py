"""GPU attention kernels match scaled dot-product attention on the same GPU, forward and backward."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from megatron_anymal.data.context_parallel import held_tokens
from megatron_anymal.model.attention_kernels import KERNELS, PackedDocuments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
LENGTHS = [512, 64, 1024, 8, 8, 432]
NEEDS_FLASH = pytest.mark.skipif(not importlib.util.find_spec("flash_attn"), reason="flash-attn is not installed")


@pytest.mark.parametrize("kernel", ["flex", pytest.param("flash_attn", marks=NEEDS_FLASH)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_equals_scaled_dot_product_attention(kernel: str, size: int) -> None:
    device, generator = torch.device("cuda"), torch.Generator("cuda").manual_seed(0)
    shapes = [(sum(LENGTHS), heads, 128) for heads in (8, 2, 2)]
    whole = [torch.randn(s, generator=generator, device=device, dtype=torch.bfloat16) for s in shapes]
    for rank in range(size):
        held = held_tokens(LENGTHS, rank, size).to(device)
        results = []
        for name in (kernel, "sdpa"):
            query, key, value = (x.clone().requires_grad_() for x in whole)
            out = KERNELS[name](PackedDocuments(LENGTHS, rank, size), device)(query[held], key, value, None)
            out.float().square().sum().backward()
            results.append([out, query.grad, key.grad, value.grad])
        for mine, theirs in zip(*results):
            assert mine is not None and theirs is not None
            # Two bf16 kernels are compared by norm, not element by element.
            assert float((mine - theirs).float().norm() / theirs.float().norm()) < 1e-2
