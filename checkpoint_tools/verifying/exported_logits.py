"""Logits of an exported folder by its own code: run in a process of its own, where the trainer cannot be imported.

    python -I exported_logits.py FOLDER PROMPTS.json OUT DTYPE

PROMPTS.json lists prompts as `anymal generate --prompts` takes them, or {"tokens": [ids]} for a plain Llama. Writes
OUT/NUMBER.pt with `tokens` [T], `media` (modality -> pieces) and `logits` [T, V] in fp32, one prompt after the other.
Adapters that lie beside the weights are added to them, as peft merges them: peft need not be here.
"""

import importlib.abc
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

TRAINER = ("megatron_anymal", "megatron", "checkpoint_tools", "nemo", "lightning")


class WithoutTrainer(importlib.abc.MetaPathFinder):
    """Refuses the trainer's packages, as on a machine where they are not installed."""

    def find_spec(self, name, path=None, target=None):
        """Called for every import."""
        if name.split(".")[0] in TRAINER:
            raise ModuleNotFoundError(f"No module named {name!r} (hidden: an export must do without it)", name=name)


@torch.no_grad()
def main(folder: str, prompts: str, out: str, dtype: str) -> None:
    """Load the folder as a user would, and run every prompt."""
    sys.meta_path.insert(0, WithoutTrainer())
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=getattr(torch, dtype)
    ).eval()
    if (Path(folder) / "adapter").is_dir():
        add_adapters(model, Path(folder) / "adapter")
    processor = None
    for number, prompt in enumerate(json.loads(Path(prompts).read_text(encoding="utf-8"))):
        if "tokens" in prompt:
            inputs = {"input_ids": torch.tensor([prompt["tokens"]])}
        else:
            if processor is None:
                processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
            inputs = dict(processor(prompt))
        logits = model(**inputs).logits[0].float()
        found = {"tokens": inputs["input_ids"][0], "media": inputs.get("media") or {}, "logits": logits}
        torch.save(found, Path(out) / f"{number}.pt")
    (Path(out) / "transformers").write_text(transformers.__version__)


def add_adapters(model, folder):
    """W [out, in] + B A lora_alpha / r, for each A [r, in] and B [out, r] of a folder written for peft."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    for module in config["target_modules"]:
        a, b = (tensors[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        weight = model.get_submodule(module).weight
        weight += (b @ a).to(weight.dtype) * (config["lora_alpha"] / config["r"])


if __name__ == "__main__":
    main(*sys.argv[1:])
