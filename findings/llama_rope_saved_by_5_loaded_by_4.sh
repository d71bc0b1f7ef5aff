#!/usr/bin/env bash
# A Llama with the RoPE scaling of Llama 3.1, saved by transformers 5.24.0, loaded by transformers 4.57.6.
#
# Guess: the older version reads the folder or rejects it; all weights fit, and nothing warns.
# Behaviour: version 5 writes rope_theta and the scaling of RoPE into "rope_parameters", which version 4 does not read. It
# uses 10000 and no scaling. All logits after the first token are wrong, without a warning; vLLM and others had the same
# problem:
# https://github.com/vllm-project/vllm/pull/42624
#
# Output seen: rope_theta 10000.0, scaling None, 0 warnings; largest difference of the logits: first token 0.0, others 11.3
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 5.24.0 4.57.6; do
    python3.11 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet torch==2.13.0
    "$folder/$version/bin/pip" install --quiet "transformers==$version" numpy==2.4.6
done
cat > "$folder/run.py" <<'PY'
import logging
import sys
import warnings

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as library

folder, save = sys.argv[1], sys.argv[2] == "save"
rope = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
tokens = torch.arange(64)[None] % 16
if save:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=16)
    rope |= dict(original_max_position_embeddings=8192)
    shape = LlamaConfig(**sizes, initializer_range=0.5, max_position_embeddings=131072, rope_parameters=rope)
    model = LlamaForCausalLM(shape).eval()
    model.save_pretrained(folder)
    torch.save(model(tokens).logits.detach(), f"{folder}/logits.pt")
else:
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = messages.append
    library.add_handler(handler)
    with warnings.catch_warnings(record=True) as raised:
        model = LlamaForCausalLM.from_pretrained(folder).eval()
    difference = (model(tokens).logits - torch.load(f"{folder}/logits.pt")).abs()
    first, others = difference[:, 0].max().item(), difference[:, 1:].max().item()
    theta, scaling, told = model.config.rope_theta, model.config.rope_scaling, len(messages) + len(raised)
    print(f"rope_theta {theta}, scaling {scaling}, {told} warnings; ", end="")
    print(f"largest difference of the logits: first token {first:.1f}, others {others:.1f}")
    assert theta == 10000 and scaling is None and told == 0, "the behaviour has changed"
    assert first < 1e-3 and others > 0.1, "the behaviour has changed"
PY
"$folder/5.24.0/bin/python" "$folder/run.py" "$folder/llama" save
"$folder/4.57.6/bin/python" "$folder/run.py" "$folder/llama" load
