"""When a run is restarted and when it is given up."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_anymal.config import ConfigError
from megatron_anymal.launcher.job import Decision, Ending, Restarts, combined, new_attempt
from megatron_anymal.resilience.exit_codes import Exit


def crash(step: int = -1) -> Ending:
    return Ending(Exit.CRASH, "rank 0 was ended", step)


def save(run_dir: Path, step: int) -> None:
    (run_dir / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)


def test_given_up_after_three_restarts_without_progress(tmp_path: Path) -> None:
    restarts = Restarts(tmp_path)
    assert [restarts.decide(crash(4)).pause for _ in range(3)] == [0.0, 1.0, 3.0]
    assert restarts.decide(crash(4)).code == Exit.CRASH_LOOP


def test_a_later_step_is_progress(tmp_path: Path) -> None:
    restarts = Restarts(tmp_path)
    assert [restarts.decide(crash(step)).pause for step in range(20)] == [0.0] * 20


def test_a_newer_checkpoint_is_progress(tmp_path: Path) -> None:
    save(tmp_path, 10)
    restarts = Restarts(tmp_path)
    pauses = [restarts.decide(crash()).pause for _ in range(3)]
    save(tmp_path, 12)
    assert [*pauses, restarts.decide(crash()).pause] == [0.0, 1.0, 3.0, 0.0]


def test_going_over_lost_steps_again_is_no_progress(tmp_path: Path) -> None:
    restarts = Restarts(tmp_path)
    ended = [restarts.decide(crash(step)) for step in (9, 6, 7, 8)]
    assert ended[-1].code == Exit.CRASH_LOOP


@pytest.mark.parametrize("code", Exit)
def test_only_crashes_and_hangs_are_tried_again(tmp_path: Path, code: Exit) -> None:
    again = Restarts(tmp_path).decide(Ending(code, "so", 3)).pause is not None
    assert again is (code in (Exit.CRASH, Exit.HANG))


def test_nothing_is_started_after_a_wish_to_stop(tmp_path: Path) -> None:
    ended = Restarts(tmp_path).decide(Ending(Exit.HANG, "so", 3, stop=True))
    assert ended == Decision(Exit.REQUEUE, "stopped on request, but not cleanly: so")
    assert Restarts(tmp_path).decide(Ending(Exit.MISTAKE, "so", stop=True)).code == Exit.MISTAKE


def test_what_several_nodes_tell_becomes_one_ending() -> None:
    victim = Ending(Exit.CRASH, "the ranks of this node were ended", 4, followed=True)
    hung, killed = Ending(Exit.HANG, "rank 3 stopped", 5), Ending(Exit.CRASH, "rank 1 was ended", 4)
    assert combined([victim, killed]) == killed
    assert combined([victim, hung]) == Ending(Exit.HANG, "rank 3 stopped", 5)
    assert combined([victim, Ending(Exit.MISTAKE, "no such file", -1, stop=True)]).code == Exit.MISTAKE
    assert combined([Ending(Exit.DONE, "", 9), Ending(Exit.DONE, "", 9)]).code == Exit.DONE
    assert combined([Ending(Exit.DONE, "", 9), victim]).code == Exit.CRASH
    by_signal = Ending(Exit.CRASH, "rank 3 was ended by SIGKILL", 4, killed=True)
    assert combined([killed, by_signal]) == by_signal and combined([by_signal, hung]).code == Exit.HANG


def test_attempts_are_numbered_over_all_jobs(tmp_path: Path) -> None:
    assert [new_attempt(tmp_path) for _ in range(3)] == [1, 2, 3]
    (tmp_path / "logs" / "attempt_9").mkdir()
    assert new_attempt(tmp_path) == 10
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written .*exp_manager\.explicit_log_dir"):
        new_attempt(tmp_path / "file")
