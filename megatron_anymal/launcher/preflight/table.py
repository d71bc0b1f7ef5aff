"""Output of a preflight: one line per node, the network, and every problem with its fix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Optional

from megatron_anymal.launcher.preflight.network_checks import Traffic
from megatron_anymal.launcher.preflight.node_checks import NodeProblem


@dataclass
class NodeRow:
    """Table row of a node.

    Attributes:
        node: name of the node.
        processes: number of processes that reported.
        disk: free bytes at the run's folder; -1 if unknown.
        gpu: free bytes of its fullest GPU; -1 without CUDA.
        clock: seconds ahead of the first node's clock; None if not measured.
        problems: everything that would stop the run.
    """

    node: str
    processes: int = 0
    disk: int = -1
    gpu: int = -1
    clock: Optional[float] = None
    problems: list[NodeProblem] = field(default_factory=list)


def format_table(rows: Sequence[NodeRow], traffic: Optional[Traffic], world: int, seconds: float) -> str:
    """Format the table, the problems and the verdict."""
    cells = [("node", "processes", "disk free", "GPU free", "clock", "state"), *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
    lines.append(_network(traffic, world))
    lines += [f"error: node {row.node}: {problem}" for row in rows for problem in row.problems]
    wrong = sum(bool(row.problems) for row in rows)
    verdict = f"{wrong} of {len(rows)} node(s) failed: the run is not started" if wrong else f"{len(rows)} node(s) ok"
    return "\n".join([*lines, f"preflight: {verdict} ({seconds:.1f} s)"])


def _cells(row: NodeRow) -> tuple[str, ...]:
    return (
        row.node,
        str(row.processes),
        _gigabytes(row.disk),
        _gigabytes(row.gpu),
        "-" if row.clock is None else f"{row.clock:+.3f} s",
        ", ".join(dict.fromkeys(problem.check for problem in row.problems)) or "ok",
    )


def _network(traffic: Optional[Traffic], world: int) -> str:
    if traffic is None:
        return f"all-reduce over {world} processes: not tried, because some processes did not report"
    if traffic.problem:
        return f"all-reduce over {world} processes: {traffic.problem}"
    size, milliseconds = traffic.bytes / 2**20, traffic.seconds * 1e3
    measured = f"{size:g} MiB in {milliseconds:.1f} ms, {traffic.bandwidth(world) / 1e9:.2f} GB/s per link"
    return f"all-reduce over {world} process(es): correct" + (f"; {measured}" if world > 1 else "")


def _gigabytes(count: int) -> str:
    return "-" if count < 0 else f"{count / 1e9:,.1f} GB"
