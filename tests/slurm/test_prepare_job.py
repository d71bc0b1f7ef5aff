"""slurm/prepare.sh on a Slurm of two nodes: the joined index is that of one process, after a requeue as well."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from loopback import Cluster
from tars import write_tar
from tiny import png

from megatron_anymal.data.index_builder import IndexOptions
from megatron_anymal.data.index_folder import make_index
from megatron_anymal.modalities import load_plugins

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slurm, pytest.mark.slow]
# A modality whose file is read only once another file exists; a marker file shows that reading has begun.
PLUGIN = """
import os, time
from megatron_anymal.modalities import Modality, register

@register("slow")
class Slow(Modality):
    extensions = ("slow",)
    Options = object

    @classmethod
    def probe(cls, data, extension, attributes, limits):
        path = data.decode()
        open(path + ".begun", "a").close()
        while not os.path.exists(path):
            time.sleep(0.1)
        return 1.0, 1.0

    def count_pieces(self, sizes): ...
    def decode(self, data, extension, attributes, pieces): ...
    piece_shape = ()
"""


def submit(cluster: Cluster, folder: Path, *arguments: str) -> tuple[int, int]:
    """Submit both jobs; return their numbers."""
    environment = {**cluster.environment, "ANYMAL_HOME": str(ROOT), "ANYMAL_VENV": sys.prefix, "OMP_NUM_THREADS": "1"}
    words = ["bash", str(ROOT / "slurm" / "prepare.sh"), "--cpus-per-task=2", "--time=60", *arguments]
    done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, timeout=240)
    numbers = re.fullmatch(r"parts: job (\d+) \(1-\d+\); joined by job (\d+)\n", done.stdout)
    assert done.returncode == 0 and numbers, done.stderr
    return int(numbers[1]), int(numbers[2])


def ended(cluster: Cluster, folder: Path, number: int) -> str:
    """The state of a job that has ended."""
    final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    output = "\n".join(path.read_text() for path in folder.glob("slurm-*.out"))
    cluster.wait(lambda: cluster.job(number)["JobState"] in final, 240, f"end of job {number}\n{output}")
    return cluster.job(number)["JobState"]


def index_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in (folder / "index").rglob("*") if p.is_file()}


def shards(folder: Path, slow: Path) -> Path:
    """Seven shards; one of them has a file of the slow modality."""
    for number in range(7):
        members = [(f"{n}.{e}", png(n) if e == "png" else b"one") for n in range(number, 9) for e in ("png", "txt")]
        more = [("s.slow", str(slow).encode()), ("s.txt", b"one")] if number == 4 else []
        write_tar(folder / f"{number}.tar", [*members, *more])
    return folder


@pytest.mark.timeout(900)
def test_parts_and_the_joining_job(cluster: Cluster, tmp_path: Path, tokenizer_folder: str) -> None:
    go, plugin = tmp_path / "go", tmp_path / "plugin.py"
    plugin.write_text(PLUGIN)
    folder = shards(tmp_path / "f", go)
    array, merge = submit(
        cluster, tmp_path, "3", "--index-only", str(folder), f"--tokenizer={tokenizer_folder}", f"--plugin={plugin}"
    )
    # Part 2 takes shards 1 and 4.
    cluster.wait(Path(f"{go}.begun").exists, 120, "shard 4 that is being read")
    cluster.run("scancel", "--batch", "--signal=USR1", f"{array}_2")

    def restarted() -> bool:
        cluster.release(f"{array}_2")  # type: ignore[arg-type]
        return cluster.job(f"{array}_2")["Restarts"] == "1"  # type: ignore[arg-type]

    cluster.wait(restarted, 240, "task 2 that runs again")
    assert cluster.job(merge)["JobState"] == "PENDING"
    go.touch()
    assert ended(cluster, tmp_path, merge) == "COMPLETED"
    log = (tmp_path / f"slurm-{array}_2.out").read_text()
    assert f"job {array}_2: requeueing" in log and "part 2/3: 1 shards kept, 1 read" in log
    joined = index_files(folder)
    load_plugins([str(plugin)])
    make_index(str(folder), IndexOptions(tokenizer_folder, plugins=[str(plugin)]), rebuild=True)
    assert index_files(folder) == joined


def test_a_failed_part_cancels_the_joining_job(cluster: Cluster, tmp_path: Path, tokenizer_folder: str) -> None:
    folder = shards(tmp_path / "f", tmp_path)
    shutil.copy(folder / "1.tar", folder / "1.TAR")
    _, merge = submit(cluster, tmp_path, "2", f"--index-only={folder}", f"--tokenizer={tokenizer_folder}")
    assert ended(cluster, tmp_path, merge) == "CANCELLED"
    assert not (folder / "index" / "index.json").exists()
