"""Answers to some validation samples during training, written out for people to read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_anymal.data.discrete_vocabulary import TEXT
from megatron_anymal.generation.checkpoint_generator import NativeGenerator
from megatron_anymal.generation.evaluation import Question, compared, read_questions
from megatron_anymal.generation.sampling import Sampling
from megatron_anymal.telemetry import MetricsLogger
from megatron_anymal.train.build import TrainState

# Maximum number of text tokens in an answer.
_TOKENS = 64


class SampledAnswers:
    """Answers to the first samples of each validation set, for answers.jsonl in the run folder and loggers.

    Text is greedy; codes are sampled with the defaults of `anymal generate`, the same at every step.
    """

    def __init__(self, state: TrainState, run_dir: Path, loggers: Sequence[MetricsLogger]):
        """Read trainer.sampled_answers questions, split evenly over the validation sets.

        Raises:
            DataError: a sample does not have an answer.
            StorageError: an object store cannot be used.
        """
        self._state, self._file, self._loggers = state, run_dir / "answers.jsonl", loggers
        storage = state.config.data.storage
        count, sets = state.config.trainer.sampled_answers, list(state.config.data.validation.items())
        self._questions: list[tuple[str, Question]] = []
        for number, (name, dataset) in enumerate(sets):
            share = count * (number + 1) // len(sets) - count * number // len(sets)
            if share:
                self._questions += [(name, question) for question in read_questions(dataset.path, share, storage)]

    def __call__(self) -> None:
        """Answer the questions and write the answers. Collective."""
        state = self._state
        if not self._questions:
            return
        state.wait_for_param_gather()
        [model] = state.models
        model.eval()
        # Without max_positions: a long validation sample must not end a training run.
        generator = NativeGenerator(state.config.model, state.layout, state.tokenizer, state.modalities, model)
        # Room for as many tokens of codes as the longest expected answer has.
        codes = [sum(item.codes.size + 2 for item in question.expected.items) for _, question in self._questions]
        sampling = Sampling(max_new_tokens=_TOKENS + max(codes), modalities=(TEXT, *generator.discrete))
        answers = generator.replies([question.prompt for _, question in self._questions], sampling)
        if not state.layout.reports:
            return
        with self._file.open("a") as file:
            for (name, question), answer in zip(self._questions, answers):
                sample = f"{name}/{question.key}"
                row = {"step": state.step, "sample": sample, **compared(question, answer)}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                for logger in self._loggers:
                    _show(logger, sample, f"expected: {row['expected']}\n\ngiven: {row['given']}", state.step)


def _show(logger: MetricsLogger, sample: str, text: str, step: int) -> None:
    """Log text to TensorBoard or W&B, each through its own method; other loggers do not support text."""
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_text"):
        experiment.add_text(f"answers/{sample}", text, step)
    elif hasattr(logger, "log_text"):
        logger.log_text("answers", ["step", "sample", "text"], [[step, sample, text]])
