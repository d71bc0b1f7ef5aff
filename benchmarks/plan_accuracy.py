"""Compare the layout plan's step times with published figures.

    PYTHONPATH=.:tests python benchmarks/plan_accuracy.py --out results.json

The time model on H100 against Megatron-LM's weak-scaling table (README, images/model_table.png: GPT, sequences of
4,096, bf16; its feed-forward of 4 h is taken as a gated one of 8/3 h, and no virtual pipeline is assumed) and against
Megatron-Bridge's rows for Llama 3 (docs/performance-summary.md, container 25.11, FP8, sequences of 8,192).
plan_ranking.py compares predictions with steps measured on this machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from measuring import surroundings

from megatron_anymal.config import DistributedDataParallelConfig, RunConfig
from megatron_anymal.model.llama_shape import read_llama_config
from megatron_anymal.model.memory.sizes import Recompute
from megatron_anymal.planning.layouts.enumeration import Layout
from megatron_anymal.planning.layouts.hardware import load_hardware
from megatron_anymal.planning.layouts.search import LayoutProblem
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
    problem = LayoutProblem(config, read_llama_config(lm), load_hardware("h100-80gb"), work, [], 10**15)
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


def main(argv: list[str]) -> int:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file for the results")
    arguments = parser.parse_args(argv)
    rows = published()
    for row in rows:
        print(f"{row.name:<28} {row.published:>8.3f}s {row.predicted:>8.3f}s {row.error:>+7.1%}")
    mean = sum(abs(row.error) for row in rows) / len(rows)
    print(f"mean absolute error {mean:.1%}")
    if arguments.out:
        against = {"rows": [{**asdict(row), "error": row.error} for row in rows], "mean_error": mean}
        results = {"surroundings": surroundings(), "published": against}
        Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
