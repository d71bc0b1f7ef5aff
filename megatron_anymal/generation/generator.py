"""The common interface for generation from training checkpoints and exported folders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Optional, TypeVar

from megatron_anymal.config import ConfigError
from megatron_anymal.data.code_grammar import CodeGrammar
from megatron_anymal.data.records import DataError
from megatron_anymal.generation.answers import Answer, GrowingAnswer, Reply
from megatron_anymal.generation.code_guide import guide_of
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.rejection import Rejection
from megatron_anymal.generation.sampling import Sampling
from megatron_anymal.telemetry import Progress

if TYPE_CHECKING:
    from megatron_anymal.generation.running_batch import RunningBatch

# Called with an answer after each of its tokens.
Watch = Callable[[GrowingAnswer], None]
Result = TypeVar("Result")


class PromptTooLong(DataError):
    """A prompt that leaves no room for an answer."""


class Generator(ABC):
    """A model that answers prompts."""

    # Whether this process prints and writes.
    reports: bool = True
    # Kinds of media that the model supports.
    kinds: Collection[str]
    # Grammar of media that the model reads and writes as codes; None if there are none.
    grammar: Optional[CodeGrammar] = None
    # Maximum number of tokens in a prompt and its answer together; None: no limit.
    max_positions: Optional[int] = None
    # Number of this process's copy of the model, and number of copies.
    replica: int = 0
    replicas: int = 1
    # Whether this process is the one of its copy that writes.
    leads_replica: bool = True
    # Number of a prompt -> why its query was rejected and answered with a refusal. Only `integrity` rejects queries.
    rejections: Mapping[int, Rejection] = {}

    def answer(
        self, prompts: Sequence[Prompt], sampling: Sampling, batch_size: int = 64, watch: Optional[Watch] = None
    ) -> list[str]:
        """The texts of `replies`.

        Raises:
            ConfigError, DataError, MediaError: as in `replies`.
        """
        return [reply.text for reply in self.replies(prompts, sampling, batch_size, watch)]

    def replies(
        self, prompts: Sequence[Prompt], sampling: Sampling, batch_size: int = 64, watch: Optional[Watch] = None
    ) -> list[Reply]:
        """Answer every prompt. Collective if the model is split over several processes; each gets all answers.

        Raises:
            ConfigError: `batch_size` is below 1, or the answers are to have media that the model does not write or that
                do not fit.
            DataError, MediaError: a media item has no modality or cannot be read, or a prompt is too long.
        """
        return [reply for batch in self.batches(prompts, sampling, batch_size, watch) for reply in batch]

    def batches(
        self, prompts: Sequence[Prompt], sampling: Sampling, batch_size: int = 64, watch: Optional[Watch] = None
    ) -> Iterator[list[Reply]]:
        """Like `replies`, but yield `batch_size` answers at a time.

        Raises:
            ConfigError: `batch_size` is below 1, or the answers are to have media that the model does not write or that
                do not fit.
            DataError, MediaError: as in `replies`.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} must be at least 1.")
        progress = Progress("answering", len(prompts)) if self.reports and len(prompts) > batch_size else None
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            if len(prompts) > batch_size:
                self.read_ahead([batch, prompts[start + batch_size : start + 2 * batch_size]])
            yield self.answer_batch(batch, range(start, start + len(batch)), sampling, watch)
            if progress:
                progress.advance(len(batch))
        if progress:
            progress.finish()

    def answer_batch(
        self, prompts: Sequence[Prompt], numbers: Sequence[int], sampling: Sampling, watch: Optional[Watch] = None
    ) -> list[Reply]:
        """Answer prompts together. Collective over the processes of this copy of the model.

        Args:
            numbers: of the prompts; a sampled answer depends on its prompt's number, not on the batch.

        Raises:
            ConfigError, DataError, MediaError: as in `replies`.
        """
        return self._answer(prompts, numbers, sampling, watch or unwatched)

    # Optional: a generator without them answers the same.
    def read_in_processes(self, count: int) -> None:  # noqa: B027
        """Use this many processes, forked from this one, for what is given to `read_ahead`; 0, at first: do nothing."""

    def read_ahead(self, batches: Sequence[Sequence[Prompt]]) -> None:  # noqa: B027
        """Begin to read the media of prompts that `answer_batch` gets next, in other processes meanwhile.

        The answers are the same without; a generator may do nothing. Batches that were given before and are not now
        are dropped.

        Args:
            batches: the very objects that `answer_batch` gets, in that order.
        """

    def log_likelihoods(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]], batch_size: int = 64
    ) -> list[list[float]]:
        """Sum of the log-probabilities of each candidate's tokens as the answer to its prompt, without an end token.
        Collective over the processes of this copy of the model.

        Args:
            candidates: of each prompt; every one of them has at least one token.
            batch_size: largest number of candidates computed together, but all candidates of a prompt are.

        Raises:
            DataError, MediaError: as in `replies`.
        """
        scores: list[list[float]] = []
        start = 0
        while start < len(prompts):
            end = start + 1
            while end < len(prompts) and sum(map(len, candidates[start : end + 1])) <= batch_size:
                end += 1
            scores += self._log_likelihoods(prompts[start:end], candidates[start:end])
            start = end
        return scores

    def on_leader(self, compute: Callable[[], Result]) -> Result:
        """The result of `compute` on the process that leads this copy of the model. Collective over its processes.

        An exception is raised on all of them.
        """
        return compute()

    def running_batch(self) -> RunningBatch:
        """Start an empty batch that prompts can join and leave between steps; for one process.

        Raises:
            NotImplementedError: this generator, such as one that checks whole answers, has no such batch.
        """
        raise NotImplementedError(f"{type(self).__name__} has no running batch")

    @property
    def discrete(self) -> tuple[str, ...]:
        """Kinds of media that the model reads and writes as codes: the names in model.discrete."""
        return self.grammar.layout.vocabulary.names if self.grammar else ()

    @abstractmethod
    def _answer(
        self, prompts: Sequence[Prompt], numbers: Sequence[int], sampling: Sampling, watch: Watch
    ) -> list[Reply]:
        """Answer one batch."""

    @abstractmethod
    def _log_likelihoods(self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
        """As `log_likelihoods`, of one batch."""

    def _open_answer(
        self,
        number: int,
        length: int,
        sampling: Sampling,
        decode: Callable[[Sequence[int]], str],
        ends: Collection[int],
    ) -> Answer:
        """The empty answer to a prompt of `length` tokens."""
        room = self._room(number, length, sampling)
        return Answer(number, decode, ends, sampling.stop, room, guide_of(self.grammar, sampling, ends, room))

    def _room(self, number: int, length: int, sampling: Sampling) -> int:
        """Largest number of tokens in the answer to a prompt of `length` tokens."""
        if self.max_positions is None:
            return sampling.max_new_tokens
        if length >= self.max_positions:
            raise PromptTooLong(
                f"Prompt {number} has {length} tokens, including its media, but the model has {self.max_positions} "
                "positions for a prompt and its answer. Shorten it."
            )
        return min(sampling.max_new_tokens, self.max_positions - length)


def unwatched(answer: GrowingAnswer) -> None:
    """Watch an answer that nobody watches."""
