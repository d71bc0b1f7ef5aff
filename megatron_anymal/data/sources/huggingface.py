"""Data sets of HuggingFace `datasets` on disk: a folder of save_to_disk, or .parquet files as on the Hub.

Columns get their roles from --column ROLE=NAME: `text`, or `question` and `answer`, or `messages`; `image`, `video`,
`audio`, `imu` for media (features Image and Audio with their bytes, binary columns, paths, or lists of these); `key`.
Media come before the text, unless `messages` has placeholders for them. The files are read with pyarrow alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from megatron_anymal.data.records import DataError
from megatron_anymal.data.shard_samples import SampleError
from megatron_anymal.data.source_records import Record, Source
from megatron_anymal.data.sources.conversations import KINDS, messages_of, turns_of
from megatron_anymal.data.sources.media_endings import ending_of
from megatron_anymal.data.sources.source_format import Peek, SourceFormat, SourceOptions, clean_key

if TYPE_CHECKING:
    import pyarrow

_MEDIA = (*KINDS, "imu")
_TEXTS = ("text", "question", "answer", "messages")
_ROLES = (*_TEXTS, *_MEDIA, "key")
# Rows that are converted at a time; media make them large.
_ROWS = 32


class HuggingFaceSource(Source):
    """The rows of a data set.

    Args:
        options: `path` is a folder or a .parquet file, `columns` the roles, `split` one of several.

    Raises:
        DataError: pyarrow is missing, the columns have no role or do not exist, or there is no such split.
    """

    def __init__(self, options: SourceOptions):
        super().__init__(str(options.path), options.media_folder)
        self._options, self._roles = options, dict(options.columns)
        self._files = _data_files(options)
        schema = _schema(self._files[0])
        _check_roles(self._roles, schema)
        self._columns = _columns_of(schema, set(self._roles.values()))

    def files(self) -> Sequence[Path]:
        """The files of rows."""
        return self._files

    def settings(self) -> Mapping[str, Any]:
        """The roles of columns, and the split."""
        return {"columns": self._roles, "split": self._options.split}

    def count(self) -> int:
        """Number of rows, from the files' metadata.

        Raises:
            DataError: a file cannot be read.
        """
        return sum(_rows_of(file) for file in self._files)

    def records(self) -> Iterator[Record]:
        """One sample per row.

        Raises:
            DataError: a file cannot be read.
        """
        number = 0
        for file in self._files:
            for batch in _batches(file, self._columns):
                for row in batch.to_pylist():
                    number += 1
                    yield self._record(f"{file.name}: row {number - 1}", number, row)

    def _record(self, where: str, number: int, row: Mapping[str, Any]) -> Record:
        stated = row[self._roles["key"]] if "key" in self._roles else None
        key = clean_key(number, stated)
        columns = {name: value for name, value in row.items() if isinstance(value, (str, int, float))}
        try:
            media, contents = self._media(row)
            return Record(where, number, self._value(row, media), key, columns, contents)
        except SampleError as error:
            return Record(where, number, key=key, wrong=error)

    def _media(self, row: Mapping[str, Any]) -> tuple[dict[str, list[str]], dict[str, Any]]:
        """Kind -> names of its media; name -> content of those that are not files."""
        names: dict[str, list[str]] = {}
        contents: dict[str, Any] = {}
        for kind in (role for role in self._roles if role in _MEDIA):
            value = row[self._roles[kind]]
            items = value if isinstance(value, list) else [value]
            names[kind] = []
            for item in items:
                if item is None:
                    raise SampleError("missing_media", f"its column {self._roles[kind]!r} is empty.")
                name, data = _content(item, len(contents), self._roles[kind])
                names[kind].append(name)
                if data is not None:
                    contents[name] = lambda data=data: data
        return names, contents

    def _value(self, row: Mapping[str, Any], media: Mapping[str, list[str]]) -> dict[str, Any]:
        if "messages" in self._roles:
            return {"messages": messages_of(turns_of(row[self._roles["messages"]]), media)}
        parts = [{"media": name, "modality": kind} for kind, names in media.items() for name in names]
        texts = {role: row[self._roles[role]] for role in _TEXTS if role in self._roles}
        for role, text in texts.items():
            if not isinstance(text, str) or not text.strip():
                raise SampleError("text", f"its column {self._roles[role]!r} has no text.")
        if "text" in texts:
            return {"parts": [*parts, {"text": texts["text"].strip()}]}
        question = {"role": "user", "content": [*parts, {"text": texts["question"]}]}
        return {"messages": [question, {"role": "assistant", "content": texts["answer"]}]}


def _content(item: Any, number: int, column: str) -> tuple[str, bytes | None]:
    """Name and bytes of a media item; its path and None if it is a file."""
    data = item.get("bytes") if isinstance(item, dict) else item
    path = item.get("path") if isinstance(item, dict) else None
    if isinstance(data, (bytes, bytearray)):
        return f"media{number}.{ending_of(bytes(data), path or '')}", bytes(data)
    if isinstance(data, str) or path:
        return data if isinstance(data, str) else str(path), None
    raise SampleError("missing_media", f"its column {column!r} has neither bytes nor a path.")


def _check_roles(roles: Mapping[str, str], schema: pyarrow.Schema) -> None:
    known = ", ".join(f"{field.name} ({str(field.type)[:40]})" for field in schema)
    for role, name in roles.items():
        if role not in _ROLES:
            raise DataError(f"--column {role}={name}: huggingface has the roles {', '.join(_ROLES)}.")
        if name not in schema.names:
            raise DataError(f"--column {role}={name}: there is no column {name!r}. Columns: {known}.")
    texts = {role for role in roles if role in _TEXTS}
    if texts not in ({"text"}, {"question", "answer"}, {"messages"}):
        raise DataError(
            "--from huggingface needs the columns of the text: --column text=NAME, or question=NAME and answer=NAME, "
            f"or messages=NAME; and of the media, for example --column image=NAME. Columns: {known}."
        )


def _data_files(options: SourceOptions) -> list[Path]:
    """The files of rows, in order."""
    path, split = options.path, options.split
    if path.is_file():
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text()).get("splits", [])
        if split not in splits:
            raise DataError(f"{str(path)!r} has the splits {', '.join(splits)}: choose one with --split.")
        path = path / str(split)
    if (path / "state.json").is_file():
        state = json.loads((path / "state.json").read_text())
        return [path / file["filename"] for file in state["_data_files"]]
    files = sorted(path.rglob("*.parquet"))
    splits = sorted({file.name.partition("-")[0].removesuffix(".parquet") for file in files})
    chosen = [file for file in files if split is None or file.name.partition("-")[0].removesuffix(".parquet") == split]
    if not chosen or (split is None and len(splits) > 1):
        raise DataError(f"{str(path)!r} has .parquet files of {', '.join(splits) or 'no split'}: choose with --split.")
    return chosen


def _pyarrow() -> Any:
    try:
        import pyarrow.ipc
        import pyarrow.parquet
        import pyarrow.types
    except ImportError:
        raise DataError(
            "--from huggingface needs pyarrow. Install it: pip install 'megatron-anymal[huggingface]'."
        ) from None
    return pyarrow


def _open(file: Path) -> Union[pyarrow.parquet.ParquetFile, pyarrow.RecordBatchReader]:
    arrow = _pyarrow()
    try:
        if file.suffix == ".parquet":
            return arrow.parquet.ParquetFile(file)
        return arrow.ipc.open_stream(arrow.memory_map(str(file)))
    except (OSError, arrow.ArrowInvalid) as error:
        raise DataError(f"{file}: cannot be read ({' '.join(str(error).split())}).") from None


def _schema(file: Path) -> pyarrow.Schema:
    opened = _open(file)
    return opened.schema_arrow if file.suffix == ".parquet" else opened.schema


def _rows_of(file: Path) -> int:
    opened = _open(file)
    return opened.metadata.num_rows if file.suffix == ".parquet" else sum(batch.num_rows for batch in opened)


def _columns_of(schema: pyarrow.Schema, used: set[str]) -> list[str]:
    """The columns to read: those with a role, and numbers and texts, which filters may name."""
    types = _pyarrow().types
    simple = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return [field.name for field in schema if field.name in used or any(is_one(field.type) for is_one in simple)]


def _batches(file: Path, columns: list[str]) -> Iterator[pyarrow.RecordBatch]:
    opened = _open(file)
    for batch in opened.iter_batches(_ROWS, columns=columns) if file.suffix == ".parquet" else opened:
        for start in range(0, batch.num_rows, _ROWS):
            yield batch.select(columns).slice(start, _ROWS)


def _recognizes(peek: Peek) -> bool:
    if peek.path.suffix in (".parquet", ".arrow"):
        return True
    saved = {"state.json", "dataset_dict.json"} & peek.names
    return bool(saved) or (any(peek.path.rglob("*.parquet")) and not peek.has(".tar"))


FORMAT = SourceFormat(
    "huggingface",
    "a folder of save_to_disk, or .parquet files",
    frozenset({"media", "column", "split"}),
    lambda peek: bool(peek.names or peek.start) and _recognizes(peek),
    HuggingFaceSource,
)
