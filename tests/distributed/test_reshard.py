"""A resharded checkpoint has the same values, is cut like a run of the new layout would, and can be resumed."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
from engine import losses, train
from ranks import run_ranks
from tiny import make_config

from checkpoint_tools.reshard import main as reshard
from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.tensor_stream import StreamReader
from megatron_anymal.config import LoraConfig, RunConfig
from megatron_anymal.safetensors_io import raw_bytes


@pytest.fixture
def config(mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> RunConfig:
    """A run with an odd vocabulary size and a trainable Llama."""
    config = make_config(mixed_shards, tokenizer_folder, tmp_path / "run")
    config.model.language_model.config["vocab_size"] = 33
    config.model.language_model.freeze = False
    config.model.optim.sched.decay_steps = 4
    config.trainer.max_steps = 2
    return config


def run(config: RunConfig, tp: int, pp: int, world: int) -> None:
    config = copy.deepcopy(config)
    config.model.tensor_model_parallel_size, config.model.pipeline_model_parallel_size = tp, pp
    config.trainer.devices = world
    run_ranks(world, train, config)


def newest(run_dir: Path) -> Path:
    return store.resolve(str(run_dir))


def arguments(source: Path, out: Path, tp: int, pp: int) -> list[str]:
    sizes = ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
    return ["--checkpoint", str(source), "--out", str(out), *sizes]


def same_content(one: Path, other: Path) -> None:
    """Assert that all entries are bit-identical, and the manifests differ only in configuration and files."""
    mine, theirs = StreamReader(one), StreamReader(other)
    assert mine.tensors.keys() == theirs.tensors.keys() and list(mine.objects) == list(theirs.objects)
    for name in mine.tensors:
        a, b = mine.read(name), theirs.read(name)
        assert (a.dtype, a.shape) == (b.dtype, b.shape) and raw_bytes(a) == raw_bytes(b), name
    assert [mine.read_object(n) for n in mine.objects] == [theirs.read_object(n) for n in theirs.objects]
    assert mine.common_bytes() == theirs.common_bytes()
    a, b = (vars(store.read_manifest(folder, verify=True)) for folder in (one, other))
    assert {**a, "config": 0, "files": 0} == {**b, "config": 0, "files": 0}


def boxes(folder: Path) -> dict[str, set[tuple[tuple[int, ...], tuple[int, ...]]]]:
    return {n: {(c.offset, c.size) for c in t.chunks} for n, t in StreamReader(folder).tensors.items()}


def test_cut_as_that_layout_cuts(config: RunConfig, tmp_path: Path) -> None:
    run(config, 1, 1, 1)
    source, out = newest(tmp_path / "run"), tmp_path / "out"
    assert reshard(arguments(source, out, 2, 2)) == 0
    same_content(source, out)
    assert len(list(out.glob("*.distcp"))) == 4
    manifest = store.read_manifest(out)
    assert manifest.config["model"]["tensor_model_parallel_size"] == 2 and manifest.config["trainer"]["devices"] == 4
    # A run under that layout saves chunks of the same offsets and sizes, except for the vocabulary's padding rows.
    config.exp_manager.explicit_log_dir = str(tmp_path / "two")
    run(config, 2, 2, 4)
    mine, theirs = boxes(out), boxes(newest(tmp_path / "two"))
    assert mine.keys() == theirs.keys()
    for name, expected in theirs.items():
        if name.endswith(("word_embeddings.weight", "output_layer.weight")):
            assert mine[name] == {((0, 0), (17, 32)), ((17, 0), (16, 32))}
        else:
            assert mine[name] == expected, name


@pytest.mark.parametrize(
    ("precision", "distributed", "first", "second"),
    [("32", False, (2, 1), (1, 2)), ("bf16", True, (1, 2), (2, 1)), ("bf16", False, (1, 1), (2, 1))],
)
def test_a_run_goes_on_from_it(
    config: RunConfig,
    tmp_path: Path,
    precision: str,
    distributed: bool,
    first: tuple[int, int],
    second: tuple[int, int],
) -> None:
    config.trainer.precision, config.model.ddp.use_distributed_optimizer = precision, distributed
    run(config, *first, 2)
    source, later = newest(tmp_path / "run"), tmp_path / "later"
    out = later / "checkpoints" / source.name
    assert reshard(arguments(source, out, *second)) == 0
    same_content(source, out)
    config.trainer.max_steps = 4
    # Continue the original checkpoint under the same layout for comparison.
    run(config, *second, 2)
    config.exp_manager.explicit_log_dir = str(later)
    run(config, *second, 2)
    np.testing.assert_array_equal(losses(later), losses(tmp_path / "run")[2:])


def test_adapters_and_a_frozen_llama(config: RunConfig, tmp_path: Path) -> None:
    config.model.language_model.freeze = True
    config.model.lora = LoraConfig(r=2, alpha=4, targets=["*"])
    run(config, 1, 2, 2)
    source, out = newest(tmp_path / "run"), tmp_path / "out"
    assert reshard(arguments(source, out, 2, 1)) == 0
    same_content(source, out)
    assert any(".lora." in name and len(box) == 2 for name, box in boxes(out).items())


def test_what_cannot_be_done(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(config, 1, 1, 1)
    source, out = newest(tmp_path / "run"), tmp_path / "out"

    def said(*given: str) -> str:
        capsys.readouterr()
        assert reshard([*given]) == 2
        return capsys.readouterr().err

    assert "tensor_model_parallel_size=3 does not divide" in said(*arguments(source, out, 3, 1))
    assert "pipeline_model_parallel_size=3 does not divide" in said(*arguments(source, out, 1, 3))
    assert "at least 1" in said(*arguments(source, out, 0, 1))
    assert "exists" in said(*arguments(source, tmp_path, 1, 1))
    assert "no folder" in said(*arguments(tmp_path / "none", out, 1, 1))
    assert not out.exists() and not list(tmp_path.glob(".*"))
