"""`anymal doctor`: states, exit codes, and the unrelated package named apex."""

import dataclasses
import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_anymal import backend, environment
from megatron_anymal.cli import doctor
from megatron_anymal.config import ConfigError, RunConfig
from megatron_anymal.dependencies.installed import apex_kind, has_nvidia_driver, is_importable
from megatron_anymal.dependencies.megatron_line import LINES, NEWER, OLDER, of_python

ROOT = Path(__file__).parents[3]


def finding(name: str) -> environment.Finding:
    (diagnosis,) = [diagnosis for diagnosis in environment.examine() if diagnosis.part == name]
    return diagnosis


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that comes before all others in the search for modules and distributions."""
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return tmp_path


def add_distribution(site: Path, name: str, version: str, *files: str) -> None:
    for file in files:
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text("raise SystemExit('must not be imported')\n")
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    importlib.invalidate_caches()


def test_foreign_apex_is_recognised_and_not_imported(site):
    add_distribution(site, "apex", "0.9.10.dev0", "apex/__init__.py", "apex/models.py")
    assert apex_kind() == "foreign" and backend.capabilities().foreign_apex
    assert not backend.capabilities().nvidia_apex
    diagnosis = finding("apex")
    assert (diagnosis.state, diagnosis.version) == (environment.FOREIGN, "0.9.10.dev0")
    assert diagnosis.fix.startswith("pip uninstall -y apex") and "-e '.[apex]'" in diagnosis.fix


def test_nvidia_apex(site):
    add_distribution(site, "apex", "0.1", "apex/__init__.py", "apex/optimizers/__init__.py")
    assert apex_kind() == "nvidia"
    # The Python modules without the compiled kernels are not enough.
    assert not backend.capabilities().nvidia_apex and finding("apex").state == environment.BROKEN
    (site / "amp_C.py").write_text("")
    importlib.invalidate_caches()
    assert backend.capabilities().nvidia_apex and finding("apex").state == environment.OK


def test_version_out_of_range_and_exit_code(site, capsys):
    assert doctor.main([]) == 0
    assert "All required components are installed." in capsys.readouterr().out
    add_distribution(site, "psutil", "1.0")
    assert finding("psutil").state == environment.OUT_OF_RANGE
    assert doctor.main([]) == 1
    shown = capsys.readouterr().out
    assert "pip install 'psutil>=5.9'" in shown and "Fix first: psutil." in shown


def test_half_of_transformer_engine_is_named(site):
    add_distribution(site, "transformer_engine", "2.11.0", "transformer_engine/__init__.py")
    diagnosis = finding("transformer-engine")
    assert diagnosis.state == environment.BROKEN and "--force-reinstall" in diagnosis.fix and "[te]" in diagnosis.fix
    # The folder of PyPI's package; a build from source has it in the others.
    for folder in ("transformer_engine/wheel_lib", "transformer_engine", "."):
        extension = site / folder / "transformer_engine_torch.cpython-311-x86_64-linux-gnu.so"
        extension.parent.mkdir(exist_ok=True)
        extension.write_text("")
        # The rest can only be checked with a GPU.
        assert has_nvidia_driver() or finding("transformer-engine").state == environment.OK
        extension.unlink()
    assert finding("transformer-engine").state == environment.BROKEN


@pytest.mark.parametrize(("value", "state"), [(None, "ok"), ("0", "ok"), ("1", "not deterministic")])
def test_attention_that_does_not_repeat_is_named(site, monkeypatch, value, state):
    variable = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"
    monkeypatch.delenv(variable, raising=False)
    if not is_importable("transformer_engine"):
        assert variable not in {diagnosis.part for diagnosis in environment.examine()}
        add_distribution(site, "transformer_engine", "2.11.0", "transformer_engine/__init__.py")
    if value is not None:
        monkeypatch.setenv(variable, value)
    diagnosis = finding(variable)
    assert (diagnosis.version, diagnosis.state) == (value or "0", state)
    assert (f"unset {variable}" in diagnosis.fix) == (state != "ok") and not diagnosis.required


HALF = """
import builtins
import sys
from megatron_anymal import lean_imports
if sys.argv[1] == "hooks":
    lean_imports.install()
for raised in (FileNotFoundError, OSError, RuntimeError, AssertionError):
    builtins.raised = raised
    try:
        import transformer_engine
    except ImportError as error:
        print(error)
