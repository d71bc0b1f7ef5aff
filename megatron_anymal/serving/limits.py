"""What a server accepts."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_anymal.config import ConfigError


@dataclass(frozen=True)
class ServingLimits:
    """Limits of a server; they bound its memory.

    Raises:
        ConfigError: a value out of range.
    """

    # Largest body of a request, in bytes.
    max_body_bytes: int = 32 * 2**20
    # Maximum number of requests that wait for a place in the batch.
    max_queue: int = 64
    # Maximum number of answers computed together.
    max_batch: int = 64
    # Maximum number of tokens in an answer; also the default of a request.
    max_new_tokens: int = 512
    # Maximum number of tokens in the key-value cache: answers in the batch times the longest of them with its prompt.
    max_cache_tokens: int = 131_072
    # Seconds for which a client may neither send nor read anything.
    client_timeout: float = 30.0

    def __post_init__(self) -> None:
        limits = {
            "max_body_mb": (self.max_body_bytes >= 1, self.max_body_bytes / 2**20, "above 0"),
            "max_queue": (self.max_queue >= 0, self.max_queue, "0 (none waits) or above"),
            "max_batch": (self.max_batch >= 1, self.max_batch, "at least 1"),
            "max_new_tokens": (self.max_new_tokens >= 1, self.max_new_tokens, "at least 1"),
            "max_cache_tokens": (self.max_cache_tokens >= 2, self.max_cache_tokens, "at least 2"),
            "client_timeout": (self.client_timeout > 0, self.client_timeout, "above 0"),
        }
        for name, (holds, value, wanted) in limits.items():
            if not holds:
                raise ConfigError(f"--{name.replace('_', '-')}={value:g} must be {wanted}.")
