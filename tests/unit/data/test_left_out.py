"""Nothing is lost silently: every member of a shard folder is used, ignored by a rule, or reported."""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tars import header_of, tar_bytes, write_tar
from tiny import flac, npy, png

from megatron_anymal.cli.inspect import main as inspect
from megatron_anymal.cli.prepare import main as prepare
from megatron_anymal.data.records import DataError, MediaPart, TextPart
from megatron_anymal.data.shard_index import ShardIndex

Members = list[tuple[str, bytes]]


def plain(count: int, start: int = 0) -> Members:
    """Samples as WebDataset users write them: a picture and its text."""
    return [
        (f"{n:04d}.{e}", png(n) if e == "png" else b"one") for n in range(start, start + count) for e in ("png", "txt")
    ]


class Made:
    """An indexed folder and the printed output."""

    def __init__(self, folder: Path, printed: str):
        self.index = ShardIndex(str(folder))
        self.keys = [self.index.key(n) for n in range(len(self.index))]
        self.printed = printed
        lines = (folder / "index" / "left_out.jsonl").read_text().splitlines()
        self.ledger = [json.loads(line) for line in lines]
        self.codes = {(entry.get("key", ""), entry["code"]) for entry in self.ledger}
        counts = json.loads((folder / "index" / "index.json").read_text())["members"]
        assert counts["seen"] == counts["used"] + counts["bad"] + sum(counts["ignored"].values())
        self.ignored = counts["ignored"]

    def media(self, key: str) -> list[bytes]:
        number = self.keys.index(key)
        parts = self.index.parts(number)
        count = sum(isinstance(part, MediaPart) for part in parts)
        return [item.data for item in self.index.read_media(number, parts, range(count))]


class Folder:
    def __init__(self, path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]):
        self.path, self._tokenizer, self._capsys = path, tokenizer, capsys

    def index(self, *options: str, bad: float = 1.0) -> Made:
        arguments = ["--index-only", str(self.path), "--tokenizer", self._tokenizer, "--workers", "1"]
        assert prepare([*arguments, "--max-bad-share", str(bad), *options]) == 0
        shown = self._capsys.readouterr()
        return Made(self.path, shown.out + shown.err)

    def write(self, members: Sequence[tuple[str, bytes]], name: str = "0.tar") -> bytes:
        return write_tar(self.path / name, members).read_bytes()


@pytest.fixture
def folder(tmp_path: Path, tokenizer_folder: str, capsys: pytest.CaptureFixture[str]) -> Folder:
    return Folder(tmp_path / "shards", tokenizer_folder, capsys)


def test_a_damaged_header_costs_its_neighbours_alone(folder: Folder) -> None:
    archive = folder.write(plain(20))
    at = header_of(archive, "0010.png")
    (folder.path / "0.tar").write_bytes(archive[: at + 150] + b"9" + archive[at + 151 :])
    made = folder.index()
    # It is unknown whether the damaged member belonged to the sample before or after it.
    assert made.keys == [f"{n:04d}" for n in range(20) if n not in (9, 10)]
    assert made.codes == {("", "damaged"), ("0009", "torn"), ("0010", "torn")}
    assert f"offset {at}" in made.printed and "3 left out" in made.printed
    [damaged] = [entry for entry in made.ledger if entry["code"] == "damaged"]
    assert damaged["shard"] == "0.tar" and damaged["offset"] == at


def test_samples_whose_json_names_their_media_survive_beside_damage(folder: Folder) -> None:
    members: Members = []
    for n in range(6):
        sample = {"parts": [{"media": "0.png"}, {"text": "one"}]}
        members += [(f"{n}.0.png", png(n)), (f"{n}.json", json.dumps(sample).encode())]
    archive = folder.write(members)
    at = header_of(archive, "3.0.png")
    (folder.path / "0.tar").write_bytes(archive[: at + 150] + b"9" + archive[at + 151 :])
    made = folder.index()
    assert made.keys == ["0", "1", "2", "4", "5"] and made.codes == {("", "damaged"), ("3", "missing_media")}


@pytest.mark.parametrize("end", ["no end blocks", "cut within the last member"])
def test_a_shard_that_ends_too_early(folder: Folder, end: str) -> None:
    archive = folder.write(plain(5))
    stop = header_of(archive, "0004.txt")
    (folder.path / "0.tar").write_bytes(archive[: stop if end == "no end blocks" else stop + 513])
    made = folder.index()
    assert made.keys == ["0000", "0001", "0002", "0003"]
    assert made.codes == (
        {("", "no_end"), ("0004", "torn")} if end == "no end blocks" else {("", "truncated"), ("0004", "truncated")}
    )


