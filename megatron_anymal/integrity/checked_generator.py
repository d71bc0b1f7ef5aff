"""A generator whose queries are checked; rejected ones are answered with a refusal."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Optional

from megatron_anymal.config import ConfigError
from megatron_anymal.data.discrete_vocabulary import TEXT
from megatron_anymal.generation.answers import GrowingAnswer, Reply
from megatron_anymal.generation.generator import Generator, Result, Watch, unwatched
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.rejection import INPUT_IMAGE, Rejection
from megatron_anymal.generation.sampling import Sampling
from megatron_anymal.integrity.checks import IntegrityChecks, overhead
from megatron_anymal.integrity.config import CODES, IntegrityConfig
from megatron_anymal.integrity.sentences import Sentence, SentenceGate


class CheckedGenerator(Generator):
    """Wraps a generator. A violation rejects the whole query: `rejections` names why, by the number of its prompt.

    Answers that are watched are checked sentence by sentence while they grow, and those who watch see only what has
    passed; others are checked when they are complete.
    """

    def __init__(self, generator: Generator, config: IntegrityConfig):
        """Load the classifiers on the process that leads this copy of the model.

        Raises:
            ConfigError: a classifier cannot be loaded.
        """
        self._generator = generator
        self.reports, self.kinds, self.max_positions = generator.reports, generator.kinds, generator.max_positions
        self.replica, self.replicas = generator.replica, generator.replicas
        self.leads_replica, self.grammar = generator.leads_replica, generator.grammar
        self.rejections: dict[int, Rejection] = {}
        self._checks = IntegrityChecks(config, generator.kinds) if generator.leads_replica else None
        self._config, self._began = config, time.perf_counter()

    def summary(self) -> str:
        """Queries, rejections and the time spent in checks since this object was made, on the leading process."""
        return overhead(self._leader, time.perf_counter() - self._began)

    @property
    def _leader(self) -> IntegrityChecks:
        assert self._checks is not None
        return self._checks

    def on_leader(self, compute: Callable[[], Result]) -> Result:
        """As of the wrapped generator."""
        return self._generator.on_leader(compute)

    def read_in_processes(self, count: int) -> None:
        """As of the wrapped generator."""
        self._generator.read_in_processes(count)

    def read_ahead(self, batches: Sequence[Sequence[Prompt]]) -> None:
        """As of the wrapped generator."""
        self._generator.read_ahead(batches)

    def _answer(
        self, prompts: Sequence[Prompt], numbers: Sequence[int], sampling: Sampling, watch: Watch
    ) -> list[Reply]:
        self._check_codes(sampling)
        for number in numbers:
            self.rejections.pop(number, None)
        self._reject(numbers, self.on_leader(lambda: self._leader.check_prompts(prompts)))
        passed = [position for position, number in enumerate(numbers) if number not in self.rejections]
        if passed:
            asked, theirs = [prompts[position] for position in passed], [numbers[position] for position in passed]
            if watch is unwatched:
                answers = self._generator.answer_batch(asked, theirs, sampling)
                texts = [answer.text for answer in answers]
                self._reject(theirs, self.on_leader(lambda: self._leader.check_answers(asked, texts)))
            else:
                answers = self._streamed(asked, theirs, sampling, watch)
        replies = dict(zip(theirs, answers)) if passed else {}
        return [Reply.of_parts([self.rejections[n].text]) if n in self.rejections else replies[n] for n in numbers]

    def _check_codes(self, sampling: Sampling) -> None:
        """Refuse media in answers that nothing would look at."""
        written = [name for name in sampling.modalities if name != TEXT]
        if written and self._config.of_stage(INPUT_IMAGE) and CODES not in self._config.unchecked_media:
            raise ConfigError(
                f"The integrity file has a classifier of images, but none can look at {written[0]!r}, which answers "
                f"would have as codes. Answer with --modalities {TEXT}, or add {CODES} to unchecked_media."
            )

    def _streamed(
        self, prompts: Sequence[Prompt], numbers: Sequence[int], sampling: Sampling, watch: Watch
    ) -> list[Reply]:
        """Answer prompts while others watch; those who watch see the text that has passed."""
        views = {number: _PassedAnswer(number, self._gate(prompt)) for number, prompt in zip(numbers, prompts)}

        def checked(answer: GrowingAnswer) -> None:
            view = views[answer.number]
            view.update(answer)
            if view.gate.rejection:
                answer.halt()
            watch(view)

        answers = self._generator.answer_batch(prompts, numbers, sampling, checked)
        for number, answer in zip(numbers, answers):
            # Nothing is left to check unless a generator ended an answer unwatched.
            views[number].complete(answer.text)
        self._reject(numbers, [views[number].gate.rejection for number in numbers])
        return answers

    def _gate(self, prompt: Prompt) -> SentenceGate:
        """A gate that all processes of this copy of the model pass through together."""

        def check(sentence: Sentence) -> Optional[Rejection]:
            return self.on_leader(lambda: self._leader.check_sentence(prompt, sentence))

        return SentenceGate(check, self._config.sentence_characters, self._config.overlap_characters)

    def _reject(self, numbers: Sequence[int], verdicts: Sequence[Optional[Rejection]]) -> None:
        self.rejections.update({number: verdict for number, verdict in zip(numbers, verdicts) if verdict})

    def _log_likelihoods(self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
        return self._generator.log_likelihoods(prompts, candidates, sum(map(len, candidates)))


class _PassedAnswer:
    """A growing answer as far as it has passed the checks."""

    def __init__(self, number: int, gate: SentenceGate):
        self.number, self.gate, self.done = number, gate, False
        # Characters that were given to the gate.
        self._given = 0
        self._halt: Callable[[], None] = lambda: None

    @property
    def text(self) -> str:
        """The text that has passed."""
        return self.gate.released

    @property
    def settled(self) -> str:
        """The text that has passed."""
        return self.gate.released

    @property
    def reply(self) -> Reply:
        """The text that has passed."""
        return Reply.of_parts([self.gate.released])

    def halt(self) -> None:
        """End the answer now."""
        self._halt()

    def update(self, answer: GrowingAnswer) -> None:
        """Give the gate what has been added to the answer."""
        self._halt, self.done = answer.halt, answer.done
        self._give(answer.settled)
        if answer.done:
            self.complete(answer.text)

    def complete(self, text: str) -> None:
        """Give the gate the rest of the answer, whose whole text this is."""
        self._give(text)
        self.gate.finish()

    def _give(self, text: str) -> None:
        self.gate.add(text[self._given :])
        self._given = max(self._given, len(text))
