"""Mistakes in an integrity file are named and refused before a model is loaded, damaged folders when it is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from integrity_classifiers import image_section, integrity_file, text_section
from safetensors.torch import load_file, save_file

from megatron_anymal.config import ConfigError
from megatron_anymal.integrity.checks import IntegrityChecks
from megatron_anymal.integrity.config import read_integrity

PAIR = {"kind": "anymal", "threshold": 0.5, "question": "{answer} Is it wrong?"}
# Changes of the text classifier's section (None removes a key) -> words of the refusal.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"labels": ["zorpp"]}, "'zorpp' is not a label of .* Did you mean 'zorp'\\? Known: blick, fine, zorp"),
    ({"labels": []}, "words.labels is missing"),
    ({"threshold": None}, "words.threshold is missing"),
    ({"threshold": 0}, "words.threshold=0 must be above 0"),
    ({"threshold": 2.0}, "words.threshold=2.0 must be above 0 and at most 1"),
    ({"treshold": 0.5}, "words.treshold is not an option. Did you mean 'threshold'"),
    ({"kind": "txet"}, "words.kind='txet' is not a kind of classifier. Did you mean 'text'"),
    ({"kind": None}, "words.kind='' is not a kind"),
    ({"path": "/nowhere"}, "there is no folder '/nowhere'"),
    ({"stages": ["output"]}, "'output' is not a stage of texts"),
    ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ({"max_length": 8, "overlap": 8}, "overlap=8 must be below max_length=8"),
    ({"kind": "image", "overlap": None}, "holds BertForSequenceClassification, which is not for image classification"),
]


def changed(section: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**section, **change}.items() if value is not None}


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_wrong_section_is_refused(change: dict[str, Any], message: str, text_model: Path, tmp_path: Path) -> None:
    file = integrity_file(tmp_path / "integrity.yaml", {"words": changed(text_section(text_model), change)})
    with pytest.raises(ConfigError, match=message):
        read_integrity(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("classifiers: [", "is not YAML"),
        ("classifiers: {}", "no section `classifiers`"),
        ("[]", "no section `classifiers`"),
    ],
)
def test_a_wrong_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "integrity.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_integrity(str(file))
    with pytest.raises(ConfigError, match=r"no file ./nowhere\.yaml."):
        read_integrity("/nowhere.yaml")


def test_wrong_settings_are_refused(text_model: Path, tmp_path: Path) -> None:
    for settings, message in (
        ({"unchecked_medai": ["audio"]}, "Did you mean 'unchecked_media'"),
        ({"video_frames": 0}, "video_frames=0 must be at least 1"),
        ({"overlap_characters": 400}, "overlap_characters=400 must be at least 0 and below sentence_characters=400"),
    ):
        file = integrity_file(tmp_path / "integrity.yaml", {"words": text_section(text_model)}, **settings)
        with pytest.raises(ConfigError, match=message):
            read_integrity(file)


def test_a_wrong_pair_classifier_is_refused(text_model: Path, tmp_path: Path) -> None:
    for change, message in (
        ({"question": "Is it wrong?"}, r"question has no \{answer\}"),
        ({"question": None}, "question is missing"),
        ({"words": ["yes"]}, "two different words"),
        ({}, "has the model_type 'bert', not 'anymal'"),
    ):
        section = changed({**PAIR, "path": str(text_model)}, change)
        with pytest.raises(ConfigError, match=message):
            read_integrity(integrity_file(tmp_path / "integrity.yaml", {"pair": section}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id2label": None}, "has no id2label"),
        ({"architectures": ["BertModel"]}, "holds BertModel, which is not for text classification"),
        ({"architectures": None}, "holds none, which"),
        ({"auto_map": {"AutoModel": "own.Own"}}, "Python code of its own .* never run"),
    ],
)
def test_a_folder_of_another_kind_is_refused(
    change: dict[str, Any], message: str, text_model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(text_model, tmp_path / "model"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(changed(settings, change)))
    with pytest.raises(ConfigError, match=message):
        read_integrity(integrity_file(tmp_path / "i.yaml", {"words": text_section(folder)}))


def test_an_incomplete_folder_is_refused(text_model: Path, image_model: Path, tmp_path: Path) -> None:
    for number, (model, section, name, message) in enumerate(
        (
            (text_model, text_section, "config.json", "cannot be read as a model's settings"),
            (text_model, text_section, "model.safetensors", "no weights as safetensors"),
            (image_model, image_section, "preprocessor_config.json", "has no preprocessor_config.json"),
        )
    ):
        folder = Path(shutil.copytree(model, tmp_path / str(number)))
        (folder / name).unlink()
        # A pickle is no substitute.
        torch.save({}, folder / "pytorch_model.bin")
        with pytest.raises(ConfigError, match=message):
            read_integrity(integrity_file(tmp_path / "i.yaml", {"one": section(folder)}))


def test_weights_that_are_missing_or_damaged_are_refused(text_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(text_model, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = read_integrity(integrity_file(tmp_path / "i.yaml", {"words": text_section(folder)}))
    with pytest.raises(ConfigError, match=r"lacks 1 weights, the first 'classifier\.weight'"):
        IntegrityChecks(config, ("image",))
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"classifiers\.words\.path: .* cannot be loaded"):
        IntegrityChecks(config, ("image",))
    long = read_integrity(integrity_file(tmp_path / "j.yaml", {"words": text_section(text_model, max_length=64)}))
    with pytest.raises(ConfigError, match="max_length=64, but the model takes 30 tokens"):
        IntegrityChecks(long, ("image",))


def test_the_fingerprint_follows_settings_and_weights(text_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(text_model, tmp_path / "model"))
    first = read_integrity(integrity_file(tmp_path / "i.yaml", {"words": text_section(folder)})).fingerprint()
    again = read_integrity(integrity_file(tmp_path / "i.yaml", {"words": text_section(folder)})).fingerprint()
    other = read_integrity(integrity_file(tmp_path / "i.yaml", {"words": text_section(folder, threshold=0.4)}))
    assert first == again != other.fingerprint()
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    changed_weights = read_integrity(integrity_file(tmp_path / "i.yaml", {"words": text_section(folder)}))
    assert changed_weights.fingerprint() != first
