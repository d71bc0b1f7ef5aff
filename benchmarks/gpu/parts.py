"""Parts of a Llama's layer and output layer, each implemented by every library that has it.

A candidate is built from its part's settings and then called with the inputs that need gradients. Building a candidate
that the machine does not support raises an error with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_anymal.model import compiled_ops
from megatron_anymal.model.attention_kernels import KERNELS, PackedDocuments

EPSILON = 1e-5
Call = Callable[..., Tensor]


@dataclass(frozen=True)
class PartSizes:
    """Input sizes: a pack through a layer of Llama-3 8B."""

    documents: tuple[int, ...]
    hidden: int = 4096
    ffn: int = 14336
    heads: int = 32
    key_value_heads: int = 8
    head_size: int = 128
    vocabulary: int = 128256

    @property
    def tokens(self) -> int:
        """Tokens of the pack."""
        return sum(self.documents)


@dataclass(frozen=True)
class Part:
    """One part and its inputs."""

    # Inputs that need gradients, in call order.
    inputs: tuple[Tensor, ...]
    # Further settings to build candidates from.
    given: Mapping[str, Any]
    # Minimum operations or bytes of forward, and of forward and backward together.
    forward: float
    both: float
    # Unit of `forward` and `both`: "operations" or "bytes".
    counts: str
    # Candidate name -> its builder; "eager torch" comes first and is the reference for the others.
    candidates: Mapping[str, Callable[..., Call]]


def make_parts(sizes: PartSizes, device: torch.device, dtype: torch.dtype) -> dict[str, Part]:
    """Build all parts with random inputs."""
    generator = torch.Generator(device).manual_seed(0)
    random = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    return {
        "RMSNorm": _rms_norm(sizes, random),
        "SwiGLU": _swiglu(sizes, random),
        "RoPE": _rope(sizes, random, device),
        "packed attention": _attention(sizes, random, device),
        "cross-entropy": _cross_entropy(sizes, random, generator),
    }


def _compiled(make: Callable[..., Call]) -> Callable[..., Call]:
    return lambda **given: torch.compile(make(**given))


def _module(name: str) -> Any:
    """Import a module of an optional package.

    Raises:
        ImportError: it is not installed, or does not work on this machine.
    """
    return importlib.import_module(name)


# RMSNorm: x [T, H] -> [T, H].


def _rms_norm(sizes: PartSizes, random: Any) -> Part:
    x, weight = random(sizes.tokens, sizes.hidden), 1 + 0.1 * random(sizes.hidden)
    bytes_of_x = float(x.nbytes)

    def eager(weight: Tensor) -> Call:
        def norm(x: Tensor) -> Tensor:
            wide = x.float()
            return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)).to(x.dtype)

        return norm

    def torch_kernel(weight: Tensor) -> Call:
        return lambda x: F.rms_norm(x, (x.size(-1),), weight, EPSILON)

    def this_trainer(weight: Tensor) -> Call:
        return lambda x: compiled_ops.rms_norm(x, weight, EPSILON)

    def transformer_engine(weight: Tensor) -> Call:
        return _with_weight(_module("transformer_engine.pytorch").RMSNorm(len(weight), eps=EPSILON), weight)

    def flash_attn(weight: Tensor) -> Call:
        norm = _module("flash_attn.ops.triton.layer_norm").rms_norm_fn
        return lambda x: norm(x, weight, None, eps=EPSILON)

    def apex(weight: Tensor) -> Call:
        return _with_weight(_module("apex.normalization").FusedRMSNorm(len(weight), eps=EPSILON), weight)

    return Part(
        inputs=(x,),
        given={"weight": weight},
        # Forward reads and writes x; backward reads x and the gradient and writes a gradient.
        forward=2 * bytes_of_x,
        both=5 * bytes_of_x,
        counts="bytes",
        candidates={
            "eager torch": eager,
            "torch.compile": _compiled(eager),
            "torch rms_norm": torch_kernel,
            "this trainer": this_trainer,
            "Transformer Engine": transformer_engine,
            "flash-attn": flash_attn,
            "apex": apex,
        },
    )


def _with_weight(module: Any, weight: Tensor) -> Call:
    module = module.to(weight.device, weight.dtype).requires_grad_(False)
    module.weight.data.copy_(weight)
    return module


# SwiGLU: gate and up concatenated [T, 2 F] -> [T, F].


def _swiglu(sizes: PartSizes, random: Any) -> Part:
    x = random(sizes.tokens, 2 * sizes.ffn)

    def eager() -> Call:
        def swiglu(x: Tensor) -> Tensor:
            gate, up = x.chunk(2, dim=-1)
            return F.silu(gate) * up

        return swiglu

    def this_trainer() -> Call:
        swiglu = _module("megatron.core.fusions.fused_bias_swiglu").SwiGLUFunction
        return lambda x: swiglu.apply(x, False, False)

    def transformer_engine() -> Call:
        return _module("transformer_engine.pytorch.ops").SwiGLU()

    def flash_attn() -> Call:
        swiglu = _module("flash_attn.ops.activations").swiglu
        return lambda x: swiglu(*x.chunk(2, dim=-1))

    def apex() -> Call:
        raise ImportError("apex has no such kernel")

    return Part(
        inputs=(x,),
        given={},
        # Forward reads two halves and writes one; backward reads both and the gradient and writes two.
        forward=1.5 * x.nbytes,
        both=4.0 * x.nbytes,
        counts="bytes",
        candidates={
            "eager torch": eager,
            "torch.compile": _compiled(eager),
            "this trainer": this_trainer,
            "Transformer Engine": transformer_engine,
            "flash-attn": flash_attn,
            "apex": apex,
        },
    )


# RoPE: x [T, n, d] -> the same, positions restarting with every document.


def _rope(sizes: PartSizes, random: Any, device: torch.device) -> Part:
    x = random(sizes.tokens, sizes.heads, sizes.head_size)
    longest = max(sizes.documents)
    inverse = 500000.0 ** -(torch.arange(0, sizes.head_size, 2, device=device).float() / sizes.head_size)
    # Angles of every position in a document, and of every token.
    table = torch.outer(torch.arange(longest, device=device).float(), inverse)
    angles = torch.cat([table[:length] for length in sizes.documents])

    def eager(angles: Tensor, **ignored: Any) -> Call:
        cosine, sine = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)

        def rotate(x: Tensor) -> Tensor:
            a, b = x.chunk(2, dim=-1)
            return torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1).to(x.dtype)

        return rotate

    def this_trainer(angles: Tensor, **ignored: Any) -> Call:
        both = torch.cat([angles, angles], dim=-1).unsqueeze(1)
        cosine, sine = both.cos(), both.sin()
        # The kernel rotates queries and keys together: pass empty keys.
        keys = x[:, :0]
        return lambda x: compiled_ops.apply_rotary(x, keys, cosine, sine)[0]

    def transformer_engine(table: Tensor, borders: Tensor, **ignored: Any) -> Call:
        rotate = _module("transformer_engine.pytorch.attention.rope").apply_rotary_pos_emb
        both = torch.cat([table, table], dim=-1)[:, None, None, :]
        return lambda x: rotate(x, both, tensor_format="thd", fused=True, cu_seqlens=borders)

    def flash_attn(table: Tensor, borders: Tensor, **ignored: Any) -> Call:
        rotate = _module("flash_attn.layers.rotary").apply_rotary_emb
        cosine, sine = table.cos().to(x.dtype), table.sin().to(x.dtype)
        return lambda x: rotate(x, cosine, sine, cu_seqlens=borders, max_seqlen=len(table))

    def apex(angles: Tensor, **ignored: Any) -> Call:
        rotate = _module("apex.transformer.functional").fused_apply_rotary_pos_emb_cached
        both = torch.cat([angles, angles], dim=-1)[:, None, None, :]
        cosine, sine = both.cos().to(x.dtype), both.sin().to(x.dtype)
        return lambda x: rotate(x.unsqueeze(1), cosine, sine).squeeze(1)

    return Part(
        inputs=(x,),
        given={"table": table, "angles": angles, "borders": _borders(sizes, device)},
        forward=2.0 * x.nbytes,
        both=4.0 * x.nbytes,
        counts="bytes",
        candidates={
            "eager torch": eager,
            "torch.compile": _compiled(eager),
            "this trainer": this_trainer,
            "Transformer Engine": transformer_engine,
            "flash-attn": flash_attn,
            "apex": apex,
        },
    )


def _borders(sizes: PartSizes, device: torch.device) -> Tensor:
    return torch.tensor([0, *sizes.documents]).cumsum(0).to(torch.int32).to(device)


# Attention within documents: query [T, n, d], key and value [T, g, d] -> [T, n, d].


def _attention(sizes: PartSizes, random: Any, device: torch.device) -> Part:
    heads = (sizes.heads, sizes.key_value_heads, sizes.key_value_heads)
    operations = 2.0 * sizes.heads * sizes.head_size * sum(length**2 for length in sizes.documents)

    def eager(documents: tuple[int, ...]) -> Call:
        """Attention with a mask over the whole pack."""
        number = torch.repeat_interleave(torch.tensor(documents)).to(device)
        mask = (number[:, None] == number).tril()

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            return out.squeeze(0).transpose(0, 1)

        return attend

    def kernel(name: str, documents: tuple[int, ...]) -> Call:
        if name == "flash_attn":
            _module("flash_attn")
        if name == "flex" and device.type == "cpu":
            raise ImportError("no backward pass on CPUs")
        made = KERNELS[name](PackedDocuments(documents), device)
        return lambda query, key, value: made(query, key, value, None)

    def transformer_engine(documents: tuple[int, ...]) -> Call:
        attend = _module("transformer_engine.pytorch").DotProductAttention(
            sizes.heads,
            sizes.head_size,
            num_gqa_groups=sizes.key_value_heads,
            attention_dropout=0.0,
            qkv_format="thd",
            attn_mask_type="padding_causal",
        )
        borders, longest = _borders(sizes, device), max(documents)
        packing = {"cu_seqlens_q": borders, "cu_seqlens_kv": borders}
        packing |= {"max_seqlen_q": longest, "max_seqlen_kv": longest}
        return lambda query, key, value: attend(query, key, value, **packing).view(query.shape)

    return Part(
        inputs=tuple(random(sizes.tokens, count, sizes.head_size) for count in heads),
        given={"documents": sizes.documents},
        forward=operations,
        both=3.5 * operations,
        counts="operations",
        candidates={
            "eager torch": eager,
            "documents in batches": partial(kernel, "sdpa"),
            "flex": partial(kernel, "flex"),
            "Transformer Engine": transformer_engine,
            "flash-attn": partial(kernel, "flash_attn"),
        },
    )


# Cross-entropy: logits [T, V] -> [T] fp32.


def _cross_entropy(sizes: PartSizes, random: Any, generator: torch.Generator) -> Part:
    logits = random(sizes.tokens, sizes.vocabulary)
    # Not 0, which apex treats as padding.
    labels = torch.randint(1, sizes.vocabulary, (sizes.tokens,), generator=generator, device=logits.device)

    def eager(labels: Tensor) -> Call:
        return lambda logits: F.cross_entropy(logits.float(), labels, reduction="none")

    def transformer_engine(labels: Tensor) -> Call:
        loss = _module("transformer_engine.pytorch.cross_entropy").parallel_cross_entropy
        return lambda logits: loss(logits.unsqueeze(0), labels.unsqueeze(0), 0.0, False, None).view(-1)

    def flash_attn(labels: Tensor) -> Call:
        loss = _module("flash_attn.losses.cross_entropy").CrossEntropyLoss(reduction="none")
        return lambda logits: loss(logits, labels)

    def apex(labels: Tensor) -> Call:
        loss = _module("apex.contrib.xentropy").SoftmaxCrossEntropyLoss
        return lambda logits: loss.apply(logits, labels, 0.0, 0, True)

    return Part(
        inputs=(logits,),
        given={"labels": labels},
        # Forward reads the logits; backward reads them again and writes their gradient.
        forward=float(logits.nbytes),
        both=3.0 * logits.nbytes,
        counts="bytes",
        candidates={
            "eager torch": eager,
            "torch.compile": _compiled(eager),
            "Transformer Engine": transformer_engine,
            "flash-attn": flash_attn,
            "apex": apex,
        },
    )
