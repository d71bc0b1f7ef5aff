"""From prompts of text and media to what an exported model takes, and from its answers to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Optional, Union

import torch
from torch import Tensor
from transformers import ProcessorMixin
from transformers.feature_extraction_utils import BatchFeature

from megatron_anymal.data.asking import MediaFile, PromptReader, TokenizedPrompt, open_parts
from megatron_anymal.data.messages import END_TURN
from megatron_anymal.data.tokenize import Tokenizer
from megatron_anymal.data.types import DataError, MediaPart, Part, TextPart
from megatron_anymal.hf.configuration_anymal import modality_config
from megatron_anymal.hf.given_media import GivenMedia
from megatron_anymal.modalities import Modality, build_modality


class AnyMALInputs(BatchFeature):
    """input_ids and attention_mask [B, T], and `media`: a modality's name -> pieces [n, *piece_shape]."""

    def to(self, *arguments: Any, **kwargs: Any) -> AnyMALInputs:
        """As a tensor's `to`; only pieces change their type."""
        device = torch._C._nn._parse_to(*arguments, **kwargs)[0]
        for name, value in self.data.items():
            if isinstance(value, Tensor):
                self.data[name] = value if device is None else value.to(device)
            else:
                self.data[name] = {key: pieces.to(*arguments, **kwargs) for key, pieces in value.items()}
        return self


