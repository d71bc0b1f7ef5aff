"""An index joined from parts, and an extended index, are byte for byte those of one process that reads everything."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import plain_index
import pytest
import source_folders
from fsspec.implementations.memory import MemoryFileSystem
from index_folders import FOLDERS, lost_media, mixed, pictures
from tars import write_tar
from tiny import png
from tokenizer_folders import make as make_tokenizer

from megatron_anymal.cli.prepare import main as prepare
from megatron_anymal.data import index_processes
from megatron_anymal.data.index_builder import IndexOptions
from megatron_anymal.data.index_folder import make_index
from megatron_anymal.data.index_parts import index_part, merge_parts
from megatron_anymal.data.packing_journal import JOURNAL, PackedShard
from megatron_anymal.data.part_of import PartOf
from megatron_anymal.data.records import DataError
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.data.shard_writer import SampleWriter
from megatron_anymal.data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[3]


def files_of(folder: Path) -> dict[str, bytes]:
    """Content of all files of an index."""
    index = folder / "index"
    return {str(path.relative_to(index)): path.read_bytes() for path in index.rglob("*") if path.is_file()}


@pytest.fixture
def read_shards(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of shards that this process reads, in order."""
    names: list[str] = []
    index_shard = index_processes.index_shard

    def noting(folder: str, name: str, *settings: Any) -> Any:
        names.append(name)
        return index_shard(folder, name, *settings)

    monkeypatch.setattr(index_processes, "index_shard", noting)
    yield names


@pytest.mark.parametrize("name", FOLDERS)
def test_a_joined_index_is_that_of_plain_rows(name: str, tmp_path: Path, tokenizer_folder: str) -> None:
    make, settings, _ = FOLDERS[name]
    folder, options = tmp_path / "shards", IndexOptions(tokenizer_folder, **settings)
    make(folder)
    expected = plain_index.index_files(folder, options, Tokenizer(tokenizer_folder))
    # More parts than shards in some folders; the last part first.
    for number in (3, 1, 2):
        index_part(str(folder), options, PartOf(number, 3))
    merge_parts(str(folder), max_bad_share=1.0)
    assert files_of(folder) == expected
    assert not (folder / "index" / "parts").exists()


@pytest.mark.parametrize("name", FOLDERS)
def test_an_extended_index_is_that_of_plain_rows(
    name: str, tmp_path: Path, tokenizer_folder: str, read_shards: list[str]
) -> None:
    """Shards arrive one by one, the last one by name first, so that all numbers in the index change."""
    make, settings, _ = FOLDERS[name]
    folder, options = tmp_path / "shards", IndexOptions(tokenizer_folder, **settings)
    make(tmp_path / "source")
    folder.mkdir()
    shards = sorted((tmp_path / "source").glob("*.tar"), reverse=True)
    for number, shard in enumerate(shards):
        shutil.copy2(shard, folder)
        try:
            make_index(str(folder), options, max_bad_share=1.0)
        except DataError as error:
            # No sample can be used yet.
            assert "no sample" in str(error) and number < len(shards) - 1
    assert files_of(folder) == plain_index.index_files(folder, options, Tokenizer(tokenizer_folder))
    make_index(str(folder), options, max_bad_share=1.0, rebuild=True)
    assert files_of(folder) == plain_index.index_files(folder, options, Tokenizer(tokenizer_folder))


