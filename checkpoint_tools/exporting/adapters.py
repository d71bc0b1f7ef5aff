"""LoRA adapters of an export: merged into the weights, or written separately for peft."""

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
_HF_BLOCKS = {"self_attention": "self_attn", "mlp": "mlp"}


@dataclass(frozen=True)
class Adapters:
    """Adapters of a checkpoint, keyed by the HuggingFace module of the Llama that they adapt.

    Attributes:
        pairs: module such as "model.layers.0.self_attn.q_proj" -> checkpoint keys of A [r, in] and B [out, r].
    """

    lora: LoraConfig
    pairs: dict[str, tuple[str, str]]

    @classmethod
    def find(cls, names: Iterable[str], lora: LoraConfig) -> Adapters:
        """Find the adapters among a checkpoint's keys.

        Raises:
            CheckpointError: an A without its B, or vice versa.
        """
        pairs: dict[str, dict[str, str]] = {}
        for name in names:
            if match := _NAME.fullmatch(name):
                layer, block, projection, side = match.groups()
                pairs.setdefault(f"model.layers.{layer}.{_HF_BLOCKS[block]}.{projection}", {})[side] = name
        for pair in pairs.values():
            if len(pair) != 2:
                raise CheckpointError(
                    f"The checkpoint contains {next(iter(pair.values()))!r} but not its A or B counterpart."
                )
        return cls(lora, {module: (pairs[module]["A"], pairs[module]["B"]) for module in sorted(pairs)})

    @property
    def names(self) -> set[str]:
        """Checkpoint keys of all adapters."""
        return {name for pair in self.pairs.values() for name in pair}

    def merged(self, module: str, weight: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """Return a module's weight [out, in] with its adapter merged: the sum in fp64, rounded to the weight's dtype.

        In fp32 the trainer's own merged weights, summed in another order, would be rounded to other values in places.
        """
        if module not in self.pairs:
            return weight
        a, b = (read(name).double() for name in self.pairs[module])
        return torch.addmm(weight.double(), b, a, alpha=self.lora.alpha / self.lora.r).to(weight.dtype)

    def write(
        self,
        folder: Path,
        prefix: str,
        entry: Callable[[str], tuple[torch.dtype, tuple[int, ...]]],
        read: Callable[[str], Tensor],
    ) -> dict[str, str]:
        """Write adapter_config.json and adapter_model.safetensors as peft reads them.

        Args:
            prefix: prefix of module names in the exported model.
            entry, read: return dtype and shape, and the tensor, of a checkpoint key.

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
            # The parent folder: relative, so that the export can be moved.
            "base_model_name_or_path": "..",
            "r": self.lora.r,
            "lora_alpha": self.lora.alpha,
            "lora_dropout": self.lora.dropout,
            "bias": "none",
            "inference_mode": True,
            # Full names, since encoders have projections with the same short names.
            "target_modules": modules,
        }
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        return {file.path.name: file.digest}
