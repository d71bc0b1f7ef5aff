"""`anymal generate --interactive`: a conversation in the terminal, with media."""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Optional, Protocol

from megatron_anymal.checkpoint.store import CheckpointError
from megatron_anymal.config import ConfigError
from megatron_anymal.data.code_grammar import CodeItem
from megatron_anymal.data.codes import HASH_ATTRIBUTE
from megatron_anymal.data.content_parts import CODES_ENDING
from megatron_anymal.data.prompt_encoder import MediaFile, open_parts, read_media_file
from megatron_anymal.data.records import DataError
from megatron_anymal.generation.answers import GrowingAnswer, Reply, Stream
from megatron_anymal.generation.generator import Generator, PromptTooLong
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.sampling import Sampling
from megatron_anymal.modalities import MediaError

_HELP = """\
A line is sent as your turn, after the media added before it.
  /media FILE [key=value ...]   add a file, its kind detected from its name; {kinds} set the kind
                                (/imu walk.npy rate=200)
  a line that ends with \\       continue the turn on the next line, or with media
  an empty line                 send the turn
  /system TEXT                  set the system message of the conversation
  /reset                        start a new conversation
  /quit                         quit (or Ctrl-D); Ctrl-C stops an answer
  //...                         a text that begins with /"""
_MISTAKES = (DataError, MediaError, ConfigError, CheckpointError)


def show(text: str) -> None:
    """Print text without a line break and flush it."""
    print(text, end="", flush=True)


class ChatMedia(Protocol):
    """What becomes of media as codes in a conversation."""

    def encoded(self, prompt: Prompt) -> Prompt:
        """A prompt with media as codes if their modality has a tokenizer."""

    def lines(self, stem: str, reply: Reply) -> list[str]:
        """Lines that say what became of the media of an answer."""


