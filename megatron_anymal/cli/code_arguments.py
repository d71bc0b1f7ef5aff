"""Command-line arguments for media as codes: which an answer may have, how they are chosen, and their files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from megatron_anymal.config import ConfigError, DiscreteConfig
from megatron_anymal.data.discrete_vocabulary import TEXT
from megatron_anymal.generation.sampling import CodeSampling, Sampling

if TYPE_CHECKING:
    from megatron_anymal.data.item_files import ItemFiles
    from megatron_anymal.data.media_tokenizers import MediaTokenizer
    from megatron_anymal.generation.answers import Reply
    from megatron_anymal.generation.prompts import Prompt

_SETTINGS = {"temperature": float, "top_p": float, "top_k": int, "repetition_penalty": float}


def add_code_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that decide which codes an answer has."""
    group = parser.add_argument_group("media as codes (model.discrete)")
    group.add_argument(
        "--modalities",
        metavar="NAME,...",
        help="what answers may consist of: text and names in model.discrete; default: text and all of them",
    )
    group.add_argument(
        "--code-sampling",
        action="append",
        default=[],
        metavar="NAME:KEY=VALUE,...",
        help="temperature, top_p, top_k and repetition_penalty of one kind of media; may be repeated",
    )


def add_item_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that decide what becomes of the codes in an answer."""
    group = parser.add_argument_group("files of media as codes")
    group.add_argument(
        "--media-out",
        metavar="FOLDER",
        help="write the media items of answers into this folder, decoded by --media-tokenizer, else as codes",
    )
    group.add_argument(
        "--media-tokenizer",
        action="append",
        default=[],
        metavar="NAME=TOKENIZER",
        help="folder or module:Class that turns codes into media, and --media of this modality into codes",
    )
    group.add_argument(
        "--video",
        action="append",
        default=[],
        metavar="NAME=RATE",
        help="consecutive pictures of this name become one video at RATE frames per second",
    )


def with_codes(
    sampling: Sampling, arguments: argparse.Namespace, sections: Optional[Mapping[str, Mapping[str, Any]]]
) -> Sampling:
    """Add the settings for codes to those for text, before anything slow is imported.

    Args:
        sampling: for text.
        arguments: with those of `add_code_arguments`.
        sections: of the model's model.discrete; None if they are not known.

    Raises:
        ConfigError: a value out of range, or a kind of media that the model does not write.
    """
    codes = dict(_code_sampling(text) for text in arguments.code_sampling)
    modalities = (TEXT, *(sections or ()))
    if arguments.modalities is not None:
        modalities = tuple(dict.fromkeys(name.strip() for name in arguments.modalities.split(",") if name.strip()))
        if not modalities:
            raise ConfigError("--modalities names nothing. Name text, kinds of media in model.discrete, or both.")
    for option, names in (("--modalities", modalities), ("--code-sampling", tuple(codes))):
        known = (TEXT, *(sections or ())) if option == "--modalities" else tuple(sections or ())
        if sections is not None and (unknown := [name for name in names if name not in known]):
            raise ConfigError(
                f"{option}: {unknown[0]!r} is not in the model.discrete of this model, which can generate: "
                f"{', '.join((TEXT, *sections))}."
            )
    return replace(sampling, modalities=modalities, codes=codes)


def warn_of_length(sampling: Sampling, sections: Optional[Mapping[str, Mapping[str, Any]]]) -> None:
    """Print which kinds of media do not fit into an answer, and are therefore never begun."""
    for name in sampling.modalities:
        length = int((sections or {}).get(name, {}).get("codes_per_item", 0)) + 2
        if length > max(sampling.max_new_tokens, 2):
            print(
                f"warning: --max-new-tokens={sampling.max_new_tokens} is less than the {length} tokens of an item of "
                f"{name!r}, so that none is begun. Raise it.",
                file=sys.stderr,
            )


def _code_sampling(text: str) -> tuple[str, CodeSampling]:
    name, colon, pairs = text.partition(":")
    settings: dict[str, Any] = {}
    for pair in pairs.split(","):
        key, _, value = pair.partition("=")
        try:
            settings[key.strip()] = _SETTINGS[key.strip()](value)
        except (KeyError, ValueError):
            raise ConfigError(
                f"--code-sampling {text!r} is not of the form NAME:KEY=VALUE,... with the keys {', '.join(_SETTINGS)}, "
                "for example picture:temperature=1.0,top_p=0.7."
            ) from None
    if not name or not colon:
        raise ConfigError(f"--code-sampling {text!r} does not name a kind of media before the colon.")
    try:
        return name, CodeSampling(**settings)
    except ConfigError as error:
        raise ConfigError(f"--code-sampling {name}: {error}") from None


class ItemOutput:
    """What becomes of the codes in answers: files, or lines that show them."""

    def __init__(self, arguments: argparse.Namespace, sections: Optional[Mapping[str, Mapping[str, Any]]]):
        """Check the arguments; nothing is loaded or written.

        Args:
            arguments: with those of `add_item_arguments`.
            sections: of the model's model.discrete; None if they are not known.

        Raises:
            ConfigError, DataError: naming the argument and the fix.
        """
        self._specifications: dict[str, str] = {}
        if arguments.media_tokenizer:
            from megatron_anymal.data.media_tokenizers import specifications

            self._specifications = specifications(arguments.media_tokenizer, "--media-tokenizer")
        self._frame_rates = dict(map(_frame_rate, arguments.video))
        for option, names in (("--media-tokenizer", self._specifications), ("--video", self._frame_rates)):
            if sections is not None and (unknown := [name for name in names if name not in sections]):
                raise ConfigError(
                    f"{option}: {unknown[0]!r} is not in the model.discrete of this model, which has: "
                    f"{', '.join(sections) or 'none'}."
                )
        for name in self._frame_rates:
            if name not in self._specifications or not arguments.media_out:
                raise ConfigError(f"--video {name} needs --media-tokenizer {name}=TOKENIZER and --media-out FOLDER.")
        self.folder = Path(arguments.media_out) if arguments.media_out else None
        if self.folder and sections is not None and not sections:
            raise ConfigError("--media-out has no effect: the model writes text only (no model.discrete). Remove it.")
        if self.folder and self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"--media-out {arguments.media_out!r} is a file. Name a folder.")
        self.tokenizers: dict[str, MediaTokenizer] = {}
        self._files: Optional[ItemFiles] = None

    def encoded(self, prompt: Prompt) -> Prompt:
        """A prompt with media as codes if their modality has a tokenizer.

        Raises:
            DataError, MediaError: an item cannot be decoded or encoded.
        """
        from megatron_anymal.generation.prompts import encoded

        return encoded(prompt, self.tokenizers)

    @property
    def encodes(self) -> frozenset[str]:
        """Kinds of media that prompts may have as pictures or sounds."""
        return frozenset(self._specifications)

    def open(self, sections: Mapping[str, DiscreteConfig]) -> None:
        """Load the tokenizers and create the folder.

        Raises:
            DataError: a tokenizer cannot be loaded or is not the one of the model's codes.
        """
        from megatron_anymal.data.item_files import ItemFiles, check_tokenizer
        from megatron_anymal.data.media_tokenizers import open_tokenizer

        for name, spec in self._specifications.items():
            self.tokenizers[name] = open_tokenizer(name, spec, "--media-tokenizer")
            check_tokenizer(name, sections, self.tokenizers[name])
        if self.folder:
            self._files = ItemFiles(self.folder, sections, self.tokenizers, self._frame_rates)

    def parts(self, stem: str, reply: Reply) -> list[dict[str, Any]]:
        """The parts of an answer as JSON, its media written to files; without a folder, with their codes.

        Raises:
            DataError: codes cannot be decoded.
        """
        if self._files:
            parts = self._files.write(stem, reply.parts)
            assert self.folder is not None
            return [{**part, "media": str(self.folder / part["media"])} if "media" in part else part for part in parts]
        from megatron_anymal.generation.evaluation import described

        return described(reply)

    def lines(self, stem: str, reply: Reply) -> list[str]:
        """Lines that say what became of the media of an answer, which are written to files if there is a folder.

        Raises:
            DataError: codes cannot be decoded.
        """
        if not reply.items:
            return []
        parts = [part for part in self.parts(stem, reply) if "modality" in part]
        return [_line(part) for part in parts]


def _line(part: Mapping[str, Any]) -> str:
    name = part["modality"]
    if "codes" in part:
        codes = " | ".join(" ".join(map(str, book)) for book in part["codes"])
        return f"{name}: codes {codes} (--media-out FOLDER stores them)"
    if part["media"].endswith(".npy"):
        return f"{name}: {part['media']} (codes; --media-tokenizer {name}=TOKENIZER turns them into media)"
    return f"{name}: {part['media']}"


def _frame_rate(text: str) -> tuple[str, float]:
    name, _, rate = text.partition("=")
    try:
        value = float(rate)
    except ValueError:
        value = 0.0
    if not name or not 0 < value <= 1000:
        raise ConfigError(f"--video {text!r} is not of the form NAME=RATE, with a rate in frames per second.")
    return name, value
