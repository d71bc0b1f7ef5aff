"""Settings of the sampling of answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_anymal.config import ConfigError
from megatron_anymal.data.discrete_vocabulary import TEXT


def _check(settings: Any, limits: Mapping[str, tuple[bool, str]]) -> None:
    for name, (holds, wanted) in limits.items():
        if not holds:
            raise ConfigError(f"{name}={getattr(settings, name)} must be {wanted}.")


def _limits(settings: Any) -> dict[str, tuple[bool, str]]:
    """Limits of the settings that text and codes share."""
    return {
        "temperature": (0 <= settings.temperature < float("inf"), "0 (greedy) or above"),
        "top_p": (0 < settings.top_p <= 1, "above 0 and at most 1"),
        "top_k": (settings.top_k >= 0, "0 (all tokens) or above"),
        "repetition_penalty": (0 < settings.repetition_penalty < float("inf"), "above 0 (1: none)"),
    }


@dataclass(frozen=True)
class CodeSampling:
    """Settings for choosing the codes of one kind of media; the defaults are MIO's for images (its table 10).

    Raises:
        ConfigError: a value out of range.
    """

    # 0: greedy, the likeliest code.
    temperature: float = 1.0
    # Sample only from the likeliest codes that together have this probability.
    top_p: float = 0.7
    # Sample only from this many of the likeliest codes; 0: all.
    top_k: int = 0
    # Above 1, codes that occur in the prompt or the answer become less likely.
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        _check(self, _limits(self))


# MIO's table 10: for speech, whose items have any number of codes, and which would otherwise not end.
OF_SPEECH = CodeSampling(repetition_penalty=1.15)


@dataclass(frozen=True)
class Sampling:
    """Settings for choosing the next token and ending an answer.

    Raises:
        ConfigError: a value out of range.
    """

    # Maximum length of an answer, in tokens, marks and codes included.
    max_new_tokens: int = 64
    # 0: greedy, the likeliest token. This and the next three apply to text and to begin marks.
    temperature: float = 0.0
    # Sample only from the likeliest tokens that together have this probability.
    top_p: float = 1.0
    # Sample only from this many of the likeliest tokens; 0: all.
    top_k: int = 0
    # Above 1, tokens that occur in the prompt or the answer become less likely.
    repetition_penalty: float = 1.0
    # An answer ends before the first of these texts.
    stop: tuple[str, ...] = ()
    # Seed of the draws.
    seed: int = 0
    # What an answer may consist of: "text", names in model.discrete, or both. Without "text", it has at least one item.
    modalities: tuple[str, ...] = (TEXT,)
    # Settings for codes, by name in model.discrete. Without, they are MIO's: OF_SPEECH for items of any number of
    # codes, and the defaults of CodeSampling for items of a fixed number.
    codes: Mapping[str, CodeSampling] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        limits = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            **_limits(self),
            "stop": ("" not in self.stop, "a text that is not empty"),
            "modalities": (bool(self.modalities), "text, names in model.discrete, or both"),
        }
        _check(self, limits)

    def of_codes(self, name: str, *, fixed: bool) -> Sampling:
        """These settings with those for the codes of one kind of media in the place of those for text.

        Args:
            name: in model.discrete.
            fixed: whether all of its items have the same number of codes.
        """
        own = self.codes.get(name, CodeSampling() if fixed else OF_SPEECH)
        return replace(
            self,
            temperature=own.temperature,
            top_p=own.top_p,
            top_k=own.top_k,
            repetition_penalty=own.repetition_penalty,
        )
