"""Projectors begin with the scale of the text embeddings, even if the table is split and squared in parts."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_ranks
from tiny import make_config

from megatron_anymal.config import RunConfig
from megatron_anymal.model import build as building
from megatron_anymal.model.unsharded_weights import gather_weights
from megatron_anymal.parallel import initialize
from megatron_anymal.train.build import build


def gains_and_scale(config: RunConfig) -> tuple[list[float], float]:
    # 33 rows in parts of five; the last is of three, or, on a tensor-parallel rank, of two.
    building._ROWS = 5
    state = build(config, initialize(config))
    gains = [projector.gain.item() for projector in state.models[0].projectors.values()]
    whole = gather_weights(state.models, "language_model.embedding.word_embeddings.")
    [table] = whole.values() if whole else [None]
    return gains, 0.0 if table is None else table.double().square().mean().sqrt().item()


@pytest.mark.parametrize("tensor", [1, 2])
def test_gains_are_the_root_mean_square_of_the_embeddings(
    tensor: int, mixed_shards: str, tokenizer_folder: str, tmp_path: Path
) -> None:
    config = make_config(mixed_shards, tokenizer_folder, tmp_path / "run")
    config.model.language_model.config["vocab_size"] = 33
    config.model.tensor_model_parallel_size = config.trainer.devices = tensor
    results = run_ranks(tensor, gains_and_scale, config)
    scale = results[0][1]
    for gains, _ in results:
        assert gains == pytest.approx([scale] * 3, rel=1e-6)
