"""The scripts in slurm/ without Slurm: its commands are replaced by stand-ins that record their calls."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_anymal.config.compose import compose, default_config_dir
from megatron_anymal.resilience.exit_codes import Exit

ROOT = Path(__file__).parents[3]
SCRIPTS = {"pretrain": "pretrain_70b", "sft": "sft_70b", "dpo": "dpo_70b"}
CONFIGS = {"pretrain": "pretrain_70b_image", "sft": "sft_70b", "dpo": "dpo_70b"}

# Records its options and runs the rest locally, as the task of node n1.
SRUN = """#!/bin/bash
[[ $1 != --help ]] || { echo "$STUB_SRUN_HELP"; exit; }
while [[ $1 == --* ]]; do echo "$1" >> "$STUBS/srun"; shift; done
echo >> "$STUBS/srun"
export SLURMD_NODENAME=n1 SLURM_NODEID=${STUB_NODEID:-0}
exec "$@"
"""
SCONTROL = """#!/bin/bash
echo "$*" >> "$STUBS/scontrol"
case "$1 $2" in
    "show hostnames") printf 'n1\\nn2\\n' ;;
    "show node") echo "NodeName=n1 Arch=x86_64 NodeAddr=10.0.0.1 NodeHostName=n1" ;;
    "show job")
        if [[ ${STUB_WAITS:-} == show-job ]]; then
            touch "$STUBS/begun_show-job"
            until [[ -e $STUBS/go ]]; do sleep 1; done
        fi
        echo "JobId=7 TimeLimit=${STUB_TIME:-1-00:00:00} TimeMin=N/A NumNodes=2" ;;
    "requeue 7" | "requeue 36_2") touch "$STUBS/go"; exit "${STUB_REQUEUE:-0}" ;;
esac
"""
SINFO = """#!/bin/bash
echo "n1 allocated"
echo "n2 ${STUB_NODE:-allocated}"
"""
# Sleeps run a hundred times faster.
SLEEP = """#!/bin/bash
exec {sleep} "$(awk "BEGIN {{ print $1 / 100 }}")"
"""
PYTHON = """#!{python}
import json, os, pathlib, signal, sys, time
stubs, words = pathlib.Path(os.environ["STUBS"]), sys.argv[1:]
part = "launch" if "launch" in words else "run-dir" if "--run-dir" in words else "preflight"
caught = []
if part == "launch" and not os.environ.get("STUB_DEAF"):
    signal.signal(signal.SIGUSR1, lambda *_: caught.append(1))
    signal.signal(signal.SIGTERM, lambda *_: caught.append(1))
with (stubs / "python").open("a") as file:
    file.write(json.dumps([part, words]) + "\\n")
(stubs / f"begun_{{part}}").touch()
code = int(os.environ.get("STUB_" + part.upper().replace("-", "_"), "0"))
if part == "run-dir":
    print("error: unknown key" if code else stubs / "my run", file=sys.stderr if code else sys.stdout)
if part == "preflight":
    print("n1 ok")
if part == "launch" and code:
    print(os.environ.get("STUB_SAYS", ""), flush=True)
deadline = time.monotonic() + 240
while os.environ.get("STUB_WAITS") == part and not caught and time.monotonic() < deadline:
    time.sleep(0.01)
    if (stubs / "go").exists():
        break
