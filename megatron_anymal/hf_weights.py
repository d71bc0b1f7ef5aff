"""The weights of a HuggingFace folder, in one safetensors file or several."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Optional

from torch import Tensor

from megatron_anymal.safetensors_io import SafetensorsFile, TensorEntry, TensorFileError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Copies of the weights in another dtype: model.fp16.safetensors, model.fp16-00001-of-00002.safetensors or
# model-00001-of-00002.fp16.safetensors.
_VARIANT = re.compile(r"model(-\d+-of-\d+)?\.[\w-]*?[A-Za-z][\w-]*\.safetensors")


class HFWeights(Mapping[str, Tensor]):
    """All weights of a HuggingFace folder, from one safetensors file or several with an index.

    Opening reads the headers only.

    Args:
        folder: holds `model.safetensors`, or `model.safetensors.index.json` and the files it names.

    Attributes:
        variants: names of files that hold the weights in another dtype; they are not read.

    Raises:
        TensorFileError: a file is missing or damaged, a tensor is in two files, index and files disagree, or the
            folder holds only other formats.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        index = self._read_index()
        names = {path.name for path in self.folder.glob("model*.safetensors")}
        self.variants = sorted(filter(_VARIANT.fullmatch, names))
        present = names - set(self.variants)
        expected = set(index.values()) if index is not None else {SINGLE}
        self._check_files(present, expected, index is not None)
        self.files = {name: SafetensorsFile(self.folder / name) for name in sorted(expected)}
        self._file_by_name: dict[str, SafetensorsFile] = {}
        for file in self.files.values():
            for name in file:
                if name in self._file_by_name:
                    raise TensorFileError(
                        f"{str(self.folder)!r}: the tensor {name!r} is in both {self.file_of(name)!r} and "
                        f"{file.path.name!r}. Download the folder again."
                    )
                self._file_by_name[name] = file
        for name, stated in (index or {}).items():
            if name not in self._file_by_name or self.file_of(name) != stated:
                raise TensorFileError(
                    f"{str(self.folder)!r}: {INDEX} lists the tensor {name!r} in {stated!r}, but it is not there. "
                    "Download the folder again."
                )
        for name in self._file_by_name:
            if index is not None and name not in index:
                raise TensorFileError(
                    f"{str(self.folder)!r}: the tensor {name!r} in {self.file_of(name)!r} is not in {INDEX}. Download "
                    "the folder again."
                )

    def entry(self, name: str) -> TensorEntry:
        """Dtype, shape and size of a tensor, without its data."""
        return self._file_by_name[name].entry(name)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor's values in order, as chunks [k] of some megabytes; raises TensorFileError."""
        return self._file_by_name[name].pieces(name)

    def read_into(self, name: str, offset: int, target: memoryview) -> None:
        """Fill `target` with a tensor's bytes, starting at its byte `offset`; raises TensorFileError."""
        self._file_by_name[name].read_into(name, offset, target)

    def file_of(self, name: str) -> str:
        """Name of the file that holds a tensor."""
        return self._file_by_name[name].path.name

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor, [*shape]; raises TensorFileError, or KeyError if there is no such tensor."""
        return self._file_by_name[name][name]

    def __contains__(self, name: object) -> bool:
        return name in self._file_by_name

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_by_name)

    def __len__(self) -> int:
        return len(self._file_by_name)

    def _read_index(self) -> Optional[dict[str, str]]:
        path = self.folder / INDEX
        if not path.is_file():
            return None
        try:
            index = dict(json.loads(path.read_text())["weight_map"])
            if not index or not all(isinstance(file, str) and Path(file).name == file for file in index.values()):
                raise ValueError("weight_map does not map tensors to files of this folder")
        except (ValueError, TypeError, KeyError) as error:
            raise TensorFileError(f"{str(path)!r} is damaged ({error!r}). Download it again.") from None
        return index

    def _check_files(self, present: set[str], expected: set[str], indexed: bool) -> None:
        where = repr(str(self.folder))
        if not present:
            if any(self.folder.glob("pytorch_model*.bin")):
                raise TensorFileError(
                    f"{where} holds its weights as pytorch_model*.bin only. Download them as safetensors, or load the "
                    "folder with transformers and save_pretrained it to another one."
                )
            if self.variants:
                raise TensorFileError(
                    f"{where} holds its weights as the variant {self.variants[0]!r} only. Download {SINGLE}, or load "
                    "the variant with transformers and save_pretrained it to another folder."
                )
            raise TensorFileError(f"{where} holds no {SINGLE}. Download the weights as safetensors.")
        if not indexed and present != {SINGLE}:
            raise TensorFileError(
                f"{where} holds {min(present - {SINGLE})!r} and no {INDEX}. Download the folder again."
            )
        if missing := sorted(expected - present):
            raise TensorFileError(
                f"{where} lacks {len(missing)} of {len(expected)} files listed in {INDEX}: {', '.join(missing)}. "
                "Download them."
            )
        if extra := sorted(present - expected):
            raise TensorFileError(f"{where}: {extra[0]!r} is not in {INDEX}. Remove it, or download the folder again.")
