"""`anymal synthesize` against a server that dies, stalls, answers garbage, is busy and cuts connections."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections import Counter
from email.utils import formatdate
from pathlib import Path
from typing import Any

import fork_server
import pytest
from chat_server import ChatServer, good, serving
from judgements import write_lines
from tiny import png

from megatron_anymal.cli.synthesize import main
from megatron_anymal.config import ConfigError
from megatron_anymal.data.journal import read_journal
from megatron_anymal.data.records import DataError
from megatron_anymal.data.samples import parse_sample
from megatron_anymal.synthesis import client as client_module
from megatron_anymal.synthesis import run as run_module
from megatron_anymal.synthesis.client import Endpoint, _retry_after
from megatron_anymal.synthesis.sources import read_sources
from megatron_anymal.synthesis.tasks import find_task, shipped_tasks


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_LONGEST", 0.05)


def make_manifest(folder: Path, count: int) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "x.png").write_bytes(png(1))
    parts = [{"media": "x.png"}, {"text": "what is it?", "loss": False}]
    lines = [{"key": f"s{n}", "parts": [*parts, {"text": f"this is sample-{n}"}]} for n in range(count)]
    write_lines(folder / "captions.jsonl", lines)
    return folder / "captions.jsonl"


def words(folder: Path, server: ChatServer | str, *more: str) -> list[str]:
    url = server if isinstance(server, str) else server.url
    fixed = [f"--manifest={folder / 'captions.jsonl'}", f"--server={url}", "--model=tiny", "--task=conversation"]
    return [*fixed, f"--out={folder / 'out.jsonl'}", "--timeout=240", *more]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def dropped(folder: Path) -> dict[str, str]:
    return {row["key"]: row["reason"] for row in rows(folder / "out.dropped.jsonl")}


def test_conversations_become_a_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_manifest(tmp_path / "in", 20)
    out = tmp_path / "other" / "out.jsonl"
    out.parent.mkdir()
    with serving() as server:
        server.delay = 0.02
        assert main([*words(tmp_path / "in", server, "--concurrency=3"), f"--out={out}"]) == 0
        assert server.busiest == 3 and set(server.asked.values()) == {1}
    lines = rows(out)
    assert [line["key"] for line in lines] == [f"s{n}-conversation" for n in range(20)]
    for number, line in enumerate(lines):
        assert parse_sample(line, "line").kind == "messages"
        text, medium = line["messages"][0]["content"]
        assert text == {"text": f"What is in sample-{number}, part 0?"}
        assert (out.parent / medium["media"]).resolve() == tmp_path / "in" / "x.png"
        assert [m["role"] for m in line["messages"]] == ["user", "assistant"] * 2
    assert "20 conversation(s), 0 dropped, 0 not answered; 200 + 60 tokens" in capsys.readouterr().out


def test_failures_that_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of failure, each before a good answer."""
    clients: list[client_module.Client] = []

    def client(*given: Any) -> client_module.Client:
        clients.append(client_module.Client(*given))
        return clients[-1]

    monkeypatch.setattr(run_module, "Client", client)
    make_manifest(tmp_path, 12)
    begun, named = time.monotonic(), int(time.time()) + 4
    until, date = begun + named - time.time(), formatdate(named, usegmt=True)
    steps = [["429:1"], ["500", "503", "502"], ["cut"], ["reset"], ["stall"], ["drip"], ["raw:<html>"], ["raw:{}"],
             ['raw:{"choices": []}'], ["raw:" + "[" * 100_000], [f"503:{date}"], ["408", "cut", "429:0"]]  # fmt: skip
    script = {f"sample-{n}": step for n, step in enumerate(steps)}
    with serving(script=script) as server:
        assert main(words(tmp_path, server, "--concurrency=12", "--timeout=6")) == 0
        assert server.asked == {key: len(step) + 1 for key, step in script.items()}
        assert server.complete == Counter(script.keys())
    repeated = Counter(clients[0].repeated)
    connections = [repeated.pop(reason) for reason in list(repeated) if reason.startswith("connection: ")]
    # The limit on time also ends a request whose answer trickles in.
    assert sum(connections) == 3 and repeated == {
        **{"status 500": 1, "status 502": 1, "status 503": 2, "status 408": 1, "status 429": 2},
        **{"timeout": 2, "garbage instead of a completion": 4},
    }
    # As long as the server asks for, as a number or a date.
    assert server.times["sample-0"][1] - server.times["sample-0"][0] >= 1 and server.times["sample-10"][1] >= until
    # The limit on time, since a moment before the request: a busy server may note that late.
    assert min(server.times[key][1] for key in ("sample-4", "sample-5")) - begun >= 6
    assert len(rows(tmp_path / "out.jsonl")) == 12 and dropped(tmp_path) == {}


