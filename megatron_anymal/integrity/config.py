"""The integrity file: which classifiers look at what, and from which score on they reject a query.

It is read and compared with the classifiers' folders before anything slow is imported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import yaml

from megatron_anymal.config import ConfigError
from megatron_anymal.generation.rejection import IMAGE_AND_OUTPUT, INPUT_IMAGE, INPUT_TEXT, OUTPUT_TEXT
from megatron_anymal.integrity.folders import check_folder, content_hash
from megatron_anymal.modalities.base import nearest, parse_options


@dataclass
class ImageClassifier:
    """A HuggingFace image classifier, which looks at images and at frames of videos."""

    # Always "image".
    kind: str = ""
    # Folder of the model, relative to the integrity file.
    path: str = ""
    # Labels that are violations.
    labels: list[str] = field(default_factory=list)
    # Lowest score, above 0 and at most 1, at which one of them rejects the query.
    threshold: Optional[float] = None
    # Inputs computed together.
    batch_size: int = 32
    # Device, for example cuda:1; empty: CUDA if available, else the CPU.
    device: str = ""


@dataclass
class TextClassifier(ImageClassifier):
    """A HuggingFace text classifier, which looks at prompts and answers."""

    # input_text, output_text or both.
    stages: list[str] = field(default_factory=lambda: [INPUT_TEXT, OUTPUT_TEXT])
    # Tokens of a window, which longer texts are cut into; 0: as many as the model takes.
    max_length: int = 0
    # Tokens that neighbouring windows share.
    overlap: int = 32


@dataclass
class PairClassifier:
    """An AnyMAL model that is asked whether an answer, together with the media of its prompt, is a violation."""

    # Always "anymal".
    kind: str = ""
    # Folder of a checkpoint, of its run, or of an export, relative to the integrity file.
    path: str = ""
    # What it is asked after the media; {answer} stands for the answer.
    question: str = ""
    # The answer for a violation, and the one for none.
    words: list[str] = field(default_factory=lambda: ["yes", "no"])
    # Lowest probability of the first word, given that it is one of both, at which it rejects the query.
    threshold: Optional[float] = None
    # Whether the question is a user turn of a conversation, as after SFT.
    chat: bool = True
    # Candidates computed together.
    batch_size: int = 16
    # Device of an export; empty: CUDA if available, else the CPU.
    device: str = ""


Classifier = Union[ImageClassifier, TextClassifier, PairClassifier]
# Kind of media as codes in `unchecked_media`: no classifier can look at codes.
CODES = "codes"
_KINDS: dict[str, type] = {"image": ImageClassifier, "text": TextClassifier, "anymal": PairClassifier}


@dataclass
class IntegrityConfig:
    """The settings of an integrity file."""

    # Classifiers by the names that they have in reason codes.
    classifiers: dict
    # Kinds of media that pass although no classifier can look at them, such as audio and imu.
    unchecked_media: list[str] = field(default_factory=list)
    # Frames of a video that are checked, evenly spread.
    video_frames: int = 8
    # Characters after which a sentence of an answer that has not ended is checked.
    sentence_characters: int = 400
    # Characters of such a stretch that are held back, and context before each sentence that it is checked with.
    overlap_characters: int = 80

    def of_stage(self, stage: str) -> dict[str, Classifier]:
        """The classifiers of a stage, by name."""
        return {name: one for name, one in self.classifiers.items() if stage in stages_of(one)}

    def fingerprint(self) -> str:
        """Hash of the settings and of the contents of the classifiers' folders.

        Raises:
            CheckpointError, NoneLeft: the folder of a pair classifier has no valid checkpoint.
        """
        folders = {name: content_hash(Path(one.path)) for name, one in self.classifiers.items()}
        return hashlib.sha256(f"{self} {sorted(folders.items())}".encode()).hexdigest()


def stages_of(classifier: Classifier) -> list[str]:
    """The stages at which a classifier looks at a query."""
    if isinstance(classifier, PairClassifier):
        return [IMAGE_AND_OUTPUT]
    return classifier.stages if isinstance(classifier, TextClassifier) else [INPUT_IMAGE]


def read_integrity(path: str) -> IntegrityConfig:
    """Read an integrity file, and compare it with the settings of the models that it names.

    Raises:
        ConfigError: the file is missing or not YAML, a key or value is wrong, or a folder does not hold the model or
            the labels that the file states.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"Integrity checks: there is no file {path!r}. Correct the path.")
    try:
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path!r} is not YAML: {' '.join(str(error).split())}.") from None
    entries = value.get("classifiers") if isinstance(value, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise ConfigError(f"{path!r} has no section `classifiers` with at least one. See docs/guides/integrity.md.")
    config: IntegrityConfig = parse_options(IntegrityConfig, value, path)
    for name in ("video_frames", "sentence_characters"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{path}.{name}={getattr(config, name)} must be at least 1.")
    if not 0 <= config.overlap_characters < config.sentence_characters:
        raise ConfigError(
            f"{path}.overlap_characters={config.overlap_characters} must be at least 0 and below "
            f"sentence_characters={config.sentence_characters}."
        )
    config.classifiers = {str(name): _classifier(entry, file, str(name)) for name, entry in entries.items()}
    return config


def _classifier(entry: Any, file: Path, name: str) -> Classifier:
    where = f"{file}.classifiers.{name}"
    if not isinstance(entry, Mapping) or entry.get("kind") not in _KINDS:
        stated = entry.get("kind", "") if isinstance(entry, Mapping) else entry
        raise ConfigError(f"{where}.kind={stated!r} is not a kind of classifier. {nearest(str(stated), _KINDS)}")
    classifier: Classifier = parse_options(_KINDS[entry["kind"]], entry, where)
    required = ["path", "threshold", "question" if isinstance(classifier, PairClassifier) else "labels"]
    for key in required:
        if getattr(classifier, key) in ("", None, []):
            raise ConfigError(f"{where}.{key} is missing. Add it; see docs/guides/integrity.md.")
    if not 0 < (classifier.threshold or 0) <= 1:
        raise ConfigError(f"{where}.threshold={classifier.threshold} must be above 0 and at most 1.")
    if classifier.batch_size < 1:
        raise ConfigError(f"{where}.batch_size={classifier.batch_size} must be at least 1.")
    if isinstance(classifier, TextClassifier):
        _check_text(classifier, where)
    if isinstance(classifier, PairClassifier):
        _check_pair(classifier, where)
    classifier.path = str(file.parent / Path(classifier.path).expanduser())
    labels = [] if isinstance(classifier, PairClassifier) else classifier.labels
    check_folder(classifier.kind, Path(classifier.path), labels, where)
    return classifier


def _check_text(classifier: TextClassifier, where: str) -> None:
    known = (INPUT_TEXT, OUTPUT_TEXT)
    for stage in classifier.stages or [""]:
        if stage not in known:
            raise ConfigError(f"{where}.stages: {stage!r} is not a stage of texts. {nearest(stage, known)}")
    if classifier.overlap < 0 or classifier.max_length < 0:
        raise ConfigError(f"{where}: overlap and max_length must be at least 0.")
    if classifier.max_length and classifier.overlap >= classifier.max_length:
        raise ConfigError(
            f"{where}.overlap={classifier.overlap} must be below max_length={classifier.max_length}, or windows do not "
            "advance."
        )


def _check_pair(classifier: PairClassifier, where: str) -> None:
    if "{answer}" not in classifier.question:
        raise ConfigError(f"{where}.question has no {{answer}}, which stands for the answer. Add it.")
    if len(classifier.words) != 2 or len(set(classifier.words)) != 2 or "" in classifier.words:
        raise ConfigError(f"{where}.words={classifier.words} must be two different words, the first for a violation.")
