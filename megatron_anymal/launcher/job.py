"""What a launcher is asked to run, how an attempt at it ended, and what follows from that."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from megatron_anymal.checkpoint.store import committed, step_of
from megatron_anymal.config import ConfigError, ResilienceConfig
from megatron_anymal.resilience.exit_codes import Exit

# Restarts in a row without progress after which a run is given up, and the longest pause before one, in seconds.
MOST_FRUITLESS = 3
_LONGEST_PAUSE = 60.0


@dataclass(frozen=True)
class Job:
    """A run on this machine, and the machine's place among the others."""

    run_dir: Path
    limits: ResilienceConfig
    # What every rank runs, as torchrun takes it: -m MODULE ... or SCRIPT ...
    program: list[str]
    processes: int
    nodes: int = 1
    node: int = 0
    # HOST:PORT that node 0's launcher listens at; not used by one node alone.
    endpoint: str = ""
    identity: str = "anymal"
    rdzv_timeout: float = 600.0
    local_addr: str = ""
    launcher: str = "torchrun"
    # Between a signal and the end that the scheduler then makes.
    grace_seconds: Optional[float] = None


@dataclass(frozen=True)
class Ending:
    """How an attempt ended."""

    code: Exit
    # Why, for a person.
    text: str
    # The furthest step that a rank was at; -1 without any.
    step: int = -1
    # A signal asked the launcher to stop.
    stop: bool = False
    # Only since another node's failed.
    followed: bool = False
    # A rank died of a signal, which none gets for another one's failure.
    killed: bool = False


@dataclass(frozen=True)
class Decision:
    """What follows: another attempt after `pause` seconds, or (None) the end with `code`."""

    code: Exit
    text: str
    pause: Optional[float] = None


def combined(endings: list[Ending]) -> Ending:
    """One ending of all nodes': a verdict of the ranks goes before a hang, that before a crash, that before done.

    Of crashes, that of a rank which was killed: the others lost their connections to it.
    """

    def weight(ending: Ending) -> float:
        if ending.code == Exit.DONE:
            return 3
        if not ending.code.restarts:
            return 0
        if ending.followed:
            return 2.5
        return 1 if ending.code == Exit.HANG else 1.5 if ending.killed else 2

    worst = min(endings, key=weight)
    return Ending(
        worst.code, worst.text, max(e.step for e in endings), any(e.stop for e in endings), killed=worst.killed
    )


@dataclass
class Restarts:
    """Whether a run is started again: as long as it gets on."""

    run_dir: Path
    checkpoint: int = field(init=False)
    step: int = -1
    attempts: int = 0
    # Restarts in a row that brought neither a newer checkpoint nor a later step.
    fruitless: int = 0

    def __post_init__(self) -> None:
        self.checkpoint = newest_checkpoint(self.run_dir)

    def decide(self, ending: Ending) -> Decision:
        """What follows from an attempt's end."""
        if ending.stop and ending.code.restarts:
            return Decision(Exit.REQUEUE, f"stopped on request, but not in order: {ending.text}")
        if not ending.code.restarts:
            return Decision(ending.code, ending.text)
        checkpoint = newest_checkpoint(self.run_dir)
        got_on = checkpoint > self.checkpoint or ending.step > self.step
        self.fruitless = 0 if got_on or not self.attempts else self.fruitless + 1
        self.attempts += 1
        self.checkpoint, self.step = max(checkpoint, self.checkpoint), max(ending.step, self.step)
        if self.fruitless >= MOST_FRUITLESS:
            return Decision(Exit.CRASH_LOOP, f"{MOST_FRUITLESS} restarts in a row without progress; {ending.text}")
        return Decision(ending.code, ending.text, min(_LONGEST_PAUSE, 2.0**self.fruitless))


def newest_checkpoint(run_dir: Path) -> int:
    """Step of the newest committed checkpoint; -1 without any."""
    found = committed(run_dir / "checkpoints")
    return step_of(found[0]) if found else -1


def attempt_folder(run_dir: Path, number: int) -> Path:
    """Where the logs of an attempt lie."""
    return run_dir / "logs" / f"attempt_{number}"


def new_attempt(run_dir: Path) -> int:
    """The number of a new attempt, from 1; its folder is made.

    Raises:
        ConfigError: the run's folder cannot be written.
    """
    logs = run_dir / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
        while True:
            taken = [int(n) for p in os.listdir(logs) if (n := p.removeprefix("attempt_")).isdigit()]
            try:
                number = max(taken, default=0) + 1
                attempt_folder(run_dir, number).mkdir()
                return number
            except FileExistsError:
                # Another launcher's; the run's lock decides between the two.
                continue
    except OSError as error:
        raise ConfigError(
            f"{str(run_dir)!r} cannot be written ({error.strerror}). Name another run folder "
            "(exp_manager.explicit_log_dir)."
        ) from None
