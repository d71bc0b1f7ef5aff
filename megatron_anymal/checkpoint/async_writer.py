"""Checkpoints written while training goes on: copy, write, commit, delete old ones.

The main threads of all ranks plan a checkpoint together and copy their parts to host memory. From there on a thread of
each rank goes on: it writes the rank's file, and rank 0's commits once every rank's is on disk. They agree through a
`Channel`, so that no rank can leave another waiting: what rank 0 says of a save, its verdict, is what all ranks take
for true.

Threads and not processes: they end with the run, so that nothing of a killed one writes on into the folder of the next,
nothing is forked beside CUDA, and the copy needs no shared memory. Writing, hashing and syncing hold no Python lock.
"""

from __future__ import annotations

import itertools
import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch.distributed as dist

from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.retention import retain
from megatron_anymal.checkpoint.run_lock import LockLost
from megatron_anymal.checkpoint.snapshot import Plan, Snapshot
from megatron_anymal.checkpoint.store import CheckpointError, Manifest
from megatron_anymal.checkpoint.tensor_stream import StoredFile, write_index
from megatron_anymal.checkpoint.thread_channel import Channel
from megatron_anymal.config import CheckpointConfig
from megatron_anymal.resilience import fault_injection
from megatron_anymal.resilience.events import record
from megatron_anymal.resilience.exit_codes import Exit

# How long rank 0 waits for the others once its own part is done, and they for its verdict, in seconds.
PATIENCE = 1800.0
_LONG_PATIENCE = 6 * PATIENCE
# How long a run that fails waits for the checkpoint under way, in seconds.
_LAST_PATIENCE = 300.0
# Saves of this process, so that each has its own messages.
_numbers = itertools.count()


class SaveFailed(CheckpointError):
    """The run's last checkpoint could not be written."""

    exit_code = Exit.SAVE_FAILED


class FolderLost(CheckpointError):
    """Another job has taken the run's folder over."""

    exit_code = Exit.LOCKED


@dataclass(frozen=True)
class Verdict:
    """What became of a save; the same on every rank."""

    # Why it failed; empty where it is committed.
    error: str = ""
    # The run must not go on.
    fatal: bool = False
    # What went wrong without harm to it.
    warning: str = ""


