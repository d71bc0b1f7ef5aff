"""What a rank imports, and that deferred packages are available as soon as they are needed."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, Optional

import pytest
import torch
import yaml
from tiny import make_config, make_shards, make_tokenizer

from megatron_anymal import lean_imports
from megatron_anymal.dependencies.megatron_line import of_python
from megatron_anymal.lean_imports import hooks, libraries
from megatron_anymal.lean_imports.deferral import Deferral, Later

PACKAGES = Path(__file__).with_name("rank_packages.json")
# Imported by no rank on a CPU: the compiler, metrics, tokenizers and losses of NeMo.
KEPT_OUT = (
    "wandb",
    "torch._dynamo.eval_frame",
    "torch._inductor.compile_fx",
    "torchmetrics.functional",
    "scipy.signal",
    "scipy.optimize._optimize",
    "nemo.collections.common.tokenizers",
    "pandas.core",
    "s3fs",
    "botocore",
)
# What a process reports that has run a step; one process, since importing everything takes seconds.
CODE = f"""
import importlib, json, sys
# The tests' S3 server needs it, and accelerate imports what is installed.
sys.modules["boto3"] = None
from megatron_anymal.__main__ import main
from megatron_anymal.lean_imports import libraries
seen = dict(code=main(["pretrain", *sys.argv[1:]]))
seen["modules"] = sorted(name for name, module in sys.modules.items() if module)

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
seen["fuse"] = getattr(jit.jit_fuser, "func", None) is libraries._compiled_later

from scipy.optimize import linear_sum_assignment
seen["assigned"] = linear_sum_assignment([[1, 0], [0, 1]])[1].tolist()

for name in {KEPT_OUT}:
    if importlib.util.find_spec(name.split(".")[0]):
        importlib.import_module(name)
