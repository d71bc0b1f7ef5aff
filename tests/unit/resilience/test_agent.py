"""How a rank ended is known, whoever sees it first."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_anymal.resilience import agent


@pytest.mark.parametrize(("says", "code"), [("0", 0), ("7", 7)])
@pytest.mark.parametrize("first", [True, False], ids=["agent-first", "watch-first"])
def test_a_rank_that_has_ended(tmp_path: Path, says: str, code: int, first: bool) -> None:
    child = agent._Spawned([sys.executable, "-S", "-c", f"import sys; sys.exit({says})"])
    if first:
        # A process that was waited for is unknown to the system.
        assert child.wait(30) == code
    agent._note_end(tmp_path, child.pid)
    assert agent.exit_code(tmp_path, child.pid) == code
    # The agent finds it still.
    assert child.wait(30) == code
