"""Without a GPU, torch's compiler is imported when something is compiled, and nothing else notices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from megatron_anymal.dependencies.installed import has_nvidia_driver

pytestmark = pytest.mark.skipif(has_nvidia_driver(), reason="with a GPU the compiler is imported as usual")

# Runs what asks for the compiler, then compiles; reports whether it was loaded, and the results.
CODE = """
import json, sys
from megatron_anymal import lean_imports
if sys.argv[1] == "hooks":
    lean_imports.install()
import torch, torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from lightning.fabric.wrappers import _unwrap_compiled
import transformers.modeling_utils
seen = {}
seen["models"] = sorted(dir(transformers.models)) + sorted(dir(transformers))

torch.manual_seed(1)
layer = torch.nn.Linear(4, 4)
optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
for _ in range(3):
    checkpoint(layer, torch.ones(2, 4), use_reentrant=False).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
seen["weights"] = [value.hex() for value in layer.weight.flatten().tolist()]

@torch.compiler.disable
def excluded(x):
    return x + 1

@torch.compiler.disable(recursive=False)
def excluded_too(x):
    return x * 2

def allowed(x):
    return x
seen["same"] = torch._dynamo.allow_in_graph(allowed) is allowed
seen["sum"] = excluded_too(excluded(torch.ones(3))).sum().item()
seen["unwrapped"] = _unwrap_compiled(layer)[0] is layer
seen["loaded"] = "torch._dynamo.eval_frame" in sys.modules

if sys.argv[2] == "shim":
    from megatron_anymal import cpu_shim
    cpu_shim.install()
    seen["loaded_by_shim"] = "torch._dynamo.eval_frame" in sys.modules

graphs = []
def backend(graph, inputs):
    graphs.append([str(node.target) for node in graph.graph.nodes])
    return graph.forward
compiled = torch.compile(layer, backend=backend)
seen["compiled"] = torch.equal(compiled(torch.ones(2, 4)), layer(torch.ones(2, 4)))
seen["wrapped"] = type(_unwrap_compiled(compiled)[0]).__name__
torch.compile(lambda x: excluded(x.sin()).cos(), backend=backend)(torch.ones(3))
seen["graphs"] = len(graphs)
seen["marked"] = id(allowed) in torch._dynamo.trace_rules._allowed_callable_ids
print("SEEN" + json.dumps(seen))
"""


def report(*options: str) -> dict[str, Any]:
    """What `CODE` reports in a new interpreter."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE, *options],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("SEEN")[1])


def test_nothing_but_the_time_of_the_import_differs() -> None:
    deferred, usual = report("hooks", "plain"), report("usual", "plain")
    assert (deferred.pop("loaded"), usual.pop("loaded")) == (False, True)
    assert deferred == usual
    # The backend got the layer, and the function in two parts, since the excluded one lies between.
    assert usual["graphs"] == 3 and usual["marked"] and usual["sum"] == 12


def test_with_the_shim_nothing_is_compiled() -> None:
    """The shim does not import the compiler; once it is imported, functions run eagerly."""
    seen = report("hooks", "shim")
    assert not seen["loaded"] and not seen["loaded_by_shim"]
    assert seen["graphs"] == 0 and seen["compiled"]
