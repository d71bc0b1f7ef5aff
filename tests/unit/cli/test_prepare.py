"""A manifest becomes indexed shards that return the same parts and bytes; errors in a manifest are reported."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image
from tiny import SPECIAL, flac, npy, png

from megatron_anymal.cli.prepare import main
from megatron_anymal.config import LimitsConfig
from megatron_anymal.data.index_builder import IndexOptions
from megatron_anymal.data.index_folder import make_index
from megatron_anymal.data.manifest import write_shards
from megatron_anymal.data.records import DataError, MediaPart, TextPart
from megatron_anymal.data.samples import parse_parts
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.data.tokenizer import Tokenizer

INTERLEAVED = [
    {"text": "what is", "loss": False},
    {"media": "a.png", "modality": "image"},
    {"text": "this", "loss": False},
    {"media": "b.flac", "modality": "audio"},
    {"media": "c.npy", "modality": "imu", "rate": 50},
    {"media": "d.png", "modality": "image"},
    {"text": "one two"},
]
FILES = {"a.png": png(1), "b.flac": flac(2), "c.npy": npy(3), "d.png": png(4, (20, 9))}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of media files."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    return folder


def manifest(source: Path, lines: list[dict[str, Any] | str]) -> str:
    path = source / "manifest.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def prepared(source: Path, manifest_path: str, tokenizer: str, **options: Any) -> ShardIndex:
    out = str(source.parent / "shards")
    write_shards(manifest_path, out, samples_per_shard=2)
    make_index(out, IndexOptions(tokenizer), **options)
    return ShardIndex(out)


def error_of(source: Path, lines: list[dict[str, Any] | str]) -> str:
    with pytest.raises(DataError) as error:
        write_shards(manifest(source, lines), str(source.parent / "out"))
    return str(error.value)


def test_interleaved_media_and_text_come_back(source: Path, tokenizer_folder: str) -> None:
    lines = [{"key": f"k{n}", "parts": INTERLEAVED} for n in range(5)]
    index = prepared(source, manifest(source, lines), tokenizer_folder)
    assert len(index) == 5 and len(index.header.shards) == 3
    index.check_shards()
    assert index.kinds_used() == {"image", "audio", "imu"}
    for sample in range(5):
        assert index.key(sample) == f"k{sample}"
        parts = index.parts(sample)
        given = parse_parts(INTERLEAVED, "here")
        assert [type(p) for p in parts] == [type(p) for p in given]
        for part, wanted in zip(parts, given):
            if isinstance(wanted, TextPart):
                assert part == wanted
            else:
                assert isinstance(part, MediaPart)
                assert (part.modality, part.attributes) == (wanted.modality, wanted.attributes)
        media = index.read_media(sample, parts, range(4))
        assert [m.data for m in media] == [FILES[n] for n in ("a.png", "b.flac", "c.npy", "d.png")]
        assert [m.extension for m in media] == ["png", "flac", "npy", "png"]
        [third] = index.read_media(sample, parts, [2])
        assert third.data == FILES["c.npy"] and third.part.attributes == {"rate": 50}
    sizes = index.media["size"][:4]
    np.testing.assert_allclose(sizes, [(8, 8), (0.5, 8000), (1.0, 50), (20, 9)])
    # begin, what, is, this, one, two, end; targets: one, two, end.
    assert set(index.samples["tokens"]) == {7} and set(index.samples["targets"]) == {3}


def test_csv_with_and_without_keys(source: Path, tokenizer_folder: str) -> None:
    path = source / "manifest.csv"
    path.write_text('key,media,modality,text\nfirst,a.png,image,"one, two"\n,b.flac,,three\n')
    index = prepared(source, str(path), tokenizer_folder)
    assert [index.key(s) for s in range(2)] == ["first", "000000003"]
    assert index.parts(0)[1] == TextPart("one, two")
    assert [index.parts(s)[0].modality for s in range(2)] == ["image", "audio"]  # type: ignore[union-attr]
    assert index.read_media(1, index.parts(1), [0])[0].data == FILES["b.flac"]


def test_csv_can_state_an_imu_rate(source: Path, tokenizer_folder: str) -> None:
    path = source / "manifest.csv"
    path.write_text("media,text,rate\nc.npy,walk,50\na.png,one,\n")
    index = prepared(source, str(path), tokenizer_folder)
    assert len(index) == 2 and index.parts(0)[0].attributes == {"rate": 50}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("lines", "fragments"),
    [
        ([{"media": "a.png", "text": "one"}, {"media": "gone.png", "text": "one"}], ["manifest.jsonl:2", "gone.png"]),
        ([{"key": "x", "media": "a.png", "text": "one"}] * 2, ["manifest.jsonl:2", "'x'", "twice"]),
        ([{"media": "a.png", "text": "one"}, "{not json"], ["manifest.jsonl:2", "not JSON"]),
        (["[1, 2]"], ["manifest.jsonl:1", "object"]),
        ([{"media": "a.png"}], ["manifest.jsonl:1", "`text`"]),
        ([{"parts": [{"media": "a.png"}]}], ["manifest.jsonl:1", "no text"]),
        ([{"parts": []}], ["manifest.jsonl:1", "`parts`"]),
        ([{"parts": [{"text": "a", "media": "b"}]}], ["part 0", "either"]),
        ([{"parts": [{"text": "a", "los": True}]}], ["part 0", "other keys"]),
        ([{"parts": [{"text": "a", "loss": "yes"}]}], ["part 0", "boolean"]),
        ([{"parts": [{"text": "a"}, {"media": 3}]}], ["part 1", "strings"]),
        ([], ["no line"]),
    ],
)
def test_a_wrong_manifest_names_the_line(source: Path, lines: list[Any], fragments: list[str]) -> None:
    message = error_of(source, lines)
    for words in fragments:
        assert words in message


def test_a_csv_line_with_an_unquoted_comma(source: Path) -> None:
    (source / "manifest.csv").write_text("media,text\na.png,one\na.png,one, two\n")
    with pytest.raises(DataError, match=r"manifest\.csv:3.*more cells"):
        write_shards(str(source / "manifest.csv"), str(source.parent / "out"))


def table(source: Path, data: bytes, name: str = "manifest.csv") -> str:
    (source / name).write_bytes(data)
    return str(source / name)


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbfmedia,text\na.png,one\n",
        b"\xef\xbb\xbfmedia;text\r\na.png;one\r\n",
        b"media\ttext\na.png\tone\n",
        b'"Media","Text"\n"a.png","one"\n',
    ],
)
def test_tables_as_spreadsheets_write_them(source: Path, tokenizer_folder: str, data: bytes) -> None:
    index = prepared(source, table(source, data), tokenizer_folder)
    assert index.parts(0)[1] == TextPart("one") and index.read_media(0, index.parts(0), [0])[0].data == FILES["a.png"]


def test_a_byte_order_mark_before_jsonl(source: Path, tokenizer_folder: str) -> None:
    data = b'\xef\xbb\xbf{"media": "a.png", "text": "one"}\n'
    assert len(prepared(source, table(source, data, "manifest.jsonl"), tokenizer_folder)) == 1


def test_keys_that_are_numbers(source: Path, tokenizer_folder: str) -> None:
    lines: list[Any] = [{"key": n, "media": "a.png", "text": "one"} for n in (0, 1, 10**30)]
    index = prepared(source, manifest(source, [*lines, {"media": "a.png", "text": "one"}]), tokenizer_folder)
    assert [index.key(n) for n in range(4)] == ["0", "1", str(10**30), "000000004"]


@pytest.mark.parametrize("key", [1.5, True, ["a"], "a\nb", "a/", "k" * 70_000])
def test_keys_that_cannot_be_file_names(source: Path, key: Any) -> None:
    message = error_of(source, [{"media": "a.png", "text": "one"}, {"key": key, "media": "a.png", "text": "one"}])
    assert "manifest.jsonl:2" in message and "key" in message and len(message) < 600


LONG = b"x" * 200_000
ODD_TABLES = {
    "latin-1": ("m.csv", b"media,text\na.png,one\na.png,caf\xe9\n", ["m.csv:3", "0xe9", "UTF-8"]),
    "latin-1-jsonl": ("m.jsonl", b'{"media": "a.png", "text": "caf\xe9"}\n', ["m.jsonl:1", "0xe9", "UTF-8"]),
    "utf-16": ("m.csv", "media,text\na.png,one\n".encode("utf-16"), ["UTF-16"]),
    "utf-16-jsonl": ("m.jsonl", '{"media": "a.png", "text": "one"}\n'.encode("utf-16"), ["UTF-16"]),
    "surrogate": ("m.jsonl", b'{"media": "a.png", "text": "\\ud83d"}\n', ["m.jsonl:1", "surrogate"]),
    "twice": ("m.jsonl", b'{"media": "a.png", "text": "a", "text": "b"}\n', ["m.jsonl:1", "'text' occurs twice"]),
    "digits": ("m.jsonl", b'{"media": "a.png", "text": "a", "id": ' + b"7" * 6000 + b"}\n", ["m.jsonl:1", "digits"]),
    "deep": ("m.jsonl", b'{"a": ' + b"[" * 90_000 + b"]" * 90_000 + b"}\n", ["m.jsonl:1", "max_json_depth"]),
    "long": ("m.jsonl", b'{"media": "a.png", "text": "' + LONG * 6 + b'"}\n', ["m.jsonl:1", "max_text_bytes"]),
    "quote": ("m.csv", b'media,text\na.png,"one\na.png,two\na.png,three\n', ["m.csv:", "end of data"]),
    "long-cell": ("m.csv", b"media,text\na.png," + LONG * 6 + b"\n", ["m.csv:2", "max_text_bytes"]),
    "columns": ("m.csv", b"file,caption\na.png,one\n", ["m.csv:1", "`media` and `text`", "file,caption"]),
    "column-twice": ("m.csv", b"media,text,text\na.png,one,two\n", ["m.csv:1", "'text' occurs twice"]),
    "empty": (
        "m.jsonl",
        b'{"media": "a.png", "text": " \\n"}\n',
        ["m.jsonl:1", "its text is empty", "remove the line"],
    ),
    "empty-part": (
        "m.jsonl",
        b'{"parts": [{"media": "a.png"}, {"text": ""}]}\n',
        ["m.jsonl:1", "its text is empty", "remove the line"],
    ),
    "no-media": ("m.jsonl", b'{"media": "b.png", "text": "one"}\n', ["m.jsonl:1", "b.png", "relative to the manifest"]),
    "short-line": ("m.csv", b"media,text,key\na.png,one\n", ["m.csv:2", "fewer cells"]),
}


@pytest.mark.parametrize("odd", ODD_TABLES)
def test_an_odd_manifest_is_refused_in_one_line(source: Path, odd: str) -> None:
    name, data, fragments = ODD_TABLES[odd]
    with pytest.raises(DataError) as error:
        write_shards(table(source, data, name), str(source.parent / "out"))
    message = str(error.value)
    assert all(words in message for words in fragments), message
    assert "\n" not in message and len(message.replace(str(source.parent), "")) < 500
    assert not list((source.parent / "out").glob("*.part"))


def test_a_cell_above_the_csv_modules_own_limit(source: Path, tokenizer_folder: str) -> None:
    index = prepared(source, table(source, b"media,text\na.png," + b"one " * 50_000 + b"\n"), tokenizer_folder)
    assert index.samples["targets"][0] == 50_001


def test_media_above_the_limit_are_refused_before_they_are_read(source: Path) -> None:
    path = manifest(source, [{"media": "a.png", "text": "one"}])
    with pytest.raises(DataError, match=r"manifest\.jsonl:1.*max_member_bytes=10"):
        write_shards(path, str(source.parent / "out"), limits=LimitsConfig(max_member_bytes=10))


def test_no_manifest_and_another_kind_of_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no manifest"):
        write_shards(str(tmp_path / "none.jsonl"), str(tmp_path / "out"))
    (tmp_path / "list.txt").write_text("a")
    with pytest.raises(DataError, match=r"\.csv or a \.jsonl"):
        write_shards(str(tmp_path / "list.txt"), str(tmp_path / "out"))


def test_existing_shards_are_kept_without_overwrite(source: Path) -> None:
    path = manifest(source, [{"media": "a.png", "text": "one"}])
    out = source.parent / "out"
    write_shards(path, str(out))
    before = (out / "shard-000000.tar").read_bytes()
    with pytest.raises(DataError, match="--overwrite"):
        write_shards(path, str(out))
    assert (out / "shard-000000.tar").read_bytes() == before
    write_shards(path, str(out), overwrite=True)
    assert (out / "shard-000000.tar").read_bytes() == before


@pytest.mark.parametrize(
    "lines",
    [None, [], [{"key": "a", "media": "a.png", "text": "one"}, {"key": "b", "media": "gone.png", "text": "two"}]],
)
def test_a_wrong_manifest_does_not_cost_the_old_shards(lines: list[dict[str, str]] | None, source: Path) -> None:
    out = source.parent / "kept"
    path = source / "good.jsonl"
    path.write_text(json.dumps({"key": "k", "media": "a.png", "text": "one"}) + "\n")
    write_shards(str(path), str(out))
    before = {file.name: file.read_bytes() for file in out.glob("*.tar*")}
    wrong = source / "wrong.jsonl"
    if lines is not None:
        wrong.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError):
        write_shards(str(wrong), str(out), overwrite=True)
    assert {file.name: file.read_bytes() for file in out.glob("*.tar*")} == before
    assert not list(out.glob("packing*"))


def _nan() -> bytes:
    out = io.BytesIO()
    values = np.zeros((20, 6), np.float32)
    values[7, 2] = np.nan
    np.save(out, values)
    return out.getvalue()


def _jpeg() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 32)).save(out, "JPEG")
    return out.getvalue()


def wav_without_samples() -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.zeros(0), 8000, format="WAV")
    return out.getvalue()


BAD = {
    "broken.jpg": (_jpeg()[:20], {}, "image"),
    "silent.wav": (wav_without_samples(), {}, "0 samples"),
    "nan.npy": (_nan(), {"rate": 50}, "row 7 contains NaN"),
    "unrated.npy": (npy(1), {}, "sampling rate"),
    "empty.png": (b"", {}, "0 bytes"),
    "strange.xyz": (b"abc", {}, "xyz"),
}


def lines_with_bad(source: Path) -> list[dict[str, Any] | str]:
    lines: list[dict[str, Any] | str] = [{"key": f"good{n}", "media": "a.png", "text": "one"} for n in range(6)]
    for index, (name, (data, attributes, _)) in enumerate(BAD.items()):
        (source / name).write_bytes(data)
        bad = {"key": f"bad-{name.partition('.')[0]}", "media": name, "text": "two", **attributes}
        lines.insert(2 * index, bad)
    return [*lines, {"key": "bad-untrained", "parts": [{"text": "one", "loss": False}]}]


def test_bad_media_are_left_out_counted_and_named(
    source: Path, tokenizer_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    index = prepared(source, manifest(source, lines_with_bad(source)), tokenizer_folder, max_bad_share=0.6)
    shown = capsys.readouterr()
    assert sorted(index.key(s) for s in range(len(index))) == [f"good{n}" for n in range(6)]
    for sample in range(6):
        assert index.read_media(sample, index.parts(sample), [0])[0].data == FILES["a.png"]
    for name, (_, _, reason) in BAD.items():
        [line] = [line for line in shown.err.splitlines() if f"bad-{name.partition('.')[0]}" in line]
        assert reason in line
    assert "bad-untrained" in shown.err and "7 left out" in shown.out


def test_too_many_bad_samples_stop(source: Path, tokenizer_folder: str) -> None:
    with pytest.raises(DataError) as error:
        prepared(source, manifest(source, lines_with_bad(source)), tokenizer_folder, max_bad_share=0.5)
    assert "7 of 13" in str(error.value) and "--max-bad-share 0.5" in str(error.value)
    assert "bad-broken" in str(error.value)
    assert not (source.parent / "shards" / "index" / "index.json").exists()


def test_the_verb(source: Path, tokenizer_folder: str, tmp_path: Path) -> None:
    path = manifest(source, [{"key": "k", "media": "c.npy", "rate": 50, "text": "walk"}])
    out = str(tmp_path / "out")
    with pytest.raises(DataError, match="--tokenizer"):
        main(["--manifest", path, "--out", out])
    with pytest.raises(DataError, match="--out"):
        main(["--manifest", path, "--tokenizer", tokenizer_folder])
    with pytest.raises(DataError, match="ENDING=KIND"):
        main(["--manifest", path, "--out", out, "--tokenizer", tokenizer_folder, "--modality", "npy"])
    assert main(["--manifest", path, "--out", out, "--tokenizer", tokenizer_folder]) == 0
    assert ShardIndex(out).key(0) == "k"
    assert main(["--index-only", out, "--tokenizer", tokenizer_folder, "--workers", "1"]) == 0


def test_counts_are_those_of_the_document(tokenizer_folder: str) -> None:
    tokenizer = Tokenizer(tokenizer_folder)
    parts = parse_parts(INTERLEAVED, "here")
    placeholders = {"image": 2, "audio": 3, "imu": 4}
    soft = [2, 3, 1, 8]
    document = tokenizer.document(parts, soft, placeholders)
    tokens, targets = tokenizer.count(parts)
    assert len(document.tokens) == tokens + sum(soft) and sum(document.is_target) == targets
    names = tokenizer.hf.convert_ids_to_tokens(document.tokens)
    image, audio, imu = SPECIAL[2:5]
    layout = [SPECIAL[0], "what", "is", *[image] * 2, "this", *[audio] * 3, imu, *[image] * 8, "one", "two", SPECIAL[1]]
    assert names == layout
    assert [n for n, t in zip(names, document.is_target) if t] == ["one", "two", SPECIAL[1]]
    assert document.media_starts == [3, 6, 9, 10]


def test_the_tokenizer_is_looked_for_before_shards_are_written(source: Path) -> None:
    path, out = manifest(source, [{"media": "a.png", "text": "one"}]), source.parent / "out"
    with pytest.raises(DataError, match=r"there is no folder '/nowhere'\. Correct the path"):
        main(["--manifest", path, "--out", str(out), "--tokenizer", "/nowhere"])
    assert not out.exists()
