"""An exported model as a chat model of lmms-eval: `lmms-eval --model anymal --model_args pretrained=FOLDER`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch

from megatron_anymal.config import ConfigError
from megatron_anymal.generation.export_generator import ExportedGenerator
from megatron_anymal.generation.model_folder import exported_config
from megatron_anymal.harnesses.chat_requests import HarnessRequest, answer_requests

try:
    from lmms_eval.api.model import lmms
except ImportError as error:
    raise ImportError(
        f"lmms-eval cannot be imported ({error}). Install it with: pip install 'megatron-anymal[lmms-eval]'"
    ) from error

_DTYPES = ("auto", "float32", "bfloat16")


class AnyMAL(lmms):
    """Answers lmms-eval's chat requests with an exported model, token by token as `anymal generate` does."""

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        device: Optional[str] = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        trust_remote_code: bool = False,
    ):
        """Load the model. The arguments are those of lmms-eval's `--model_args`.

        Args:
            pretrained: the exported folder.
            device: None: the GPU of this process, else the CPU.
            dtype: auto (the folder's), float32 or bfloat16.
            batch_size: requests that are answered together.
            trust_remote_code: run the code in the folder instead of this package's.

        Raises:
            ConfigError: an argument cannot be used, or the folder needs code that is not trusted.
            CheckpointError: the folder is not an export, or damaged.
        """
        super().__init__()
        if dtype not in _DTYPES:
            raise ConfigError(f"model_args: dtype={dtype!r} must be one of {', '.join(_DTYPES)}.")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(f"batch_size={batch_size} must be a number of requests, at least 1.")
        config = exported_config(Path(pretrained))
        if config is None:
            raise ConfigError(
                f"model_args: pretrained={pretrained!r} is a training checkpoint. Export it with "
                "checkpoint_tools.export_hf, and name the export."
            )
        self.batch_size = int(batch_size)
        if device is None and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        # lmms-eval gathers the numbers of requests on it.
        self.device = torch.device(device or "cpu")
        self._generator: Optional[ExportedGenerator] = ExportedGenerator.of_folder(
            pretrained, config, str(self.device), dtype, trust_remote_code=trust_remote_code
        )

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer requests whose messages a task makes of its documents.

        Raises:
            ConfigError: a generation setting of a task cannot be used.
            DataError: a request cannot be answered; its task and document are named.
        """
        assert self._generator is not None, "clean() was called"
        return answer_requests(self._generator, [self._request(*one.args) for one in requests], self.batch_size)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("The model anymal answers single conversations: tasks of several rounds cannot run.")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not supported: lmms-eval asks chat models for answers only.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("lmms-eval asks chat models for answers only. See anymal evaluate --likelihood.")

    def clean(self) -> None:
        """Release the model; lmms-eval calls this once all requests are answered."""
        self._generator = None
        super().clean()

    def _request(
        self, context: str, messages_of: Any, settings: dict[str, Any], number: int, task: str, split: str
    ) -> HarnessRequest:
        # Documents, with their media, are read when their batch is answered.
        return HarnessRequest(
            f"{task}, document {number}", partial(_messages, messages_of, self.task_dict[task][split], number), settings
        )


def _messages(messages_of: Any, documents: Any, number: int) -> Any:
    return messages_of(documents[number])
