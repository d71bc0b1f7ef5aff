"""docs/guides/integrity.md: its commands run, and its file can be read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import yaml
from commands import PAGES, blocks, commands, run
from engine import train
from integrity_classifiers import image_classifier, integrity_file, text_classifier, text_section
from ranks import run_ranks
from tiny import make_config

from megatron_anymal.integrity.config import read_integrity

PAGE = PAGES["docs/guides/integrity.md"]


def test_commands_run_and_the_file_can_be_read(mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> None:
    config = make_config(mixed_shards, tokenizer_folder, tmp_path / "runs" / "mine")
    config.trainer.max_steps = config.exp_manager.checkpoint.every_n_train_steps = 1
    run_ranks(1, train, config)
    shutil.copytree(mixed_shards, tmp_path / "data" / "mine")
    shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    model = text_classifier(tmp_path / "words")
    integrity_file(tmp_path / "integrity.yaml", {"words": text_section(model)})
    texts = ["The dog runs.", "The zorpal runs."]
    lines = [json.dumps({"key": f"k{n}", "parts": [{"text": text}]}) for n, text in enumerate(texts)]
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    printed = [run(command, tmp_path) for command in commands(PAGE)]
    assert len(printed) == 4 and all("integrity: " in text and " s in checks, " in text for text in printed)
    assert "1 filtered" in printed[-1] and "output_text/words/zorp 1" in printed[-1]
    [text] = blocks(PAGE, "yaml")
    given = yaml.safe_load(text)
    image_classifier(tmp_path / "pictures")
    for name, path, labels in (("pictures", "pictures", ["square"]), ("words", "words", ["zorp"])):
        given["classifiers"][name] |= {"path": path, "labels": labels}
    given["classifiers"]["pair"]["path"] = "runs/mine"
    (tmp_path / "page.yaml").write_text(yaml.safe_dump(given))
    integrity = read_integrity(str(tmp_path / "page.yaml"))
    assert integrity.unchecked_media == ["audio", "imu"] and set(integrity.of_stage("input_text")) == {"words"}
