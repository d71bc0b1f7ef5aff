"""A rank that has finished exits with code 0, whatever the other ranks are still doing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import atexit
import time
from pathlib import Path

import torch.distributed as dist
from tiny import make_config
from megatron_anymal.parallel import initialize

# Registered first, so it runs last of what runs before the interpreter is taken down.
atexit.register(lambda: print("in the job" if dist.is_initialized() else "has left", flush=True))
config = make_config("unused", "unused", Path("unused"))
config.trainer.devices = config.model.tensor_model_parallel_size = 2
if initialize(config).reports:
    time.sleep(1)
"""


@pytest.mark.timeout(200)
def test_ranks_may_end_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(SCRIPT)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path / "rank.py")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0 and done.stdout.count("has left") == 2, done.stderr[-3000:]
