"""slurm/prepare.sh without Slurm: its commands are replaced by stand-ins that record their calls."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
RECORD = """#!{python}
import json, os, pathlib, sys
name = pathlib.Path(sys.argv[0]).name
with (pathlib.Path(os.environ["STUBS"]) / name).open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
"""
PROGRAMS = {
    # The second job has the next number. A federated cluster adds its name.
    "sbatch": RECORD + 'print(7 + any("--merge" in word for word in sys.argv), end=";east\\n")\n'
    'sys.exit(int(os.environ.get("STUB_SBATCH", "0")))\n',
    "scontrol": RECORD + 'sys.exit(int(os.environ.get("STUB_SCONTROL", "0")))\n',
    # Runs what follows its options.
    "srun": RECORD
    + "words = sys.argv[1:]\nwhile words[0].startswith('--'):\n    del words[0]\nos.execv(words[0], words)\n",
    "sleep": RECORD,
    "venv/bin/python": RECORD
    + """import time
wait = time.monotonic() + float(os.environ.get("STUB_SECONDS", "0"))
while time.monotonic() < wait:
    time.sleep(0.01)
sys.exit(int(os.environ.get("STUB_CODE", "0")))
""",
}


class Script:
    """A folder with the stand-ins."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name, text in PROGRAMS.items():
            path = folder / "bin" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace("{python}", sys.executable))
            path.chmod(0o755)
        # Like Slurm, run a copy in another folder.
        shutil.copy(ROOT / "slurm" / "prepare.sh", folder / "slurm_script")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.environment = {
            **inherited,
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "STUBS": str(folder),
            "ANYMAL_VENV": str(folder / "bin" / "venv"),
            "ANYMAL_HOME": str(ROOT),
        }

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        words = ["bash", str(self.folder / "slurm_script"), *arguments]
        return subprocess.Popen(
            words,
            env={**self.environment, **environment},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        """The exit code and the output."""
        process = self.start(*arguments, **environment)
        output, _ = process.communicate(timeout=240)
        return process.returncode, output

    def calls(self, program: str) -> list[list[str]]:
        path = self.folder / program
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


TASK = {
    "SLURM_JOB_ID": "9",
    "SLURM_ARRAY_JOB_ID": "7",
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_CPUS_PER_TASK": "16",
}


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        (["--index-only", "my data", "--tokenizer=t"], "my data"),
        (["--index-only=my data", "--tokenizer=t"], "my data"),
        (["--manifest=m.jsonl", "--out", "o", "--limit=max_pixels=9"], "o"),
        (["--manifest=m.jsonl", "--out=o"], "o"),
        (["--from", "llava", "list of all.json", "--out", "o", "--media=m"], "o"),
        (["--from", "img2dataset", "my data", "--tokenizer=t"], "my data"),
    ],
)
def test_both_jobs_are_submitted(script: Script, given: list[str], folder: str) -> None:
    code, output = script.run("--partition=cpu", "--time=60", "64", *given, "--max-bad-share", "0.5", "--text-only")
    assert code == 0 and output == "parts: job 7 (1-64); joined by job 8\n"
    path = str(ROOT / "slurm" / "prepare.sh")
    parts, merge = script.calls("sbatch")
    options = ["--parsable", "--partition=cpu", "--time=60"]
    assert parts == [*options, "--array=1-64", path, "64", *given, "--text-only"]
    assert merge[:4] == [*options, "--dependency=afterok:7"] and "--kill-on-invalid-dep=yes" in merge
    assert merge[-5:] == [path, "--merge", folder, "--max-bad-share", "0.5"]
    assert not script.calls("srun")


@pytest.mark.parametrize(
    ("given", "expected_message"),
    [
        ([], "'' is not a number of parts"),
        (["0", "--index-only=f"], "'0' is not a number of parts"),
        (["--index-only=f", "--tokenizer=t"], "'' is not a number of parts"),
        (["8", "--tokenizer=t"], "the folder is missing"),
        (["8", "--from", "llava", "list.json", "--tokenizer=t"], "the folder is missing"),
        (["8", "--index-only=f", "--part=1/8"], "--part=1/8 is set for each job"),
    ],
)
def test_mistakes_submit_nothing(script: Script, given: list[str], expected_message: str) -> None:
    code, output = script.run(*given)
    assert code == 2 and output.startswith(f"error: {expected_message}") and output.count("\n") == 1
    assert not script.calls("sbatch")


def test_no_job_joins_an_array_that_was_refused(script: Script) -> None:
    assert script.run("8", "--index-only=f", STUB_SBATCH="1")[0] == 2
    assert len(script.calls("sbatch")) == 1


def test_a_task_does_its_part(script: Script) -> None:
    assert script.run("64", "--index-only", "my data", "--tokenizer=t", "--workers=2", **TASK)[0] == 0
    [words] = script.calls("python")
    given = ["--index-only", "my data", "--tokenizer=t", "--workers=2", "--part=3/64"]
    assert words == ["-m", "megatron_anymal", "prepare", "--workers=16", *given]
    [step] = script.calls("srun")
    assert "--ntasks=1" in step and "--cpus-per-task=16" in step and not script.calls("sbatch")


def test_the_joining_job(script: Script) -> None:
    assert script.run("--merge", "my data", "--max-bad-share", "0.5", SLURM_JOB_ID="8")[0] == 0
    assert script.calls("python") == [
        ["-m", "megatron_anymal", "prepare", "--merge", "my data", "--max-bad-share", "0.5"]
    ]


@pytest.mark.parametrize("code", ["1", "2", "75"])
def test_a_task_that_fails_ends_with_its_code(script: Script, code: str) -> None:
    assert script.run("64", "--index-only=f", **TASK, STUB_CODE=code)[0] == int(code)
    assert not script.calls("scontrol")


def stopped(script: Script, **environment: str) -> tuple[int, str]:
    """A task that gets the signal before its time limit."""
    process = script.start("64", "--index-only=f", **TASK, STUB_SECONDS="20", **environment)
    deadline = time.monotonic() + 240
    while not script.calls("python") and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def test_a_task_at_its_time_limit_is_requeued(script: Script) -> None:
    code, output = stopped(script)
    assert code == 75 and "job 7_3: the time limit is near" in output
    # Only this task, not the whole array.
    assert script.calls("scontrol") == [["requeue", "7_3"]]


def test_a_task_that_is_requeued_again_and_again(script: Script) -> None:
    code, output = stopped(script, SLURM_RESTART_COUNT="20")
    assert code == 2 and "error: restarted 20 times. Use more parts" in output and not script.calls("scontrol")
    (script.folder / "python").unlink()
    code, output = stopped(script, STUB_SCONTROL="1")
    assert code == 2 and "scontrol requeue failed. Submit the job again" in output
