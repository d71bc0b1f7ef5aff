"""`anymal synthesize` with `transformers serve`: a Llama with random weights, which cannot write JSON but must be asked
and counted like any other."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from judgements import write_lines
from ports import free_port
from tiny import png
from tokenizer_folders import byte_level, save
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.import_utils import is_serve_available

from megatron_anymal.cli.synthesize import main
from megatron_anymal.data.journal import read_journal
from megatron_anymal.data.records import DataError
from megatron_anymal.synthesis.sources import read_sources
from megatron_anymal.synthesis.tasks import find_task

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A HuggingFace folder of a small Llama."""
    save(tmp_path / "model", byte_level())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(tmp_path / "model"))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(tmp_path / "model"))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=4096, **sizes)
    LlamaForCausalLM(config).save_pretrained(str(tmp_path / "model"))
    return tmp_path / "model"


@pytest.fixture
def address(model: Path) -> Iterator[str]:
    """A server of the model on this machine, without the network."""
    if not is_serve_available():
        pytest.skip("`transformers serve` needs fastapi, uvicorn and openai")
    port, log = free_port(), model.parent / "serve.log"
    command = [Path(sys.executable).with_name("transformers"), "serve", model, "--host=127.0.0.1", f"--port={port}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen([*command, "--device=cpu"], stdout=output, stderr=output, env=environment)
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait(240)


@pytest.mark.slow
def test_transformers_serve(address: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png(1))
    write_lines(
        tmp_path / "captions.jsonl", [{"key": f"s{n}", "media": "x.png", "text": "a dog" * n} for n in (1, 2, 3)]
    )
    words = [f"--manifest={tmp_path / 'captions.jsonl'}", f"--server={address}", f"--model={model}", "--task=detail"]
    with pytest.raises(DataError, match="No sample has a usable conversation"):
        main([*words, f"--out={tmp_path / 'out.jsonl'}", "--max-tokens=8", "--attempts=1", "--concurrency=2"])
    rows = {row["key"]: row for row in read_journal(tmp_path / "out.journal.jsonl")[1:]}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(model))
    for source in read_sources(str(tmp_path / "captions.jsonl")):
        prompt = tokenizer.apply_chat_template(find_task("detail").messages(source), tokenize=True, return_dict=True)
        row = rows[source.key]
        assert row["prompt_tokens"] == len(prompt["input_ids"]) and 1 <= row["completion_tokens"] <= 8
        assert row["reason"] in ("cut off: at --max-tokens", "not JSON")
    assert (tmp_path / "out.dropped.jsonl").read_text().count("\n") == 3
