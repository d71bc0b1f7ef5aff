"""The example that makes a benchmark of prepared samples: single questions only, asked word for word."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from examples.benchmark_from_folder import main
from megatron_anymal.data.prompt_encoder import MediaFile
from megatron_anymal.data.records import MediaPart, Part, TextPart
from megatron_anymal.generation import evaluation
from megatron_anymal.generation.answers import Reply
from megatron_anymal.generation.prompts import Prompt


def question(key: str, *texts: str) -> evaluation.Question:
    turns: list[Part] = [TextPart("user: ", control=True), MediaPart("it.png", "image")]
    turns += [TextPart(text) for text in texts]
    return evaluation.Question(key, Prompt(turns, [MediaFile(b"picture", "png")]), Reply.of_parts(["two"]))


def test_conversations_of_several_turns_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked = [question("a", "which digit? "), question("b", "which digit?", "again"), question("c")]
    monkeypatch.setattr(evaluation, "read_questions", lambda folder: asked)
    assert main(["--samples", "prepared", "--out", str(tmp_path)]) == 0
    rows = pq.read_table(tmp_path / "data").to_pylist()
    assert [row["question"] for row in rows] == ["which digit? ", ""]
    assert rows[0]["answers"][9]["answer"] == "two" and rows[0]["image"]["bytes"] == b"picture"
    assert "wrote 2 questions" in (shown := capsys.readouterr().out) and "1 of 3 samples have several texts" in shown


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="error: There is no shard folder"):
        main(["--samples", str(tmp_path / "none"), "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
