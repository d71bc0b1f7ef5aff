"""HuggingFace classifiers from local folders. Scores are computed as transformers' pipelines compute them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import transformers
from torch import Tensor

from megatron_anymal.config import ConfigError
from megatron_anymal.integrity.config import ImageClassifier, TextClassifier

if TYPE_CHECKING:
    from PIL import Image

Input = TypeVar("Input", contravariant=True)
# Above this, a tokenizer's model_max_length stands for "not known".
_NO_LENGTH = 1_000_000
# RoBERTa's position embeddings have two rows more than it takes tokens.
_UNUSED_POSITIONS = 2


class Scorer(Protocol[Input]):
    """A loaded classifier."""

    def scores(self, inputs: Sequence[Input]) -> list[Mapping[str, float]]:
        """Score, 0 to 1, of each label for each input. Whatever it raises rejects the query."""


class ImageScorer:
    """A loaded image classifier."""

    def __init__(self, config: ImageClassifier, where: str):
        """Load the model and its image processor.

        Args:
            where: the classifier's section, for messages.

        Raises:
            ConfigError: they cannot be loaded, weights are missing, or there is no such device.
        """
        self._batch_size = config.batch_size
        self._model = _load(transformers.AutoModelForImageClassification, config, where)
        self._processor = _preprocessing(transformers.AutoImageProcessor, config, where)

    def scores(self, inputs: Sequence[Image.Image]) -> list[Mapping[str, float]]:
        """Score of each label for each RGB image."""
        results: list[Mapping[str, float]] = []
        for start in range(0, len(inputs), self._batch_size):
            batch = self._processor(list(inputs[start : start + self._batch_size]), return_tensors="pt")
            results += _scores(self._model, batch)
        return results


class TextScorer:
    """A loaded text classifier. Texts longer than a window get the highest score of all their windows."""

    def __init__(self, config: TextClassifier, where: str):
        """Load the model and its tokenizer.

        Args:
            where: the classifier's section, for messages.

        Raises:
            ConfigError: they cannot be loaded, weights are missing, there is no such device, or windows do not fit the
                model.
        """
        self._batch_size = config.batch_size
        self._model = _load(transformers.AutoModelForSequenceClassification, config, where)
        self._tokenizer = _preprocessing(transformers.AutoTokenizer, config, where)
        if not self._tokenizer.is_fast:
            raise ConfigError(
                f"{where}.path: {config.path!r} has no tokenizer.json, which windows need. Save its fast tokenizer."
            )
        longest = _longest(self._tokenizer, self._model.config)
        if config.max_length > longest:
            raise ConfigError(
                f"{where}.max_length={config.max_length}, but the model takes {longest} tokens. Lower it."
            )
        self._length, self._overlap = config.max_length or longest, config.overlap
        if self._overlap >= self._length - self._tokenizer.num_special_tokens_to_add():
            raise ConfigError(
                f"{where}.overlap={self._overlap} does not fit into windows of {self._length} tokens. Lower it."
            )

    def scores(self, inputs: Sequence[str]) -> list[Mapping[str, float]]:
        """Score of each label for each text."""
        windows = self._tokenizer(
            list(inputs),
            truncation=True,
            max_length=self._length,
            stride=self._overlap,
            return_overflowing_tokens=True,
        )
        owners = windows.pop("overflow_to_sample_mapping")
        results: list[dict[str, float]] = [{} for _ in inputs]
        for start in range(0, len(owners), self._batch_size):
            rows = slice(start, start + self._batch_size)
            batch = self._tokenizer.pad({name: values[rows] for name, values in windows.items()}, return_tensors="pt")
            for owner, scores in zip(owners[rows], _scores(self._model, batch)):
                for label, score in scores.items():
                    # NaN must not be lost in a maximum.
                    known = results[owner].get(label, score)
                    results[owner][label] = known if known != known or known > score else score
        return list(results)


def _load(family: Any, config: ImageClassifier, where: str) -> Any:
    """The model of a classifier's folder, in evaluation mode, on its device."""
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model, info = family.from_pretrained(
            config.path, local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
        model = model.eval().requires_grad_(False).to(device)
    # transformers, safetensors and torch raise whatever they like for damaged files and unknown devices.
    except Exception as error:
        raise _unloadable(config, where, error) from error
    if missing := sorted(info["missing_keys"]):
        # transformers would fill them with random numbers.
        raise ConfigError(f"{where}.path: {config.path!r} lacks {len(missing)} weights, the first {missing[0]!r}.")
    return model


def _preprocessing(family: Any, config: ImageClassifier, where: str) -> Any:
    """The image processor or tokenizer of a classifier's folder."""
    try:
        return family.from_pretrained(config.path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise _unloadable(config, where, error) from error


def _unloadable(config: ImageClassifier, where: str, error: Exception) -> ConfigError:
    return ConfigError(f"{where}.path: {config.path!r} cannot be loaded: {' '.join(str(error).split())}")


@torch.no_grad()
def _scores(model: Any, batch: Any) -> Iterator[Mapping[str, float]]:
    """Each input's scores by label: sigmoids if labels are independent, else their softmax."""
    logits: Tensor = model(**batch.to(model.device)).logits.float()
    config = model.config
    independent = config.problem_type == "multi_label_classification" or config.num_labels == 1
    scores = logits.sigmoid() if independent else logits.softmax(-1)
    # Not in the order of config.json, where label 10 often stands before label 2.
    labels = [config.id2label[number] for number in range(scores.size(-1))]
    return (dict(zip(labels, row)) for row in scores.tolist())


def _longest(tokenizer: Any, config: Any) -> int:
    """Maximum number of tokens that the model takes."""
    positions = getattr(config, "max_position_embeddings", None) or _NO_LENGTH
    known = [tokenizer.model_max_length, positions - _UNUSED_POSITIONS]
    return int(min(512 if min(known) >= _NO_LENGTH - _UNUSED_POSITIONS else _NO_LENGTH, *known))
