"""Checks of queries: input images, input text, output text, and the pair of media and output (AnyMAL, appendix D).

`Checks` is what generation, evaluation, the preparation of data and servers use. A failing classifier never lets a
query through: if it raises, or returns anything but scores from 0 to 1, the query is rejected.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Optional, Protocol

from megatron_anymal.config import DEFAULT_LIMITS, LimitsConfig
from megatron_anymal.data.prompt_encoder import modality_of
from megatron_anymal.data.records import CodesPart, MediaPart, TextPart
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.rejection import (
    FAILED,
    IMAGE_AND_OUTPUT,
    INPUT_IMAGE,
    INPUT_TEXT,
    OUTPUT_TEXT,
    UNCHECKED,
    Rejection,
)
from megatron_anymal.integrity.classifiers import ImageScorer, Scorer, TextScorer
from megatron_anymal.integrity.config import CODES, IntegrityConfig, PairClassifier, TextClassifier
from megatron_anymal.integrity.pair import PairScorer
from megatron_anymal.integrity.pictures import KINDS, pictures_of
from megatron_anymal.integrity.sentences import Sentence, SentenceGate, Sentences
from megatron_anymal.modalities import MediaError

# An input of a classifier, and the position of the query that it belongs to.
_Owned = tuple[int, Any]


class Checks(Protocol):
    """The interface of the integrity layer. Calls from several threads take turns."""

    def check_prompts(self, prompts: Sequence[Prompt]) -> list[Optional[Rejection]]:
        """Check images and texts of prompts, before anything is generated.

        Returns:
            For each prompt, why it is rejected; None if it is not.

        Raises:
            DataError, MediaError: a media item has no modality or cannot be read.
        """

    def check_answers(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Optional[Rejection]]:
        """Check complete answers, sentence by sentence: with the same results as `gate`, in fewer and larger batches.

        Returns:
            For each answer, why it is rejected; None if it is not.
        """

    def gate(self, prompt: Prompt) -> SentenceGate:
        """A gate for the answer to a prompt that is streamed."""


class IntegrityChecks:
    """Checks with the classifiers of an integrity file."""

    def __init__(self, config: IntegrityConfig, kinds: Collection[str], limits: LimitsConfig = DEFAULT_LIMITS):
        """Load the classifiers.

        Args:
            kinds: kinds of media that prompts may hold.
            limits: maximum sizes of media.

        Raises:
            ConfigError: a classifier cannot be loaded.
        """
        self._config, self._limits = config, limits
        self._names = {kind: kind for kind in kinds}
        self._scorers: dict[str, Scorer[Any]] = {}
        for name, one in config.classifiers.items():
            scorer: Any = PairScorer if isinstance(one, PairClassifier) else ImageScorer
            scorer = TextScorer if isinstance(one, TextClassifier) else scorer
            self._scorers[name] = scorer(one, f"classifiers.{name}")
        self._lock = threading.RLock()
        # Seconds spent in checks.
        self.seconds = 0.0
        # Queries checked, and those rejected by reason code.
        self.queries = 0
        self.rejected: Counter[str] = Counter()

    def check_prompts(self, prompts: Sequence[Prompt]) -> list[Optional[Rejection]]:
        """As in `Checks`.

        Raises:
            ConfigError, DataError, MediaError: a media item is of no kind that prompts may hold, or cannot be read.
        """
        verdicts: list[Optional[Rejection]] = [None] * len(prompts)
        with self._timed():
            if self._config.of_stage(INPUT_IMAGE):
                pictures = [
                    (position, picture)
                    for position, prompt in enumerate(prompts)
                    for picture in self._pictures(prompt, position, verdicts)
                ]
                self._judge(INPUT_IMAGE, pictures, verdicts)
            texts = [(position, text) for position, prompt in enumerate(prompts) if (text := text_of(prompt).strip())]
            self._judge(INPUT_TEXT, texts, verdicts)
            self.queries += len(prompts)
            self.rejected.update(verdict.code for verdict in verdicts if verdict)
        return verdicts

    def check_answers(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Optional[Rejection]]:
        """As in `Checks`.

        Raises:
            ConfigError, DataError, MediaError: a media item is of no kind that prompts may hold.
        """
        sentences = []
        for position, answer in enumerate(answers):
            splitter = Sentences(self._config.sentence_characters, self._config.overlap_characters)
            sentences += [(position, one) for part in (splitter.add(answer), splitter.finish()) for one in part]
        with self._timed():
            verdicts = self._check_sentences(prompts, sentences)
            self.rejected.update(verdict.code for verdict in verdicts if verdict)
        return verdicts

    def gate(self, prompt: Prompt) -> SentenceGate:
        """As in `Checks`."""
        return SentenceGate(
            partial(self.check_sentence, prompt), self._config.sentence_characters, self._config.overlap_characters
        )

    def check_sentence(self, prompt: Prompt, sentence: Sentence) -> Optional[Rejection]:
        """Check one sentence of the answer to a prompt, and what precedes it.

        Raises:
            ConfigError, DataError, MediaError: a media item is of no kind that prompts may hold.
        """
        with self._timed():
            [verdict] = self._check_sentences([prompt], [(0, sentence)])
            self.rejected.update([verdict.code] if verdict else [])
        return verdict

    def _check_sentences(
        self, prompts: Sequence[Prompt], sentences: Sequence[tuple[int, Sentence]]
    ) -> list[Optional[Rejection]]:
        """The rejection of each prompt's answer; `sentences` name the position of their prompt."""
        verdicts: list[Optional[Rejection]] = [None] * len(prompts)
        non_empty = [(position, one) for position, one in sentences if one.text.strip()]
        texts = [(position, text) for position, one in non_empty for text in self._readings(one)]
        self._judge(OUTPUT_TEXT, texts, verdicts)
        for name in self._config.of_stage(IMAGE_AND_OUTPUT):
            pair: Any = self._scorers[name]
            asked = [
                self._visible(prompts[position], pair.kinds, position, verdicts) for position in range(len(prompts))
            ]
            pairs = [
                (position, (asked[position], one.before + one.text))
                for position, one in non_empty
                if asked[position].media
            ]
            self._judge(IMAGE_AND_OUTPUT, pairs, verdicts, [name])
        return verdicts

    def _readings(self, sentence: Sentence) -> Iterator[str]:
        """The sentence, and the sentence with what precedes it: a split at an abbreviation must not hide anything."""
        yield sentence.text.strip()
        size = self._config.overlap_characters
        if before := sentence.before[len(sentence.before) - min(size, len(sentence.before)) :].strip():
            yield f"{before} {sentence.text.strip()}"

    def _pictures(self, prompt: Prompt, position: int, verdicts: list[Optional[Rejection]]) -> Iterator[Any]:
        for part, kind, data in self._media(prompt):
            if kind in KINDS:
                try:
                    yield from pictures_of(kind, data, self._config.video_frames, self._limits)
                except MediaError as error:
                    raise MediaError(f"{part.media!r}: {error}.") from error
            elif kind not in self._config.unchecked_media:
                verdicts[position] = verdicts[position] or _unchecked(INPUT_IMAGE, kind)

    def _visible(
        self, prompt: Prompt, kinds: Collection[str], position: int, verdicts: list[Optional[Rejection]]
    ) -> Prompt:
        """The prompt's media that the model of a pair classifier takes, without its texts."""
        parts, files = [], []
        for (part, kind, _), file in zip(self._media(prompt), prompt.media):
            if kind in kinds:
                parts.append(MediaPart(part.media, kind, part.attributes))
                files.append(file)
            elif kind not in self._config.unchecked_media:
                verdicts[position] = verdicts[position] or _unchecked(IMAGE_AND_OUTPUT, kind)
        return Prompt(parts, files)

    def _media(self, prompt: Prompt) -> Iterator[tuple[MediaPart, str, bytes]]:
        """Media parts of a prompt with their kinds and contents."""
        parts = (part for part in prompt.parts if isinstance(part, MediaPart))
        for part, file in zip(parts, prompt.media):
            kind = CODES if isinstance(part, CodesPart) else modality_of(part, file, self._names)
            yield part, kind, file.data

    def _judge(
        self,
        stage: str,
        inputs: Sequence[_Owned],
        verdicts: list[Optional[Rejection]],
        names: Optional[Sequence[str]] = None,
    ) -> None:
        """Reject queries by the classifiers of a stage, or by those of these names."""
        for name in self._config.of_stage(stage) if names is None else names:
            # A query that is rejected already needs no further look.
            open_inputs = [(position, one) for position, one in inputs if verdicts[position] is None]
            for position, rejection in self._rejections(stage, name, open_inputs):
                verdicts[position] = verdicts[position] or rejection

    def _rejections(self, stage: str, name: str, inputs: Sequence[_Owned]) -> Iterator[tuple[int, Rejection]]:
        """Rejections by a classifier; those of one query in the order of its inputs."""
        if not inputs:
            return
        try:
            results = self._scorers[name].scores([one for _, one in inputs])
            if len(results) != len(inputs):
                raise RuntimeError(f"{len(results)} results for {len(inputs)} inputs")
        # A classifier may raise anything, and whatever it raises must not let a query pass.
        except Exception as error:
            if len(inputs) > 1:
                # One input must not reject the other queries of the batch.
                for one in inputs:
                    yield from self._rejections(stage, name, [one])
                return
            detail = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"integrity: {name!r} failed, so the query is rejected: {detail}", file=sys.stderr, flush=True)
            yield inputs[0][0], Rejection(stage, name, FAILED, detail=detail)
            return
        for (position, _), scores in zip(inputs, results):
            if rejection := self._violation(stage, name, scores):
                yield position, rejection

    def _violation(self, stage: str, name: str, scores: Any) -> Optional[Rejection]:
        """The violating label with the highest score, if that reaches the threshold."""
        one = self._config.classifiers[name]
        labels = one.words[:1] if isinstance(one, PairClassifier) else one.labels
        if wrong := [label for label in labels if not 0 <= scores.get(label, -1.0) <= 1]:
            return Rejection(stage, name, FAILED, detail=f"its score of {wrong[0]!r} is {scores.get(wrong[0])}")
        label = max(labels, key=lambda label: scores[label])
        return Rejection(stage, name, label, scores[label]) if scores[label] >= one.threshold else None

    @contextmanager
    def _timed(self) -> Iterator[None]:
        with self._lock:
            began = time.perf_counter()
            try:
                yield
            finally:
                self.seconds += time.perf_counter() - began


def text_of(prompt: Prompt) -> str:
    """The texts of a prompt, without the chat format's control tokens."""
    return "\n".join(part.text for part in prompt.parts if isinstance(part, TextPart) and not part.control)


def overhead(checks: IntegrityChecks, seconds: float) -> str:
    """One line about checks: what they rejected, and the share of the time that they took.

    Args:
        seconds: of the whole work that they were part of.
    """
    codes = ", ".join(f"{code} {count}" for code, count in checks.rejected.most_common())
    share = checks.seconds / seconds if seconds else 0.0
    return (
        f"integrity: {checks.queries} queries checked, {checks.rejected.total()} rejected"
        f"{f' ({codes})' if codes else ''}; {checks.seconds:.2f} s in checks, {share:.1%} of {seconds:.2f} s"
    )


def _unchecked(stage: str, kind: str) -> Rejection:
    return Rejection(
        stage, "", UNCHECKED, detail=f"no classifier looks at {kind}; unchecked_media: [{kind}] would let it pass"
    )
