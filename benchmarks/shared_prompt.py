"""Measure DPO with the prompt of a pair computed once against two whole documents per pair.

    python benchmarks/shared_prompt.py --out results.json

Both sides run in one process, in fp32, on the same pairs, and take turns step by step. A step is a pass of the
reference, forward and backward pass of the policy, and the update of its adapters. Media pass through an identity
encoder and a frozen projector.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anymal_side import PIECE, SPECIAL, Batches, LlamaDimensions, Ours, write_tokenizer
from anymal_side import StepSizes as ModelSizes
from anymal_side import make_config as model_config
from measuring import add_arguments, ratio, surroundings, take_turns

from megatron_anymal.config import RunConfig
from megatron_anymal.data.chat_format import CHAT_TOKENS
from megatron_anymal.data.index_builder import IndexOptions
from megatron_anymal.data.index_folder import make_index
from megatron_anymal.data.manifest import write_shards
from megatron_anymal.model.lora import keep_reference
from megatron_anymal.parallel import ParallelLayout, initialize, shutdown
from megatron_anymal.train.build import TrainState, build
from megatron_anymal.train.reference_logprobs import ReferenceAnswers
from megatron_anymal.train.step import StepResult

# Smallest acceptable ratio of pairs per second.
BAR = 1.5
# Soft tokens of a prompt, a multiple of the features of its recording.
MEDIA_TOKENS = 10 * PIECE[0]
# Tokens of a prompt besides media and words: begin, the user turn's header and end, the answer's header.
_AROUND = 1 + 3 + 1 + 3


@dataclass(frozen=True)
class PairSizes(LlamaDimensions):
    """Sizes of the benchmark; the Llama has head size hidden / heads."""

    vocabulary: int = 8192
    """Size of the vocabulary."""
    pairs: int = 8
    """Preference pairs per step."""
    prompt_tokens: int = 256
    """Tokens of a prompt, soft tokens included."""
    answer_tokens: int = 64
    """Tokens of each answer, its end token included."""
    warm_up: int = 2
    """Rounds before the timed ones."""
    rounds: int = 12
    """Timed rounds, at least 2."""

    @property
    def by_count(self) -> float:
        """Ratio of the tokens of whole documents to those with the prompt once. Both answers repeat its last token."""
        prompt, answer = self.prompt_tokens, self.answer_tokens
        return 2 * (prompt + answer) / (prompt + 2 * answer + 1)


def write_pairs(folder: Path, sizes: PairSizes) -> None:
    """Write a tokenizer and shards of pairs about IMU recordings, with random words."""
    special = [*SPECIAL, *CHAT_TOKENS[1:]]
    special[0] = CHAT_TOKENS[0]
    words = write_tokenizer(folder / "tokenizer", special, sizes.vocabulary)
    rng = np.random.default_rng(0)

    def text(count: int) -> str:
        return " ".join(rng.choice(words, size=count))

    (folder / "source").mkdir()
    lines = []
    for number in range(sizes.pairs):
        signal = io.BytesIO()
        np.save(signal, rng.normal(size=PIECE[::-1]).astype(np.float32))
        (folder / "source" / f"{number}.npy").write_bytes(signal.getvalue())
        media = {"media": f"{number}.npy", "modality": "imu", "rate": PIECE[1]}
        question = [media, {"text": text(sizes.prompt_tokens - MEDIA_TOKENS - _AROUND)}]
        answers = {name: text(sizes.answer_tokens - 1) for name in ("chosen", "rejected")}
        lines.append({"key": f"{number:06d}", "messages": [{"role": "user", "content": question}], **answers})
    manifest = folder / "source" / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_shards(str(manifest), str(folder / "shards"))
    make_index(str(folder / "shards"), IndexOptions(str(folder / "tokenizer")))


def make_config(folder: Path, sizes: PairSizes, share_prompt: str) -> RunConfig:
    """Configuration of one side."""
    shared = {field.name: getattr(sizes, field.name) for field in fields(ModelSizes) if hasattr(sizes, field.name)}
    config = model_config(folder, ModelSizes(**shared), freeze=True)
    config.job, config.model.dpo.share_prompt = "dpo", share_prompt
    # Required, but nothing is loaded: the policy begins with new adapters.
    config.model.lora.r, config.model.restore_from_path = 8, "unused"
    projector = config.model.modalities["imu"].projector
    projector.freeze, projector.num_tokens = True, MEDIA_TOKENS
    config.model.global_batch_size = sizes.pairs
    config.data.seq_length = sizes.pairs * (sizes.prompt_tokens + sizes.answer_tokens)
    return config


def build_side(config: RunConfig, layout: ParallelLayout) -> tuple[TrainState, Ours]:
    """One side and its state. Its reference is the policy before the first step, and computed in every step."""
    state = build(config, layout)
    keep_reference(state.models)
    state.reference = ReferenceAnswers(None, [], layout.device)
    return state, Ours(state, Batches(state, 1))


def compare(folder: Path, sizes: PairSizes) -> dict[str, Any]:
    """Time both sides, and compare the results of their first steps."""
    write_pairs(folder, sizes)
    configs = {name: make_config(folder, sizes, share) for name, share in (("shared", "auto"), ("whole", "never"))}
    layout = initialize(configs["shared"])
    sides = {name: build_side(config, layout) for name, config in configs.items()}
    tokens = {name: side.batches[0][0].tokens for name, (_, side) in sides.items()}
    first: dict[str, StepResult] = {name: side.step(0) for name, (_, side) in sides.items()}
    turns = take_turns(
        {name: lambda number, side=side: side.step(number) for name, (_, side) in sides.items()},
        sizes.rounds,
        sizes.warm_up,
    )
    return {
        "tokens": tokens,
        "first_step": {name: {"loss": one.loss, "grad_norm": one.grad_norm} for name, one in first.items()},
        "cpu_seconds": {name: statistics.median(turn.cpu) for name, turn in turns.items()},
        "cpu": asdict(ratio(turns["whole"].cpu, turns["shared"].cpu)),
        "wall": asdict(ratio(turns["whole"].wall, turns["shared"].wall)),
    }


def report(results: dict[str, Any], sizes: PairSizes) -> str:
    """Format the results as text."""
    first, cpu, seconds = results["first_step"], results["cpu"], results["cpu_seconds"]
    passed = "reached" if cpu["median"] >= BAR else "MISSED"
    return "\n".join(
        [
            f"{results['date']}; {results['machine']}; {results['threads']} threads; "
            f"load before: {results['load']:.1f}",
            f"{sizes.pairs} pairs of {sizes.prompt_tokens} prompt and 2 x {sizes.answer_tokens} answer tokens; "
            f"{sizes.layers} layers of width {sizes.hidden}, adapters of rank 8",
            "",
            *(
                f"{name:<8}{results['tokens'][name]:>8} tokens{seconds[name]:>10.3f} CPU seconds per step"
                f"{sizes.pairs / seconds[name]:>8.2f} pairs per CPU second; first step: loss "
                f"{first[name]['loss']:.7f}, gradient norm {first[name]['grad_norm']:.7f}"
                for name in ("whole", "shared")
            ),
            f"pairs per second, shared over whole: {cpu['median']:.2f} in CPU time ({cpu['lower']:.2f} to "
            f"{cpu['upper']:.2f}), {results['wall']['median']:.2f} in wall time; by token count "
            f"{results['by_count']:.2f}; the bar of {BAR} is {passed}",
        ]
    )


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file for the results")
    add_arguments(parser, PairSizes)
    arguments = vars(parser.parse_args(argv))
    out = arguments.pop("out")
    if arguments["rounds"] < 2:
        parser.error("--rounds must be at least 2, to compute quartiles.")
    sizes = PairSizes(**arguments)
    if sizes.prompt_tokens <= MEDIA_TOKENS + _AROUND or sizes.answer_tokens < 2:
        parser.error(f"--prompt-tokens must be above {MEDIA_TOKENS + _AROUND} and --answer-tokens at least 2.")
    torch.set_num_threads(1)
    about = {"command": " ".join(["python benchmarks/shared_prompt.py", *argv]), **surroundings()}
    with tempfile.TemporaryDirectory() as folder:
        results = {**about, "sizes": asdict(sizes), "by_count": sizes.by_count, **compare(Path(folder), sizes)}
    shutdown()
    print(report(results, sizes))
    if out:
        Path(out).write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