def test_only_new_and_changed_shards_are_read(
    tmp_path: Path, tokenizer_folder: str, read_shards: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "f"
    for number in range(4):
        write_tar(folder / f"{number}.tar", pictures(number, number + 1))
    command = ["--index-only", str(folder), "--tokenizer", tokenizer_folder, "--workers", "1"]
    steps: list[tuple[Any, list[str], list[str], str]] = [
        (lambda: None, [], ["0.tar", "1.tar", "2.tar", "3.tar"], ""),
        (lambda: None, [], [], "4 shards kept, 0 read\n"),
        (lambda: write_tar(folder / "15.tar", pictures(9, 11)), [], ["15.tar"], "4 shards kept, 1 read\n"),
        (lambda: write_tar(folder / "2.tar", pictures(5, 9)), [], ["2.tar"], "4 shards kept, 1 read\n"),
        # The same size, written again.
        (lambda: os.utime(folder / "1.tar", (7, 7)), [], ["1.tar"], "4 shards kept, 1 read\n"),
        # Another size, at the same time.
        (
            lambda: (write_tar(folder / "1.tar", pictures(1, 9)), os.utime(folder / "1.tar", (7, 7))),
            [],
            ["1.tar"],
            "4 shards kept, 1 read\n",
        ),
        ((folder / "0.tar").unlink, [], [], "4 shards kept, 0 read\n"),
        (lambda: None, ["--rebuild"], ["1.tar", "15.tar", "2.tar", "3.tar"], ""),
        (
            lambda: None,
            ["--members=png,txt"],
            ["1.tar", "15.tar", "2.tar", "3.tar"],
            "0 shards kept, 4 read: the index ",
        ),
        (
            lambda: None,
            ["--limit=max_pixels=70"],
            ["1.tar", "15.tar", "2.tar", "3.tar"],
            "with another members, limits",
        ),
    ]
    for change, options, expected, expected_output in steps:
        change()
        read_shards.clear()
        assert prepare([*command, *options]) == 0
        assert read_shards == expected, expected_output
        assert expected_output in capsys.readouterr().out
        settings: dict[str, Any] = {"members": ("png", "txt")} if "--members=png,txt" in options else {}
        if not options:
            expected_files = plain_index.index_files(
                folder, IndexOptions(tokenizer_folder, **settings), Tokenizer(tokenizer_folder)
            )
            assert files_of(folder) == expected_files


def test_another_tokenizer_reads_everything(tmp_path: Path, tokenizer_folder: str, read_shards: list[str]) -> None:
    mixed(tmp_path / "f")
    make_index(str(tmp_path / "f"), IndexOptions(tokenizer_folder, attributes={"imu": {"rate": 50}}))
    other = make_tokenizer("llama 3", tmp_path / "tokenizer")
    read_shards.clear()
    options = IndexOptions(str(other), attributes={"imu": {"rate": 50}})
    make_index(str(tmp_path / "f"), options)
    assert len(read_shards) == 4
    assert files_of(tmp_path / "f") == plain_index.index_files(tmp_path / "f", options, Tokenizer(str(other)))


def test_samples_that_lost_their_media_come_back(tmp_path: Path, tokenizer_folder: str, read_shards: list[str]) -> None:
    """Once no sample has media any more, texts alone are samples: their shards are read again."""
    folder, options = tmp_path / "f", IndexOptions(tokenizer_folder)
    lost_media(folder)
    make_index(str(folder), options, max_bad_share=1.0)
    for name in ("6.tar", "7.tar"):
        (folder / name).unlink()
    read_shards.clear()
    with pytest.raises(DataError, match="Run all parts again with --rebuild"):
        for part in (PartOf(1, 2), PartOf(2, 2)):
            index_part(str(folder), options, part)
        merge_parts(str(folder), 1.0)
    assert read_shards == []
    make_index(str(folder), options, max_bad_share=1.0)
    assert len(read_shards) == 7
    expected = plain_index.index_files(folder, options, Tokenizer(tokenizer_folder))
    assert {name: data for name, data in files_of(folder).items() if not name.startswith("parts")} == expected


def test_an_unreadable_shard_is_tried_again(tmp_path: Path, tokenizer_folder: str, read_shards: list[str]) -> None:
    folder, options = tmp_path / "f", IndexOptions(tokenizer_folder)
    write_tar(folder / "0.tar", pictures(0, 2))
    (folder / "1.tar").write_bytes(b"not a tar archive")
    make_index(str(folder), options, max_bad_share=1.0)
    make_index(str(folder), options, max_bad_share=1.0)
    index_part(str(folder), options, PartOf(1, 1))
    index_part(str(folder), options, PartOf(1, 1))
    assert read_shards == ["0.tar", "1.tar", *["1.tar"] * 3]


def test_a_damaged_index_is_built_anew(tmp_path: Path, tokenizer_folder: str) -> None:
    folder, options = tmp_path / "f", IndexOptions(tokenizer_folder)
    write_tar(folder / "0.tar", [*pictures(0, 2), ("bad.txt", b"\xff")])
    write_tar(folder / "1.tar", pictures(0, 2))
    make_index(str(folder), options, max_bad_share=1.0)
    expected = files_of(folder)
    for name, data in expected.items():
        for damage in (b"", data[: len(data) // 2]):
            (folder / "index" / name).write_bytes(damage)
            if damage != data:
                make_index(str(folder), options, max_bad_share=1.0)
                assert files_of(folder) == expected, name


def test_an_interrupted_writing_keeps_the_old_index(
    tmp_path: Path, tokenizer_folder: str, read_shards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, options = tmp_path / "f", IndexOptions(tokenizer_folder)
    for number in range(3):
        write_tar(folder / f"{number}.tar", [*pictures(number, number + 2), ("bad.txt", b"\xff")])
    make_index(str(folder), options, max_bad_share=1.0)
    before = files_of(folder)
    write_tar(folder / "3.tar", pictures(3, 5))

    def interrupted(*_: Any) -> Iterator[Any]:
        yield from []
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("megatron_anymal.data.index_totals.join_shards", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_index(str(folder), options, max_bad_share=1.0)
    left = files_of(folder)
    assert {name: data for name, data in left.items() if not name.endswith(".part")} == before
    assert len(ShardIndex(str(folder))) == 6
    read_shards.clear()
    make_index(str(folder), options, max_bad_share=1.0)
    assert read_shards == ["3.tar"]
    assert files_of(folder) == plain_index.index_files(folder, options, Tokenizer(tokenizer_folder))


def test_an_index_of_an_earlier_version_is_built_anew(
    tmp_path: Path, tokenizer_folder: str, read_shards: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, options = tmp_path / "f", IndexOptions(tokenizer_folder)
    write_tar(folder / "0.tar", pictures(0, 2))
    make_index(str(folder), options)
    path = folder / "index" / "index.json"
    body = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in body.items() if name not in ("options", "counts")}))
    old = ShardIndex(str(folder))
    assert old.bounds is None and old.kinds_used() == {"image"} and old.sample_kinds() == {"parts": 2}
    make_index(str(folder), options)
    assert len(read_shards) == 2 and "built by an earlier version" in capsys.readouterr().out
    assert json.loads(path.read_text()) == body


PART = """
import sys
sys.path[:0] = {path!r}
from megatron_anymal.data import index_processes
from megatron_anymal.data.index_builder import IndexOptions
from megatron_anymal.data.index_parts import index_part
from megatron_anymal.data.part_of import PartOf

index_shard = index_processes.index_shard
def slow(folder, name, *settings):
    print(name, flush=True)
    sys.stdin.readline()
    return index_shard(folder, name, *settings)

index_processes.index_shard = slow
index_part({folder!r}, IndexOptions({tokenizer!r}), PartOf(1, 2))
"""


def test_a_killed_part_continues(tmp_path: Path, tokenizer_folder: str, read_shards: list[str]) -> None:
    folder, options = tmp_path / "f", IndexOptions(tokenizer_folder)
    for number in range(8):
        write_tar(folder / f"{number}.tar", pictures(number, number + 2))
    code = PART.format(path=sys.path, folder=str(folder), tokenizer=tokenizer_folder)
    words = [sys.executable, "-c", code]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdin and process.stdout
    for name in ("0.tar", "2.tar"):
        assert process.stdout.readline() == f"{name}\n"
        process.stdin.write("\n")
        process.stdin.flush()
    assert process.stdout.readline() == "4.tar\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    index_part(str(folder), options, PartOf(2, 2))
    with pytest.raises(DataError, match=r"lacks 1 of 2 parts: 1/2\. Run `anymal prepare` with --part 1/2 "):
        merge_parts(str(folder))
    # A file that was being written when its process died, and one that a full disk has cut.
    parts = folder / "index" / "parts"
    (parts / "4.tar.rows.0123.part").write_bytes(b"anymal")
    cut = (parts / "2.tar.rows").read_bytes()
    (parts / "2.tar.rows").write_bytes(cut[:20])
    read_shards.clear()
    index_part(str(folder), options, PartOf(1, 2))
    assert read_shards == ["2.tar", "4.tar", "6.tar"]
    read_shards.clear()
    index_part(str(folder), options, PartOf(1, 2))
    merge_parts(str(folder))
    assert read_shards == []
    assert files_of(folder) == plain_index.index_files(folder, options, Tokenizer(tokenizer_folder))


@pytest.fixture
def two_parts(tmp_path: Path, tokenizer_folder: str) -> tuple[Path, IndexOptions]:
    """A folder whose two parts are finished."""
    folder, options = tmp_path / "f", IndexOptions(tokenizer_folder)
    for number in range(5):
        write_tar(folder / f"{number}.tar", pictures(number, number + 2))
    for number in (1, 2):
        index_part(str(folder), options, PartOf(number, 2))
    return folder, options


def refused(folder: Path, expected_message: str) -> None:
    with pytest.raises(DataError, match=expected_message):
        merge_parts(str(folder))
    assert not (folder / "index" / "index.json").exists()


def test_parts_of_different_options_are_refused(two_parts: tuple[Path, IndexOptions], tmp_path: Path) -> None:
    folder, options = two_parts
    index_part(str(folder), IndexOptions(options.tokenizer, members=("png", "txt")), PartOf(2, 2))
    refused(
        folder, r"Parts 1/2 and 2/2 of .* were made with another members: members \[\] and members \['png', 'txt'\]"
    )
    other = make_tokenizer("llama 3", tmp_path / "tokenizer")
    index_part(str(folder), IndexOptions(str(other)), PartOf(2, 2))
    refused(folder, "made with another tokenizer")
    index_part(str(folder), options, PartOf(2, 2))
    merge_parts(str(folder))


def test_changed_and_new_shards_are_named_with_their_parts(two_parts: tuple[Path, IndexOptions]) -> None:
    folder, options = two_parts
    write_tar(folder / "3.tar", pictures(7, 11))
    refused(folder, r"1 shard\(s\) of .* 3\.tar\. Run these parts again: 2/2")
    index_part(str(folder), options, PartOf(2, 2))
    os.utime(folder / "0.tar", (7, 7))
    write_tar(folder / "5.tar", pictures(20, 21))
    refused(folder, r"2 shard\(s\) of .* 0\.tar, 5\.tar\. Run these parts again: 1/2, 2/2")
    for number in (1, 2):
        index_part(str(folder), options, PartOf(number, 2))
    merge_parts(str(folder))
    assert files_of(folder) == plain_index.index_files(folder, options, Tokenizer(options.tokenizer))


def test_damaged_rows_are_named(two_parts: tuple[Path, IndexOptions]) -> None:
    folder, options = two_parts
    path = folder / "index" / "parts" / "1.tar.rows"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused(folder, r"1\.tar\.rows is damaged\. Remove it and index its shard again")
    path.write_bytes(data[:30])
    refused(folder, r"1 shard\(s\) of .* 1\.tar\. Run these parts again: 2/2")
    index_part(str(folder), options, PartOf(2, 2))
    merge_parts(str(folder))


def test_parts_of_another_division_do_not_count(two_parts: tuple[Path, IndexOptions], read_shards: list[str]) -> None:
    folder, options = two_parts
    index_part(str(folder), options, PartOf(3, 3))
    # Their rows do: no shard is read twice.
    assert read_shards == []
    merge_parts(str(folder))
    with pytest.raises(DataError, match="has no finished part"):
        merge_parts(str(folder))
    assert not (folder / "index" / "parts").exists()


def test_parts_extend_an_index(two_parts: tuple[Path, IndexOptions], read_shards: list[str]) -> None:
    folder, options = two_parts
    merge_parts(str(folder))
    write_tar(folder / "15.tar", pictures(20, 25))
    write_tar(folder / "25.tar", pictures(0, 1))
    for number in (1, 2):
        index_part(str(folder), options, PartOf(number, 2))
    assert sorted(read_shards) == ["15.tar", "25.tar"]
    merge_parts(str(folder))
    assert files_of(folder) == plain_index.index_files(folder, options, Tokenizer(options.tokenizer))


def test_too_much_left_out_keeps_the_parts(tmp_path: Path, tokenizer_folder: str) -> None:
    folder, options = tmp_path / "f", IndexOptions(tokenizer_folder)
    write_tar(folder / "0.tar", [*pictures(0, 2), ("bad.txt", b"\xff")])
    index_part(str(folder), options, PartOf(1, 1))
    refused(folder, "max-bad-share")
    merge_parts(str(folder), 0.5)
    assert files_of(folder) == plain_index.index_files(folder, options, Tokenizer(tokenizer_folder))


@pytest.mark.parametrize("spec", ["0/64", "65/64", "a/b", "3", "3/", "/64", "-1/4", "1/0", "1/2/3", " 1/2"])
def test_wrong_parts_are_refused_at_once(spec: str) -> None:
    words = [sys.executable, "-m", "megatron_anymal", "prepare", "--index-only=/none", "--tokenizer=/none"]
    done = subprocess.run([*words, f"--part={spec}"], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and done.stderr.startswith(f"error: --part {spec!r}"), done.stderr
    assert done.stderr.count("\n") == 1


def test_shares_of_parts() -> None:
    for of in (1, 2, 7, 64):
        parts = [PartOf.parse(f"{number}/{of}") for number in range(1, of + 1)]
        items = list(range(50))
        assert sorted(item for part in parts for item in part.items(items)) == items
        for part in parts:
            assert part.items(items) == [n for n in items if part.takes(n)]
            assert all(PartOf.of_item(n, of) == part for n in part.items(items))


@pytest.mark.parametrize(
    ("options", "expected_message"),
    [
        (["--merge=F", "--tokenizer=T"], "Leave out --tokenizer"),
        (["--merge=F", "--part=1/2"], "Leave out --part"),
        (["--index-only=F", "--tokenizer=T", "--part=1/2", "--max-bad-share=0.5"], "Give it to --merge"),
        (["--manifest=M", "--out=F", "--tokenizer=T", "--part=1/2", "--overwrite"], "Empty the folder first"),
        (["--manifest=M", "--out=F", "--tokenizer=T", "--rebuild"], "no effect without --index-only"),
        (["--index-only=F", "--tokenizer=T", "--samples-per-shard=3"], "no effect without --manifest"),
        (["--index-only=F", "--part=1/2"], "--tokenizer is missing"),
        (["--merge=/none"], "no shard folder '/none'"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], expected_message: str) -> None:
    with pytest.raises(DataError, match=expected_message):
        prepare(options)


class ObjectStore(MemoryFileSystem):
    """Has no folders, only objects with their names."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...

    def isdir(self, path: str) -> bool:
        inside = f"{self._strip_protocol(path).rstrip('/')}/"
        return any(name.startswith(inside) for name in self.store)


def test_a_folder_that_is_not_on_a_disk(tmp_path: Path, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The attribute of this name is a read-only view.
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "memory", ObjectStore)
    mixed(tmp_path / "f")
    settings = {"attributes": {"imu": {"rate": 50}}}
    options = IndexOptions(tokenizer_folder, **settings)
    fs = fsspec.filesystem("memory")
    fs.put(str(tmp_path / "f"), "/parts", recursive=True)
    make_index("memory://parts", options)
    fs.rm("/parts/index", recursive=True)
    for number in (1, 2):
        index_part("memory://parts", options, PartOf(number, 2))
    merge_parts("memory://parts")
    joined = {path: fs.cat_file(path) for path in fs.find("/parts/index")}
    make_index("memory://parts", options)
    make_index("memory://parts", options, rebuild=True)
    assert {path: fs.cat_file(path) for path in fs.find("/parts/index")} == joined and len(joined) == 7
    fs.rm("/parts", recursive=True)


def manifest(folder: Path, lines: int, twice: int = -1) -> Path:
    """A manifest of pictures; the key of line 0 comes back in line `twice`."""
    folder.mkdir()
    names = {}
    for number, (name, data) in enumerate(pictures(0, lines)):
        if name.endswith("png"):
            (folder / name).write_bytes(data)
            names[number // 2] = name
    entries = [{"key": f"k{0 if n == twice else n}", "media": names[n], "text": "one two"} for n in range(lines)]
    path = folder / "manifest.jsonl"
    path.write_text("\n\n".join(map(json.dumps, entries)) + "\n")
    return path


def prepare_parts(path: Path, out: Path, tokenizer: str, of: int, *more: str) -> None:
    for number in range(of, 0, -1):
        command = ["--manifest", str(path), "--out", str(out), "--tokenizer", tokenizer, "--samples-per-shard=3"]
        assert prepare([*command, f"--part={number}/{of}", *more]) == 0


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@pytest.mark.parametrize("of", [1, 2, 9])
def test_a_manifest_by_parts(suffix: str, of: int, tmp_path: Path, tokenizer_folder: str) -> None:
    path = manifest(tmp_path / "m", 20)
    if suffix == "csv":
        rows = [json.loads(line) for line in path.read_text().splitlines() if line]
        path = path.with_suffix(".csv")
        path.write_text("key,media,text\n" + "".join(f'{r["key"]},{r["media"]},"{r["text"]}\n"\n' for r in rows))
    whole, out = tmp_path / "whole", tmp_path / "out"
    command = ["--manifest", str(path), "--out", str(whole), "--tokenizer", tokenizer_folder, "--samples-per-shard=3"]
    assert prepare(command) == 0
    prepare_parts(path, out, tokenizer_folder, of)
    # Done: nothing is written again.
    times = {shard: shard.stat().st_mtime_ns for shard in out.glob("*.tar")}
    prepare_parts(path, out, tokenizer_folder, of)
    assert times == {shard: shard.stat().st_mtime_ns for shard in out.glob("*.tar")}
    assert prepare(["--merge", str(out)]) == 0
    assert {p.name: p.read_bytes() for p in out.glob("*.tar")} == {p.name: p.read_bytes() for p in whole.glob("*.tar")}
    for shard in whole.glob("*.tar"):
        os.utime(out / shard.name, ns=(7, shard.stat().st_mtime_ns))
    make_index(str(out), IndexOptions(tokenizer_folder), rebuild=True)
    assert files_of(out) == files_of(whole)


def test_a_part_that_two_processes_pack_at_once(
    tmp_path: Path, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process begins a shard and ends it only after another one has packed the whole part."""
    path, whole, out = manifest(tmp_path / "m", 10), tmp_path / "whole", tmp_path / "out"
    prepare_parts(path, whole, tokenizer_folder, 2)
    write, calls = SampleWriter.write, []

    def write_slowly(*arguments: Any) -> PackedShard:
        calls.append(arguments[1])
        shard = write(*arguments)
        if len(calls) == 1:
            prepare_parts(path, out, tokenizer_folder, 2)
        return shard

    monkeypatch.setattr(SampleWriter, "write", write_slowly)
    prepare_parts(path, out, tokenizer_folder, 2)
    # Left by a process that was killed.
    (out / "shard-000000.tar.0123456789ab.part").write_bytes(b"anymal")
    merge_parts(str(whole))
    merge_parts(str(out))
    shards, of_one = ({p.name: p.read_bytes() for p in folder.glob("*.tar*")} for folder in (out, whole))
    assert shards == of_one and len(shards) == 4 and len(calls) > len(shards)


def test_parts_of_a_manifest_that_changed(tmp_path: Path, tokenizer_folder: str) -> None:
    path, out = manifest(tmp_path / "m", 7), tmp_path / "out"
    prepare_parts(path, out, tokenizer_folder, 2)
    with pytest.raises(DataError, match="another --samples-per-shard"):
        prepare_parts(path, out, tokenizer_folder, 2, "--samples-per-shard=4")
    (out / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match="has 2 shards, but its parts made 3"):
        merge_parts(str(out))
    prepare_parts(path, out, tokenizer_folder, 2)
    path.write_text(path.read_text() + "\n")
    with pytest.raises(DataError, match="another manifest"):
        prepare_parts(path, out, tokenizer_folder, 2)
    merge_parts(str(out))
    with pytest.raises(DataError, match="already holds shards"):
        prepare_parts(path, out, tokenizer_folder, 2)


def test_a_key_that_comes_back_in_another_part(tmp_path: Path, tokenizer_folder: str) -> None:
    path, out = manifest(tmp_path / "m", 10, twice=4), tmp_path / "out"
    prepare_parts(path, out, tokenizer_folder, 2)
    with pytest.raises(
        DataError, match=r"1 key\(s\) of the manifest occur several times.*'k0', the key occurs in 2 sh"
    ):
        merge_parts(str(out))


def test_a_line_that_cannot_be_read_is_named(tmp_path: Path, tokenizer_folder: str) -> None:
    path = manifest(tmp_path / "m", 10)
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(DataError, match=r"manifest\.jsonl:20: .*not JSON"):
        prepare_parts(path, tmp_path / "out", tokenizer_folder, 2)


def packed_alike(words: list[str], out: Path, whole: Path, of: int) -> None:
    """Check that parts make the shards, the index and the journal that a single command makes."""
    assert prepare([*words, f"--out={whole}", "--max-bad-share=0.5"]) == 0
    for number in range(of, 0, -1):
        assert prepare([*words, f"--out={out}", f"--part={number}/{of}"]) == 0
    assert prepare([f"--merge={out}", "--max-bad-share=0.5"]) == 0
    assert {p.name: p.read_bytes() for p in out.glob("*.tar")} == {p.name: p.read_bytes() for p in whole.glob("*.tar")}
    for shard in whole.glob("*.tar"):
        os.utime(out / shard.name, ns=(7, shard.stat().st_mtime_ns))
    make_index(str(out), IndexOptions(words[1]), max_bad_share=0.5, rebuild=True)
    assert files_of(out) == files_of(whole) and (out / "index" / JOURNAL).exists()


def test_samples_that_parts_leave_out(
    tmp_path: Path, tokenizer_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines without media files, filtered lines and a stretch of which nothing is left, by parts and at once."""
    path = manifest(tmp_path / "m", 20)
    lines = [{**json.loads(line), "score": n} for n, line in enumerate(path.read_text().splitlines()[::2])]
    path.write_text("\n".join(map(json.dumps, lines)))
    for number in (4, 6, 7, 8):
        (tmp_path / "m" / lines[number]["media"]).unlink()
    words = ["--tokenizer", tokenizer_folder, f"--manifest={path}", "--samples-per-shard=3"]
    words += ["--filter=max_column:score=15", "--workers=1"]
    packed_alike(words, tmp_path / "out", tmp_path / "whole", 3)
    shown = capsys.readouterr().out
    assert "part 3/3: 6 samples = 1 in 1 shards + 3 left out (missing_media 3) + 2 filtered" in shown
    assert "20 samples in = 12 used + 4 left out + 4 filtered (max_column:score=15 4)" in shown
    assert len(list((tmp_path / "out").glob("*.tar"))) == 5


def test_missing_media_of_a_part_are_looked_for_again(tmp_path: Path, tokenizer_folder: str) -> None:
    path, out = manifest(tmp_path / "m", 10), tmp_path / "out"
    picture = tmp_path / "m" / "4.png"
    data = picture.read_bytes()
    picture.unlink()
    prepare_parts(path, out, tokenizer_folder, 2)
    refused(out, r"1 of 10 samples .*--max-bad-share.*manifest\.jsonl:9: there is no media file")
    picture.write_bytes(data)
    prepare_parts(path, out, tokenizer_folder, 2)
    merge_parts(str(out))
    assert len(ShardIndex(str(out))) == 10 and not ShardIndex(str(out)).left_out()


@pytest.mark.parametrize("layout", ["llava", "energon"])
def test_a_data_set_by_parts(layout: str, tmp_path: Path, tokenizer_folder: str) -> None:
    entries = [
        {
            "id": f"{n}",
            "image": f"{n}.png",
            "conversations": [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "one"}],
        }
        for n in range(7)
    ]
    for n in range(7):
        source_folders.put(tmp_path / "d" / f"{n}.png", png(n))
    path = source_folders.put(tmp_path / "d" / "list.json", json.dumps(entries))
    if layout == "energon":
        path = tmp_path / "e"
        members = [(f"{n}.{e}", d) for n in range(7) for e, d in (("png", png(n)), ("json", b'{"c": "one two"}'))]
        write_tar(path / "0.tar", members)
        fields = "field_map: {image: png, caption: 'json[c]'}\n"
        source_folders.put(path / ".nv-meta" / "dataset.yaml", f"__class__: CaptioningWebdataset\n{fields}")
        source_folders.put(path / ".nv-meta" / "split.yaml", "split_parts: {train: [0.tar]}\n")
    words = ["--tokenizer", tokenizer_folder, "--from", layout, str(path), "--samples-per-shard=2"]
    packed_alike([*words, "--filter=min_side=4"], tmp_path / "out", tmp_path / "whole", 2)
    with pytest.raises(DataError, match=rf"--rebuild has no effect .*--from {layout} is packed"):
        prepare([*words, f"--out={tmp_path / 'other'}", "--rebuild"])


def test_shards_in_place_by_parts(tmp_path: Path, tokenizer_folder: str, read_shards: list[str]) -> None:
    folder = tmp_path / "laion"
    source_folders.img2dataset(folder)
    words = ["--from", "img2dataset", str(folder), "--tokenizer", tokenizer_folder, "--workers=1"]
    words += ["--filter=min_column:similarity=0.3"]
    assert prepare(words) == 0
    at_once = files_of(folder)
    for number in (1, 2):
        assert prepare([*words, "--rebuild", f"--part={number}/2"]) == 0
    merge_parts(str(folder))
    assert files_of(folder) == at_once and b"filtered" in at_once["left_out.jsonl"]
    # An index without changes is extended with its filtered samples; other filters read everything.
    read_shards.clear()
    assert prepare(words) == 0 and not read_shards and files_of(folder) == at_once
    assert prepare([*words[:-1], "--filter=min_column:similarity=0.2"]) == 0 and len(read_shards) == 2


def test_hashes_that_wait_in_files(tmp_path: Path, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_anymal.data.repeated_keys.HASHES_AT_ONCE", 3)
    folder, options = tmp_path / "f", IndexOptions(tokenizer_folder)
    for number in range(4):
        write_tar(folder / f"{number}.tar", pictures(number, number + 9))
    make_index(str(folder), options)
    expected = plain_index.index_files(folder, options, Tokenizer(tokenizer_folder))
    assert files_of(folder) == expected and expected["left_out.jsonl"].count(b"repeated_key") == 10