from megatron_anymal import backend
print(backend._transformer_engine(True))
"""
RAISES = "import builtins\nraise builtins.raised('no library')\n"


@pytest.mark.parametrize(("hooks", "code"), [("hooks", 0), ("none", 1)])
def test_half_of_transformer_engine_counts_as_none(site, hooks, code):
    """Without one of its parts, version 2.11 raises errors that `except ImportError` does not catch."""
    (site / "transformer_engine" / "pytorch").mkdir(parents=True)
    (site / "transformer_engine" / "__init__.py").write_text("from . import pytorch\n")
    (site / "transformer_engine" / "pytorch" / "__init__.py").write_text(RAISES)
    environment = {**os.environ, "PYTHONPATH": f"{site}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HALF, hooks],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )
    assert done.returncode == code
    if not code:
        *each, last_line = done.stdout.splitlines()
        assert len(each) == 4
        assert all(one.startswith("no library; pip install --no-build-isolation -e '.[te]'") for one in each)
        assert "it does not import (ImportError: no library; pip install" in last_line


def test_missing_required_part(monkeypatch, capsys):
    present, version = environment.is_importable, environment.version_of
    monkeypatch.setattr(environment, "is_importable", lambda module: module != "webdataset" and present(module))
    monkeypatch.setattr(environment, "version_of", lambda name: "" if name == "webdataset" else version(name))
    assert finding("webdataset").state == environment.MISSING
    assert doctor.main(["--json"]) == 1
    rows = {row["part"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["webdataset"]["fix"] == "pip install 'webdataset>=1.0,<2'" and rows["webdataset"]["cost"]
    assert rows["torch"]["state"] == "ok" and rows["torch"]["fix"] == ""
    optional = {"transformer-engine", "flash-attn", "apex", "nvidia-resiliency-ext", "s3fs", "gcsfs", "wandb"}
    wanted = {"python", "CUDA", *optional}
    assert wanted <= set(rows)


def test_missing_optional_part_does_not_fail(monkeypatch):
    present = environment.is_importable
    monkeypatch.setattr(environment, "is_importable", lambda module: module != "s3fs" and present(module))
    monkeypatch.setattr(environment, "version_of", lambda name: "" if name == "s3fs" else "1")
    diagnosis = finding("s3fs")
    assert (diagnosis.state, diagnosis.required, diagnosis.fix) == (
        environment.MISSING,
        False,
        "pip install -e '.[s3]'",
    )


def setup_requirements() -> tuple[list[str], dict[str, list[str]]]:
    setup: dict[str, Any] = runpy.run_path(str(ROOT / "setup.py"), run_name="not_main")
    return setup["INSTALL_REQUIRES"], setup["EXTRAS_REQUIRE"]


def ranges_of(listed: list[str], python: str) -> dict[str, set[str]]:
    """Distribution -> its ranges under a version of Python."""
    ranges: dict[str, set[str]] = {}
    for requirement in map(Requirement, listed):
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            ranges.setdefault(requirement.name, set()).add(str(requirement.specifier))
    return ranges


def test_ranges_are_those_of_setup_py():
    always, extras = setup_requirements()
    ranges = ranges_of([*always, *(one for extra in extras.values() for one in extra)], python_version())
    # Lightning comes with nemo_toolkit, wandb with its logger; apex has no release that could be named.
    for part in environment.REQUIREMENTS:
        if part.distribution not in ("lightning", "wandb", "apex"):
            assert str(SpecifierSet(part.versions)) in ranges[part.distribution], part.distribution
        if part.extra not in ("", "wandb"):
            assert any(one.startswith(part.distribution) for one in extras[part.extra])


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.version)
def test_each_python_brings_its_line_of_megatron_core(line):
    always, extras = setup_requirements()
    ranges = ranges_of([*always, *extras["resiliency"]], ".".join(map(str, line.python)))
    assert ranges["megatron-core"] == {f"=={line.version}"} and of_python(line.python) is line
    assert ranges["nvidia-resiliency-ext"] == {str(SpecifierSet(line.resiliency))}
    assert ("triton" in ranges) == line.needs_triton


def python_version() -> str:
    return ".".join(map(str, sys.version_info[:2]))


def test_the_line_in_use_is_shown_with_what_it_lacks(capsys):
    doctor.main([])
    shown = capsys.readouterr().out.splitlines()
    [row] = [number for number, text in enumerate(shown) if text.startswith("megatron-core")]
    assert of_python().version in shown[row]
    lacks = of_python().lacks
    assert lacks and [text.strip() for text in shown[row + 1 : row + 1 + len(lacks)]] == [f"lacks: {x}" for x in lacks]


@pytest.mark.parametrize("breaks", [True, False])
def test_a_version_that_breaks_the_others_is_required_to_change(site, monkeypatch, breaks):
    [part] = [one for one in environment.REQUIREMENTS if one.distribution == "nvidia-resiliency-ext"]
    part = dataclasses.replace(part, breaks=breaks, versions=">=0.6,<0.7")
    monkeypatch.setattr(environment, "REQUIREMENTS", (environment.REQUIREMENTS[0], part))
    assert not finding("nvidia-resiliency-ext").required
    add_distribution(site, "nvidia_resiliency_ext", "0.4.1", "nvidia_resiliency_ext/__init__.py")
    diagnosis = finding("nvidia-resiliency-ext")
    assert (diagnosis.state, diagnosis.required) == (environment.OUT_OF_RANGE, breaks)


@pytest.mark.parametrize(
    ("line", "libc", "missing", "other"),
    [
        (OLDER, ("glibc", "2.36"), "pip install -e '.[resiliency]'", "pip install -e '.[resiliency]'"),
        (NEWER, ("glibc", "2.39"), "pip install -e '.[resiliency]'", "pip install -e '.[resiliency]'"),
        (NEWER, ("glibc", "2.36"), "none on this system: its wheels need glibc 2.39", "pip uninstall -y"),
        (OLDER, ("", ""), "none on this system: its wheels need glibc", "pip uninstall -y"),
    ],
)
def test_the_package_whose_wheels_need_a_newer_system_is_not_to_be_installed(
    site, monkeypatch, line, libc, missing, other
):
    monkeypatch.setattr(environment, "LINE", line)
    monkeypatch.setattr("platform.libc_ver", lambda: libc)
    monkeypatch.setattr(
        environment, "is_importable", lambda module: module != "nvidia_resiliency_ext" and is_importable(module)
    )
    [part] = [one for one in environment.REQUIREMENTS if one.distribution == "nvidia-resiliency-ext"]
    monkeypatch.setattr(environment, "REQUIREMENTS", (environment.REQUIREMENTS[0], part))
    monkeypatch.setattr(environment, "version_of", lambda name: "")
    package_finding = finding("nvidia-resiliency-ext")
    assert package_finding.state == environment.MISSING and package_finding.fix.startswith(missing)
    monkeypatch.setattr(environment, "is_importable", lambda module: True)
    monkeypatch.setattr(environment, "version_of", lambda name: "0.3.0")
    package_finding = finding("nvidia-resiliency-ext")
    assert package_finding.state == environment.OUT_OF_RANGE and package_finding.fix.startswith(other)


FAKE = backend.Capabilities(("H100",), (9, 0), "2.11.0", "", "", False, False, "", True, True)


@pytest.mark.parametrize(
    ("changes", "model", "precision", "says"),
    [
        (
            {"transformer_engine": "", "transformer_engine_problem": "it is not installed"},
            {"fp8": "hybrid"},
            "bf16",
            "te",
        ),
        ({}, {"fp8": "hybrid", "transformer_impl": "local"}, "bf16", "no effect with model.transformer_impl=local"),
        ({"fp8": False, "compute_capability": (8, 0)}, {"fp8": "hybrid"}, "bf16", "8.9.*here it is 8.0"),
        ({}, {"fp8": "e4m3"}, "32", "trainer.precision=bf16"),
        (
            {"transformer_engine": "", "transformer_engine_problem": "it does not import"},
            {"transformer_impl": "transformer_engine"},
            "bf16",
            "it does not import.*set model.transformer_impl=auto",
        ),
        ({"bf16": False, "compute_capability": (7, 0)}, {}, "bf16", "Set trainer.precision=32"),
    ],
)
def test_check_backend_refuses(monkeypatch, changes, model, precision, says):
    monkeypatch.setattr(backend, "capabilities", lambda: dataclasses.replace(FAKE, **changes))
    config = RunConfig()
    config.trainer.precision = precision
    for key, value in model.items():
        setattr(config.model, key, value)
    with pytest.raises(ConfigError, match=says):
        backend.check_backend(config.model, config.trainer.precision)


def test_check_backend_accepts(monkeypatch):
    monkeypatch.setattr(backend, "capabilities", lambda: FAKE)
    config = RunConfig()
    config.model.fp8 = "hybrid"
    backend.check_backend(config.model, config.trainer.precision)


def test_fp8_is_refused_without_a_card():
    if backend.capabilities().fp8:
        pytest.skip("this machine has FP8")
    config = RunConfig()
    config.model.fp8 = "hybrid"
    with pytest.raises(ConfigError, match=r"model\.fp8=hybrid needs"):
        backend.check_backend(config.model, config.trainer.precision)


def test_more_processes_than_cards(monkeypatch):
    monkeypatch.setattr(backend.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert backend.device().index == 1 and backend.collectives_backend() == "nccl"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="to 2 at most"):
        backend.device()
