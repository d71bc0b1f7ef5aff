"""No file of a checkpoint, an archive or an export runs code unless a flag says so; see docs/guides/trust.md.

The payloads are harmless: a pickle creates a folder as a marker, a plug-in a file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import train
from export_server import run_in_rank
from ranks import run_ranks
from tiny import make_config, make_conversations

from checkpoint_tools import export_hf, inspect, reshard, verify
from megatron_anymal.__main__ import main
from megatron_anymal.checkpoint import store
from megatron_anymal.config import ConfigError, RunConfig
from megatron_anymal.config.compose import from_dict
from megatron_anymal.hf.remote_code import CONFIG_AUTO_MAP, foreign_code, write_code
from megatron_anymal.nemo import archive
from megatron_anymal.nemo.model import MegatronAnyMALModel, to_cfg


class MakeFolder:
    """Creates a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def run(tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trust")
    make_conversations(folder / "data", tokenizer_folder, 24)
    config = make_config(str(folder / "data"), tokenizer_folder, folder / "run")
    config.job, config.data.seq_length = "sft", 96
    config.trainer.max_steps, config.model.optim.sched.decay_steps = 3, 10
    run_ranks(1, train, config)
    return folder / "run"


def changed(run: Path, to: Path, **values: Any) -> Path:
    """Copy a run and change its checkpoint's files or manifest, with valid checksums."""
    shutil.copytree(run, to)
    [folder] = (to / "checkpoints").iterdir()
    manifest = store.read_manifest(folder)
    for name, content in values.pop("files", {}).items():
        (folder / name).write_bytes(content)
    (folder / store.MANIFEST).unlink()
    staging = folder.with_name("staging")
    folder.rename(staging)
    store.commit(staging, folder, dataclasses.replace(manifest, **values))
    return to


def resume(run: Path) -> int:
    """In a rank: resume training."""
    [folder] = (run / "checkpoints").iterdir()
    config = from_dict(store.read_manifest(folder).config)
    config.exp_manager.explicit_log_dir, config.trainer.max_steps = str(run), 4
    train(config)
    return 0


def commands(run: Path, out: Path) -> dict[str, tuple[Any, list[str]]]:
    """Return every command that reads a checkpoint, by name: its function and arguments."""
    sizes = ["--tensor-model-parallel-size=1", "--pipeline-model-parallel-size=1"]
    return {
        "inspect": (inspect.main, [str(run)]),
        "reshard": (reshard.main, [f"--checkpoint={run}", f"--out={out}/reshard", *sizes]),
        "generate": (main, ["generate", f"--checkpoint={run}", "--text=hi"]),
        "export": (export_hf.main, [f"--checkpoint={run}", f"--out={out}/new"]),
        "verify": (verify.main, [f"--checkpoint={run}", f"--export={run.parent}/export"]),
    }


def each(run: Path, out: Path, *only: str) -> dict[str, tuple[int, str]]:
    """In a rank: return the exit code and output of every command, or of those named."""
    results = {}
    for name, (function, arguments) in commands(run, out).items():
        if only and name not in only:
            continue
        output = io.StringIO()
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            results[name] = function(arguments), output.getvalue()
    return results


def bytes_of(payload: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    return buffer.getvalue()


def test_code_in_metadata_is_refused_by_every_reader(run: Path, tmp_path: Path) -> None:
    [folder] = (run / "checkpoints").iterdir()
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = MakeFolder(tmp_path / "marker")
    bad = changed(run, tmp_path / "bad", files={".metadata": pickle.dumps(metadata)})
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text('{"model_type": "anymal"}')
    for name, (code, output) in run_ranks(1, each, bad, tmp_path)[0].items():
        # `verify` finds that the export is not valid before it reads the checkpoint.
        assert code == (1 if name == "verify" else 2), (name, output)
        assert name == "verify" or "refers to posix.mkdir" in output, (name, output)
    with pytest.raises(pytest.fail.Exception, match=r"refers to posix\.mkdir"):
        run_ranks(1, resume, bad)
    assert not (tmp_path / "marker").exists()


def test_code_in_common_is_refused(run: Path, tmp_path: Path) -> None:
    bad = changed(run, tmp_path / "bad", files={"common.pt": bytes_of({"step": MakeFolder(tmp_path / "marker")})})
    results = run_ranks(1, each, bad, tmp_path, "generate", "reshard")[0]
    assert len(results) == 2
    for name, (code, output) in results.items():
        assert code == 2 and "common.pt" in output and "posix.mkdir" in output, (name, output)
    with pytest.raises(pytest.fail.Exception, match=r"posix\.mkdir"):
        run_ranks(1, resume, bad)
    assert not (tmp_path / "marker").exists()


def plugged(run: Path, folder: Path) -> tuple[Path, Path, Path]:
    """Return a copy of a run whose manifest names a plug-in, the plug-in, and the marker file its import creates."""
    plugin, marker = folder / "plugin.py", folder / "marker"
    plugin.write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n")
    [checkpoint] = (run / "checkpoints").iterdir()
    config = store.read_manifest(checkpoint).config
    config["model"]["plugins"] = [str(plugin)]
    return changed(run, folder / "plugged", config=config), plugin, marker


def test_plugins_of_a_checkpoint_need_the_flag(run: Path, tmp_path: Path) -> None:
    bad, plugin, marker = plugged(run, tmp_path)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text('{"model_type": "anymal"}')
    results = run_ranks(1, each, bad, tmp_path)[0]
    assert results.pop("inspect")[0] == 0
    for name, (code, output) in results.items():
        assert code == 2 and output.count("\n") == 1, (name, output)
        assert str(plugin) in output and "--trust-plugins" in output and str(bad) in output, (name, output)
    llama = [f"--checkpoint={bad}", f"--out={tmp_path}/llama", "--llama-only"]
    assert run_in_rank(export_hf.main, llama) == 0
    assert not marker.exists()
    assert run_ranks(1, main, ["generate", f"--checkpoint={bad}", "--text=hi", "--trust-plugins"]) == [0]
    assert marker.exists()


def test_plugins_of_the_users_own_configuration_need_none(run: Path, tmp_path: Path) -> None:
    bad, _, marker = plugged(run, tmp_path)
    run_ranks(1, resume, bad)
    assert marker.exists()


def test_plugins_of_an_archive_need_the_argument(run: Path, tmp_path: Path) -> None:
    config = make_config("unused", "unused", tmp_path)
    config.model.plugins = [str(tmp_path / "plugin.py")]
    text = "\n".join(["run:", *(f"  {line}" for line in _yaml(config).splitlines())])
    archive.write(tmp_path / "a.nemo", text, {}, {"weight": torch.ones(2)})
    with pytest.raises(ConfigError, match=r"a\.nemo' names .*/plugin\.py.*trust_plugins=True"):
        MegatronAnyMALModel.restore_from(tmp_path / "a.nemo")
    assert MegatronAnyMALModel.restore_from(tmp_path / "a.nemo", trust_plugins=True)
    # A configuration passed by the user is trusted.
    assert MegatronAnyMALModel.restore_from(tmp_path / "a.nemo", override_config_path=config)


def _yaml(config: RunConfig) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(to_cfg(config).run)


def test_a_manifest_names_no_file_outside(run: Path, tmp_path: Path) -> None:
    [folder] = (run / "checkpoints").iterdir()
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    manifest = store.read_manifest(copy)
    body = {**dataclasses.asdict(manifest), "files": {"../secret": "0"}}
    (copy / store.MANIFEST).write_text(json.dumps({**body, "checksum": store._checksum(body)}))
    with pytest.raises(store.CheckpointError, match=r"names '\.\./secret', a file outside"):
        store.read_manifest(copy)


def test_only_this_packages_code_is_run_unasked(tmp_path: Path) -> None:
    write_code(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "anymal", "auto_map": CONFIG_AUTO_MAP}))
    assert not foreign_code(tmp_path)
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoConfig": "other/place--code.Class"}}')
    assert foreign_code(tmp_path) == ["the auto_map in config.json"]
    for name, text in {
        "modeling_anymal.py": (tmp_path / "modeling_anymal.py").read_text() + "\n",
        "custom_generate/generate.py": "",
    }.items():
        folder = tmp_path.with_name(tmp_path.name + Path(name).stem)
        shutil.copytree(tmp_path, folder)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
        assert name in foreign_code(folder)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["other/place--code.Class", null]}}'
    )
    assert "the auto_map in tokenizer_config.json" in foreign_code(tmp_path)
