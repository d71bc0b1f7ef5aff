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
from megatron_anymal.data.discrete_vocabulary import DiscreteVocabulary
from megatron_anymal.hf_weights import HFWeights
from megatron_anymal.model import discrete_rows
from megatron_anymal.model.hf_llama import (
    EMBEDDING,
    HEAD,
    account,
    checkpoint_position,
    from_hf,
    to_hf,
    whole_names,
    whole_shape,
)
from megatron_anymal.model.unsharded_weights import hash_together, hash_weight, initial_value


class LlamaSource:
    """The Llama at the end of a run, without its adapters.

    Attributes:
        hf: its HuggingFace configuration.
        vocabulary: its vocabulary with the marks and codes of discrete media, which exports include.
        own_keys: checkpoint keys of the Llama's weights, and of rows of marks and codes; empty if there are none.
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
        self._rows = StreamReader(folder)
        run_type = torch.bfloat16 if precision == "bf16" else torch.float32
        self.own_keys: set[str] = set()
        if not model.language_model.freeze:
            self.hf = LlamaConfig.from_dict(manifest.llama)
            self._open_checkpoint(folder, None)
            self.own_keys = {checkpoint_position(name)[0] for name in whole_names(self.hf)}
            self._where = str(folder)
            self._find_rows(model, folder)
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
        self._find_rows(model, folder)

    @property
    def exported(self) -> LlamaConfig:
        """The Llama's HuggingFace configuration with the vocabulary of the export."""
        if not self.vocabulary.added:
            return self.hf
        return LlamaConfig.from_dict({**self.hf.to_dict(), "vocab_size": self.vocabulary.total_size})

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return a whole weight as HuggingFace tensors, in the run's dtype, or in the stored dtype if the checkpoint
        contains the Llama itself."""
        whole = self._read(name).to(self._dtype(name))
        # Drop vocabulary padding.
        whole = whole[: whole_shape(name, self.hf)[0]]
        if self._manifest.base_hash:
            self._digests[name] = hash_weight(name, whole)
        if key := self._row_keys.get(name):
            rows = self._rows.read(key)[: self.vocabulary.added].to(whole.dtype)
            return {to: torch.cat([text, rows]) for to, text in to_hf(name, self.hf, whole).items()}
        return to_hf(name, self.hf, whole)

    def entries(self, name: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of the tensors that `tensors` returns, without reading them."""
        whole = torch.empty(whole_shape(name, self.hf), dtype=self._dtype(name), device="meta")
        added = self.vocabulary.added if name in self._row_keys else 0
        return {
            to: (tensor.dtype, (tensor.size(0) + added, *tensor.shape[1:]))
            for to, tensor in to_hf(name, self.hf, whole).items()
        }

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

    def _find_rows(self, model: ModelConfig, folder: Path) -> None:
        """Locate the rows of marks and codes, if there are any.

        Raises:
            CheckpointError: the checkpoint lacks them.
        """
        self.vocabulary = DiscreteVocabulary(self.hf.vocab_size, model.discrete)
        pairs = {EMBEDDING: discrete_rows.EMBEDDING, HEAD: discrete_rows.HEAD}
        pairs = {name: key for name, key in pairs.items() if model.discrete and name in whole_names(self.hf)}
        for key in pairs.values():
            if key not in self._rows.tensors:
                raise CheckpointError(f"{str(folder)!r} is missing {key!r}, the rows of model.discrete.")
        self._row_keys = pairs
        self.own_keys |= set(pairs.values())

    def _open_checkpoint(self, folder: Path, dtype: torch.dtype | None) -> None:
        reader = StreamReader(folder)
        for name in whole_names(self.hf):
            if checkpoint_position(name)[0] not in reader.tensors:
                raise CheckpointError(f"{str(folder)!r} is missing {name!r} of the Llama.")
        self._read = lambda name: reader.read(*checkpoint_position(name))
        self._dtype = lambda name: dtype or reader.dtype(checkpoint_position(name)[0])


def _drawn(name: str, shape: tuple[int, ...], seed: int, std: float) -> Tensor:
    """A weight as the run initialized it, for a Llama that was not loaded from files."""
    return initial_value(name, shape, seed, std) if len(shape) > 1 else torch.ones(shape)