class AnyMALProcessor(ProcessorMixin):
    """Prompts to a model's inputs, by the trainer's own reading of media and layout of documents.

    Args:
        tokenizer: the model's.
        modalities: the sections of its configuration, see AnyMALConfig.
    """

    attributes = ["tokenizer"]  # noqa: RUF012  (transformers 4 declares it)
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer: Any = None,
        modalities: Optional[Mapping[str, Mapping[str, Any]]] = None,
        chat_template: Optional[str] = None,
        **kwargs: Any,
    ):
        self.modalities = {name: dict(section) for name, section in (modalities or {}).items()}
        super().__init__(tokenizer, chat_template=chat_template)

    def __call__(
        self,
        prompts: Union[Mapping[str, Any], Sequence[Mapping[str, Any]], None] = None,
        *,
        text: Union[str, Sequence[str], None] = None,
        media: Optional[Sequence[Any]] = None,
        return_tensors: str = "pt",
    ) -> AnyMALInputs:
        """Read one prompt or several.

        A media item is a path, a URL, a file's bytes, an open file, a PIL image or an array; where that does not say
        what it is, its object has a `modality`. A waveform needs `sampling_rate`, an IMU signal `rate`, in Hz.

        Args:
            prompts: each {"parts": [...]} or {"messages": [...]}, of {"text": TEXT} and {"media": ITEM, "modality":
                KIND, ...}; messages end with the user turn to be answered.
            text, media: instead of them: media in order, then the text. Several prompts: a list of texts and one of
                lists of media. An item with attributes is such an object as in `prompts`.

        Returns:
            Tensors, padded on the left.

        Raises:
            DataError, MediaError: a prompt or media item that cannot be used; the message says which and why.
            ImportError: a library that this kind of media needs is missing.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r}: this processor gives torch tensors, 'pt'.")
        if (prompts is None) == (text is None and media is None):
            raise ValueError("Give either prompts, or text and media.")
        if prompts is not None:
            listed = [prompts] if isinstance(prompts, Mapping) else list(prompts)
            read = [self._read_json(prompt, f"prompt {number}") for number, prompt in enumerate(listed)]
        else:
            read = [self._read_text_and_media(*pair) for pair in _pairs(text, media)]
        return self._batch(read)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: Optional[str] = None,
        *,
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        return_dict: bool = True,
        return_tensors: str = "pt",
    ) -> AnyMALInputs:
        """Read one conversation (a list of messages) or several, up to where the assistant answers.

        The content of a message is a text, or parts {"type": "text", "text": TEXT} and {"type": KIND, KIND | "path" |
        "url" | "media": ITEM, ...}, or parts as in `__call__`. The layout is the one of training, always.

        Raises:
            ValueError: an argument that asks for anything else than tensors of an open conversation.
            DataError, MediaError, ImportError: as `__call__`.
        """
        if chat_template is not None or not (add_generation_prompt and tokenize and return_dict):
            raise ValueError(
                "This processor gives tensors of conversations in the layout of training, up to the assistant's turn: "
                "leave chat_template away; add_generation_prompt, tokenize and return_dict are true."
            )
        several = bool(conversation) and not isinstance(conversation[0], Mapping)
        conversations = conversation if several else [conversation]
        return self([{"messages": list(messages)} for messages in conversations], return_tensors=return_tensors)

    def answers(self, output_ids: Tensor, inputs: Mapping[str, Any]) -> list[str]:
        """The texts that were generated after the prompts, without special tokens and white space at their ends.

        Args:
            output_ids: [rows, T + new tokens], what `generate` returned.
            inputs: what it was given.
        """
        new = output_ids[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._tokenizer.decode(self._until_end(tokens)).strip() for tokens in new]

    def batch_decode(self, *arguments: Any, **kwargs: Any) -> list[str]:
        """The tokenizer's."""
        return self.tokenizer.batch_decode(*arguments, **kwargs)

    def decode(self, *arguments: Any, **kwargs: Any) -> Any:
        """The tokenizer's."""
        return self.tokenizer.decode(*arguments, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """What `__call__` returns."""
        return ["input_ids", "attention_mask", "media"]

    def to_dict(self, *arguments: Any, **kwargs: Any) -> dict[str, Any]:
        """As transformers'; the tokenizer keeps its own files."""
        kept: dict[str, Any] = {
            name: self.__dict__.pop(name) for name in ("_tokenizer", "_reader") if name in self.__dict__
        }
        out = super().to_dict(*arguments, **kwargs)
        self.__dict__.update(kept)
        return out

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.of(self.tokenizer)

    @cached_property
    def _reader(self) -> PromptReader:
        sections = {name: modality_config(section) for name, section in self.modalities.items()}
        modalities: dict[str, Modality] = {name: build_modality(name, section) for name, section in sections.items()}
        return PromptReader(self._tokenizer, sections, modalities)

    def _read_json(self, prompt: Any, where: str) -> TokenizedPrompt:
        if not isinstance(prompt, Mapping):
            raise DataError(f"{where}: a prompt is an object with `parts` or `messages`, not {type(prompt).__name__}.")
        given = GivenMedia(where)
        value = dict(prompt)
        if isinstance(value.get("parts"), (list, tuple)):
            value["parts"] = [given.part(entry) for entry in value["parts"]]
        if isinstance(value.get("messages"), (list, tuple)):
            value["messages"] = [given.message(entry) for entry in value["messages"]]
        parts = open_parts(value, where)
        return self._read(parts, given)

    def _read_text_and_media(self, text: str, media: Sequence[Any]) -> TokenizedPrompt:
        given = GivenMedia("media")
        parts: list[Part] = []
        for item in media:
            entry = given.part(item if isinstance(item, Mapping) else {"media": item})
            attributes = {key: value for key, value in entry.items() if key not in ("media", "modality")}
            parts.append(MediaPart(entry["media"], entry.get("modality", ""), attributes))
        if text:
            parts.append(TextPart(text))
        if not parts:
            raise DataError("There is nothing to answer. Give text or media.")
        return self._read(parts, given)

    def _read(self, parts: Sequence[Part], given: GivenMedia) -> TokenizedPrompt:
        files: list[MediaFile] = [given.files[part.media] for part in parts if isinstance(part, MediaPart)]
        return self._reader.read(parts, files)

    def _batch(self, prompts: Sequence[TokenizedPrompt]) -> AnyMALInputs:
        if not prompts:
            raise DataError("There are no prompts.")
        length = max(len(prompt.tokens) for prompt in prompts)
        # Masked, so any id does that stands for no media.
        pad = self._tokenizer.end
        ids = [[pad] * (length - len(prompt.tokens)) + prompt.tokens for prompt in prompts]
        mask = [[0] * (length - len(prompt.tokens)) + [1] * len(prompt.tokens) for prompt in prompts]
        pieces: dict[str, list[Tensor]] = {}
        for prompt in prompts:
            for name, tensor in prompt.pieces:
                pieces.setdefault(name, []).append(tensor)
        data = {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.tensor(mask),
            "media": {name: torch.cat(tensors) for name, tensors in pieces.items()},
        }
        return AnyMALInputs(data)

    def _until_end(self, tokens: list[int]) -> list[int]:
        ends = {self._tokenizer.end, self.tokenizer.get_vocab().get(END_TURN, self._tokenizer.end)}
        return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]


def _pairs(text: Any, media: Any) -> list[tuple[str, Sequence[Any]]]:
    """Texts and their media; one prompt, or as many as there are texts."""
    if text is None or isinstance(text, str):
        return [(text or "", media or [])]
    every = [[] for _ in text] if media is None else list(media)
    if len(every) != len(text) or not all(isinstance(items, (list, tuple)) for items in every):
        raise DataError(f"{len(text)} texts need as many lists of media, one for each (it may be empty).")
    return list(zip(text, every))
