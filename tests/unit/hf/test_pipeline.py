"""An exported folder in transformers' pipeline, like any other image-text model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ask_pipeline
import pytest
from hf_parts import make_config, make_model, sections, write_export, write_media

from checkpoint_tools.exporting.chat_template import chat_template
from megatron_anymal.data.tokenizer import Tokenizer
from megatron_anymal.generation.export_generator import ExportedGenerator
from megatron_anymal.generation.prompts import prompt_of_files
from megatron_anymal.generation.sampling import Sampling

NEW = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> Path:
    """An export with the chat template that exports have."""
    folder = tmp_path_factory.mktemp("pipeline") / "model"
    folder.mkdir()
    config = make_config(sections("towers"), tokenizer_folder)
    write_export(folder, make_model(config, std=0.3), tokenizer_folder)
    placeholders = {section["kind"]: section["placeholder"] for section in config.modalities.values()}
    template = chat_template(placeholders, Tokenizer(tokenizer_folder).control)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_every_way_to_ask_gets_the_answer_of_generate(folder: Path, tmp_path: Path) -> None:
    image = write_media(tmp_path)["image"]
    done = subprocess.run(
        [sys.executable, "-I", ask_pipeline.__file__, str(folder), image, str(NEW)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    config = json.loads((folder / "config.json").read_text())
    generator = ExportedGenerator.of_folder(str(folder), config, "cpu", "float32", trust_remote_code=False)
    sampling = Sampling(max_new_tokens=NEW)
    [chat] = generator.answer([prompt_of_files([image], [], None, "what is this", chat=True)], sampling)
    [plain] = generator.answer([prompt_of_files([image], [], None, "what is this")], sampling)
    assert chat.strip() and plain.strip() and chat != plain
    assert report["answers"] == dict.fromkeys(report["answers"], chat.strip())
    assert report["plain"] == dict.fromkeys(report["plain"], plain.strip())
    assert "FutureWarning" not in done.stderr and "past_key_values" not in done.stderr
