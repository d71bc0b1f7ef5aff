"""Every tensor of an export and where it comes from: each of the checkpoint's tensors goes somewhere, once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_tools.exporting.adapters import Adapters
from checkpoint_tools.exporting.llama_source import LlamaSource
from megatron_anymal.checkpoint.store import CheckpointError, Manifest
from megatron_anymal.checkpoint.tensor_stream import StreamReader
from megatron_anymal.config import RunConfig
from megatron_anymal.modalities import build_modality, load_plugins
from megatron_anymal.model.build import seeded_encoder
from megatron_anymal.model.hf_llama import whole_names

# What stands before the Llama's names in an AnyMALForConditionalGeneration.
LLAMA = "language_model."
_MEDIA = ("encoders.", "projectors.")

Entries = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class ExportedWeights:
    """The tensors of an export, in the order in which they are written.

    Attributes:
        llama: the Llama without its adapters.
        adapters: the checkpoint's.
        entries: exported name -> type and shape.
        left_out: the checkpoint's tensors that this export does not take, by part.
    """

    def __init__(self, folder: Path, manifest: Manifest, config: RunConfig, *, llama_only: bool, merge: bool) -> None:
        """Plan the export; nothing large is read yet.

        Raises:
            CheckpointError, ConfigError, TensorFileError: the base or an encoder is missing or not complete, or a
                tensor of the checkpoint belongs nowhere.
        """
        self._reader = StreamReader(folder)
        self._config, self._merge = config, merge
        self._prefix = "" if llama_only else LLAMA
        self.llama = LlamaSource(folder, manifest, config)
        own = [name for name in self._reader.tensors if not name.startswith("optimizer.")]
        self.adapters = Adapters.find(own, config.model.lora)
        media = [name for name in own if name.startswith(_MEDIA)]
        self._check_known(set(own) - set(media) - self.adapters.names - self.llama.own_keys)
        self.left_out: dict[str, int] = {}
        if llama_only:
            for name in media:
                part = ".".join(name.split(".")[:2])
                self.left_out[part] = self.left_out.get(part, 0) + 1
            media = []
        self._media = {} if llama_only else self._media_parts(media)
        self.entries: Entries = {}
        for name in whole_names(self.llama.hf):
            self.entries |= {self._prefix + to: entry for to, entry in self.llama.entries(name).items()}
        self.entries |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self._media.items()}

    def read(self, name: str) -> Tensor:
        """One of the checkpoint's own tensors."""
        return self._reader.read(name)

    def entry(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Its type and shape."""
        return self._reader.tensors[name].dtype, self._reader.tensors[name].shape

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Exported name and tensor, in the order of `entries`.

        Raises:
            CheckpointError: the frozen base turns out to be another one than the run's.
        """
        for name in whole_names(self.llama.hf):
            for to, tensor in self.llama.tensors(name).items():
                if self._merge:
                    tensor = self.adapters.merged(to.removesuffix(".weight"), tensor, self.read)
                yield self._prefix + to, tensor
        self.llama.check_base()
        yield from self._media.items()

    def _media_parts(self, names: list[str]) -> dict[str, Tensor]:
        """Encoders and projectors in the run's type: what the checkpoint holds, the rest as the run loaded it."""
        load_plugins(self._config.model.plugins)
        dtype = torch.bfloat16 if self._config.trainer.precision == "bf16" else torch.float32
        found: dict[str, Tensor] = {}
        for name, section in self._config.model.modalities.items():
            encoder = seeded_encoder(name, section.encoder, build_modality(name, section), self._config.model.seed)
            found |= {f"encoders.{name}.{key}": value for key, value in encoder.to(dtype).state_dict().items()}
        for name in names:
            if name.startswith("encoders.") and name not in found:
                raise CheckpointError(f"The checkpoint's tensor {name!r} is none of its configuration's encoders'.")
            if name in found and found[name].shape != self._reader.tensors[name].shape:
                raise CheckpointError(
                    f"The checkpoint's tensor {name!r} has the shape {list(self._reader.tensors[name].shape)}; its "
                    f"configuration's encoder {list(found[name].shape)}."
                )
            found[name] = self.read(name)
        return found

    @staticmethod
    def _check_known(names: set[str]) -> None:
        if names:
            raise CheckpointError(
                f"The checkpoint holds {len(names)} tensors that belong nowhere in an export, such as {min(names)!r}. "
                "It was written by another version, or is not what its configuration says."
            )
