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

NAMES = ("kernels", "alignment_8b", "sft_8b", "dpo_8b", "alignment_70b_fp8")
HERE = Path(__file__).parent


def run(name: str, folder: Path, dry_run: bool) -> int:
    """Run one benchmark and also save its output as text next to its JSON file."""
    words = [sys.executable, str(HERE / f"{name}.py"), "--out", str(folder / f"{name}.json")]
    begun = time.monotonic()
    done = subprocess.run(
        [*words, *(["--dry-run"] if dry_run else [])], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    (folder / f"{name}.txt").write_text(done.stdout)
    ending = "done" if done.returncode == 0 else f"FAILED with exit code {done.returncode}"
    print(f"== {name}: {ending} after {time.monotonic() - begun:.0f} s\n{done.stdout}", flush=True)
    return done.returncode


def main(argv: Sequence[str]) -> int:
    """Run the benchmarks; return the exit code (1 if one failed)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="output folder, created if missing")
    parser.add_argument("--dry-run", action="store_true", help="run the same code with tiny sizes on the CPU")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    arguments = parser.parse_args(argv)
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2 if arguments.dry_run else 1) as pool:
        codes = list(pool.map(lambda name: run(name, folder, arguments.dry_run), arguments.only))
    return 1 if any(codes) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
