"""Tensors of an export and their sources; each checkpoint tensor is accounted for exactly once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_tools.exporting.adapters import Adapters
from checkpoint_tools.exporting.llama_source import LlamaSource
from megatron_anymal.checkpoint.store import CheckpointError, Manifest
from megatron_anymal.checkpoint.tensor_stream import StreamReader
from megatron_anymal.config import ModelConfig
from megatron_anymal.modalities import build_modality, load_plugins
from megatron_anymal.model.encoders import seeded_encoder
from megatron_anymal.model.hf_llama import whole_names

# Prefix of the Llama's names in an AnyMALForConditionalGeneration.
LLAMA = "language_model."
_MEDIA = ("encoders.", "projectors.")

Entries = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class ExportedWeights:
    """The tensors of an export, in the order in which they are written.

    Attributes:
        llama: the Llama without its adapters.
        adapters: the checkpoint's adapters.
        entries: exported name -> dtype and shape.
        left_out: component -> number of checkpoint tensors that are not exported.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, model: ModelConfig, precision: str, *, llama_only: bool, merge: bool
    ) -> None:
        """Plan the export; the Llama's weights are not read yet.

        Args:
            folder: checkpoint folder.
            model: `model` of its run's configuration.
            precision: `trainer.precision` of its run.
            llama_only: leave out encoders and projectors.
            merge: add the adapters to the Llama's weights.

        Raises:
            CheckpointError, ConfigError, TensorFileError: the base or an encoder is missing or incomplete, or a tensor
                of the checkpoint is unknown.
        """
        self._reader = StreamReader(folder)
        self._merge = merge
        self._prefix = "" if llama_only else LLAMA
        self.llama = LlamaSource(folder, manifest, model, precision)
        own = [name for name in self._reader.tensors if not name.startswith("optimizer.")]
        self.adapters = Adapters.find(own, model.lora)
        media = [name for name in own if name.startswith(_MEDIA)]
        self._check_known(set(own) - set(media) - self.adapters.names - self.llama.own_keys)
        self.left_out: dict[str, int] = {}
        if llama_only:
            for name in media:
                part = ".".join(name.split(".")[:2])
                self.left_out[part] = self.left_out.get(part, 0) + 1
            media = []
        self._media = {} if llama_only else self._media_parts(model, precision, media)
        self.entries: Entries = {}
        for name in whole_names(self.llama.hf):
            self.entries |= {self._prefix + to: entry for to, entry in self.llama.entries(name).items()}
        self.entries |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self._media.items()}

    def read(self, name: str) -> Tensor:
        """Read one of the checkpoint's own tensors."""
        return self._reader.read(name)

    def entry(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of one of the checkpoint's own tensors."""
        return self._reader.dtype(name), self._reader.tensors[name].shape

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield exported name and tensor, in the order of `entries`.

        Raises:
            CheckpointError: the frozen base is not the one of the run.
        """
        for name in whole_names(self.llama.hf):
            for to, tensor in self.llama.tensors(name).items():
                if self._merge:
                    tensor = self.adapters.merged(to.removesuffix(".weight"), tensor, self.read)
                yield self._prefix + to, tensor
        self.llama.check_base()
        yield from self._media.items()

    def _media_parts(self, model: ModelConfig, precision: str, names: list[str]) -> dict[str, Tensor]:
        """Encoders and projectors in the run's dtype: from the checkpoint if present, else as the run loaded them."""
        load_plugins(model.plugins)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        tensors: dict[str, Tensor] = {}
        for name, section in model.modalities.items():
            encoder = seeded_encoder(name, section.encoder, build_modality(name, section), model.seed)
            tensors |= {f"encoders.{name}.{key}": value for key, value in encoder.to(dtype).state_dict().items()}
        for name in names:
            if name.startswith("encoders.") and name not in tensors:
                raise CheckpointError(f"The checkpoint's tensor {name!r} belongs to no encoder of its configuration.")
            if name in tensors and tensors[name].shape != self._reader.tensors[name].shape:
                raise CheckpointError(
                    f"The checkpoint's tensor {name!r} has the shape {list(self._reader.tensors[name].shape)}; the "
                    f"encoder of its configuration has {list(tensors[name].shape)}."
                )
            tensors[name] = self.read(name)
        return tensors

    @staticmethod
    def _check_known(names: set[str]) -> None:
        if names:
            raise CheckpointError(
                f"The checkpoint contains {len(names)} tensors unknown to the export, such as {min(names)!r}. "
                "It was written by another version, or does not match its configuration."
            )
