"""What was composed ahead is what `compose` gives, and is not used once it may be another."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_anymal.config import ConfigError, composed_ahead
from megatron_anymal.config.compose import compose

YAML = "defaults: [anymal, _self_]\ntrainer: {max_steps: 7}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "base.yaml").write_text(YAML)
    yield tmp_path
    composed_ahead._known.clear()


def test_it_is_composed_once(folder: Path) -> None:
    given = ["trainer.devices=2"]
    first = composed_ahead.compose_ahead("base", folder, given)
    assert first == compose("base", folder, given) and first.config.trainer.devices == 2
    assert composed_ahead.composed("base", folder, given) is first


def test_other_words_are_composed_anew(folder: Path) -> None:
    composed_ahead.compose_ahead("base", folder, ["trainer.devices=2"])
    assert composed_ahead.composed("base", folder, []).config.trainer.devices == 1
    with pytest.raises(ConfigError, match=r"no file bse\.yaml"):
        composed_ahead.composed("bse", folder, ["trainer.devices=2"])


def test_a_changed_file_is_read_again(folder: Path) -> None:
    (folder / "child.yaml").write_text("defaults: [base, _self_]\n")
    composed_ahead.compose_ahead("child", folder, [])
    # Of the same length, and of the file that is inherited from.
    (folder / "base.yaml").write_text(YAML.replace("7", "8"))
    assert composed_ahead.composed("child", folder, []).config.trainer.max_steps == 8


def test_a_file_that_is_gone_is_reported(folder: Path) -> None:
    composed_ahead.compose_ahead("base", folder, [])
    (folder / "base.yaml").unlink()
    with pytest.raises(ConfigError, match=r"no file base\.yaml"):
        composed_ahead.composed("base", folder, [])


@pytest.mark.parametrize("source", ["file", "override"])
def test_values_from_the_environment_are_read_by_each_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setenv("WHERE", "here")
    key, value = "exp_manager.explicit_log_dir", "${oc.env:WHERE}"
    if source == "file":
        (folder / "base.yaml").write_text(f"defaults: [anymal, _self_]\n{key.replace('.', ': {')}: '{value}'}}\n")
    given = [f"{key}={value}"] if source == "override" else []
    assert composed_ahead.compose_ahead("base", folder, given).config.exp_manager.explicit_log_dir == "here"
    monkeypatch.setenv("WHERE", "there")
    assert composed_ahead.composed("base", folder, given).config.exp_manager.explicit_log_dir == "there"


def test_another_process_adopts_it(folder: Path) -> None:
    given = ["trainer.devices=2", "model.optim.lr=1.1e-7"]
    first = composed_ahead.compose_ahead("base", folder, given)
    (folder / "exported").write_bytes(composed_ahead.export())
    code = (
        "import sys; from pathlib import Path; from megatron_anymal.config import composed_ahead\n"
        "folder = Path(sys.argv[1]); composed_ahead.adopt((folder / 'exported').read_bytes())\n"
        "print(composed_ahead.composed('base', folder, sys.argv[2:]))\n"
        "assert 'hydra' not in sys.modules\n"
    )
    words = [sys.executable, "-c", code, str(folder), *given]
    done = subprocess.run(words, env=os.environ, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{first}\n"
