"""`python -m megatron_anymal.launcher.preflight.command`: check that the nodes of a job are ready for its run.

Every process of the job runs it, as a Slurm task or under torchrun. Each checks its node and reports to the first
process, which prints a table with every problem, its node and its fix. All exit with the same code: 0, 80 if another
job is using the run's folder, or 2 if there is a problem.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

from megatron_anymal import lean_imports
from megatron_anymal.config import ConfigError, RunConfig
from megatron_anymal.config.compose import compose, config_folder
from megatron_anymal.config.validation import check
from megatron_anymal.launcher.preflight import node_checks as checks
from megatron_anymal.launcher.preflight import table
from megatron_anymal.launcher.preflight.network_checks import Reports, Traffic, Unreachable, all_reduce
from megatron_anymal.launcher.preflight.node_checks import NodeProblem
from megatron_anymal.launcher.preflight.table import NodeRow
from megatron_anymal.log_filters import quiet_libraries
from megatron_anymal.resilience.exit_codes import Exit

if TYPE_CHECKING:
    from megatron_anymal.checkpoint.run_lock import RunLock

# Largest allowed difference between clocks, in seconds.
_SKEW = 2.0


@dataclass(frozen=True)
class JobPosition:
    """Position of a process in its job."""

    # Rank in the job.
    rank: int = 0
    # Number of processes in the job.
    world: int = 1
    # Rank on the node.
    local_rank: int = 0
    # Number of processes per node.
    per_node: int = 1
    # Name of the node.
    name: str = ""

    @staticmethod
    def of(environment: Mapping[str, str]) -> JobPosition:
        """Position from torchrun's variables, else from those of Slurm's tasks, else that of a single process."""
        node = environment.get("SLURMD_NODENAME", socket.gethostname())
        if "RANK" in environment:
            keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
            rank, world, local_rank, per_node = (int(environment[key]) for key in keys)
            return JobPosition(rank, world, local_rank, per_node, node)
        if "SLURM_PROCID" in environment:
            keys = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_NUM_NODES")
            rank, world, local_rank, nodes = (int(environment[key]) for key in keys)
            return JobPosition(rank, world, local_rank, world // nodes, node)
        return JobPosition(name=node)

    @property
    def leads(self) -> bool:
        """Whether this process checks the node on behalf of all processes on it."""
        return self.local_rank == 0


def main(argv: Sequence[str]) -> int:
    """Run the checks, print the result, and return the exit code."""
    arguments = _parser().parse_intermixed_args(argv)
    quiet_libraries()
    lean_imports.install()
    try:
        config = read_config(arguments)
        if arguments.run_dir:
            print(config.run_dir.absolute())
            return Exit.DONE
        names = [name for name in arguments.nodes.split(",") if name]
        preflight = Preflight(config, JobPosition.of(os.environ), names, arguments.timeout)
        return preflight.run(arguments.address, arguments.port)
    except (ConfigError, Unreachable) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return Exit.MISTAKE


def read_config(arguments: argparse.Namespace) -> RunConfig:
    """Compose and check the run's configuration.

    Raises:
        ConfigError: the configuration is invalid.
    """
    folder = config_folder(arguments.config_path)
    config = compose(arguments.config_name, folder, arguments.overrides).config
    if config.job != arguments.job:
        raise ConfigError(
            f"--config-name={arguments.config_name} is for the job {config.job!r}, but {arguments.job!r} was started. "
            f"Submit slurm/{config.job}_70b.sh, or set job={arguments.job}."
        )
    check(config)
    return config


class Preflight:
    """All checks, as run by one process of the job.

    Args:
        names: names of all nodes in the order of ranks; empty if unknown.
        seconds: time limit for all checks together.
    """

    def __init__(self, config: RunConfig, position: JobPosition, names: Sequence[str], seconds: float) -> None:
        self.config, self.position, self.seconds = config, position, seconds
        self.names = list(names)
        self.began = time.monotonic()
        # Lock on the run's folder; only held by the first process.
        self.lock: Optional[RunLock] = None

    def run(self, address: str, port: int) -> int:
        """Run all checks and return the exit code, which is the same on all processes. Collective.

        Raises:
            Unreachable: the first process does not answer.
        """
        position = self.position
        try:
            self.reports = Reports(address, port, position.rank, self._left(1 / 3))
        except Unreachable as error:
            raise Unreachable(f"node {position.name}: {error}. Check the network to the first node.") from None
        if position.rank == 0:
            # Post these before anything else, since the others wait for them.
            self.reports.say("token", uuid.uuid4().hex)
            self.reports.say("refused", self._take_folder())
        if refused := self.reports.heard("refused", [0], time.monotonic() + self._left(1 / 2)).get(0):
            return self._give_way(refused)
        self.reports.say("node", self._look_around())
        traffic = self._meet()
        if position.rank == 0:
            return self._judge(traffic)
        verdict = self.reports.heard("verdict", [0], time.monotonic() + self._left(1) + 10)
        self.reports.say("left", True)
        return verdict.get(0, Exit.MISTAKE)

    def _take_folder(self) -> str:
        """On the first process: lock the run's folder during the checks; return the reason if another job uses it.

        The lock is in the subfolder into which the nodes write their files, since two jobs checking the same run folder
        at once would see each other's files.
        """
        from megatron_anymal.checkpoint.run_lock import FolderInUse, RunLock, user_of

        run_dir, patience = self.config.run_dir, self.config.exp_manager.lock_timeout_seconds
        try:
            # A job that is training holds its own lock on the run's folder.
            user = user_of(run_dir, min(patience, self.seconds / 2))
            if user is None:
                self.lock = RunLock(run_dir / checks.SIGNS, min(patience, self.seconds / 6), lambda text: None)
                return ""
        except FolderInUse as error:
            return str(error).replace(f"/{checks.SIGNS}'", "'", 1)
        except OSError:
            # Reported together with the node by the check of the run's folder.
            return ""
        return (
            f"{str(run_dir.absolute())!r} is in use by {user}. Wait for it to end, stop it, or give this run another "
            "folder (exp_manager.explicit_log_dir)."
        )

    def _give_way(self, refused: str) -> int:
        """On all processes: exit, since another job is using the run's folder."""
        if self.position.rank == 0:
            print(f"error: {refused}", flush=True)
            self.reports.heard("left", range(1, self.position.world), time.monotonic() + 10)
        else:
            self.reports.say("left", True)
        return Exit.LOCKED

    def _look_around(self) -> dict[str, Any]:
        """Report of this process: its GPU and, for one process per node, the node."""
        position, config, seconds = self.position, self.config, self._left(1 / 3)
        row: dict[str, Any] = {"node": position.name, "leads": position.leads, "disk": -1, "gpu": -1}
        problems: list[NodeProblem] = []

        def look_at_card() -> list[NodeProblem]:
            row["gpu"], gpu_problems = checks.gpu(position.local_rank)
            return gpu_problems

        def look_at_disk() -> list[NodeProblem]:
            row["disk"], disk_problems = checks.disk(config.run_dir, needed)
            return disk_problems

        problems += checks.within(seconds, "GPU", look_at_card)
        if position.leads:
            token = self.reports.heard("token", [0], time.monotonic() + seconds).get(0, "")
            problems += checks.within(seconds, "software", lambda: checks.software(config.model, config.trainer))
            problems += checks.within(seconds, "files", lambda: checks.files(config.model, config.data))
            problems += checks.within(
                seconds, "run folder", lambda: checks.leave_sign(config.run_dir, position.name, token)
            )
            needed, size_problems = self._needed(seconds)
            problems += size_problems + checks.within(seconds, "disk", look_at_disk)
        return {**row, "problems": [vars(problem) for problem in problems]}

    def _needed(self, seconds: float) -> tuple[int, list[NodeProblem]]:
        """Bytes the run's checkpoints will still need; only computed on the first process, since there is one disk."""
        from megatron_anymal.dry_run.checkpoint_size import bytes_needed

        counted: list[int] = []

        def count() -> list[NodeProblem]:
            counted.append(bytes_needed(self.config))
            return []

        problems = checks.in_time(seconds, "model", count) if self.position.rank == 0 else []
        if problems is None:
            # A large model on a slow machine does not stop the run.
            print(f"warning: the size of a checkpoint could not be computed within {seconds:.0f} s.", flush=True)
        return counted[0] if counted else 0, problems or []

    def _meet(self) -> Optional[Traffic]:
        """Checks that need all processes: visibility of each other's files, and an all-reduce.

        Returns:
            None if not all processes reported.
        """
        ranks = range(self.position.world)
        if self.position.rank == 0:
            self.arrived = self.reports.heard("node", ranks, time.monotonic() + self._left(2 / 3))
            # A node that could not write is only reported once.
            silent = {
                row["node"] for row in self.arrived.values() if any(p["check"] == "run folder" for p in row["problems"])
            }
            writing = sorted({row["node"] for row in self.arrived.values()} - silent)
            self.reports.say("go", writing if len(self.arrived) == self.position.world else None)
        nodes = self.reports.heard("go", [0], time.monotonic() + self._left(1)).get(0)
        if nodes is None:
            return None
        if self.position.leads:
            token = self.reports.heard("token", [0], time.monotonic() + 1).get(0, "")
            seconds = self._left(1 / 2)
            run_dir = self.config.run_dir
            unseen = checks.within(seconds, "run folder", lambda: checks.look_for_signs(run_dir, nodes, token))
            self.reports.say("signs", [vars(problem) for problem in unseen])
        traffic = all_reduce(self.reports, self.position.world, self.position.local_rank, self._left(1 / 2))
        self.reports.say("traffic", traffic.problem)
        return traffic

    def _judge(self, traffic: Optional[Traffic]) -> int:
        """On the first process: combine all reports, print them, and send the exit code to the others."""
        rows = self._rows()
        if traffic is not None:
            leaders = [rank for rank, report in self.arrived.items() if report["leads"]]
            self._add("signs", leaders, rows)
            self._add_traffic(traffic, rows)
        wrong = any(row.problems for row in rows.values())
        seconds = time.monotonic() - self.began
        print(table.format_table(list(rows.values()), traffic, self.position.world, seconds), flush=True)
        code = Exit.MISTAKE if wrong else Exit.DONE
        self.reports.say("verdict", int(code))
        # The store ends with this process, so let the others leave first.
        self.reports.heard("left", [rank for rank in self.arrived if rank], time.monotonic() + 5)
        checks.remove_signs(self.config.run_dir)
        if self.lock:
            self.lock.release()
        return code

    def _rows(self) -> dict[str, NodeRow]:
        """Reports by node, including nodes that did not report."""
        rows: dict[str, NodeRow] = {}
        for rank in range(self.position.world):
            report = self.arrived.get(rank)
            number = rank // self.position.per_node
            name = report["node"] if report else self.names[number] if self.names else f"node {number}"
            row = rows.setdefault(name, NodeRow(name))
            if report is None:
                text = f"process {rank} did not report within {self.seconds:g} s"
                row.problems.append(
                    NodeProblem("network", text, "check that the node is up and can reach the first one")
                )
                continue
            row.processes += 1
            row.disk = max(row.disk, report["disk"])
            row.gpu = report["gpu"] if row.gpu < 0 else min(row.gpu, report["gpu"])
            row.problems += [NodeProblem(**problem) for problem in report["problems"]]
        return rows

    def _add(self, what: str, ranks: Sequence[int], rows: dict[str, NodeRow]) -> None:
        reported = self.reports.heard(what, ranks, time.monotonic() + self._left(1))
        for rank, problems in reported.items():
            row = rows[self.arrived[rank]["node"]]
            known = {problem.check for problem in row.problems}
            row.problems += [NodeProblem(**one) for one in problems if one["check"] not in known]

    def _add_traffic(self, traffic: Traffic, rows: dict[str, NodeRow]) -> None:
        reported = self.reports.heard("traffic", self.arrived, time.monotonic() + self._left(1))
        fix = "check the network of that node (NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME)"
        for rank, report in self.arrived.items():
            problem = reported.get(rank, "it did not return from the all-reduce")
            row = rows[report["node"]]
            if problem and all(known.check != "network" for known in row.problems):
                row.problems.append(NodeProblem("network", problem, fix))
        if traffic.offsets:
            first = {
                report["node"]: traffic.offsets[rank] for rank, report in sorted(self.arrived.items(), reverse=True)
            }
            for name, offset in first.items():
                rows[name].clock = offset
            for name, skew in checks.skewed(list(first.values()), list(first), _SKEW).items():
                rows[name].problems.append(skew)

    def _left(self, share: float) -> float:
        """The given share of the remaining time, at least one second."""
        return max(1.0, share * (self.seconds - (time.monotonic() - self.began)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m megatron_anymal.launcher.preflight.command", description=__doc__)
    parser.add_argument("job", choices=("pretrain", "sft", "dpo"))
    parser.add_argument("--config-name", "-cn", required=True, help="YAML file of the configuration folder")
    parser.add_argument("--config-path", "-cp", help="configuration folder; default: the shipped nemo_configs")
    parser.add_argument(
        "--run-dir", action="store_true", help="only check the configuration and print the run's folder"
    )
    parser.add_argument("--address", default="127.0.0.1", help="address of the first node")
    parser.add_argument("--port", type=int, default=0, help="free port of the first node")
    parser.add_argument("--nodes", default="", help="names of the nodes in the order of ranks: a,b,c")
    parser.add_argument("--timeout", type=float, default=300.0, help="time limit for all checks, in seconds")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser


def _end_late(seconds: float) -> None:
    print(f"error: the checks on {socket.gethostname()} did not end within {seconds:g} s.", file=sys.stderr, flush=True)
    os._exit(Exit.MISTAKE)


if __name__ == "__main__":
    limit = _parser().parse_intermixed_args(sys.argv[1:]).timeout + 30
    alarm = threading.Timer(limit, _end_late, [limit])
    alarm.daemon = True
    alarm.start()
    code = main(sys.argv[1:])
    sys.stdout.flush()
    # Threads that hang in a dead network or file system must not keep the process alive.
    os._exit(code)
