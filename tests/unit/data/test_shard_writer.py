"""The writer of shards: what it leaves out, and how it continues after an interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import source_folders as made

from megatron_anymal.data.index_builder import IndexOptions
from megatron_anymal.data.index_folder import make_index
from megatron_anymal.data.manifest import ManifestSource, write_shards
from megatron_anymal.data.packing_journal import JOURNAL
from megatron_anymal.data.records import DataError
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.data.shard_samples import SampleError
from megatron_anymal.data.shard_writer import pack
from megatron_anymal.data.source_records import Record, Source


class Interrupted(Exception):
    pass


class Numbers(Source):
    """Forty samples, every seventh without text; reading one may be interrupted."""

    def __init__(self, folder: Path, stop_at: int = -1):
        super().__init__(str(folder / "numbers"), folder)
        self.stop_at = stop_at
        # Numbers of the samples whose media were read.
        self.read: list[int] = []

    def files(self) -> Sequence[Path]:
        return []

    def records(self) -> Iterator[Record]:
        for n in range(40):
            value = {"parts": [{"media": "a.jpg", "modality": "image"}, {"text": " " if n % 7 == 3 else f"one {n}"}]}
            yield Record(f"numbers:{n}", n, value, f"k{n}", contents={"a.jpg": lambda n=n: self._media(n)})

    def _media(self, n: int) -> bytes:
        if n == self.stop_at:
            raise Interrupted
        self.read.append(n)
        return made.jpeg(n)


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


OPTIONS = {"samples_per_shard": 8, "max_bad_share": 0.2}


@pytest.mark.parametrize("stop_at", [0, 7, 8, 30, 39])
def test_an_interrupted_packing_continues(stop_at: int, tmp_path: Path, tokenizer_folder: str) -> None:
    pack(Numbers(tmp_path), str(tmp_path / "whole"), **OPTIONS)
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        pack(Numbers(tmp_path, stop_at), str(out), **OPTIONS)
    assert not shards(out)
    again = Numbers(tmp_path)
    pack(again, str(out), **OPTIONS)
    # Only the shards that were not finished are read again.
    first = stop_at // 8 * 8
    assert again.read == [n for n in range(first, 40) if n % 7 != 3]
    assert shards(out) == shards(tmp_path / "whole") and len(shards(out)) == 5
    assert not list(out.glob("*.part"))
    for folder in (out, tmp_path / "whole"):
        make_index(str(folder), IndexOptions(tokenizer_folder), max_bad_share=0.2)
    ledgers = [(folder / "index" / "left_out.jsonl").read_text() for folder in (out, tmp_path / "whole")]
    assert ledgers[0] == ledgers[1] and ledgers[0].count("its text is empty") == 6


@pytest.mark.parametrize("change", ["options", "source", "cut line", "cut shard"])
def test_what_does_not_fit_any_more_is_packed_again(change: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        pack(Numbers(tmp_path, 30), str(out), **OPTIONS)
    source, options = Numbers(tmp_path), dict(OPTIONS)
    journal = out / f"{JOURNAL}.part"
    first = 0
    if change == "options":
        options["samples_per_shard"] = 10
    elif change == "source":
        source.path += "-2"
    elif change == "cut line":
        journal.write_text(journal.read_text()[:-20])
        first = 16
    else:
        part = out / "shard-000001.tar.part"
        part.write_bytes(part.read_bytes()[:-512])
    pack(source, str(out), **options)
    wanted = [n for n in range(first, 40) if n % 7 != 3]
    if change == "cut shard":
        wanted = [n for n in range(40) if n % 7 != 3 and (8 <= n < 16 or n >= 24)]
    assert source.read == wanted
    pack(Numbers(tmp_path), str(tmp_path / "whole"), **options)
    assert shards(out) == shards(tmp_path / "whole")


def test_an_interruption_while_shards_are_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(Numbers(tmp_path), str(tmp_path / "whole"), **OPTIONS)
    out, real, renamed = tmp_path / "out", os.replace, []

    def stopping(source: Path, target: Path) -> None:
        if str(source).endswith(".tar.part"):
            if len(renamed) == 2:
                raise Interrupted
            renamed.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", stopping)
    with pytest.raises(Interrupted):
        pack(Numbers(tmp_path), str(out), **OPTIONS)
    monkeypatch.setattr(os, "replace", real)
    again = Numbers(tmp_path)
    pack(again, str(out), **OPTIONS)
    assert not again.read and shards(out) == shards(tmp_path / "whole")


def test_a_killed_command_continues(tmp_path: Path, tokenizer_folder: str) -> None:
    """The same with a process that is killed, and the command line."""
    for n in range(60):
        made.put(tmp_path / f"{n}.jpg", made.jpeg(n))
    lines = [json.dumps({"media": f"{n}.jpg", "text": f"one {n}"}) for n in range(60)]
    manifest = made.put(tmp_path / "m.jsonl", "\n".join(lines))
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "read = Path.read_bytes\n"
        "def stopping(path):\n"
        "    if path.name == '45.jpg': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return read(path)\n"
        "Path.read_bytes = stopping\n"
        "from megatron_anymal.data.manifest import write_shards\n"
        "write_shards(sys.argv[1], sys.argv[2], samples_per_shard=10)\n"
    )
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", code, str(manifest), str(out)], capture_output=True, timeout=240)
    assert done.returncode == -signal.SIGKILL and len(list(out.glob("*.tar.part"))) == 5
    opened = []
    original = Path.read_bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: opened.append(path.name) or original(path))
        write_shards(str(manifest), str(out), samples_per_shard=10)
    assert [name for name in opened if name.endswith("jpg")] == [f"{n}.jpg" for n in range(40, 60)]
    write_shards(str(manifest), str(tmp_path / "whole"), samples_per_shard=10)
    assert shards(out) == shards(tmp_path / "whole")


def test_a_missing_caption_or_file_costs_its_sample_alone(
    tmp_path: Path, tokenizer_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made.put(tmp_path / "a.jpg", made.jpeg(0))
    rows = ["key,media,text", *(f"k{n},a.jpg,one" for n in range(20)), "no_text,a.jpg,", "no_file,b.jpg,one"]
    manifest = made.put(tmp_path / "m.csv", "\n".join(rows))
    pack(ManifestSource(str(manifest)), str(tmp_path / "out"), max_bad_share=0.1)
    make_index(str(tmp_path / "out"), IndexOptions(tokenizer_folder), max_bad_share=0.1)
    index = ShardIndex(str(tmp_path / "out"))
    assert [index.key(n) for n in range(len(index))] == [f"k{n}" for n in range(20)]
    ledger = [json.loads(line) for line in (tmp_path / "out" / "index" / "left_out.jsonl").read_text().splitlines()]
    assert [(entry["key"], entry["code"], entry["source"]) for entry in ledger] == [
        ("no_text", "text", f"{manifest}:22"),
        ("no_file", "missing_media", f"{manifest}:23"),
    ]
    assert [str(entry.key) for entry in index.left_out()] == ["no_text", "no_file"]
    shown = capsys.readouterr()
    assert "22 samples = 20 in 1 shards + 2 left out (text 1, missing_media 1)" in shown.out
    assert "22 samples in = 20 used + 2 left out + 0 filtered" in shown.out
    assert f"left out: sample 'no_file' of {manifest}:23: there is no media file" in shown.err
    with pytest.raises(DataError, match=r"2 of 22 samples .*--max-bad-share 0\.01|1 of 22"):
        pack(ManifestSource(str(manifest)), str(tmp_path / "other"))


def test_the_share_is_that_of_packing_and_indexing_together(tmp_path: Path, tokenizer_folder: str) -> None:
    made.put(tmp_path / "a.jpg", made.jpeg(0))
    made.put(tmp_path / "bad.jpg", b"not a picture")
    names = ["a.jpg"] * 8 + ["bad.jpg", "gone.jpg"]
    lines = [json.dumps({"media": name, "text": "one"}) for name in names]
    manifest = made.put(tmp_path / "m.jsonl", "\n".join(lines))
    pack(ManifestSource(str(manifest)), str(tmp_path / "out"), max_bad_share=0.1)
    with pytest.raises(DataError, match="2 of 10 samples"):
        make_index(str(tmp_path / "out"), IndexOptions(tokenizer_folder), max_bad_share=0.1)
    make_index(str(tmp_path / "out"), IndexOptions(tokenizer_folder), max_bad_share=0.2)


def test_the_journal_of_other_shards_is_not_used(tmp_path: Path, tokenizer_folder: str) -> None:
    pack(Numbers(tmp_path), str(tmp_path / "out"), **OPTIONS)
    (tmp_path / "out" / "shard-000001.tar").unlink()
    make_index(str(tmp_path / "out"), IndexOptions(tokenizer_folder))
    assert not ShardIndex(str(tmp_path / "out")).left_out()


def test_a_source_that_changes_between_its_readings(tmp_path: Path) -> None:
    class Shrinking(Numbers):
        def records(self) -> Iterator[Record]:
            self.readings = getattr(self, "readings", 0) + 1
            yield from list(super().records())[: 40 // self.readings]

    with pytest.raises(DataError, match="changed while it was read"):
        pack(Shrinking(tmp_path), str(tmp_path / "out"), **OPTIONS)


def test_a_shard_of_nothing_is_not_written(tmp_path: Path, tokenizer_folder: str) -> None:
    class Sparse(Numbers):
        def records(self) -> Iterator[Record]:
            for record in super().records():
                wrong = SampleError("text", "it is wrong.") if 8 <= record.number < 16 else None
                yield Record(record.where, record.number, record.value, record.key, {}, record.contents, wrong)

    pack(Sparse(tmp_path), str(tmp_path / "out"), samples_per_shard=8, max_bad_share=0.5)
    assert sorted(shards(tmp_path / "out")) == [f"shard-00000{n}.tar" for n in (0, 2, 3, 4)]
    make_index(str(tmp_path / "out"), IndexOptions(tokenizer_folder), max_bad_share=0.5)
    assert len(ShardIndex(str(tmp_path / "out"))) == 27


def test_an_interrupted_overwriting_does_not_free_the_old_shards(tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(Numbers(tmp_path), str(out), **OPTIONS)
    before = shards(out)
    with pytest.raises(Interrupted):
        pack(Numbers(tmp_path, 30), str(out), samples_per_shard=4, max_bad_share=0.2, overwrite=True)
    for options in ({**OPTIONS, "samples_per_shard": 4}, OPTIONS):
        with pytest.raises(DataError, match="--overwrite"):
            pack(Numbers(tmp_path), str(out), **options)
        assert shards(out) == before
    pack(Numbers(tmp_path), str(out), samples_per_shard=4, max_bad_share=0.2, overwrite=True)
    assert len(shards(out)) == 10


def test_a_media_file_that_cannot_be_read(tmp_path: Path) -> None:
    made.put(tmp_path / "a.jpg", made.jpeg(0))
    lines = [{"media": "a.jpg", "text": "one"}, {"media": "x" * 300, "text": "one"}]
    manifest = made.put(tmp_path / "m.jsonl", "\n".join(json.dumps(line) for line in lines))
    with pytest.raises(DataError, match="File name too long"):
        write_shards(str(manifest), str(tmp_path / "out"))
