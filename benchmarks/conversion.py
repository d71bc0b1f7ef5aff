"""How fast a HuggingFace Llama is imported, beside a plain copy of the same bytes on the same disk, and in what memory.

    python benchmarks/conversion.py --out benchmarks/results/conversion.json

A Llama of random bf16 weights is made on the spot, tensor by tensor, and removed afterwards; twice its size must be
free. The copy reads each file, writes it elsewhere and syncs it; both begin with the source out of the page cache.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig

from checkpoint_tools.import_hf import main as import_hf
from megatron_anymal.checkpoint import store
from megatron_anymal.model.hf_llama import expected_tensors
from megatron_anymal.tensor_files import INDEX, SafetensorsWriter

BAR = 0.70
_SHARD = 1 << 30


@dataclass(frozen=True)
class Measured:
    """One import and the copies around it; rates in MB/s of source bytes."""

    bytes: int
    processes: int
    # Before and after the import: a shared disk's rate drifts.
    copy_rates: tuple[float, float]
    import_rate: float
    # Import / mean of the copies.
    ratio: float
    largest_tensor: int
    # Per process, beyond what it held at its start, in bytes.
    peak_memory: tuple[int, ...]


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


@contextlib.contextmanager
def timed() -> Iterator[list[float]]:
    """Seconds of the block, in a list once it is over."""
    seconds: list[float] = []
    begun = time.perf_counter()
    yield seconds
    seconds.append(time.perf_counter() - begun)


def copy_seconds(source: Path, target: Path) -> float:
    """Copy the weights, each file synced."""
    forget(source)
    target.mkdir()
    with timed() as seconds:
        for path in sorted(source.glob("*.safetensors")):
            shutil.copyfile(path, target / path.name)
            with (target / path.name).open("rb") as file:
                os.fsync(file.fileno())
    shutil.rmtree(target)
    return seconds[0]


def measure(root: Path, hf: LlamaConfig, processes: int) -> Measured:
    """Make a Llama, copy it, import it, copy it again."""
    source = root / "llama"
    size = make(source, hf)
    before = copy_seconds(source, root / "copy")
    forget(source)
    said = io.StringIO()
    with timed() as seconds, contextlib.redirect_stdout(said):
        code = import_hf(["--hf", str(source), "--out", str(root / "imported"), "--processes", str(processes)])
    assert code == 0, said.getvalue()
    store.read_manifest(root / "imported", verify=True)
    shutil.rmtree(root / "imported")
    after = copy_seconds(source, root / "copy")
    peaks = re.search(r"memory beyond the start: ([\d,. ]+) MB", said.getvalue())
    assert peaks is not None, said.getvalue()
    return Measured(
        bytes=size,
        processes=processes,
        copy_rates=(size / 1e6 / before, size / 1e6 / after),
        import_rate=size / 1e6 / seconds[0],
        ratio=(before + after) / 2 / seconds[0],
        largest_tensor=2 * max(math.prod(shape) for shape in expected_tensors(hf).values()),
        peak_memory=tuple(int(peak.replace(",", "")) * 1_000_000 for peak in peaks[1].split(", ")),
    )


def main() -> None:
    """Measure and print; with `--out` also write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the Llama")
    parser.add_argument("--hidden", type=int, default=4096, help="its width")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 4))
    parser.add_argument("--folder", default=".", help="a folder on the disk to measure")
    parser.add_argument("--out", type=Path, help="where the numbers go as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix=".conversion-") as root:
        found = measure(Path(root), llama_of(arguments.gigabytes, arguments.hidden), arguments.processes)
    print(
        f"{found.bytes / 1e9:.2f} GB: copied at {found.copy_rates[0]:.0f} and {found.copy_rates[1]:.0f} MB/s, imported "
        f"at {found.import_rate:.0f} MB/s by {found.processes} process(es): {found.ratio:.2f} of the copy (bar {BAR})"
    )
    most = max(found.peak_memory)
    print(f"memory per process: {most / 1e6:.0f} MB, {most / found.largest_tensor:.2f} of the largest tensor (bar 2)")
    if arguments.out:
        arguments.out.write_text(json.dumps(asdict(found), indent=1) + "\n")


if __name__ == "__main__":
    main()
