"""A user's mistake gives exit code 2 and one line that names the key or file and the fix."""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fork_server import python
from ranks import run_ranks
from tiny import make_config

from megatron_anymal.__main__ import VERBS, main
from megatron_anymal.data.index_writer import write_index
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.log_filters import quiet_libraries

Values = dict[str, Any]


@pytest.fixture(scope="module")
def folder(mixed_shards: str, tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.yaml, a run that would train, and broken files for the tests to name."""
    folder = tmp_path_factory.mktemp("cli")
    write_yaml(folder, "tiny", make_config(mixed_shards, tokenizer_folder, folder / "run").to_dict())
    index = ShardIndex(mixed_shards)
    write_index(str(folder / "empty"), index.header, 0, 0, [])
    (folder / "bert").mkdir()
    (folder / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (folder / "no_index").mkdir()
    (folder / "no_index" / "a.tar").touch()
    (folder / "void").mkdir()
    (folder / "bad.jsonl").write_text('{"parts": [{"text": "one"}]}\n{"parts": [{"txt": "two"}]}\n')
    (folder / "torn.yaml").write_text("defaults: [anymal, _self_]\nmodel: {seed: 1\n")
    (folder / "bare.yaml").write_text("model: {seed: 1}\n")
    return folder


def write_yaml(folder: Path, name: str, values: Values) -> None:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"defaults": ["anymal", "_self_"], **values}))


def call(argv: list[str], errors: Path) -> int:
    """In a rank: run a verb with standard error redirected to a file."""
    with Path(f"{errors}.{os.environ['RANK']}").open("w", buffering=1) as file:
        os.dup2(file.fileno(), 2)
        sys.stderr = file
        return main(argv)


def complaint(argv: list[str], tmp_path: Path, world: int = 1) -> str:
    """The single line that a verb writes before it returns 2 on every rank."""
    assert run_ranks(world, call, argv, tmp_path / "stderr") == [2] * world
    lines = (tmp_path / "stderr.0").read_text().splitlines()
    assert len(lines) == 1, lines
    start = "error: " if world == 1 else "error (rank 0): "
    assert lines[0].startswith(start)
    return lines[0].removeprefix(start)


def pretrain(folder: Path, *overrides: str, name: str = "tiny") -> list[str]:
    return ["pretrain", f"--config-path={folder}", f"--config-name={name}", *overrides]


OVERRIDES = {
    "unknown-key": (["model.optim.lrr=1"], ["override 'model.optim.lrr=1'", "model.optim.lr"]),
    "wrong-type": (["trainer.max_steps=many"], ["trainer.max_steps", "many"]),
    "not-an-override": (["trainer.max_steps"], ["trainer.max_steps", "key=value"]),
    "sizes": (
        ["trainer.devices=3", "model.tensor_model_parallel_size=2"],
        ["trainer.num_nodes x trainer.devices = 3", "model.tensor_model_parallel_size", "Change"],
    ),
    "processes": (["trainer.devices=2"], ["trainer.devices", "started 1", "torchrun --nproc-per-node=2"]),
    "no-shards": (["data.train.mix.path=/nowhere"], ["data.train.mix.path", "'/nowhere'", "anymal prepare"]),
    "no-index": (["data.train.mix.path=FOLDER/no_index"], ["no_index", "anymal prepare --index-only"]),
    "no-files": (["data.train.mix.path=FOLDER/void"], ["data.train.mix.path", "neither an index nor", "prepare`."]),
    "empty-index": (["data.train.mix.path=FOLDER/empty"], ["FOLDER/empty", "no sample"]),
    "no-data": (["~data.train.mix"], ["data.train"]),
    "no-modality": (["~model.modalities.audio"], ["audio", "Add model.modalities.audio"]),
    "no-tokenizer": (["data.tokenizer=/nowhere"], ["data.tokenizer", "/nowhere"]),
    "no-placeholder": (["model.modalities.imu.placeholder=nothing"], ["model.modalities.imu.placeholder", "reserved"]),
    "too-long": (["data.seq_length=8"], ["longer than data.seq_length=8", "data.too_long=drop"]),
    "no-initial-weights": (["model.restore_from_path=/nowhere"], ["no folder '/nowhere'"]),
    "no-checkpoint-to-resume": (
        ["exp_manager.resume_ignore_no_checkpoint=false", "exp_manager.explicit_log_dir=FOLDER/new"],
        ["FOLDER/new", "exp_manager.resume_ignore_no_checkpoint"],
    ),
    "time": (["exp_manager.max_time_per_run=4h"], ["exp_manager.max_time_per_run", "DD:HH:MM:SS"]),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_mistakes_of_an_override(name: str, folder: Path, tmp_path: Path) -> None:
    overrides, words = OVERRIDES[name]
    message = complaint(pretrain(folder, *(text.replace("FOLDER", str(folder)) for text in overrides)), tmp_path)
    for word in words:
        assert word.replace("FOLDER", str(folder)) in message


def change_optim(values: Values) -> None:
    values["model"]["optim"]["learning_rate"] = 1


def change_encoder(values: Values) -> None:
    values["model"]["modalities"]["image"]["encoder"].update(config={}, path="FOLDER/bert")


def change_encoder_key(values: Values) -> None:
    values["model"]["modalities"]["image"]["encoder"]["config"]["heads"] = 2


def change_llama(values: Values) -> None:
    values["model"]["language_model"]["config"] = {}


FILES: dict[str, tuple[Callable[[Values], None], list[str]]] = {
    "unknown_key": (change_optim, ["unknown_key.yaml", "model.optim.learning_rate"]),
    "wrong_encoder": (change_encoder, ["model.modalities.image", "FOLDER/bert", "'bert'", "clip"]),
    "wrong_encoder_key": (change_encoder_key, ["model.modalities.image", "encoder.config.heads"]),
    "no_llama": (change_llama, ["model.language_model", "path", "checkpoint"]),
}


@pytest.mark.parametrize("name", FILES)
def test_mistakes_of_a_file(name: str, folder: Path, tmp_path: Path) -> None:
    change, words = FILES[name]
    values = copy.deepcopy(yaml.safe_load((folder / "tiny.yaml").read_text()))
    change(values)
    text = yaml.safe_dump(values).replace("FOLDER", str(folder))
    (folder / f"{name}.yaml").write_text(text)
    message = complaint(pretrain(folder, name=name), tmp_path)
    for word in words:
        assert word.replace("FOLDER", str(folder)) in message


@pytest.mark.parametrize(
    ("name", "words"),
    [("torn", ["torn.yaml"]), ("bare", ["bare.yaml", "defaults: [anymal"]), ("tinny", ["Did you mean tiny?"])],
)
def test_files_that_cannot_be_read(name: str, words: list[str], folder: Path, tmp_path: Path) -> None:
    message = complaint(pretrain(folder, name=name), tmp_path)
    assert all(word in message for word in words)


def test_layers_that_do_not_divide_are_refused_on_every_rank(folder: Path, tmp_path: Path) -> None:
    argv = pretrain(folder, "trainer.devices=3", "model.pipeline_model_parallel_size=3")
    message = complaint(argv, tmp_path, world=3)
    assert "model.pipeline_model_parallel_size" in message


def test_a_wrong_data_folder_stops_every_rank(folder: Path, tmp_path: Path) -> None:
    assert "'/nowhere'" in complaint(pretrain(folder, "trainer.devices=2", "data.train.mix.path=/nowhere"), tmp_path, 2)


VERB_MISTAKES = {
    "generate-checkpoint": (
        ["generate", "--checkpoint=/nowhere", "--text=hi"],
        ["no folder '/nowhere'", "Name"],
    ),
    "generate-nothing": (["generate", "--checkpoint=/nowhere"], ["--text", "--media", "--prompts"]),
    "generate-line": (["generate", "--checkpoint=/x", "--prompts=FOLDER/bad.jsonl"], ["FOLDER/bad.jsonl:2", "part 0"]),
    "generate-no-file": (["generate", "--checkpoint=/x", "--prompts=/no.jsonl"], ["no prompts file '/no.jsonl'"]),
    "generate-no-media": (["generate", "--checkpoint=/x", "--media=/no.png"], ["no media file '/no.png'"]),
    "evaluate-data": (["evaluate", "--checkpoint=/x", "--data=/nowhere"], ["no shard folder '/nowhere'"]),
    "evaluate-checkpoint": (["evaluate", "--checkpoint=/nowhere", "--data=DATA"], ["no folder '/nowhere'"]),
    "inspect-data": (["inspect", "/nowhere", "--tokenizer=/x"], ["no shard folder '/nowhere'", "anymal prepare"]),
    "inspect-tokenizer": (["inspect", "DATA", "--tokenizer=/nowhere"], ["/nowhere"]),
    "prepare-tokenizer": (["prepare", "--index-only=DATA"], ["--tokenizer"]),
    "prepare-manifest": (["prepare", "--manifest=/no.csv", "--out=/tmp/x", "--tokenizer=TOKENIZER"], ["/no.csv"]),
}


@pytest.mark.parametrize("name", VERB_MISTAKES)
def test_mistakes_of_the_other_verbs(
    name: str, folder: Path, mixed_shards: str, tokenizer_folder: str, tmp_path: Path
) -> None:
    argv, words = VERB_MISTAKES[name]
    for word, path in {"FOLDER": str(folder), "DATA": mixed_shards, "TOKENIZER": tokenizer_folder}.items():
        argv = [text.replace(word, path) for text in argv]
    message = complaint(argv, tmp_path)
    for word in words:
        assert word.replace("FOLDER", str(folder)) in message


def test_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrian"]) == 2
    assert capsys.readouterr().err == "error: unknown verb 'pretrian'. Did you mean pretrain?\n"
    assert main(["xyzzy"]) == 2
    output = capsys.readouterr().err
    assert all(verb in output for verb in VERBS)
    assert main([]) == 2
    assert main(["--help"]) == 0
    output = capsys.readouterr().out
    assert all(verb in output for verb in VERBS)


def test_the_process_returns_the_code() -> None:
    done = subprocess.run([sys.executable, "-m", "megatron_anymal", "pretrian"], capture_output=True, timeout=240)
    assert done.returncode == 2


def test_an_error_that_is_not_the_users_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_anymal.cli import doctor

    def broken(argv: list[str]) -> int:
        raise ValueError("a bug")

    monkeypatch.setattr(doctor, "main", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["doctor"])


def test_looking_at_a_configuration_loads_no_heavy_library(folder: Path) -> None:
    code = (
        "import sys; from megatron_anymal.__main__ import main; code = main(sys.argv[1:]); "
        "heavy = ('torch', 'transformers', 'megatron.core', 'nemo'); "
        "print('HEAVY', [name for name in heavy if name in sys.modules]); sys.exit(code)"
    )
    argv = [*pretrain(folder), "--print-config"]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("HEAVY []\n") and done.stderr == ""


def test_only_what_is_listed_is_silenced(caplog: pytest.LogCaptureFixture) -> None:
    rank_zero = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    before = list(rank_zero.filters)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        quiet_libraries()
        no_engine = "Transformer Engine and Apex are not installed. Falling back to Torch optimizers."
        alone = "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to {} in a single "
        for module, message in (
            ("megatron.core.optimizer", no_engine),
            ("megatron.core.optimizer", "The loss is not finite."),
            ("megatron_anymal.train", no_engine),
            ("torch.distributed.checkpoint.utils", alone.format("load")),
            ("torch.distributed.checkpoint.utils", alone.format("save")),
        ):
            warnings.warn_explicit(message, UserWarning, "file.py", 1, module=module)
        assert [str(one.message) for one in shown] == ["The loss is not finite.", no_engine, alone.format("save")]
    with caplog.at_level(logging.INFO):
        rank_zero.info("GPU available: True (cuda), used: False")
        rank_zero.error("GPU available: no, it fell off the bus")
        rank_zero.info("something else")
        kernels = logging.getLogger("bitsandbytes.backends.cpu.ops")
        kernels.warning("Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'kernels'.")
        kernels.warning("Failed to load CPU dequantize")
    rank_zero.filters[:], kernels.filters[:] = before, []
    assert caplog.messages == [
        "GPU available: no, it fell off the bus",
        "something else",
        "Failed to load CPU dequantize",
    ]


def test_a_crash_in_native_code_would_leave_its_stack() -> None:
    code = (
        "import faulthandler, megatron_anymal.__main__ as verbs\n"
        "verbs.main = lambda: 42 * faulthandler.is_enabled()\n"
        "verbs.command()"
    )
    assert python("-c", code).returncode == 42
