"""`make quickstart`: train a small Llama from scratch to answer questions about images, videos, sounds and motion.

Prints and runs the commands that a user would run, one after the other, and finally writes report.json and report.html.
If interrupted, run it again to resume.
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

FOLDER = Path("runs/quickstart")
EVALUATION = FOLDER / "evaluation.json"
EXPORTED = FOLDER / "exported"
# Answers of the any-to-any model to held-out questions.
UNDERSTOOD = FOLDER / "understood.json"

PREPARE_TOOL = "examples.quickstart.prepare"
# Configuration -> verb and stage title; each run uses two processes.
TRAINING = {
    "quickstart_llama": ("pretrain", "train the small Llama on text (two replicas)"),
    "quickstart": ("pretrain", "align image, audio and IMU to the Llama (tensor parallel)"),
    "quickstart_video": ("pretrain", "add video to the alignment (pipeline parallel)"),
    "quickstart_sft": ("sft", "tune adapters to answer in the requested form (sequence parallel)"),
    "quickstart_dpo": ("dpo", "train the preference for answers without a polite opening (context parallel)"),
}


# The any-to-any stage: pictures and sounds as codes of the Llama's vocabulary.
ANY_TO_ANY_TOOL, CREATION_TOOL = "examples.quickstart.any_to_any", "examples.quickstart.creations"
ANY_TO_ANY = ["pretrain", "--config-name=quickstart_any_to_any"]
TOKENIZERS = {
    "picture": "examples.quickstart.picture_codes:PictureTokenizer",
    "sound": "examples.quickstart.sound_codes:SoundTokenizer",
}

EXPORT_TOOL = "checkpoint_tools.export_hf"
EXPORT = ["--checkpoint", str(FOLDER / "dpo"), "--out", str(EXPORTED), "--overwrite"]


def main() -> int:
    """Run every stage; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.quickstart", description=__doc__)
    parser.add_argument("--install-seconds", type=float, default=0.0, help="duration of the installation to report")
    arguments = parser.parse_args()
    from examples.quickstart.instructions import KINDS
    from examples.quickstart.prepare import MODALITIES
    from examples.quickstart.report import STAGES, answers_file, write_report

    begun = time.monotonic()
    _run("prepare text, media, shards, tokenizer and image encoder", [str(FOLDER)], module=PREPARE_TOOL)
    training = sum(_run(what, [verb, f"--config-name={name}"], processes=2) for name, (verb, what) in TRAINING.items())
    _run("held-out questions", evaluate("align_video", MODALITIES, EVALUATION, "--permute-media", "--untrained"))
    conversations = [f"instructions_{kind}" for kind in KINDS]
    for run, what in STAGES.items():
        _run(f"held-out conversations {what}", evaluate(run, conversations, answers_file(FOLDER, run)))
    _run("export a HuggingFace folder and compare it with the trainer's own model", EXPORT, module=EXPORT_TOOL)
    _run("answer a question with the exported folder", ask(EXPORTED))
    any_to_any = _any_to_any()
    seconds = {
        "install": arguments.install_seconds,
        "train": training,
        "any_to_any": any_to_any,
        "total": arguments.install_seconds + time.monotonic() - begun,
    }
    report = write_report(FOLDER, EVALUATION, UNDERSTOOD, seconds)
    print(json.dumps({name: report[name] for name in ("modalities", "sft", "dpo", "any_to_any")}, indent=1))
    print(f"{FOLDER / 'report.json'} and {FOLDER / 'report.html'} written after {seconds['total']:.0f} s")
    return 0


def evaluate(run: str, data: Sequence[str], out: Path, *further: str) -> list[str]:
    """Arguments of `anymal evaluate` for the held-out data sets with these names."""
    folders = [argument for name in data for argument in ("--data", str(FOLDER / "data" / f"{name}_held_out"))]
    fixed = ["--checkpoint", str(FOLDER / run), "--max-new-tokens", "20", "--batch-size", "128", "--out", str(out)]
    return ["evaluate", *fixed, *folders, *further]


def ask(model: Path) -> list[str]:
    """Arguments of `anymal generate` for a question about the first held-out image."""
    picture = FOLDER / "media" / "image_held_out" / "image-held_out-000000.png"
    question = ["--chat", "--media", str(picture), "--text", "what is in the picture? answer in capitals."]
    return ["generate", "--checkpoint", str(model), *question, "--max-new-tokens", "20"]


def tokenize(split: str) -> list[str]:
    """Arguments of `anymal prepare` that turn the media of the any-to-any stage's samples into codes."""
    name, out = f"any_to_any_{split}", str(FOLDER / "data")
    fixed = ["--manifest", str(FOLDER / "media" / f"{name}.jsonl"), "--out", f"{out}/{name}", "--overwrite"]
    encode = [argument for kind, of in TOKENIZERS.items() for argument in ("--encode", f"{kind}={of}")]
    return ["prepare", *fixed, "--tokenizer", str(FOLDER / "tokenizer"), *encode]


def draw() -> list[str]:
    """Arguments of `anymal generate` for a drawing."""
    fixed = ["generate", "--checkpoint", str(FOLDER / "any_to_any"), "--chat", "--text", "draw the digit seven."]
    return [*fixed, "--media-out", str(FOLDER / "drawing"), "--media-tokenizer", f"picture={TOKENIZERS['picture']}"]


def _any_to_any() -> float:
    """Run the any-to-any stage and return the seconds it took."""
    return sum(
        (
            _run("train tokenizers of pictures and sounds", [str(FOLDER)], module=ANY_TO_ANY_TOOL),
            _run("turn training media into codes", tokenize("train")),
            _run("turn held-out media into codes", tokenize("held_out")),
            _run("train the Llama to read and write codes (two replicas)", ANY_TO_ANY, processes=2),
            _run("held-out questions about codes", evaluate("any_to_any", ["any_to_any"], UNDERSTOOD)),
            _run("draw, continue videos and make sounds", [str(FOLDER)], module=CREATION_TOOL),
            _run("draw a digit", draw()),
        )
    )


def _run(what: str, arguments: list[str], *, processes: int = 1, module: str = "megatron_anymal") -> float:
    """Run a verb or another module and return the seconds it took; if it fails, exit with its exit code."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", module, *arguments]
    shown = ["torchrun", *command[4:]] if processes > 1 else ["python", *command[1:]]
    print(f"\n== {what}\n$ {' '.join(shown)}", flush=True)
    begun = time.monotonic()
    # One thread per process: the models are too small for more, and two processes share two cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment)
    if done.returncode:
        print(f"the quickstart stopped: {what} failed with exit code {done.returncode}", file=sys.stderr)
        sys.exit(done.returncode)
    return time.monotonic() - begun


if __name__ == "__main__":
    sys.exit(main())
