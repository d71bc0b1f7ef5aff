"""Whole (unsharded) weights of a checkpoint's Llama, read from wherever they are stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig

from megatron_anymal.checkpoint.frozen_base import resolve_language_model
from megatron_anymal.checkpoint.store import CheckpointError, Manifest
from megatron_anymal.checkpoint.tensor_stream import StreamReader
from megatron_anymal.config import ModelConfig
from megatron_anymal.hf_weights import HFWeights
from megatron_anymal.model.hf_llama import account, checkpoint_place, from_hf, to_hf, whole_names, whole_shape
from megatron_anymal.model.unsharded_weights import hash_together, hash_weight, initial_value


class LlamaSource:
    """The Llama at the end of a run, without its adapters.

    Attributes:
        hf: its HuggingFace configuration.
        own_keys: checkpoint keys of the Llama's weights; empty if it was frozen.
    """

    def __init__(self, folder: Path, manifest: Manifest, model: ModelConfig, precision: str) -> None:
        """Locate the weights; only headers are read.

        Args:
            folder: checkpoint folder.
            model: `model` of its run's configuration.
            precision: `trainer.precision` of its run.

        Raises:
            CheckpointError, ConfigError, TensorFileError: the frozen base is missing from the path in the run's
                configuration, or is incomplete.
        """
        self._manifest, self._digests = manifest, dict[str, str]()
        run_type = torch.bfloat16 if precision == "bf16" else torch.float32
        self.own_keys: set[str] = set()
        if not model.language_model.freeze:
            self.hf = LlamaConfig.from_dict(manifest.llama)
            self._open_checkpoint(folder, None)
            self.own_keys = {checkpoint_place(name)[0] for name in whole_names(self.hf)}
            self._where = str(folder)
            return
        lm, self.hf = resolve_language_model(model.language_model)
        self._where = lm.checkpoint or lm.path or "model.language_model.config"
        if lm.checkpoint:
            self._open_checkpoint(Path(lm.checkpoint), run_type)
        elif lm.path and lm.load_weights:
            weights = HFWeights(lm.path)
            account(self.hf, weights)
            self._read: Callable[[str], Tensor] = lambda name: from_hf(name, self.hf, weights.__getitem__)
            self._dtype: Callable[[str], torch.dtype] = lambda name: run_type
        else:
            seed, std = model.seed, self.hf.initializer_range
            self._read = lambda name: _drawn(name, whole_shape(name, self.hf), seed, std)
            self._dtype = lambda name: run_type

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return a whole weight as HuggingFace tensors, in the run's dtype, or in the stored dtype if the checkpoint
        contains the Llama itself."""
        whole = self._read(name).to(self._dtype(name))
        # Drop vocabulary padding.
        whole = whole[: whole_shape(name, self.hf)[0]]
        if self._manifest.base_hash:
            self._digests[name] = hash_weight(name, whole)
        return to_hf(name, self.hf, whole)

    def entries(self, name: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of the tensors that `tensors` returns, without reading them."""
        whole = torch.empty(whole_shape(name, self.hf), dtype=self._dtype(name), device="meta")
        return {to: (tensor.dtype, tuple(tensor.shape)) for to, tensor in to_hf(name, self.hf, whole).items()}

    def check_base(self) -> None:
        """Verify that the frozen base is the one used in training; call it after all weights were read.

        Raises:
            CheckpointError: the hashes differ.
        """
        if self._manifest.base_hash and hash_together(self._digests) != self._manifest.base_hash:
            raise CheckpointError(
                f"The Llama in {self._where!r} does not have the weights that this checkpoint was trained with "
                f"(hash {self._manifest.base_hash[:16]}). Restore the original Llama."
            )

    def _open_checkpoint(self, folder: Path, dtype: torch.dtype | None) -> None:
        reader = StreamReader(folder)
        for name in whole_names(self.hf):
            if checkpoint_place(name)[0] not in reader.tensors:
                raise CheckpointError(f"{str(folder)!r} is missing {name!r} of the Llama.")
        self._read = lambda name: reader.read(*checkpoint_place(name))
        self._dtype = lambda name: dtype or reader.dtype(checkpoint_place(name)[0])


def _drawn(name: str, shape: tuple[int, ...], seed: int, std: float) -> Tensor:
    """A weight as the run initialized it, for a Llama that was not loaded from files."""
    return initial_value(name, shape, seed, std) if len(shape) > 1 else torch.ones(shape)
