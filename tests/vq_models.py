"""Small tokenizers of pictures and sounds with random weights, as folders of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import DacConfig, DacModel, EncodecConfig, EncodecModel, MimiConfig, MimiModel

CONV = {"hidden_size": 16, "num_filters": 4, "upsampling_ratios": [4, 2], "codebook_size": 16, "sampling_rate": 8000}
MODELS: dict[str, Any] = {
    "encodec": lambda: EncodecModel(
        EncodecConfig(**CONV, codebook_dim=16, num_lstm_layers=1, target_bandwidths=[8.0, 16.0], normalize=False)
    ),
    "mimi": lambda: MimiModel(
        MimiConfig(
            **CONV,
            frame_rate=500.0,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=16,
            num_quantizers=4,
            codebook_dim=8,
            vector_quantization_hidden_dimension=8,
            upsample_groups=16,
        )
    ),
    "dac": lambda: DacModel(
        DacConfig(
            encoder_hidden_size=4,
            downsampling_ratios=[2, 4],
            upsampling_ratios=[4, 2],
            decoder_hidden_size=16,
            n_codebooks=3,
            codebook_size=16,
            codebook_dim=4,
            sampling_rate=8000,
        )
    ),
}


def emu3(folder: Path) -> Path:
    """A small VQ-VAE of Emu3: pictures of 16 x 16 pixels become 4 x 4 codes."""
    from transformers import Emu3VQVAE
    from transformers.models.emu3.configuration_emu3 import Emu3VQVAEConfig

    torch.manual_seed(0)
    small = {"base_channels": 32, "channel_multiplier": [1, 1, 1], "num_res_blocks": 1, "hidden_size": 32}
    Emu3VQVAE(Emu3VQVAEConfig(codebook_size=64, attn_resolutions=[2], **small)).save_pretrained(folder)
    preprocessing = {"size": {"height": 16, "width": 16}, "image_mean": [0.4] * 3, "image_std": [0.3] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder
