"""`anymal prepare --filter integrity=FILE`: violating samples stay out of the training data."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Optional, Union

from megatron_anymal.config import LimitsConfig
from megatron_anymal.data.filters import Facts
from megatron_anymal.data.prompt_encoder import MediaFile
from megatron_anymal.data.records import CodesPart, MediaPart, Part, TextPart
from megatron_anymal.data.shard_samples import SampleError
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.rejection import FAILED, Rejection
from megatron_anymal.integrity.config import CODES, read_integrity
from megatron_anymal.modalities import MODALITIES, MediaError

if TYPE_CHECKING:
    from megatron_anymal.integrity.checks import IntegrityChecks


class SampleFilter:
    """Checks samples as if they were queries: what the loss covers is the answer, everything else the prompt.

    Of a preference pair, the prompt and the chosen answer are checked: a rejected answer may be one that the model is
    to avoid.
    """

    def __init__(self, path: str, limits: LimitsConfig):
        """Read an integrity file.

        Args:
            limits: maximum sizes of media.

        Raises:
            ConfigError: the file, or the folder of a classifier, cannot be used.
        """
        self._config, self._limits = read_integrity(path), limits
        # Loaded for the first sample: packing and refusals start without them.
        self._checks: Optional[IntegrityChecks] = None
        self._began = time.perf_counter()

    def fingerprint(self) -> str:
        """Hash of the settings and of the classifiers.

        Raises:
            CheckpointError, NoneLeft: the folder of a pair classifier has no valid checkpoint.
        """
        return self._config.fingerprint()

    def refusals(self, samples: Sequence[Facts]) -> list[Union[str, SampleError]]:
        """For each sample, why it is excluded, with the reason code; empty if it is not. A SampleError for one that
        cannot be checked: a classifier failed, or its media cannot be decoded.

        Raises:
            ConfigError: a classifier cannot be loaded.
        """
        try:
            return [_reason(verdict) for verdict in self._verdicts([_query(facts) for facts in samples])]
        except MediaError as error:
            if len(samples) > 1:
                # One sample's media must not exclude the others.
                return [refusal for facts in samples for refusal in self.refusals([facts])]
            return [SampleError("media", f"its media file {error}")]

    def summary(self) -> str:
        """Samples checked and excluded, and the time spent in checks since the file was read."""
        from megatron_anymal.integrity.checks import overhead

        return overhead(self._loaded(), time.perf_counter() - self._began)

    def _loaded(self) -> IntegrityChecks:
        if self._checks is None:
            from megatron_anymal.integrity.checks import IntegrityChecks

            self._checks = IntegrityChecks(self._config, (*MODALITIES, CODES), self._limits)
        return self._checks

    def _verdicts(self, queries: Sequence[tuple[Prompt, str]]) -> list[Optional[Rejection]]:
        """Why queries, prompts with their answers, are rejected; None if they are not."""
        checks = self._loaded()
        verdicts = checks.check_prompts([prompt for prompt, _ in queries])
        passed = [number for number, verdict in enumerate(verdicts) if verdict is None]
        prompts, answers = [queries[number][0] for number in passed], [queries[number][1] for number in passed]
        for number, verdict in zip(passed, checks.check_answers(prompts, answers)):
            verdicts[number] = verdict
        return verdicts


def _query(facts: Facts) -> tuple[Prompt, str]:
    """A sample as the prompt of a query and its answer."""
    assert facts.sample is not None and facts.read is not None
    kinds = (kind for kind, _, _ in facts.media)
    asked: list[Part] = []
    learned: list[TextPart] = []
    files: list[MediaFile] = []
    for part in facts.sample.documents[0]:
        if isinstance(part, MediaPart):
            files.append(MediaFile(facts.read(part), part.media.lower().rpartition(".")[2]))
            kind = next(kinds)
            asked.append(MediaPart(part.media, CODES if isinstance(part, CodesPart) else kind, part.attributes))
        elif not part.control:
            (learned if part.loss else asked).append(TextPart(part.text))
    return Prompt(asked, files), "\n".join(part.text for part in learned)


def _reason(verdict: Optional[Rejection]) -> Union[str, SampleError]:
    if verdict is None:
        return ""
    if verdict.label == FAILED:
        return SampleError("unchecked", f"a classifier could not check it: {verdict.code}: {verdict.detail}.")
    return verdict.code + ("" if verdict.score is None else f" with a score of {verdict.score:.3f}")
