#!/usr/bin/env bash
# A CLIPVisionModel saved by transformers 5.24.0, loaded by transformers 4.57.6.
#
# Guess: the older version's from_pretrained reads the folder like one of its own, or rejects it.
# Behaviour: version 5 saves the weights without the prefix "vision_model." that version 4 looks for. Version 4 finds none
# of them, initialises all of them randomly, and only warns. The encoder's output is unrelated to that of the saved one.
#
# Output seen: 39 of 39 weights newly drawn, largest difference of the output 5.1 (different in each run)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 5.24.0 4.57.6; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet torch==2.13.0
    "$folder/$version/bin/pip" install --quiet "transformers==$version" numpy==2.4.6
done
cat > "$folder/run.py" <<'PY'
import sys

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

folder, save = sys.argv[1], sys.argv[2] == "save"
pixels = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
if save:
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    model = CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=8, **shape)).eval()
    model.save_pretrained(folder)
    torch.save(model(pixels).last_hidden_state.detach(), f"{folder}/output.pt")
else:
    model, told = CLIPVisionModel.from_pretrained(folder, output_loading_info=True)
    drawn, weights = len(told["missing_keys"]), len(list(model.parameters()))
    difference = (model.eval()(pixels).last_hidden_state - torch.load(f"{folder}/output.pt")).abs().max().item()
    print(f"{drawn} of {weights} weights newly drawn, largest difference of the output {difference:.1f}")
    assert drawn == weights and difference > 0.1, "the behaviour has changed"
PY
"$folder/5.24.0/bin/python" "$folder/run.py" "$folder/clip" save
"$folder/4.57.6/bin/python" "$folder/run.py" "$folder/clip" load
