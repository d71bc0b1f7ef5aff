"""A conversation's parts are converted back to its messages, as the processor of an exported folder needs them."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_anymal.data.chat_format import CHAT_TOKENS, last_answer, messages_of, open_prompt, parse_messages
from megatron_anymal.data.content_parts import parse_parts
from megatron_anymal.data.samples import parse_sample

USER = {"role": "user", "content": [{"media": "a.png"}, {"text": "what"}, {"media": "b.npy", "rate": 50}]}
ASSISTANT = {"role": "assistant", "content": f"it says {CHAT_TOKENS[3]}"}
HEADER = f"{CHAT_TOKENS[1]}user{CHAT_TOKENS[2]}\n\n"
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [USER],
    "three turns": [{"role": "system", "content": "be brief"}, USER, ASSISTANT, {"role": "user", "content": HEADER}],
    "media alone": [{"role": "user", "content": [{"media": "a.png"}]}],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_layout_can_be_undone(name: str) -> None:
    messages = parse_messages(CONVERSATIONS[name], "")
    assert messages_of(open_prompt(messages)) == messages
    sample = parse_sample({"messages": [*CONVERSATIONS[name], ASSISTANT]}, "")
    asked = messages_of(last_answer(sample.documents[0])[0])
    assert asked is not None
    # Which earlier turns were targets does not matter for a prompt.
    assert open_prompt(asked) == open_prompt(messages)


def test_parts_are_no_conversation() -> None:
    assert messages_of([]) is None
    assert messages_of(parse_parts([{"text": "what"}], "")) is None
    assert messages_of(parse_parts([{"text": HEADER}, {"text": "what"}], "")) is None