def test_joined_shards_are_both_read(folder: Folder) -> None:
    archive = folder.write(plain(3)) + tar_bytes(plain(3, 3))
    (folder.path / "0.tar").write_bytes(archive)
    made = folder.index(bad=0.0)
    assert made.keys == [f"{n:04d}" for n in range(6)] and made.codes == {("", "joined")}
    assert made.media("0004") == [png(4)]


def test_a_key_that_comes_back_is_dropped_whole(folder: Folder) -> None:
    members = plain(30)
    members.append(members.pop(1))
    folder.write(members)
    made = folder.index()
    assert made.keys == [f"{n:04d}" for n in range(1, 30)]
    assert {key for key, _ in made.codes} == {"0000"} and ("0000", "duplicate_key") in made.codes
    folder.write([*plain(3), *plain(1)])
    assert folder.index().keys == ["0001", "0002"]


def test_two_members_of_one_name_are_named(folder: Folder) -> None:
    for second in ("0001.png", "0001.PNG"):
        members = plain(3)
        members.insert(3, (second, png(9)))
        folder.write(members)
        made = folder.index()
        assert made.keys == ["0000", "0002"] and made.codes == {("0001", "duplicate_member")}


@pytest.mark.parametrize("name", ["b.tar.gz", "b.tgz", "b.tar.zst", "b.TAR", "inside/b.tar"])
def test_shards_that_are_not_read_are_refused_by_name(folder: Folder, name: str) -> None:
    folder.write(plain(2), "a.tar")
    folder.write(plain(2, 2), name)
    with pytest.raises(DataError, match=name.partition("/")[0]):
        folder.index()
    shutil.rmtree(folder.path)
    folder.write(plain(2), "a.tar")
    folder.write(plain(2, 2), "b.tar")
    (folder.path / "stats.json").write_text("{}")
    assert len(folder.index().keys) == 4


def test_a_compressed_shard_with_a_plain_name_is_named(folder: Folder) -> None:
    folder.write(plain(40), "a.tar")
    (folder.path / "b.tar").write_bytes(b"\x1f\x8b" + bytes(100))
    made = folder.index()
    assert len(made.keys) == 40 and made.codes == {("", "unreadable")} and "gzip" in made.printed


def with_masks(count: int) -> Members:
    members: Members = []
    for n in range(count):
        members += [(f"{n}.png", png(n)), (f"{n}.seg.png", png(n + 50)), (f"{n}.txt", b"one")]
    return members


def test_a_mask_beside_a_picture_is_no_second_picture(folder: Folder) -> None:
    folder.write(with_masks(3))
    made = folder.index()
    assert made.media("1") == [png(1)] and made.ignored == {".seg.png": 3} and ".seg.png 3" in made.printed
    made = folder.index("--members", "png,seg.png,txt")
    assert made.media("1") == [png(1), png(51)] and made.ignored == {}


def test_several_pictures_of_a_sample_are_numbered_or_named(folder: Folder) -> None:
    folder.write([("a.0.png", png(0)), ("a.1.png", png(1)), ("a.txt", b"one")])
    assert folder.index().media("a") == [png(0), png(1)]
    folder.write([("a.left.png", png(0)), ("a.right.png", png(1)), ("a.txt", b"one"), *plain(1)])
    made = folder.index()
    # None of the members counts as media; leaving them out would change the sample.
    assert made.keys == ["0000"] and made.codes == {("a", "media")} and "--members" in made.printed
    assert folder.index("--members", "*.png,png,txt").media("a") == [png(0), png(1)]


def embedding() -> bytes:
    out = io.BytesIO()
    np.save(out, np.zeros(768, np.float32))
    return out.getvalue()


def test_other_files_beside_a_sample(folder: Folder) -> None:
    members: Members = []
    for n in range(3):
        members += [(f"{n}.png", png(n)), (f"{n}.npy", embedding()), (f"{n}.txt", b"one"), (f"{n}.json", b'{"w": 8}')]
    folder.write(members)
    # The extension .npy stands for IMU signals; the message names the member, its shape, and how to leave it out.
    with pytest.raises(DataError, match=r"sample '0'.*'npy' .*\[768\].*--members"):
        folder.index()
    assert not (folder.path / "index" / "index.json").exists()
    made = folder.index("--members", "png,txt", bad=0.0)
    assert made.keys == ["0", "1", "2"] and made.ignored == {".npy": 3, ".json": 3}
    assert made.media("2") == [png(2)]


