"""A rank without a model, for tests of the launcher: sends heartbeats, saves empty checkpoints, and fails on request.

Arguments: run folder, number of steps, then faults as "RANK:STEP:WHAT[:ATTEMPT]". A fault without an attempt happens in
every attempt. Step -1 is the start. WHAT is one of: kill, crash, words (exit without an event), code=N, stop, saving
(stop while saving the previous step, which has its own timeout), sleep, gil, data (sleep in the data phase), silent (no
heartbeat at all), abort (as a library does in native code).
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

from megatron_anymal.resilience.events import record
from megatron_anymal.resilience.heartbeat import Heartbeat, Phase

RANK, ATTEMPT = int(os.environ["RANK"]), int(os.environ["ANYMAL_ATTEMPT"])
STEP_SECONDS = 0.1


def forever() -> None:
    while True:
        time.sleep(0.2)


def fail(what: str, step: int, beat: Heartbeat, run_dir: Path) -> None:
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "crash":
        try:
            raise RuntimeError(f"rank {RANK} was told to crash")
        except RuntimeError as error:
            record(run_dir, "exception", f"RuntimeError: {error}", traceback=traceback.format_exc())
            raise
    elif what == "abort":
        # As `anymal` does. No core file is left.
        faulthandler.enable(2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.abort()
    elif what == "words":
        sys.exit("the last words of a rank")
    elif what.startswith("code="):
        os._exit(int(what.removeprefix("code=")))
    elif what in ("stop", "saving"):
        if what == "saving":
            beat.beat(Phase.CHECKPOINT, step - 1)
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "gil":
        # PyDLL holds the GIL during the call. The signal that requests stacks interrupts the sleep.
        while True:
            ctypes.PyDLL(None).sleep(1000)
    elif what == "data":
        beat.beat(Phase.DATA)
        forever()
    else:
        forever()


def main() -> int:
    run_dir, steps, faults = Path(sys.argv[1]), int(sys.argv[2]), [f.split(":") for f in sys.argv[3:]]
    due = {int(f[1]): f[2] for f in faults if int(f[0]) == RANK and (len(f) < 4 or int(f[3]) == ATTEMPT)}
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda n, frame: stopping.append(n))
    (run_dir / "stacks").mkdir(parents=True, exist_ok=True)
    stacks = (run_dir / "stacks" / f"rank_{RANK:05d}_{os.getpid()}.txt").open("a")
    faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
    if due.get(-1) == "silent":
        forever()
    beat = Heartbeat(Path(os.environ["ANYMAL_HEARTBEATS"]) / f"rank_{RANK:05d}", RANK)
    if -1 in due:
        fail(due[-1], -1, beat, run_dir)
    saved = run_dir / "checkpoints"
    first = agreed_start(run_dir, saved)
    for step in range(first, steps + 1):
        beat.beat(Phase.COMPUTE, step)
        if step in due:
            fail(due[step], step, beat, run_dir)
        time.sleep(STEP_SECONDS)
        beat.beat(Phase.UPDATE, settled=True)
        wait_for_others(run_dir, step, stopping)
        if stopping:
            beat.beat(Phase.END)
            grace = os.environ.get("ANYMAL_GRACE_SECONDS")
            record(run_dir, "stopped", f"signal {stopping[0]}, grace {grace}", step=step)
            return 75
        if RANK == 0:
            (saved / f"step_{step:08d}").mkdir(parents=True, exist_ok=True)
    beat.beat(Phase.END)
    return 0


def agreed_start(run_dir: Path, saved: Path) -> int:
    """Return the step after the newest checkpoint that rank 0 finds."""
    start_file = run_dir / f"first_{ATTEMPT}"
    if RANK == 0:
        newest = max([int(p.name.removeprefix("step_")) for p in saved.glob("step_*")], default=0)
        part = start_file.with_suffix(".part")
        part.write_text(str(newest + 1))
        part.rename(start_file)
    while not start_file.exists():
        time.sleep(0.02)
    return int(start_file.read_text())


def wait_for_others(run_dir: Path, step: int, stopping: list[int]) -> None:
    """Wait until every rank has reached the step, as a collective operation would, or until this one is to stop.

    Another rank may have stopped before the step.
    """
    mine = run_dir / "reached" / f"{RANK}_{step}_{ATTEMPT}"
    mine.parent.mkdir(exist_ok=True)
    mine.touch()
    ranks = range(int(os.environ["WORLD_SIZE"]))
    while not stopping and not all((mine.parent / f"{rank}_{step}_{ATTEMPT}").exists() for rank in ranks):
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main())
