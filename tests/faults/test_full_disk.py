"""Conversions to a disk that fills up, with a small tmpfs as the disk."""

from __future__ import annotations

import subprocess
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoint_tools import disk
from checkpoint_tools.export_hf import main as export_hf
from checkpoint_tools.import_hf import main as import_hf
from checkpoint_tools.reshard import main as reshard
from megatron_anymal.checkpoint import store


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", "-t", "tmpfs", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A 3 MB disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-o", "size=3m", "tmpfs", str(folder))
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4.5 MB Llama."""
    folder = tmp_path_factory.mktemp("published") / "llama"
    torch.manual_seed(0)
    hf = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    LlamaForCausalLM(hf).save_pretrained(folder)
    assert 4e6 < (folder / "model.safetensors").stat().st_size < 5e6
    return folder


@pytest.fixture(scope="module")
def checkpoint(llama: Path) -> Path:
    assert import_hf(["--hf", str(llama), "--out", str(llama.parent / "base"), "--processes", "1"]) == 0
    return llama.parent / "base"


@pytest.fixture
def others_fill_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Report free space when a conversion starts, so that the disk only fills up later."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage(10**9, 0, 10**9))


def export_arguments(checkpoint: Path, out: Path) -> list[str]:
    return ["--checkpoint", str(checkpoint), "--out", str(out), "--no-verify"]


def reshard_arguments(checkpoint: Path, out: Path) -> list[str]:
    sizes = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "1"]
    return ["--checkpoint", str(checkpoint), "--out", str(out), *sizes]


@pytest.mark.usefixtures("others_fill_it")
def test_an_import_goes_on_once_there_is_room(
    small: Path, llama: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = small / "out"
    assert import_hf(["--hf", str(llama), "--out", str(out), "--processes", "2"]) == 2
    assert (
        f"error: the disk of --out='{out}' is full. Free up space and run the command again to resume."
        in capsys.readouterr().err
    )
    assert [path.name for path in small.iterdir()] == [".out.importing"]
    with pytest.raises(store.CheckpointError):
        store.resolve(str(small))
    mount("-o", "remount,size=64m", str(small))
    done = len(list((small / ".out.importing" / "records").glob("*.json")))
    assert import_hf(["--hf", str(llama), "--out", str(out)]) == 0
    assert 0 < done < 8 and f"Resuming: {done} of 8 files" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in checkpoint.iterdir()}
    assert [path.name for path in small.iterdir()] == ["out"]


@pytest.mark.usefixtures("others_fill_it")
@pytest.mark.parametrize(("tool", "arguments"), [(export_hf, export_arguments), (reshard, reshard_arguments)])
def test_an_export_and_a_resharding_leave_nothing(
    tool: Callable[[list[str]], int],
    arguments: Callable[[Path, Path], list[str]],
    small: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = small / "out"
    assert tool(arguments(checkpoint, out)) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert line == (
        f"error: the disk of --out='{out}' is full. Free up space, or choose another location. Nothing was kept."
    )
    assert list(small.iterdir()) == []
    mount("-o", "remount,size=64m", str(small))
    assert tool(arguments(checkpoint, out)) == 0


@pytest.mark.parametrize(("tool", "arguments"), [(export_hf, export_arguments), (reshard, reshard_arguments)])
def test_a_disk_that_is_too_small_is_told_before(
    tool: Callable[[list[str]], int],
    arguments: Callable[[Path, Path], list[str]],
    small: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert tool(arguments(checkpoint, small / "out")) == 2
    assert f"GB on the disk of '{small}', which has 0.00 GB free" in capsys.readouterr().err
    assert list(small.iterdir()) == []