# As the launcher does: a repeated signal would kill an interpreter that has put its handlers away.
sys.stdout.flush()
os._exit(75 if caught else code)
"""


class Job:
    """One start of a script, with the environment that Slurm sets on the first of two nodes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.run_dir = folder / "my run"
        programs = {
            "srun": SRUN,
            "scontrol": SCONTROL,
            "sinfo": SINFO,
            "sleep": SLEEP.format(sleep=shutil.which("sleep")),
            "venv/bin/python": PYTHON.format(python=sys.executable),
        }
        for name, text in programs.items():
            path = self.bin / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        self.environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "STUBS": str(folder),
            "STUB_SRUN_HELP": "--nodes",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURMD_NODENAME": "n1",
            "SLURM_GPUS_ON_NODE": "8",
            "ANYMAL_VENV": str(self.bin / "venv"),
        }

    def start(self, verb: str = "pretrain", *arguments: str, **environment: str) -> subprocess.Popen[str]:
        # Like Slurm, run a copy in another folder.
        script = self.folder / "slurm_script"
        shutil.copy(ROOT / "slurm" / f"{SCRIPTS[verb]}.sh", script)
        return subprocess.Popen(
            ["bash", str(script), *arguments],
            env={**self.environment, **environment},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, verb: str = "pretrain", *arguments: str, **environment: str) -> tuple[int, str]:
        """Run to the end; return the exit code and the output."""
        process = self.start(verb, *arguments, **environment)
        output, _ = process.communicate(timeout=240)
        return process.returncode, output

    def signalled(self, part: str, number: signal.Signals, **environment: str) -> tuple[int, str]:
        """Like `run`, but send a signal to the script while it waits for `part`."""
        for marker in (f"begun_{part}", "go"):  # of an earlier start
            (self.folder / marker).unlink(missing_ok=True)
        process = self.start(STUB_WAITS=part, **environment)
        deadline = time.monotonic() + 240
        while not (self.folder / f"begun_{part}").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        if part != "launch":
            time.sleep(0.2)
            (self.folder / "go").touch()
        output, _ = process.communicate(timeout=240)
        return process.returncode, output

    def calls(self, part: str) -> list[list[str]]:
        """Arguments of the Python calls for the run folder, the checks or the launcher."""
        path = self.folder / "python"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [words for name, words in lines if name == part]

    @property
    def requeued(self) -> int:
        path = self.folder / "scontrol"
        return path.read_text().splitlines().count("requeue 7") if path.exists() else 0

    @property
    def summary(self) -> str:
        return (self.run_dir / "slurm.log").read_text()


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    yield Job(tmp_path)


def test_shellcheck() -> None:
    scripts = sorted(map(str, (ROOT / "slurm").glob("*.sh")))
    shellcheck = str(Path(sys.executable).with_name("shellcheck"))
    done = subprocess.run([shellcheck, "-x", f"--source-path={ROOT}", *scripts], capture_output=True, text=True)
    assert len(scripts) == 5 and done.returncode == 0, done.stdout


@pytest.mark.parametrize("verb", SCRIPTS)
def test_headers_say_what_the_configurations_say(verb: str) -> None:
    text = (ROOT / "slurm" / f"{SCRIPTS[verb]}.sh").read_text()
    header = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.+)$", text, re.MULTILINE))
    config = compose(CONFIGS[verb], default_config_dir(), []).config
    assert config.job == verb
    assert (int(header["nodes"]), int(header["gpus-per-node"])) == (config.trainer.num_nodes, config.trainer.devices)
    assert header["job-name"] == SCRIPTS[verb] and header["ntasks-per-node"] == "1"
    assert header["signal"] == "B:USR1@300" and header["open-mode"] == "append" and "\n#SBATCH --requeue\n" in text


@pytest.mark.parametrize("verb", SCRIPTS)
def test_arguments_arrive_as_they_were_given(job: Job, verb: str) -> None:
    given = [
        "data.train.a.path='/my data/a b'",
        "exp_manager.name=\"x, 'y'\"",
        "model.plugins=[a.py,b.py]",
        "+k=$HOME *",
    ]
    code, output = job.run(verb, *given)
    assert code == 0, output
    (launch,), (preflight,), (asked,) = job.calls("launch"), job.calls("preflight"), job.calls("run-dir")
    tail = [verb, f"--config-name={CONFIGS[verb]}", "trainer.num_nodes=2", "trainer.devices=8", *given]
    assert all(words[-len(tail) :] == tail for words in (launch, preflight, asked))
    assert launch[:6] == ["-m", "megatron_anymal", "launch", "--nproc-per-node=8", "--nnodes=2", "--node-rank=0"]
    assert launch[6:9] == ["--rdzv-endpoint=10.0.0.1:10014", "--rdzv-id=7.0", "--grace-seconds=270"]
    assert {"--address=10.0.0.1", "--port=10015", "--nodes=n1,n2"} <= set(preflight)
    steps = [step.split() for step in (job.folder / "srun").read_text().split("\n\n")]
    assert {"--ntasks=16", "--ntasks-per-node=8"} <= set(steps[1]) and "--ntasks-per-node=1" in steps[2]
    assert "the run is complete" in job.summary and job.summary in output + job.summary


