#!/usr/bin/env bash
# megatron-core 0.16.1, TransformerConfig(fp8="hybrid") without Transformer Engine.
#
# Guess: FP8 without the library that it needs, or with layers that do not support it, is an error or at least a warning.
# Behaviour: the layers of get_gpt_layer_local_spec ignore it. The model is built and trains in its usual precision, and
# the outputs are bitwise identical; no warning mentions FP8.
#
# Output seen: outputs equal True, warnings about FP8: 0
set -euo pipefail
source "$(dirname "$0")/megatron_core_on_cpu.sh"
cat > "$folder/run.py" <<'PY'
import logging
import warnings

import cuda_on_cpu
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig

messages = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: messages.append(record.getMessage())
logging.getLogger().addHandler(handler)
cuda_on_cpu.one_process()
torch.distributed.init_process_group("gloo")
parallel_state.initialize_model_parallel()
tensor_parallel.get_cuda_rng_tracker().add("model-parallel-rng", 0)
tokens = torch.arange(16)[None]
shape = dict(num_layers=1, hidden_size=32, num_attention_heads=2, bf16=True, params_dtype=torch.bfloat16)


def logits(**precision):
    torch.manual_seed(0)
    config = TransformerConfig(**shape, **precision, use_cpu_initialization=True)
    model = GPTModel(config, get_gpt_layer_local_spec(), vocab_size=64, max_sequence_length=16).bfloat16().eval()
    with torch.no_grad():
        return model(tokens, tokens, torch.ones(1, 1, 16, 16).tril() < 0.5)


with warnings.catch_warnings(record=True) as raised:
    warnings.simplefilter("always")
    equal = torch.equal(logits(), logits(fp8="hybrid"))
about = [message for message in [*messages, *(str(one.message) for one in raised)] if "fp8" in message.lower()]
print(f"outputs equal {equal}, warnings about FP8: {len(about)}")
assert equal and not about, "the behaviour has changed"
torch.distributed.destroy_process_group()
PY
"$folder/venv/bin/python" -W ignore "$folder/run.py" 2>/dev/null
