"""Compute logits with an exported folder's own code, in a separate process that cannot import the trainer.

    python -I exported_logits.py FOLDER PROMPTS.json OUT DTYPE

PROMPTS.json lists prompts in the format of `anymal generate --prompts`, or {"tokens": [ids]} for a plain Llama. Each
prompt's `tokens` [T], `media` (modality -> encoder inputs) and `logits` [T, V] in fp32 are written to OUT/NUMBER.pt.
Separate adapters are merged into the weights as peft would do it, so that peft need not be installed.
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
    """Hides the trainer's packages, as if they were not installed."""

    def find_spec(self, name, path=None, target=None):
        """Refuse imports of the trainer's packages."""
        if name.split(".")[0] in TRAINER:
            raise ModuleNotFoundError(f"No module named {name!r} (hidden: an export must work without it)", name=name)


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
        outputs = {"tokens": inputs["input_ids"][0], "media": inputs.get("media") or {}, "logits": logits}
        torch.save(outputs, Path(out) / f"{number}.pt")
    (Path(out) / "transformers").write_text(transformers.__version__)


def add_adapters(model, folder):
    """Merge a peft folder into the model: W [out, in] += B A lora_alpha / r for each A [r, in] and B [out, r]."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    for module in config["target_modules"]:
        a, b = (tensors[f"base_model.model.{module}.lora_{part}.weight"].float() for part in "AB")
        weight = model.get_submodule(module).weight
        weight += (b @ a).to(weight.dtype) * (config["lora_alpha"] / config["r"])


if __name__ == "__main__":
    main(*sys.argv[1:])
