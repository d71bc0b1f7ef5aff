"""Compare the layout plan's step times with published figures, and its ranking with measured steps.

    PYTHONPATH=.:tests python benchmarks/plan_accuracy.py --published
    PYTHONPATH=.:tests python benchmarks/plan_accuracy.py --measured --out results.json

`--published`: the time model on H100 against Megatron-LM's weak-scaling table (README, images/model_table.png: GPT,
sequences of 4,096, bf16; its feed-forward of 4 h is taken as a gated one of 8/3 h, and no virtual pipeline is assumed)
and against Megatron-Bridge's rows for Llama 3 (docs/performance-summary.md, container 25.11, FP8, sequences of 8,192).

`--measured`: one tiny model under 25 layouts of up to four gloo processes. Each layer sleeps, as long as its share of
the tokens is large, so that the schedule and not this machine decides; a collective between layers takes the latency
that `anymal plan --measure` finds. The ranks of predicted and measured times are compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import surroundings

from megatron_anymal.config import DistributedDataParallelConfig, RunConfig
from megatron_anymal.model.llama_shape import read_llama_config
from megatron_anymal.model.memory.run_sizes import chunks_of_stages
from megatron_anymal.model.memory.sizes import Recompute
from megatron_anymal.planning.layouts.enumeration import Layout
from megatron_anymal.planning.layouts.hardware import load_hardware
from megatron_anymal.planning.layouts.measurement import collective_rate
from megatron_anymal.planning.layouts.search import Problem
from megatron_anymal.planning.layouts.simulation import simulate
from megatron_anymal.planning.layouts.step_time import step_time
from megatron_anymal.planning.layouts.workload import assumed_workload

# Megatron-LM: billions of parameters, heads, hidden size, layers, tensor, pipeline, GPUs, sequences, TFLOP/s per GPU.
WEAK_SCALING = (
    (1.7, 16, 2048, 24, 1, 1, 48, 192, 408.8),
    (7.1, 32, 4096, 30, 2, 1, 96, 192, 465.9),
    (16, 48, 6144, 32, 4, 1, 192, 192, 489.1),
    (32, 56, 7168, 48, 8, 1, 384, 192, 459.6),
    (70, 64, 8192, 84, 8, 2, 768, 384, 419.7),
    (119, 80, 10240, 92, 8, 4, 1536, 768, 420.5),
    (177, 96, 12288, 96, 8, 6, 2304, 1152, 432.8),
    (314, 128, 16384, 96, 8, 8, 3072, 1536, 474.4),
    (462, 144, 18432, 112, 8, 16, 6144, 3072, 459.9),
)
LLAMA_8B = (4096, 14336, 32, 32, 8)
LLAMA_70B = (8192, 28672, 80, 64, 8)
LLAMA_405B = (16384, 53248, 126, 128, 8)
# Megatron-Bridge: name, shape, tensor, pipeline, chunks, context, first and last stage, GPUs, sequences, tokens/s/GPU.
BRIDGE = (
    ("Llama-3 8B", LLAMA_8B, 1, 1, 1, 1, 8, 128, 14451),
    ("Llama-3 70B", LLAMA_70B, 4, 8, 5, 1, 64, 128, 1602),
)


@dataclass(frozen=True)
class Compared:
    """A published step and its prediction, in seconds."""

    name: str
    published: float
    predicted: float

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.published - 1


def predicted_seconds(
    shape: tuple[int, int, int, int, int], vocabulary: int, length: int, sequences: int, gpus: int, layout: Layout
) -> float:
    """Predict a pre-training step of a Llama-like model.

    Args:
        shape: hidden size, feed-forward, layers, heads, key/value heads.
        length: tokens of a sequence.
    """
    config = RunConfig()
    config.trainer.devices, config.trainer.num_nodes = 8, gpus // 8
    config.model.global_batch_size, config.data.seq_length = sequences, length
    lm = config.model.language_model
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    lm.config, lm.freeze = {**dict(zip(names, shape)), "vocab_size": vocabulary, "tie_word_embeddings": False}, False
    config.model.ddp = DistributedDataParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True)
    work = assumed_workload(config.model, length)
    problem = Problem(config, read_llama_config(lm), load_hardware("h100-80gb"), work, [], 10**15)
    return step_time(problem.inputs(layout), Recompute()).seconds


def published() -> list[Compared]:
    """Compare with both tables."""
    rows = []
    for billions, heads, hidden, layers, tensor, pipeline, gpus, sequences, rate in WEAK_SCALING:
        # Megatron-LM's count (megatron/training/training.py): all of attention's square, and no recomputation.
        operations = 12 * sequences * 4096 * layers * hidden**2 * (6 + 4096 / hidden + 131072 / (2 * layers * hidden))
        layout = Layout(tensor, tensor > 1, pipeline, 1, 1, 0, 0, "", False)
        shape = (hidden, -(-8 * hidden // 3 // 64) * 64, layers, heads, heads)
        predicted = predicted_seconds(shape, 131072, 4096, sequences, gpus, layout)
        rows.append(Compared(f"GPT {billions}B on {gpus:,} H100", operations / (rate * 1e12 * gpus), predicted))
    for name, shape, tensor, pipeline, chunks, context, gpus, sequences, rate in BRIDGE:
        layout = Layout(tensor, tensor > 1, pipeline, chunks, context, 0, 0, "hybrid", False)
        predicted = predicted_seconds(shape, 128256, 8192, sequences, gpus, layout)
        rows.append(Compared(f"{name} on {gpus} H100, FP8", sequences * 8192 / (rate * gpus), predicted))
    return rows


# Seconds that a layer sleeps in its forward pass over a whole micro-batch; its backward pass takes twice as long.
DELAY = 0.015
LAYERS = 8
# Processes, tensor, sequence parallel, pipeline, chunks, context, first and last stage, recomputed layers per chunk.
MEASURED = (
    (1, 1, False, 1, 1, 1, 0, 0, 0),
    (1, 1, False, 1, 1, 1, 0, 0, 8),
    (2, 1, False, 1, 1, 1, 0, 0, 0),
    (2, 2, False, 1, 1, 1, 0, 0, 0),
    (2, 1, False, 2, 1, 1, 0, 0, 0),
    (2, 1, False, 2, 2, 1, 0, 0, 0),
    (2, 1, False, 2, 1, 1, 2, 0, 0),
    (2, 1, False, 2, 1, 1, 0, 0, 4),
    (2, 1, False, 1, 1, 2, 0, 0, 0),
    (4, 1, False, 1, 1, 1, 0, 0, 0),
    (4, 2, False, 1, 1, 1, 0, 0, 0),
    (4, 2, True, 1, 1, 1, 0, 0, 0),
    (4, 1, False, 2, 1, 1, 0, 0, 0),
    (4, 1, False, 2, 2, 1, 0, 0, 0),
    (4, 1, False, 2, 4, 1, 0, 0, 0),
    (4, 1, False, 2, 1, 1, 3, 0, 0),
    (4, 1, False, 2, 1, 1, 1, 0, 0),
    (4, 1, False, 4, 1, 1, 0, 0, 0),
    (4, 1, False, 4, 1, 1, 1, 1, 0),
    (4, 1, False, 4, 2, 1, 0, 0, 0),
    (4, 1, False, 4, 1, 1, 0, 0, 2),
    (4, 2, False, 2, 1, 1, 0, 0, 0),
    (4, 2, False, 2, 2, 1, 0, 0, 0),
    (4, 1, False, 1, 1, 2, 0, 0, 0),
    (4, 1, False, 2, 1, 2, 0, 0, 0),
)


def laid_out(config: RunConfig, values: tuple[Any, ...]) -> RunConfig:
    """Apply a layout of MEASURED."""
    config.trainer.devices, *sizes, recomputed = values
    layout = Layout(*sizes, "", False)
    config.model = layout.applied(config.model)
    if recomputed:
        config.model.recompute_granularity, config.model.recompute_method = "full", "block"
        config.model.recompute_num_layers = recomputed
    return config


def timed_step(config: RunConfig, steps_timed: int) -> tuple[int, float]:
    """Micro-batches per step, and seconds of this rank's fastest step, with layers that sleep."""
    from megatron_anymal.data.loader import steps
    from megatron_anymal.parallel import initialize
    from megatron_anymal.train.build import build
    from megatron_anymal.train.step import train_step

    state = build(config, initialize(config))
    share = config.model.tensor_model_parallel_size * config.model.context_parallel_size

    def slow(module: Any, given: Any, output: Any) -> None:
        time.sleep(DELAY / share)
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: time.sleep(2 * DELAY / share))

    for model in state.models:
        for layer in model.language_model.decoder.layers:
            layer.register_forward_hook(slow)
    data, taken = state.train_data, []
    replica = state.layout.data_rank
    planned = steps(
        data.planner, data.reader, replica=replica, start=0, stop=steps_timed, num_workers=0, prefetch_steps=1
    )
    for plan, batches in planned:
        begun = time.perf_counter()
        train_step(state, plan, batches)
        taken.append(time.perf_counter() - begun)
    return len(batches), min(taken)


