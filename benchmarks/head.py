"""Measure savings with a frozen Llama: output layer on labelled positions only, chunked logits, no backward for text.

    python benchmarks/head.py --out results.json

The floor is megatron-core's own output layer: logits of every position, kept for its vocabulary-parallel cross-entropy.
First, losses and gradients of each variant are compared with torch's cross-entropy of all logits in fp64 (megatron-core
rounds to fp32); then the variants alternate in fp32, and the peak memory of each is measured. The backward pass of a
text-only pack is measured in a run of this trainer (anymal_side.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from anymal_side import StepSizes, make_config, write_data
from measuring import PeakMemory, add_arguments, ratio, surroundings, take_turns
from torch import Tensor

from megatron_anymal.config import RunConfig
from megatron_anymal.data.micro_batch import MicroBatch
from megatron_anymal.model import lm_head
from megatron_anymal.model.anymal import AnyMALModel
from megatron_anymal.model.llama import build_gpt, transformer_config
from megatron_anymal.model.llama_shape import read_llama_config
from megatron_anymal.parallel import initialize, shutdown
from megatron_anymal.train.build import TrainState, build


@dataclass(frozen=True)
class HeadSizes:
    """Shapes and repetitions; every field is an argument of the command."""

    hidden: int = 512
    """Hidden size of the Llama."""
    vocabulary: int = 32_768
    """Size of the vocabulary."""
    tokens: int = 2048
    """Positions, with and without a label."""
    label_every: int = 4
    """One position in this many has a label: soft tokens, prompts and padding have none."""
    chunk: int = 1 << 22
    """Logits per chunk of the chunked variant."""
    warm_up: int = 1
    """Rounds before the timed ones."""
    rounds: int = 7
    """Timed rounds, at least 2."""


class Head:
    """A frozen output layer and its input hidden states."""

    def __init__(self, sizes: HeadSizes, dtype: torch.dtype):
        config = RunConfig()
        config.trainer.precision, config.data.tokenizer = "32", "unused"
        config.model.transformer_impl = "local"
        config.model.language_model.config = {
            "vocab_size": sizes.vocabulary,
            "hidden_size": sizes.hidden,
            "intermediate_size": 16,
            "num_attention_heads": 4,
            "num_hidden_layers": 1,
            "tie_word_embeddings": False,
        }
        initialize(config)
        llama = read_llama_config(config.model.language_model)
        settings = transformer_config(config.model, config.trainer.precision, llama)
        self.gpt = build_gpt(llama, settings, "local").to(dtype).requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        weight: Any = self.gpt.output_layer.weight
        weight.copy_(torch.randn(weight.shape, generator=generator, dtype=dtype) * 0.02)
        self.hidden = torch.randn(sizes.tokens, 1, sizes.hidden, generator=generator, dtype=dtype).requires_grad_()
        self.labels = torch.randint(sizes.vocabulary, (1, sizes.tokens), generator=generator)
        self.where = torch.arange(0, sizes.tokens, sizes.label_every)
        self.vocabulary, self.chunk = sizes.vocabulary, sizes.chunk

    def plain(self) -> Tensor:
        """Compute torch's cross-entropy of all logits."""
        logits = self.hidden[:, 0] @ self.gpt.output_layer.weight.T
        return self._learn(F.cross_entropy(logits, self.labels[0], reduction="none")[None])

    def floor(self) -> Tensor:
        """Compute megatron-core's output layer and loss."""
        logits, _ = self.gpt.output_layer(self.hidden)
        return self._learn(self.gpt.compute_language_model_loss(self.labels, logits))

    def labelled(self) -> Tensor:
        """Compute labelled positions only, with all logits at once."""
        return self._ours(1 << 62)

    def chunked(self) -> Tensor:
        """Compute labelled positions only, with logits in chunks."""
        return self._ours(self.chunk)

    def _ours(self, chunk: int) -> Tensor:
        lm_head.CHUNK_ELEMENTS = chunk
        return self._learn(lm_head.label_losses(self.gpt, self.hidden, self.labels, self.where, self.vocabulary))

    def _learn(self, losses: Tensor) -> Tensor:
        self.hidden.grad = None
        losses[0, self.where].mean().backward()
        return losses.detach()[0, self.where]

    def ways(self) -> dict[str, Callable[[], Tensor]]:
        """All variants, the floor first."""
        return {"megatron-core": self.floor, "labels only": self.labelled, "labels only, chunked": self.chunked}


def compare_heads(sizes: HeadSizes) -> dict[str, Any]:
    """Compare the variants: differences in fp64, seconds and peak bytes in fp32."""
    exact = Head(sizes, torch.float64)
    truth = exact.plain(), exact.hidden.grad
    answers = {name: (way(), exact.hidden.grad) for name, way in exact.ways().items()}
    fast = Head(sizes, torch.float32)
    turns = take_turns({n: lambda _, way=w: way() for n, w in fast.ways().items()}, sizes.rounds, sizes.warm_up)
    results = {}
    for name, way in fast.ways().items():
        with PeakMemory() as memory:
            way()
        results[name] = {
            "loss_difference": apart(answers[name][0], truth[0]),
            "gradient_difference": apart(answers[name][1], truth[1]),
            "seconds": statistics.median(turns[name].wall),
            "over_floor": asdict(ratio(turns[name].wall, turns["megatron-core"].wall)),
            "cpu_over_floor": asdict(ratio(turns[name].cpu, turns["megatron-core"].cpu)),
            "peak_bytes": memory.peak,
        }
    return results


