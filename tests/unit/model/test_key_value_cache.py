"""Passes with a key-value cache give the logits that the whole documents give without one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from ranks import run_ranks
from tiny import make_config

from megatron_anymal.config import RunConfig
from megatron_anymal.data.micro_batch import MicroBatch
from megatron_anymal.model.anymal import AnyMALModel
from megatron_anymal.model.key_value_cache import KeyValueCache
from megatron_anymal.parallel import initialize
from megatron_anymal.train.build import build

# Tokens of each document in the first pass, and the documents that take part in each later pass. The longest document
# gets more tokens than the cache has room for at first.
FIRST = (3, 9, 1, 5)
LATER = ((0, 1, 2, 3), (0, 1, 3), *[(1, 3)] * 70, (3,))
VOCABULARY = 16


def in_a_rank(config: RunConfig) -> tuple[list[np.ndarray], list[np.ndarray]]:
    [model] = build(config, initialize(config)).models
    with torch.no_grad():
        return logits(model.eval())


def logits(model: AnyMALModel) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Logits after each document's last token in every pass, with the cache and without."""
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in FIRST]
    cache, left = KeyValueCache(len(documents)), list(range(len(documents)))
    cached, whole = [], []
    for later in [None, *LATER]:
        new = [documents[row] for row in left]
        if later is not None:
            cache.keep([left.index(row) for row in later])
            left = list(later)
            new = [torch.randint(VOCABULARY, (1,), generator=generator).tolist() for _ in left]
            for row, token in zip(left, new):
                documents[row] = documents[row] + token
        # Sequence parallelism needs an even length.
        padding = [[0]] if sum(map(len, new)) % 2 else []
        local_logits = model(MicroBatch.unlabelled([*new, *padding], {}), soft={}, cache=cache)
        cached.append(gather_from_tensor_model_parallel_region(local_logits)[0, :, :VOCABULARY].numpy())
        all_tokens = [documents[row] for row in left]
        padding = [[0]] if sum(map(len, all_tokens)) % 2 else []
        local_logits = model(MicroBatch.unlabelled([*all_tokens, *padding], {}), soft={})
        last = torch.tensor([len(tokens) for tokens in all_tokens]).cumsum(0) - 1
        whole.append(gather_from_tensor_model_parallel_region(local_logits)[0, last, :VOCABULARY].numpy())
    return cached, whole


@pytest.mark.parametrize("tensor", [1, 2])
def test_logits_are_those_of_whole_documents(
    tensor: int, mixed_shards: str, tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = make_config(mixed_shards, tokenizer_folder, tmp_path_factory.mktemp("cache"))
    config.trainer.devices = config.model.tensor_model_parallel_size = tensor
    config.model.sequence_parallel = tensor > 1
    cached, whole = run_ranks(tensor, in_a_rank, config)[0]
    assert [len(rows) for rows in cached] == [4, *map(len, LATER)]
    for one, other in zip(cached, whole):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    # The documents differ, so that a row in another's place would be seen.
    assert not np.allclose(whole[0][0], whole[0][1], atol=1e-2)
