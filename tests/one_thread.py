"""Set on import: one thread per process, whatever the caller's environment says.

Another summation order changes the last digits, and several processes share two cores. Child processes inherit it.
"""

from __future__ import annotations

import os

import torch

os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
