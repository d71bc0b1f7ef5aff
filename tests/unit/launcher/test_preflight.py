"""Node checks before a run, with processes of this machine playing the nodes."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from engine import train
from ports import free_port
from ranks import run_ranks
from tiny import make_config

from megatron_anymal.checkpoint.run_lock import RunLock
from megatron_anymal.config import RunConfig
from megatron_anymal.dry_run import checkpoint_size
from megatron_anymal.launcher.preflight import command, network_checks, node_checks
from megatron_anymal.launcher.preflight.command import JobPosition, Preflight
from megatron_anymal.launcher.preflight.node_checks import NodeProblem
from megatron_anymal.resilience.exit_codes import Exit

GB = 10**9


@pytest.fixture
def config(text_shards: str, tokenizer_folder: str, tmp_path: Path) -> RunConfig:
    return make_config(text_shards, tokenizer_folder, tmp_path / "run")


def play(
    config: RunConfig,
    world: int = 4,
    per_node: int = 2,
    *,
    present: int = 0,
    seconds: float = 240,
    spoil: Callable[[int, RunConfig], None] = lambda rank, config: None,
) -> tuple[set[int], str]:
    """Run the checks of all processes, or of the first `present`; return the exit codes and the printed output."""
    names = [f"n{number + 1}" for number in range(world // per_node)]
    port = free_port()

    def rank_of() -> tuple[int, str]:
        import os

        rank = int(os.environ["RANK"])
        position = JobPosition(rank, world, rank % per_node, per_node, names[rank // per_node])
        spoil(rank, config)
        # Counting a model's weights takes seconds; it has its own test.
        checkpoint_size.bytes_needed = lambda config: 1000  # type: ignore[assignment]
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            code = Preflight(config, position, names, seconds).run("127.0.0.1", port)
        return int(code), output.getvalue()

    answers = run_ranks(present or world, rank_of)
    assert not any(output for _, output in answers[1:]), "only the first process may print"
    return {code for code, _ in answers}, answers[0][1]


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error")]


@pytest.mark.parametrize("folder", [".", ".preflight"], ids=["trains", "is-checked"])
def test_another_job_in_the_folder(config: RunConfig, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example another task of a job array: it is named, and none of its files are touched."""
    for name, value in {"JOB_ID": "41", "ARRAY_JOB_ID": "36", "ARRAY_TASK_ID": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    other = RunLock(config.run_dir / folder, 20)
    sign = config.run_dir / ".preflight" / "n1"
    sign.parent.mkdir(exist_ok=True)
    sign.write_text("the other's")
    for name, value in {"JOB_ID": "42", "ARRAY_TASK_ID": "3"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    try:
        codes, output = play(config)
        assert codes == {Exit.LOCKED} and sign.read_text() == "the other's"
        [line] = output.splitlines()
        assert line.startswith(f"error: '{config.run_dir}' is in use by process {os.getpid()} on ")
        assert "Slurm job 41, task 36_2" in line and "exp_manager.explicit_log_dir" in line
        other.check()
    finally:
        other.release()
    assert play(config)[0] == {Exit.DONE}
    # Neither the folder of marker files nor the lock of the checks remains.
    assert not sign.parent.exists()


def test_fit_nodes(config: RunConfig) -> None:
    codes, output = play(config)
    assert codes == {0} and not errors(output), output
    lines = output.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["node", "processes"], ["n1", "2"], ["n2", "2"]]
    assert lines[1].endswith("ok") and lines[2].endswith("ok")
    assert lines[3].startswith("all-reduce over 4 process(es): correct; 4 MiB in ") and lines[3].endswith(
        "GB/s per link"
    )
    assert "2 node(s) ok" in lines[4]
    assert not (config.run_dir / node_checks.SIGNS).exists()


def test_a_node_that_does_not_come(config: RunConfig) -> None:
    began = time.monotonic()
    codes, output = play(config, 3, 1, present=2, seconds=6)
    assert codes == {2} and time.monotonic() - began < 60
    (line,) = errors(output)
    assert line.startswith("error: node n3: network: process 2 did not report within 6 s. Fix: ")
    assert "not tried" in output and "1 of 3 node(s) failed" in output


def test_unwritable_on_one_node(config: RunConfig) -> None:
    (config.run_dir / node_checks.SIGNS / "n2").mkdir(parents=True)
    codes, output = play(config, 3, 1)
    (line,) = errors(output)
    assert codes == {2} and line.startswith(f"error: node n2: run folder: {str(config.run_dir)!r} cannot be written")


def test_not_the_same_folder(config: RunConfig, tmp_path: Path) -> None:
    def spoil(rank: int, config: RunConfig) -> None:
        if rank == 1:
            config.exp_manager.explicit_log_dir = str(tmp_path / "its own")

    codes, output = play(config, 3, 1, spoil=spoil)
    assert codes == {2}
    assert [line.split()[2].rstrip(":") for line in errors(output)] == ["n1", "n2", "n3"]
    assert "does not show what n2 wrote" in output and "does not show what n1, n3 wrote" in output


def test_wrong_sums(config: RunConfig) -> None:
    def spoil(rank: int, config: RunConfig) -> None:
        real = torch.distributed.all_reduce

        def wrong(tensor: torch.Tensor) -> None:
            real(tensor)
            tensor[77] += 1.0

        if rank == 2:
            torch.distributed.all_reduce = wrong

    codes, output = play(config, spoil=spoil)
    (line,) = errors(output)
    assert codes == {2} and line.startswith("error: node n2: network: the all-reduce gave 3 wrong sums. Fix: ")


def test_all_reduce_that_hangs(config: RunConfig) -> None:
    def spoil(rank: int, config: RunConfig) -> None:
        if rank == 1:
            torch.distributed.all_reduce = lambda tensor: time.sleep(60)

    codes, output = play(config, 2, 1, seconds=10, spoil=spoil)
    assert codes == {2} and "error: node n2: network: the all-reduce did not finish within" in output


def test_skewed_clock(config: RunConfig) -> None:
    def spoil(rank: int, config: RunConfig) -> None:
        real = time.time
        if rank == 1:
            network_checks.time.time = lambda: real() + 7.0

    codes, output = play(config, 3, 1, spoil=spoil)
    (line,) = errors(output)
    assert codes == {2} and line.startswith("error: node n2: clock: it is +7.0 s off from the other nodes. Fix: ")
    assert float(output.splitlines()[2].split()[-3]) == pytest.approx(7.0, abs=0.5)


def test_full_disk_and_missing_files(config: RunConfig) -> None:
    def spoil(rank: int, config: RunConfig) -> None:
        usage = node_checks.shutil.disk_usage("/")
        node_checks.shutil.disk_usage = lambda path: usage._replace(free=999)
        if rank == 1:
            config.data.tokenizer = "/nowhere"

    codes, output = play(config, 2, 1, spoil=spoil)
    first, second = errors(output)
    assert codes == {2} and first.startswith("error: node n1: disk: 0.00 GB free at ")
    assert second.startswith("error: node n2: files: data.tokenizer='/nowhere' does not exist. Fix: ")


def test_nobody_to_report_to(config: RunConfig) -> None:
    with pytest.raises(network_checks.Unreachable, match=r"node n2: 127\.0\.0\.1:\d+ does not answer within"):
        Preflight(config, JobPosition(1, 2, 0, 1, "n2"), ["n1", "n2"], 3).run("127.0.0.1", free_port())


def test_what_hangs_and_what_fails() -> None:
    def late() -> list[NodeProblem]:
        time.sleep(30)
        return []

    def fails() -> list[NodeProblem]:
        raise OSError(5, "Input/output error")

    (problem,) = node_checks.within(0.1, "run folder", late)
    assert problem.check == "run folder" and "no answer within" in problem.text
    (problem,) = node_checks.within(5, "disk", fails)
    assert "Input/output error" in problem.text


def test_software(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_anymal import backend, environment

    assert node_checks.software(config.model, config.trainer) == []
    config.model.fp8 = "hybrid"
    if not backend.capabilities().fp8:
        (problem,) = node_checks.software(config.model, config.trainer)
        assert "model.fp8=hybrid needs" in problem.text
    missing = environment.Finding("psutil", "-", environment.MISSING, True, "cost", "pip install psutil")
    optional = environment.Finding("s3fs", "-", environment.MISSING, False, "cost", "pip install s3fs")
    monkeypatch.setattr(environment, "examine", lambda: [missing, optional])
    (problem,) = node_checks.software(config.model, config.trainer)
    assert (problem.text, problem.fix) == ("psutil -: missing", "pip install psutil")


def test_gpu_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    free = {"bytes": 79 * GB}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["bytes"], 80 * GB))
    assert node_checks.gpu(3) == (79 * GB, [])
    free["bytes"] = 60 * GB
    _, (problem,) = node_checks.gpu(3)
    assert problem.text == "GPU 3 has 60.00 GB of 80.00 GB free" and "nvidia-smi" in problem.fix


