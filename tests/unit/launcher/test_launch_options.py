"""Mistakes in a call of `anymal launch` give one line that names the mistake and the fix, before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_anymal.config import ConfigError
from megatron_anymal.dependencies.megatron_line import NEWER
from megatron_anymal.launcher import command
from megatron_anymal.launcher.command import main
from megatron_anymal.launcher.job import Job

RUN = ["pretrain", "--config-name=quickstart"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs the job to start, before the job's own arguments: `anymal launch pretrain|sft|dpo --config"),
        (["--config-name=quickstart"], "needs the job to start"),
        (["pretain", "--config-name=quickstart"], "`anymal launch pretrain --config-name=NAME"),
        (
            ["--config-name=quickstart", "pretrain"],
            "the job's name: `anymal launch pretrain --config-name=quickstart",
        ),
        ([*RUN, "--dry-run"], "--dry-run cannot be used with `anymal launch`. Use it with `anymal pretrain` directly"),
        (["sft", "--config-name=quickstart"], "is for the job 'pretrain'"),
        ([*RUN, "trainer.max_step=4"], "unknown key trainer.max_step"),
        ([*RUN, "resilience.faults=['explode:rank=1']"], "resilience.faults: 'explode:rank=1': unknown kind 'explode'"),
        (["--nproc-per-node=3", *RUN], "trainer.devices=3"),
        (["--nnodes=2", *RUN], "trainer.num_nodes=2"),
        (["--nnodes=2", *RUN, "trainer.num_nodes=2"], "needs --rdzv-endpoint=HOST:PORT"),
        (["--nnodes=2", "--rdzv-endpoint=n1:7", *RUN, "trainer.num_nodes=2"], "needs --node-rank"),
        (["--config-path=nowhere", *RUN], "come after the job's name"),
        ([*RUN, "--config-path=nowhere"], "--config-path=nowhere: there is no folder"),
    ],
)
def test_what_cannot_be_started(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        main(words)
    assert message in " ".join(str(error.value).split()), error.value


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    # Root may write everywhere, but not below a file.
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/run' cannot be written .*\(exp_manager\.explicit_log_dir\)"):
        main([*RUN, f"exp_manager.explicit_log_dir={tmp_path}/file/run"])


@pytest.mark.parametrize(
    ("libc", "message"),
    [
        (("glibc", "2.39"), "Install it with `pip install 'nvidia-resiliency-ext>=0.6,<0.7'`, or omit --launcher=ft"),
        (("glibc", "2.36"), "its wheels need glibc 2.39, and this system has 2.36. Omit --launcher=ft"),
    ],
)
def test_the_other_agent_needs_a_package_and_a_system(
    libc: tuple[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: libc)
    monkeypatch.setattr(command, "of_python", lambda: NEWER)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        main(["--launcher=ft", *RUN])
    assert message in " ".join(str(error.value).split()), error.value


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ([*RUN], True),
        ([*RUN, "exp_manager.resume_if_exists=false"], False),
        (["--nnodes=2", "--rdzv-endpoint=n1:7", "--node-rank=0", *RUN, "trainer.num_nodes=2"], False),
    ],
    ids=["one-node", "begins-anew", "two-nodes"],
)
def test_memory_outlives_the_launcher_of_a_run_that_continues_on_one_node(
    words: list[str], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert job_of(words, monkeypatch).keep_memory == kept


@pytest.mark.parametrize(
    ("words", "driver", "kept"),
    [([], False, True), ([], True, False), (["resilience.keep_survivors=false"], False, False)],
    ids=["cpu", "gpu", "off"],
)
def test_survivors_stay_where_no_gpu_may_wait_for_the_lost_rank(
    words: list[str], driver: bool, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "has_nvidia_driver", lambda: driver)
    assert job_of([*RUN, *words], monkeypatch).keep_survivors == kept


def job_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Job:
    """The job that the launcher would supervise."""
    jobs: list[Job] = []

    class Started:
        def __init__(self, job: Job) -> None:
            jobs.append(job)

        def run(self) -> int:
            return 0

    monkeypatch.setattr(command, "Supervisor", Started)
    assert main(words) == 0
    [job] = jobs
    return job