@pytest.mark.parametrize(
    ("environment", "processes"),
    [
        ({"SLURM_GPUS_ON_NODE": "4"}, 4),
        ({"SLURM_GPUS_ON_NODE": "", "SLURM_GPUS_PER_NODE": "h100:6"}, 6),
        ({"SLURM_GPUS_ON_NODE": "", "SLURM_GPUS_PER_NODE": "0", "ANYMAL_PROCS_PER_NODE": "2"}, 2),
        ({"ANYMAL_PROCS_PER_NODE": "3"}, 3),
    ],
)
def test_size_of_the_allocation(job: Job, environment: dict[str, str], processes: int) -> None:
    environment = {key: value for key, value in environment.items() if value}
    if "SLURM_GPUS_PER_NODE" in environment:
        del job.environment["SLURM_GPUS_ON_NODE"]
    assert job.run(SLURM_JOB_NUM_NODES="5", **environment)[0] == 0
    (words,) = job.calls("launch")
    assert {"trainer.num_nodes=5", f"trainer.devices={processes}"} <= set(words)
    assert {"--nnodes=5", f"--nproc-per-node={processes}"} <= set(words)


def test_sizes_that_are_given_stay(job: Job) -> None:
    assert job.run("pretrain", "++trainer.devices=4", "trainer.num_nodes=2")[0] == 0
    (words,) = job.calls("launch")
    assert [word for word in words if "trainer." in word] == ["++trainer.devices=4", "trainer.num_nodes=2"]
    assert "--nproc-per-node=4" in words


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (("trainer.num_nodes=3",), {}, "trainer.num_nodes=3, but the job has 2 node(s)"),
        ((), {"SLURM_GPUS_ON_NODE": "0"}, "set ANYMAL_PROCS_PER_NODE"),
        ((), {"ANYMAL_VENV": "/nowhere"}, "there is no /nowhere/bin/python"),
        ((), {"ANYMAL_CONTAINER": "a.sqsh", "PATH": "/usr/bin:/bin"}, "neither pyxis"),
        ((), {"STUB_RUN_DIR": "2"}, "error: unknown key"),
        ((), {"SLURM_SUBMIT_DIR": "/nowhere"}, "Submit from the repository's folder"),
    ],
)
def test_mistakes_end_with_2_before_anything_starts(
    job: Job, arguments: tuple[str, ...], environment: dict[str, str], says: str
) -> None:
    if "PATH" in environment:
        environment = {**environment, "PATH": f"{job.bin}:{environment['PATH']}"}
    code, output = job.run("pretrain", *arguments, **environment)
    assert code == 2 and says in output
    assert not job.calls("preflight") and not job.calls("launch") and not job.requeued


LEAD = "300 s before its end (--signal=B:USR1@300)"


@pytest.mark.parametrize(
    ("limit", "environment", "refused"),
    [
        ("00:04:00", {}, "time limit is 240 s, and Slurm asks it to stop " + LEAD),
        ("00:05:00", {}, "time limit is 300 s"),
        ("00:05:01", {}, ""),
        ("00:04:00", {"ANYMAL_GRACE_SECONDS": "30"}, ""),
        ("01:08:09", {"ANYMAL_GRACE_SECONDS": "4059"}, "time limit is 4089 s, and Slurm asks it to stop 4089 s"),
        ("2-00:00:00", {"ANYMAL_GRACE_SECONDS": "172769"}, ""),
        ("2-00:00:00", {"ANYMAL_GRACE_SECONDS": "172770"}, "time limit is 172800 s"),
        ("UNLIMITED", {}, ""),
        ("Partition_Limit", {}, ""),
        ("", {}, ""),
    ],
)
def test_a_time_limit_below_the_signals_lead_is_said_at_once(
    job: Job, limit: str, environment: dict[str, str], refused: str
) -> None:
    code, output = job.run(STUB_TIME=limit or "?", **environment)
    assert code == (2 if refused else 0), output
    assert refused in output and ("sbatch --time=1:00:00" in output) == bool(refused)
    # The script does not even ask for the run folder.
    assert bool(job.calls("run-dir")) == (not refused) and not job.requeued


def test_spare_nodes(job: Job) -> None:
    job.environment.update(SLURM_JOB_NUM_NODES="4", SLURM_JOB_NODELIST="n[1-4]")
    code, output = job.run("pretrain", "model.seed=3", "--spare-nodes=2")
    assert code == 0 and "on 2 node(s) and 2 spare node(s) (n[1-4]) x 8 process(es)" in output
    [[*launcher]] = job.calls("launch")
    assert "--nnodes=2" in launcher and "--node-rank=0" in launcher and "--spare" not in launcher
    assert not any(word.startswith("--spare-nodes") for word in launcher)
    assert launcher[-2:] == ["trainer.devices=8", "model.seed=3"] and "trainer.num_nodes=2" in launcher
    steps = (job.folder / "srun").read_text().split("\n\n")
    # All nodes are checked, also the spare ones; a lost node ends no other.
    assert "--ntasks=32" in steps[1] and {"--wait=0", "--no-kill"} <= set(steps[2].split())


