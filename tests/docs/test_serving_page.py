"""The guide on serving: its commands run against an exported folder, and its tables match the code."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import time
from pathlib import Path

import fork_server
import httpx
from commands import PAGES, blocks
from hf_parts import make_config, make_model, sections, write_export
from ports import free_port

from megatron_anymal.cli import serve
from megatron_anymal.serving.requests import _IGNORED, _USED

GUIDE = PAGES["docs/guides/serving.md"]


def line_of(start: str) -> str:
    [line] = [line for block in blocks(GUIDE, "text") for line in block.splitlines() if line.startswith(start)]
    return line


def test_commands_serve_answer_and_end(tmp_path: Path, tokenizer_folder: str) -> None:
    folder = tmp_path / "exported"
    write_export(folder, make_model(make_config(sections("towers"), tokenizer_folder)), tokenizer_folder)
    # The page's port may be in use.
    port, log = str(free_port()), tmp_path / "serve.log"
    words = [port if word == "8000" else word for word in shlex.split(line_of("anymal serve"))[1:]]
    process = fork_server.Interpreter("-m", "megatron_anymal", *words, "--device=cpu", output=[log], cwd=tmp_path)
    deadline = time.monotonic() + 240
    while "serving 'anymal' at" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    curl = shlex.split(line_of("curl").replace(":8000", f":{port}"))
    headers = dict([curl[curl.index("-H") + 1].split(": ")])
    reply = httpx.post(curl[1], headers=headers, content=curl[curl.index("-d") + 1], timeout=240)
    assert reply.status_code == 200 and reply.json()["choices"][0]["message"]["content"], reply.text
    page = httpx.get(f"http://127.0.0.1:{port}/")
    assert "default-src 'none'" in page.headers["content-security-policy"] and "</html>" in page.text
    content = {"role": "user", "content": "what is this"}
    shown = ["-m", "megatron_anymal", "generate", "--checkpoint=exported", "--device=cpu", "--max-new-tokens=16"]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"messages": [content]}))
    generated = fork_server.python(*shown, "--prompts=prompts.jsonl", cwd=tmp_path)
    assert generated.stdout.strip() == reply.json()["choices"][0]["message"]["content"], generated.stderr
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(240) == 0, log.read_text()


def test_fields_and_options_are_listed() -> None:
    fields = re.findall(r"^\| (`.*?) \| (?:longest|as the|send the|accepted)", GUIDE, re.M)
    named = {name.split(".")[0] for row in fields for name in re.findall(r"`([\w.]+)`", row)}
    assert named == {*_USED, *_IGNORED} - {"model", "messages"}
    parser = serve._parser()
    defaults = {text: action.default for action in parser._actions for text in action.option_strings}
    table = dict(re.findall(r"^\| `(--[\w-]+)` \| (\d+) \|", GUIDE, re.M))
    assert table and {name: float(value) for name, value in table.items()} == {name: defaults[name] for name in table}
    reference = PAGES["docs/reference/cli.md"].partition("## anymal serve")[2].partition("\n## ")[0]
    listed = set(re.findall(r"^\| `(--[\w-]+)`", reference, re.M))
    own = [a for group in parser._action_groups if group.title in ("options", "limits") for a in group._group_actions]
    assert listed == {text for action in own for text in action.option_strings if text.startswith("--")} - {"--help"}
