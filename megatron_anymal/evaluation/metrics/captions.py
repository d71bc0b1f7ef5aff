"""CIDEr, ROUGE-L, SPICE and SPIDEr of captions, computed by pycocoevalcap.

Its tokenizer and SPICE are Java programs. Without Java, SPICE and SPIDEr are refused, and captions are split in Python,
which differs from the Penn Treebank tokenizer in rare words only (`python_tokens`). SPICE scores one pair before
anything is answered: it also needs Stanford CoreNLP, which pycocoevalcap downloads on first use, and 8 GB of memory.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megatron_anymal.config import ConfigError

# Tokens that coco-caption drops. (It lists -LRB- and the like, too, but after lower-casing none is left.)
_DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_CLITIC = r"n't\b|'(?:s|re|ve|ll|d|m)\b"
_TOKEN = re.compile(
    rf"(?:[a-z]\.){{2,}}|\b(?:can(?=not\b)|gon(?=na\b)|wan(?=na\b)|got(?=ta\b))|\w+?(?=n't\b)|{_CLITIC}|"
    r"\w+(?:[-./&:]\w+)*|\.\.\.|--|[^\w\s]"
)
_RENAMED = {"(": "-lrb-", ")": "-rrb-", "{": "-lcb-", "}": "-rcb-", "[": "-lsb-", "]": "-rsb-", '"': "''"}
JAVA_METRICS = ("spice", "spider")
# Seconds without an answer after which the download of CoreNLP is abandoned: many clusters silently drop outbound
# traffic.
_DOWNLOAD_PATIENCE = 20.0


def require(metrics: Sequence[str]) -> None:
    """Check at once whether what the captions' metrics need is there; see also `try_spice`.

    Raises:
        ConfigError: pycocoevalcap is not installed, or a metric needs Java and there is none.
    """
    try:
        import pycocoevalcap.cider.cider  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"The metrics {', '.join(metrics)} need pycocoevalcap: pip install 'megatron-anymal[evaluate]'."
        ) from None
    refused = [metric for metric in metrics if metric in JAVA_METRICS]
    if refused and not has_java():
        raise ConfigError(
            f"{refused[0]} is computed by a Java program, but there is no `java` in PATH. Install Java 8 or later, or "
            f"leave it out with --without-metric {' '.join(refused)}."
        )


def try_spice(metrics: Sequence[str]) -> None:
    """Score one pair if SPICE or SPIDEr is among the metrics: takes seconds, and the network on first use.

    Raises:
        ConfigError: SPICE does not run.
    """
    refused = [metric for metric in metrics if metric in JAVA_METRICS]
    if not refused:
        return
    try:
        with _patience(_DOWNLOAD_PATIENCE):
            caption_scores("spice", ["a cat"], [["a cat"]])
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ConfigError(
            f"{refused[0]} does not run here: {error}. pycocoevalcap runs SPICE in Java with 8 GB of memory, and "
            "downloads Stanford CoreNLP 3.6.0 first: where there is no network, put its two .jar files into "
            f"pycocoevalcap/spice/lib. Or leave it out with --without-metric {' '.join(refused)}."
        ) from error


@contextmanager
def _patience(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def has_java() -> bool:
    """Whether there is a Java runtime in PATH."""
    return shutil.which("java") is not None


def caption_scores(metric: str, captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Score of each caption; the corpus score is their mean.

    Args:
        metric: cider, rouge_l, spice or spider (the mean of CIDEr and SPICE).
        references: of each caption.
    """
    if metric == "spider":
        pairs = zip(*(caption_scores(name, captions, references) for name in ("cider", "spice")))
        return [sum(pair) / 2 for pair in pairs]
    given = _tokenized({number: [caption] for number, caption in enumerate(captions)})
    wanted = _tokenized({number: list(texts) for number, texts in enumerate(references)})
    _, scores = _scorer(metric).compute_score(wanted, given)
    return [float(score["All"]["f"]) if metric == "spice" else float(score) for score in scores]


def python_tokens(caption: str) -> str:
    """Lower-case Penn Treebank tokens without punctuation, separated by spaces."""
    tokens = (_RENAMED.get(token, token) for token in _TOKEN.findall(caption.lower().replace("\n", " ")))
    return " ".join(token for token in tokens if token not in _DROPPED)


def _tokenized(texts: dict[int, list[str]]) -> dict[int, list[str]]:
    if not has_java():
        return {number: [python_tokens(text) for text in several] for number, several in texts.items()}
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # A line break would begin another caption in the tokenizer's input.
    given = {
        number: [{"caption": " ".join(text.split()) or "."} for text in several] for number, several in texts.items()
    }
    return PTBTokenizer().tokenize(given)


def _scorer(metric: str) -> Any:
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    if metric == "spice":
        from pycocoevalcap.spice.spice import Spice

        return Spice()
    return {"cider": Cider, "rouge_l": Rouge}[metric]()