def test_a_node_beyond_those_that_train_is_spare(job: Job) -> None:
    job.environment.update(SLURM_JOB_NUM_NODES="4", STUB_NODEID="2")
    job.run("pretrain", "--spare-nodes=2")
    [[*launcher]] = job.calls("launch")
    assert "--spare" in launcher and not any(word.startswith("--node-rank") for word in launcher)


def test_the_first_node_says_how_a_run_with_spares_ended(job: Job) -> None:
    # The step itself fails, as with a node that was lost.
    stub = (
        (job.bin / "srun").read_text().replace('exec "$@"', '"$@"; code=$?; [[ $1 == bash ]] && exit 143; exit $code')
    )
    (job.bin / "srun").write_text(stub)
    job.environment["SLURM_JOB_NUM_NODES"] = "3"
    code, output = job.run("pretrain", "--spare-nodes=1", STUB_NODE="down")
    assert code == 0 and job.requeued == 0, output
    assert job.run("pretrain", "--spare-nodes=1", STUB_LAUNCH="79")[0] == 79
    # Without spares, the job goes back into the queue.
    job.run("pretrain", STUB_NODE="down")
    assert job.requeued == 1


@pytest.mark.parametrize(
    ("number", "expected_message"),
    [("two", "--spare-nodes=two is not a number"), ("1", "--spare-nodes=1 leaves 1 of 2 node(s) to train on")],
)
def test_wrong_numbers_of_spares(job: Job, number: str, expected_message: str) -> None:
    code, output = job.run("pretrain", f"--spare-nodes={number}")
    assert code == 2 and expected_message in output and not job.calls("launch")


def test_a_job_array_requeues_its_own_task_alone(job: Job) -> None:
    """Slurm gives one task of an array the id of the whole array."""
    (job.run_dir / "checkpoints" / "step_00000040").mkdir(parents=True)
    job.run(STUB_LAUNCH="75", SLURM_ARRAY_JOB_ID="36", SLURM_ARRAY_TASK_ID="2")
    calls = (job.folder / "scontrol").read_text().splitlines()
    assert "requeue 36_2" in calls and "requeue 7" not in calls
    assert "job 36_2: stopped at step_00000040" in job.summary


def test_a_missing_signal_is_said(job: Job) -> None:
    """The job is ended at its time limit without a signal beforehand."""
    _, output = job.signalled("launch", signal.SIGTERM, STUB_TIME="00:00:30", ANYMAL_GRACE_SECONDS="-5")
    assert "without a USR1" in output and "--signal=B:USR1@25" in output
    _, output = job.signalled("launch", signal.SIGTERM)
    assert "without a USR1" not in output


def test_unfit_nodes_end_it(job: Job) -> None:
    code, output = job.run(STUB_PREFLIGHT="2")
    assert code == 2 and "n1 ok" in output and "n1 ok" in job.summary
    assert not job.calls("launch") and not job.requeued


@pytest.mark.parametrize("code", [1, 2, 76, 77, 78, 79, 80, 81, 137])
def test_other_codes_end_the_job_and_say_why(job: Job, code: int) -> None:
    says = "error (rank 3): the disk is full"
    done, output = job.run(STUB_LAUNCH=str(code), STUB_SAYS=says)
    assert done == code and not job.requeued
    (line,) = [line for line in job.summary.splitlines() if "ended with" in line]
    assert f"code {code}" in line and says in line and line in output
    assert says in (job.run_dir / "logs" / "slurm_7" / "n1.log").read_text()


def test_every_exit_code_has_its_meaning(job: Job) -> None:
    for exit in Exit:
        asked = f'ANYMAL_HOME={ROOT}; source "{ROOT}/slurm/common.sh"; meaning {int(exit)}'
        meaning = subprocess.run(["bash", "-c", asked], capture_output=True, text=True).stdout.strip()
        assert meaning and "unknown" not in meaning, exit


