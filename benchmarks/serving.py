"""Throughput of `anymal serve` with many clients at once, against the same requests one after the other.

    PYTHONPATH=tests python benchmarks/serving.py --clients 64

A Llama with random weights is served over loopback; each request is a text and gets an answer of `--tokens` tokens.
Both variants run in this process, `--rounds` times in turn, and the ratio of their medians is taken. Prints one JSON
object: tokens per second of wall time and of processor time for both variants, those of each round, and the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from chat_service import Served, ask, serving
from hf_parts import make_config, make_model
from measuring import surroundings
from tiny import make_tokenizer
from transformers import AutoTokenizer

from megatron_anymal.generation.export_generator import ExportedGenerator
from megatron_anymal.hf.processing_anymal import AnyMALProcessor
from megatron_anymal.serving.limits import ServingLimits


def build(tokenizer: str, hidden: int, layers: int) -> ExportedGenerator:
    """A text-only model whose answers end only at the token limit."""
    config = make_config({}, tokenizer, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers)
    model = make_model(config, std=0.05)
    # No token ends an answer: all of them have the same length.
    model.generation_config.eos_token_id = [config.text_config.vocab_size]
    model.generation_config.pad_token_id = 1
    return ExportedGenerator(model, AnyMALProcessor(AutoTokenizer.from_pretrained(tokenizer), {}))


def answered(served: Served, http: httpx.Client, count: int, tokens: int, together: bool) -> tuple[float, float]:
    """Tokens per second of wall time and of processor time for `count` requests."""

    def request(number: int) -> int:
        body = ask(f"what is this {number}", max_tokens=tokens)
        reply = http.post(f"{served.url}/v1/chat/completions", json=body)
        return reply.raise_for_status().json()["usage"]["completion_tokens"]

    with ThreadPoolExecutor(count if together else 1) as pool:
        clock, processor = time.perf_counter(), time.process_time()
        made = sum(pool.map(request, range(count)))
        return made / (time.perf_counter() - clock), made / (time.process_time() - processor)


def main() -> None:
    """Run the benchmark and print its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--clients", type=int, default=64, help="clients that send requests at once (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each answer (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size of the Llama (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the Llama (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of both variants (default: %(default)s)")
    sizes, around = parser.parse_args(), surroundings()
    limits = ServingLimits(max_batch=sizes.clients, max_new_tokens=sizes.tokens)
    with tempfile.TemporaryDirectory() as folder:
        generator = build(make_tokenizer(Path(folder) / "tokenizer"), sizes.hidden, sizes.layers)
    rounds: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    connections = httpx.Limits(max_connections=sizes.clients)
    with serving(generator, limits) as served, httpx.Client(timeout=600, limits=connections) as http:
        answered(served, http, 2, sizes.tokens, True)
        for _ in range(sizes.rounds):
            for together in (True, False):
                rounds[together].append(answered(served, http, sizes.clients, sizes.tokens, together))
    medians = {together: [statistics.median(column) for column in zip(*rows)] for together, rows in rounds.items()}
    names = ("tokens_per_second", "tokens_per_processor_second")
    result = {
        "command": " ".join(["python benchmarks/serving.py", *sys.argv[1:]]),
        **around,
        "sizes": vars(sizes),
        # Tokens per second of wall time and of processor time, by round.
        "rounds": {"together": rounds[True], "one_by_one": rounds[False]},
        "together": dict(zip(names, medians[True])),
        "one_by_one": dict(zip(names, medians[False])),
        "ratio_clock": medians[True][0] / medians[False][0],
        "ratio_processor": medians[True][1] / medians[False][1],
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
