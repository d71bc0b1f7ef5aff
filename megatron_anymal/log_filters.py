"""Silences messages of libraries that tell the user of this trainer nothing, each by its source and its words.

Nothing of this package and no error is ever hidden; a message that is not listed here is shown.
"""

from __future__ import annotations

import logging
import re
import warnings
from dataclasses import dataclass

# Warnings: beginning of the message, the module that gives it (both regular expressions).
_WARNINGS = (
    # Given once for each of megatron-core's modules; `anymal doctor` says what is missing and what that costs.
    (r"(Transformer Engine and Apex are|Apex is) not installed\. Falling back", r"megatron\.core\."),
    # Between megatron-core and torch, about calls that are not this trainer's.
    (r"full scope is deprecated", r"megatron\.core\."),
    (r"`load_state_dict` is deprecated and will be removed in future versions", r"megatron\.core\."),
    (r"Please use DTensor instead and we are deprecating ShardedTensor", r"megatron_anymal\.cpu_shim"),
)
# Log records below ERROR: logger, message (a regular expression).
_RECORDS = (
    # Lightning's Trainer only carries the loggers: the devices it talks of are not those of the run.
    ("lightning.pytorch.utilities.rank_zero", r"(GPU|TPU|HPU) available: "),
    # NeMo's telemetry service, which is not used.
    ("nv_one_logger.api.config", r"OneLogger: Setting error_handling_strategy"),
    ("nv_one_logger.training_telemetry.api.training_telemetry_provider", r"No exporters were provided"),
    # It looks for the tokenizer's class in an exported folder's config.json; the tokenizer's own file names it.
    ("transformers.configuration_utils", r"You are using a model of type `anymal` to instantiate a model of type ``"),
    # A run that is started again continues in its folder.
    ("nemo_logger", r"Exp_manager is logging to .*, but it already exists"),
)


@dataclass(frozen=True)
class _Without:
    """A logging filter that drops records with certain messages; equal ones are added to a logger only once."""

    message: str

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is shown."""
        return record.levelno >= logging.ERROR or not re.match(self.message, record.getMessage())


def quiet_libraries() -> None:
    """Install the filters; before the libraries are imported, since some warn at import."""
    for message, module in _WARNINGS:
        warnings.filterwarnings("ignore", message=message, module=module)
    for name, message in _RECORDS:
        logging.getLogger(name).addFilter(_Without(message))
