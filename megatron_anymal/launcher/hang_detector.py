"""Find out which rank hangs and why, from heartbeats, process states and stacks.

A rank that waits for another one is silent too. Silence is therefore what triggers the check, but the rank to blame is
the one the others wait for: the one furthest behind or, if all are in the same phase of the same step, the one whose
main thread is not inside a collective operation.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

from megatron_anymal.config import ResilienceConfig
from megatron_anymal.resilience.heartbeat import Beat, Phase
from megatron_anymal.resilience.heartbeat import read as read_beat

# Seconds a rank gets to write its stacks.
_DUMP_SECONDS = 2.0
# The daemon thread beats every 0.5 s, but may be delayed on a machine with too few cores.
_HELD_SECONDS = 1.5
# Phases in the order in which a run and its steps go through them.
_ORDER = {
    Phase.START: 0,
    Phase.LOADING: 1,
    Phase.DATA: 2,
    Phase.COMPUTE: 3,
    Phase.UPDATE: 4,
    Phase.VALIDATION: 5,
    Phase.CHECKPOINT: 6,
    Phase.END: 7,
}
_CAUSES = {
    Phase.START: "startup",
    Phase.LOADING: "startup",
    Phase.DATA: "data",
    Phase.CHECKPOINT: "checkpoint",
    Phase.END: "checkpoint",
}
# Files whose functions wait for other ranks.
_WAITING = re.compile(
    r"/torch/distributed/|/megatron/core/distributed/|/megatron/core/pipeline_parallel/p2p|/checkpoint/thread_channel\.py"
)
_READING = re.compile(r"/torch/utils/data/|/multiprocessing/queues\.py|/megatron_anymal/data/")
_FRAME = re.compile(r'^  File "(?P<file>[^"]*)", line (?P<line>\d+) in (?P<function>.*)$')
# Number of innermost frames that are examined to see what a thread is doing.
_INNERMOST = 12


@dataclass(frozen=True)
class RankView:
    """State of one rank as observed from outside."""

    # Rank in the job.
    rank: int
    # Process ID.
    pid: int
    # None if there has been no beat yet.
    beat: Optional[Beat]
    # Seconds since the main thread's last beat, or since the rank's start if there was none.
    silent: float
    # Seconds since the daemon thread's last beat: long if the GIL is held or the process is stopped.
    held: float
    # State letter from /proc (R, S, D, T, t, Z); empty if the process is gone.
    state: str
    # Stack of the main thread, innermost frame first, as "FILE:LINE in FUNCTION"; empty if unknown.
    stack: tuple[str, ...] = ()

    @property
    def phase(self) -> Phase:
        """Phase of the last beat."""
        return Phase(self.beat.phase) if self.beat else Phase.START

    @property
    def settled(self) -> bool:
        """Whether the rank has finished a step since it started."""
        return self.beat is not None and self.beat.settled

    @property
    def position(self) -> tuple[int, int]:
        """Progress as (step, order of the phase); comparable between ranks."""
        return (self.beat.step if self.beat else -1, _ORDER[self.phase])

    @property
    def stopped(self) -> bool:
        """Whether the process is stopped by a signal or a debugger."""
        return self.state in ("T", "t")

    @property
    def waits_for_others(self) -> bool:
        """Whether the main thread's stack shows it inside a collective operation."""
        return any(_WAITING.search(frame) for frame in self.stack[:_INNERMOST])

    def __str__(self) -> str:
        step = f"step {self.beat.step}, " if self.beat and self.beat.step >= 0 else ""
        return f"rank {self.rank} ({step}{self.phase.name.lower()}, silent for {self.silent:.1f} s)"


@dataclass(frozen=True)
class Hang:
    """Diagnosis of a hang."""

    # data, collective, checkpoint, stopped, gil or startup.
    cause: str
    # Ranks that hold up the others; empty if all ranks of this machine seem to be waiting.
    ranks: tuple[int, ...]
    # The step during which it happened; -1 before the first step.
    step: int
    # Description for the user.
    text: str
    # Rank -> file with its stacks.
    stacks: Mapping[int, str]


def allowed_silence(view: RankView, limits: ResilienceConfig) -> float:
    """Seconds a rank may be silent in its current phase."""
    if view.phase in (Phase.CHECKPOINT, Phase.END):
        return limits.checkpoint_timeout
    if view.phase in (Phase.START, Phase.LOADING) or not view.settled:
        return limits.startup_timeout
    return limits.hang_timeout


def hanging(views: Sequence[RankView], limits: ResilienceConfig) -> bool:
    """Whether a rank has been silent for too long without waiting for one that is behind it and still within its limit.

    For a stopped process hang_timeout applies in every phase, since it does nothing that could take longer.
    """
    if limits.hang_timeout <= 0:
        return False
    if any(view.stopped and view.beat and min(view.silent, view.held) > limits.hang_timeout for view in views):
        return True
    in_time = [view.position for view in views if view.silent <= allowed_silence(view, limits)]
    late = [view for view in views if view.silent > allowed_silence(view, limits)]
    return any(not any(position < view.position for position in in_time) for view in late)


