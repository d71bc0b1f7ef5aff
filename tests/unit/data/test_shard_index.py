"""Indexes of third-party shards, and every way in which shards and indexes can be wrong."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from replicas import replica_data
from tiny import make_config, make_shards, png

from megatron_anymal.data.index_builder import IndexOptions
from megatron_anymal.data.index_folder import make_index
from megatron_anymal.data.records import DataError, MediaPart, TextPart
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.data.shard_listing import find_shards


def tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def jpeg(seed: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (10, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def foreign(folder: Path, shards: int = 2) -> dict[str, bytes]:
    """Write shards like img2dataset's: key.jpg, key.txt and a key.json of metadata. Return the pictures."""
    pictures = {}
    for shard in range(shards):
        members = {}
        for number in range(3):
            key = f"{shard:05d}{number:04d}"
            pictures[key] = jpeg(10 * shard + number)
            members[f"{key}.jpg"] = pictures[key]
            members[f"{key}.json"] = json.dumps({"url": "http://x", "caption": "zero", "width": 12}).encode()
            members[f"{key}.txt"] = f"one two {key}".encode()
        tar(folder / f"{shard:05d}.tar", members)
    return pictures


def test_foreign_shards_are_indexed_in_place(tmp_path: Path, tokenizer_folder: str) -> None:
    pictures = foreign(tmp_path / "f")
    before = [(tmp_path / "f" / n).read_bytes() for n in ("00000.tar", "00001.tar")]
    make_index(str(tmp_path / "f"), IndexOptions(tokenizer_folder))
    index = ShardIndex(str(tmp_path / "f"))
    assert [index.key(s) for s in range(6)] == list(pictures)
    for sample, (key, data) in enumerate(pictures.items()):
        parts = index.parts(sample)
        assert isinstance(parts[0], MediaPart) and parts[0].modality == "image"
        assert parts[1:] == [TextPart(f"one two {key}")]
        assert index.read_media(sample, parts, [0])[0].data == data
    assert [(tmp_path / "f" / n).read_bytes() for n in ("00000.tar", "00001.tar")] == before


def test_an_ending_can_be_given_a_kind_and_folders_are_part_of_keys(tmp_path: Path, tokenizer_folder: str) -> None:
    tar(
        tmp_path / "f" / "0.tar", {"a/x.left.dat": png(1), "a/x.txt": b"one", "b/x.left.dat": png(2), "b/x.txt": b"two"}
    )
    make_index(str(tmp_path / "f"), IndexOptions(tokenizer_folder, {"dat": "image"}))
    index = ShardIndex(str(tmp_path / "f"))
    assert [index.key(s) for s in range(2)] == ["a/x", "b/x"]
    parts = index.parts(1)
    assert [type(p) for p in parts] == [MediaPart, TextPart] and index.kinds_used() == {"image"}
    assert index.read_media(1, parts, [0])[0].data == png(2)


def test_bad_samples_of_the_same_key_are_counted_apart(
    tmp_path: Path, tokenizer_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # Many data sets number the samples of each shard from 0.
    for shard in range(2):
        good = {f"{n}.txt": b"one" for n in range(1, 4)}
        tar(tmp_path / "f" / f"{shard}.tar", {"0.jpg": b"broken", "0.txt": b"one", **good})
    with pytest.raises(DataError, match="2 of 8"):
        make_index(str(tmp_path / "f"), IndexOptions(tokenizer_folder), max_bad_share=0.2)
    make_index(str(tmp_path / "f"), IndexOptions(tokenizer_folder), max_bad_share=0.25)
    assert "2 left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("members", "expected_message"),
    [
        ({"k.txt": b" \n"}, "empty"),
        ({"k.txt": b"\xff\xfe"}, "UTF-8"),
        ({"k.jpg": jpeg(0)}, "neither"),
        ({"k.json": b'{"parts": [{"media": "0.png", "modality": "image"}, {"text": "a"}]}'}, "'0.png'"),
        (
            {"k.json": b'{"parts": [{"media": "0.png", "modality": "smell"}, {"text": "a"}]}', "k.0.png": png(0)},
            "smell",
        ),
        ({"k.json": b'{"parts": '}, "JSON"),
    ],
)
def test_unusable_samples_say_why(
    tmp_path: Path, tokenizer_folder: str, members: dict[str, bytes], expected_message: str
) -> None:
    tar(tmp_path / "f" / "0.tar", members)
    with pytest.raises(DataError) as error:
        make_index(str(tmp_path / "f"), IndexOptions(tokenizer_folder))
    assert "1 of 1" in str(error.value) and expected_message in str(error.value) and "'k'" in str(error.value)


