"""Measure how many samples per CPU second the loader reads, against webdataset and megatron-energon.

    PYTHONPATH=.:tests OMP_NUM_THREADS=1 python benchmarks/loader.py --out results.json

All sides read the same shards in turn, in one process without workers: media to encoder input, text to token IDs,
batches. The peers use the transforms that their users write (loader_peers.py): Pillow's bicubic filter, transformers'
CLAP extractor, videos decoded from the start; the results are compared. This trainer also plans and packs. Its images
and videos are measured with both values of `resize_backend`; with pillow, its pixels are those of the peers.

Further rows show the floor (decoding alone), and the cost of single parts, done the plain way and this trainer's way.

webdataset is the installed version. megatron-energon needs an environment of its own, with the libraries of the media:

    python -m venv energon
    energon/bin/pip install megatron-energon==7.4.1 torch transformers pillow soundfile soxr av
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from loader_media import KINDS, SIDE, Kind, configuration, tokenizer_of, write_shards
from loader_parts import floors, parts
from loader_peers import counted, transform_of, with_webdataset
from measuring import surroundings
from replicas import replica_data
from torch import Tensor

from megatron_anymal.data.loader import steps
from megatron_anymal.train.build import DataSource

# Largest difference from the peers' encoder input: float rounding of normalised pixels; CLAP's features in dB.
TOLERANCE = {"image": 1e-6, "video": 1e-6, "audio": 1e-3}


class Energon:
    """megatron-energon in its own process."""

    def __init__(self, python: str, arguments: dict[str, Any]) -> None:
        script = str(Path(__file__).with_name("loader_peers.py"))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [python, "-W", "ignore", script, json.dumps(arguments)]
        self._process = subprocess.Popen(command, text=True, env=environment, **pipes)  # type: ignore[call-overload]
        self.version = self._answer()

    def _answer(self) -> Any:
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                return json.loads(line)
        sys.exit("megatron-energon did not run")

    def round(self) -> tuple[float, int]:
        """CPU seconds and samples of one pass."""
        print(file=self._process.stdin, flush=True)
        seconds, count = self._answer()
        return float(seconds), int(count)

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


def media_of(data: DataSource, kind: Kind) -> Iterator[tuple[Tensor, None]]:
    """Encoder inputs of all steps of one pass over the shards."""
    count = kind.samples // kind.batch
    plans = steps(data.planner, data.reader, replica=0, start=0, stop=count, num_workers=0, prefetch_steps=1)
    for _, batches in plans:
        for batch in batches:
            assert not batch.bad
            yield batch.media[kind.modality].pieces, None


def timed(call: Callable[[], int], expected: int) -> float:
    """CPU seconds of a call that must return a number of samples."""
    begun = time.process_time()
    count = call()
    seconds = time.process_time() - begun
    assert count == expected, f"{count} samples instead of {expected}"
    return seconds


def settings_of(data: DataSource, kind: Kind) -> dict[str, Any]:
    """Settings with which the peers' transform produces the same encoder input."""
    if kind.modality == "image":
        return {"side": SIDE}
    if kind.modality == "audio":
        return {"rate": 48_000}
    modality: Any = data.reader._modalities["video"].modality
    index = data.planner.indexes[0]
    seconds, _ = sizes = index.media_rows(0)[0]["size"]
    clips = int(modality.count_pieces(sizes[None])[0])
    return {"side": SIDE, "times": modality.sample_times(float(seconds), clips).ravel().tolist()}


def check(data: DataSource, kind: Kind, transform: Callable[[bytes], Tensor]) -> None:
    """Compare the encoder input of one sample with the peers'."""
    index = data.planner.indexes[0]
    [item] = index.read_media(0, index.sample(0).documents[0], [0])
    modality = data.reader._modalities[kind.modality].modality
    actual, expected = modality.load(item.data, item.extension, {}), transform(item.data)
    torch.testing.assert_close(actual.reshape(expected.shape), expected, rtol=0, atol=TOLERANCE[kind.modality])


