"""Asynchronous checkpoint writing: copy, write, commit, delete old checkpoints.

The main threads of all ranks plan a checkpoint together and copy their shards to host memory. From there a background
thread on each rank takes over: it writes the rank's file, and rank 0's thread commits once every rank's file is on
disk. The threads coordinate through a `Channel`, so that no rank can leave another waiting: rank 0 posts the verdict on
a save, and all ranks act on it.

Threads rather than processes: they end with the run, so no leftover of a killed run keeps writing into the folder of
the next one, nothing is forked from a process that uses CUDA, and the copy needs no shared memory. Writing, hashing and
syncing release the GIL.
"""

from __future__ import annotations

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
from megatron_anymal.parallel import next_number
from megatron_anymal.resilience import fault_injection
from megatron_anymal.resilience.events import record
from megatron_anymal.resilience.exit_codes import Exit

# How long rank 0 waits for the other ranks once its own file is written, in seconds.
PATIENCE = 1800.0
# How long the other ranks wait for rank 0's messages, in seconds.
_LONG_PATIENCE = 6 * PATIENCE
# How long a failing run waits for the checkpoint in progress, in seconds.
_LAST_PATIENCE = 300.0


class SaveFailed(CheckpointError):
    """The run's last checkpoint could not be written."""

    exit_code = Exit.SAVE_FAILED


class FolderLost(CheckpointError):
    """Another job has taken over the run's folder."""

    exit_code = Exit.LOCKED


@dataclass(frozen=True)
class Verdict:
    """Outcome of a save; the same on every rank."""

    # Why it failed; empty if it was committed.
    error: str = ""
    # The run must not continue.
    fatal: bool = False
    # A problem that did not affect the checkpoint itself.
    warning: str = ""