print("SEEN" + json.dumps(seen))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `CODE` reports."""
    folder = tmp_path_factory.mktemp("rank")
    tokenizer = make_tokenizer(folder / "tokenizer")
    values = make_config(make_shards(folder / "data", tokenizer, 8, ("image",)), tokenizer, folder / "run").to_dict()
    values["trainer"]["max_steps"] = 1
    values["model"]["modalities"] = {"image": values["model"]["modalities"]["image"]}
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"defaults": ["anymal", "_self_"], **values}))
    command = [sys.executable, "-W", "ignore", "-c", CODE, f"--config-path={folder}", "--config-name=tiny"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("SEEN")[1])


def test_a_rank_imports_the_listed_packages_only(seen: dict[str, Any]) -> None:
    """A library that a new version brings in is looked at before it is listed. To list what there is now, run this file
    with ANYMAL_UPDATE=1."""
    counts = Counter(name.split(".")[0] for name in seen["modules"])
    # Python 3.12 no longer has distutils; setuptools brings its own under that name.
    ignored = {*sys.stdlib_module_names, "distutils"}
    packages = {
        name: count
        for name, count in sorted(counts.items())
        if name not in ignored and not name.startswith(("_", "test"))
    }
    if os.environ.get("ANYMAL_UPDATE"):
        PACKAGES.write_text(json.dumps(packages, indent=1) + "\n")
    assert seen["code"] == 0
    listed = json.loads(PACKAGES.read_text())
    if not of_python().needs_triton:
        del listed["triton"]
    assert packages.keys() <= listed.keys()
    # Twice as many modules of a package: a part of it that was not imported before.
    assert not {name: (count, listed[name]) for name, count in packages.items() if count > 2 * listed[name] + 10}
    assert not [name for name in KEPT_OUT if name in seen["modules"]]


def test_deferred_packages_are_complete_once_more_is_asked_of_them(seen: dict[str, Any]) -> None:
    assert not seen["early"] and seen["mean"] == 2.0 and seen["same"]
    assert not seen["early_losses"] and seen["losses"]
    assert seen["version"] == version("pandas") and seen["rows"] == 3
    assert seen["fuse"] and seen["assigned"] == [1, 0]


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
    example = Deferral(("lean_example.gone",), {"Part": ("lean_example.gone",)})
    monkeypatch.setattr(hooks, "deferred", lambda: {"lean_example": example})
    monkeypatch.setattr(sys, "meta_path", [hooks.Finder(), *sys.meta_path])
    import lean_example  # type: ignore[import-not-found]

    assert "BASE" not in vars(lean_example)
    assert lean_example.Part.base == 1
    with pytest.raises(AttributeError, match=r"lean_example.*nothing"):
        getattr(lean_example, "nothing")  # noqa: B009


def test_wandb_is_hidden_only_while_megatron_core_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with libraries._without("wandb")(sys), pytest.raises(ImportError):
        import wandb  # noqa: F401
    assert "wandb" not in sys.modules
    present = ModuleType("wandb")
    monkeypatch.setitem(sys.modules, "wandb", present)
    with libraries._without("wandb")(sys):
        assert sys.modules["wandb"] is present


def test_fused_functions_are_compiled_at_their_first_call_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def fuse(function: Callable[..., int]) -> Callable[..., int]:
        compiled.append(function)
        return lambda *args, **kwargs: function(*args, **kwargs) + 1

    def times(x: int, by: int = 2) -> int:
        return x * by

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    eager = libraries._compiled_later(fuse, times)
    assert (eager(3), eager(3, by=3), compiled, eager.__name__) == (6, 9, [], "times")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    later = libraries._compiled_later(fuse, times)
    assert compiled == []
    assert (later(3), later(4, by=3), compiled) == (7, 13, [times])


@pytest.mark.parametrize("driver", [True, False])
def test_a_module_that_decorates_with_the_compiler_does_not_import_it(
    driver: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU its functions run as they are; other functions are compiled, and torch.compile is put back."""
    compiled: list[Any] = []

    def compiler(function: Any, **options: Any) -> str:
        compiled.append((function.__name__, options))
        return "compiled"

    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(libraries, "has_nvidia_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def inner(x: int) -> int:
        return x + 1

    def outer(x: int) -> int:
        return x

    inner.__module__ = "lean_decorating"
    with libraries._decorating_later(ModuleType("lean_decorating")):
        decorated: Any = torch.compile(inner, dynamic=True)
        other: Any = torch.compile(outer)
    assert torch.compile is compiler and other == "compiled"
    if driver:
        assert decorated == "compiled" and compiled == [("inner", {"dynamic": True}), ("outer", {})]
    else:
        assert decorated(1) == 2 and decorated.__name__ == "inner" and compiled == [("outer", {})]


def test_an_attribute_of_a_package_that_has_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It has no instances, fits into type hints, and becomes the real one when it is used or subclassed."""
    (tmp_path / "lean_later.py").write_text("class Thing:\n    size = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    later = Deferral(values={"Thing": lambda: Later("lean_later", "Thing", known=1)})
    monkeypatch.setattr(hooks, "deferred", lambda: {"lean_later": later})
    monkeypatch.setattr(sys, "meta_path", [hooks.Finder(), *sys.meta_path])
    import lean_later  # type: ignore[import-not-found]

    stand_in: Any = lean_later.Thing
    assert Optional[stand_in] and not isinstance(3, stand_in) and not issubclass(int, stand_in) and stand_in.known == 1
    assert isinstance(copy.copy(stand_in), Later) and lean_later.Thing is stand_in
    assert stand_in.size == 3
    assert isinstance(lean_later.Thing, type) and isinstance(stand_in(), lean_later.Thing)
    assert isinstance(lean_later.Thing(), stand_in) and issubclass(lean_later.Thing, stand_in)
    assert issubclass(type("More", stand_in.__mro_entries__(()), {}), lean_later.Thing)


def test_the_folder_of_models_is_read_once_and_handed_out_twice(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "__init__.py").touch()
    calls = []

    def read(folder: str) -> dict[str, Any]:
        calls.append(folder)
        return {path.name: structure(path) for path in Path(folder).iterdir() if path.is_dir()} or {"names": {"A"}}

    structure = libraries._read_once(read)
    first = structure(tmp_path / "__init__.py")
    first["inner"]["names"].add("B")
    assert structure(tmp_path) == {"inner": {"names": {"A"}}}
    assert [Path(call).name for call in calls] == [tmp_path.name, "inner"]


def test_with_a_gpu_the_compiler_is_imported_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    for present in (True, False):
        monkeypatch.setattr(libraries, "has_nvidia_driver", lambda present=present: present)
        assert ("torch._dynamo" in libraries.deferred.__wrapped__()) is not present


@pytest.mark.parametrize("around", [libraries._compiling_later, libraries._reading_once])
def test_a_version_without_the_function_to_replace_is_left_alone(around: Any) -> None:
    module = ModuleType("lean_other_version")
    before = dict(vars(module))
    with around(module):
        pass
    assert vars(module) == before


def test_a_spawned_process_that_encodes_media_is_lean() -> None:
    """It imports neither megatron-core, which it does not use, nor what the hooks keep out."""
    target, context = "megatron_anymal.train.encode_ahead:_device", multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, lean_imports.call, (target, 0)) as pool:
        loaded = set(pool.submit(eval, "list(__import__('sys').modules)").result(timeout=240))
    assert {"torch", "megatron_anymal.train.encode_ahead"} <= loaded
    assert loaded.isdisjoint({"megatron.core", "wandb", "torch._inductor"})
