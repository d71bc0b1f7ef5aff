"""How fast, and in what memory, a HuggingFace Llama is imported and exported, beside a copy of its bytes on this disk.

    python benchmarks/conversion.py --out benchmarks/results/conversion.json

A Llama of random bf16 weights is made on the spot, tensor by tensor, and removed afterwards; three times its size must
be free. A copy reads each file, writes it elsewhere and syncs it. Copies, imports and exports take turns, each with its
source out of the page cache; a conversion is compared with the copies around it, because a shared disk's rate drifts.
An export ends before the comparison of logits (`--no-verify`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig

from megatron_anymal.checkpoint import store
from megatron_anymal.hf_weights import INDEX
from megatron_anymal.model.hf_llama import expected_tensors
from megatron_anymal.safetensors_io import SafetensorsWriter

BAR = 0.70
_SHARD = 1 << 30
_RATE = re.compile(r"GB in ([\d.]+) s, ")
_PEAKS = re.compile(r"memory beyond the start: ([\d,. ]+) MB")


@dataclass(frozen=True)
class Conversion:
    """One import or export, as it says of itself, and the whole command."""

    # Seconds of work, and those of the command with Python's start.
    seconds: float
    with_start: float
    # Per process, beyond what it held at its start, in bytes.
    peak_memory: tuple[int, ...]


@dataclass(frozen=True)
class Measured:
    """Rounds of copy, import, export, and a last copy."""

    bytes: int
    largest_tensor: int
    processes: int
    copy_seconds: tuple[float, ...]
    imports: tuple[Conversion, ...]
    exports: tuple[Conversion, ...]

    def ratios(self, conversions: tuple[Conversion, ...]) -> list[float]:
        """Of each round: the rate beside the mean of the copies before and after it."""
        around = zip(self.copy_seconds, self.copy_seconds[1:])
        return [(before + after) / 2 / one.seconds for (before, after), one in zip(around, conversions, strict=True)]


def llama_of(gigabytes: float, hidden: int) -> LlamaConfig:
    """A Llama shaped like the 8B one, with as many layers as make the size."""
    hf = LlamaConfig(
        vocab_size=8 * hidden,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=1,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    one = 2 * sum(math.prod(shape) for shape in expected_tensors(hf).values())
    layer = 2 * sum(math.prod(shape) for name, shape in expected_tensors(hf).items() if ".layers." in name)
    hf.num_hidden_layers = 1 + max(0, math.ceil((gigabytes * 1e9 - one) / layer))
    return hf


def make(folder: Path, hf: LlamaConfig) -> int:
    """Write the Llama's folder with random weights, in files of about a gigabyte; returns their bytes."""
    folder.mkdir()
    hf.save_pretrained(folder)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in expected_tensors(hf).items():
        size = 2 * math.prod(shape)
        if shards[-1] and filled + size > _SHARD:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    generator = torch.Generator().manual_seed(0)
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with SafetensorsWriter(
            folder / file, {name: (torch.bfloat16, shape) for name, shape in shard.items()}, {"format": "pt"}
        ) as writer:
            for name, shape in shard.items():
                writer.append(name, torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.1, 0.1, generator=generator))
                places[name] = file
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache, where the system does so."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_seconds(source: Path, target: Path) -> float:
    """Copy the weights, each file synced."""
    forget(source)
    target.mkdir()
    begun = time.perf_counter()
    for path in sorted(source.glob("*.safetensors")):
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - begun
    shutil.rmtree(target)
    return seconds


def convert(source: Path, tool: str, *arguments: str) -> Conversion:
    """Run one of the tools as a user does."""
    forget(source)
    begun = time.perf_counter()
    command = [sys.executable, "-W", "ignore", "-m", f"checkpoint_tools.{tool}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    with_start = time.perf_counter() - begun
    rate, peaks = _RATE.search(done.stdout), _PEAKS.search(done.stdout)
    if done.returncode or not rate or not peaks:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    memory = tuple(int(peak.replace(",", "")) * 1_000_000 for peak in peaks[1].split(", "))
    return Conversion(float(rate[1]), with_start, memory)


def measure(root: Path, hf: LlamaConfig, processes: int, rounds: int) -> Measured:
    """Make a Llama; copy, import and export it in turns; compare what came back with it."""
    source, imported, exported = root / "llama", root / "imported", root / "exported"
    size = make(source, hf)
    copies, imports, exports = [], [], []
    for number in range(rounds):
        copies.append(copy_seconds(source, root / "copy"))
        sizes = ["--processes", str(processes)]
        imports.append(convert(source, "import_hf", "--hf", str(source), "--out", str(imported), *sizes))
        if not number:
            store.read_manifest(imported, verify=True)
        exports.append(
            convert(imported, "export_hf", "--checkpoint", str(imported), "--out", str(exported), "--no-verify")
        )
        shutil.rmtree(imported)
        shutil.rmtree(exported)
    copies.append(copy_seconds(source, root / "copy"))
    largest = 2 * max(math.prod(shape) for shape in expected_tensors(hf).values())
    return Measured(size, largest, processes, tuple(copies), tuple(imports), tuple(exports))


def say(found: Measured) -> dict[str, Any]:
    """Print what was found; returns the ratios for the record."""
    rates = [found.bytes / 1e6 / seconds for seconds in found.copy_seconds]
    print(f"{found.bytes / 1e9:.2f} GB copied at {', '.join(f'{rate:.0f}' for rate in rates)} MB/s")
    ratios = {}
    for name, conversions in (("import", found.imports), ("export", found.exports)):
        ratios[name] = found.ratios(conversions)
        print(
            f"{name}: {', '.join(f'{found.bytes / 1e6 / one.seconds:.0f}' for one in conversions)} MB/s; of the copies "
            f"around it {statistics.median(ratios[name]):.2f} (median; {min(ratios[name]):.2f} to "
            f"{max(ratios[name]):.2f}; bar {BAR})"
        )
        start = statistics.median(one.with_start - one.seconds for one in conversions)
        most = max(peak for one in conversions for peak in one.peak_memory)
        print(
            f"  memory per process: {most / 1e6:.0f} MB, {most / found.largest_tensor:.2f} of the largest tensor (bar "
            f"2); {start:.1f} s of Python's start before it, not counted"
        )
    return ratios


def main() -> None:
    """Measure and print; with `--out` also write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the Llama")
    parser.add_argument("--hidden", type=int, default=4096, help="its width")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 4), help="of the import")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default=".", help="a folder on the disk to measure")
    parser.add_argument("--out", type=Path, help="where the numbers go as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix=".conversion-") as root:
        hf = llama_of(arguments.gigabytes, arguments.hidden)
        found = measure(Path(root).absolute(), hf, arguments.processes, arguments.rounds)
    ratios = say(found)
    if arguments.out:
        body = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join(["python", *sys.argv]),
            # Load averages of 1, 5 and 15 minutes: what else the machine did.
            "machine": {
                "processor": platform.machine(),
                "cores": os.cpu_count(),
                "kernel": platform.release(),
                "load": os.getloadavg(),
            },
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "ratios": ratios,
            **asdict(found),
        }
        arguments.out.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
