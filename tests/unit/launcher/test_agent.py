"""The exit code of a rank is recorded, whether the agent or the launcher sees its end first."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from megatron_anymal.launcher import agent


@pytest.mark.parametrize(("says", "code"), [("0", 0), ("7", 7)])
@pytest.mark.parametrize("first", [True, False], ids=["agent-first", "watch-first"])
def test_a_rank_that_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, code: int, first: bool
) -> None:
    monkeypatch.setattr(agent._Spawned, "folder", tmp_path, raising=False)
    words = [sys.executable, "-S", "-c", f"import sys; sys.exit({says})"]
    child = agent._Spawned(words, env={**os.environ, "RANK": "3"})
    if first:
        # The system no longer knows a process that was waited for.
        assert child.wait(240) == code
        (tmp_path / f"exit_{child.pid}").unlink(missing_ok=True)
        agent._note_end(tmp_path, child.pid)
    deadline = time.monotonic() + 240
    while agent.exit_code(tmp_path, child.pid) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert agent.exit_code(tmp_path, child.pid) == code
    # The agent still gets the code.
    assert child.wait(240) == code
    # A launcher that looks only now still finds the rank.
    assert agent.ranks_started(tmp_path) == {3: child.pid}


def test_what_has_no_rank_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent._Spawned, "folder", tmp_path, raising=False)
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    assert agent._Spawned([sys.executable, "-S", "-c", ""], env=environment).wait(240) == 0
    assert agent.ranks_started(tmp_path) == {} and not list(tmp_path.iterdir())
