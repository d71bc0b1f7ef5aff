"""Checkpoint settings that have no effect or cannot work are refused with the key and the fix."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_anymal.config import ConfigError, DatasetConfig, ModalityConfig, RunConfig
from megatron_anymal.config.validation import check


def with_rules(**rules: Any) -> RunConfig:
    config = RunConfig()
    config.model.language_model.config = {"hidden_size": 64}
    config.model.modalities = {"image": ModalityConfig(placeholder="<a>")}
    config.model.modalities["image"].encoder.type = "clip"
    config.data.tokenizer, config.data.train = "tok", {"a": DatasetConfig(path="p")}
    config.data.validation = {"a": DatasetConfig(path="v")}
    config.trainer.val_check_interval = config.exp_manager.checkpoint.every_n_train_steps = 100
    for name, value in rules.items():
        setattr(config.exp_manager.checkpoint, name, value)
    return config


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"async_save": False, "keep_last": 0},
        {"keep_every_n_steps": 300},
        {"keep_best": 2},
        {"keep_best": 1, "keep_best_metric": "val_loss/image", "keep_best_mode": "max"},
        {"keep_best": 1, "keep_best_metric": "val_loss/text"},
    ],
)
def test_what_can_be_done_is_accepted(rules: dict[str, Any]) -> None:
    check(with_rules(**rules))


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"keep_last": -1}, "keep_last=-1 must be at least 0"),
        ({"keep_last": 0, "keep_best": 1}, "keep_best has no effect"),
        ({"keep_last": 0, "keep_every_n_steps": 100}, "keep_every_n_steps has no effect"),
        ({"keep_every_n_steps": 150}, "must be a multiple of exp_manager.checkpoint.every_n_train_steps=100"),
        ({"keep_every_n_steps": 150, "every_n_train_steps": 0}, "must be a multiple of"),
        ({"keep_best_metric": "val_loss/image"}, "have no effect with keep_best=0"),
        ({"keep_best_mode": "max"}, "have no effect with keep_best=0"),
        ({"keep_best": 1, "keep_best_mode": "least"}, "'least' is not one of 'min', 'max'"),
        ({"keep_best": 1, "keep_best_metric": "val_loss/audio"}, "not one of val_loss, val_loss/text, val_loss/image"),
        ({"keep_best": 1, "every_n_train_steps": 150}, "must be a multiple of trainer.val_check_interval=100"),
    ],
)
def test_what_cannot_is_refused(rules: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(with_rules(**rules))
    assert words in str(error.value)


@pytest.mark.parametrize("missing", ["data", "interval", "batches"])
def test_the_best_need_validations(missing: str) -> None:
    config = with_rules(keep_best=1)
    if missing == "data":
        config.data.validation = {}
    elif missing == "interval":
        config.trainer.val_check_interval = 0
    else:
        config.trainer.limit_val_batches = 0
    with pytest.raises(ConfigError, match="keep_best=1 needs validations"):
        check(config)


def test_a_lock_timeout_of_nothing_is_refused() -> None:
    config = with_rules()
    config.exp_manager.lock_timeout_seconds = 0
    with pytest.raises(ConfigError, match="lock_timeout_seconds=0 must be at least 1"):
        check(config)
