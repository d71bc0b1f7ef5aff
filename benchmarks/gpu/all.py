"""Run all GPU benchmarks, each in its own process, with one JSON file each: date, GPU, versions, command and results.

If a benchmark fails, the others still run. A dry run runs two at a time; its numbers are meaningless.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Optional

from megatron_anymal.processes.child_processes import end_group

HERE = Path(__file__).parent
# In this order: short ones first, and the one that needs the most memory last.
NAMES = ("kernels", "alignment_8b", "sft_8b", "dpo_8b", "alignment_70b_fp8")


def run(name: str, folder: Path, dry_run: bool, limit: Optional[float]) -> int:
    """Run one benchmark and also save its output as text next to its JSON file; return its exit code.

    Args:
        limit: seconds after which it is ended, with code 124; None: never.
    """
    words = [sys.executable, str(HERE / f"{name}.py"), "--out", str(folder / f"{name}.json")]
    begun = time.monotonic()
    with (folder / f"{name}.txt").open("w") as output:
        process = subprocess.Popen(
            [*words, *(["--dry-run"] if dry_run else [])],
            stdout=output,
            stderr=subprocess.STDOUT,
            # A group of its own, so that it can be ended together with its loader processes.
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            ending = "done" if code == 0 else f"FAILED with exit code {code}"
        except subprocess.TimeoutExpired:
            code, ending = 124, "ENDED at its limit; its finished cases are in its JSON file"
        finally:
            if process.poll() is None:
                end_group(process.pid)
                process.wait()
    text = (folder / f"{name}.txt").read_text()
    print(f"== {name}: {ending} after {time.monotonic() - begun:.0f} s\n{text}", flush=True)
    return code


def main(argv: Sequence[str]) -> int:
    """Run the benchmarks; return the exit code (1 if one failed)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="output folder, created if missing")
    parser.add_argument("--dry-run", action="store_true", help="run the same code with tiny sizes on the CPU")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="benchmarks to run (default: all)")
    parser.add_argument(
        "--limit", type=float, metavar="SECONDS", help="end each benchmark after this time (default: never)"
    )
    arguments = parser.parse_args(argv)
    if arguments.limit is not None and arguments.limit <= 0:
        parser.error(f"--limit must be a positive number of seconds; it is {arguments.limit:g}.")
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2 if arguments.dry_run else 1) as pool:
        codes = list(pool.map(lambda name: run(name, folder, arguments.dry_run, arguments.limit), arguments.only))
    return 1 if any(codes) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
