"""Conservative DPO of a Llama-3 8B with images (random weights): continues LoRA of rank 8 on all linear layers, with a
frozen copy as the reference, run in every step; compared with transformers and peft, and with megatron-core's frozen
Llama without adapters, which runs an additional forward pass for the reference.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from command import Benchmark, run

BENCHMARK = Benchmark(
    name="dpo_8b",
    job="dpo",
    llama="8b",
    encoder=("vit_l",),
    resampler_layers=(6,),
    seq_length=(4096,),
    precision=("bf16", "fp8"),
    packs=4,
)


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    return run(BENCHMARK, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
