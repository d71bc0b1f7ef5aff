#!/usr/bin/env bash
# torch 2.13.0, interpolate(antialias=True) of one uint8 picture whose pixels are stored channels last.
#
# Guess: pixels [height, width, 3] as a batch of one, pixels.permute(2, 0, 1)[None] or pixels[None].permute(0, 3, 1, 2), are
# the same tensor: equal shapes and values, and is_contiguous(memory_format=torch.channels_last) is True for both. So the
# result is channels last as well.
# Behaviour: only the second result is. [None] gives the batch dimension the stride 3, is_contiguous ignores the stride of a
# dimension of size one, and interpolate does not. The first result is planar: the same values, but converting it back to
# [height, width, 3] reads across the planes, which takes longer than the resize.
#
# Output seen: strides (3, 1, 1920, 3) -> (338688, 112896, 336, 1), (691200, 1, 1920, 3) -> (338688, 1, 1008, 3); channels
# last before: [True, True], after: [False, True]; equal: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/run.py" <<'PY'
import torch

torch.manual_seed(0)
pixels = torch.randint(0, 256, (360, 640, 3), dtype=torch.uint8)
given = [pixels.permute(2, 0, 1)[None], pixels[None].permute(0, 3, 1, 2)]
assert torch.equal(*given)
resized = [
    torch.nn.functional.interpolate(view, size=(336, 336), mode="bicubic", antialias=True) for view in given
]
before, after = (
    [tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors] for tensors in (given, resized)
)
strides = ", ".join(f"{view.stride()} -> {result.stride()}" for view, result in zip(given, resized))
equal = torch.equal(*resized)
print(f"strides {strides}; channels last before: {before}, after: {after}; equal: {equal}")
assert before == [True, True] and after == [False, True] and equal, "the behaviour has changed"
PY
CUDA_VISIBLE_DEVICES= "$folder/venv/bin/python" -W ignore "$folder/run.py"