def predicted_slow_step(config: RunConfig, micro_batches: int, recomputed: int, latency: float) -> float:
    """Seconds that the simulated schedule sleeps and waits for collectives.

    Args:
        latency: seconds of the start of a collective between two ranks.
    """
    model = config.model
    tensor, context = model.tensor_model_parallel_size, model.context_parallel_size
    # Per layer and pass: two all-reduces, or two gathers and two scatters; one gather of keys and values.
    collectives = 4 * (tensor > 1) + (context > 1)
    one, waits = DELAY / (tensor * context), collectives * latency
    stages = chunks_of_stages(model, read_llama_config(model.language_model))

    def passes(layers: int) -> tuple[float, float]:
        forward = one + waits
        return layers * forward, layers * (2 * one + waits) + min(recomputed, layers) * forward

    times = [[passes(len(chunk.layers)) for chunk in chunks] for chunks in stages]
    return simulate(times, micro_batches, latency).seconds


def measured(number: int, steps_timed: int) -> list[dict[str, Any]]:
    """Run and predict the first `number` layouts."""
    import tiny
    from ranks import run_ranks

    rows, (_, latency) = [], collective_rate(torch.device("cpu"))
    print(f"a collective takes {1000 * latency:.2f} ms")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tiny.make_tokenizer(Path(folder) / "tokenizer")
        shards = tiny.make_shards(Path(folder) / "text", tokenizer, 24, ("text",))
        for values in MEASURED[:number]:
            config = tiny.make_config(shards, tokenizer, Path(folder) / "run")
            config.model.language_model.config["num_hidden_layers"] = LAYERS
            config.model.language_model.freeze, config.model.modalities = False, {}
            config.model.global_batch_size, config.data.seq_length = 16, 12
            config = laid_out(config, values)
            found = run_ranks(values[0], timed_step, config, steps_timed)
            micro_batches, seconds = found[0][0], max(taken for _, taken in found)
            predicted = predicted_slow_step(config, micro_batches, values[-1], latency)
            name = f"{values[0]} processes, {Layout(*values[1:8], '', False)}, recompute {values[-1]}"
            rows.append({"layout": name, "micro_batches": micro_batches, "measured": seconds, "predicted": predicted})
            print(f"{name:<50} {micro_batches:>3} {predicted:>8.3f} {seconds:>8.3f}", flush=True)
    return rows


def rank_correlation(rows: list[dict[str, Any]]) -> float:
    """Spearman's rank correlation of predicted and measured seconds; equal values share their mean rank."""

    def ranks(key: str) -> list[float]:
        values = [row[key] for row in rows]
        return [
            sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2
            for value in values
        ]

    a, b = ranks("predicted"), ranks("measured")
    mean = (len(rows) - 1) / 2
    covariance = sum((x - mean) * (y - mean) for x, y in zip(a, b))
    spread = (sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b)) ** 0.5
    return covariance / spread


def main(argv: list[str]) -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", action="store_true", help="compare with published figures")
    parser.add_argument("--measured", action="store_true", help="compare with layouts that run here")
    parser.add_argument("--layouts", type=int, default=len(MEASURED), help="number of layouts to run")
    parser.add_argument("--steps", type=int, default=3, help="steps of each; the fastest counts")
    parser.add_argument("--out", help="file for the results")
    arguments = parser.parse_args(argv)
    results: dict[str, Any] = {"surroundings": surroundings()}
    if arguments.published:
        rows = published()
        for row in rows:
            print(f"{row.name:<28} {row.published:>8.3f}s {row.predicted:>8.3f}s {row.error:>+7.1%}")
        mean = sum(abs(row.error) for row in rows) / len(rows)
        print(f"mean absolute error {mean:.1%}")
        results["published"] = {"rows": [{**asdict(row), "error": row.error} for row in rows], "mean_error": mean}
    if arguments.measured:
        timed = measured(arguments.layouts, arguments.steps)
        correlation = rank_correlation(timed)
        pipelines = [row for row in timed if "TP1 " in row["layout"] and "CP1," in row["layout"]]
        alone = rank_correlation(pipelines)
        print(f"rank correlation over {len(timed)} layouts: {correlation:.3f}; without tensor and context: {alone:.3f}")
        results["measured"] = {"rows": timed, "rank_correlation": correlation, "pipelines": len(pipelines)}
        results["measured"]["rank_correlation_of_pipelines"] = alone
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
