"""The Llama of a checkpoint, whole weight by whole weight, wherever its values lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig

from megatron_anymal.checkpoint.frozen_base import resolve_language_model
from megatron_anymal.checkpoint.store import CheckpointError, Manifest
from megatron_anymal.checkpoint.tensor_stream import StreamReader
from megatron_anymal.config import RunConfig
from megatron_anymal.hf_weights import HFWeights
from megatron_anymal.model.hf_llama import account, checkpoint_place, from_hf, to_hf, whole_names, whole_shape
from megatron_anymal.model.unsharded_weights import hash_together, hash_weight, initial_value


class LlamaSource:
    """The Llama that a run ended with, but for its adapters.

    Attributes:
        hf: its HuggingFace configuration.
        own_keys: of the checkpoint's tensors those that are the Llama; empty where it was frozen.
    """

    def __init__(self, folder: Path, manifest: Manifest, config: RunConfig) -> None:
        """Find where the weights lie; nothing is read yet but headers.

        Raises:
            CheckpointError, ConfigError, TensorFileError: the frozen base is not where the run's configuration says, or
                is not complete.
        """
        self._manifest, self._digests = manifest, dict[str, str]()
        run_type = torch.bfloat16 if config.trainer.precision == "bf16" else torch.float32
        self.own_keys: set[str] = set()
        if not config.model.language_model.freeze:
            self.hf = LlamaConfig.from_dict(manifest.llama)
            self._open_checkpoint(folder, None)
            self.own_keys = {checkpoint_place(name)[0] for name in whole_names(self.hf)}
            self._where = str(folder)
            return
        base, self.hf = resolve_language_model(config)
        lm = base.model.language_model
        self._where = lm.checkpoint or lm.path or "model.language_model.config"
        if lm.checkpoint:
            self._open_checkpoint(Path(lm.checkpoint), run_type)
        elif lm.path and lm.load_weights:
            weights = HFWeights(lm.path)
            account(self.hf, weights)
            self._read: Callable[[str], Tensor] = lambda name: from_hf(name, self.hf, weights.__getitem__)
            self._dtype: Callable[[str], torch.dtype] = lambda name: run_type
        else:
            seed, std = config.model.seed, self.hf.initializer_range
            self._read = lambda name: _drawn(name, whole_shape(name, self.hf), seed, std)
            self._dtype = lambda name: run_type

    def tensors(self, name: str) -> dict[str, Tensor]:
        """A whole weight as HuggingFace's tensors, in the type that the run computed with (or, of a checkpoint that
        holds its Llama itself, in the stored one)."""
        whole = self._read(name).to(self._dtype(name))
        # A padded vocabulary is longer than the Llama's.
        whole = whole[: whole_shape(name, self.hf)[0]]
        if self._manifest.base_hash:
            self._digests[name] = hash_weight(name, whole)
        return to_hf(name, self.hf, whole)

    def entries(self, name: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name, type and shape of what `tensors` gives, without reading it."""
        whole = torch.empty(whole_shape(name, self.hf), dtype=self._dtype(name), device="meta")
        return {to: (tensor.dtype, tuple(tensor.shape)) for to, tensor in to_hf(name, self.hf, whole).items()}

    def check_base(self) -> None:
        """Refuse a frozen base that is not the one the run was trained beside; after all of it was read.

        Raises:
            CheckpointError: its hash is another one.
        """
        if self._manifest.base_hash and hash_together(self._digests) != self._manifest.base_hash:
            raise CheckpointError(
                f"The Llama in {self._where!r} has other weights than the one that this checkpoint was trained beside "
                f"(hash {self._manifest.base_hash[:16]}). Put that one back."
            )

    def _open_checkpoint(self, folder: Path, dtype: torch.dtype | None) -> None:
        reader = StreamReader(folder)
        for name in whole_names(self.hf):
            if checkpoint_place(name)[0] not in reader.tensors:
                raise CheckpointError(f"{str(folder)!r} lacks {name!r} of the Llama.")
        self._read = lambda name: reader.read(*checkpoint_place(name))
        self._dtype = lambda name: dtype or reader.tensors[checkpoint_place(name)[0]].dtype


def _drawn(name: str, shape: tuple[int, ...], seed: int, std: float) -> Tensor:
    """A weight of a Llama that was never loaded, as the run drew it."""
    return initial_value(name, shape, seed, std) if len(shape) > 1 else torch.ones(shape)
