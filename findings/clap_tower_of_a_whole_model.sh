#!/usr/bin/env bash
# transformers 5.24.0, one tower of a two-tower model loaded by itself: ClapAudioModel from a folder of ClapModel.
#
# Guess: just as CLIPVisionModel reads its tower from a whole CLIPModel, ClapAudioModel reads its tower from a whole
# ClapModel. Published CLAP models are whole ones.
# Behaviour: the same call loads all weights for CLIP and none for CLAP. The names in the file begin with the tower's prefix
# ("vision_model.", "audio_model."), which is recognised for CLIP but not for CLAP: all of its weights are randomly
# initialised, with only a warning.
#
# Output seen: CLIPVisionModel: 23 of 23 weights are the saved ones; ClapAudioModel: 0 of 45
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" <<'PY' 2>/dev/null
import sys

import torch
from transformers import ClapAudioModel, ClapConfig, ClapModel, CLIPConfig, CLIPModel, CLIPVisionModel

SMALL = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
text = dict(**SMALL, vocab_size=16, bos_token_id=0, eos_token_id=1, pad_token_id=1)
picture = dict(**SMALL, image_size=16, patch_size=8)
sound = dict(hidden_size=32, patch_embeds_hidden_size=8, depths=[1, 1], num_attention_heads=[1, 1], window_size=4)
models = {
    CLIPVisionModel: (CLIPModel(CLIPConfig(text_config=text, vision_config=picture)), "vision_model"),
    ClapAudioModel: (ClapModel(ClapConfig(text_config=text, audio_config=sound)), "audio_model"),
}
found = {}
for tower, (whole, name) in models.items():
    for weight in whole.parameters():
        torch.nn.init.normal_(weight)
    path = f"{sys.argv[1]}/{name}"
    whole.save_pretrained(path)
    weights = list(tower.from_pretrained(path).parameters())
    saved = list(getattr(whole, name).parameters())
    assert [weight.shape for weight in weights] == [weight.shape for weight in saved]
    found[tower.__name__] = sum(torch.equal(one, other) for one, other in zip(weights, saved)), len(weights)
clip, clap = found["CLIPVisionModel"], found["ClapAudioModel"]
print(f"CLIPVisionModel: {clip[0]} of {clip[1]} weights are the saved ones; ClapAudioModel: {clap[0]} of {clap[1]}")
assert clip[0] == clip[1] and clap[0] == 0, "the behaviour has changed"
PY
