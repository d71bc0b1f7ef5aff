"""Stand-ins for a published Llama and CLIP, small enough for a CPU: same file formats, random weights, a tokenizer
trained on your texts.

    python -m examples.tiny_models --manifest media/train.jsonl --out checkpoints

Use them to rehearse a whole run, from raw files to an export, before you reserve a GPU. The folders have the names that
nemo_configs/pretrain_1b_image.yaml expects, so replacing them with the real models is the only change.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

LLAMA, CLIP = "Llama-3.2-1B", "clip-vit-large-patch14-336"
# Side of CLIP's input in pixels.
RESOLUTION = 56
# CLIP's channel statistics, as in transformers.image_utils.
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def write_llama(folder: Path, manifests: Sequence[Path]) -> None:
    """Write a Llama of about 1 M parameters and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from examples.quickstart.corpus import train_tokenizer

    vocabulary = train_tokenizer(manifests, folder)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_clip(folder: Path) -> None:
    """Write a CLIP vision tower and how its images are preprocessed."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=RESOLUTION,
        patch_size=14,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"height": RESOLUTION, "width": RESOLUTION},
        "resample": 3,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n")


def main(argv: Sequence[str]) -> int:
    """Write both folders; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.tiny_models", description=__doc__)
    parser.add_argument("--manifest", type=Path, action="append", required=True, help="texts for the tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder of the models")
    parser.add_argument("--overwrite", action="store_true", help="replace the models in --out")
    arguments = parser.parse_args(argv)
    for manifest in arguments.manifest:
        if not manifest.is_file():
            parser.error(f"there is no manifest '{manifest}'. Correct the path.")
    existing = [folder for name in (LLAMA, CLIP) if (folder := arguments.out / name).exists()]
    if existing and not arguments.overwrite:
        parser.error(f"'{existing[0]}' exists. Name another --out, or add --overwrite to replace its model.")
    import torch

    torch.manual_seed(0)
    write_llama(arguments.out / LLAMA, arguments.manifest)
    write_clip(arguments.out / CLIP)
    print(f"wrote {arguments.out / LLAMA} and {arguments.out / CLIP}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