def compare(
    name: str, folder: Path, tokenizer: str, rounds: int, samples: int | None, energon_python: str
) -> dict[str, Any]:
    """Samples per CPU second of all sides, one list per side, and the parts."""
    kind = KINDS[name]
    if samples:
        kind = dataclasses.replace(kind, samples=samples, batch=min(samples, kind.batch))
    write_shards(folder, kind, kind.samples, tokenizer)
    backends = ("pillow", "torch") if kind.modality != "audio" else ("",)
    sources = {
        f"anymal, {backend}" if backend else "anymal": replica_data(
            configuration(folder, kind, tokenizer, **({"resize_backend": backend} if backend else {}))
        )
        for backend in backends
    }
    plain = next(iter(sources.values()))
    settings = settings_of(plain, kind)
    transform = transform_of(kind.modality, settings)
    check(plain, kind, transform)
    encode = plain.reader._tokenizer.hf.encode
    pieces = {side: kind.samples * _pieces(data, kind) for side, data in sources.items()}
    sides: dict[str, Callable[[], float]] = {
        "webdataset": lambda: timed(
            lambda: counted(
                with_webdataset(
                    folder, kind.ending, kind.batch, transform, lambda text: encode(text, add_special_tokens=False)
                )
            ),
            kind.samples,
        ),
        **{
            side: lambda data=data, side=side: timed(lambda: counted(media_of(data, kind)), pieces[side])
            for side, data in sources.items()
        },
    }
    peer = None
    if energon_python:
        given = {"modality": kind.modality, "ending": kind.ending, "batch": kind.batch, "settings": settings}
        peer = Energon(energon_python, {"folder": str(folder), "tokenizer": tokenizer, **given})
        sides["megatron-energon"] = lambda peer=peer: peer.round()[0]
    turns = take_turns(sides, rounds, kind.samples)
    version = peer.version if peer else None
    if peer:
        peer.close()
    report(name, turns)
    sample = kind.make(0)
    milliseconds = {
        "floors_ms": measured(floors(kind.modality, sample), rounds),
        "parts_ms": measured(parts(kind.modality, sample, plain.reader._modalities[kind.modality].modality), rounds),
    }
    show_parts(milliseconds)
    return {"samples": kind.samples, "samples_per_cpu_second": turns, "energon": version, **milliseconds}


def _pieces(data: DataSource, kind: Kind) -> int:
    """Encoder inputs of one sample; all samples have the same size."""
    sizes = data.planner.indexes[0].media["size"]
    return int(data.reader._modalities[kind.modality].modality.count_pieces(sizes[:1])[0])


def take_turns(sides: dict[str, Callable[[], float]], rounds: int, samples: int) -> dict[str, list[float]]:
    """Samples per CPU second of each side and round.

    Each counted pass follows one that is not counted: a virtual machine gives memory that another side has freed back
    to its host, and touching it again can take a quarter of a pass.
    """
    turns: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in list(sides)[:: -1 if number % 2 else 1]:
            sides[side]()
            turns[side].append(samples / sides[side]())
    return turns


def report(name: str, turns: dict[str, list[float]]) -> None:
    """Print the rates, and ratios to the peers by round."""
    print(f"\n{name} (bar: {KINDS[name].bar} x)")
    for side, rates in turns.items():
        against = []
        for peer in ("webdataset", "megatron-energon"):
            if side.startswith("anymal") and peer in turns:
                ratio = statistics.median(own / other for own, other in zip(rates, turns[peer]))
                against.append(f"{ratio:.2f} x {peer}")
        spread = f"{min(rates):.2f} to {max(rates):.2f}"
        print(f"  {side:<18} {statistics.median(rates):8.2f} samples/CPU s ({spread})  {', '.join(against)}")


def measured(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds per call; the calls take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            begun, count = time.process_time(), 0
            while not count or time.process_time() - begun < 0.05:
                call()
                count += 1
            times[name].append((time.process_time() - begun) / count * 1e3)
    return times


def show_parts(parts: dict[str, Any]) -> None:
    """Print floors and parts."""
    for title, times in (("floor", parts["floors_ms"]), ("part", parts["parts_ms"])):
        for name, values in times.items():
            print(f"  {title}: {name:<52} {statistics.median(values):9.3f} ms (min {min(values):.3f})")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and with `--out` write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", choices=list(KINDS), help="kind of media to measure; may be repeated (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of all sides (default: %(default)s)")
    parser.add_argument("--samples", type=int, help="samples per round and kind, a multiple of its batch")
    parser.add_argument("--energon-python", default="", help="Python executable with megatron-energon installed")
    parser.add_argument("--out", help="JSON file for the results")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        with contextlib.redirect_stdout(io.StringIO()):
            tokenizer = tokenizer_of(Path(temporary) / "tokenizer")
        for number, name in enumerate(arguments.only or KINDS):
            folder = Path(temporary) / f"{number}"
            results[name] = compare(
                name, folder, tokenizer, arguments.rounds, arguments.samples, arguments.energon_python
            )
    if arguments.out:
        libraries = ("webdataset", "pillow", "simplejpeg", "soundfile", "soxr", "av", "numpy")
        versions = {library: importlib.metadata.version(library) for library in libraries}
        # Without paths, which are those of this machine.
        given = {"only": arguments.only, "rounds": arguments.rounds, "samples": arguments.samples}
        body = {
            "command": "python benchmarks/loader.py",
            "options": given,
            **surroundings(),
            "media_libraries": versions,
            "kinds": results,
        }
        Path(arguments.out).write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
