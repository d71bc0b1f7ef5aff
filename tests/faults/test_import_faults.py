"""Imports that are killed, or have a bad source or disk: the checkpoint is complete, unchanged, or absent."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import time
import types
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import Interpreter
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoint_tools import disk
from checkpoint_tools.import_hf import main as import_hf
from checkpoint_tools.importing import llama as import_llama
from megatron_anymal import safetensors_io
from megatron_anymal.checkpoint import store

INDEX = "model.safetensors.index.json"
# The import, slowed down while it writes each file.
SLOW = """
import sys, time
import checkpoint_tools.importing.llama as importing
write = importing.write_unit
def slow(unit, hf, weights, folder, advance):
    def wait(count):
        advance(count)
        time.sleep(0.05)
    return write(unit, hf, weights, folder, wait)
importing.write_unit = slow
from checkpoint_tools.import_hf import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in several weight files."""
    folder = tmp_path_factory.mktemp("published") / "llama"
    torch.manual_seed(0)
    hf = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(hf).save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture
def source(published: Path, tmp_path: Path) -> Path:
    """A copy of the Llama's folder, to be damaged."""
    return Path(shutil.copytree(published, tmp_path / "llama"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def start_slow(source: Path, out: Path) -> Interpreter:
    words = ["-c", SLOW, "--hf", source, "--out", out, "--processes", "2"]
    return Interpreter(*words, output=[out.with_suffix(".log")])


def kill(process: Interpreter) -> None:
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(240) == -signal.SIGKILL


def wait_for_records(staging: Path, count: int) -> None:
    deadline = time.monotonic() + 240
    while len(list(staging.glob("records/*.json"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_and_started_again_it_goes_on(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    process = start_slow(source, out)
    staging = tmp_path / ".out.importing"
    wait_for_records(staging, 3)
    kill(process)
    assert not out.exists() and len(list((staging / "checkpoint").glob("*.distcp"))) > 3
    kept = {path: path.stat().st_mtime_ns for path in (staging / "checkpoint").glob("*.distcp")}
    done = {path.stem for path in (staging / "records").glob("*.json")}
    assert import_hf(["--hf", str(source), "--out", str(out), "--processes", "2"]) == 0
    assert f"Resuming: {len(done)} of 8 files" in capsys.readouterr().out
    for path, changed in kept.items():
        assert ((out / path.name).stat().st_mtime_ns == changed) == (path.name in done), path.name
    assert import_hf(["--hf", str(source), "--out", str(undisturbed), "--processes", "1"]) == 0
    assert contents(out) == contents(undisturbed)
    store.read_manifest(out, verify=True)
    assert not list(tmp_path.glob(".*"))


def test_a_source_that_changed_meanwhile_starts_afresh(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    process = start_slow(source, out)
    wait_for_records(tmp_path / ".out.importing", 2)
    kill(process)
    for file in source.glob("*.safetensors"):
        tensors = {name: tensor + 1 for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    assert import_hf(["--hf", str(source), "--out", str(out)]) == 0
    assert "starting afresh" in capsys.readouterr().out
    assert import_hf(["--hf", str(source), "--out", str(tmp_path / "undisturbed")]) == 0
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_adapters_beside_the_weights_are_told_of(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "adapter").mkdir()
    (source / "adapter" / "adapter_config.json").write_text("{}")
    assert import_hf(["--hf", str(source), "--out", str(tmp_path / "out"), "--processes", "1"]) == 0
    assert f"left out: the adapters of {source / 'adapter'}" in capsys.readouterr().out


def test_two_imports_at_once(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = start_slow(source, tmp_path / "out")
    wait_for_records(tmp_path / ".out.importing", 1)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        assert import_hf(["--hf", str(source), "--out", str(tmp_path / "out")]) == 2
        assert "Another import is writing" in capsys.readouterr().err
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert process.wait(240) == 0
    store.read_manifest(tmp_path / "out", verify=True)


def second(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Apply `change` to a file's tensors."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def index_of(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    body = json.loads((folder / INDEX).read_text())
    change(body["weight_map"])
    (folder / INDEX).write_text(json.dumps(body))


def truncate(folder: Path) -> str:
    second(folder).write_bytes(second(folder).read_bytes()[:-100])
    return "model-00002"


def flip_in_header(folder: Path) -> str:
    data = bytearray(second(folder).read_bytes())
    offset = data.index(b'"dtype":"F32"') + 9
    data[offset] ^= 1
    second(folder).write_bytes(bytes(data))
    return "model-00002"


def half(folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors"))
    for file in files[len(files) // 2 :]:
        file.unlink()
    return files[-1].name


def mistral(folder: Path) -> str:
    body = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**body, "model_type": "mistral"}))
    return "'mistral'"


def broken_config(folder: Path) -> str:
    (folder / "config.json").write_text('{"model_type": "llama", ')
    return "config.json"


def doubled(folder: Path) -> str:
    file = sorted(folder.glob("*.safetensors"))[2]
    extra = load_file(file)
    rewrite(second(folder), lambda tensors: tensors.update(extra))
    return f"{min(extra)!r} is in both"


def unmapped(folder: Path) -> str:
    name = "model.layers.0.self_attn.q_proj.bias"
    rewrite(second(folder), lambda tensors: tensors.update({name: torch.zeros(32)}))
    index_of(folder, lambda weight_map: weight_map.update({name: second(folder).name}))
    return name


def reshaped(folder: Path) -> str:
    name = next(name for name in load_file(second(folder)) if "proj" in name)
    rewrite(second(folder), lambda tensors: tensors.update({name: tensors[name].reshape(-1)}))
    return name


def lost(folder: Path) -> str:
    def drop(named: dict[str, Any]) -> None:
        del named[lost_one]

    lost_one = min(load_file(second(folder)))
    rewrite(second(folder), drop)
    index_of(folder, drop)
    return lost_one


def infinite(folder: Path) -> str:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first].view(-1)[-1] = float("inf")

    first = min(load_file(second(folder)))
    rewrite(second(folder), spoil)
    return first


def mixed_types(folder: Path) -> str:
    def halve(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if "proj" in name)
        tensors[name] = tensors[name].half()

    rewrite(second(folder), halve)
    return "must have the same type"


FAULTS = [
    truncate,
    flip_in_header,
    half,
    mistral,
    broken_config,
    doubled,
    unmapped,
    reshaped,
    lost,
    infinite,
    mixed_types,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_faulty_source_is_named_in_one_line(
    fault: Callable[[Path], str], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert import_hf(["--hf", str(source), "--out", str(out)]) == 0
    before = contents(out)
    named = fault(source)
    capsys.readouterr()
    for where, overwrite in ((out, ["--overwrite"]), (tmp_path / "new", [])):
        assert import_hf(["--hf", str(source), "--out", str(where), *overwrite]) == 2
        stderr = capsys.readouterr().err
        [line] = [line for line in stderr.splitlines() if not line.startswith("importing")]
        assert line.startswith("error: ") and named in line, line
    assert contents(out) == before and not (tmp_path / "new").exists()


def test_a_disk_too_small_is_told_before(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage(100_000_000, 0, 67_000_000))
    assert import_hf(["--hf", str(source), "--out", str(tmp_path / "out")]) == 2
    assert "needs 0.07 GB on the disk" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_keeps_what_is_done(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    class FullDisk(io.FileIO):
        """A disk with no room for the third layer."""

        def write(self, data: object) -> int:
            if "layer_00002" in str(self.name) and self.tell() > 2000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)  # type: ignore[arg-type]

    monkeypatch.setattr(safetensors_io, "io", types.SimpleNamespace(FileIO=FullDisk))
    assert import_hf(["--hf", str(source), "--out", str(out), "--processes", "1"]) == 2
    stderr = capsys.readouterr().err
    assert f"the disk of --out='{out}' is full. Free up space and run the command again to resume." in stderr
    assert not out.exists()
    monkeypatch.undo()
    assert import_hf(["--hf", str(source), "--out", str(out)]) == 0
    assert "Resuming: 4 of 8 files" in capsys.readouterr().out
    store.read_manifest(out, verify=True)


def test_a_worker_that_is_killed(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_llama, "write_unit", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    assert import_hf(["--hf", str(source), "--out", str(tmp_path / "out")]) == 2
    assert "a worker process ended with signal 9" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
