"""The peak rate that a run's utilization is a share of: that of the GPU in `trainer.gpu`, or a measured one."""

from __future__ import annotations

from typing import Optional

import torch

from megatron_anymal import backend
from megatron_anymal.planning.layouts.hardware import load_hardware, number_format
from megatron_anymal.planning.layouts.measurement import product_rate
from megatron_anymal.train.utilization import Peak

# Rows, columns and depth of the product that is measured: 1.1e12 operations.
_SIZE = 8192


def peak_of_run(gpu: str, fp8: str, precision: str, device: torch.device) -> Optional[Peak]:
    """Return the peak of one GPU: the data sheet's rate of dense products if `trainer.gpu` is set, else the measured
    rate of a large product, which takes 0.1 s; None on a CPU without `trainer.gpu`, and if the GPU has no such rate.

    Args:
        gpu: `trainer.gpu`.
        fp8: `model.fp8`.
        precision: `trainer.precision`.
        device: of this rank.

    Raises:
        ConfigError: there is no such GPU.
    """
    plain = number_format("", precision)
    if gpu:
        hardware, layers = load_hardware(gpu, "trainer.gpu"), number_format(fp8, precision)
        peak = Peak(hardware.peak(layers), hardware.peak(plain), f"{layers}, trainer.gpu={gpu}")
        return peak if peak.layers and peak.encoders else None
    return measured_peak(device, precision, _SIZE) if device.type == "cuda" else None


def measured_peak(device: torch.device, precision: str, size: int) -> Peak:
    """Measure a product of square matrices in the precision of the run, for layers and encoders alike.

    Args:
        precision: `trainer.precision`.
        size: rows of the matrices.
    """
    rate = product_rate(size, size, size, device, backend.compute_dtype(precision))
    return Peak(rate, rate, f"a product of {size} x {size} {number_format('', precision)} matrices, measured")
