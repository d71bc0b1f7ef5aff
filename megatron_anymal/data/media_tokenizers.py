"""Tokenizers of media: from pictures and sounds to codes and back. A plug-in is a class with this interface.

`anymal prepare --encode NAME=SPEC` and `anymal generate --media-tokenizer NAME=SPEC` name one: the folder of a
HuggingFace model with a codebook (data/vq_folders.py), or `module:Class`, whose module Python can import and whose
class takes no arguments.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from megatron_anymal.data.records import DataError
from megatron_anymal.data.vq_folders import open_vq_folder


@runtime_checkable
class MediaTokenizer(Protocol):
    """Turns pictures or sounds into codes.

    Attributes:
        kind: of the media: image or audio.
        sampling_rate: of sounds, in Hz; 0 for pictures.
        codebooks: number of codes in each codebook.
        hash: identity of everything that decides the codes: letters, digits, - and _.
    """

    kind: str
    sampling_rate: int
    codebooks: tuple[int, ...]
    hash: str

    def encode(self, items: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Codes of media.

        Args:
            items: pictures, [height, width, 3] uint8 RGB, or sounds, [samples] float32 in -1 to 1, mono.

        Returns:
            For each item its codes, [codebooks, codes] integers.
        """

    def decode(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Media of codes: the inverse of `encode`, as close as the tokenizer comes.

        Args:
            codes: of each item, [codebooks, codes].

        Returns:
            Pictures, [height, width, 3] uint8, or sounds, [samples] float32.
        """


def open_tokenizer(name: str, spec: str, option: str = "--encode") -> MediaTokenizer:
    """Load the tokenizer of a section of `model.discrete`.

    Args:
        name: of the section, for messages.
        spec: a folder, or `module:Class`.
        option: that names it, for messages.

    Raises:
        DataError: it cannot be loaded or lacks a part of the interface.
    """
    if Path(spec).is_dir():
        return open_vq_folder(f"{option} {name}={spec}", Path(spec))
    module, _, attribute = spec.partition(":")
    try:
        tokenizer = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise DataError(f"{option} {name}={spec}: {error}. Name module:Class, with a module on PYTHONPATH.") from None
    if not isinstance(tokenizer, MediaTokenizer):
        needed = "kind, sampling_rate, codebooks, hash, encode and decode"
        raise DataError(f"{option} {name}={spec}: the class lacks a part of MediaTokenizer: {needed}.")
    return tokenizer


def specifications(given: Sequence[str], option: str = "--encode") -> dict[str, str]:
    """Name in model.discrete -> specification, from values NAME=TOKENIZER of an option; nothing is imported or loaded.

    Args:
        given: the values.
        option: for messages.

    Raises:
        DataError: a value has another form, names a section twice, or no tokenizer can have that name.
    """
    named: dict[str, str] = {}
    for text in given:
        name, _, spec = text.partition("=")
        if not name or not spec:
            raise DataError(f"{option} {text!r} is not of the form NAME=TOKENIZER, for example image=models/emu3-vq.")
        if name in named:
            raise DataError(f"{option} names {name!r} twice. Remove one.")
        _check_spec(f"{option} {name}={spec}", spec)
        named[name] = spec
    return named


def _check_spec(where: str, spec: str) -> None:
    """Refuse a specification that cannot name a tokenizer."""
    if Path(spec).is_dir():
        if not (Path(spec) / "config.json").is_file():
            raise DataError(f"{where}: the folder has no config.json. Name a HuggingFace model's folder.")
    elif ":" not in spec or "/" in spec:
        raise DataError(f"{where}: there is no such folder, and it is not of the form module:Class.")
