"""Rank 25 layouts of one tiny model on up to four gloo processes by prediction and by measurement.

    PYTHONPATH=.:tests python benchmarks/plan_ranking.py --out results.json

Each layer sleeps in proportion to its share of the tokens, so that the schedule and not this machine decides. The
remaining costs of a layer, a collective and a message are measured separately, never on the layouts that are compared:
with one, two and four processes that compute at the same time, because four share two cores. Layouts and costs are
measured in turns, and the median over the turns counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed as dist
from measuring import surroundings
from ranks import run_ranks

from megatron_anymal.config import RunConfig
from megatron_anymal.model.llama_shape import read_llama_config
from megatron_anymal.model.memory.run_sizes import chunks_of_stages
from megatron_anymal.model.memory.sizes import PipelineChunk
from megatron_anymal.planning.layouts.enumeration import Layout
from megatron_anymal.planning.layouts.simulation import simulate

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
# Repetitions of a collective and of a message, and seconds between them: in training, computation lies between.
REPEATS, PAUSE = 60, 0.003


@dataclass(frozen=True)
class Costs:
    """Seconds on this machine while a number of processes compute at the same time.

    Attributes:
        forward: a layer's forward pass without its sleep.
        backward: the same for its backward pass.
        collective: a collective of two ranks that both enter it after a pause.
        message: a message between two ranks, likewise.
    """

    forward: float
    backward: float
    collective: float
    message: float


def laid_out(config: RunConfig, values: tuple[Any, ...]) -> RunConfig:
    """Apply a layout of MEASURED."""
    config.trainer.devices, *sizes, recomputed = values
    layout = Layout(*sizes, "", False)
    config.model = layout.applied(config.model)
    if recomputed:
        config.model.recompute_granularity, config.model.recompute_method = "full", "block"
        config.model.recompute_num_layers = recomputed
    return config


def timed_step(config: RunConfig, steps_timed: int, delay: float) -> tuple[int, float, float, float]:
    """Micro-batches per step, and seconds of this rank's fastest step and of its passes.

    Args:
        delay: seconds that a layer sleeps.
    """
    from megatron_anymal.data.loader import steps
    from megatron_anymal.parallel import initialize
    from megatron_anymal.train.build import build
    from megatron_anymal.train.step import train_step

    state = build(config, initialize(config))
    share = config.model.tensor_model_parallel_size * config.model.context_parallel_size

    def slow(module: Any, given: Any, output: Any) -> None:
        time.sleep(delay / share)
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: time.sleep(2 * delay / share))

    for model in state.models if delay else ():
        for layer in model.language_model.decoder.layers:
            layer.register_forward_hook(slow)
    data, taken = state.train_data, []
    planned = steps(
        data.planner, data.reader, replica=state.layout.data_rank, start=0, stop=steps_timed, num_workers=0,
        prefetch_steps=1,
    )  # fmt: skip
    for plan, batches in planned:
        state.pass_times.take()
        begun = time.perf_counter()
        train_step(state, plan, batches)
        seconds, passes = time.perf_counter() - begun, state.pass_times.take()
        taken.append((seconds, passes["forward_seconds"], passes["backward_seconds"]))
    return len(batches), *min(taken)


def pair_costs(config: RunConfig) -> tuple[float, float]:
    """Seconds of an all-reduce and of a message, in pairs of neighbours that are all active."""
    from megatron_anymal.parallel import initialize

    layout = initialize(config)
    pairs = [dist.new_group([first, first + 1]) for first in range(0, layout.world_size, 2)]
    pair, peer = pairs[layout.rank // 2], layout.rank ^ 1
    tensor = torch.zeros(12, 64)

    def message() -> None:
        if layout.rank < peer:
            dist.send(tensor, peer)
        else:
            dist.recv(tensor, peer)

    def extra(action: Any) -> float:
        """Median seconds of a pause and the action, less those of a pause."""
        both, alone = [], []
        for _ in range(REPEATS):
            for taken, then in ((both, action), (alone, None)):
                begun = time.perf_counter()
                time.sleep(PAUSE)
                if then is not None:
                    then()
                taken.append(time.perf_counter() - begun)
        return statistics.mean(both) - statistics.mean(alone)

    return extra(partial(dist.all_reduce, tensor, group=pair)), extra(message)


def measure_costs(config: RunConfig, processes: int) -> Costs:
    """Measure with a number of processes that all compute: replicas whose layers do not sleep, and pairs."""
    config = laid_out(config, (processes, 1, False, 1, 1, 1, 0, 0, 0))
    ranks = run_ranks(processes, timed_step, config, 6, 0.0)
    passes = LAYERS * ranks[0][0]
    forward, backward = (statistics.mean(row[at] for row in ranks) / passes for at in (2, 3))
    if processes == 1:
        return Costs(forward, backward, 0.0, 0.0)
    pairs = run_ranks(processes, pair_costs, config)
    return Costs(forward, backward, *(max(0.0, statistics.mean(values)) for values in zip(*pairs)))


def predicted_step(config: RunConfig, micro_batches: int, recomputed: int, costs: Costs) -> float:
    """Seconds of a step: the simulated schedule with the sleeps and the measured costs of what lies between."""
    model = config.model
    sleep = DELAY / (model.tensor_model_parallel_size * model.context_parallel_size)
    in_forward, in_backward = collectives_of_layer(config)
    forward = sleep + costs.forward + in_forward * costs.collective
    backward = 2 * sleep + costs.backward + in_backward * costs.collective
    tensor = model.tensor_model_parallel_size > 1

    def passes(chunk: PipelineChunk) -> tuple[float, float]:
        layers = len(chunk.layers)
        # Embedding: one sum. Head: maximum, sum of exponentials and target; one sum of its input's gradient.
        in_forward, in_backward = (chunk.first + 3 * chunk.last) * tensor, chunk.last * tensor
        repeated = min(recomputed, layers) * forward
        return (
            layers * forward + in_forward * costs.collective,
            layers * backward + in_backward * costs.collective + repeated,
        )

    stages = chunks_of_stages(model, read_llama_config(model.language_model))
    times = [[passes(chunk) for chunk in chunks] for chunks in stages]
    return simulate(times, micro_batches, costs.message).seconds


def collectives_of_layer(config: RunConfig) -> tuple[int, int]:
    """Collectives that a layer's forward and backward passes wait for.

    Tensor parallelism: a sum after each of two row-parallel layers, and two of gradients. With sequence parallelism
    each is a gather and a scatter, and the gather is repeated in the backward pass for the weight's gradient. Context
    parallelism: one gather of keys and values, one sum of their gradients.
    """
    model = config.model
    context = int(model.context_parallel_size > 1)
    if model.tensor_model_parallel_size == 1:
        return context, context
    return (4 + context, 6 + context) if model.sequence_parallel else (2 + context, 2 + context)


def measured(number: int, turns: int) -> dict[str, Any]:
    """Run and predict the first `number` layouts, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tiny.make_tokenizer(Path(folder) / "tokenizer")
        shards = tiny.make_shards(Path(folder) / "text", tokenizer, 24, ("text",))

        def configured() -> RunConfig:
            config = tiny.make_config(shards, tokenizer, Path(folder) / "run")
            config.model.language_model.config["num_hidden_layers"] = LAYERS
            config.model.language_model.freeze, config.model.modalities = False, {}
            config.model.global_batch_size, config.data.seq_length = 16, 12
            return config

        loads: list[float] = []
        costs: dict[int, list[Costs]] = {1: [], 2: [], 4: []}
        steps: list[list[float]] = [[] for _ in MEASURED[:number]]
        micro_batches = [0] * number
        for _ in range(turns):
            for processes, so_far in costs.items():
                so_far.append(measure_costs(configured(), processes))
            for at, values in enumerate(MEASURED[:number]):
                ranks = run_ranks(values[0], timed_step, laid_out(configured(), values), 3, DELAY)
                micro_batches[at] = ranks[0][0]
                steps[at].append(max(row[1] for row in ranks))
                loads.append(os.getloadavg()[0])
        typical = {
            processes: Costs(*(statistics.median(values) for values in zip(*(asdict(one).values() for one in so_far))))
            for processes, so_far in costs.items()
        }
        rows = []
        for values, taken, batches in zip(MEASURED, steps, micro_batches):
            predicted = predicted_step(laid_out(configured(), values), batches, values[-1], typical[values[0]])
            name = f"{values[0]} processes, {Layout(*values[1:8], '', False)}, recompute {values[-1]}"
            seconds = statistics.median(taken)
            rows.append({"layout": name, "micro_batches": batches, "measured": seconds, "predicted": predicted})
    costs_used = {str(processes): asdict(one) for processes, one in typical.items()}
    return {
        "rows": rows,
        "costs": costs_used,
        "turns": turns,
        "load": [min(loads), statistics.median(loads), max(loads)],
    }


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


