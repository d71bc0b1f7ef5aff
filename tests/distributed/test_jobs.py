"""SFT and DPO runs: stopping and continuing, DPO's cached reference, saved weights, and refused configurations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine import losses, train
from ranks import run_ranks
from tiny import make_config, make_conversations

import megatron_anymal.train.step as train_step
from megatron_anymal.checkpoint.store import CheckpointError
from megatron_anymal.config import ConfigError, LoraConfig, RunConfig
from megatron_anymal.data.index_builder import IndexOptions
from megatron_anymal.data.index_folder import make_index
from megatron_anymal.data.records import DataError
from megatron_anymal.generation.checkpoint_generator import NativeGenerator
from megatron_anymal.model.unsharded_weights import gather_weights
from megatron_anymal.train.build import check_run

ONE: dict[str, Any] = {}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> Path:
    """Folder with conversations, preference pairs (three steps are one epoch), and the runs of this file."""
    base = tmp_path_factory.mktemp("jobs")
    make_conversations(base / "conversations", tokenizer_folder, 40)
    make_conversations(base / "pairs", tokenizer_folder, 24, pairs=True)
    return base


@pytest.fixture(scope="module")
def sft(folder: Path, tokenizer_folder: str) -> RunConfig:
    """Configuration of an SFT run of six steps with dropout and NEFTune noise."""
    config = make_config(str(folder / "conversations"), tokenizer_folder, folder / "sft")
    config.job, config.data.seq_length = "sft", 96
    config.model.lora, config.model.neftune.alpha = LoraConfig(r=4, alpha=8.0, dropout=0.1), 5.0
    # The learning rate depends on the run's length, so partial runs use the schedule of a run of six steps.
    config.model.optim.sched.decay_steps = 6
    return config


@pytest.fixture(scope="module")
def sft_run(sft: RunConfig) -> dict[str, Any]:
    """Results of the SFT run."""
    return run_ranks(1, train, sft)[0]


@pytest.fixture(scope="module")
def dpo(sft: RunConfig, sft_run: dict[str, Any], folder: Path) -> RunConfig:
    """Configuration of a DPO run that starts from the SFT run."""
    config = copy.deepcopy(sft)
    config.job, config.model.restore_from_path = "dpo", sft.exp_manager.explicit_log_dir
    config.data.train["mix"].path = str(folder / "pairs")
    config.exp_manager.explicit_log_dir = str(folder / "dpo")
    for modality in config.model.modalities.values():
        modality.projector.freeze = modality.encoder.freeze = True
    return config


@pytest.fixture(scope="module")
def dpo_run(dpo: RunConfig) -> dict[str, Any]:
    """Results of the DPO run."""
    return run_ranks(1, train_and_count, dpo)[0]


def train_and_count(config: RunConfig) -> dict[str, Any]:
    """In a rank: train; "asked" in the result is the number of reference passes."""
    asked, run_reference = [], train_step._reference_pass

    def counted(*args: Any) -> Any:
        asked.append(1)
        return run_reference(*args)

    train_step._reference_pass = counted
    return {**train(config), "asked": len(asked)}


def changed(config: RunConfig, run_dir: Path, steps: int = 6, **settings: Any) -> RunConfig:
    """Return a copy with another run folder, number of steps and model settings."""
    config = copy.deepcopy(config)
    config.exp_manager.explicit_log_dir, config.trainer.max_steps = str(run_dir), steps
    for name, value in settings.items():
        setattr(config.model, name, value)
    return config


def continued(config: RunConfig, run_dir: Path, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Train three steps under each of two layouts; return the results of the second part, with the losses of both."""
    for steps, layout in ((3, first), (6, second)):
        part = changed(config, run_dir, steps, **layout)
        part.trainer.devices = 2 if layout else 1
        done = run_ranks(part.trainer.devices, train_and_count, part)[0]
    return {**done, "losses": losses(run_dir)}


