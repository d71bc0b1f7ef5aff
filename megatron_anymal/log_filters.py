"""Filters for library messages that are irrelevant to users of this trainer, matched by source and text.

Errors and messages of this package are never hidden, nor is any message that is not listed here.
"""

from __future__ import annotations

import logging
import re
import warnings
from dataclasses import dataclass

# Warnings: beginning of the message, and the module that issues it (both regular expressions).
_WARNINGS = (
    # Issued once per module of megatron-core; `anymal doctor` shows what is missing and what that costs.
    (r"(Transformer Engine and Apex are|Apex is) not installed\. Falling back", r"megatron\.core\."),
    # About calls from megatron-core into torch, which this trainer does not make itself.
    (r"full scope is deprecated", r"megatron\.core\."),
    (r"`load_state_dict` is deprecated and will be removed in future versions", r"megatron\.core\."),
    # megatron-core 0.19: every rank plans by itself what it reads, and asks torch for exactly that (`no_dist=True`).
    (r"The argument order of load has been changed", r"torch\.distributed\.checkpoint\."),
    (r"torch\.distributed is disabled, .* assuming the intent is to load in", r"torch\.distributed\.checkpoint\."),
    # The distributed optimizer looks for a gradient on its views of the weights. Without a GPU, the call goes through
    # the shim.
    (r"The \.grad attribute of a Tensor that is not a leaf", r"megatron(\.core\.optimizer|_anymal\.cpu_shim)"),
    (r"Please use DTensor instead and we are deprecating ShardedTensor", r"torch\.distributed\.checkpoint\."),
)
# Log records below ERROR: logger, message (a regular expression).
_RECORDS = (
    # megatron-core 0.19: its classes for other layers have no specification without Transformer Engine.
    ("megatron.core.models.gpt.gpt_model", r"GPTModel IS DEPRECATED\."),
    # It then computes the layout as the caller is asked to.
    ("megatron.core.distributed.distributed_data_parallel", r"DistributedDataParallel: full_param_layout not provided"),
    # Both lines read the file that holds the state of a checkpoint which is not sharded.
    ("megatron.core.dist_checkpointing.strategies.common", r"load_common is deprecated"),
    # megatron-core imports this module for code that is built at its first use. With torch's build for CUDA, the module
    # reports a toolkit (nvcc) on a machine without a GPU, such as a login node.
    ("torch.utils.cpp_extension", r"No CUDA runtime is found, using CUDA_HOME="),
    # Lightning's Trainer only holds the loggers: the devices it reports are not those of the run.
    ("lightning.pytorch.utilities.rank_zero", r"(GPU|TPU|HPU) available: "),
    # NeMo's telemetry service, which is not used.
    ("nv_one_logger.api.config", r"OneLogger: Setting error_handling_strategy"),
    ("nv_one_logger.training_telemetry.api.training_telemetry_provider", r"No exporters were provided"),
    # It looks for the tokenizer class in the config.json of an exported folder; the tokenizer's own file names it.
    ("transformers.configuration_utils", r"You are using a model of type `anymal` to instantiate a model of type ``"),
    # Where torch is kept out (lean_imports.hide_torch).
    ("transformers", r"PyTorch was not found"),
    # It looks at import for a kernel of a fused product, which this trainer does not call.
    ("bitsandbytes.backends.cpu.ops", r"Failed to load CPU gemm_4bit_forward"),
    # Every loader process connects to an object store; only what is missing matters.
    ("botocore.credentials", r"Found credentials "),
    ("aiobotocore.credentials", r"Found credentials "),
    ("botocore.configprovider", r"Found endpoint for "),
    # A restarted run continues in its folder.
    ("nemo_logger", r"Exp_manager is logging to .*, but it already exists"),
)


@dataclass(frozen=True)
class _Without:
    """A logging filter that drops records by message; a logger adds equal filters only once."""

    message: str

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is shown."""
        return record.levelno >= logging.ERROR or not re.match(self.message, record.getMessage())


def quiet_libraries() -> None:
    """Install the filters. Call it before the libraries are imported, since some warn at import."""
    for message, module in _WARNINGS:
        warnings.filterwarnings("ignore", message=message, module=module)
    for name, message in _RECORDS:
        logging.getLogger(name).addFilter(_Without(message))
