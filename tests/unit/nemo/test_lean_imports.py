"""What a rank imports, and that what is kept out is there as soon as it is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_anymal import lean_imports

RANK = "megatron_anymal.nemo.model, nemo.utils.exp_manager, megatron_anymal.train.loop"
PACKAGES = Path(__file__).with_name("rank_packages.json")
# Imported by no rank: the compiler's backend, metrics, tokenizers and losses of NeMo.
KEPT_OUT = (
    "wandb",
    "torch._inductor.compile_fx",
    "torchmetrics.functional",
    "scipy.signal",
    "nemo.collections.common.tokenizers",
    "pandas.core",
)
# What a process with the hooks reports; one process, since importing everything takes seconds.
CODE = f"""
import importlib, json, sys
from megatron_anymal import lean_imports
lean_imports.install()
import {RANK}
seen = dict(modules=sorted(sys.modules))

from torchmetrics import Metric, MetricCollection
seen["early"] = "torchmetrics.aggregation" in sys.modules
from torchmetrics import MeanMetric
mean = MeanMetric()
mean.update(1.0), mean.update(3.0)
seen["mean"] = float(MetricCollection([mean]).compute()["MeanMetric"])
seen["same"] = issubclass(MeanMetric, Metric)

import nemo.collections.common.callbacks
seen["early_losses"] = "nemo.collections.common.losses" in sys.modules
from nemo.collections.common.parts.preprocessing import collections
seen["losses"] = "nemo.collections.common.losses" in sys.modules

import pandas
seen["version"] = pandas.__version__
seen["rows"] = len(pandas.DataFrame(dict(a=[1, 2, 3])))

from megatron.core import jit
seen["fuse"] = getattr(jit.jit_fuser, "func", None) is lean_imports._compiled_later

for name in {KEPT_OUT}:
    if importlib.util.find_spec(name.split(".")[0]):
        importlib.import_module(name)
print("SEEN" + json.dumps(seen))
"""


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What `CODE` reports."""
    command = [sys.executable, "-W", "ignore", "-c", CODE]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("SEEN")[1])


def test_a_rank_imports_the_listed_packages_only(seen: dict[str, Any]) -> None:
    """A library that a new version brings in is looked at before it is listed. To list what there is now, run this file
    with ANYMAL_UPDATE=1."""
    counts = Counter(name.split(".")[0] for name in seen["modules"])
    ignored = sys.stdlib_module_names
    found = {
        name: count
        for name, count in sorted(counts.items())
        if name not in ignored and not name.startswith(("_", "test"))
    }
    if os.environ.get("ANYMAL_UPDATE"):
        PACKAGES.write_text(json.dumps(found, indent=1) + "\n")
    listed = json.loads(PACKAGES.read_text())
    assert found.keys() <= listed.keys()
    # Twice as many modules of a package: a part of it that was not imported before.
    assert not {name: (count, listed[name]) for name, count in found.items() if count > 2 * listed[name] + 10}
    assert not [name for name in KEPT_OUT if name in seen["modules"]]


def test_deferred_packages_are_complete_once_more_is_asked_of_them(seen: dict[str, Any]) -> None:
    assert not seen["early"] and seen["mean"] == 2.0 and seen["same"]
    assert not seen["early_losses"] and seen["losses"]
    assert seen["version"] == version("pandas") and seen["rows"] == 3
    assert seen["fuse"]


def test_another_version_of_a_deferred_package_is_run_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A package whose listed submodule has gone, or needs the package's code first, is imported as usual."""
    for name, text in {
        "__init__.py": "BASE = 1\nfrom lean_example.parts import Part\n",
        "parts.py": "from lean_example import BASE\nclass Part:\n    base = BASE\n",
    }.items():
        path = tmp_path / "lean_example" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(
        lean_imports._DEFERRED,
        "lean_example",
        lean_imports._Deferral(("lean_example.gone",), {"Part": ("lean_example.gone",)}),
    )
    monkeypatch.setattr(sys, "meta_path", [lean_imports._Finder(), *sys.meta_path])
    import lean_example  # type: ignore[import-not-found]

    assert "BASE" not in vars(lean_example)
    assert lean_example.Part.base == 1
    with pytest.raises(AttributeError, match=r"lean_example.*nothing"):
        getattr(lean_example, "nothing")  # noqa: B009


def test_wandb_is_hidden_only_while_megatron_core_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with lean_imports._without_wandb(sys), pytest.raises(ImportError):
        import wandb  # noqa: F401
    assert "wandb" not in sys.modules
    present = ModuleType("wandb")
    monkeypatch.setitem(sys.modules, "wandb", present)
    with lean_imports._without_wandb(sys):
        assert sys.modules["wandb"] is present


def test_fused_functions_are_compiled_at_their_first_call_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def fuse(function: Callable[..., int]) -> Callable[..., int]:
        compiled.append(function)
        return lambda *args, **kwargs: function(*args, **kwargs) + 1

    def times(x: int, by: int = 2) -> int:
        return x * by

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    eager = lean_imports._compiled_later(fuse, times)
    assert (eager(3), eager(3, by=3), compiled, eager.__name__) == (6, 9, [], "times")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    later = lean_imports._compiled_later(fuse, times)
    assert compiled == []
    assert (later(3), later(4, by=3), compiled) == (7, 13, [times])