@dataclass
class Save:
    """One checkpoint on its way to disk, as one rank sees it."""

    number: int
    manifest: Manifest
    staging: Path
    final: Path
    # None where this rank could not copy its part: `failure` says why.
    snapshot: Optional[Snapshot]
    failure: str
    begun: float
    # Seconds that the main thread was held up.
    stalled: float = 0.0
    # Seconds until the verdict.
    seconds: float = 0.0
    verdict: Optional[Verdict] = None
    thread: threading.Thread = field(default_factory=threading.Thread)


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time.

    Args:
        checkpoints: the run's folder of them.
        rules: which of them stay, and whether training goes on while one is written.
        say: tells the user; only rank 0's is heard.
        guard: called on rank 0 before it commits; raises LockLost where the folder is no longer this run's.
    """

    def __init__(
        self, checkpoints: Path, rules: CheckpointConfig, say: Callable[[str], None], guard: Callable[[], None]
    ) -> None:
        self.checkpoints, self.rules = checkpoints, rules
        self._say, self._guard = say, guard
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._save: Optional[Save] = None
        # The last save's; those before it were told to the user.
        self._last = Verdict()
        # What was committed last.
        self._newest: Optional[Path] = None
        # The ranks' shards were compared.
        self._checked = False

    def start(self, state: Any, manifest: Manifest) -> None:
        """Begin a checkpoint; returns once the state is copied, and without `async_save` once it is committed.

        A failure to write is told and no more: the run goes on, and its next checkpoint is another attempt. Collective.

        Args:
            state: a TrainState.
            manifest: with all but the files.

        Raises:
            CheckpointError: the run's folder is no longer its own.
        """
        begun = time.monotonic()
        self._settle()
        self._stop_where_lost()
        snapshot, failure = None, ""
        plan = Plan(state, manifest.step, check=not self._checked)
        self._checked = True
        try:
            snapshot = plan.copy()
        except (MemoryError, RuntimeError) as error:
            failure = f"its part could not be copied to host memory ({_reason(error)})"
        self._save = save = Save(
            number=next(_numbers),
            manifest=manifest,
            staging=store.staging_folder(self.checkpoints, manifest.step),
            final=store.committed_folder(self.checkpoints, manifest.step),
            snapshot=snapshot,
            failure=failure,
            begun=begun,
        )
        # Not waited for at the interpreter's end: whoever cares calls `finish`.
        save.thread = threading.Thread(target=self._work, args=(save,), name="checkpoint", daemon=True)
        save.thread.start()
        save.stalled = time.monotonic() - begun
        if not self.rules.async_save:
            self._settle()

    def report(self) -> None:
        """Tell the user of a save that has ended meanwhile. Waits for nothing."""
        if self._save is not None and not self._save.thread.is_alive():
            self._settle()

    def finish(self) -> None:
        """Wait for the last save. Collective.

        Raises:
            CheckpointError: it failed; on all ranks.
        """
        self._settle()
        # Rank 0 may keep the store of messages: it must not leave before all have read.
        dist.barrier()
        self._stop_where_lost()
        if self._last.error:
            newest = f"The newest one of this run is {self._newest}." if self._newest else "It wrote no other one."
            raise SaveFailed(
                f"The run's last checkpoint could not be written: {self._last.error}. {newest} Mend the cause and "
                "start the run again: it continues from the newest valid one."
            )

    def abandon(self) -> None:
        """Wait for a save that is under way while this rank fails, so that it is not lost. Raises nothing."""
        self._settle(_LAST_PATIENCE)

    def _settle(self, patience: Optional[float] = None) -> None:
        """Wait until no save is under way, and tell the user what became of it."""
        save, self._save = self._save, None
        if save is None:
            return
        if self.rules.async_save and save.thread.is_alive():
            self._say(f"waiting for {save.final}, which is still being written")
        waited = time.monotonic()
        save.thread.join(patience)
        save.stalled += time.monotonic() - waited
        self._last = verdict = save.verdict or Verdict(f"it was not done in {time.monotonic() - save.begun:.0f} s")
        if verdict.error:
            self._say(
                f"warning: {save.final} could not be written: {verdict.error}. Nothing older was deleted; the next "
                "checkpoint is the next attempt."
            )
            self._record("save_failed", f"{save.final.name}: {verdict.error}", save)
            return
        self._newest = save.final
        self._say(f"saved {save.final} in {save.seconds:.1f} s; training waited {save.stalled:.2f} s")
        self._record("saved", save.final.name, save)
        if verdict.warning:
            self._say(f"warning: {verdict.warning}")

    def _record(self, kind: str, text: str, save: Save) -> None:
        if self._rank == 0:
            record(self.checkpoints.parent, kind, text, step=save.manifest.step, seconds=round(save.seconds, 3))

    def _stop_where_lost(self) -> None:
        """On all ranks at once, since all know the verdict here."""
        if self._last.fatal:
            raise FolderLost(self._last.error)

    def _work(self, save: Save) -> None:
        """A rank's thread."""
        channel = Channel(f"checkpoint/{save.number}")
        try:
            if self._rank == 0:
                self._lead(save, channel)
            else:
                self._follow(save, channel)
        # Whatever it is, SystemExit too: a thread that fails in silence would be taken for one at work.
        except BaseException as error:
            save.verdict = Verdict(f"the ranks could not agree ({_reason(error)})")
        save.snapshot = None

    def _follow(self, save: Save, channel: Channel) -> None:
        refused = channel.wait(["ready"], _LONG_PATIENCE)[0].decode()
        channel.post(f"rank {self._rank}", self._report(save, refused))
        save.snapshot = None
        save.verdict = Verdict(**json.loads(channel.wait(["verdict"], _LONG_PATIENCE)[0]))
        save.seconds = time.monotonic() - save.begun

    def _lead(self, save: Save, channel: Channel) -> None:
        refused = _attempt(lambda: self._prepare(save.staging))
        channel.post("ready", refused)
        names = [f"rank {rank}" for rank in range(1, self._world)]
        reports = [self._report(save, refused)]
        # Its memory is needed for the next one.
        common = save.snapshot.common if save.snapshot else b""
        save.snapshot = None
        try:
            reports += [report.decode() for report in channel.wait(names, PATIENCE)] if names else []
            save.verdict = self._judge(save, [json.loads(report) for report in reports], common)
        except BaseException as error:
            save.verdict = Verdict(_reason(error))
        save.seconds = time.monotonic() - save.begun
        if save.verdict.error:
            shutil.rmtree(save.staging, ignore_errors=True)
        channel.post("verdict", json.dumps(vars(save.verdict)))
        channel.forget(["ready", *names])

    def _prepare(self, staging: Path) -> None:
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir(parents=True)

    def _report(self, save: Save, refused: str) -> str:
        """Write this rank's file; returns its contents' places and checksum, or why it failed, as JSON."""
        files: list[StoredFile] = []

        def write() -> None:
            assert save.snapshot is not None
            before_each = partial(fault_injection.inject, "checkpoint", save.manifest.step)
            files.extend(save.snapshot.write(save.staging / f"__{self._rank}_0.distcp", before_each))

        failure = refused or save.failure or _attempt(write)
        by = f"rank {self._rank}: " if self._world > 1 and not refused else ""
        error = f"{by}{failure}" if failure else ""
        return json.dumps({"error": error, "files": [file.to_dict() for file in files]})

    def _judge(self, save: Save, reports: list[dict[str, Any]], common: bytes) -> Verdict:
        """Rank 0, with the reports of all: commit, or say why not."""
        errors = [report["error"] for report in reports if report["error"]]
        if errors:
            # With no folder to write to they all say the same.
            return Verdict("; ".join(dict.fromkeys(errors)))
        try:
            self._guard()
        except LockLost as error:
            return Verdict(str(error), fatal=True)
        files = [StoredFile.from_dict(file) for report in reports for file in report["files"]]
        failure = _attempt(
            lambda: store.commit(
                save.staging, save.final, save.manifest, digests=write_index(save.staging, files, common)
            )
        )
        if failure:
            return Verdict(failure)
        # The files are committed whatever becomes of older ones.
        kept = _attempt(lambda: retain(self.checkpoints, self.rules, save.manifest.step))
        return Verdict(warning=f"old checkpoints could not be deleted: {kept}. They stay." if kept else "")


def _attempt(do: Callable[[], Any]) -> str:
    """Why it failed; empty where it did not."""
    try:
        do()
    except BaseException as error:
        return _reason(error)
    return ""


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    first = str(error).splitlines()[0].rstrip(".") if str(error) else ""
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
