"""Spare nodes: they wait, take the place of a node that is lost, and leave with the run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ports import free_port

from megatron_anymal.config import ConfigError, ResilienceConfig
from megatron_anymal.launcher import rendezvous, spares
from megatron_anymal.launcher.command import main
from megatron_anymal.launcher.job import Decision, Ending, Job
from megatron_anymal.launcher.rendezvous import MultiNode, NodeLost
from megatron_anymal.resilience.events import read
from megatron_anymal.resilience.exit_codes import Exit

CRASH, DONE = Ending(Exit.CRASH, "rank 1 ended with exit code 1"), Ending(Exit.DONE, "done")


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes count as lost after a second."""
    monkeypatch.setattr(spares, "_BEAT", 0.1)
    monkeypatch.setattr(spares, "SILENT", 1.0)
    monkeypatch.setattr(rendezvous, "_ALARM", 0.1)


class Launchers:
    """Rendezvous of several launchers in threads."""

    def __init__(self, run_dir: Path, nodes: int = 2) -> None:
        self.run_dir, self.nodes = run_dir, nodes
        self.endpoint = f"127.0.0.1:{free_port()}"
        self.attempts = 0
        self._threads: list[threading.Thread] = []

    def join(self, node: int) -> MultiNode:
        job = Job(self.run_dir, ResilienceConfig(), [], 1, self.nodes, node, endpoint=self.endpoint, rdzv_timeout=20.0)
        return MultiNode(job, lambda: None)

    def number(self) -> int:
        self.attempts += 1
        return self.attempts

    def in_thread(self, function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        """Run a function in a thread; returns a function that waits for its result."""
        results: list[Any] = []

        def run() -> None:
            try:
                results.append(function(*args))
            except Exception as error:
                results.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()

        def wait() -> Any:
            thread.join(240)
            assert results, "no result in 30 s"
            return results[0]

        return wait


def decide(ending: Ending) -> Decision:
    return Decision(ending.code, ending.text, None if ending.code == Exit.DONE else 0.0)


def test_a_spare_takes_the_place_of_a_lost_node(tmp_path: Path) -> None:
    all_ = Launchers(tmp_path)
    head, lost = all_.join(0), all_.join(1)
    spare = all_.join(-1)
    taken_node = all_.in_thread(spare.take_place)
    first = all_.in_thread(lost.agree, all_.number)
    assert head.agree(all_.number) == first() == 1
    # The launcher of node 1 is gone during the attempt.
    assert lost._pulse is not None
    lost._pulse.stop()
    deadline = time.monotonic() + 240
    while not head.alarmed():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # It reports no ending; the spare does so for it, and takes part in the next attempt.
    verdict = all_.in_thread(head.decide, CRASH, decide)
    assert taken_node() == 1
    second = all_.in_thread(spare.agree, all_.number)
    assert verdict().pause == 0.0
    assert head.agree(all_.number) == second() == 2
    deaths = [event["text"] for event in read(tmp_path) if event["kind"] == "death"]
    assert deaths == [
        "node 1 has shown no sign of life for 8 s",
        "the launcher of node 1 was lost, and a spare takes its place",
    ]
    # The one that was lost was only silent.
    with pytest.raises(NodeLost, match="place of node 1 was given to a spare"):
        lost.agree(all_.number)
    with pytest.raises(NodeLost, match="Start it again with --spare"):
        all_.join(1).agree(all_.number)
    last = all_.in_thread(spare.decide, DONE, decide)
    assert head.decide(DONE, decide).pause is None and last().code == Exit.DONE
    head.leave()


def test_a_node_that_never_joins_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spares, "_ABSENT", 1.5)
    all_ = Launchers(tmp_path)
    head, spare = all_.join(0), all_.join(-1)
    taken_node = all_.in_thread(spare.take_place)
    first = all_.in_thread(head.agree, all_.number)
    assert taken_node() == 1
    assert spare.agree(all_.number) == first() == 1


def test_spares_leave_with_the_run(tmp_path: Path) -> None:
    all_ = Launchers(tmp_path)
    head, other = all_.join(0), all_.join(1)
    waiting = [all_.in_thread(all_.join(-1).take_place) for _ in range(2)]
    first = all_.in_thread(other.agree, all_.number)
    head.agree(all_.number)
    first()
    last = all_.in_thread(other.decide, DONE, decide)
    head.decide(DONE, decide)
    last()
    left = all_.in_thread(head.leave)
    assert [wait() for wait in waiting] == [None, None]
    assert left() is None


def test_without_a_spare_a_silent_node_is_waited_for(tmp_path: Path) -> None:
    all_ = Launchers(tmp_path)
    head, other = all_.join(0), all_.join(1)
    first = all_.in_thread(other.agree, all_.number)
    head.agree(all_.number)
    first()
    assert other._pulse is not None
    other._pulse.stop()
    deadline = time.monotonic() + 2.5
    while time.monotonic() < deadline:
        assert not head.alarmed()
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--spare"], "--spare needs --nnodes above 1"),
        (
            ["--spare", "--nnodes=2", "--node-rank=1", "--rdzv-endpoint=127.0.0.1:29500"],
            "--spare cannot be combined with --node-rank=1",
        ),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, words: list[str], message: str) -> None:
    nodes = 2 if "--nnodes=2" in words else 1
    run = [f"exp_manager.explicit_log_dir={tmp_path}", f"trainer.num_nodes={nodes}"]
    with pytest.raises(ConfigError, match=message):
        main([*words, "pretrain", "--config-name=pretrain_8b_image", *run])