@dataclass
class Save:
    """One checkpoint being written, as seen by one rank."""

    # Number of the save in this process, from 0.
    number: int
    # Manifest to be written; its files are filled in at the commit.
    manifest: Manifest
    # Folder that the ranks write to.
    staging: Path
    # Name of the folder once the checkpoint is committed.
    final: Path
    # None if this rank could not copy its shards.
    snapshot: Optional[Snapshot]
    # Why this rank could not copy its shards; empty if it could.
    failure: str
    # time.monotonic() at the start of the save, in seconds.
    begun: float
    # Seconds the main thread was blocked.
    stalled: float = 0.0
    # Seconds of these that every save takes, without waits for one that is still being written.
    least_stalled: float = 0.0
    # Seconds until the verdict.
    seconds: float = 0.0
    # Outcome; None while the save is in progress.
    verdict: Optional[Verdict] = None
    # Thread that writes and commits.
    thread: threading.Thread = field(default_factory=threading.Thread)


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time.

    Args:
        checkpoints: the run's checkpoints folder.
        rules: retention settings, and whether to save asynchronously.
        say: prints a message to the user; only rank 0's output is shown.
        guard: called on rank 0 before each commit; raises LockLost if the folder no longer belongs to this run.
    """

    def __init__(
        self, checkpoints: Path, rules: CheckpointConfig, say: Callable[[str], None], guard: Callable[[], None]
    ) -> None:
        self.checkpoints, self.rules = checkpoints, rules
        self._say, self._guard = say, guard
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._save: Optional[Save] = None
        # Verdict on the last save; earlier ones were already reported to the user.
        self._last = Verdict()
        # The checkpoint committed last.
        self._newest: Optional[Path] = None
        # Whether the ranks' shards have been validated against each other.
        self._checked = False

    def start(self, state: Any, manifest: Manifest) -> None:
        """Start a save; return once the state is copied or, without `async_save`, once it is committed. Collective.

        A write failure is only reported: the run continues, and the next checkpoint tries again.

        Args:
            state: a TrainState.
            manifest: complete except for the files.

        Raises:
            CheckpointError: the folder no longer belongs to this run.
        """
        self._settle()
        self._stop_where_lost()
        begun = time.monotonic()
        snapshot, failure = None, ""
        plan = Plan(state, manifest.step, check=not self._checked)
        self._checked = True
        try:
            snapshot = plan.copy()
        except (MemoryError, RuntimeError) as error:
            failure = f"its shards could not be copied to host memory ({_reason(error)})"
        self._save = save = Save(
            number=next_number(),
            manifest=manifest,
            staging=store.staging_folder(self.checkpoints, manifest.step),
            final=store.committed_folder(self.checkpoints, manifest.step),
            snapshot=snapshot,
            failure=failure,
            begun=begun,
        )
        # Daemon: the interpreter does not wait for it at exit. Call `finish` to wait for the save.
        save.thread = threading.Thread(target=self._work, args=(save,), name="checkpoint", daemon=True)
        save.thread.start()
        save.stalled = save.least_stalled = time.monotonic() - begun
        if not self.rules.async_save:
            self._settle()

    def report(self) -> None:
        """Report a save that has ended in the meantime. Does not block."""
        if self._save is not None and not self._save.thread.is_alive():
            self._settle()

    def finish(self) -> None:
        """Wait for the last save. Collective.

        Raises:
            CheckpointError: the save failed; raised on all ranks.
        """
        self._settle()
        # Rank 0 may host the key-value store: it must not exit before all ranks have read the verdict.
        dist.barrier()
        self._stop_where_lost()
        if self._last.error:
            newest = f"Its newest checkpoint is {self._newest}." if self._newest else "It wrote no other checkpoint."
            raise SaveFailed(
                f"The run's last checkpoint could not be written: {self._last.error}. {newest} Fix the cause and "
                "start the run again: it continues from the newest valid checkpoint."
            )

    def abandon(self) -> None:
        """Wait for a save in progress when this rank fails, so that the checkpoint is not lost. Never raises."""
        self._settle(_LAST_PATIENCE)

    def _settle(self, patience: Optional[float] = None) -> None:
        """Wait for the save in progress, if any, and report its outcome."""
        save, self._save = self._save, None
        if save is None:
            return
        if self.rules.async_save and save.thread.is_alive():
            self._say(f"waiting for {save.final}, which is still being written")
        waited = time.monotonic()
        save.thread.join(patience)
        save.stalled += time.monotonic() - waited
        if not self.rules.async_save:
            save.least_stalled = save.stalled
        self._last = verdict = save.verdict or Verdict(
            f"it did not finish within {time.monotonic() - save.begun:.0f} s"
        )
        if verdict.error:
            self._say(
                f"warning: {save.final} could not be written: {verdict.error}. No older checkpoint was deleted; the "
                "next save tries again."
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
            times = {"seconds": round(save.seconds, 3), "stalled": round(save.least_stalled, 3)}
            record(self.checkpoints.parent, kind, text, step=save.manifest.step, **times)

    def _stop_where_lost(self) -> None:
        """Raise FolderLost if another job took over the folder; on all ranks, since all have the verdict by now."""
        if self._last.fatal:
            raise FolderLost(self._last.error)

    def _work(self, save: Save) -> None:
        """Body of a rank's background thread."""
        channel = Channel(f"checkpoint/{save.number}")
        try:
            if self._rank == 0:
                self._lead(save, channel)
            else:
                self._follow(save, channel)
        # Any exception, even SystemExit: a thread that died silently would look like one still writing.
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
        # Free the memory for the next snapshot.
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
        """Write this rank's file; return its chunk offsets and checksum, or the error, as JSON."""
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
        """On rank 0, with the reports of all ranks: commit, or return the reason for not committing."""
        errors = [report["error"] for report in reports if report["error"]]
        if errors:
            # If the staging directory could not be created, all ranks report the same error.
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
        # The checkpoint is committed even if older ones cannot be deleted.
        error_text = _attempt(lambda: retain(self.checkpoints, self.rules, save.manifest.step))
        return Verdict(warning=f"old checkpoints could not be deleted and stay: {error_text}" if error_text else "")


def _attempt(do: Callable[[], Any]) -> str:
    """Call `do`; return the reason if it failed, else an empty string."""
    try:
        do()
    except BaseException as error:
        return _reason(error)
    return ""


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        file = f"{error.filename}: " if error.filename else ""
        return f"{file}{error.strerror}"
    first = str(error).splitlines()[0].rstrip(".") if str(error) else ""
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
