"""The seam for content policies: what is asked and what is answered can be refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Optional, Protocol

from megatron_anymal.generation.prompts import Prompt

# A sentence ends after its punctuation and closing quotes, before white space; or with its line.
_END = re.compile(r"[.!?\u2026\u3002\uff01\uff1f][\"'\u201d\u2019)\]]*(?=\s)|\n")


class ContentPolicy(Protocol):
    """Decides what a served model may be asked and may answer. Called from several threads at once."""

    def refuse_question(self, prompt: Prompt) -> Optional[str]:
        """Look at a request with its media before it is computed.

        Returns:
            The reason to refuse it, which the client sees; None to allow it.
        """

    def refuse_sentence(self, prompt: Prompt, answer: str, sentence: str) -> Optional[str]:
        """Look at a finished sentence before it is sent.

        Args:
            prompt: the request.
            answer: the sentences before it, which have been allowed.
            sentence: with its white space.

        Returns:
            The reason to end the answer before the sentence; None to allow it.
        """


class Screen:
    """Lets the allowed beginning of one answer through, whole sentences at a time."""

    def __init__(self, policies: Sequence[ContentPolicy], prompt: Prompt):
        """Screen the answer to a prompt; without policies, everything passes as it comes."""
        self._policies, self._prompt, self._allowed, self.refused = policies, prompt, "", False

    def pass_on(self, text: str, *, done: bool) -> str:
        """The allowed part of an answer.

        Args:
            text: the answer so far, which continues that of the last call.
            done: whether the answer is complete, so that its last sentence is, too.
        """
        if not self._policies:
            return text
        while not self.refused and len(self._allowed) < len(text):
            start = len(self._allowed)
            end = _END.search(text, start)
            if end is None and not done:
                break
            sentence = text[start : end.end() if end else len(text)]
            if any(policy.refuse_sentence(self._prompt, self._allowed, sentence) for policy in self._policies):
                self.refused = True
            else:
                self._allowed += sentence
        return self._allowed