def shortfall(rows: list[dict[str, Any]]) -> float:
    """How much slower the layout predicted to be fastest is than the one measured to be fastest, as a share."""
    chosen = min(rows, key=lambda row: float(row["predicted"]))
    return float(chosen["measured"]) / min(float(row["measured"]) for row in rows) - 1


def main(argv: list[str]) -> int:
    """Measure, predict and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layouts", type=int, default=len(MEASURED), help="number of layouts to run (default: %(default)s)"
    )
    parser.add_argument(
        "--turns", type=int, default=3, help="number of turns; the median counts (default: %(default)s)"
    )
    parser.add_argument("--out", help="JSON file for the results")
    arguments = parser.parse_args(argv)
    results = measured(arguments.layouts, arguments.turns)
    rows = results["rows"]
    for row in rows:
        print(f"{row['layout']:<50} {row['micro_batches']:>3} {row['predicted']:>8.3f} {row['measured']:>8.3f}")
    for processes, costs in results["costs"].items():
        print(f"{processes} process(es): " + ", ".join(f"{name} {1e3 * cost:.2f} ms" for name, cost in costs.items()))
    results["rank_correlation"] = rank_correlation(rows)
    pipelines = [row for row in rows if "TP1 " in row["layout"] and "CP1," in row["layout"]]
    results["pipelines"], results["rank_correlation_of_pipelines"] = len(pipelines), rank_correlation(pipelines)
    results["shortfall"] = shortfall(rows)
    print(
        f"rank correlation over {len(rows)} layouts: {results['rank_correlation']:.3f}; without tensor and context "
        f"parallelism: {results['rank_correlation_of_pipelines']:.3f}; the layout predicted to be fastest is "
        f"{results['shortfall']:.1%} slower than the fastest measured one; load {results['load'][1]:.1f} (median)"
    )
    if arguments.out:
        Path(arguments.out).write_text(json.dumps({"surroundings": surroundings(), **results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
