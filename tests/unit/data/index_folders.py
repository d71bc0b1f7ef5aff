"""Folders of shards that differ in everything an index depends on."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tars import header_of, tar_bytes, write_tar
from tiny import flac, npy, png

Members = list[tuple[str, bytes]]


def parts(*media: str, **more: Any) -> bytes:
    named = [{"media": name, **more} for name in media]
    return json.dumps({"parts": [*named, {"text": "what is this", "loss": False}, {"text": "one two"}]}).encode()


def pictures(first: int, last: int) -> Members:
    return [(f"{n}.{e}", png(n) if e == "png" else b"one two") for n in range(first, last) for e in ("png", "txt")]


def mixed(folder: Path) -> None:
    """Media in another order in each shard, several per sample, one twice in a sample; texts alone; an empty shard."""
    both = [("b.0.flac", flac(1)), ("b.1.PNG", png(1)), ("b.json", parts("1.png", "0.flac", "1.png"))]
    motion = [("m.npy", npy(2)), ("m.json", parts("npy", rate=50)), ("t.json", parts())]
    write_tar(folder / "a.tar", [*motion, *both])
    write_tar(folder / "b.tar", [*pictures(0, 3), ("é/k.0.flac", flac(3)), ("é/k.json", parts("0.flac"))])
    write_tar(folder / "c.tar", [])
    write_tar(folder / "d.tar", [("z.json", parts()), *both])


def with_metadata(folder: Path) -> None:
    """Like img2dataset's, with masks, hidden files and folders, so that some endings are ignored equally often."""
    for shard in range(3):
        members: Members = [(f"._{shard}.png", b"x")]
        for n in range(3):
            key = f"{shard}{n}"
            members += [(f"{key}.json", b'{"w": 8}'), (f"{key}.seg.png", png(n)), (f"{key}.png", png(n))]
            members += [(f"{key}.txt", b"one")] + [(f"{key}.cls", b"3")] * (n == 1)
        write_tar(folder / f"{shard}.tar", members)
    with tarfile.open(folder / "folders.tar", "w") as tar:
        info = tarfile.TarInfo("00")
        info.type = tarfile.DIRTYPE
        tar.addfile(info)


def recurring(folder: Path) -> None:
    """Keys that come back: of good samples, of a good and a bad one, of two bad ones; their kinds occur only there."""
    bad = ("1.txt", b"\xff")
    members = [
        *pictures(0, 3),
        ("r.flac", flac(1)),
        ("r.cls", b"3"),
        ("r.txt", b"one"),
        ("s.seg", b""),
        ("s.txt", b"a"),
    ]
    members += [*pictures(3, 5), bad, *pictures(0, 1), ("r.txt", b"one"), bad, ("x.txt", b""), ("y.txt", b"one")]
    # Ignored equally often; the sample with the first .cls is dropped.
    members += [
        ("u.png", png(5)),
        ("u.seg", b""),
        ("u.txt", b"one"),
        ("v.png", png(6)),
        ("v.cls", b""),
        ("v.txt", b"a"),
    ]
    write_tar(folder / "0.tar", [*members, ("x.txt", b"")])
    write_tar(folder / "1.tar", pictures(0, 4))


def damaged(folder: Path) -> None:
    """A damaged header, a media file that cannot be read after one that can, a truncated and an unreadable shard."""
    archive = tar_bytes([*pictures(0, 6), ("b.flac", flac(1)), ("b.png", b"broken"), ("b.txt", b"one")])
    folder.mkdir()
    at = header_of(archive, "3.png")
    (folder / "0.tar").write_bytes(archive[: at + 150] + b"9" + archive[at + 151 :])
    (folder / "1.tar").write_bytes(b"\x1f\x8b" + bytes(100))
    (folder / "2.tar").write_bytes(archive[:3000])
    write_tar(folder / "3.tar", pictures(6, 9))


def lost_media(folder: Path) -> None:
    """Only the last shard shows that samples of the others have lost their media; keys repeat in many shards."""
    for shard in range(6):
        write_tar(folder / f"{shard}.tar", [(f"{n}.txt", b"one") for n in range(shard + 1)])
    write_tar(folder / "6.tar", [*pictures(2, 4), ("4.json", parts()), ("1.txt", b"two")])
    write_tar(folder / "7.tar", pictures(3, 5))
    write_tar(folder / "8.tar", [("8.txt", b"one")])


def conversations(folder: Path) -> None:
    question = [{"role": "user", "content": [{"media": "png"}, {"text": "what is this"}]}]
    pair = {"messages": question, "chosen": "one", "rejected": "two three four"}
    conversation = {"messages": [*question, {"role": "assistant", "content": "five"}]}
    members: Members = []
    for n, value in enumerate((pair, conversation, {"messages": question})):
        members += [(f"{n}.png", png(n)), (f"{n}.json", json.dumps(value).encode())]
    write_tar(folder / "0.tar", members)


# Name -> how the folder is made, settings, and the codes in its ledger.
FOLDERS: dict[str, tuple[Callable[[Path], None], dict[str, Any], set[str]]] = {
    "mixed": (mixed, {}, {"repeated_key"}),
    "metadata": (with_metadata, {}, set()),
    "members": (with_metadata, {"members": ("png", "seg.png", "txt")}, set()),
    "recurring": (recurring, {"text_only": True}, {"duplicate_key", "repeated_key", "text", "media"}),
    "damaged": (damaged, {}, {"damaged", "torn", "media", "no_end", "unreadable", "repeated_key"}),
    "lost media": (lost_media, {}, {"no_media", "repeated_key"}),
    "text only": (lost_media, {"text_only": True}, {"repeated_key"}),
    "conversations": (conversations, {}, {"text"}),
    "attributes": (mixed, {"attributes": {"imu": {"rate": 50}}}, {"repeated_key"}),
}
