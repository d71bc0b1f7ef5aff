#!/usr/bin/env bash
# megatron-core 0.16.1, destroy_model_parallel() followed by torch.distributed.destroy_process_group().
#
# Guess: no process group is left, so a process that stays alive has left the job: its peers' collectives end with an error.
# Behaviour: the data-parallel group and its gloo counterpart stay, with their threads and connections, in two further global
# variables that are not reset. A peer that reduces gradients in such a group waits as long as the process lives, while in
# other groups it gets an error at once.
#
# Output seen: left: _INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP _INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP_GLOO
#              peers: tensor-and-data closed data waits
set -euo pipefail
source "$(dirname "$0")/megatron_core_on_cpu.sh"
cat > "$folder/run.py" <<'PY'
import datetime
import gc
import time

import cuda_on_cpu  # noqa: F401
import torch
import torch.distributed as dist
from megatron.core import parallel_state

dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
parallel_state.initialize_model_parallel()
groups = [
    parallel_state.get_tensor_and_data_parallel_group(),
    parallel_state.get_data_parallel_group(with_context_parallel=True),
]
for group in groups:
    dist.all_reduce(torch.ones(1), group=group)
if dist.get_rank() == 1:
    # This process leaves the groups and stays alive.
    del group, groups
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    gc.collect()
    print("LEFT", *(n for n, v in sorted(vars(parallel_state).items()) if isinstance(v, dist.ProcessGroup)), flush=True)
    time.sleep(12)
else:
    time.sleep(3)
    for name, group in zip(("tensor-and-data", "data"), groups):
        begun = time.monotonic()
        try:
            dist.all_reduce(torch.ones(1), group=group, async_op=True).wait(datetime.timedelta(seconds=5))
        except RuntimeError:
            print("PEER", name, "waits" if time.monotonic() - begun > 4 else "closed", flush=True)
PY
seen=$(OMP_NUM_THREADS=1 timeout 120 "$folder/venv/bin/python" -W ignore -m torch.distributed.run --standalone \
    --nproc-per-node 2 "$folder/run.py" 2>/dev/null || true)
left=$(sed -n 's/^LEFT //p' <<< "$seen") peers=$(sed -n 's/^PEER //p' <<< "$seen" | tr '\n' ' ')
echo "left: $left"
echo "peers: $peers"
expected="_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP _INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP_GLOO"
[ "$left" = "$expected" ] && [ "$peers" = "tensor-and-data closed data waits " ] || { echo "the behaviour has changed"; exit 1; }
