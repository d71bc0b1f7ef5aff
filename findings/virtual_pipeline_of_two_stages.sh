#!/usr/bin/env bash
# megatron-core 0.16.1, the interleaved schedule on two pipeline stages with its default communication.
#
# Guess: the gradients do not depend on the number of stages. batch_p2p_comm=True, overlap_p2p_comm=False is the default of
# the configuration, and the schedule accepts it.
# Behaviour: with two stages the previous and the next rank are the same, and messages of one batch are matched by their
# order alone: a gradient is taken for an activation and vice versa. Losses are correct, gradients are wrong, and no
# error is raised. Four stages are correct, and so are two with overlap_p2p_comm. Megatron-LM's command line refuses two
# stages, megatron-core does not: https://github.com/NVIDIA/Megatron-LM/issues/750. It is shown here over gloo; the
# maintainers' explanation there does not depend on the backend.
#
# Output seen: largest relative error of a gradient: 2 stages 10.30, 4 stages 0.00, 2 stages with overlap 0.00
set -euo pipefail
source "$(dirname "$0")/megatron_core_on_cpu.sh"
cat > "$folder/run.py" <<'PY'
import datetime
import math
import sys

import cuda_on_cpu  # noqa: F401
import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig

CHUNKS, MICRO_BATCHES = 2, 4
overlap = {"overlap": {"overlap_p2p_comm": True, "batch_p2p_comm": False}, "default": {}}[sys.argv[1]]
torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
stage, stages = torch.distributed.get_rank(), torch.distributed.get_world_size()
layout = {"pipeline_model_parallel_size": stages, "virtual_pipeline_model_parallel_size": CHUNKS}
parallel_state.initialize_model_parallel(**layout)
shape = {"num_layers": CHUNKS * stages, "hidden_size": 4, "num_attention_heads": 1}
config = TransformerConfig(**shape, **layout, **overlap, pipeline_dtype=torch.float32)
factors = [1 + number / 10 for number in range(CHUNKS * stages)]


class Chunk(torch.nn.Module):
    """Multiplies by one number; the loss of a sample x is x times all factors."""

    def __init__(self, number):
        super().__init__()
        self.config, self.model_type, self.number = config, ModelType.encoder_or_decoder, number
        self.factor = torch.nn.Parameter(torch.tensor(factors[number]))

    def set_input_tensor(self, received):
        self.received = received[0]

    def forward(self, sample):
        return self.factor * (self.received if self.number else sample)


def forward_step(samples, chunk):
    return chunk(next(samples)), lambda output: (output.mean(), {})


chunks = [Chunk(stage + stages * k) for k in range(CHUNKS)]
samples = [torch.full((1, 1, 4), 1.0 + k) for k in range(MICRO_BATCHES)]
get_forward_backward_func()(
    forward_step_func=forward_step, data_iterator=[iter(samples) for _ in chunks], model=chunks,
    num_microbatches=MICRO_BATCHES, seq_length=1, micro_batch_size=1, forward_only=False,
)
mean = sum(sample.mean().item() for sample in samples) / MICRO_BATCHES
expected = [mean * math.prod(factors) / factors[chunk.number] for chunk in chunks]
error = torch.tensor(max(abs(chunk.factor.grad.item() / value - 1) for chunk, value in zip(chunks, expected)))
torch.distributed.all_reduce(error, torch.distributed.ReduceOp.MAX)
if stage == 0:
    print(f"RESULT {error.item():.2f}", flush=True)
torch.distributed.destroy_process_group()
PY
error_of() {
    OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W ignore -m torch.distributed.run --standalone --nproc-per-node "$1" \
        "$folder/run.py" "$2" 2>/dev/null | sed -n 's/^RESULT //p'
}
two=$(error_of 2 default) four=$(error_of 4 default) overlap=$(error_of 2 overlap)
echo "largest relative error of a gradient: 2 stages $two, 4 stages $four, 2 stages with overlap $overlap"
[ "$four" = 0.00 ] && [ "$overlap" = 0.00 ] && [ "$two" != 0.00 ] || { echo "the behaviour has changed"; exit 1; }
