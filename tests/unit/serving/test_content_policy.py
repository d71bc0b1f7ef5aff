"""Content policies see questions before they are computed, and each finished sentence before it is sent."""

from __future__ import annotations

from typing import Optional

import httpx
import pytest
from chat_service import Scripted, ask, chunks, serving, text_of

from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.serving.policy import Screen

WORDS = ["One ", "is 1.5. ", "Two", "\nbad", " three. ", "Four."]


class Words:
    """Refuses questions and sentences with the word "bad", and keeps what it saw."""

    def __init__(self) -> None:
        self.questions: list[Prompt] = []
        self.sentences: list[str] = []

    def refuse_question(self, prompt: Prompt) -> Optional[str]:
        self.questions.append(prompt)
        return "a bad question." if any("bad" in getattr(part, "text", "") for part in prompt.parts) else None

    def refuse_sentence(self, prompt: Prompt, answer: str, sentence: str) -> Optional[str]:
        assert prompt is self.questions[-1] and "".join(self.sentences) == answer
        self.sentences.append(sentence)
        return "a bad sentence." if "bad" in sentence else None


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_ends_before_a_refused_sentence(stream: bool) -> None:
    policy, script = Words(), Scripted(words=WORDS)
    with serving(script, policies=[policy]) as served:
        reply = served.post(ask(stream=stream))
        if stream:
            events = chunks(reply.iter_lines())
            text, finish = text_of(events), events[-2]["choices"][0]["finish_reason"]
        else:
            [choice] = reply.json()["choices"]
            text, finish = choice["message"]["content"], choice["finish_reason"]
        assert (
            text == "One is 1.5. Two\n"[: len(text)]
            and text.strip() == "One is 1.5. Two"
            and finish == "content_filter"
        )
        assert policy.sentences == ["One is 1.5.", " Two\n", "bad three."]
        served.wait(lambda service: service.in_flight == 0 and service.engine.running == 0)


def test_a_refused_question_is_not_computed() -> None:
    policy, script = Words(), Scripted()
    with serving(script, policies=[policy]) as served:
        reply = served.post(ask("something bad"))
        error = reply.json()["error"]
        assert reply.status_code == 400 and error["code"] == "content_policy_violation"
        assert error["message"] == "a bad question." and script.largest == 0
        assert served.post(ask("something else")).json()["choices"][0]["message"]["content"] == "one two three"
        assert httpx.get(f"{served.url}/health").json()["requests"] == 0


def test_a_sentence_is_passed_on_once_it_is_complete() -> None:
    policy = Words()
    policy.questions.append(prompt := Prompt([], []))
    screen = Screen([policy], prompt)
    assert [screen.pass_on(text, done=False) for text in ("A b", "A b.", "A b. C", 'A b. C!" D')] == [
        "",
        "",
        "A b.",
        'A b. C!"',
    ]
    assert screen.pass_on('A b. C!" D e', done=True) == 'A b. C!" D e' and not screen.refused
    assert Screen([], prompt).pass_on("half a", done=False) == "half a"
