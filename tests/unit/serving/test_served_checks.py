"""Integrity checks see questions before they are computed, and each finished sentence before it is sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import httpx
import pytest
from chat_service import Scripted, ask, chunks, serving, text_of

from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.rejection import INPUT_TEXT, OUTPUT_TEXT, Rejection
from megatron_anymal.integrity.checks import text_of as text_of_prompt
from megatron_anymal.integrity.sentences import Sentence, SentenceGate
from megatron_anymal.serving.limits import ServingLimits

WORDS = ["One ", "is 1.5. ", "Two.", "\nA bad", " three. ", "Four."]
REFUSAL = "(refused: output_text/words/bad 1.000)"


class Words:
    """Rejects prompts and sentences with the word "bad", and keeps the sentences that it saw."""

    def __init__(self) -> None:
        self.sentences: list[Sentence] = []

    def check_prompts(self, prompts: Sequence[Prompt]) -> list[Optional[Rejection]]:
        return [self._judged(INPUT_TEXT, text_of_prompt(prompt)) for prompt in prompts]

    def check_answers(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Optional[Rejection]]:
        return [self._judged(OUTPUT_TEXT, answer) for answer in answers]

    def gate(self, prompt: Prompt) -> SentenceGate:
        def check(sentence: Sentence) -> Optional[Rejection]:
            self.sentences.append(sentence)
            return self._judged(OUTPUT_TEXT, sentence.text)

        return SentenceGate(check, 400, 80)

    def _judged(self, stage: str, text: str) -> Optional[Rejection]:
        return Rejection(stage, "words", "bad", 1.0) if "bad" in text else None


def test_a_stream_ends_before_a_violating_sentence() -> None:
    checks, script = Words(), Scripted(words=WORDS)
    with serving(script, checks=checks) as served:
        events = chunks(served.post(ask(stream=True)).iter_lines())
        choices = [event["choices"][0] for event in events if isinstance(event, dict)]
        assert "".join(one["delta"].get("content", "") for one in choices).strip() == "One is 1.5. Two."
        assert [one["delta"]["refusal"] for one in choices if "refusal" in one["delta"]] == [REFUSAL]
        assert choices[-1]["finish_reason"] == "content_filter"
        assert [one.text.strip() for one in checks.sentences] == ["One is 1.5.", "Two.", "A bad three."]
        served.wait(lambda service: service.in_flight == 0 and service.engine.running == 0)


def test_nothing_more_is_computed_after_a_violating_sentence() -> None:
    # Without a stop it would go on for minutes.
    script = Scripted(words=["One. ", "A bad two. ", "More. "], times=10**5, pause=0.002)
    limits = ServingLimits(max_new_tokens=10**6, max_cache_tokens=10**7)
    with serving(script, limits, Words()) as served:
        events = chunks(served.post(ask(stream=True)).iter_lines())
        assert text_of(events).strip() == "One." and events[-2]["choices"][0]["finish_reason"] == "content_filter"
        served.wait(lambda service: service.in_flight == 0 and service.engine.running == 0)


def test_a_whole_answer_is_rejected() -> None:
    with serving(Scripted(words=WORDS), checks=Words()) as served:
        [choice] = served.post(ask()).json()["choices"]
        assert choice["finish_reason"] == "content_filter"
        assert choice["message"]["content"] is None and choice["message"]["refusal"] == REFUSAL


@pytest.mark.parametrize("stream", [True, False])
def test_a_harmless_answer_is_unchanged(stream: bool) -> None:
    words = [word for word in WORDS if "bad" not in word]
    with serving(Scripted(words=words), checks=Words()) as served:
        reply = served.post(ask(stream=stream))
        whole = None if stream else reply.json()["choices"][0]["message"]["content"]
        assert (whole or text_of(chunks(reply.iter_lines()))) == "".join(words)


def test_a_rejected_question_is_not_computed() -> None:
    script = Scripted()
    with serving(script, checks=Words()) as served:
        reply = served.post(ask("something bad"))
        error = reply.json()["error"]
        assert reply.status_code == 400 and error["code"] == "content_policy_violation"
        assert error["message"] == "(refused: input_text/words/bad 1.000)" and script.largest == 0
        assert served.post(ask("something else")).json()["choices"][0]["message"]["content"] == "one two three"
        assert httpx.get(f"{served.url}/health").json()["requests"] == 0