def test_code_75_goes_back_into_the_queue(job: Job) -> None:
    (job.run_dir / "checkpoints" / "step_00000040").mkdir(parents=True)
    (job.run_dir / "checkpoints" / ".staging_00000050").mkdir()
    assert job.run(STUB_LAUNCH="75")[0] == 75
    assert job.requeued == 1 and "stopped at step_00000040: requeueing the job" in job.summary


@pytest.mark.parametrize(
    ("code", "state", "again"), [(1, "allocated*", 1), (137, "down", 1), (2, "down", 0), (79, "down*", 0)]
)
def test_a_lost_node_sends_it_back(job: Job, code: int, state: str, again: int) -> None:
    job.run(STUB_LAUNCH=str(code), STUB_NODE=state)
    assert job.requeued == again and (f"node n2 is {state}" in job.summary) == bool(again)


def test_refused_requeue_is_said(job: Job) -> None:
    code, output = job.run(STUB_LAUNCH="75", STUB_REQUEUE="1")
    assert code == 75 and "scontrol requeue failed" in output and "submit the job again" in job.summary


def test_three_stops_without_progress_end_it(job: Job) -> None:
    checkpoints = job.run_dir / "checkpoints"
    for step in (5, 5, 6, 6, 7):
        (checkpoints / f"step_{step:08d}").mkdir(parents=True, exist_ok=True)
        assert job.run(STUB_LAUNCH="75")[0] == 75
    assert job.requeued == 5
    assert job.run(STUB_LAUNCH="75")[0] == 75
    assert job.run(STUB_LAUNCH="75")[0] == 79
    assert job.requeued == 6 and "without progress" in job.summary


def test_usr1_reaches_the_launcher(job: Job) -> None:
    code, output = job.signalled("launch", signal.SIGUSR1)
    assert code == 75 and job.requeued == 1 and "asked to stop" in job.summary, output


@pytest.mark.parametrize("part", ["run-dir", "preflight"])
def test_usr1_before_the_launcher(job: Job, part: str) -> None:
    code, output = job.signalled(part, signal.SIGUSR1)
    assert code == 75 and job.requeued == 1 and not job.calls("launch"), output


def test_a_stop_that_takes_too_long(job: Job) -> None:
    code, output = job.signalled("launch", signal.SIGUSR1, STUB_DEAF="1", ANYMAL_GRACE_SECONDS="30")
    # The launcher continues until Slurm ends it; here it exits by itself with code 0.
    assert job.requeued == 1 and "did not stop within 30 s" in job.summary, (code, output)


def test_cancelled_jobs_stay_away(job: Job) -> None:
    code, output = job.signalled("launch", signal.SIGTERM)
    assert code == 75 and not job.requeued and "terminated from outside" in job.summary, output


@pytest.mark.parametrize(("part", "begun"), [("show-job", set()), ("run-dir", {"run-dir"})])
def test_a_job_that_is_ended_before_the_launcher_starts_nothing_more(job: Job, part: str, begun: set[str]) -> None:
    """Between two steps there is no step to end: the next one must not start."""
    code, output = job.signalled(part, signal.SIGTERM)
    assert code == 143 and not job.requeued and "terminated from outside" in output, output
    assert {name for name in ("run-dir", "preflight", "launch") if job.calls(name)} == begun


def test_pyxis_and_apptainer(job: Job) -> None:
    image: dict[str, Any] = {"ANYMAL_CONTAINER": "/images/a b.sqsh", "ANYMAL_MOUNTS": "/data:/data"}
    # Inside an image, `python` is the image's interpreter.
    shutil.copy(job.bin / "venv/bin/python", job.bin / "python")
    assert job.run(STUB_SRUN_HELP="  --container-image=[USER@]PATH", **image)[0] == 0
    options = (job.folder / "srun").read_text().splitlines()
    assert options.count("--container-image=/images/a b.sqsh") == options.count("--container-mounts=/data:/data") == 3

    apptainer = job.bin / "apptainer"
    apptainer.write_text('#!/bin/bash\necho "$@" >> "$STUBS/apptainer"\nshift 7\nexec "$@"\n')
    apptainer.chmod(0o755)
    code, output = job.run(**{**image, "ANYMAL_CONTAINER": "/images/a.sif"})
    assert code == 0, output
    lines = (job.folder / "apptainer").read_text().splitlines()
    wanted = f"exec --nv --bind /data:/data --pwd {job.folder} /images/a.sif python -m megatron_anymal"
    assert len(lines) == 3 and all(line.startswith(wanted) for line in lines)