def apart(mine: Any, other: Any) -> float:
    """Largest absolute difference, relative to the largest value."""
    return float((mine - other).abs().max() / other.abs().max())


@contextmanager
def always_backward() -> Any:
    """Run the backward pass for every pack, even if it has no gradient."""
    original = AnyMALModel._has_gradient
    AnyMALModel._has_gradient = lambda self, micro_batch: True  # type: ignore[method-assign]
    try:
        yield
    finally:
        AnyMALModel._has_gradient = original  # type: ignore[method-assign]


def text_only(state: TrainState) -> MicroBatch:
    """A pack of the run with its media removed."""
    planned = state.train_data.planner.plan(0).of_replica(0)[0]
    read = state.train_data.reader[planned]
    samples = tuple(replace(sample, media=()) for sample in planned.samples)
    return replace(read, plan=replace(planned, samples=samples), media={})


def compare_backward(sizes: HeadSizes) -> dict[str, Any]:
    """Compare a text-only pack under a frozen Llama with and without its backward pass."""
    with tempfile.TemporaryDirectory() as folder:
        shapes = StepSizes(hidden=sizes.hidden)
        write_data(Path(folder), shapes)
        config = make_config(Path(folder), shapes, freeze=True)
        state = build(config, initialize(config))
        pack = text_only(state)
    wrapped = state.wrapped[0]

    def learn() -> tuple[Tensor, Tensor]:
        wrapped.zero_grad_buffer()
        losses = wrapped(pack, labels=pack.labels)
        losses.mean().backward()
        return losses.detach(), torch.cat([buffer.grad_data.flatten() for buffer in wrapped.buffers])

    def made() -> tuple[Tensor, Tensor]:
        with always_backward():
            return learn()

    turns = take_turns({"made": lambda _: made(), "skipped": lambda _: learn()}, sizes.rounds, sizes.warm_up)
    (losses, gradient), (same_losses, same_gradient) = made(), learn()
    with PeakMemory() as skipped:
        learn()
    with PeakMemory() as whole:
        made()
    return {
        "losses_equal": torch.equal(losses, same_losses),
        "gradients_equal": torch.equal(gradient, same_gradient),
        "largest_gradient": float(gradient.abs().max()),
        "seconds": {name: statistics.median(turn.wall) for name, turn in turns.items()},
        "skipped_over_made": asdict(ratio(turns["skipped"].wall, turns["made"].wall)),
        "cpu_skipped_over_made": asdict(ratio(turns["skipped"].cpu, turns["made"].cpu)),
        "peak_bytes": {"made": whole.peak, "skipped": skipped.peak},
    }


def report(results: dict[str, Any]) -> str:
    """Format the results as text."""
    sizes, heads, backward = results["sizes"], results["heads"], results["backward"]
    floor = heads["megatron-core"]
    lines = [
        f"{results['date']}; {results['machine']}; {results['threads']} threads; load before: {results['load']:.1f}",
        f"{sizes['tokens']} positions of width {sizes['hidden']}, one in {sizes['label_every']} with a label; "
        f"vocabulary {sizes['vocabulary']}; frozen output layer; forward and backward; differences in fp64",
        "",
        f"{'':<24}{'loss':>12}{'gradient':>12}{'seconds':>10}{'of floor':>10}{'CPU':>8}{'peak MiB':>10}{'of floor':>9}",
    ]
    for name, way in heads.items():
        lines.append(
            f"{name:<24}{way['loss_difference']:>12.1e}{way['gradient_difference']:>12.1e}{way['seconds']:>10.3f}"
            f"{way['over_floor']['median']:>10.2f}{way['cpu_over_floor']['median']:>8.2f}"
            f"{way['peak_bytes'] / 2**20:>10.1f}{way['peak_bytes'] / floor['peak_bytes']:>10.2f}"
        )
    peak = backward["peak_bytes"]
    equal = "bitwise equal" if backward["losses_equal"] and backward["gradients_equal"] else "NOT EQUAL"
    return "\n".join(
        [
            *lines,
            "",
            f"text-only pack: losses and gradients {equal} with and without its backward pass; skipping it takes "
            f"{backward['skipped_over_made']['median']:.2f} of the time "
            f"({backward['cpu_skipped_over_made']['median']:.2f} in CPU time) and "
            f"{peak['skipped'] / peak['made']:.2f} of the memory",
        ]
    )


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file for the results")
    add_arguments(parser, HeadSizes)
    arguments = vars(parser.parse_args(argv))
    out = arguments.pop("out")
    if arguments["rounds"] < 2:
        parser.error("--rounds must be at least 2, to compute quartiles.")
    sizes = HeadSizes(**arguments)
    results = {
        "command": " ".join(["python benchmarks/head.py", *argv]),
        **surroundings(),
        "sizes": asdict(sizes),
        "heads": compare_heads(sizes),
        "backward": compare_backward(sizes),
    }
    shutdown()
    print(report(results))
    if out:
        Path(out).write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
