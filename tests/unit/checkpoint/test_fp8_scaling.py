"""Scaling state in checkpoints is data, whatever Transformer Engine's modules hand out and take."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_anymal.checkpoint import fp8_scaling
from megatron_anymal.checkpoint.store import CheckpointError


class Scaled(nn.Linear):
    """A module that, like Transformer Engine's, pickles its state with a recipe and unpickles what it is given."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.fp8_meta: dict[str, Any] = {}
        self.config, self.state = SimpleNamespace(fp4=None), {"recipe": Scaled, "scale_fwd": torch.tensor([2.0])}

    def get_extra_state(self) -> Tensor:
        return torch.frombuffer(bytearray(pickle.dumps(self.state)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        self.state = pickle.loads(state.numpy().tobytes())


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    model: Any = nn.Module()
    model.language_model = nn.Sequential(Scaled())
    monkeypatch.setattr(fp8_scaling, "whole_name", lambda model, name: name)
    monkeypatch.setattr(fp8_scaling, "_shard", lambda name, state: state)
    monkeypatch.setattr(fp8_scaling, "get_fp8_recipe", lambda config: "of the run")
    monkeypatch.setattr(fp8_scaling, "get_fp4_recipe", lambda config: f"of {config.fp4}")
    return model


NAME = "language_model.0.fp8_scaling"


def test_what_is_stored_has_no_recipe_and_what_is_set_has_the_runs(model: Any) -> None:
    stored = fp8_scaling.sharded_scaling([model])
    assert stored == {NAME: {"scale_fwd": torch.tensor([2.0])}}
    module = model.language_model[0]
    module.state = {}
    fp8_scaling.set_scaling([model], stored)
    assert module.state == {"recipe": "of the run", "scale_fwd": torch.tensor([2.0])}


def test_a_module_that_computes_in_nvfp4_has_its_recipe(model: Any) -> None:
    stored = fp8_scaling.sharded_scaling([model])
    module = model.language_model[0]
    module.config.fp4 = "e2m1"
    fp8_scaling.set_scaling([model], stored)
    assert module.state["recipe"] == "of e2m1"


def test_a_module_that_has_not_computed_in_fp8_has_no_state(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scaled, "get_extra_state", lambda self: torch.empty(0, dtype=torch.uint8))
    monkeypatch.delattr(Scaled, "set_extra_state")
    stored = fp8_scaling.sharded_scaling([model])
    assert stored == {NAME: {}}
    fp8_scaling.set_scaling([model], stored)


class MakeFolder(SimpleNamespace):
    """Creates a folder when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def test_bytes_that_could_be_a_pickle_are_refused(model: Any, tmp_path: Path) -> None:
    content = pickle.dumps({"scale_fwd": MakeFolder(folder=str(tmp_path / "ran"))})
    loaded = {NAME: torch.frombuffer(bytearray(content), dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match=r"language_model\.0\.fp8_scaling' is Tensor instead of named data"):
        fp8_scaling.set_scaling([model], loaded)
    assert not (tmp_path / "ran").exists()
