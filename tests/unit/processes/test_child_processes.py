"""Killing a process also ends the worker processes it started."""

from __future__ import annotations

import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

# Workers, started by spawn or fork, that never finish; their process ids are printed.
SCRIPT = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from megatron_anymal.processes.child_processes import end_with_parent

if __name__ == "__main__":
    with ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context(sys.argv[1]), initializer=end_with_parent
    ) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 1000).result()
"""


# The workers of `anymal prepare`, loading a plug-in that never returns.
PREPARE = """
import sys
from megatron_anymal.data import index_folder, index_processes
from megatron_anymal.data.index_builder import IndexOptions

if __name__ == "__main__":
    index_processes.BYTES_PER_WORKER = 1
    index_folder.make_index(sys.argv[1], IndexOptions(sys.argv[3], plugins=[sys.argv[2]]), workers=2)
"""
# One write per line: two workers share the pipe.
ENDLESS = "import os, time\nos.write(1, b'%d\\n' % os.getpid())\ntime.sleep(1000)\n"
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing tells a process of its parent's end")


def check_killed(words: list[str], workers: int) -> None:
    """Kill a process after its workers have printed their process ids, and check that the workers end too."""
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        left = [psutil.Process(int(parent.stdout.readline())) for _ in range(workers)]
        assert all(worker.is_running() for worker in left)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        deadline = time.monotonic() + 240
        for worker in left:
            with suppress(psutil.NoSuchProcess):
                while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)


@ON_LINUX
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_none_is_left(method: str, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(SCRIPT)
    check_killed([str(script), method], 1)


@ON_LINUX
def test_prepare_leaves_none(tmp_path: Path, tokenizer_folder: str) -> None:
    script, plugin, shards = tmp_path / "parent.py", tmp_path / "endless.py", tmp_path / "shards"
    script.write_text(PREPARE)
    plugin.write_text(ENDLESS)
    shards.mkdir()
    for name in ("a.tar", "b.tar"):
        tarfile.open(shards / name, "w").close()
    check_killed([str(script), str(shards), str(plugin), tokenizer_folder], 2)
