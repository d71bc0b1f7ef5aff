"""What a launcher prints on its terminal."""

from __future__ import annotations

import os
import sys

from megatron_anymal.launcher.job import Job


def announce(job: Job, text: str) -> None:
    """Print a line with the launcher's node in front. A terminal that was lost ends nothing."""
    node = " spare" if job.spare else f" node {job.node}" if job.nodes > 1 else ""
    try:
        print(f"[launch{node}] {text}", flush=True)
    except OSError:
        # What stays in the buffer would fail again, at exit.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
