"""For findings about megatron-core on a machine without a GPU: work for "cuda" is done by the CPU, over gloo.

Import this module before megatron. With a GPU it changes nothing.
"""

import os
import socket

import torch
from torch.overrides import TorchFunctionMode


class OnCPU(TorchFunctionMode):
    """Creates tensors that are asked for on "cuda" on the CPU, and reports the types of CPU tensors as CUDA's."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            return function(*args).replace("torch.", "torch.cuda.")
        if "device" in kwargs and "cuda" in str(kwargs["device"]):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def one_process():
    """Names a job of one process for torch.distributed, on a port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}


if not torch.cuda.is_available():
    OnCPU().__enter__()
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.set_device = lambda *_: None
