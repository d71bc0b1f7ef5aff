"""`anymal prepare --filter integrity=FILE` with samples checked in batches, against one at a time.

    PYTHONPATH=tests python benchmarks/integrity_filter.py --samples 512

Samples have a picture, a question and an answer; the classifiers are a RegNetY and a BERT, trained on planted patterns.
Both variants run in this process, `--rounds` times in turn, and the ratio of their medians is taken. Prints one JSON
object: samples per second of processor time and of wall time for both, and the ratios. The shards must be equal.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from integrity_classifiers import (
    digits,
    image_classifier,
    image_section,
    integrity_file,
    png_of,
    sentence,
    text_classifier,
    text_section,
)
from measuring import surroundings
from tiny import make_tokenizer

from megatron_anymal.cli.prepare import main as prepare
from megatron_anymal.data import filters

TOGETHER = filters._TOGETHER


def write_samples(folder: Path, count: int) -> Path:
    """Write pictures and a manifest; one sample in sixteen has a planted word."""
    rng = np.random.default_rng(0)
    lines = []
    for number, picture in enumerate(digits(False, 3, count)):
        (folder / f"{number}.png").write_bytes(png_of(picture))
        answer = {"text": f"{sentence(rng)} {sentence(rng, 'zorpal' if number % 16 == 5 else '')}"}
        parts = [{"media": f"{number}.png"}, {"text": sentence(rng), "loss": False}, answer]
        lines.append(json.dumps({"key": str(number), "parts": parts}))
    manifest = folder / "manifest.jsonl"
    manifest.write_text("\n".join(lines))
    return manifest


def packed(words: list[str], out: Path, together: int) -> tuple[float, float, bytes]:
    """Processor and wall-clock seconds of one packing, and its shards."""
    filters._TOGETHER = together
    processor, clock = time.process_time(), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert prepare([*words, "--out", str(out), "--overwrite"]) == 0
    spent = time.process_time() - processor, time.perf_counter() - clock
    return *spent, b"".join(shard.read_bytes() for shard in sorted(out.glob("*.tar")))


def main() -> None:
    """Run the benchmark and print its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512, help="samples of the manifest (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of both variants (default: %(default)s)")
    sizes, around = parser.parse_args(), surroundings()
    rounds: dict[int, list[tuple[float, float]]] = {TOGETHER: [], 1: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {"words": text_section(text_classifier(folder / "bert"))}
        models["squares"] = image_section(image_classifier(folder / "regnet"))
        file = integrity_file(folder / "integrity.yaml", models)
        tokenizer = make_tokenizer(folder / "tokenizer")
        words = ["--manifest", str(write_samples(folder, sizes.samples)), "--tokenizer", tokenizer]
        words += ["--filter", f"integrity={file}"]
        shards = {packed(words, folder / "out", together)[2] for together in rounds}
        for _ in range(sizes.rounds):
            for together, rows in rounds.items():
                processor, clock, content = packed(words, folder / "out", together)
                shards.add(content)
                rows.append((processor, clock))
    assert len(shards) == 1, "the two variants keep different samples"
    medians = {together: [statistics.median(column) for column in zip(*rows)] for together, rows in rounds.items()}
    names = ("samples_per_processor_second", "samples_per_second")
    result = {
        "command": " ".join(["python benchmarks/integrity_filter.py", *sys.argv[1:]]),
        **around,
        "together": {name: sizes.samples / seconds for name, seconds in zip(names, medians[TOGETHER])},
        "one_by_one": {name: sizes.samples / seconds for name, seconds in zip(names, medians[1])},
        "ratio": dict(zip(names, (one / many for one, many in zip(medians[1], medians[TOGETHER])))),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
