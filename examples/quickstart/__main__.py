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
from collections.abc import Sequence
from pathlib import Path

from examples.quickstart.instructions import KINDS
from examples.quickstart.prepare import MODALITIES
from examples.quickstart.report import STAGES, answers_file, write_report

FOLDER = Path("runs/quickstart")
EVALUATION = FOLDER / "evaluation.json"
EXPORTED = FOLDER / "exported"

PREPARE_TOOL = "examples.quickstart.prepare"
# Configuration -> verb and what it does; each run takes two processes.
TRAINING = {
    "quickstart_llama": ("pretrain", "the small Llama learns text (two replicas)"),
    "quickstart": ("pretrain", "image, audio and IMU are aligned to it (tensor parallel)"),
    "quickstart_video": ("pretrain", "video joins them (pipeline parallel)"),
    "quickstart_sft": ("sft", "adapters learn to answer in the form that is asked for (sequence parallel)"),
    "quickstart_dpo": ("dpo", "and to leave the polite opening away (context parallel)"),
}


EXPORT_TOOL = "checkpoint_tools.export_hf"
EXPORT = ["--checkpoint", str(FOLDER / "dpo"), "--out", str(EXPORTED), "--overwrite"]


def main() -> int:
    """Run every stage; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.quickstart", description=__doc__)
    parser.add_argument("--install-seconds", type=float, default=0.0, help="what the installation took, for the report")
    arguments = parser.parse_args()
    begun = time.monotonic()
    _run("words, media, shards, tokenizer, image encoder", [str(FOLDER)], module=PREPARE_TOOL)
    training = sum(_run(what, [verb, f"--config-name={name}"], processes=2) for name, (verb, what) in TRAINING.items())
    _run("held-out questions", evaluate("align_video", MODALITIES, EVALUATION, "--permute-media", "--untrained"))
    conversations = [f"instructions_{kind}" for kind in KINDS]
    for run, what in STAGES.items():
        _run(f"held-out conversations {what}", evaluate(run, conversations, answers_file(FOLDER, run)))
    _run("the result as a HuggingFace folder, compared with the trainer's own model", EXPORT, module=EXPORT_TOOL)
    _run("an answer from that folder", ask(EXPORTED))
    seconds = {
        "install": arguments.install_seconds,
        "train": training,
        "total": arguments.install_seconds + time.monotonic() - begun,
    }
    report = write_report(FOLDER, EVALUATION, seconds)
    print(json.dumps({name: report[name] for name in ("modalities", "sft", "dpo")}, indent=1))
    print(f"{FOLDER / 'report.json'} and {FOLDER / 'report.html'} are written, after {seconds['total']:.0f} s")
    return 0


def evaluate(run: str, data: Sequence[str], out: Path, *further: str) -> list[str]:
    """The verb's arguments for held-out data of these names."""
    folders = [argument for name in data for argument in ("--data", str(FOLDER / "data" / f"{name}_held_out"))]
    fixed = ["--checkpoint", str(FOLDER / run), "--max-new-tokens", "20", "--batch-size", "128", "--out", str(out)]
    return ["evaluate", *fixed, *folders, *further]


def ask(model: Path) -> list[str]:
    """The verb's arguments for a question about the first held-out picture."""
    picture = FOLDER / "media" / "image_held_out" / "image-held_out-000000.png"
    question = ["--chat", "--media", str(picture), "--text", "what is in the picture? answer in capitals."]
    return ["generate", "--checkpoint", str(model), *question, "--max-new-tokens", "20"]


def _run(what: str, arguments: list[str], *, processes: int = 1, module: str = "megatron_anymal") -> float:
    """Run a verb, or another module; returns the seconds it took. A failure ends the quickstart with its exit code."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", module, *arguments]
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