def test_folders_without_shards_and_shards_that_are_none(tmp_path: Path, tokenizer_folder: str) -> None:
    with pytest.raises(DataError, match="no shard folder"):
        find_shards(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \.tar"):
        find_shards(str(tmp_path / "empty"))
    (tmp_path / "empty" / "x.tar").write_bytes(b"this is no tar file" * 100)
    with pytest.raises(DataError, match=r"'x\.tar'"):
        make_index(str(tmp_path / "empty"), IndexOptions(tokenizer_folder))


def test_a_cut_off_shard_is_refused(tmp_path: Path, tokenizer_folder: str) -> None:
    foreign(tmp_path / "f", 1)
    path = tmp_path / "f" / "00000.tar"
    path.write_bytes(path.read_bytes()[:1200])
    with pytest.raises(DataError, match=r"'00000\.tar'"):
        make_index(str(tmp_path / "f"), IndexOptions(tokenizer_folder))


@pytest.fixture
def shards(tmp_path: Path, tokenizer_folder: str) -> Path:
    """Twelve samples in two shards, with their index."""
    return Path(make_shards(tmp_path / "shards", tokenizer_folder, 12, ("image", "audio", "imu", "text")))


def test_opening_what_is_not_there(tmp_path: Path, shards: Path) -> None:
    with pytest.raises(DataError, match="no shard folder"):
        ShardIndex(str(tmp_path / "none"))
    shutil.rmtree(shards / "index")
    with pytest.raises(DataError, match="--index-only"):
        ShardIndex(str(shards))


def test_an_empty_index(tmp_path: Path, tokenizer_folder: str) -> None:
    tar(tmp_path / "f" / "0.tar", {})
    with pytest.raises(DataError, match="no sample of"):
        make_index(str(tmp_path / "f"), IndexOptions(tokenizer_folder))
    with pytest.raises(DataError, match="has no index"):
        ShardIndex(str(tmp_path / "f"))


def test_an_index_of_another_version_or_cut_off(shards: Path) -> None:
    path = shards / "index" / "index.json"
    body = json.loads(path.read_text())
    path.write_text(json.dumps({**body, "version": 99}))
    with pytest.raises(DataError, match="version 99"):
        ShardIndex(str(shards))
    path.write_text(json.dumps({**body, "samples": 13}))
    with pytest.raises(DataError, match="incomplete"):
        ShardIndex(str(shards))


def test_a_flipped_byte_names_the_sample(shards: Path) -> None:
    index = ShardIndex(str(shards))
    rows = index.samples
    for number, (start, name) in enumerate(
        [
            (int(rows[0]["text_offset"]), "image-00000"),
            (int(index.media[1]["offset"]), "audio-00001"),
        ]
    ):
        path = shards / index.header.shards[int(rows[number]["shard"])]
        data = bytearray(path.read_bytes())
        data[start] ^= 1
        path.write_bytes(bytes(data))
        with pytest.raises(DataError) as error:
            index.read_media(number, index.parts(number), [0])
        assert name in str(error.value) and path.name in str(error.value)
    # The other samples are not affected.
    assert index.read_media(2, index.parts(2), [0])[0].extension == "npy"


def test_missing_and_changed_shards(shards: Path, tokenizer_folder: str, tmp_path: Path) -> None:
    config = make_config(str(shards), tokenizer_folder, tmp_path / "run")
    index = ShardIndex(str(shards))
    path = shards / index.header.shards[1]
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(512))
    with pytest.raises(DataError, match=rf"{path.name}.*{len(whole) + 512} bytes.*{len(whole)}"):
        replica_data(config)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name}.*missing"):
        replica_data(config)
    with pytest.raises(DataError, match="cannot be read"):
        index.parts(11)