def assert_identical(resumed: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Assert that the losses of all steps and the final weights are bit-identical."""
    assert resumed["losses"] == wanted["losses"]
    assert resumed["weights"].keys() == wanted["weights"].keys()
    for name, weight in wanted["weights"].items():
        np.testing.assert_array_equal(resumed["weights"][name], weight, err_msg=name)


def assert_close(resumed: dict[str, Any], wanted: dict[str, Any]) -> None:
    np.testing.assert_allclose(resumed["losses"], wanted["losses"], rtol=1e-5)


def test_sft_continues_as_if_it_had_not_stopped(sft: RunConfig, sft_run: dict[str, Any], tmp_path: Path) -> None:
    assert_identical(continued(sft, tmp_path / "run", ONE, ONE), sft_run)


def test_dpo_continues_as_if_it_had_not_stopped(dpo: RunConfig, dpo_run: dict[str, Any], tmp_path: Path) -> None:
    resumed = continued(dpo, tmp_path / "run", ONE, ONE)
    assert_identical(resumed, dpo_run)
    # The second part reads all reference log-probabilities from the file of the first part.
    assert resumed["asked"] == 0


def test_a_recomputed_reference_is_the_cached_one(dpo: RunConfig, dpo_run: dict[str, Any], tmp_path: Path) -> None:
    dpo = copy.deepcopy(dpo)
    dpo.model.dpo.reference = "recomputed"
    whole = run_ranks(1, train_and_count, changed(dpo, tmp_path / "whole"))[0]
    # From the fourth step on, pairs repeat in different packs; the cached values were computed in the first packs.
    assert whole["asked"] == 6 and dpo_run["asked"] == 3
    assert whole["losses"][:3] == dpo_run["losses"][:3]
    np.testing.assert_allclose(whole["losses"], dpo_run["losses"], rtol=1e-6)
    assert not (tmp_path / "whole" / "reference").exists()

    resumed = continued(dpo, tmp_path / "run", ONE, ONE)
    assert_identical(resumed, whole)
    assert resumed["asked"] == 3


@pytest.mark.parametrize(("job", "first", "second"), [("sft", TP2, CP2), ("dpo", PP2, TP2), ("dpo", CP2, PP2)])
def test_continued_under_another_layout(
    request: pytest.FixtureRequest, tmp_path: Path, job: str, first: dict[str, Any], second: dict[str, Any]
) -> None:
    resumed = continued(request.getfixturevalue(job), tmp_path / "run", first, second)
    assert_close(resumed, request.getfixturevalue(f"{job}_run"))
    assert job == "sft" or resumed["asked"] == 0


def test_another_reference_is_asked_anew(dpo: RunConfig, dpo_run: dict[str, Any], folder: Path) -> None:
    earlier = str(folder / "sft" / "checkpoints" / "step_00000003")
    again = changed(dpo, folder / "another", 1, restore_from_path=earlier)
    (folder / "another").mkdir()
    (folder / "another" / "reference").symlink_to(folder / "dpo" / "reference")
    assert run_ranks(1, train_and_count, again)[0]["asked"] == 1


def test_the_reference_is_asked_about_changed_answers(dpo: RunConfig, dpo_run: dict[str, Any], folder: Path) -> None:
    """Pairs with the same keys, in shards of the same names and sizes, but with other answers."""
    (folder / "other_pairs").mkdir()
    for path in (folder / "pairs").glob("*.tar"):
        (folder / "other_pairs" / path.name).write_bytes(path.read_bytes().replace(b" seven", b" eight"))
    make_index(str(folder / "other_pairs"), IndexOptions(dpo.data.tokenizer))
    for name, asked in (("pairs", 0), ("other_pairs", 1)):
        again = changed(dpo, folder / f"again_{name}", 1)
        again.data.train["mix"].path = str(folder / name)
        (folder / f"again_{name}").mkdir()
        (folder / f"again_{name}" / "reference").symlink_to(folder / "dpo" / "reference")
        assert run_ranks(1, train_and_count, again)[0]["asked"] == asked


def media_weights(run_dir: Path, untrained: bool) -> dict[str, np.ndarray]:
    """In a rank: return all weights that generation loads from a run's last checkpoint, except those of the Llama."""
    weights = gather_weights([NativeGenerator.of_run(str(run_dir), untrained=untrained).model])
    assert weights is not None
    return {name: w.numpy().copy() for name, w in weights.items() if not name.startswith("language_model.")}


def test_a_dpo_checkpoint_holds_the_frozen_projectors(
    sft_run: dict[str, Any], dpo_run: dict[str, Any], folder: Path
) -> None:
    saved = run_ranks(1, media_weights, folder / "dpo", False)[0]
    drawn = run_ranks(1, media_weights, folder / "dpo", True)[0]
    assert saved.keys() == {name for name in sft_run["weights"] if not name.startswith("language_model.")}
    for name, weight in saved.items():
        np.testing.assert_array_equal(weight, sft_run["weights"][name], err_msg=name)
    # SFT trained the projectors and the IMU encoder.
    for part in ("projectors.image.", "projectors.audio.", "projectors.imu.", "encoders.imu."):
        assert any((saved[name] != drawn[name]).any() for name in saved if name.startswith(part)), part


def other_rank(config: RunConfig) -> None:
    config.model.lora.r = 2


def other_alpha(config: RunConfig) -> None:
    config.model.lora.alpha = 16.0


def fewer_targets(config: RunConfig) -> None:
    config.model.lora.targets = ["q_proj"]


def no_adapters(config: RunConfig) -> None:
    config.model.lora.r = 0


def other_llama(config: RunConfig) -> None:
    config.model.seed = 99


def data_of(name: str) -> Callable[[RunConfig], None]:
    """Return a change that makes a run read the data of another job."""

    def change(config: RunConfig) -> None:
        path = Path(config.data.train["mix"].path)
        config.data.train["mix"].path = str(path.with_name(name))

    return change


def refused(config: RunConfig) -> tuple[str, str]:
    """In a rank: return the type and the message of the error that ends a run."""
    with pytest.raises((ConfigError, CheckpointError, DataError)) as error:
        check_run(config)
        train(config)
    return error.typename, str(error.value)


@pytest.mark.parametrize(
    ("job", "change", "kind", "words"),
    [
        ("dpo", other_rank, "CheckpointError", ("model.lora.r=4", "2")),
        ("dpo", other_alpha, "CheckpointError", ("model.lora.alpha=8.0", "16.0")),
        ("dpo", fewer_targets, "CheckpointError", ("model.lora.targets=['*']", "['q_proj']")),
        ("dpo", other_llama, "CheckpointError", ("Llama whose weights differ", "model.language_model")),
        ("dpo", data_of("conversations"), "DataError", ("samples with `messages`", "`chosen` and `rejected`")),
        ("sft", other_rank, "CheckpointError", ("model.lora.r=4", "2")),
        ("sft", no_adapters, "CheckpointError", ("model.lora.r=4", "would be lost")),
        ("sft", other_llama, "CheckpointError", ("Llama whose weights differ", "model.language_model")),
        ("sft", data_of("pairs"), "DataError", ("samples with `chosen` and `rejected`", "`parts` or `messages`")),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_what_does_not_go_on_from_an_sft_run_is_refused(
    request: pytest.FixtureRequest,
    sft_run: dict[str, Any],
    tmp_path: Path,
    job: str,
    change: Callable[[RunConfig], None],
    kind: str,
    words: tuple[str, ...],
) -> None:
    base: RunConfig = request.getfixturevalue(job)
    sft: RunConfig = request.getfixturevalue("sft")
    config = changed(base, tmp_path / "run", 1, restore_from_path=sft.exp_manager.explicit_log_dir)
    change(config)
    error_type, text = run_ranks(1, refused, config)[0]
    assert error_type == kind and all(word in text for word in words), text


@pytest.fixture(scope="module")
def images_only(sft: RunConfig, folder: Path, tokenizer_folder: str) -> str:
    """Folder of an SFT run that trains only the image projector, without adapters."""
    config = changed(sft, folder / "images", 1, lora=LoraConfig())
    config.data.train["mix"].path = make_conversations(folder / "about_images", tokenizer_folder, 16, ("image",))
    del config.model.modalities["audio"], config.model.modalities["imu"]
    run_ranks(1, train, config)
    return str(folder / "images")


def test_dpo_from_a_run_without_adapters_is_refused(images_only: str, dpo: RunConfig, tmp_path: Path) -> None:
    config = changed(dpo, tmp_path / "run", 1, restore_from_path=images_only)
    del config.model.modalities["audio"], config.model.modalities["imu"]
    config.data.train["mix"].path = make_conversations(
        tmp_path / "pairs", config.data.tokenizer, 8, ("image",), pairs=True
    )
    kind, text = run_ranks(1, refused, config)[0]
    assert kind == "ConfigError" and "without adapters" in text and "Name an SFT run" in text


def test_a_frozen_projector_that_nothing_trained_is_refused(images_only: str, sft: RunConfig, tmp_path: Path) -> None:
    config = changed(sft, tmp_path / "run", 1, restore_from_path=images_only)
    config.model.modalities["audio"].projector.freeze = True
    kind, text = run_ranks(1, refused, config)[0]
    assert kind == "CheckpointError" and "model.modalities.audio.projector.freeze" in text


@pytest.mark.parametrize("change", [other_rank, other_alpha, fewer_targets, no_adapters])
def test_a_run_does_not_go_on_with_other_adapters(
    sft: RunConfig, sft_run: dict[str, Any], change: Callable[[RunConfig], None]
) -> None:
    config = copy.deepcopy(sft)
    config.trainer.max_steps = 7
    change(config)
    kind, text = run_ranks(1, refused, config)[0]
    assert kind == "CheckpointError" and "Set model.lora as in that run" in text


def test_a_dpo_run_does_not_go_on_with_another_reference(dpo: RunConfig, dpo_run: dict[str, Any], folder: Path) -> None:
    earlier = str(folder / "sft" / "checkpoints" / "step_00000003")
    kind, text = run_ranks(1, refused, changed(dpo, folder / "dpo", 7, restore_from_path=earlier))[0]
    assert kind == "ConfigError" and "another reference" in text