def test_unusable_answers_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_manifest(tmp_path, 9)
    leak = good("sample-1").replace("Part 0 of", "The caption says part 0 of")
    script = {
        "sample-0": ["text:no", "text:never"],
        "sample-1": [f"text:{leak}"],
        "sample-2": ["text:" + good("x", 1)] * 2,
        "sample-3": ["long", "long"],
        "sample-4": ["400", "400"],
        "sample-5": [f"text:{good('sample-6')}"],
        "sample-7": ["text:no"],
        "sample-8": ["text:```json\n" + good("sample-8") + "\n```"],
    }
    with serving(script=script) as server:
        assert main(words(tmp_path, server, "--attempts=2")) == 0
        assert server.asked["sample-1"] == 1 and server.asked["sample-0"] == server.asked["sample-7"] == 2
    assert dropped(tmp_path) == {
        "s0": "not JSON",
        "s1": "leak: caption",
        "s2": "schema: 1 pairs, not 2 to 5",
        "s3": "cut off: at --max-tokens",
        "s4": "refused: status 400: {}",
        "s6": "duplicate: of s5",
    }
    assert [row["key"] for row in rows(tmp_path / "out.jsonl")] == [f"s{n}-conversation" for n in (5, 7, 8)]
    printed = capsys.readouterr().out
    assert "9 sample(s): 3 conversation(s), 6 dropped, 0 not answered; 120 + 36 tokens" in printed
    assert "  1 leak\n" in printed


def test_a_server_without_json_mode(tmp_path: Path) -> None:
    make_manifest(tmp_path, 6)
    with serving(json_mode=False) as server:
        assert main(words(tmp_path, server, "--concurrency=1")) == 0
        # Only the first request tries it.
        assert ["response_format" in body for body in server.bodies] == [True] + [False] * 6
    assert len(rows(tmp_path / "out.jsonl")) == 6


def test_one_sample_that_the_server_never_answers(tmp_path: Path) -> None:
    """It is asked again at the next start; the others are not."""
    make_manifest(tmp_path, 6)
    with serving(script={"sample-0": ["500"] * 3}) as server:
        server.delay = 0.01
        assert main(words(tmp_path, server, "--retries=2", "--concurrency=2")) == 1
        assert dropped(tmp_path) == {"s0": "server: status 500"} and len(rows(tmp_path / "out.jsonl")) == 5
        assert main(words(tmp_path, server, "--retries=2")) == 0
        assert server.asked["sample-0"] == 4 and sum(server.asked.values()) == 9
    assert len(rows(tmp_path / "out.jsonl")) == 6 and dropped(tmp_path) == {}


def test_a_server_that_dies(tmp_path: Path) -> None:
    make_manifest(tmp_path, 40)
    with serving() as server:
        server.lives = 15
        with pytest.raises(DataError, match=r"does not answer any more .connection.*start the same command again"):
            main(words(tmp_path, server, "--retries=2", "--concurrency=4"))
        first = server.complete.copy()
    assert not (tmp_path / "out.jsonl").exists()
    kept = {row["key"] for row in read_journal(tmp_path / "out.journal.jsonl")[1:]}
    assert kept == {key.replace("sample-", "s") for key in first} and len(kept) >= 15
    with serving() as server:
        assert main(words(tmp_path, server)) == 0
        assert not server.asked.keys() & first.keys() and server.asked.keys() | first.keys() == {
            f"sample-{n}" for n in range(40)
        }
    assert [row["key"] for row in rows(tmp_path / "out.jsonl")] == [f"s{n}-conversation" for n in range(40)]


def test_a_killed_run_continues(tmp_path: Path) -> None:
    make_manifest(tmp_path, 60)
    with serving() as server:
        server.delay = 0.02
        command = ("-m", "megatron_anymal", "synthesize", *words(tmp_path, server, "--concurrency=4"))
        for kills in range(2):
            process = fork_server.Interpreter(*command, output=[tmp_path / "log"], cwd=tmp_path)
            deadline = time.monotonic() + 240
            while sum(server.complete.values()) < 15 * (kills + 1) and time.monotonic() < deadline:
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL)
            process.wait(240)
        assert 30 <= sum(server.complete.values()) < 60 and not (tmp_path / "out.jsonl").exists()
        assert main(words(tmp_path, server)) == 0
        # Only what was in flight at a kill is asked for again.
        assert set(server.complete) == {f"sample-{n}" for n in range(60)}
        assert sum(server.complete.values()) <= 60 + 2 * 4
    assert [row["key"] for row in rows(tmp_path / "out.jsonl")] == [f"s{n}-conversation" for n in range(60)]
    assert len(read_journal(tmp_path / "out.journal.jsonl")) == 61


def test_the_key_is_sent_and_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_manifest(tmp_path, 2)
    monkeypatch.setenv("OTHER_KEY", "secret-123")
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with serving(script={"sample-0": ["500", "raw:secret-123", "text:no"]}) as server:
        assert main(words(tmp_path, server, "--api-key-env=OTHER_KEY")) == 0
        assert server.keys == {"Bearer secret-123"}
        server.script = {f"sample-{n}": ["401"] * 9 for n in range(2)}
        monkeypatch.setattr(
            "chat_server._Handler.reply",
            lambda self, *_: type(self).send_error(self, 401, explain="key secret-123 is wrong"),
        )
        with pytest.raises(DataError, match=r"status 401.*--api-key-env") as refused:
            main([*words(tmp_path, server, "--api-key-env=OTHER_KEY"), f"--out={tmp_path / 'b.jsonl'}"])
    shown = "".join(capsys.readouterr()) + str(refused.value)
    kept = "".join(path.read_text() for path in tmp_path.glob("*.jsonl"))
    assert "secret-123" not in shown + kept and "***" in str(refused.value)


