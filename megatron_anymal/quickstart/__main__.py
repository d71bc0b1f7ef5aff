"""`make quickstart`: from nothing to a small Llama that answers about images, videos, sounds and motion.

Runs the same commands that a user would, one after the other, each printed first; started again, it goes on where it
was. Ends with report.json and report.html.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from megatron_anymal.quickstart.prepare import MODALITIES
from megatron_anymal.quickstart.report import write_report

FOLDER = Path("runs/quickstart")
EVALUATION = FOLDER / "evaluation.json"

PREPARE = ["prepare", "--quickstart", str(FOLDER)]
# Configuration -> what it does; each run takes two processes.
TRAINING = {
    "quickstart_llama": "the small Llama learns text (two replicas)",
    "quickstart": "image, audio and IMU are aligned to it (tensor parallel)",
    "quickstart_video": "video joins them (pipeline parallel)",
}
EVALUATE = [
    "evaluate",
    *("--checkpoint", str(FOLDER / "align_video")),
    *(argument for name in MODALITIES for argument in ("--data", str(FOLDER / "data" / f"{name}_held_out"))),
    *("--max-new-tokens", "16", "--batch-size", "128", "--permute-media", "--untrained", "--out", str(EVALUATION)),
]


def main() -> int:
    """Run every stage; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m megatron_anymal.quickstart", description=__doc__)
    parser.add_argument("--install-seconds", type=float, default=0.0, help="what the installation took, for the report")
    arguments = parser.parse_args()
    begun = time.monotonic()
    _run("shards, tokenizer, image encoder", PREPARE, processes=1)
    training = sum(_run(what, ["pretrain", f"--config-name={name}"], processes=2) for name, what in TRAINING.items())
    _run("held-out questions", EVALUATE, processes=1)
    seconds = {
        "install": arguments.install_seconds,
        "train": training,
        "total": arguments.install_seconds + time.monotonic() - begun,
    }
    report = write_report(FOLDER, EVALUATION, seconds)
    print(json.dumps(report["modalities"], indent=1))
    print(f"{FOLDER / 'report.json'} and {FOLDER / 'report.html'} are written, after {seconds['total']:.0f} s")
    return 0


def _run(what: str, arguments: list[str], *, processes: int) -> float:
    """Run a verb and return the seconds it took; a failure ends the quickstart with its exit code."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "megatron_anymal", *arguments]
    shown = ["torchrun", *command[4:]] if processes > 1 else ["python", *command[1:]]
    print(f"\n== {what}\n$ {' '.join(shown)}", flush=True)
    begun = time.monotonic()
    # One thread a process: the models are too small for more, and two processes share two cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment)
    if done.returncode:
        print(f"the quickstart stopped: {what} failed with exit code {done.returncode}", file=sys.stderr)
        sys.exit(done.returncode)
    return time.monotonic() - begun


if __name__ == "__main__":
    sys.exit(main())
