"""The code in an exported folder works without this project being installed."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_parts import make_config, make_model, prompts_about, sections, write_export, write_media
from tiny import SPECIAL, modalities, npy, png
from transformers import AutoTokenizer

from megatron_anymal.config import ConfigError, EncoderConfig, ModalityConfig, ProjectorConfig
from megatron_anymal.hf import remote_code
from megatron_anymal.hf.modeling_anymal import AnyMALForConditionalGeneration
from megatron_anymal.hf.processing_anymal import AnyMALProcessor
from megatron_anymal.hf.remote_code import write_code
from megatron_anymal.modalities import load_plugins

LOADER = Path(__file__).with_name("load_export.py")
THERMAL = Path(__file__).parents[3] / "examples" / "thermal_modality.py"


def load(folder: Path, prompts: list[dict[str, Any]], hidden: str = "") -> Any:
    """Output of load_export.py for a folder."""
    file = folder.with_name("prompts.json")
    file.write_text(json.dumps(prompts))
    environment = {
        "PATH": os.environ["PATH"],
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(folder.with_name("modules")),
        "HIDDEN_LIBRARIES": hidden,
    }
    words = [sys.executable, str(LOADER), str(folder), str(file)]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def expected_of(
    model: AnyMALForConditionalGeneration, tokenizer: str, prompts: list[dict[str, Any]]
) -> tuple[Any, torch.Tensor, list[str]]:
    processor = AnyMALProcessor(AutoTokenizer.from_pretrained(tokenizer), model.config.modalities)
    inputs = processor(prompts)
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return inputs, logits, processor.answers(output, inputs)


@pytest.mark.parametrize("variant", ["towers", pytest.param("others", marks=pytest.mark.slow)])
def test_a_folder_answers_by_itself(variant: str, tokenizer_folder: str, tmp_path: Path) -> None:
    tied = variant == "others"
    model = make_model(make_config(sections(variant), tokenizer_folder, tie_word_embeddings=tied))
    folder = tmp_path / "export"
    write_export(folder, model, tokenizer_folder)
    prompts = prompts_about(write_media(tmp_path))
    inputs, logits, answers = expected_of(model, tokenizer_folder, prompts)
    report = load(folder, prompts)
    assert report["loading"] == {} and report["module"] == "transformers_modules"
    assert report["ids"] == inputs["input_ids"].tolist()
    assert report["pieces"] == {name: float(pieces.double().sum()) for name, pieces in inputs["media"].items()}
    torch.testing.assert_close(torch.tensor(report["logits"]), logits)
    assert report["answers"] == answers and len(set(answers)) > 1
    assert report["dtypes"] == ["torch.bfloat16"]


def test_images_alone_need_neither_sound_nor_video(tokenizer_folder: str, tmp_path: Path) -> None:
    model = make_model(make_config({"image": modalities()["image"]}, tokenizer_folder))
    write_export(tmp_path / "export", model, tokenizer_folder)
    (tmp_path / "a.png").write_bytes(png(0))
    prompts = [{"parts": [{"media": str(tmp_path / "a.png")}, {"text": "what"}]}]
    report = load(tmp_path / "export", prompts, hidden="av,soundfile,soxr,simplejpeg")
    assert report["libraries"] == ["PIL"]
    assert report["answers"] == expected_of(model, tokenizer_folder, prompts)[2]


@pytest.mark.slow
def test_motion_alone_needs_no_library_of_media(tokenizer_folder: str, tmp_path: Path) -> None:
    model = make_model(make_config({"imu": modalities()["imu"]}, tokenizer_folder))
    write_export(tmp_path / "export", model, tokenizer_folder)
    (tmp_path / "a.npy").write_bytes(npy(0))
    prompts = [{"parts": [{"media": str(tmp_path / "a.npy"), "rate": 50}, {"text": "what"}]}]
    report = load(tmp_path / "export", prompts, hidden="av,soundfile,soxr,simplejpeg,PIL")
    assert report["libraries"] == [] and report["answers"] == expected_of(model, tokenizer_folder, prompts)[2]


def test_a_plugins_modality_comes_along(tokenizer_folder: str, tmp_path: Path) -> None:
    load_plugins([str(THERMAL)])
    thermal = ModalityConfig(
        encoder=EncoderConfig(type="thermal_patches", config={"width": 16}),
        projector=ProjectorConfig(type="linear", num_layers=1, num_tokens=2),
        options={"resolution": 16},
        placeholder=SPECIAL[2],
    )
    model = make_model(make_config({"thermal": thermal}, tokenizer_folder))
    write_export(tmp_path / "export", model, tokenizer_folder, [THERMAL])
    (tmp_path / "a.thermal.npy").write_bytes(npy(0))
    picture = {"media": str(tmp_path / "a.thermal.npy"), "modality": "thermal"}
    prompts = [{"parts": [picture, {"text": "what"}]}]
    report = load(tmp_path / "export", prompts)
    assert report["loading"] == {} and report["answers"] == expected_of(model, tokenizer_folder, prompts)[2]


def test_every_root_names_all_files_and_none_of_the_packages(tmp_path: Path) -> None:
    written = write_code(tmp_path, [THERMAL])
    assert set(written) == {file.name for file in tmp_path.iterdir()}
    needs = {}
    for name in written:
        text = (tmp_path / name).read_text()
        assert text.startswith("# From megatron_anymal ") and "TYPE_CHECKING:" not in text
        # The imports that transformers looks for.
        needs[name] = {f"{module}.py" for module in re.findall(r"^\s*from\s+\.(\S+)\s+import", text, re.MULTILINE)}
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                tops = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                tops = {str(node.module).split(".")[0]}
            else:
                continue
            assert tops <= {*sys.stdlib_module_names, "torch", "numpy", "transformers", "safetensors"}, name
    for root in ("configuration_anymal.py", "modeling_anymal.py", "processing_anymal.py"):
        for needed in needs[root]:
            assert needs[needed] <= needs[root], needed
        assert ("anymal_plugin_thermal_modality.py" in needs[root]) == (root != "configuration_anymal.py")
    assert needs["configuration_anymal.py"] == {
        "anymal_config.py",
        "anymal_config_data_section.py",
        "anymal_config_field_docs.py",
        "anymal_config_model_section.py",
        "anymal_config_optim_section.py",
        "anymal_config_schema.py",
    }


def test_each_file_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parse, parsed = ast.parse, []
    monkeypatch.setattr(remote_code.ast, "parse", lambda source: (parsed.append(source), parse(source))[1])
    remote_code._read.cache_clear()
    written = write_code(tmp_path, [THERMAL])
    assert len(parsed) == len(set(parsed)) == len(written)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import megatron.core\n", "the plug-in mine.py, line 1, imports megatron.core, which an exported model must"),
        ("def f():\n    from hydra import compose\n", "line 2, imports hydra"),
        (
            "from megatron_anymal.train.build import build\n",
            "megatron_anymal.train.build, line .*imports megatron.core",
        ),
        ("import megatron_anymal.config\n", "line 1: an export can only hold `from megatron_anymal... import NAME`"),
        ("from megatron_anymal.modalities import base\n", "imports the module megatron_anymal.modalities.base"),
        ("from megatron_anymal.nothing import base\n", "there is no module megatron_anymal.nothing"),
        ("from . import other\n", "cannot hold a relative import"),
        ("def (", "is not a Python file that can be copied"),
    ],
)
def test_a_plugin_that_cannot_come_along_is_refused(source: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(source)
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match=message):
        write_code(tmp_path / "out", [tmp_path / "mine.py"])
    assert not list((tmp_path / "out").iterdir())


def test_two_plugins_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text("")
    with pytest.raises(ConfigError, match="have the same name"):
        write_code(tmp_path, [tmp_path / "a" / "mine.py", tmp_path / "b" / "mine.py"])
