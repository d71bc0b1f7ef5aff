"""Checkpoints: bit-identical resumption, and loading under different layouts."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
from engine import losses, train
from ranks import run_ranks
from tiny import make_config

from checkpoint_tools.inspect import main as inspect_checkpoint
from megatron_anymal.config import ConfigError, RunConfig


@pytest.fixture
def config(mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> RunConfig:
    return make_config(mixed_shards, tokenizer_folder, tmp_path / "run")


@pytest.fixture(scope="module")
def undisturbed(
    mixed_shards: str, tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[bool, list[float]]:
    """Losses of the whole run on one process, with a frozen Llama (True) and a trained one (False)."""
    run_losses = {}
    for freeze in (True, False):
        config = make_config(mixed_shards, tokenizer_folder, tmp_path_factory.mktemp("whole"))
        config.model.language_model.freeze = freeze
        run_losses[freeze] = run_ranks(1, train, config)[0]["losses"]
    return run_losses


def stopped_and_continued(config: RunConfig, first: dict[str, int], second: dict[str, int]) -> list[float]:
    """Train 3 steps under one layout and 3 more under another, and return all six losses."""
    for steps, layout in ((3, first), (6, second)):
        part = copy.deepcopy(config)
        # The learning rate depends on the run's length, so both parts use the schedule of a run of six steps.
        part.trainer.max_steps, part.model.optim.sched.decay_steps = steps, 6
        part.trainer.devices = layout.get("world", 1)
        part.model.tensor_model_parallel_size = layout.get("tp", 1)
        part.model.pipeline_model_parallel_size = layout.get("pp", 1)
        part.model.virtual_pipeline_model_parallel_size = layout.get("vpp", 1)
        part.model.context_parallel_size = layout.get("cp", 1)
        run_ranks(part.trainer.devices, train, part)
    return losses(Path(config.exp_manager.explicit_log_dir))


@pytest.mark.parametrize(
    ("precision", "distributed", "layout"),
    [("32", False, {"world": 2, "pp": 2}), ("bf16", False, {"world": 2}), ("bf16", True, {"world": 2})],
)
def test_resume_of_every_optimizer_is_bit_identical(
    config: RunConfig, tmp_path: Path, precision: str, distributed: bool, layout: dict[str, int]
) -> None:
    config.trainer.precision, config.model.ddp.use_distributed_optimizer = precision, distributed
    whole = copy.deepcopy(config)
    whole.exp_manager.explicit_log_dir, whole.trainer.devices = str(tmp_path / "whole"), 2
    whole.model.pipeline_model_parallel_size = layout.get("pp", 1)
    undisturbed = run_ranks(2, train, whole)[0]["losses"]
    assert stopped_and_continued(config, layout, layout) == undisturbed


@pytest.mark.parametrize("freeze", [True, False])
def test_resume_is_bit_identical(config: RunConfig, undisturbed: dict[bool, list[float]], freeze: bool) -> None:
    config.model.language_model.freeze = freeze
    assert stopped_and_continued(config, {}, {}) == undisturbed[freeze]


def test_resume_with_several_buckets_is_bit_identical(config: RunConfig, tmp_path: Path) -> None:
    # Buckets are padded: the optimizer state must not be split at padded offsets.
    config.model.ddp.overlap_grad_reduce, config.model.ddp.bucket_size = True, 1000
    config.model.language_model.freeze = False
    whole = copy.deepcopy(config)
    whole.exp_manager.explicit_log_dir, whole.trainer.devices = str(tmp_path / "whole"), 2
    undisturbed = run_ranks(2, train, whole)[0]["losses"]
    assert stopped_and_continued(config, {"world": 2}, {"world": 2}) == undisturbed


@pytest.mark.parametrize("distributed", [True, False])
def test_resume_with_another_rate(config: RunConfig, undisturbed: dict[bool, list[float]], distributed: bool) -> None:
    config.model.ddp.use_distributed_optimizer = distributed
    config.trainer.max_steps, config.model.optim.sched.decay_steps = 3, 6
    run_ranks(1, train, config)
    config.trainer.max_steps, config.model.optim.lr = 6, 2 * config.model.optim.lr
    config.resilience.allow_changes = ["config"]
    resumed_losses = run_ranks(1, train, config)[0]["losses"]
    # The first loss after the resume is that of weights trained at the old rate.
    assert resumed_losses[:4] == undisturbed[True][:4]
    assert not set(resumed_losses[4:]) & set(undisturbed[True])


def test_a_tied_trainable_head_is_the_same_over_pipeline_stages(config: RunConfig, tmp_path: Path) -> None:
    config.model.language_model.config["tie_word_embeddings"] = True
    config.model.language_model.freeze = False
    whole = copy.deepcopy(config)
    whole.exp_manager.explicit_log_dir = str(tmp_path / "whole")
    undisturbed = run_ranks(1, train, whole)[0]["losses"]
    two_stages = stopped_and_continued(config, {"world": 2, "pp": 2}, {"world": 2, "pp": 2})
    np.testing.assert_allclose(two_stages, undisturbed, rtol=1e-5)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"world": 2, "tp": 2}, {"world": 2, "pp": 2}),
        ({"world": 2, "pp": 2}, {"world": 2}),
        ({"world": 2}, {"world": 2, "tp": 2}),
        ({"world": 2, "pp": 2, "vpp": 2}, {"world": 2, "cp": 2}),
        ({"world": 2, "cp": 2}, {"world": 4, "pp": 2, "vpp": 2, "tp": 2}),
    ],
)
@pytest.mark.parametrize("freeze", [True, False])
def test_resume_under_another_layout(
    config: RunConfig,
    undisturbed: dict[bool, list[float]],
    first: dict[str, int],
    second: dict[str, int],
    freeze: bool,
) -> None:
    config.model.language_model.freeze = freeze
    np.testing.assert_allclose(stopped_and_continued(config, first, second), undisturbed[freeze], rtol=1e-5)


def test_another_seed_is_refused_at_resume(config: RunConfig) -> None:
    config.trainer.max_steps = 3
    run_ranks(1, train, config)
    config.trainer.max_steps, config.model.seed = 6, 99

    def resume() -> str:
        with pytest.raises(ConfigError) as error:
            train(config)
        return str(error.value)

    assert "repeat or lose samples" in run_ranks(1, resume)[0]


def test_a_llama_trained_here_is_the_base_of_the_next_run(config: RunConfig, text_shards: str, tmp_path: Path) -> None:
    text = copy.deepcopy(config)
    text.model.modalities = {}
    text.model.language_model.freeze = False
    text.data.train["mix"].path = text_shards
    text.exp_manager.explicit_log_dir = str(tmp_path / "text")
    trained = run_ranks(2, train, laid_out_tp2(text))[0]["weights"]
    config.model.language_model.config = {}
    config.model.language_model.checkpoint = str(tmp_path / "text")
    config.trainer.max_steps = 1
    aligned = run_ranks(1, train, config)[0]["weights"]
    llama = [name for name in aligned if name.startswith("language_model.")]
    assert len(llama) == len(trained)
    for name in llama:
        np.testing.assert_array_equal(aligned[name], trained[name])


def laid_out_tp2(config: RunConfig) -> RunConfig:
    config.trainer.devices = config.model.tensor_model_parallel_size = 2
    return config


def test_inspect_tells_what_is_held_and_what_is_damaged(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config.trainer.max_steps = 1
    run_ranks(1, train, config)
    run = Path(config.exp_manager.explicit_log_dir)
    assert inspect_checkpoint([str(run), "--tensors"]) == 0
    output = capsys.readouterr().out
    assert "step 1, 8 samples consumed" in output and "projectors.image.latents" in output
    [folder] = (run / "checkpoints").glob("step_*")
    weights = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert inspect_checkpoint([str(folder)]) == 2
    assert weights.name in capsys.readouterr().err