def test_a_byte_order_mark_is_not_learned(folder: Folder) -> None:
    sample = json.dumps({"parts": [{"text": "two"}]}).encode()
    folder.write([("a.png", png(0)), ("a.txt", b"\xef\xbb\xbfone"), ("b.json", b"\xef\xbb\xbf" + sample)])
    made = folder.index()
    assert made.index.parts(0)[1] == TextPart("one") and made.index.parts(1) == [TextPart("two")]
    assert set(made.index.samples["tokens"]) == {3}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_picture_that_is_a_link_spoils_its_sample(folder: Folder, kind: bytes) -> None:
    folder.path.mkdir()
    with tarfile.open(folder.path / "0.tar", "w") as tar:
        for name, data in plain(4):
            info = tarfile.TarInfo(name)
            if name == "0002.png":
                info.type, info.linkname = kind, "0001.png"
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    made = folder.index()
    assert made.keys == ["0000", "0001", "0003"] and made.codes == {("0002", "not_a_file")}
    assert "--hard-dereference" in made.printed


def test_a_picture_that_is_missing_or_that_nothing_names(folder: Folder) -> None:
    sample = json.dumps({"parts": [{"text": "look"}, {"text": "one"}]}).encode()
    members = [*plain(3), ("lost.txt", b"one"), ("x.png", png(5)), ("x.json", sample), ("t.json", sample)]
    folder.write(members)
    made = folder.index()
    assert made.codes == {("lost", "no_media"), ("x", "unused_media")}
    assert made.keys == ["0000", "0001", "0002", "t"]
    assert "lost" in folder.index("--text-only").keys


def test_text_alone_is_a_sample_if_all_are(folder: Folder) -> None:
    folder.write([(f"{n}.txt", b"one") for n in range(4)])
    assert len(folder.index(bad=0.0).keys) == 4


ODD = {
    "name": ("\udcff.png", png(1)),
    "surrogate": ("k.json", b'{"parts": [{"text": "one \\ud83d"}]}'),
    "deep": ("k.json", b'{"parts": [{"text": "one", "loss": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]}"),
    "digits": ("k.json", b'{"parts": [{"text": "one"}], "id": ' + b"7" * 6000 + b"}"),
    "twice": ("k.json", b'{"parts": [{"text": "one", "text": "two"}]}'),
    "not-utf8": ("k.json", b'{"parts": [{"text": "\xe9"}]}'),
    "key": ("k" * 70_000 + ".txt", b"one"),
    "rate": ("k.json", b'{"parts": [{"media": "npy", "rate": "1"}, {"text": "one"}]}'),
    "long": ("k.txt", b"one " * 300_000),
}


@pytest.mark.parametrize("odd", ODD)
def test_one_odd_sample_leaves_the_others(folder: Folder, odd: str) -> None:
    name, data = ODD[odd]
    folder.path.mkdir()
    with tarfile.open(folder.path / "0.tar", "w", errors="surrogateescape") as tar:
        for member, content in [*plain(3), (name, data), ("k.npy", npy(1)), *plain(3, 3)]:
            if member == "k.npy" and odd != "rate":
                continue
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    made = folder.index()
    assert made.keys == [f"{n:04d}" for n in range(6)] and len(made.ledger) == 1, made.ledger


def test_sparse_members_are_refused_at_indexing(folder: Folder) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in plain(3):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if name == "0001.png":
                info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name}
            tar.addfile(info, io.BytesIO(data))
    folder.path.mkdir()
    (folder.path / "0.tar").write_bytes(out.getvalue())
    made = folder.index()
    assert made.keys == ["0000", "0002"] and made.codes == {("0001", "not_a_file")}


