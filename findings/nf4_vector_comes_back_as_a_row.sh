#!/usr/bin/env bash
# bitsandbytes 0.50.2, quantize_4bit and dequantize_4bit of a vector on a CPU.
#
# Guess: dequantize_4bit returns a tensor with the shape of the quantized one, which the QuantState holds.
# Behaviour: a vector comes back as a matrix of one row; tensors of two and three dimensions keep their shape. The values are
# correct in each case.
#
# Output seen: [128] -> [1, 128], [2, 64] -> [2, 64], [2, 1, 64] -> [2, 1, 64], values within a step: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 bitsandbytes==0.50.2
cat > "$folder/run.py" <<'PY'
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

torch.manual_seed(0)
shapes, close = [], True
for shape in ((128,), (2, 64), (2, 1, 64)):
    given = torch.randn(shape)
    packed, state = quantize_4bit(given, blocksize=64, quant_type="nf4")
    assert state.shape == given.shape
    back = dequantize_4bit(packed, state)
    shapes.append(f"{list(given.shape)} -> {list(back.shape)}")
    close &= bool((back.flatten() - given.flatten()).abs().max() < 0.2 * given.abs().max())
print(f"{', '.join(shapes)}, values within a step: {close}")
expected = ["[128] -> [1, 128]", "[2, 64] -> [2, 64]", "[2, 1, 64] -> [2, 1, 64]"]
assert shapes == expected and close, "the behaviour has changed"
PY
CUDA_VISIBLE_DEVICES= "$folder/venv/bin/python" -W ignore "$folder/run.py"
