"""Image alignment of a frozen Llama-3 8B (random weights): CLIP ViT-L and ViT-G, resamplers of 6 and 12 layers with 64
tokens, packs of 4096 and 8192 tokens, bf16 and FP8; compared with transformers and with megatron-core alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from command import Benchmark, run

BENCHMARK = Benchmark(
    name="alignment_8b",
    job="pretrain",
    llama="8b",
    encoder=("vit_l", "vit_g"),
    resampler_layers=(6, 12),
    seq_length=(4096, 8192),
    precision=("bf16", "fp8"),
    packs=4,
)


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    return run(BENCHMARK, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
