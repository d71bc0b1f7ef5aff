"""Time of one kernel on one GPU, from its shape."""

from __future__ import annotations

import math
from functools import cache

from megatron_anymal.planning.layouts.hardware import Hardware

# Bytes per element of the factors of a product.
_FORMAT_BYTES = {"bf16": 2, "fp8": 1, "fp32": 4}
# Measured shapes that a rate is averaged over.
_NEAREST = 4


@cache
def matrix_seconds(gpu: Hardware, m: int, n: int, k: int, number_format: str = "bf16") -> float:
    """Seconds of a matrix product [m, k] x [k, n].

    The larger of its operations at the rate of its shape and of its bytes at the memory's rate (the roofline), plus the
    start of the kernel.

    Args:
        number_format: of the factors: bf16, fp8 or fp32.
    """
    if min(m, n, k) <= 0:
        return 0.0
    moved = _FORMAT_BYTES[number_format] * (m * k + k * n) + 2 * m * n
    computing = 2.0 * m * n * k / matrix_rate(gpu, m, n, k, number_format)
    return max(computing, moved / gpu.memory_rate) + 1e-6 * gpu.kernel_us


def matrix_rate(gpu: Hardware, m: int, n: int, k: int, number_format: str = "bf16") -> float:
    """Operations per second that a product's shape allows: as measured, or the best product's rate times the share of
    the multiprocessors that its tiles occupy and the share of K outside a tile's start and end."""
    if gpu.matrix_rates:
        return _interpolated(gpu, m, n, k)
    best = gpu.peak(number_format) * (gpu.fp8_matrix_share if number_format == "fp8" else gpu.bf16_matrix_share)
    return best * occupancy(gpu, m, n) * k / (k + gpu.matrix_ramp)


def occupancy(gpu: Hardware, m: int, n: int) -> float:
    """Share of the best rate that the multiprocessors keep for a result of m x n, with the tile that suits it best.

    Lost are tiles that reach over the edge and a last wave that does not fill the GPU. Halved tiles lose less of these,
    but load their factors more often (assumed: the 0.2nd power of the area).
    """
    rows, columns = gpu.tile
    halves = range(4)
    return max(
        _kept(gpu, m, n, max(1, rows >> i), max(1, columns >> j)) * 0.5 ** (0.2 * (i + j))
        for i in halves
        for j in halves
    )


def _kept(gpu: Hardware, m: int, n: int, rows: int, columns: int) -> float:
    tiles = -(-m // rows) * -(-n // columns)
    waves = -(-tiles // gpu.multiprocessors)
    return m * n / (rows * columns * waves * gpu.multiprocessors)


def _interpolated(gpu: Hardware, m: int, n: int, k: int) -> float:
    """Mean rate of the measured shapes nearest in the logarithms of the sizes, weighted by their nearness."""
    point = (math.log2(m), math.log2(n), math.log2(k))
    near = sorted(
        (math.dist(point, (math.log2(a), math.log2(b), math.log2(c))), rate) for a, b, c, rate in gpu.matrix_rates
    )[:_NEAREST]
    weights = [1.0 / (0.1 + distance) for distance, _ in near]
    return 1e12 * sum(w * rate for w, (_, rate) in zip(weights, near)) / sum(weights)


def attention_seconds(gpu: Hardware, operations: float, share: float, number_format: str) -> float:
    """Seconds of fused attention.

    Args:
        operations: floating-point operations that its causal mask leaves.
        share: of the peak that the kernel reaches.
        number_format: bf16 or fp32; attention does not compute in FP8.
    """
    peak = gpu.peak("fp32" if number_format == "fp32" else "bf16")
    return operations / (peak * share) + 1e-6 * gpu.kernel_us


def elementwise_seconds(gpu: Hardware, moved: float, kernels: int = 1) -> float:
    """Seconds of kernels that are bound by the memory.

    Args:
        moved: bytes read and written.
        kernels: number of kernels that move them.
    """
    return moved / gpu.memory_rate + 1e-6 * gpu.kernel_us * kernels
