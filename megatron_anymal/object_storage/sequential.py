"""An object that is read from its start to its end, with requests ahead of the reader."""

from __future__ import annotations

from concurrent.futures import Future

from megatron_anymal.object_storage.client import REQUEST_BYTES, ObjectClient

# Requests ahead of the reader, and chunks behind it that are kept: a reader of tar files goes back to the data of a
# member after it has seen the next header.
_AHEAD, _BEHIND = 4, 4


class SequentialBytes:
    """Random access to an object's bytes, fast for a reader that mostly moves forward.

    It holds at most 9 chunks of 8 MiB, more only while a longer range is read.

    Raises:
        StorageError: the object's size cannot be read; see ObjectClient.
    """

    def __init__(self, client: ObjectClient, path: str):
        self._client, self._path = client, path
        self.size = client.size(path)
        self._chunks: dict[int, Future[bytes]] = {}

    def read_at(self, offset: int, length: int) -> bytes:
        """The bytes [offset, offset + length), fewer if the object ends before.

        Raises:
            StorageError: see ObjectClient.cat_file.
        """
        stop = min(self.size, offset + length)
        if stop <= offset:
            return b""
        first, last = offset // REQUEST_BYTES, (stop - 1) // REQUEST_BYTES
        parts = []
        for number in range(first, last + 1):
            self._request_up_to(number)
            start = number * REQUEST_BYTES
            parts.append(self._chunks[number].result()[max(0, offset - start) : stop - start])
        self._forget(first - _BEHIND, last + _AHEAD)
        return b"".join(parts) if len(parts) > 1 else parts[0]

    def _request_up_to(self, number: int) -> None:
        last = (self.size - 1) // REQUEST_BYTES
        for wanted in range(number, min(number + _AHEAD, last) + 1):
            if wanted not in self._chunks:
                start = wanted * REQUEST_BYTES
                stop = min(self.size, start + REQUEST_BYTES)
                self._chunks[wanted] = self._client.submit(self._client.cat_file, self._path, start, stop)

    def _forget(self, first: int, last: int) -> None:
        for number in [n for n in self._chunks if not first <= n <= last]:
            del self._chunks[number]