def diagnose(views: Sequence[RankView], stacks: Mapping[int, str]) -> Hang:
    """Determine the cause of a hang and the ranks that hold up the others.

    Args:
        views: all ranks of this machine, at least one.
        stacks: rank -> file with its stacks.
    """
    stopped = [view for view in views if view.stopped]
    missing = [view for view in views if view.beat is None]
    held = [view for view in views if view.beat and view.held > max(_HELD_SECONDS, 0.5 * view.silent)]
    if stopped:
        return _hang("stopped", stopped, "stopped by a signal or a debugger (state T)", stacks)
    if missing:
        return _hang("startup", missing, "without a heartbeat since the start", stacks)
    if held:
        return _hang("gil", held, "holding the GIL inside a call that does not return", stacks)
    behind = _behind(views)
    if not behind:
        step = max(view.position[0] for view in views)
        text = "every rank on this machine is waiting in a collective operation for a rank that does not join"
        return Hang("collective", (), step, f"{text}: {'; '.join(map(str, views))}", stacks)
    first = behind[0]
    cause = _CAUSES.get(first.phase, "collective")
    if cause == "collective" and any(_READING.search(frame) for frame in first.stack[:_INNERMOST]):
        cause = "data"
    texts = {
        "data": "waiting for data that does not arrive",
        "checkpoint": "making no progress on a checkpoint",
        "startup": "making no progress during startup",
        "collective": "not reaching a collective operation",
    }
    return _hang(cause, behind, texts[cause], stacks)


def _behind(views: Sequence[RankView]) -> list[RankView]:
    """Ranks that the others wait for; empty if all are waiting."""
    least = min(view.position for view in views)
    last = [view for view in views if view.position == least]
    # A rank without a stack can only be judged by its position, so it counts as busy.
    busy = [view for view in last if not view.waits_for_others]
    if busy:
        return busy
    elsewhere = [view for view in views if not view.waits_for_others and view.phase != Phase.END]
    return elsewhere or ([] if len(last) == len(views) else last)


def _hang(cause: str, ranks: Sequence[RankView], text: str, stacks: Mapping[int, str]) -> Hang:
    ranks = sorted(ranks, key=lambda view: view.rank)
    state = f", state {ranks[0].state}" if ranks[0].state == "D" else ""
    top = f", at {ranks[0].stack[0]}" if ranks[0].stack else ""
    return Hang(
        cause,
        tuple(view.rank for view in ranks),
        max(view.position[0] for view in ranks),
        f"{', '.join(map(str, ranks))} {text}{state}{top}",
        stacks,
    )


def look(workers: Mapping[int, int], heartbeats: Path, begun: Mapping[int, float]) -> list[RankView]:
    """Observe the ranks of this machine.

    Args:
        workers: rank -> process ID.
        heartbeats: folder with the ranks' heartbeat files.
        begun: rank -> time.monotonic() at its start.
    """
    views = []
    for rank, pid in sorted(workers.items()):
        beat = read_beat(heartbeats / f"rank_{rank:05d}")
        now = time.monotonic()
        if beat is not None and beat.pid != pid:
            beat = None
        silent = now - (beat.beat_ns / 1e9 if beat else begun[rank])
        held = now - beat.alive_ns / 1e9 if beat else 0.0
        views.append(RankView(rank, pid, beat, silent, held, process_state(pid)))
    return views


def process_state(pid: int) -> str:
    """State letter of a process from /proc; empty if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # The state follows the command name, which is in parentheses and may contain any character.
    return text[text.rfind(")") + 2 :][:1]


def dump_stacks(views: Sequence[RankView], folder: Path) -> tuple[list[RankView], dict[int, str]]:
    """Make every rank that can do so dump the stacks of its threads.

    Returns:
        The ranks, with the main thread's stack filled in, and rank -> file.
    """
    files = {view.rank: folder / f"rank_{view.rank:05d}_{view.pid}.txt" for view in views}
    before = {rank: _size(path) for rank, path in files.items()}
    running = [view for view in views if not view.stopped and view.state not in ("Z", "")]
    asked = [view for view in running if catches(view.pid, signal.SIGUSR2)]
    for view in asked:
        _send(view.pid, signal.SIGUSR2)
    deadline = time.monotonic() + _DUMP_SECONDS
    sizes: dict[int, int] = {}
    while asked and time.monotonic() < deadline:
        time.sleep(0.1)
        seen = {view.rank: _size(files[view.rank]) for view in asked}
        if seen == sizes and all(seen[rank] > before[rank] for rank in seen):
            break
        sizes = seen
    with_stacks, written = [], {}
    for view in views:
        text = _tail(files[view.rank], before[view.rank])
        with_stacks.append(replace(view, stack=main_stack(text)))
        if text:
            written[view.rank] = str(files[view.rank])
    return with_stacks, written


def main_stack(dump: str) -> tuple[str, ...]:
    """Extract the main thread's frames from a faulthandler dump, innermost first; it is the last thread of a dump."""
    frames: list[str] = []
    for line in dump.splitlines():
        if match := _FRAME.match(line):
            frames.append(f"{match['file']}:{match['line']} in {match['function']}")
        elif line.startswith(("Thread ", "Current thread ")):
            frames = []
    return tuple(frames)


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal; without one, the signal would end it."""
    with suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _tail(path: Path, start: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace")
    except OSError:
        return ""
