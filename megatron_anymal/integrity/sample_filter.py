"""`anymal prepare --filter integrity=FILE`: violating samples stay out of the training data."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Optional

from megatron_anymal.config import LimitsConfig
from megatron_anymal.data.prompt_encoder import MediaFile
from megatron_anymal.data.records import CodesPart, MediaPart, Part, Sample, TextPart
from megatron_anymal.data.shard_samples import SampleError
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.rejection import FAILED
from megatron_anymal.integrity.config import CODES, read_integrity

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

    def refusal(self, sample: Sample, kinds: Sequence[str], read: Callable[[MediaPart], bytes]) -> str:
        """Why a sample is excluded, with the reason code; empty if it is not.

        Args:
            kinds: of the sample's media, in order.
            read: returns the content of a media part.

        Raises:
            ConfigError: a classifier cannot be loaded.
            DataError, MediaError: a media item cannot be read.
            SampleError: a classifier failed.
        """
        remaining = iter(kinds)
        asked: list[Part] = []
        learned: list[TextPart] = []
        files: list[MediaFile] = []
        for part in sample.documents[0]:
            if isinstance(part, MediaPart):
                files.append(MediaFile(read(part), part.media.lower().rpartition(".")[2]))
                kind = next(remaining)
                asked.append(MediaPart(part.media, CODES if isinstance(part, CodesPart) else kind, part.attributes))
            elif not part.control:
                (learned if part.loss else asked).append(TextPart(part.text))
        text = "\n".join(part.text for part in learned)
        checks, prompt = self._loaded(), Prompt(asked, files)
        [verdict] = checks.check_prompts([prompt])
        if verdict is None:
            [verdict] = checks.check_answers([prompt], [text])
        if verdict is None:
            return ""
        if verdict.label == FAILED:
            raise SampleError("unchecked", f"a classifier could not check it: {verdict.code}: {verdict.detail}.")
        score = "" if verdict.score is None else f" with a score of {verdict.score:.3f}"
        return f"{verdict.code}{score}"

    def summary(self) -> str:
        """Samples checked and excluded, and the time spent in checks since the file was read."""
        from megatron_anymal.integrity.checks import overhead

        return overhead(self._loaded(), time.perf_counter() - self._began)

    def _loaded(self) -> IntegrityChecks:
        if self._checks is None:
            from megatron_anymal.integrity.checks import IntegrityChecks
            from megatron_anymal.modalities import MODALITIES

            self._checks = IntegrityChecks(self._config, (*MODALITIES, CODES), self._limits)
        return self._checks
