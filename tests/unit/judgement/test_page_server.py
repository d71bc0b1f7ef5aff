"""The page's server: what it sends, what it refuses, and that a kill loses no judgement."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from judgements import make_items, make_prompts, served

from megatron_anymal.data.journal import Journal, read_journal
from megatron_anymal.judgement.comparison import Comparison
from megatron_anymal.judgement.server import MAX_BODY, JudgementServer

SCORES = {"recognition": 2, "accuracy": 0, "integrity": 2}


class Client:
    """Sends requests to a server, on one connection each."""

    def __init__(self, url: str) -> None:
        self.address, self.root = urlsplit(url).netloc, urlsplit(url).path

    def ask(
        self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None, root: str | None = None
    ) -> tuple[int, bytes, dict[str, str]]:
        connection = http.client.HTTPConnection(self.address, timeout=240)
        headers = headers if headers is not None else ({"Content-Type": "application/json"} if body else {})
        connection.request("POST" if body is not None else "GET", (root or self.root) + path, body, headers)
        reply = connection.getresponse()
        answer = reply.status, reply.read(), dict(reply.getheaders())
        connection.close()
        return answer

    def judge(self, number: object, annotator: str = "ann", **changes: Any) -> tuple[int, dict[str, Any]]:
        value = {"annotator": annotator, "number": number, "choice": "first", "scores": [SCORES, SCORES], "seconds": 1}
        status, body, _ = self.ask("judgement", json.dumps(value | changes).encode())
        return status, json.loads(body)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    """A client of a server with nine items; tmp_path/secret.txt must not be served."""
    items = make_items(tmp_path / "source", 9)
    (tmp_path / "secret.txt").write_text("secret")
    journal = Journal(tmp_path / "judgements.jsonl")
    server = JudgementServer(Comparison(items, journal, 0))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield Client(server.url)
    server.shutdown()
    thread.join(240)
    server.server_close()
    journal.close()


def test_the_page_is_alone(client: Client) -> None:
    status, body, headers = client.ask("")
    page = body.decode()
    assert status == 200 and headers["Content-Type"].startswith("text/html") and headers["Cache-Control"] == "no-store"
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and headers["Referrer-Policy"] == "no-referrer"
    [nonce] = set(re.findall(r"nonce=([\w-]+)", page))
    assert f"script-src 'nonce-{nonce}'" in policy and nonce not in client.ask("")[1].decode()
    assert not re.findall(r"(?:src|href)=[\"']?(?!data:)[^\s>]*//", page)
    assert re.findall(r"https?://[^\"]*", page) == ["http://www.w3.org/2000/svg"]
    assert client.ask("", root=client.root.rstrip("/"))[2]["Location"] == client.root


def test_models_are_not_named(client: Client) -> None:
    assert ".jsonl" not in client.ask("")[1].decode()
    for path in ("state?annotator=ann", "item?annotator=ann&number=0"):
        body = client.ask(path)[1].decode()
        assert not re.search(r"jsonl|\"[ab]\"", body)


@pytest.mark.parametrize("root", ["/", "//", "/x/", "/x" * 40 + "/", "/%00/"])
def test_a_wrong_token(client: Client, root: str) -> None:
    assert client.root not in root
    for path in ("", "state?annotator=ann", "media/0/0", "judgement"):
        assert client.ask(path, root=root)[0] == 403
    assert client.ask("judgement", b"{}", root=root)[0] == 403
    assert len(client.root) >= 34


PATHS = [
    "media/0/1",
    "media/9/0",
    "media/-1/0",
    "media/0/../../secret.txt",
    "media/../secret.txt",
    "media/%2e%2e/secret.txt",
    "media/0/..%2f..%2fsecret.txt",
    "media/source/0.png",
    "media/0/0/0",
    "media/" + "9" * 5000 + "/0",
    "media/%C2%B2/0",
    "../secret.txt",
    "//etc/passwd",
    "item?annotator=ann&number=9",
    "item?annotator=ann",
    "nothing",
]


@pytest.mark.parametrize("path", PATHS, ids=[path[:30] for path in PATHS])
def test_other_paths(client: Client, path: str) -> None:
    status, body, _ = client.ask(path)
    assert status == 404 and b"secret" not in body and b"root:" not in body


def test_media_are_sent_whole_and_in_ranges(client: Client, tmp_path: Path) -> None:
    data = (tmp_path / "source" / "1.flac").read_bytes()
    status, body, headers = client.ask("media/1/0")
    assert (status, body, headers["Content-Type"]) == (200, data, "audio/flac")
    assert headers["X-Content-Type-Options"] == "nosniff"
    last, size = len(data) - 1, len(data)
    cases = {"bytes=0-9": (0, 9), "bytes=100-": (100, last), "bytes=-7": (size - 7, last), "bytes=5-999999": (5, last)}
    for wanted, (start, end) in cases.items():
        status, body, headers = client.ask("media/1/0", headers={"Range": wanted})
        assert (status, body) == (206, data[start : end + 1])
        assert headers["Content-Range"] == f"bytes {start}-{end}/{size}"
    assert client.ask("media/1/0", headers={"Range": f"bytes={size}-"})[0] == 416
    for ignored in ("bytes=5-2", "bytes=0-1,3-4", "rows=1-2", "bytes=-"):
        assert client.ask("media/1/0", headers={"Range": ignored})[:2] == (200, data)


def test_motion_is_sent_as_curves(client: Client) -> None:
    signal = json.loads(client.ask("curves/2/0")[1])
    assert signal["rate"] == 50 and len(signal["values"]) == 6 and len(signal["values"][0]) == 50
    status, body, _ = client.ask("curves/0/0")
    assert status == 400 and "error" in json.loads(body)


def test_judgements_are_on_disk_when_they_are_answered(client: Client, tmp_path: Path) -> None:
    for number in (4, 2):
        status, reply = client.judge(number)
        assert status == 200 and number in reply["judged"]
        assert read_journal(tmp_path / "judgements.jsonl")[-1]["item"] == f"q{number}"
    assert reply["judged"] == [2, 4] and client.judge(0, "bob")[1]["judged"] == [0]
    state = json.loads(client.ask("state?annotator=ann")[1])
    assert (state["items"], state["judged"], len(state["rubrics"])) == (9, [2, 4], 3)


def test_bodies_that_are_refused(client: Client, tmp_path: Path) -> None:
    kind = {"Content-Type": "application/json"}
    assert client.ask("judgement", b"x" * (MAX_BODY + 1))[0] == 413
    assert client.ask("judgement", b"", {**kind, "Content-Length": "9" * 30})[0] == 413
    assert client.ask("judgement", b"", {**kind, "Content-Length": "-1"})[0] == 411
    assert client.ask("judgement", b"{}", {"Content-Type": "text/plain"})[0] == 415
    assert client.ask("nothing", b"{}")[0] == 404
    for body in (b"", b"{", b"[]", b"\xff", b"[" * 5000, b'{"annotator": "ann", "annotator": "bob"}', b"null"):
        assert client.ask("judgement", body, kind)[0] == 400
    assert client.judge(9)[0] == client.judge(-1)[0] == client.judge(None)[0] == 404
    assert client.judge(0, "<b>")[0] == client.judge(0, choice="a")[0] == client.judge(0, scores=3)[0] == 400
    assert not read_journal(tmp_path / "judgements.jsonl")


def test_a_full_disk_is_told_to_the_annotator(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        status, reply = client.judge(0)
    assert status == 507 and "No space" in reply["error"]
    assert json.loads(client.ask("state?annotator=ann")[1])["judged"] == []
    assert client.judge(0)[0] == 200


def test_it_listens_on_this_machine_only(client: Client) -> None:
    host, _, port = client.address.partition(":")
    assert host == "127.0.0.1"
    addresses = {entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for address in addresses - {"127.0.0.1", "127.0.1.1"}:
        with pytest.raises(OSError):
            socket.create_connection((str(address), int(port)), timeout=5)


def test_a_killed_server_loses_no_judgement(tmp_path: Path) -> None:
    make_prompts(tmp_path / "source", 60)
    process, url = served(tmp_path)
    client = Client(url)
    answered: list[tuple[str, int]] = []

    def annotate(name: str) -> None:
        for number in range(60):
            try:
                status, _ = client.judge(number, name)
            except (OSError, http.client.HTTPException):
                return
            if status == 200:
                answered.append((name, number))

    threads = [threading.Thread(target=annotate, args=(name,)) for name in ("ann", "bob", "eve")]
    for thread in threads:
        thread.start()
    while len(answered) < 40 and any(thread.is_alive() for thread in threads):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    for thread in threads:
        thread.join(240)
    process.wait(240)
    rows = read_journal(tmp_path / "out" / "judgements.jsonl")
    kept = [(row["annotator"], int(row["item"][1:])) for row in rows]
    assert len(kept) == len(set(kept)) and 40 <= len(answered) < 180
    # At most the judgement in flight of each annotator is kept without having been answered.
    assert set(answered) <= set(kept) and len(kept) - len(answered) <= 3
    process, url = served(tmp_path, "--export-pairs=pairs.jsonl")
    state = json.loads(Client(url).ask("state?annotator=ann")[1])
    assert state["judged"] == sorted(number for name, number in kept if name == "ann")
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(240) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["judgements"] == len(kept)
    assert (tmp_path / "pairs.jsonl").read_text().count("\n") > 10
