#!/usr/bin/env bash
# megatron-core 0.16.1, a checkpoint of the distributed optimizer in the format fully_reshardable.
#
# Guess: the checkpoint holds the optimizer's state, whatever the size of the gradient buckets, which only affects speed.
# Behaviour: with more than one bucket (overlapped reduction), the moments of every parameter after the first bucket are
# saved from a wrong offset: the padding at the ends of buckets is cut from the state, but not from the offsets. Values past
# the end are replaced by zeros, with a warning, and saved anyway; a shift within the state gives no warning. A run resumes
# from such a checkpoint, and its loss jumps. Fixed after 0.16.1: https://github.com/NVIDIA/Megatron-LM/pull/5077
#
# Output seen: 1 bucket: wrong values of exp_avg 0, 0, 0; 3 buckets: 0, 25, 25 (of 25 per weight, the first bucket first)
set -euo pipefail
source "$(dirname "$0")/megatron_core_on_cpu.sh" psutil==7.2.2
cat > "$folder/run.py" <<'PY'
import os
import sys

import cuda_on_cpu
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig


def wrong_values(bucket_size, folder):
    """Number of buckets, and how many values of each weight's first moment differ in the checkpoint, last weight first."""
    shape = TransformerConfig(num_layers=1, hidden_size=5, num_attention_heads=1)
    layers = torch.nn.Sequential(*(torch.nn.Linear(5, 5, bias=False) for _ in range(3)))
    buckets = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=True, bucket_size=bucket_size
    )
    model = DistributedDataParallel(shape, buckets, layers)
    settings = OptimizerConfig(optimizer="adam", lr=0.1, use_distributed_optimizer=True, clip_grad=0.0)
    optimizer = get_megatron_optimizer(settings, [model])
    model.zero_grad_buffer()
    for number, weight in enumerate(layers.parameters()):
        weight.main_grad.fill_(10.0 * (number + 1))
    optimizer.step()

    sharded = {name: ShardedTensor.from_rank_offsets(name, weight) for name, weight in layers.named_parameters()}
    how = {"distrib_optim_sharding_type": "fully_reshardable"}
    state = optimizer.sharded_state_dict({"model": sharded}, metadata=how)
    os.makedirs(folder)
    dist_checkpointing.save({"model": sharded, "optimizer": state}, folder)
    saved = dist_checkpointing.load_plain_tensors(folder)
    differ = []
    for number, name in reversed(list(enumerate(sharded))):
        [moment] = [value for key, value in saved.items() if key.endswith(f"exp_avg.{name}")]
        # After one step the first moment is a tenth of the gradient.
        differ.append(int((moment - (number + 1.0)).abs().gt(1e-5).sum()))
    return len(model.buffers[0].buckets), differ


if __name__ == "__main__":
    cuda_on_cpu.one_process()
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    one = wrong_values(None, f"{sys.argv[1]}/one")
    three = wrong_values(20, f"{sys.argv[1]}/three")
    shown = [", ".join(map(str, differ)) for _, differ in (one, three)]
    print(f"{one[0]} bucket: wrong values of exp_avg {shown[0]}; {three[0]} buckets: {shown[1]}", end=" ")
    print("(of 25 per weight, the first bucket first)")
    assert one == (1, [0, 0, 0]) and three == (3, [0, 25, 25]), "the behaviour has changed"
    torch.distributed.destroy_process_group()
PY
"$folder/venv/bin/python" -W ignore "$folder/run.py" "$folder" 2>/dev/null
