"""The tar reader accounts for every byte: intact archives as tarfile reads them, damaged ones by name and offset."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

import fsspec
import pytest
from tars import BLOCK, changed_header, header_of, tar_bytes

from megatron_anymal.data.tar.byte_source import open_bytes
from megatron_anymal.data.tar.headers import parse_header
from megatron_anymal.data.tar.reader import TarEntry, TarError, TarMember, TarPassed, TarProblem, TarWalk
from megatron_anymal.object_storage.client import file_system

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


class Bytes:
    def __init__(self, data: bytes):
        self.data, self.size = data, len(data)

    def read_at(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


def walk(archive: bytes) -> list[TarEntry]:
    made = TarWalk(Bytes(archive), 2**20)
    entries = list(made)
    assert made.bytes.total == len(archive)
    return entries


def members(entries: list[TarEntry]) -> list[str]:
    return [entry.name for entry in entries if isinstance(entry, TarMember)]


def problems(entries: list[TarEntry]) -> list[TarProblem]:
    return [entry for entry in entries if isinstance(entry, TarProblem)]


SAMPLES = [
    (f"{n:04d}.{ending}", bytes([n]) * size) for n in range(20) for ending, size in (("png", 700 * n), ("txt", 3))
]


@pytest.mark.parametrize("form", FORMATS)
def test_sound_archives_are_read_as_tarfile_reads_them(form: int) -> None:
    rng = random.Random(form)
    names = [*(name for name, _ in SAMPLES), "d" * 120 + "/long.txt", "späte/é.png", "a b.txt", "x/" * 40 + "y.txt"]
    archive = tar_bytes([(name, rng.randbytes(rng.randrange(2000))) for name in names], form)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        wanted = [(m.name, m.offset_data, m.size) for m in tar]
    entries = walk(archive)
    assert [(m.name, m.offset, m.size) for m in entries if isinstance(m, TarMember)] == wanted
    assert len(entries) == len(wanted)


def test_an_old_archive_without_magic(tmp_path: Path) -> None:
    archive = changed_header(tar_bytes(SAMPLES[:1]), "0000.png", 257, b"\0" * 8)
    assert members(walk(archive)) == ["0000.png"]


def test_checksums_of_any_bytes() -> None:
    """Also sums that are equal modulo 65521, the modulus of Adler-32."""
    rng = random.Random(0)
    for fill in [b"\xff" * BLOCK, bytes(BLOCK), *(rng.randbytes(BLOCK) for _ in range(200))]:
        block = fill[:100] + fill[100:124] + b"%011o\0" % 7 + fill[136:148] + b" " * 8 + fill[156:]
        for difference in (0, 65521, -65521, 1):
            stated = sum(block) + difference
            if 0 <= stated < 8**6:
                header = parse_header(block[:148] + b"%06o\0 " % stated + block[156:])
                signed = sum(byte - 256 * (byte > 127) for byte in block)
                assert (header is not None) == (stated in (sum(block), signed))


def test_a_flipped_checksum_byte_loses_one_member_and_says_where() -> None:
    archive = tar_bytes(SAMPLES)
    at = header_of(archive, "0010.png")
    damaged = archive[: at + 150] + bytes([archive[at + 150] ^ 1]) + archive[at + 151 :]
    # tarfile takes the damaged header for the end of the archive.
    with tarfile.open(fileobj=io.BytesIO(damaged)) as tar:
        assert len(tar.getnames()) == 20
    entries = walk(damaged)
    assert members(entries) == [name for name, _ in SAMPLES if name != "0010.png"]
    [problem] = problems(entries)
    assert problem.code == "damaged" and problem.offset == at and problem.tears
    assert problem.length == header_of(archive, "0010.txt") - at


@pytest.mark.parametrize("start", [0, 3 * BLOCK, 5000])
def test_overwritten_bytes_are_named_and_reading_goes_on_behind_them(start: int) -> None:
    archive = tar_bytes(SAMPLES)
    hole = random.Random(1).randbytes(20_000)
    entries = walk(archive[:start] + hole + archive[start + len(hole) :])
    assert members(entries)[-1] == "0019.txt" and len(members(entries)) < len(SAMPLES)
    assert {p.code for p in problems(entries)} == {"damaged"}


def test_zeros_in_the_middle_are_a_hole_unless_they_end_an_archive() -> None:
    archive = tar_bytes(SAMPLES)
    at = header_of(archive, "0010.png")
    [hole] = problems(walk(archive[:at] + bytes(4096) + archive[at + 4096 :]))[:1]
    assert (hole.code, hole.offset, hole.tears) == ("damaged", at, True)
    joined = walk(archive + tar_bytes([("later.txt", b"x")]))
    assert members(joined) == [*(name for name, _ in SAMPLES), "later.txt"]
    [note] = problems(joined)
    assert note.code == "joined" and not note.tears


@pytest.mark.parametrize(("cut", "code"), [(0, None), (BLOCK, None), (10 * BLOCK, None)])
def test_missing_padding_at_the_end_is_no_loss(cut: int, code: str | None) -> None:
    archive = tar_bytes(SAMPLES)
    assert not problems(walk(archive[: len(archive.rstrip(b"\0")) // BLOCK * BLOCK + 2 * BLOCK]))
    assert not problems(walk(archive + bytes(cut)))


def test_an_archive_that_is_cut_off() -> None:
    archive = tar_bytes(SAMPLES)
    last = header_of(archive, "0019.png")
    [problem] = problems(walk(archive[: last + 1000]))
    assert (problem.code, problem.name, problem.offset) == ("truncated", "0019.png", last)
    assert "488 of its 13300 bytes" in problem.reason
    # A cut between two members loses none visibly, but the end-of-archive marker is missing.
    [problem] = problems(walk(archive[:last]))
    assert problem.code == "no_end" and problem.tears


def test_links_devices_and_sparse_files_are_named() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for kind, name in (
            (tarfile.LNKTYPE, "hard.png"),
            (tarfile.SYMTYPE, "soft.png"),
            (tarfile.FIFOTYPE, "pipe.png"),
            (tarfile.CHRTYPE, "device.png"),
            (tarfile.DIRTYPE, "folder"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.png"
            tar.addfile(info)
        info = tarfile.TarInfo("a.png")
        tar.addfile(info)
    entries = walk(out.getvalue())
    assert [(p.code, p.name) for p in problems(entries)] == [
        ("not_a_file", f"{name}.png") for name in ("hard", "soft", "pipe", "device")
    ]
    assert "hard link" in problems(entries)[0].reason and "--hard-dereference" in problems(entries)[0].reason
    assert [e.what for e in entries if isinstance(e, TarPassed)] == ["directories"]
    assert members(entries) == ["a.png"]


def test_sparse_files_of_both_formats_are_named() -> None:
    archive = tar_bytes([("a.png", b"x" * 100), ("b.txt", b"one")])
    old = walk(changed_header(archive, "a.png", 156, b"S"))
    assert [(p.code, p.name) for p in problems(old)] == [("not_a_file", "a.png")] and members(old) == ["b.txt"]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("GNUSparseFile.0/a.png")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.png"}
        info.size = 100
        tar.addfile(info, io.BytesIO(b"x" * 100))
    [problem] = problems(walk(out.getvalue()))
    assert problem.code == "not_a_file" and "sparse" in problem.reason


@pytest.mark.parametrize(
    ("at", "value", "code"),
    [
        (124, b"77777777777\0", "damaged"),
        (124, b"-0000001234\0", "damaged"),
        (124, b"\xff" * 12, "damaged"),
        (124, b"\x80" + b"\xff" * 11, "damaged"),
        (124, b"\x80" + b"\x7f" * 11, "damaged"),
        (124, b"12a4567xyz \0", "damaged"),
        (0, b"\xff\xfe.png\0", "name"),
        (0, b"\0" * 100, "name"),
        (156, b"Q", "not_a_file"),
    ],
)
def test_header_fields_out_of_their_range_are_named(at: int, value: bytes, code: str) -> None:
    entries = walk(changed_header(tar_bytes(SAMPLES), "0010.png", at, value))
    [problem] = problems(entries)
    assert problem.code == code
    assert members(entries) == [name for name, _ in SAMPLES if name != "0010.png"]


@pytest.mark.parametrize("record", [b"999 path=x\n", b"x path=x\n", b"10 path\n", b"11 size=-1\n", b"12 size=ab1\n"])
def test_a_damaged_pax_header_spoils_its_member_alone(record: bytes) -> None:
    name = "d" * 150 + "/0010.png"
    archive = tar_bytes([("a.txt", b"one"), (name, b"data"), ("b.txt", b"two")], tarfile.PAX_FORMAT)
    at = archive.index(b" path=") - 3
    entries = walk(archive[:at] + record + archive[at + len(record) :])
    assert [p.code for p in problems(entries)] == ["bad_header"] and members(entries) == ["a.txt", "b.txt"]


def test_a_global_header_that_names_every_member_is_refused() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "fine"}) as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    assert members(walk(out.getvalue())) == ["a.txt"]
    spoilt = out.getvalue().replace(b"comment=fine", b"path=nothing")
    assert [p.code for p in problems(walk(spoilt))] == ["bad_header"]


@pytest.mark.parametrize(
    ("data", "expected_message"),
    [
        (b"", "empty"),
        (b"\x1f\x8b" + bytes(600), "gzip"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "zstd"),
        (b"PK\x03\x04" + bytes(600), "zip"),
        (b"this is no tar file" * 100, "not a tar"),
        (b"short", "not a tar"),
    ],
)
def test_other_files_are_told_apart(data: bytes, expected_message: str) -> None:
    with pytest.raises(TarError, match=expected_message):
        walk(data)


def test_an_archive_inside_a_member_is_not_read_as_members() -> None:
    inner = tar_bytes([("inner.png", b"x" * 2000), ("inner.txt", b"one")])
    archive = tar_bytes([("a.txt", b"one"), ("k.tar", inner), ("b.txt", b"two")])
    assert members(walk(archive)) == ["a.txt", "k.tar", "b.txt"]
    at = header_of(archive, "k.tar")
    entries = walk(archive[: at + 150] + b"9" + archive[at + 151 :])
    assert members(entries) == ["a.txt", "b.txt"] and [p.code for p in problems(entries)] == ["damaged"]


def test_any_damage_is_named_or_harmless() -> None:
    """Random overwrites: every loss is reported, and the byte counts add up each time."""
    rng, archive = random.Random(7), tar_bytes(SAMPLES)
    for _ in range(1000):
        at, size = rng.randrange(len(archive)), rng.choice([1, 8, 512, 3000])
        filler = rng.choice([bytes(size), rng.randbytes(size)])
        damaged = archive[:at] + filler + archive[at + size :]
        cut = rng.randrange(40_000, len(archive)) if rng.random() < 0.2 else len(archive)
        entries = walk(damaged[:cut])
        if len(members(entries)) < len(SAMPLES) and not problems(entries):
            # Zeros over the last members look like the end of the archive; no tar reader can tell the difference.
            assert not any(filler) and at + size > len(archive.rstrip(b"\0"))
            assert members(entries) == [name for name, _ in SAMPLES[: len(members(entries))]]


def test_more_zeros_at_the_end_than_writers_add_are_noted() -> None:
    archive = tar_bytes(SAMPLES)
    at = header_of(archive, "0019.png")
    [problem] = problems(walk(archive[:at] + bytes(len(archive) - at)))
    assert (problem.code, problem.offset) == ("long_end", at)


def test_files_on_other_file_systems(tmp_path: Path) -> None:
    archive = tar_bytes(SAMPLES)
    fsspec.filesystem("memory").pipe_file("/shards/0.tar", archive)
    (tmp_path / "0.tar").write_bytes(archive)
    for folder in ("memory://shards", str(tmp_path)):
        fs, root = file_system(folder)
        with open_bytes(fs, f"{root}/0.tar") as source:
            assert members(list(TarWalk(source, 2**20))) == [name for name, _ in SAMPLES]
            assert source.read_at(len(archive) - 5, 100) == archive[-5:]