def test_the_ledger_holds_every_sample_and_inspect_groups_it(
    folder: Folder, tokenizer_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    members = plain(40)
    for n in range(30):
        members[2 * n] = (members[2 * n][0], b"broken")
    members += [("README", b"x"), ("._0000.png", b"x")]
    folder.write(members)
    made = folder.index()
    assert [entry["key"] for entry in made.ledger] == [f"{n:04d}" for n in range(30)]
    assert {entry["code"] for entry in made.ledger} == {"media"} and all(entry["offset"] >= 0 for entry in made.ledger)
    assert made.printed.count("left out: ") == 20 and "10 more in index/left_out.jsonl" in made.printed
    assert made.ignored == {"hidden files and files without an ending": 2}
    assert inspect([str(folder.path), "--tokenizer", tokenizer_folder]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"left out: media 30: samples whose media cannot be used", shown) and "and 28 more" in shown


def test_a_refused_indexing_keeps_the_index_and_lists_all(folder: Folder) -> None:
    archive = folder.write(plain(40))
    folder.index(bad=0.0)
    before = (folder.path / "index" / "index.json").read_bytes()
    (folder.path / "0.tar").write_bytes(archive[:3000])
    with pytest.raises(DataError, match=r"max-bad-share 0.01.*left_out\.refused\.jsonl"):
        folder.index(bad=0.01)
    assert (folder.path / "index" / "index.json").read_bytes() == before
    assert (folder.path / "index" / "left_out.refused.jsonl").read_text()
    assert (folder.path / "index" / "left_out.jsonl").read_text() == ""
    # By bytes as well: one damaged region is one entry, however many samples it swallowed.
    hole = np.random.default_rng(0).bytes(len(archive) - 12_000)
    (folder.path / "0.tar").write_bytes(archive[:6000] + hole + archive[-6000:])
    with pytest.raises(DataError, match=r"bytes of .* are unreadable"):
        folder.index(bad=0.6)
    folder.write(plain(40))
    folder.index(bad=0.0)
    assert not (folder.path / "index" / "left_out.refused.jsonl").exists()


def test_keys_that_repeat_over_shards_are_noted_and_used(folder: Folder) -> None:
    for shard in range(3):
        folder.write(plain(2 + shard), f"{shard}.tar")
    made = folder.index(bad=0.0)
    assert len(made.keys) == 9
    assert made.codes == {("0000", "repeated_key"), ("0001", "repeated_key"), ("0002", "repeated_key")}


def test_attributes_of_a_whole_folder(folder: Folder) -> None:
    folder.write([("a.npy", npy(1)), ("a.txt", b"one"), ("b.npy", npy(2)), ("b.txt", b"two")])
    with pytest.raises(DataError, match="sampling rate"):
        folder.index(bad=0.5)
    made = folder.index("--attribute", "imu.rate=50", bad=0.0)
    np.testing.assert_allclose(made.index.media["size"], [(1.0, 50), (1.0, 50)])
    part = made.index.parts(0)[0]
    assert isinstance(part, MediaPart) and part.attributes == {"rate": 50}
    # The header that a run records tells the two indexes apart.
    with_rate = made.index.header.to_json(2, 2)
    assert folder.index("--attribute", "imu.rate=25", bad=0.0).index.header.to_json(2, 2) != with_rate


def test_limits_of_members_and_texts_are_settings(folder: Folder) -> None:
    folder.write([*plain(2), ("x.flac", flac(1)), ("x.txt", b"one " * 50)])
    size = len(flac(1))
    assert folder.index("--limit", f"max_member_bytes={size}").codes == set()
    made = folder.index("--limit", f"max_member_bytes={size - 1}")
    assert made.codes == {("x", "limit")} and "max_member_bytes" in made.printed
    assert folder.index("--limit", "max_text_bytes=199").codes == {("x", "limit")}
    with pytest.raises(DataError, match="max_member_bytes"):
        folder.index("--limit", "max_member_byte=3")


@pytest.mark.parametrize("column", ["kind", "extension"])
def test_a_damaged_row_of_the_index_names_its_sample(folder: Folder, column: str) -> None:
    folder.write(plain(2))
    folder.index()
    media = np.load(folder.path / "index" / "media.npy")
    media[column][1] = 77
    np.save(folder.path / "index" / "media.npy", media)
    index = ShardIndex(str(folder.path))
    assert index.sample(0)
    with pytest.raises(DataError, match=r"sample '0001'.*damaged. Rebuild it"):
        index.sample(1)


def test_an_index_made_again_is_the_same_to_a_run(folder: Folder) -> None:
    folder.write(with_masks(3))
    first = folder.index().index
    again = folder.index().index
    assert first.header.to_json(3, 3) == again.header.to_json(3, 3)
    np.testing.assert_array_equal(first.samples, again.samples)
