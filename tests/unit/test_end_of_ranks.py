"""A rank that has finished exits with code 0, whatever the other ranks are still doing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ports import free_port

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


def test_ranks_may_end_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(SCRIPT)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONPATH": path}
    # New interpreters, because the test is about how an interpreter is torn down.
    ranks = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "rank.py")],
            env={**os.environ, **job, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=(tmp_path / rank).open("w"),
            text=True,
        )
        for rank in "01"
    ]
    try:
        printed = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], [(tmp_path / rank).read_text()[-3000:] for rank in "01"]
    assert printed == ["has left\n"] * 2
