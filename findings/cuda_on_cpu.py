"""For findings about megatron-core without a GPU: what it does on "cuda" happens on the CPU, over gloo.

Import it before torch and megatron. GPUs of the machine are not used.
"""

import os
import socket

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from torch.overrides import TorchFunctionMode


class OnCPU(TorchFunctionMode):
    """Creates tensors that are asked for on "cuda" on the CPU, and reports the types of CPU tensors as CUDA's."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            return function(*args).replace("torch.", "torch.cuda.")
        if function is torch.Tensor.cuda:
            return args[0]
        if "device" in kwargs and "cuda" in str(kwargs["device"]):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def one_process():
    """Describes a job of one process to torch.distributed, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}


OnCPU().__enter__()
torch.cuda.current_device = lambda: torch.device("cpu")
torch.cuda.synchronize = lambda *_: None
torch.cuda.manual_seed = lambda seed: None
torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
torch.cuda._lazy_call = lambda *_, **__: None