def test_place() -> None:
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "2"}
    assert JobPosition.of({**slurm, "SLURMD_NODENAME": "n2"}) == JobPosition(5, 8, 1, 4, "n2")
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert JobPosition.of({**torchrun, **slurm}) == JobPosition(3, 4, 1, 2, socket.gethostname())
    assert JobPosition.of({}) == JobPosition(name=socket.gethostname())


def test_size_of_checkpoints(config: RunConfig) -> None:
    # Large enough that the weights outweigh the other contents of the files.
    projector = config.model.modalities["image"].projector
    projector.num_layers, projector.hidden_size = 4, 128
    config.exp_manager.checkpoint.every_n_train_steps = 3
    config.exp_manager.checkpoint.keep_last = 3
    before = checkpoint_size.bytes_needed(config)
    run_ranks(1, train, config)
    folder = config.run_dir / "checkpoints" / "step_00000006"
    real = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    # Three kept and one being written; in fp32 a trainable parameter takes 12 bytes.
    assert 0.9 < before / 4 / real < 1.4
    # Two checkpoints are already on disk.
    assert checkpoint_size.bytes_needed(config) == pytest.approx(2 * real, rel=0.05)
    config.exp_manager.checkpoint.keep_last = 1
    assert checkpoint_size.bytes_needed(config) == pytest.approx(real, rel=0.05)


def test_command(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values: dict[str, Any] = {"defaults": ["anymal", "_self_"], **config.to_dict()}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    given = [f"--config-path={tmp_path}", "--config-name=tiny"]
    assert command.main(["--run-dir", "pretrain", *given]) == 0
    assert capsys.readouterr().out == f"{config.run_dir}\n"
    for wrong, says in (
        (["pretrain", *given, "trainer.max_step=3"], "unknown key trainer.max_step"),
        (["sft", *given], "is for the job 'pretrain', but 'sft' was started"),
        (["pretrain", *given, "model.tensor_model_parallel_size=3"], "error: "),
        (["pretrain", "--config-path=/nowhere", "--config-name=tiny"], "there is no folder /nowhere"),
    ):
        assert command.main(["--run-dir", *wrong]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and says in captured.err and captured.err.count("\n") == 1
