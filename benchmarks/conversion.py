"""Measure speed and memory of importing and exporting a HuggingFace Llama, relative to copying its files on this disk.

    python benchmarks/conversion.py --out benchmarks/results/conversion.json

A Llama with random bf16 weights is written tensor by tensor and removed afterwards; three times its size must be free.
A copy reads each file, writes it elsewhere and syncs it. Copies, imports and exports alternate, each with its source
evicted from the page cache; a conversion is compared with the copies before and after it, because the rate of a shared
disk drifts. Exports skip the comparison of logits (`--no-verify`).
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
_PEAKS = re.compile(r"peak memory above the baseline at start: ([\d,. ]+) MB")


@dataclass(frozen=True)
class Conversion:
    """One import or export: its own measurements, and the duration of the whole command."""

    # Seconds of the conversion, and of the whole command including Python's startup.
    seconds: float
    with_start: float
    # Per process: peak memory beyond its memory at start, in bytes.
    peak_memory: tuple[int, ...]


@dataclass(frozen=True)
class ConversionRounds:
    """Rounds of copy, import and export, and a final copy."""

    bytes: int
    largest_tensor: int
    processes: int
    copy_seconds: tuple[float, ...]
    imports: tuple[Conversion, ...]
    exports: tuple[Conversion, ...]

    def ratios(self, conversions: tuple[Conversion, ...]) -> list[float]:
        """Per round: the rate relative to the mean of the copies before and after it."""
        around = zip(self.copy_seconds, self.copy_seconds[1:])
        return [(before + after) / 2 / one.seconds for (before, after), one in zip(around, conversions, strict=True)]


def llama_of(gigabytes: float, hidden: int) -> LlamaConfig:
    """A Llama with the proportions of the 8B model and enough layers to reach the size."""
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
    with_one_layer = 2 * sum(math.prod(shape) for shape in expected_tensors(hf).values())
    layer = 2 * sum(math.prod(shape) for name, shape in expected_tensors(hf).items() if ".layers." in name)
    hf.num_hidden_layers = 1 + max(0, math.ceil((gigabytes * 1e9 - with_one_layer) / layer))
    return hf


def make(folder: Path, hf: LlamaConfig) -> int:
    """Write the Llama's folder with random weights, in files of about 1 GB; return their total size in bytes."""
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
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with SafetensorsWriter(
            folder / file, {name: (torch.bfloat16, shape) for name, shape in shard.items()}, {"format": "pt"}
        ) as writer:
            for name, shape in shard.items():
                writer.append(name, torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.1, 0.1, generator=generator))
                weight_map[name] = file
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def forget(folder: Path) -> None:
    """Evict a folder's files from the page cache, if the system allows it."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_seconds(source: Path, target: Path) -> float:
    """Copy the weight files, syncing each; return the seconds."""
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
    """Run one of the tools as a user would."""
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


def measure(root: Path, hf: LlamaConfig, processes: int, rounds: int) -> ConversionRounds:
    """Create a Llama, then copy, import and export it in each round; the first import is verified."""
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
    return ConversionRounds(size, largest, processes, tuple(copies), tuple(imports), tuple(exports))


def say(measured: ConversionRounds) -> dict[str, Any]:
    """Print the results; return the ratios."""
    rates = [measured.bytes / 1e6 / seconds for seconds in measured.copy_seconds]
    print(f"{measured.bytes / 1e9:.2f} GB copied at {', '.join(f'{rate:.0f}' for rate in rates)} MB/s")
    ratios = {}
    for name, conversions in (("import", measured.imports), ("export", measured.exports)):
        ratios[name] = measured.ratios(conversions)
        print(
            f"{name}: {', '.join(f'{measured.bytes / 1e6 / one.seconds:.0f}' for one in conversions)} MB/s; relative "
            f"to the adjacent copies {statistics.median(ratios[name]):.2f} (median; {min(ratios[name]):.2f} to "
            f"{max(ratios[name]):.2f}; bar {BAR})"
        )
        start = statistics.median(one.with_start - one.seconds for one in conversions)
        most = max(peak for one in conversions for peak in one.peak_memory)
        print(
            f"  memory per process: {most / 1e6:.0f} MB, {most / measured.largest_tensor:.2f} of the largest tensor "
            f"(bar 2); excludes {start:.1f} s of Python startup"
        )
    return ratios


def main() -> None:
    """Measure and print; with `--out` also write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the Llama in GB (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=4096, help="hidden size of the Llama (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 4), help="workers of the import")
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds of copy, import and export (default: %(default)s)"
    )
    parser.add_argument("--folder", default=".", help="folder on the disk to measure")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix=".conversion-") as root:
        hf = llama_of(arguments.gigabytes, arguments.hidden)
        measured = measure(Path(root).absolute(), hf, arguments.processes, arguments.rounds)
    ratios = say(measured)
    if arguments.out:
        body = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join(["python", *sys.argv]),
            # Load averages over 1, 5 and 15 minutes, to show other load on the machine.
            "machine": {
                "processor": platform.machine(),
                "cores": os.cpu_count(),
                "kernel": platform.release(),
                "load": os.getloadavg(),
            },
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "ratios": ratios,
            **asdict(measured),
        }
        arguments.out.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
