"""Whole weights and the shards held by ranks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny import make_config

from megatron_anymal.config import RunConfig
from megatron_anymal.model import unsharded_weights
from megatron_anymal.model.unsharded_weights import gather_weights, hash_weights, list_weights, load_weights
from megatron_anymal.parallel import initialize
from megatron_anymal.train.build import TrainState, build

LAYOUTS = {"one": (1, 1), "tp2": (2, 1), "pp2": (1, 2)}


@pytest.fixture(scope="module")
def config(mixed_shards: str, tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A configuration whose vocabulary does not split evenly over two ranks."""
    config = make_config(mixed_shards, tokenizer_folder, tmp_path_factory.mktemp("weights"))
    config.model.language_model.config["vocab_size"] = 33
    return config


def built(config: RunConfig, tp: int, pp: int) -> TrainState:
    config.model.tensor_model_parallel_size, config.model.pipeline_model_parallel_size = tp, pp
    config.trainer.devices = tp * pp
    return build(config, initialize(config))


def everywhere(tensors: Any) -> Any:
    """Broadcast the value of rank 0 to every rank."""
    objects = [tensors]
    dist.broadcast_object_list(objects, src=0)
    return objects[0]


def explore(config: RunConfig, layouts: list[str]) -> dict[str, dict[str, Any]]:
    """Build the model under each layout; check whole weights, round trips and hashes."""
    results = {}
    for name in layouts:
        state = built(config, *LAYOUTS[name])
        seen: dict[str, Any] = {"hash": hash_weights(state.models, "")}
        seen["llama hash"] = hash_weights(state.models, "language_model.")
        for weight in list_weights(state.models[0]):
            whole = weight.gather()
            assert tuple(whole.shape) == weight.shape
            part = weight.local_part(whole)
            real = part == weight.parameter
            if weight.rows is None:
                assert real.all(), weight.name
            else:
                # Rows that pad the vocabulary are zero in a shard and arbitrary in the parameter.
                assert (real | (part == 0)).all() and len(whole) == 33
        whole = gather_weights(state.models)
        assert (whole is None) == (dist.get_rank() != 0)
        seen["weights"] = {n: w.numpy() for n, w in whole.items()} if whole else None
        seen["projectors only"] = sorted(gather_weights(state.models, "projectors.") or {})
        whole = everywhere(whole)
        with torch.no_grad():
            for parameter in state.models[0].parameters():
                parameter.fill_(7.0)
        seen["scrambled hash"] = hash_weights(state.models, "")
        load_weights(state.models, whole)
        seen["loaded hash"] = hash_weights(state.models, "")
        last = "language_model.decoder.layers.3.mlp.linear_fc2.weight"
        whole[last] = whole[last].clone()
        whole[last][-1, -1] += 1e-3
        load_weights(state.models, whole)
        seen["changed hash"] = hash_weights(state.models, "")
        seen["errors"] = [_error(state, {}), _error(state, {n: torch.zeros(2, 2) for n in whole})]
        results[name] = seen
    return results


def _error(state: TrainState, tensors: dict[str, torch.Tensor]) -> str:
    try:
        load_weights(state.models, tensors)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.fixture(scope="module")
def explored(config: RunConfig) -> dict[str, list[dict[str, Any]]]:
    """Results of every rank, per layout."""
    one = run_ranks(1, explore, config, ["one"])
    two = run_ranks(2, explore, config, ["tp2", "pp2"])
    return {"one": [one[0]["one"]], **{name: [rank[name] for rank in two] for name in ("tp2", "pp2")}}


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_initial_values_are_those_of_one_process(layout: str, explored: Any) -> None:
    one, other = explored["one"][0]["weights"], explored[layout][0]["weights"]
    assert one.keys() == other.keys() and len(one) > 30
    assert one["language_model.embedding.word_embeddings.weight"].shape == (33, 32)
    for name, value in one.items():
        np.testing.assert_array_equal(other[name], value, err_msg=name)


def test_no_two_weights_start_alike(explored: Any) -> None:
    drawn = [w for w in explored["one"][0]["weights"].values() if w.ndim > 1]
    assert len({w.tobytes() for w in drawn}) == len(drawn)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hashes_are_those_of_the_whole_weights(layout: str, explored: Any) -> None:
    expected = explored["one"][0]
    for seen in explored[layout]:
        assert seen["hash"] == expected["hash"] and seen["llama hash"] == expected["llama hash"]
        assert seen["loaded hash"] == expected["hash"]
        assert seen["scrambled hash"] == expected["scrambled hash"]
        assert seen["changed hash"] == expected["changed hash"]
    assert len({expected[which] for which in ("hash", "llama hash", "scrambled hash", "changed hash")}) == 4


def hashed_bytes(config: RunConfig) -> tuple[str, int, int]:
    """In a job of two replicas of two tensor-parallel ranks: the hash, and the bytes that this rank hashed, and all."""
    config.model.tensor_model_parallel_size, config.trainer.devices = 2, 4
    state = build(config, initialize(config))
    sizes: list[int] = []
    hash_weight = unsharded_weights.hash_weight

    def counted(name: str, whole: torch.Tensor) -> str:
        sizes.append(whole.nbytes)
        return hash_weight(name, whole)

    unsharded_weights.hash_weight = counted
    whole = sum(math.prod(weight.shape) * 4 for weight in list_weights(state.models[0]))
    return hash_weights(state.models, ""), sum(sizes), whole


def test_ranks_share_the_hashing(config: RunConfig, explored: Any) -> None:
    results = run_ranks(4, hashed_bytes, config)
    assert {seen for seen, _, _ in results} == {explored["one"][0]["hash"]}
    mine, whole = [own for _, own, _ in results], results[0][2]
    # The largest single weight is a tenth of all.
    assert sum(mine) == whole and max(mine) < 0.3 * whole


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prefixes_and_errors(layout: str, explored: Any) -> None:
    first = explored[layout][0]
    assert first["projectors only"] == [n for n in sorted(first["weights"]) if n.startswith("projectors.")]
    for seen in explored[layout]:
        missing, shape = seen["errors"]
        assert "lack" in missing and "expects" in shape
