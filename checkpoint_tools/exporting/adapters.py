"""A run's adapters in an export: added to the weights they stand beside, or written for peft."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_anymal.checkpoint.store import CheckpointError
from megatron_anymal.config import LoraConfig
from megatron_anymal.safetensors_io import SafetensorsWriter

_NAME = re.compile(r"language_model\.decoder\.layers\.(\d+)\.(self_attention|mlp)\.\w+\.lora\.(\w+)\.([AB])")
_PLACES = {"self_attention": "self_attn", "mlp": "mlp"}


@dataclass(frozen=True)
class Adapters:
    """Every adapter of a checkpoint by the Llama's HuggingFace module that it stands beside.

    Attributes:
        pairs: module such as "model.layers.0.self_attn.q_proj" -> the checkpoint's names of A [r, in] and B [out, r].
    """

    lora: LoraConfig
    pairs: dict[str, tuple[str, str]]

    @classmethod
    def find(cls, names: Iterable[str], lora: LoraConfig) -> Adapters:
        """The adapters among a checkpoint's names.

        Raises:
            CheckpointError: an A without its B, or the other way round.
        """
        found: dict[str, dict[str, str]] = {}
        for name in names:
            if match := _NAME.fullmatch(name):
                layer, place, projection, part = match.groups()
                found.setdefault(f"model.layers.{layer}.{_PLACES[place]}.{projection}", {})[part] = name
        for parts in found.values():
            if len(parts) != 2:
                raise CheckpointError(f"The checkpoint holds {next(iter(parts.values()))!r} without its other half.")
        return cls(lora, {module: (found[module]["A"], found[module]["B"]) for module in sorted(found)})

    @property
    def names(self) -> set[str]:
        """The checkpoint's names of all of them."""
        return {name for pair in self.pairs.values() for name in pair}

    def merged(self, module: str, weight: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """A module's weight [out, in] with its adapter added, summed in fp32 at least, in the weight's type."""
        if module not in self.pairs:
            return weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        a, b = (read(name).to(wide) for name in self.pairs[module])
        return torch.addmm(weight.to(wide), b, a, alpha=self.lora.alpha / self.lora.r).to(weight.dtype)

    def write(
        self,
        folder: Path,
        prefix: str,
        entry: Callable[[str], tuple[torch.dtype, tuple[int, ...]]],
        read: Callable[[str], Tensor],
    ) -> dict[str, str]:
        """Write adapter_config.json and adapter_model.safetensors as peft reads them.

        Args:
            prefix: what stands before a module's name in the exported model.
            entry, read: give type and shape, and the tensor, of the checkpoint's name.

        Returns:
            File name -> SHA-256.
        """
        folder.mkdir(parents=True)
        named = {
            f"base_model.model.{prefix}{module}.lora_{part}.weight": name
            for module, pair in self.pairs.items()
            for part, name in zip("AB", pair)
        }
        entries = {to: entry(name) for to, name in named.items()}
        with SafetensorsWriter(folder / "adapter_model.safetensors", entries, {"format": "pt"}) as file:
            for to, name in named.items():
                file.append(to, read(name))
        modules = [prefix + module for module in self.pairs]
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            # The folder above this one, wherever it lies.
            "base_model_name_or_path": "..",
            "r": self.lora.r,
            "lora_alpha": self.lora.alpha,
            "lora_dropout": self.lora.dropout,
            "bias": "none",
            "inference_mode": True,
            # Whole names: encoders have projections of the same names.
            "target_modules": modules,
        }
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        return {file.path.name: file.digest}
