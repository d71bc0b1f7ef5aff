#!/usr/bin/env bash
# megatron-core 0.19.2, loading the state of an optimizer into one that was built with a different learning rate.
#
# Guess: it loads, as with 0.16.1 and with torch: a run may continue with a different rate, which the scheduler sets.
# Behaviour: parameter groups are matched by the rates that they were built with (max_lr, min_lr), too. With a different
# one, no group matches: a ValueError, or, from the distributed optimizer, a bare KeyError with the groups' fields.
#
# Output seen: the same rate: loads, loads; another rate: ValueError, KeyError (distributed)
set -euo pipefail
release=0.19.2 python=python3.12
source "$(dirname "$0")/megatron_core_on_cpu.sh"
cat > "$folder/run.py" <<'PY'
import cuda_on_cpu
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig


def optimizer(rate, distributed):
    shape = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
    wrapping = DistributedDataParallelConfig(use_distributed_optimizer=distributed)
    model = DistributedDataParallel(shape, wrapping, torch.nn.Linear(4, 4))
    settings = OptimizerConfig(optimizer="adam", lr=rate, use_distributed_optimizer=distributed, clip_grad=0.0)
    built = get_megatron_optimizer(settings, [model])
    for weight in model.parameters():
        weight.main_grad.fill_(1.0)
    built.step()
    return built


def loaded(rate, distributed):
    """Result of loading the state of an optimizer with the rate 0.1: "loads" or the error's name."""
    saved = optimizer(0.1, distributed).state_dict()
    try:
        optimizer(rate, distributed).load_state_dict(saved)
    except Exception as error:
        return type(error).__name__
    return "loads"


cuda_on_cpu.one_process()
torch.distributed.init_process_group("gloo")
parallel_state.initialize_model_parallel()
found = [[loaded(rate, distributed) for distributed in (False, True)] for rate in (0.1, 0.2)]
print(f"the same rate: {found[0][0]}, {found[0][1]}; another rate: {found[1][0]}, {found[1][1]} (distributed)")
assert found == [["loads", "loads"], ["ValueError", "KeyError"]], "the behaviour has changed"
torch.distributed.destroy_process_group()
PY
"$folder/venv/bin/python" -W ignore "$folder/run.py" 2>/dev/null
