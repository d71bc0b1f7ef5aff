"""Processor of an exported model: converts prompts of text and media to inputs, and generated ids to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Optional, Union

from torch import Tensor
from transformers import ProcessorMixin

from megatron_anymal.data.chat_format import END_TURN, lay_out, parse_messages
from megatron_anymal.data.code_grammar import CodeGrammar, CodeItem
from megatron_anymal.data.codes import CodeLayout
from megatron_anymal.data.item_files import ItemFiles
from megatron_anymal.data.media_tokenizers import open_tokenizer
from megatron_anymal.data.prompt_encoder import PromptReader, TokenizedPrompt, open_parts
from megatron_anymal.data.records import DataError, MediaPart, Part, TextPart
from megatron_anymal.data.tokenizer import Tokenizer
from megatron_anymal.hf.configuration_anymal import modality_config
from megatron_anymal.hf.inputs import AnyMALInputs, batch_of
from megatron_anymal.hf.media_inputs import GivenMedia, given_by_kind
from megatron_anymal.hf.rendered import is_rendered, parts_of, render, without_items
from megatron_anymal.modalities import Modality, build_modality


class AnyMALProcessor(ProcessorMixin):
    """Converts prompts to model inputs, with the same media reading and document layout as in training.

    Args:
        tokenizer: tokenizer of the model.
        modalities: the modality sections of its configuration, see AnyMALConfig.
        discrete: media as codes, see AnyMALConfig.
    """

    attributes = ["tokenizer"]  # noqa: RUF012  (transformers 4 declares it)
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer: Any = None,
        modalities: Optional[Mapping[str, Mapping[str, Any]]] = None,
        discrete: Optional[Mapping[str, Any]] = None,
        chat_template: Optional[str] = None,
        **kwargs: Any,
    ):
        self.modalities = {name: dict(section) for name, section in (modalities or {}).items()}
        self.discrete = dict(discrete or {})
        super().__init__(tokenizer, chat_template=chat_template)

    def __call__(
        self,
        prompts: Union[Mapping[str, Any], Sequence[Mapping[str, Any]], None] = None,
        *,
        text: Union[str, Sequence[str], None] = None,
        images: Any = None,
        audio: Any = None,
        videos: Any = None,
        media: Optional[Sequence[Any]] = None,
        sampling_rate: Optional[int] = None,
        padding: Union[bool, str] = True,
        max_length: Optional[int] = None,
        return_tensors: Optional[str] = "pt",
    ) -> AnyMALInputs:
        """Convert one prompt or several to model inputs.

        A media item is a path, a URL, a file's bytes, an open file, a PIL image or an array; if that does not determine
        its kind, its object needs a `modality`. A waveform needs `sampling_rate`, an IMU signal `rate`, in Hz.

        Args:
            prompts: each {"parts": [...]} or {"messages": [...]}, of {"text": TEXT} and {"media": ITEM, "modality":
                KIND, ...}; messages end with the user turn to answer.
            text: one text or several, instead of `prompts`. The placeholders of a conversation rendered by
                `apply_chat_template(tokenize=False)` are replaced by the items of their kinds, in order. Any other text
                is literal, and its media precede it.
            images: one item or a list; for several texts, one item or list per text. An item with attributes is an
                object as in `prompts`.
            audio: likewise.
            videos: likewise.
            media: likewise, of any kind.
            sampling_rate: sampling rate of waveforms in `audio`, in Hz.
            padding: True or "longest"; "max_length", to `max_length` tokens; or False. Padding is on the left.
            max_length: tokens, for padding="max_length".
            return_tensors: "pt", "np", or None for lists of ids (pieces stay tensors).

        Returns:
            `input_ids` and `attention_mask`, [B, T], and `media`.

        Raises:
            DataError, MediaError: a prompt or media item cannot be used; the message gives which and why.
            ValueError: incompatible arguments.
            ImportError: a library for this kind of media is missing.
        """
        given = given_by_kind(text, images=images, audio=audio, videos=videos, media=media, sampling_rate=sampling_rate)
        if (prompts is None) == (text is None and not any(given)):
            raise ValueError("Give either prompts, or text and media.")
        if prompts is not None:
            listed = [prompts] if isinstance(prompts, Mapping) else list(prompts)
            read = [self._read_json(prompt, f"prompt {number}") for number, prompt in enumerate(listed)]
        else:
            texts = [text or ""] if text is None or isinstance(text, str) else list(text)
            read = [self._read_text(*pair) for pair in zip(texts, given)]
        return batch_of(read, self._tokenizer.end, padding, max_length, return_tensors)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: Optional[str] = None,
        *,
        add_generation_prompt: Optional[bool] = None,
        continue_final_message: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
        padding: Union[bool, str] = True,
        max_length: Optional[int] = None,
        return_tensors: Optional[str] = "pt",
        processor_kwargs: Optional[Mapping[str, Any]] = None,
    ) -> Any:
        """Lay out one conversation (a list of messages) or several.

        The content of a message is a text, or parts {"type": "text", "text": TEXT} and {"type": KIND, KIND | "path" |
        "url" | "media": ITEM, ...}, or parts as in `__call__`. The layout is always the one used in training.

        Args:
            add_generation_prompt: end with the header of the assistant's turn. Default: true unless
                `continue_final_message` is set.
            continue_final_message: leave the last turn open for the model to continue.
            tokenize: return inputs like `__call__`; false: return a string in which placeholders represent media items.
            return_dict: false: return only the ids.
            padding: see `__call__`.
            max_length: see `__call__`.
            return_tensors: see `__call__`.
            processor_kwargs: the last three may be passed in this instead.

        Raises:
            ValueError: a different chat template, or both kinds of open turns at once.
            DataError, MediaError, ImportError: see `__call__`.
        """
        if chat_template is not None:
            raise ValueError("This processor lays conversations out as in training. Remove chat_template.")
        ask = not continue_final_message if add_generation_prompt is None else add_generation_prompt
        if ask and continue_final_message:
            raise ValueError("add_generation_prompt opens a new turn, continue_final_message the last one: set one.")
        several = bool(conversation) and not isinstance(conversation[0], Mapping)
        conversations = [list(messages) for messages in (conversation if several else [conversation])]
        where = [f"conversation {number}" for number in range(len(conversations))]
        if not tokenize:
            texts = []
            for messages, name in zip(conversations, where):
                parts = _laid_out([without_items(one) for one in messages], name, ask, continue_final_message)
                texts.append(render(parts, self._placeholders, self._tokenizer.control))
            return texts if several else texts[0]
        read = []
        for messages, name in zip(conversations, where):
            given = GivenMedia(name)
            parts = _laid_out([given.message(one) for one in messages], name, ask, continue_final_message)
            read.append(self._read(parts, given))
        settings = {"padding": padding, "max_length": max_length, "return_tensors": return_tensors}
        inputs = batch_of(read, self._tokenizer.end, **{**settings, **(processor_kwargs or {})})
        return inputs if return_dict else inputs["input_ids"]

    def answers(self, output_ids: Tensor, inputs: Mapping[str, Any]) -> list[str]:
        """Decode the generated texts, without the prompts, special tokens and surrounding white space.

        Args:
            output_ids: [rows, T + new tokens], the result of `generate`.
            inputs: the inputs of `generate`.
        """
        new = output_ids[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._tokenizer.decode(self._until_end(tokens)).strip() for tokens in new]

    def parts(self, output_ids: Tensor, inputs: Mapping[str, Any]) -> list[list[Union[str, CodeItem]]]:
        """Take generated answers apart into texts and media, in order.

        Args:
            output_ids: [rows, T + new tokens], the result of `generate`.
            inputs: the inputs of `generate`.

        Returns:
            For each row, texts and items with `name` and `codes` [codebooks, codes].

        Raises:
            ValueError: the codes of an answer break the grammar, which those of this model's `generate` do not.
        """
        grammar = CodeGrammar(CodeLayout.of_export(self.discrete))
        new = output_ids[:, inputs["input_ids"].shape[1] :].tolist()
        answers = [grammar.parts(self._until_end(tokens)) for tokens in new]
        return [[self._tokenizer.decode(one) if isinstance(one, list) else one for one in parts] for parts in answers]

    def save_media(
        self,
        parts: Sequence[Union[str, CodeItem]],
        folder: str,
        tokenizers: Optional[Mapping[str, str]] = None,
        *,
        stem: str = "0",
        frame_rates: Optional[Mapping[str, float]] = None,
    ) -> list[dict[str, Any]]:
        """Write the media of one answer to files: PNG, WAV or MP4, or their codes as .npy.

        Args:
            parts: a row of `parts`.
            folder: where the files go.
            tokenizers: kind of media -> folder of its tokenizer, or module:Class. Items of other kinds stay codes.
            stem: beginning of the files' names.
            frame_rates: kind of media -> frames per second: consecutive pictures are one video.

        Returns:
            {"text": TEXT} or {"media": FILE, "modality": KIND}, in order.

        Raises:
            DataError: a tokenizer cannot be loaded, or is not the one of the model's codes.
        """
        opened = {name: open_tokenizer(name, spec, "tokenizers") for name, spec in (tokenizers or {}).items()}
        sections = CodeLayout.of_export(self.discrete).sections
        return ItemFiles(Path(folder), sections, opened, frame_rates).write(stem, parts)

    def batch_decode(self, *arguments: Any, **kwargs: Any) -> list[str]:
        """Call `batch_decode` of the tokenizer."""
        return self.tokenizer.batch_decode(*arguments, **kwargs)

    def decode(self, *arguments: Any, **kwargs: Any) -> Any:
        """Call `decode` of the tokenizer."""
        return self.tokenizer.decode(*arguments, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the inputs that `__call__` returns."""
        return ["input_ids", "attention_mask", "media"]

    def to_dict(self, *arguments: Any, **kwargs: Any) -> dict[str, Any]:
        """Serialize the processor without its tokenizer, which has its own files."""
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
        return PromptReader(self._tokenizer, sections, modalities, CodeLayout.of_export(self.discrete))

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

    def _read_text(self, text: str, media: Sequence[Mapping[str, Any]]) -> TokenizedPrompt:
        given = GivenMedia("media")
        items = [given.item(entry) for entry in media]
        if not items and not text:
            raise DataError("There is nothing to answer: text and media are empty.")
        if not is_rendered(text):
            return self._read([*items, *([TextPart(text)] if text else [])], given)
        kinds = list(self._placeholders)
        named = [replace(item, modality=item.modality or given.kind(item, kinds)) for item in items]
        return self._read(parts_of(text, self._placeholders, named), given)

    def _read(self, parts: Sequence[Part], given: GivenMedia) -> TokenizedPrompt:
        files = [given.files[part.media] for part in parts if isinstance(part, MediaPart)]
        return self._reader.read(parts, files)

    @property
    def _placeholders(self) -> dict[str, str]:
        """Kind of media -> its placeholder token."""
        return {section["kind"]: section["placeholder"] for section in self.modalities.values()}

    def _until_end(self, tokens: list[int]) -> list[int]:
        ends = {self._tokenizer.end, self.tokenizer.get_vocab().get(END_TURN, self._tokenizer.end)}
        return tokens[: next((position for position, token in enumerate(tokens) if token in ends), len(tokens))]


def _laid_out(messages: list[Any], where: str, ask: bool, continued: bool) -> list[Part]:
    """Lay out the parts of a conversation, with an open turn at the end if `ask` or `continued`."""
    if ask:
        return open_parts({"messages": messages}, where)
    parts = lay_out(parse_messages(messages, where))
    return parts[:-1] if continued else parts
