"""Synthesis of conversations: asks for every sample of a manifest, keeps each result, and writes what is usable."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from megatron_anymal.data.journal import Journal
from megatron_anymal.data.records import DataError
from megatron_anymal.synthesis.answers import InvalidAnswer, leak_of, normalised, parse_answer, response_format
from megatron_anymal.synthesis.client import Client, Endpoint, Refused, ServerFailed
from megatron_anymal.synthesis.sources import SourceSample
from megatron_anymal.synthesis.tasks import ConversationTask
from megatron_anymal.telemetry import Progress


@dataclass(frozen=True)
class SynthesisResult:
    """What became of a manifest's samples.

    Attributes:
        lines: conversations, as lines of a manifest.
        dropped: key -> reason, of samples whose answers cannot be used.
        failed: key -> reason, of samples that the server did not answer.
        prompt_tokens: of all requests that were answered.
        completion_tokens: of their answers.
    """

    lines: list[dict[str, Any]]
    dropped: dict[str, str]
    failed: dict[str, str]
    prompt_tokens: int
    completion_tokens: int

    @property
    def reasons(self) -> Counter[str]:
        """Number of samples without a conversation by the kind of reason."""
        return Counter(reason.partition(":")[0] for reason in [*self.dropped.values(), *self.failed.values()])


class Synthesis:
    """Asks a server for a conversation about every sample of a manifest."""

    def __init__(
        self,
        sources: Sequence[SourceSample],
        task: ConversationTask,
        endpoint: Endpoint,
        concurrency: int = 8,
        attempts: int = 2,
    ) -> None:
        """Prepare the requests.

        Args:
            concurrency: requests at a time.
            attempts: answers that are asked for per sample, as long as none has the form of a conversation.
        """
        self._sources, self._task, self._endpoint = sources, task, endpoint
        self._concurrency, self._attempts = concurrency, attempts
        # Key -> row of the journal.
        self._rows: dict[str, Mapping[str, Any]] = {}
        self._failed: dict[str, str] = {}

    def run(self, journal: Journal) -> None:
        """Ask for every sample that the journal does not have yet; each result is on disk before the next.

        Raises:
            DataError: the journal belongs to other settings or captions, or the server refuses requests, or no request
                succeeds any more.
        """
        self._resume(journal)
        open_sources = [source for source in self._sources if source.key not in self._rows]
        if not open_sources:
            return
        progress = Progress("asking", len(open_sources), "samples")
        try:
            asyncio.run(self._ask_all(open_sources, journal, progress))
        except BaseExceptionGroup as group:
            # The other workers were cancelled by the first error.
            raise group.exceptions[0] from None
        progress.finish()

    def result(self, base: Path, folder: Path) -> SynthesisResult:
        """The conversations so far, without duplicates, in the order of the manifest.

        Args:
            base: folder of the manifest.
            folder: of the new one, which its media paths are relative to.
        """
        lines: list[dict[str, Any]] = []
        dropped: dict[str, str] = {}
        first: dict[str, str] = {}
        for source in self._sources:
            row = self._rows.get(source.key)
            if row is None:
                continue
            if row["reason"] is not None:
                dropped[source.key] = row["reason"]
                continue
            other = first.setdefault(normalised(row["pairs"]), source.key)
            if other != source.key:
                dropped[source.key] = f"duplicate: of {other}"
                continue
            media = source.media_from(base, folder)
            lines.append({"key": f"{source.key}-{self._task.name}", "messages": _messages(row["pairs"], media)})
        tokens = [sum(row[name] for row in self._rows.values()) for name in ("prompt_tokens", "completion_tokens")]
        return SynthesisResult(lines, dropped, dict(self._failed), *tokens)

    def _resume(self, journal: Journal) -> None:
        endpoint = self._endpoint
        settings = {
            "task": self._task.fingerprint,
            "model": endpoint.model,
            "temperature": endpoint.temperature,
            "max_tokens": endpoint.max_tokens,
        }
        if not journal.rows:
            journal.append({"settings": settings})
            return
        stored = journal.rows[0].get("settings", {})
        for name, value in settings.items():
            if stored.get(name) != value:
                raise DataError(f"The journal was begun with another {name}. Name another --out, or restore it.")
        fingerprints = {source.key: _fingerprint(source) for source in self._sources}
        for row in journal.rows[1:]:
            if fingerprints.get(row["key"], row["source"]) != row["source"]:
                raise DataError(f"The journal has {row['key']!r} with other captions or media. Name another --out.")
            if row["key"] in fingerprints:
                self._rows[row["key"]] = row

    async def _ask_all(self, sources: Iterable[SourceSample], journal: Journal, progress: Progress) -> None:
        remaining = iter(sources)
        limits = httpx.Limits(max_connections=self._concurrency, max_keepalive_connections=self._concurrency)
        # Its own limit on time would restart with every byte.
        async with httpx.AsyncClient(timeout=None, limits=limits) as http, asyncio.TaskGroup() as group:
            client = Client(self._endpoint, http)
            for _ in range(self._concurrency):
                group.create_task(self._work(remaining, client, journal, progress))

    async def _work(
        self, remaining: Iterable[SourceSample], client: Client, journal: Journal, progress: Progress
    ) -> None:
        for source in remaining:
            answered = client.answered
            try:
                row = await self._one(source, client)
            except ServerFailed as error:
                if client.answered == answered:
                    raise DataError(
                        f"The server {self._endpoint.url!r} does not answer any more ({error}). What it answered is "
                        "kept; start the same command again to continue."
                    ) from None
                self._failed[source.key] = f"server: {error}"
            else:
                journal.append(row)
                self._rows[source.key] = row
            progress.advance()

    async def _one(self, source: SourceSample, client: Client) -> dict[str, Any]:
        """The row of a sample: its pairs, or the reason why it has none."""
        messages, pairs, reason, tokens = self._task.messages(source), None, "", [0, 0]
        for _ in range(self._attempts):
            try:
                reply = await client.ask(messages, response_format(self._task))
            except Refused as error:
                reason = f"refused: {error}"
                break
            tokens = [tokens[0] + reply.prompt_tokens, tokens[1] + reply.completion_tokens]
            try:
                if reply.cut_off:
                    raise InvalidAnswer("cut off: at --max-tokens")
                pairs = parse_answer(reply.text, self._task)
                break
            except InvalidAnswer as error:
                reason = str(error)
        if pairs is not None and (leak := leak_of(pairs)) is not None:
            pairs, reason = None, f"leak: {leak}"
        return {
            "key": source.key,
            "source": _fingerprint(source),
            "pairs": pairs,
            "reason": None if pairs else reason,
            "prompt_tokens": tokens[0],
            "completion_tokens": tokens[1],
        }


def _fingerprint(source: SourceSample) -> str:
    return hashlib.sha256(json.dumps(asdict(source), sort_keys=True).encode()).hexdigest()[:16]


def _messages(pairs: Sequence[Sequence[str]], media: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation with the media after its first question: instruction, then modality tokens (section 3.2)."""
    messages: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(pairs):
        content: Any = question if number else [{"text": question}, *media]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages
