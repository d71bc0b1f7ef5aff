"""The head's losses and gradients against torch's cross-entropy of all logits, in double precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from ranks import run_ranks
from torch import Tensor

from megatron_anymal.config import RunConfig
from megatron_anymal.model import lm_head
from megatron_anymal.model.llama import build_gpt, transformer_config
from megatron_anymal.model.llama_shape import read_llama_config
from megatron_anymal.model.lm_head import label_losses
from megatron_anymal.parallel import initialize

T, H = 24, 16
# Vocabulary size (two ranks split 40 evenly, 41 is padded), tied, trainable, sequence parallel.
CASES = [
    (40, False, False, False),
    (41, True, False, False),
    (41, False, True, False),
    (41, False, False, True),
    (40, False, True, True),
    (41, True, True, True),
]
WHERE = {"some": [0, 3, 4, 5, 11, 23], "all": list(range(T)), "one": [7]}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expected(vocabulary: int, where: list[int]) -> list[np.ndarray]:
    """Losses and gradients of the hidden states and head weight, computed with plain torch."""
    hidden, weight = drawn(T, H, seed=1).requires_grad_(), drawn(vocabulary, H, seed=2).requires_grad_()
    labels = torch.arange(T) * 7 % vocabulary
    losses = torch.zeros(T, dtype=torch.float64)
    losses[where] = F.cross_entropy(hidden @ weight.T, labels, reduction="none")[where]
    (losses * drawn(T, seed=3)).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return [array.numpy() for array in (losses.detach(), hidden.grad, weight.grad)]


def run(case: tuple[int, bool, bool, bool], tp: int) -> list[Any]:
    """Results of `label_losses` in a rank for all position sets and two chunk sizes, with the gathered weight
    gradient."""
    vocabulary, tied, trains, sp = case
    config = RunConfig()
    config.trainer.precision, config.trainer.devices = "32", tp
    config.model.tensor_model_parallel_size, config.model.sequence_parallel = tp, sp
    config.model.language_model.config = {
        "vocab_size": vocabulary,
        "hidden_size": H,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "tie_word_embeddings": tied,
    }
    config.data.tokenizer = "unused"
    initialize(config)
    hf = read_llama_config(config.model.language_model)
    gpt = build_gpt(hf, transformer_config(config.model, config.trainer.precision, hf), "local").double()
    rank, rows = parallel_state.get_tensor_model_parallel_rank(), -(-vocabulary // tp)
    # Padding rows of the vocabulary must have no effect.
    whole = torch.cat([drawn(vocabulary, H, seed=2), torch.full((rows * tp - vocabulary, H), 3.0)])
    weight: Any = gpt.shared_embedding_or_output_weight() if tied else gpt.output_layer.weight
    with torch.no_grad():
        weight.copy_(whole[rank * rows : (rank + 1) * rows])
    weight.requires_grad_(trains)
    own = slice(rank * T // tp, (rank + 1) * T // tp) if sp else slice(None)
    labels = (torch.arange(T) * 7 % vocabulary)[None]
    results = []
    for places in WHERE.values():
        for lm_head.CHUNK_ELEMENTS in (1 << 26, 80):
            weight.grad = None
            hidden = drawn(T, H, seed=1)[own, None].clone().requires_grad_()
            losses = label_losses(gpt, hidden, labels, torch.tensor(places), vocabulary)
            (losses[0] * drawn(T, seed=3)).sum().backward()
            of_weight = torch.zeros(rows, H, dtype=torch.float64) if weight.grad is None else weight.grad
            gathered = [torch.empty_like(of_weight) for _ in range(tp)]
            dist.all_gather(gathered, of_weight)
            assert hidden.grad is not None
            arrays = losses[0].detach(), hidden.grad[:, 0], torch.cat(gathered)
            results.append((case, places, own, *(array.numpy() for array in arrays)))
    return results


def run_all(tp: int) -> list[Any]:
    return [result for case in CASES if tp > 1 or not case[3] for result in run(case, tp)]


@pytest.mark.parametrize("tp", [1, 2])
def test_equals_cross_entropy_of_all_logits(tp: int) -> None:
    for rank in run_ranks(tp, run_all, tp):
        assert len(rank) == (3 if tp == 1 else 6) * len(WHERE) * 2
        for (vocabulary, _, trains, _), places, own, losses, of_hidden, of_weight in rank:
            wanted = expected(vocabulary, places)
            np.testing.assert_allclose(losses, wanted[0], rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(of_hidden, wanted[1][own], rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(of_weight[:vocabulary], wanted[2] * trains, rtol=1e-12, atol=1e-12)
            assert not of_weight[vocabulary:].any()
