"""A Slurm cluster on loopback: a controller and two nodes, with a separate folder and ports."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from ports import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
# Debian installs daemons in sbin, which is not on every user's PATH.
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_CONF = """ClusterName=loop
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=5
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=5
JobRequeue=1
SlurmdParameters=config_overrides
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
_NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {size}\n"
_SIZE = "CPUs=8 Boards=1 SocketsPerBoard=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=8000"


def missing(install: bool = True) -> str:
    """Return why no cluster can be started, or "" if one can. As root on Debian, installs Slurm if needed."""
    if os.name != "posix" or os.geteuid() != 0:
        return "a Slurm cluster of its own needs root"
    if not _absent():
        return ""
    if not install or shutil.which("apt-get") is None:
        return f"Slurm is not installed ({_absent()[0]})"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    packages = ["install", "-y", "--no-install-recommends", "slurm-wlm", "munge"]
    # One attempt with short timeouts, so that a missing network does not hold up other tests.
    quick = ["-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=10", "-o", "DPkg::Lock::Timeout=60"]
    try:
        for words in (packages, ["update"], packages):
            subprocess.run(["apt-get", *quick, *words], env=environment, capture_output=True, timeout=180)
            if not _absent():
                return ""
    except subprocess.TimeoutExpired:
        pass
    return f"Slurm is not installed ({_absent()[0]}), and apt-get install slurm-wlm munge did not work"


def _absent() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program, path=_PATH) is None]


class Cluster:
    """A running cluster with the nodes n1, n2 and so on.

    Args:
        folder: an empty folder for this cluster. Its path must be short, because it will hold sockets.
        nodes: number of nodes.
    """

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder = folder
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        for name in ("state", "log", *(f"spool/{node}" for node in self.names)):
            (folder / name).mkdir(parents=True)
        port, *ports = free_ports(1 + nodes)
        host = socket.gethostname().split(".")[0]
        lines = [_NODE.format(name=name, host=host, port=own, size=_SIZE) for name, own in zip(self.names, ports)]
        conf = folder / "slurm.conf"
        # The nodes before the partition, which contains all of them.
        before, partition = _CONF.format(host=host, folder=folder, port=port).rsplit("PartitionName", 1)
        conf.write_text(before + "".join(lines) + "PartitionName" + partition)
        self.environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(conf)}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        # Job number -> time at which it was first seen waiting after a requeue.
        self._requeued: dict[int, float] = {}

    def __enter__(self) -> Cluster:
        try:
            self._start_munge()
            self._start("slurmctld", "slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
            for node in self.names:
                self.start_node(node)
            self.wait(lambda: set(self.node_states().values()) == {"IDLE"}, 60, "idle nodes")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Cancel all jobs, then stop the daemons."""
        if "slurmctld" in self._running:
            self._ask("scancel", "--state=RUNNING")
            self._ask("scancel", "--state=PENDING")
            deadline = time.monotonic() + 20
            while self._ask("squeue", "-h").strip() and time.monotonic() < deadline:
                time.sleep(0.2)
        for name in reversed(list(self._running)):
            self._stop(name)

    def start_node(self, node: str) -> None:
        """Start a node's daemon."""
        self._start(node, "slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf"))

    def kill_node(self, node: str) -> None:
        """Simulate a node failure: kill the node's daemon and all processes of its job steps."""
        daemon = psutil.Process(self._running[node].pid)
        for one in [*daemon.children(recursive=True), daemon, *self._processes(node)]:
            with suppress(psutil.Error):
                one.kill()
        # Processes that these had started in the meantime.
        for one in self._processes(node):
            with suppress(psutil.Error):
                one.kill()
        self._running.pop(node).wait()

    def _processes(self, node: str) -> list[psutil.Process]:
        wanted = {"SLURMD_NODENAME": node, "SLURM_CONF": self.environment["SLURM_CONF"]}
        processes = []
        for one in psutil.process_iter():
            with suppress(psutil.Error):
                if wanted.items() <= one.environ().items():
                    processes.append(one)
        return processes

    def sbatch(self, script: Path, *arguments: str, options: tuple[str, ...] = (), **more: Any) -> int:
        """Submit a job and return its number."""
        words = ["sbatch", "--parsable", *options, str(script), *arguments]
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, **{"env": self.environment, **more})
        assert done.returncode == 0, done.stderr
        return int(done.stdout.strip())

    def job(self, number: int) -> dict[str, str]:
        """Return the controller's fields of a job: JobState, ExitCode, Restarts, ..."""
        words = self.run("scontrol", "show", "job", "-o", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def release(self, number: int) -> None:
        """Let a requeued job start immediately instead of after two minutes."""
        # Only if the job waits for its begin time: repeated updates would make the scheduler start over each time.
        job = self.job(number)
        if job["JobState"] != "PENDING" or job.get("Reason") != "BeginTime":
            self._requeued.pop(number, None)
        # A node refuses a job that starts in the same second in which it ended there.
        elif time.monotonic() - self._requeued.setdefault(number, time.monotonic()) > 3:
            self._ask("scontrol", "update", f"jobid={number}", "StartTime=now")

    def node_states(self) -> dict[str, str]:
        """Return the state of each node: IDLE, ALLOCATED, DOWN, ..."""
        lines = self._ask("sinfo", "-h", "-N", "-o", "%N %T").splitlines()
        return {name: state.upper() for name, state in map(str.split, lines)}

    def run(self, *words: str) -> str:
        """Run a Slurm command and return its output."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def wait(self, until: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait until a condition holds. Otherwise the test fails with a message that names `what`."""
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, f"no {what} within {seconds:g} s"
            time.sleep(0.1)

    def _ask(self, *words: str) -> str:
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=30)
        return done.stdout

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        names = ("key-file", "socket", "pid-file", "log-file", "seed-file")
        files = [f"--{name}={self.folder}/munge.{name.partition('-')[0]}" for name in names]
        # Running as root, with a separate key, socket and files, independent of the system's munge.
        self._start("munged", "munged", "--foreground", "--force", "--num-threads=2", *files)
        self.wait((self.folder / "munge.socket").exists, 10, "socket of munged")

    def _start(self, name: str, *words: str) -> None:
        log = (self.folder / "log" / f"{name}.out").open("ab")
        self._running[name] = subprocess.Popen(
            words, env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )

    def _stop(self, name: str) -> None:
        process = self._running.pop(name)
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
