"""Image alignment of a frozen Llama-3 70B, all 80 layers, on one GPU (with random weights): Llama weights in FP8 only,
CLIP ViT-G, a resampler of 12 layers; compared with megatron-core alone. Measures whether it fits, and its speed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from command import Benchmark, run

BENCHMARK = Benchmark(
    name="alignment_70b_fp8",
    job="pretrain",
    llama="70b",
    encoder=("vit_g",),
    resampler_layers=(12,),
    seq_length=(4096,),
    precision=("fp8_primary",),
    packs=2,
    recompute=("mlp", "full"),
    sides=("ours", "bare", "media"),
    left_out=(
        (
            "huggingface",
            "its weights need 141 GB in bf16: with a step's activations, they do not fit on a GPU of 141 GB",
        ),
    ),
)


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    return run(BENCHMARK, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
