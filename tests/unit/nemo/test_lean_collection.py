"""While libraries are loaded, Python's cycle collector does not run, and later it leaves their objects out."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import run_ranks

from megatron_anymal.checkpoint import sharding
from megatron_anymal.lean_imports import frozen_objects, hooks

# Prints the collections during the import, the objects that it left out, and whether the collector runs again. Python
# 3.12 leaves out objects of its own when it starts: `python -c 'import gc; print(gc.get_freeze_count())'` prints 375
# with 3.12.1, and 0 with 3.11.
CODE = """
import gc, json, sys
from megatron_anymal import lean_imports
if sys.argv[1] == "hooks":
    lean_imports.install()
seen, at_start = [], gc.get_freeze_count()
gc.callbacks.append(lambda phase, info: phase == "stop" and seen.append(info["generation"]))
import torch
during, frozen = len(seen), gc.get_freeze_count() - at_start
print(json.dumps([during, frozen, gc.isenabled()]))
"""


@pytest.mark.parametrize("hooked", [True, False])
def test_the_collector_does_not_run_while_torch_is_imported(hooked: bool) -> None:
    """Without the hooks it does, or this test would show nothing."""
    command = [sys.executable, "-c", CODE, "hooks" if hooked else "plain"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    during, frozen, enabled = json.loads(done.stdout)
    assert enabled
    if hooked:
        assert during == 0 and frozen > 100_000
    else:
        assert during > 100 and frozen == 0


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """A large package `lean_large`, a small one and a broken one; the list counts calls of gc.freeze."""
    frozen: list[int] = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(len(sys.modules)))
    monkeypatch.setattr(hooks, "_LARGE", {"lean_large", "lean_small", "lean_broken"})
    monkeypatch.setattr(sys, "meta_path", [hooks.Finder(), *sys.meta_path])
    monkeypatch.syspath_prepend(str(tmp_path))
    state = "import gc\nENABLED = gc.isenabled()\n"
    imports = "".join(f"import lean_large.part{number}\n" for number in range(hooks._MANY))
    for name, text in (("lean_large", state + imports), ("lean_small", state), ("lean_broken", "1 / 0\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    for number in range(hooks._MANY):
        (tmp_path / "lean_large" / f"part{number}.py").write_text(state)
    return frozen


def test_only_large_imports_are_left_out_of_later_collections(large: list[int]) -> None:
    import lean_small  # type: ignore[import-not-found]

    assert gc.isenabled() and not lean_small.ENABLED and not large
    import lean_large  # type: ignore[import-not-found]

    assert gc.isenabled() and not lean_large.ENABLED and not lean_large.part7.ENABLED and len(large) == 1


def test_the_collector_runs_again_after_a_failed_import_and_stays_off_if_it_was(large: list[int]) -> None:
    with pytest.raises(ZeroDivisionError):
        import lean_broken  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()
    gc.disable()
    try:
        import lean_small  # noqa: F401

        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_file_that_a_plug_in_left_open_is_written_at_exit(tmp_path: Path) -> None:
    """Only what large imports created is left out of the last pass."""
    (tmp_path / "plug_in.py").write_text(
        "file = open('written', 'w')\nfile.write('text')\ndef write(): file.write('')\n"
    )
    code = "from megatron_anymal import lean_imports; lean_imports.install(); import torch, plug_in"
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[3]}:{tmp_path}"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=240)
    assert (tmp_path / "written").read_text() == "text"


def left_out(by: str) -> tuple[int, int]:
    """Objects that the collector leaves out during a collection of megatron-core's, and after it."""
    frozen_objects._frozen = by == "lean imports"
    if by == "nobody":
        gc.unfreeze()
    with sharding._no_old_garbage():
        during = gc.get_freeze_count()
    return during, gc.get_freeze_count()


@pytest.mark.parametrize("by", ["lean imports", "a caller", "nobody"])
def test_the_collection_of_a_save_visits_nothing_old(by: str) -> None:
    """Afterwards, objects that were left out before still are."""
    [(during, after)] = run_ranks(1, left_out, by)
    assert during > 100_000
    assert (after > 100_000) == (by != "nobody")


def uncounted() -> None:
    gc.get_freeze_count = None  # type: ignore[assignment]
    with sharding._no_old_garbage():
        pass


def test_a_save_does_not_count_them() -> None:
    run_ranks(1, uncounted)
