"""`anymal inspect` shows codes as named items with their numbers of codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from codes import codes, item, with_codes
from manifests import shards_of
from tiny import make_config, png

from megatron_anymal.cli import inspect
from megatron_anymal.config import RunConfig

FILES = {"s.codes.npy": codes([[1, 2], [3, 0]]), "b.codes.npy": codes([2, 2, 3]), "x.png": png(1)}
QUESTION = [{"text": "what is"}, {"media": "x.png"}, item("s", "speech")]
ANSWER = [{"text": "one"}, item("b", "picture")]
LINE = {
    "key": "k",
    "messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}],
}


def write_config(config: RunConfig, file: Path) -> None:
    file.write_text(yaml.safe_dump({"defaults": ["anymal", "_self_"], **config.to_dict()}))


@pytest.fixture
def folder(tmp_path: Path, tokenizer_folder: str) -> str:
    return shards_of(tmp_path / "data", tokenizer_folder, [LINE], FILES)


@pytest.fixture
def named(folder: str, tmp_path: Path, tokenizer_folder: str) -> list[str]:
    config = with_codes(make_config(folder, tokenizer_folder, tmp_path / "run"))
    config.model.global_batch_size = 1
    write_config(config, tmp_path / "codes.yaml")
    return ["--config-name", "codes", "--config-path", str(tmp_path)]


def test_a_sample_with_a_configuration(named: list[str], folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert inspect.main(["--sample", "k", *named]) == 0
    printed = capsys.readouterr().out
    assert "media  speech codes (prompt in 2 codebooks) '1.codes.npy': codes 2, highest code 3" in printed
    assert "media  target picture codes (answer) '2.codes.npy': codes 3, highest code 3" in printed
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert "8 39 speech: 2 codes between its marks" in lines
    assert "17 32 picture: 3 codes between its marks target" in lines
    assert "23 tokens, 7 targets:" in lines


def test_a_folder_without_a_configuration(
    folder: str, tokenizer_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert inspect.main([folder, "--tokenizer", tokenizer_folder]) == 0
    printed = capsys.readouterr().out
    assert "picture codes (answer): 1 items, codes 3 / 3 / 3, highest code 3 / 3 / 3" in printed
    assert "1 of 1 samples with their media: none bad" in printed


def test_codes_outside_their_codebook_are_listed(
    tmp_path: Path, tokenizer_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {**FILES, "b.codes.npy": codes([2, 5, 3])}
    folder = shards_of(tmp_path / "data", tokenizer_folder, [LINE], files)
    write_config(with_codes(make_config(folder, tokenizer_folder, tmp_path / "run")), tmp_path / "codes.yaml")
    assert inspect.main(["--config-name", "codes", "--config-path", str(tmp_path)]) == 1
    assert "bad: k: media '2.codes.npy' has the code 5 at position 1, outside codebook 0" in capsys.readouterr().out


def test_the_page_names_items(named: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main(["--html", str(tmp_path / "page.html"), "--samples", "1", *named]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "speech codes (prompt in 2 codebooks) 1" in page
    assert "speech: 2 codes</span>" in page
    assert "picture: 3 codes</mark>" in page
