"""The source code reads files without executing them: unsafe readers are not called; see docs/guides/trust.md."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_tokenizer

from megatron_anymal.config import ConfigError, EncoderConfig
from megatron_anymal.data.records import DataError
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.data.tokenizer import Tokenizer
from megatron_anymal.model.encoders.base import load_transformers

ROOT = Path(__file__).parents[2]
SOURCES = [*(ROOT / "megatron_anymal").rglob("*.py"), *(ROOT / "checkpoint_tools").rglob("*.py")]
# Call -> the argument that makes it safe.
NEEDED = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "tar.extractall": ("filter", "data"),
    "AutoTokenizer.from_pretrained": ("trust_remote_code", False),
}
FORBIDDEN = {"pickle.load", "pickle.loads", "eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
# Files that run an export's code, after `verify` has inspected it.
RUNS_EXPORTS = {"checkpoint_tools/verifying/exported_logits.py"}
# What Transformer Engine has pickled in the same process, as the only way to read a module's FP8 scaling.
PICKLED_HERE = ("megatron_anymal/checkpoint/fp8_scaling.py", "pickle.loads")


def calls() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (file, function called, keyword arguments that are constants) for every call."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                given = {k.arg: k.value.value for k in node.keywords if k.arg and isinstance(k.value, ast.Constant)}
                yield str(path.relative_to(ROOT)), ast.unparse(node.func), given


def test_unsafe_reading_is_not_called() -> None:
    call_sites = list(calls())
    wrong = [f"{where}: {what}" for where, what, _ in call_sites if what in FORBIDDEN and (where, what) != PICKLED_HERE]
    for where, what, given in call_sites:
        if what in NEEDED and given.get(NEEDED[what][0]) != NEEDED[what][1]:
            wrong.append(f"{where}: {what} without {NEEDED[what]}")
        if given.get("trust_remote_code") is True and where not in RUNS_EXPORTS:
            wrong.append(f"{where}: {what} trusts")
    assert not wrong
    assert {what for _, what, _ in call_sites} >= NEEDED.keys(), "some rules match no call"


class MakeFolder:
    """Creates a folder when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_an_encoder_in_pickle_form_is_data(tmp_path: Path) -> None:
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"image_size": 8, "patch_size": 4}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **shape}))
    torch.save({"weight": MakeFolder(tmp_path / "marker")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot be loaded as clip"):
        load_transformers(EncoderConfig(type="clip", path=str(tmp_path)))
    assert not (tmp_path / "marker").exists()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "pytorch_model.bin", weights_only=True)


def test_a_tokenizer_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    folder = Path(make_tokenizer(tmp_path / "tokenizer"))
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'marker')!r}).touch()\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match=r"data\.tokenizer: .* needs Python code of its own .* never run"):
        Tokenizer(str(folder))
    assert not (tmp_path / "marker").exists()


def test_an_index_with_a_pickle_is_refused(text_shards: str, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(text_shards, folder)
    buffer = io.BytesIO()
    np.save(buffer, np.array([MakeFolder(tmp_path / "marker")], dtype=object), allow_pickle=True)
    [file] = folder.rglob("samples.npy")
    file.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError):
        len(ShardIndex(str(folder)).samples)
    assert not (tmp_path / "marker").exists()
