#!/usr/bin/env bash
# megatron-core 0.16.1, the weight decay of biases and norms under get_megatron_optimizer.
#
# Guess: biases and one-dimensional weights do not decay. The optimizer puts them into a separate parameter group with
# wd_mult 0, and weight_decay was passed to it.
# Behaviour: every group starts with the full weight_decay, and step() ignores wd_mult. Only megatron-core's
# OptimizerParamScheduler multiplies the two. A training loop with torch's schedulers, or with its own learning rates, lets
# norms and biases decay like matrices. NeMo had the same problem: https://github.com/NVIDIA-NeMo/Speech/pull/12123
#
# Output seen: ones after a step without gradient, lr 0.1 and decay 0.5: matrix 0.95, bias 0.95 (its wd_mult is 0.0);
# with the scheduler: matrix 0.95, bias 1.00
set -euo pipefail
source "$(dirname "$0")/megatron_core_on_cpu.sh"
cat > "$folder/run.py" <<'PY'
import cuda_on_cpu
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig

RATE, DECAY = 0.1, 0.5
cuda_on_cpu.one_process()
torch.distributed.init_process_group("gloo")
parallel_state.initialize_model_parallel()
shape = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)


def after_a_step(with_scheduler):
    """Values of a matrix and a bias that were 1, after a step whose gradients are zero; and the bias's wd_mult."""
    layer = torch.nn.Linear(4, 4)
    for weight in layer.parameters():
        torch.nn.init.ones_(weight)
    model = DistributedDataParallel(shape, DistributedDataParallelConfig(), layer)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=RATE, weight_decay=DECAY), [model])
    if with_scheduler:
        OptimizerParamScheduler(
            optimizer, init_lr=RATE, max_lr=RATE, min_lr=RATE, lr_warmup_steps=0, lr_decay_steps=10,
            lr_decay_style="constant", start_wd=DECAY, end_wd=DECAY, wd_incr_steps=0, wd_incr_style="constant",
        )
    model.zero_grad_buffer()
    optimizer.step()
    multiples = [group["wd_mult"] for group in optimizer.param_groups if group["params"][0].dim() == 1]
    return layer.weight[0, 0].item(), layer.bias[0].item(), multiples


matrix, bias, multiples = after_a_step(with_scheduler=False)
print(f"ones after a step without gradient, lr {RATE} and decay {DECAY}: matrix {matrix:.2f}, bias {bias:.2f} ", end="")
print(f"(its wd_mult is {multiples[0]}); ", end="")
scheduled = after_a_step(with_scheduler=True)
print(f"with the scheduler: matrix {scheduled[0]:.2f}, bias {scheduled[1]:.2f}")
assert multiples == [0.0] and bias < 0.951, "the behaviour has changed"
assert scheduled[0] < 0.951 and scheduled[1] == 1, "the behaviour has changed"
torch.distributed.destroy_process_group()
PY
"$folder/venv/bin/python" -W ignore "$folder/run.py"
