"""The metrics by name: a value per sample, and how values become a score."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from megatron_anymal.evaluation.metrics import text_answers, vqa_accuracy
from megatron_anymal.evaluation.metrics.captions import caption_scores
from megatron_anymal.evaluation.metrics.ranking import auroc
from megatron_anymal.evaluation.samples import LETTERS, TaskSample


@dataclass(frozen=True)
class Answered:
    """A sample with the model's answer."""

    # The sample.
    sample: TaskSample
    # As generated.
    text: str
    # As parsed by the task.
    answer: str
    # Log-likelihood of each candidate; empty if it was not computed.
    log_likelihoods: tuple[float, ...] = ()


@dataclass(frozen=True)
class Metric:
    """A metric on a scale of 0 to 100, as papers print it; CIDEr can exceed 100."""

    # Name in reports.
    title: str
    # Value of each sample, 1 for a perfect answer (above for CIDEr).
    values: Callable[[Sequence[Answered]], list[float]]
    # Whether it is computed from the candidates' likelihood.
    by_likelihood: bool = False
    # Whether the score is the area under the ROC curve of the values, instead of their mean.
    ranks: bool = False

    def score(self, values: Sequence[float], labels: Sequence[int]) -> float:
        """The score of several samples, times 100.

        Args:
            labels: 1 for positive samples; used by ranking metrics only.
        """
        if self.ranks:
            return 100 * auroc(values, labels)
        return 100 * math.fsum(values) / len(values)


def _each(rule: Callable[[str, Sequence[str]], float]) -> Callable[[Sequence[Answered]], list[float]]:
    return lambda rows: [rule(row.answer, row.sample.references) for row in rows]


def _captions(metric: str, rows: Sequence[Answered]) -> list[float]:
    return caption_scores(metric, [row.answer for row in rows], [row.sample.references for row in rows])


def _choice(row: Answered) -> float:
    """Whether the letter is the correct option's; open questions among the others count by exact match."""
    if row.sample.options:
        return float(row.answer == LETTERS[row.sample.correct])
    return text_answers.exact_match(row.answer, row.sample.references)


def _likeliest(row: Answered) -> float:
    """Whether the correct option is the likeliest; open questions count as in `_choice`, rejected queries as wrong."""
    if not row.log_likelihoods:
        return 0.0 if row.sample.options else _choice(row)
    if row.sample.options:
        return float(row.log_likelihoods.index(max(row.log_likelihoods)) == row.sample.correct)
    return _choice(row)


def _mathvista(row: Answered) -> float:
    if row.sample.options:
        return _choice(row)
    return text_answers.mathvista_accuracy(row.answer, row.sample.references, row.sample.details)


def _positive(row: Answered) -> float:
    """Probability of the second of two candidates, given that it is one of them; one half for a rejected query."""
    if not row.log_likelihoods:
        return 0.5
    negative, positive = row.log_likelihoods
    return 1 / (1 + math.exp(min(700.0, negative - positive)))


METRICS = {
    "vqa_accuracy": Metric("VQA accuracy", _each(vqa_accuracy.vqa_accuracy)),
    "textvqa_accuracy": Metric("VQA accuracy", _each(vqa_accuracy.textvqa_accuracy)),
    "anls": Metric("ANLS", _each(text_answers.anls)),
    "relaxed_accuracy": Metric("relaxed accuracy", _each(text_answers.relaxed_accuracy)),
    "exact_match": Metric("accuracy", _each(text_answers.exact_match)),
    "mathvista_accuracy": Metric("accuracy", lambda rows: list(map(_mathvista, rows))),
    "choice_accuracy": Metric("accuracy", lambda rows: list(map(_choice, rows))),
    "choice_likelihood": Metric("accuracy by likelihood", lambda rows: list(map(_likeliest, rows)), by_likelihood=True),
    "auroc": Metric("AUROC", lambda rows: list(map(_positive, rows)), by_likelihood=True, ranks=True),
    "cider": Metric("CIDEr", partial(_captions, "cider")),
    "rouge_l": Metric("ROUGE-L", partial(_captions, "rouge_l")),
    "spice": Metric("SPICE", partial(_captions, "spice")),
    "spider": Metric("SPIDEr", partial(_captions, "spider")),
}
