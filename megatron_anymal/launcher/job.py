"""A launcher's job, the outcome of an attempt at it, and the decision whether to restart."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from megatron_anymal.checkpoint.store import committed, step_of
from megatron_anymal.config import ConfigError, ResilienceConfig
from megatron_anymal.resilience.exit_codes import Exit

# Number of restarts in a row without progress after which the launcher gives up.
MOST_FRUITLESS = 3
# Longest pause before a restart, in seconds.
_LONGEST_PAUSE = 60.0


@dataclass(frozen=True)
class Job:
    """A run on this node, and the node's position among the others."""

    # The run's folder.
    run_dir: Path
    # Timeouts and other settings of section `resilience`.
    limits: ResilienceConfig
    # Program of every rank, in torchrun's form: -m MODULE ... or SCRIPT ...
    program: list[str]
    # Number of processes on this node.
    processes: int
    # Number of nodes.
    nodes: int = 1
    # Number of this node, from 0.
    node: int = 0
    # Wait to take the place of a node that is lost; `node` is -1 until then.
    spare: bool = False
    # HOST:PORT at which node 0's launcher listens; not used for a single node.
    endpoint: str = ""
    # Name of the job at the rendezvous.
    identity: str = "anymal"
    # Seconds to wait for the other nodes.
    rdzv_timeout: float = 600.0
    # Address of this node for the others; empty: its host name.
    local_addr: str = ""
    # A key of agent.MODULES: torchrun or ft.
    launcher: str = "torchrun"
    # Seconds between the scheduler's stop signal and its kill.
    grace_seconds: Optional[float] = None
    # Fork the ranks from a standby process.
    standby: bool = True
    # Let ranks stay for the next attempt when another one is killed.
    keep_survivors: bool = False
    # Give the ranks memory for copies of their state.
    peer_memory: bool = True
    # Keep that memory for a while if this launcher is killed, and take over what a killed launcher left behind.
    keep_memory: bool = False
    # Modules for the standby process to import, besides those that every rank needs.
    preload: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ending:
    """Outcome of an attempt."""

    # Exit code of the attempt.
    code: Exit
    # Human-readable reason.
    text: str
    # The furthest step reached by a rank; -1 if there is none.
    step: int = -1
    # A signal asked the launcher to stop.
    stop: bool = False
    # It only failed because another node's attempt failed.
    followed: bool = False
    # A rank was killed by a signal, which is never a consequence of another rank's failure.
    killed: bool = False


@dataclass(frozen=True)
class Decision:
    """What to do next: another attempt after `pause` seconds, or exit with `code` if that is None."""

    # Exit code of the attempt; the launcher's own if there is no further attempt.
    code: Exit
    # Reason, for the user.
    text: str
    # Seconds until the next attempt; None: exit.
    pause: Optional[float] = None
    # Continue from a checkpoint rather than from copies in memory: the state itself may be what fails.
    forget: bool = False


def combined(endings: list[Ending]) -> Ending:
    """Combine the endings of all nodes into one.

    A verdict of the ranks takes precedence over a hang, a hang over a crash, and a crash over success. Among crashes,
    that of a killed rank comes first, since the other ranks crashed when they lost their connection to it.
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
    """Decides whether to restart a run: as long as it makes progress."""

    # The run's folder.
    run_dir: Path
    # Step of the newest checkpoint so far; -1 if there is none.
    checkpoint: int = field(init=False)
    # The furthest step reached so far; -1 if there is none.
    step: int = -1
    # Attempts so far whose exit code allows a restart.
    attempts: int = 0
    # Restarts in a row that led to neither a newer checkpoint nor a later step.
    fruitless: int = 0

    def __post_init__(self) -> None:
        self.checkpoint = newest_checkpoint(self.run_dir)

    def decide(self, ending: Ending) -> Decision:
        """Decide what to do after an attempt."""
        if ending.stop and ending.code.restarts:
            return Decision(Exit.REQUEUE, f"stopped on request, but not cleanly: {ending.text}")
        if not ending.code.restarts:
            return Decision(ending.code, ending.text)
        checkpoint = newest_checkpoint(self.run_dir)
        got_on = checkpoint > self.checkpoint or ending.step > self.step
        self.fruitless = 0 if got_on or not self.attempts else self.fruitless + 1
        self.attempts += 1
        self.checkpoint, self.step = max(checkpoint, self.checkpoint), max(ending.step, self.step)
        if self.fruitless >= MOST_FRUITLESS:
            return Decision(Exit.CRASH_LOOP, f"{MOST_FRUITLESS} restarts in a row without progress; {ending.text}")
        # Restart at once after progress; about double the pause after each attempt without any.
        pause = min(_LONGEST_PAUSE, 2.0**self.fruitless - 1.0)
        return Decision(ending.code, ending.text, pause, forget=self.fruitless > 0)


def newest_checkpoint(run_dir: Path) -> int:
    """Step of the newest committed checkpoint; -1 if there is none."""
    folders = committed(run_dir / "checkpoints")
    return step_of(folders[0]) if folders else -1


def attempt_folder(run_dir: Path, number: int) -> Path:
    """Folder for the logs of an attempt."""
    return run_dir / "logs" / f"attempt_{number}"


def new_attempt(run_dir: Path) -> int:
    """Create the folder of a new attempt and return its number, counted from 1.

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
                # Created by another launcher; the run lock decides between the two.
                continue
    except OSError as error:
        raise ConfigError(
            f"{str(run_dir)!r} cannot be written ({error.strerror}). Choose another run folder "
            "(exp_manager.explicit_log_dir)."
        ) from None
