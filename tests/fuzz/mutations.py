"""Non-malicious damage, as caused by disks, networks, interrupted writers and careless scripts."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable
from dataclasses import dataclass

from tars import BLOCK, changed_header, tar_bytes

Members = list[tuple[str, bytes]]
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


@dataclass(frozen=True)
class Damaged:
    """A mutated file, and the name of the mutation."""

    data: bytes
    how: str

    def zeroes_the_end(self, members: Members) -> bool:
        """Whether zeros replaced the shard's last members, which makes it indistinguishable from a shorter archive."""
        end = self.data.rstrip(b"\0")
        kept = end[: len(end) // BLOCK * BLOCK]
        archives = [tar_bytes(members, form) for form in FORMATS]
        return any(len(self.data) == len(archive) and archive.startswith(kept) for archive in archives)


def flip(rng: random.Random, data: bytes) -> bytes:
    """Flip one to eight random bits."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(rng: random.Random, data: bytes) -> bytes:
    """Cut off the end."""
    return data[: rng.randrange(len(data))]


def hole(rng: random.Random, data: bytes) -> bytes:
    """Zero a range, as a file system does for blocks that never reached the disk."""
    start, size = rng.randrange(len(data)), rng.choice([1, 64, 512, 4096])
    return data[:start] + bytes(min(size, len(data) - start)) + data[start + size :]


def overwrite(rng: random.Random, data: bytes) -> bytes:
    """Overwrite a range with random bytes."""
    start, size = rng.randrange(len(data)), rng.choice([4, 64, 512, 4096])
    return data[:start] + rng.randbytes(min(size, len(data) - start)) + data[start + size :]


def remove(rng: random.Random, data: bytes) -> bytes:
    """Remove a range."""
    start, size = rng.randrange(len(data)), rng.choice([1, 16, 512, 1000])
    return data[:start] + data[start + size :]


def insert(rng: random.Random, data: bytes) -> bytes:
    """Insert random bytes."""
    start, size = rng.randrange(len(data)), rng.choice([1, 16, 512])
    return data[:start] + rng.randbytes(size) + data[start:]


def repeat(rng: random.Random, data: bytes) -> bytes:
    """Repeat a range, as after a retried write."""
    start, size = rng.randrange(len(data)), rng.choice([16, 512, 2048])
    return data[: start + size] + data[start:]


ANY_FILE: tuple[Callable[[random.Random, bytes], bytes], ...] = (flip, cut, hole, overwrite, remove, insert, repeat)


def damage(rng: random.Random, data: bytes) -> Damaged:
    """Apply a random mutation that can happen to any file."""
    mutation = rng.choice(ANY_FILE)
    return Damaged(mutation(rng, data), mutation.__name__)


_FIELDS = {
    "name": (0, 100),
    "mode": (100, 8),
    "size": (124, 12),
    "checksum": (148, 8),
    "type": (156, 1),
    "magic": (257, 8),
}


def damage_shard(rng: random.Random, members: Members) -> Damaged:
    """Build a shard of these members with an error in its bytes, headers or member order."""
    form = rng.choice(FORMATS)
    kind = rng.choice(
        ["bytes", "bytes", "header", "header", "order", "duplicate", "link", "joined", "ending", "missing"]
    )
    if kind == "bytes":
        damaged = damage(rng, tar_bytes(members, form))
        return Damaged(damaged.data, damaged.how)
    if kind == "header":
        name = rng.choice(members)[0]
        field = rng.choice(list(_FIELDS))
        at, size = _FIELDS[field]
        value = rng.choice([bytes(size), b"7" * size, b"\xff" * size, rng.randbytes(size), b" " * size])
        fixed = rng.random() < 0.5 and field != "checksum"
        return Damaged(changed_header(tar_bytes(members, form), name, at, value, checksum=fixed), f"header {field}")
    changed = list(members)
    at = rng.randrange(len(changed))
    if kind == "order":
        changed.insert(rng.randrange(len(changed)), changed.pop(at))
    elif kind == "duplicate":
        changed.insert(rng.randrange(len(changed) + 1), changed[at])
    elif kind == "missing":
        changed.pop(at)
    elif kind == "ending":
        name, data = changed[at]
        changed[at] = (name + rng.choice([".bak", ".PNG", "x", ".1.png"]), data)
    elif kind == "joined":
        half = at // 2 * 2
        return Damaged(tar_bytes(changed[:half], form) + tar_bytes(changed[half:], form), kind)
    if kind != "link":
        return Damaged(tar_bytes(changed, form), kind)
    return Damaged(_with_link(rng, changed, at, form), kind)


def _with_link(rng: random.Random, members: Members, at: int, form: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for number, (name, data) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if number == at:
                info.type, info.linkname, info.size = rng.choice([tarfile.LNKTYPE, tarfile.SYMTYPE]), members[0][0], 0
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()