class Chat:
    """A conversation: reads user turns line by line and streams the model's answers, each given the turns so far."""

    def __init__(
        self,
        generator: Generator,
        sampling: Sampling,
        read: Callable[[str], str] = input,
        write: Callable[[str], object] = show,
        media: Optional[ChatMedia] = None,
    ):
        """Start a conversation.

        Args:
            read: returns the next line, given the text to show before it; raises EOFError at the end.
            write: prints text.
            media: encodes media of the user's turns and keeps those of answers; None: only texts are shown.
        """
        self._generator, self._sampling, self._read, self._write = generator, sampling, read, write
        self._output = media
        self._commands: dict[str, Callable[[str], object]] = {
            "system": self._system,
            "reset": self._reset,
            "help": self._help,
            "media": self._media,
            **{kind: partial(self._media, kind=kind) for kind in self._kinds},
        }
        # The conversation so far, and its media in order.
        self._history: list[dict[str, Any]] = []
        self._files: list[MediaFile] = []
        self._system_text = ""
        # The turn being written: content parts as JSON, and its media.
        self._content: list[dict[str, Any]] = []
        self._pending: list[MediaFile] = []

    def run(self) -> int:
        """Chat until /quit or the end of the input, and return the exit code."""
        self._say("Write to the model; /help lists the commands.")
        while True:
            try:
                line = self._read("... " if self._content else "> ").rstrip()
            except EOFError:
                return 0
            except KeyboardInterrupt:
                self._content, self._pending = [], []
                self._say("\n(nothing was sent; quit with /quit or Ctrl-D)")
                continue
            except UnicodeDecodeError as error:
                self._say(f"error: the line is not UTF-8 ({error.reason}).")
                continue
            if line == "/quit":
                return 0
            try:
                self._take(line)
            except _MISTAKES as error:
                self._say(f"error: {' '.join(str(error).split())}")

    def _take(self, line: str) -> None:
        """Handle one line: a command, or text of the user's turn."""
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line[1:].partition(" ")
            if name not in self._commands:
                near = difflib.get_close_matches(name, [*self._commands, "quit"], n=1)
                raise DataError(f"unknown command /{name}. " + (f"Did you mean /{near[0]}?" if near else "See /help."))
            self._commands[name](rest.strip())
            return
        goes_on = line.endswith("\\")
        text = line.removesuffix("\\").removeprefix("/" if line.startswith("//") else "")
        if text and self._content and "text" in self._content[-1]:
            self._content[-1]["text"] += f"\n{text}"
        elif text:
            self._content.append({"text": text})
        if self._content and not goes_on:
            self._send()

    def _send(self) -> None:
        """Generate the answer to the turn; a turn without an answer is dropped from the conversation."""
        turn, media = {"role": "user", "content": self._content}, self._pending
        self._content, self._pending = [], []
        system = [{"role": "system", "content": self._system_text}] if self._system_text else []
        parts = open_parts({"messages": [*system, *self._history, turn]}, "the conversation")
        prompt = Prompt(parts, [*self._files, *media])
        try:
            reply = self._answer(self._output.encoded(prompt) if self._output else prompt)
        except PromptTooLong as error:
            raise DataError(f"The conversation is too long. {error} /reset starts a new conversation.") from None
        if not reply.text:
            self._say("(no answer; your turn was dropped)")
            return
        for line in self._output.lines(f"turn{len(self._history) // 2 + 1}", reply) if self._output else ():
            self._say(line)
        self._history += [turn, {"role": "assistant", "content": self._content_of(reply)}]
        self._files += [*media, *(MediaFile(item.file(), "npy") for item in reply.items)]

    def _content_of(self, reply: Reply) -> Any:
        """An answer in the form of a conversation's message."""
        if not reply.items or self._generator.grammar is None:
            return reply.text
        sections = self._generator.grammar.layout.sections
        return [
            {"text": part}
            if isinstance(part, str)
            else {
                "media": f"{part.name}.{CODES_ENDING}",
                "modality": part.name,
                HASH_ATTRIBUTE: sections[part.name].tokenizer_hash,
            }
            for part in reply.parts
        ]

    def _answer(self, prompt: Prompt) -> Reply:
        stream = Stream(self._write)
        latest: list[GrowingAnswer] = []

        def watch(answer: GrowingAnswer) -> None:
            latest[:] = [answer]
            stream(answer)

        try:
            # A different seed for each turn.
            seed = self._sampling.seed + len(self._history)
            [reply] = self._generator.replies([prompt], replace(self._sampling, seed=seed), 1, watch)
        except KeyboardInterrupt:
            self._say(" (stopped)")
            return _shown(latest[0]) if latest else Reply.of_parts([])
        if latest and latest[0].text.strip():
            self._say("")
        if rejection := self._generator.rejections.get(0):
            self._say(rejection.text)
            return Reply.of_parts([])
        return reply if reply.items else Reply.of_parts([reply.text.strip()])

    def _system(self, text: str) -> None:
        self._system_text = text
        self._say(f"(system: {text})" if text else "(no system text)")

    def _reset(self, _: str = "") -> None:
        """Start a new conversation."""
        self._history, self._files, self._system_text = [], [], ""
        self._content, self._pending = [], []
        self._say("(a new conversation)")

    @property
    def _kinds(self) -> list[str]:
        return [*self._generator.kinds, *self._generator.discrete]

    def _help(self, _: str) -> None:
        kinds = ", ".join(f"/{kind}" for kind in self._kinds)
        self._say(_HELP.format(kinds=kinds))

    def _media(self, words: str, kind: str = "") -> None:
        """Add a file to the turn."""
        try:
            path, *pairs = shlex.split(words)
        except ValueError as error:
            raise DataError(f"/{kind or 'media'} needs a file name (in quotes if it has spaces): {error}.") from None
        attributes = {}
        for pair in pairs:
            name, equals, value = pair.partition("=")
            if not equals or name in ("", "media", "modality", "text"):
                raise DataError(f"{pair!r} is not a key=value attribute of a media file, such as rate=200.")
            attributes[name] = _value(value)
        self._pending.append(read_media_file(Path(path).expanduser()))
        self._content.append({"media": path, **({"modality": kind} if kind else {}), **attributes})

    def _say(self, line: str) -> None:
        self._write(line + "\n")


def _shown(answer: GrowingAnswer) -> Reply:
    """An answer that was stopped: its items, and exactly the text that was shown."""
    parts = answer.reply.parts
    last = max((number for number, part in enumerate(parts) if isinstance(part, CodeItem)), default=-1)
    before = Reply.of_parts(parts[: last + 1])
    return Reply.of_parts([*before.parts, answer.settled[len(before.text) :].strip()])


def _value(text: str) -> Any:
    """Parse a value as JSON if possible, such as a number, else as text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