def test_other_settings_or_captions_are_refused(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path, 3)
    with serving() as server:
        assert main(words(tmp_path, server)) == 0
        with pytest.raises(DataError, match="another model"):
            main([*words(tmp_path, server), "--model=other"])
        with pytest.raises(DataError, match="another task"):
            main([*words(tmp_path, server), "--task=detail"])
        manifest.write_text(manifest.read_text().replace("this is sample-1", "that is sample-1"))
        with pytest.raises(DataError, match="'s1' with other captions"):
            main(words(tmp_path, server))
        make_manifest(tmp_path, 5)
        assert main(words(tmp_path, server)) == 0 and sum(server.asked.values()) == 5


def test_no_server(tmp_path: Path) -> None:
    make_manifest(tmp_path, 3)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(DataError, match=r"does not answer any more .connection: ConnectError"):
            main(words(tmp_path, f"http://127.0.0.1:{bound.getsockname()[1]}", "--retries=1"))
    assert len(read_journal(tmp_path / "out.journal.jsonl")) == 1


def test_descriptions_reach_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png(1))
    line = {
        "media": "x.png",
        "text": "a dog {{ 7 * 7 }}",
        "captions": ["two  dogs", "a dog {{ 7 * 7 }}"],
        "objects": ["dog"],
        "boxes": [{"label": "dog", "box": [0, 0.5, 1, 1]}],
    }
    write_lines(tmp_path / "captions.jsonl", [line])
    [source] = read_sources(str(tmp_path / "captions.jsonl"))
    assert source.captions == ("a dog {{ 7 * 7 }}", "two dogs") and source.key == "1"
    for task in shipped_tasks().values():
        system, user = task.messages(source)
        assert "JSON" in system["content"] and '"conversation"' in system["content"]
        for text in ("- a dog {{ 7 * 7 }}\n- two dogs", "Objects: dog", "- dog: 0.0, 0.5, 1.0, 1.0"):
            assert text in user["content"]


SOURCES = {
    "no caption": {"parts": [{"media": "x.png"}, {"text": "q", "loss": False}]},
    "no media to ask": {"parts": [{"text": "hi"}]},
    "`objects` must be": {"media": "x.png", "text": "a", "objects": "dog"},
    "list of strings": {"media": "x.png", "text": "a", "objects": [1]},
    "`label` and `box`": {"media": "x.png", "text": "a", "boxes": [{"label": "a", "box": [1, 2, 3]}]},
    "no media file": {"media": "none.png", "text": "a"},
    "has `parts`": {"messages": []},
}


@pytest.mark.parametrize("message", SOURCES)
def test_manifests_that_are_refused(tmp_path: Path, message: str) -> None:
    (tmp_path / "x.png").write_bytes(png(1))
    write_lines(tmp_path / "captions.jsonl", [SOURCES[message]])
    with pytest.raises(DataError, match=message):
        read_sources(str(tmp_path / "captions.jsonl"))


def test_tasks(tmp_path: Path) -> None:
    text = "about: x\nsystem: s\nuser: '{{ captions[0] }} {{ nothing }}'\nmin_pairs: 1\nmax_pairs: 1\n"
    (tmp_path / "own.yaml").write_text(text)
    (tmp_path / "x.png").write_bytes(png(1))
    write_lines(tmp_path / "captions.jsonl", [{"media": "x.png", "text": "a"}])
    task = find_task(str(tmp_path / "own.yaml"))
    with pytest.raises(DataError, match=r"'own' cannot be filled.*nothing"):
        task.messages(read_sources(str(tmp_path / "captions.jsonl"))[0])
    for wrong in (text + "more: 1\n", text.replace("max_pairs: 1", "max_pairs: 0"), "[", text.replace(": s", ": 1")):
        (tmp_path / "own.yaml").write_text(wrong)
        with pytest.raises(DataError, match=r"own\.yaml"):
            find_task(str(tmp_path / "own.yaml"))
    with pytest.raises(DataError, match="conversation, creative"):
        find_task("nothing")


def test_addresses() -> None:
    for url, expected in {
        "http://h:1": "http://h:1/v1/chat/completions",
        "http://h:1/": "http://h:1/v1/chat/completions",
        "https://h/v1": "https://h/v1/chat/completions",
        "https://h/a/v1/": "https://h/a/v1/chat/completions",
    }.items():
        assert Endpoint(url, "m").completions == expected
    for wrong in ("h:1", "ftp://h", "http://", "http://h?x=1"):
        with pytest.raises(ConfigError, match="must be an address"):
            Endpoint(wrong, "m")
    assert _retry_after("3") == 3 and _retry_after("soon") is None and _retry_after(None) is None
    assert 8 < (_retry_after(formatdate(time.time() + 10, usegmt=True)) or 0) <= 10
