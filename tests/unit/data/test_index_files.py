"""Index files are byte for byte those of an index assembled from Python rows, for one process and for several."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import plain_index
import pytest
from index_folders import FOLDERS, damaged, pictures
from tars import write_tar
from tiny import png

from megatron_anymal.data import index_processes, length_bounds
from megatron_anymal.data.index_builder import IndexOptions
from megatron_anymal.data.index_folder import make_index
from megatron_anymal.data.index_format import MEDIA, SAMPLE
from megatron_anymal.data.index_processes import WorkerKilled, useful_workers
from megatron_anymal.data.index_writer import open_spool
from megatron_anymal.data.left_out import LeftOut
from megatron_anymal.data.records import DataError
from megatron_anymal.data.shard_rows import HASH, RowBuffer, ShardRows, hash_keys, repeated
from megatron_anymal.data.tokenizer import Tokenizer
from megatron_anymal.resilience.exit_codes import Exit, code_of

ROOT = Path(__file__).parents[3]


@pytest.fixture
def many_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even small folders are indexed by as many processes as requested."""
    monkeypatch.setattr(index_processes, "BYTES_PER_WORKER", 1)


@pytest.mark.parametrize("name", FOLDERS)
def test_index_files_are_those_of_plain_rows(
    name: str, tmp_path: Path, tokenizer_folder: str, many_workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(length_bounds, "BLOCK", 3)
    monkeypatch.setattr(length_bounds, "MAX_GROUPS", 2)
    monkeypatch.setattr("megatron_anymal.data.index_writer.BLOCK", 3)
    make, settings, codes = FOLDERS[name]
    folder, options = tmp_path / "shards", IndexOptions(tokenizer_folder, **settings)
    make(folder)
    expected = plain_index.index_files(folder, options, Tokenizer(tokenizer_folder))
    assert {json.loads(line)["code"] for line in expected["left_out.jsonl"].splitlines()} == codes
    for workers in (1, 2):
        make_index(str(folder), options, workers, max_bad_share=1.0)
        index = folder / "index"
        assert {path.name: path.read_bytes() for path in index.iterdir()} == expected, workers
        for path in index.iterdir():
            path.unlink()


def test_a_refused_indexing_writes_only_its_ledger(tmp_path: Path, tokenizer_folder: str, many_workers: None) -> None:
    folder, options = tmp_path / "shards", IndexOptions(tokenizer_folder)
    damaged(folder)
    expected = plain_index.index_files(folder, options, Tokenizer(tokenizer_folder))
    for workers in (1, 2):
        with pytest.raises(DataError, match="max-bad-share"):
            make_index(str(folder), options, workers)
        [ledger] = (folder / "index").iterdir()
        assert ledger.name == "left_out.refused.jsonl" and ledger.read_bytes() == expected["left_out.jsonl"]


# A modality whose name is the list of heavy modules that the process has imported.
PLUGIN = """
import sys
from megatron_anymal.modalities import Modality, register

HEAVY = {"torch", "transformers", "megatron", "lightning", "av", "soundfile", "soxr", "simplejpeg", "pandas"}

@register("modules")
class Modules(Modality):
    extensions = ("modules",)
    Options = object

    @classmethod
    def probe(cls, data, extension, attributes, limits):
        raise ValueError(f"pid {__import__('os').getpid()} imported {sorted(HEAVY & sys.modules.keys())}")

    def count_pieces(self, sizes): ...
    def decode(self, data, extension, attributes, pieces): ...
    piece_shape = ()
"""


def test_workers_import_only_what_they_use(tmp_path: Path, tokenizer_folder: str, many_workers: None) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text(PLUGIN)
    for shard in "abcd":
        sample = json.dumps({"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]})
        members = [("p.png", png(1)), ("p.txt", b"one"), ("c.json", sample.encode())]
        write_tar(tmp_path / "f" / f"{shard}.tar", [*members, ("m.modules", b"x"), ("m.txt", b"one")])
    make_index(str(tmp_path / "f"), IndexOptions(tokenizer_folder, plugins=[str(plugin)]), 2, max_bad_share=1.0)
    ledger = [json.loads(line) for line in (tmp_path / "f" / "index" / "left_out.jsonl").read_text().splitlines()]
    reasons = [entry["reason"] for entry in ledger if entry["code"] == "media"]
    assert len(reasons) == 4 and all("imported []" in reason for reason in reasons), reasons
    assert not any(f"pid {os.getpid()} " in reason for reason in reasons)


def test_a_worker_that_is_killed_is_named(tmp_path: Path, tokenizer_folder: str, many_workers: None) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text("import os\nos.kill(os.getpid(), 9)\n")
    for shard in "ab":
        write_tar(tmp_path / "f" / f"{shard}.tar", pictures(0, 1))
    with pytest.raises(WorkerKilled, match=r"One of 2 processes that index .* was killed\..*lower --workers") as error:
        make_index(str(tmp_path / "f"), IndexOptions(tokenizer_folder, plugins=[str(plugin)]), 2)
    assert code_of(error.value) == Exit.CRASH


@pytest.mark.parametrize(
    ("asked", "sizes", "started"),
    [(8, [1] * 63, 1), (8, [1] * 64, 2), (8, [100, 100], 2), (8, [500], 1), (2, [64] * 9, 2), (0, [64] * 9, 1)],
)
def test_small_folders_are_indexed_by_fewer_processes(asked: int, sizes: list[int], started: int) -> None:
    """`sizes` are in MiB."""
    assert useful_workers(asked, [size * 2**20 for size in sizes]) == started


def test_rows_are_packed_as_the_tables_lay_them_out() -> None:
    rng = np.random.default_rng(0)
    samples, media = np.zeros(300, SAMPLE), np.zeros(300, MEDIA)
    for table in (samples, media):
        for name in table.dtype.names or ():
            column = table[name]
            most = np.iinfo(column.dtype).max if column.dtype.kind == "u" else 1
            column[:] = rng.uniform(size=column.shape) * (most / 2)
    buffer = RowBuffer()
    for n in range(300):
        row = media[n].tolist()
        buffer.add(f"k{n}", n, samples[n].tolist()[1:10], [(*row[:-1], *row[-1])], 2, ())
    rows = ShardRows("a", 1)
    buffer.move_to(rows, ())
    assert rows.media.tobytes() == media.tobytes()
    for name in (SAMPLE.names or ())[1:10]:
        np.testing.assert_array_equal(rows.samples[name], samples[name])
    assert [rows.key(n) for n in range(300)] == [f"k{n}" for n in range(300)]


def test_a_spool_returns_the_rows_of_a_shard_each_time(tmp_path: Path) -> None:
    made = {}
    for number in range(4):
        buffer = RowBuffer()
        for n in range(number):
            buffer.add(f"{number}{n}", n, [n] * 9, [(number, n, 0, 0, 0, 1.0, 2.0)] * n, 1, (".x",))
        left_out = [LeftOut(f"{number}.tar", "text", "é", number, "k")] * number
        rows = ShardRows(f"{number}.tar", number, kinds=["a"], extensions=["b", "c"], left_out=left_out)
        buffer.move_to(rows, ())
        made[rows.name] = rows
    with open_spool(str(tmp_path)) as spool:
        for rows in made.values():
            spool.add(rows)
        for name in [*reversed(made), *made]:
            spooled_rows, rows = spool.rows(name), made[name]
            tables = ("samples", "media")
            assert {k: v for k, v in vars(spooled_rows).items() if k not in tables} == {
                k: v for k, v in vars(rows).items() if k not in tables
            }
            for table in tables:
                np.testing.assert_array_equal(getattr(spooled_rows, table), getattr(rows, table))
            # Also if the caller changes what it gets.
            spooled_rows.samples["shard"] = 7
        assert list((tmp_path / "index").iterdir()) == []


def test_repeated_values() -> None:
    values = np.random.default_rng(0).integers(0, 50, 60).astype("<u8")
    unique_values, counts = np.unique(values, return_counts=True)
    np.testing.assert_array_equal(repeated(values), unique_values[counts > 1])
    assert not len(repeated(values[:0])) and not len(repeated(values[:1]))


def test_hashes_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    keys = [b"a", b"a\0", b"a\0\0\0\0\0\0\0", b"aaaaaaaa", b"aaaaaaaaa", b"aaaaaaaabbbbbbbb", b"bbbbbbbbaaaaaaaa"]
    keys += [b"%d" % number for number in range(20_000)] + [b"k/" * 40 + b"%d" % number for number in range(500)]
    numbers = np.concatenate([rng.permutation(len(keys)), rng.permutation(len(keys))])
    lengths = np.array([len(keys[number]) for number in numbers])
    content, offsets = b"".join(keys[number] for number in numbers), np.cumsum(lengths) - lengths
    hashes = hash_keys(content, offsets, lengths)
    by_number = np.empty(len(keys), HASH)
    by_number[numbers] = hashes
    np.testing.assert_array_equal(by_number[numbers], hashes)
    assert len(np.unique(by_number)) == len(keys)
    # Adjacent keys of the same length are hashed by a code path of their own.
    same = hash_keys(b"".join(keys[5000:5100]), np.arange(0, 400, 4), np.full(100, 4))
    np.testing.assert_array_equal(same, by_number[5000:5100])
    monkeypatch.setattr("megatron_anymal.data.shard_rows._HASHED_BYTES", 1000)
    np.testing.assert_array_equal(hash_keys(content, offsets, lengths), hashes)


def test_keys_of_equal_hashes_are_told_apart(
    tmp_path: Path, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_bytes(keys: bytes, offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return np.frombuffer(keys, np.uint8)[offsets.astype(int)].astype(HASH)

    monkeypatch.setattr("megatron_anymal.data.shard_rows.hash_keys", first_bytes)
    write_tar(tmp_path / "f" / "0.tar", [(f"a{n}.txt", b"one") for n in range(5)] + [("b.txt", b"one")])
    write_tar(tmp_path / "f" / "1.tar", [(f"a{n}.txt", b"one") for n in range(4, 9)])
    make_index(str(tmp_path / "f"), IndexOptions(tokenizer_folder), max_bad_share=0.0)
    ledger = [json.loads(line) for line in (tmp_path / "f" / "index" / "left_out.jsonl").read_text().splitlines()]
    assert [(entry["code"], entry["key"]) for entry in ledger] == [("repeated_key", "a4")]
    assert len(np.load(tmp_path / "f" / "index" / "samples.npy")) == 11


def test_an_unwritable_folder_is_named_before_shards_are_read(
    tmp_path: Path, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "f" / "0.tar", pictures(0, 1))
    (tmp_path / "f" / "index").write_text("a file where the index's folder should be")
    monkeypatch.setattr(index_processes, "index_shard", lambda *_: pytest.fail("a shard was read"))
    with pytest.raises(DataError, match=r"index of .*/f' cannot be written .*Make the folder writable"):
        make_index(str(tmp_path / "f"), IndexOptions(tokenizer_folder))


def test_memory_does_not_grow_with_the_number_of_samples() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    runs = []
    for count in ("100000", "1000000"):
        words = [sys.executable, str(ROOT / "benchmarks" / "index_memory.py"), count]
        done = subprocess.run(words, capture_output=True, text=True, timeout=240, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        runs.append(json.loads(done.stdout))
    more = {name: (runs[1][name] - runs[0][name]) / 900_000 for name in ("peak_bytes", "index_bytes")}
    # What remains in memory is the hash of each key, and a sorted copy of it.
    assert more["peak_bytes"] < 40 < 100 < more["index_bytes"], more
