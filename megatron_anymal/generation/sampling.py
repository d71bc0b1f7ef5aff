"""Settings of the sampling of answers."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_anymal.config import ConfigError


@dataclass(frozen=True)
class Sampling:
    """Settings for choosing the next token and ending an answer.

    Raises:
        ConfigError: a value out of range.
    """

    # Maximum length of an answer, in tokens.
    max_new_tokens: int = 64
    # 0: greedy, the likeliest token.
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

    def __post_init__(self) -> None:
        limits = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "0 (greedy) or above"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or above"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "above 0 (1: none)"),
            "stop": ("" not in self.stop, "a text that is not empty"),
        }
        for name, (holds, wanted) in limits.items():
            if not holds:
                raise ConfigError(f"{name}={getattr(self, name)} must be {wanted}.")
