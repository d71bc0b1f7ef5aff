"""`anymal generate` and `evaluate` refuse wrong arguments, and name them, before loading a model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from megatron_anymal.__main__ import main
from megatron_anymal.checkpoint import store
from megatron_anymal.cli.model_arguments import kinds_of
from megatron_anymal.data.prompt_encoder import MediaFile, open_parts
from megatron_anymal.data.records import MediaPart, TextPart
from megatron_anymal.generation.prompts import Prompt, prompt_of_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folders that look like models, and media files for prompts."""
    for name, files in {
        "run": {"checkpoints/step_00000003/manifest.json": "{}"},
        "checkpoint": {"manifest.json": "{}"},
        "export": {"config.json": json.dumps({"model_type": "anymal"})},
        "plugged": {"config.json": json.dumps({"model_type": "anymal", "plugins": ["thermal.py"]})},
        "llama": {"config.json": json.dumps({"model_type": "llama"})},
        "torn": {"config.json": '{"model_type": '},
        "other": {"notes.txt": ""},
    }.items():
        for file, text in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    (tmp_path / "a.png").write_bytes(b"picture")
    (tmp_path / "walk.npy").write_bytes(b"walk")
    (tmp_path / "two.jsonl").write_text('{"parts": [{"text": "one"}]}\n{"parts": [{"text": "two"}]}\n')
    (tmp_path / "none.jsonl").write_text("\n")
    return tmp_path


REFUSED = {
    "top-p": (["--text=hi", "--top-p=1.5"], ["top_p=1.5", "above 0 and at most 1"]),
    "temperature": (["--text=hi", "--temperature=-1"], ["temperature=-1"]),
    "penalty": (["--text=hi", "--repetition-penalty=0"], ["repetition_penalty=0.0"]),
    "stop": (["--text=hi", "--stop="], ["stop=('',)", "not empty"]),
    "prompts-and-text": (["--prompts=F/two.jsonl", "--text=hi"], ["--text", "F/two.jsonl"]),
    "prompts-and-rate": (["--prompts=F/two.jsonl", "--rate=3"], ["--rate"]),
    "no-prompts": (["--prompts=F/none.jsonl"], ["F/none.jsonl", "empty"]),
    "out-alone": (["--text=hi", "--out=F/x.jsonl"], ["--out", "--prompts"]),
    "out-nowhere": (["--prompts=F/two.jsonl", "--out=F/no/x.jsonl"], ["--out 'F/no/x.jsonl'", "folder is missing"]),
    "out-and-stream": (["--prompts=F/two.jsonl", "--out=F/x.jsonl", "--stream"], ["--stream", "--out"]),
    "stream-two": (["--prompts=F/two.jsonl", "--stream"], ["--stream", "2 prompts"]),
    "interactive-text": (["--interactive", "--text=hi"], ["--text", "--interactive"]),
    "interactive-stream": (["--interactive", "--stream"], ["--stream", "--interactive"]),
    "rate-alone": (["--text=hi", "--rate=200"], ["--rate", "--media"]),
    "kinds": (["--media=F/a.png", "--modality=image", "--modality=imu"], ["more --modality than --media"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_are_refused_by_name(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, words = REFUSED[name]
    argv = [text.replace("F/", f"{folder}/") for text in given]
    assert main(["generate", "--checkpoint=/nowhere", *argv]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    for word in words:
        assert word.replace("F/", f"{folder}/") in stderr


FOLDERS = {
    "neither": ("other", [], ["no checkpoint in", "manifest.json", "checkpoints/step_*", "config.json", "Name"]),
    "another-model": ("llama", [], ["'llama'", "'anymal'", "config.json"]),
    "torn": ("torn", [], ["config.json", "damaged"]),
    "export-layout": ("export", ["--tensor-model-parallel-size=1"], ["--tensor-model-parallel-size", "one process"]),
    "export-stages": ("export", ["--pipeline-model-parallel-size=2"], ["--pipeline-model-parallel-size"]),
    "run-device": ("run", ["--device=cpu"], ["--device", "training checkpoint"]),
    "checkpoint-dtype": ("checkpoint", ["--dtype=bfloat16"], ["--dtype", "training checkpoint"]),
    "plugins": ("plugged", [], ["thermal.py", "--trust-remote-code"]),
    "device": ("export", ["--device=gpu7"], ["--device", "gpu7"]),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_says_what_it_is(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    which, further, words = FOLDERS[name]
    assert main(["generate", f"--checkpoint={folder / which}", "--text=hi", *further]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    for word in words:
        assert word in stderr


def test_several_processes_are_refused_where_one_answers(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["generate", f"--checkpoint={folder / 'export'}", "--text=hi"]) == 2
    assert "one process" in capsys.readouterr().err
    assert main(["generate", f"--checkpoint={folder / 'run'}", "--interactive"]) == 2
    assert "--interactive needs one process" in capsys.readouterr().err


def test_media_come_in_their_order_before_the_text(folder: Path) -> None:
    prompt = prompt_of_files([f"{folder}/a.png", f"{folder}/walk.npy"], ["image"], 200.0, "what now?")
    parts = [
        MediaPart(f"{folder}/a.png", "image", {"rate": 200.0}),
        MediaPart(f"{folder}/walk.npy", "", {"rate": 200.0}),
        TextPart("what now?"),
    ]
    assert prompt == Prompt(parts, [MediaFile(b"picture", "png"), MediaFile(b"walk", "npy")])


def test_chat_asks_as_a_users_turn(folder: Path) -> None:
    content = [{"media": f"{folder}/a.png"}, {"text": " what? "}]
    prompt = prompt_of_files([f"{folder}/a.png"], [], None, " what? ", chat=True)
    assert prompt.parts == open_parts({"messages": [{"role": "user", "content": content}]}, "")


def test_media_are_checked_against_the_newest_readable_checkpoint(tmp_path: Path) -> None:
    arguments = argparse.Namespace(checkpoint=str(tmp_path), **dict.fromkeys(("device", "dtype", "trust_remote_code")))
    older, newer = (tmp_path / "checkpoints" / f"step_{step:08d}" for step in (1, 2))
    for folder in (older, newer):
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("torn")
    # Loading reports what is wrong with them.
    assert kinds_of(arguments) is None
    older.rename(tmp_path / "gone")
    config = {"model": {"modalities": {"photo": {"kind": "image"}, "imu": {"kind": ""}}}}
    staging = tmp_path / "checkpoints" / "staging"
    staging.mkdir()
    store.commit(staging, older, store.Manifest(1, 1, config, {}, "", "", {}))
    assert kinds_of(arguments) == {"image": "photo", "imu": "imu"}
