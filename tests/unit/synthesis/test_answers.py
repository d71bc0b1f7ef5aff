"""Which answers become conversations, and which wording gives a description away."""

from __future__ import annotations

import json

import jsonschema
import pytest

from megatron_anymal.synthesis.answers import (
    LEAKS,
    InvalidAnswer,
    leak_of,
    normalised,
    parse_answer,
    response_format,
)
from megatron_anymal.synthesis.tasks import find_task, shipped_tasks

TASK = find_task("conversation")
PAIRS = [("What is it?", "A dog."), ("What colour has it?", "It is {brown}.")]
VALUE = {"conversation": [{"question": q, "answer": a} for q, a in PAIRS]}
TEXT = json.dumps(VALUE)


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        f"```json\n{TEXT}\n```",
        f"Sure {{here}} it is:\n\n{TEXT}\nAnything else?",
        f'{{"a": 1}} {TEXT} {{',
        f"\n{TEXT}",
    ],
)
def test_answers_in_other_text(text: str) -> None:
    assert parse_answer(text, TASK) == PAIRS


BAD = {
    "": "not JSON",
    "[" * 20_000: "not JSON",
    "{" * 20_000: "not JSON",
    TEXT[:-3]: "not JSON",
    '{"conversation": 3}': "schema",
    '{"conversation": ["a", "b"]}': "schema",
    '{"conversation": [{"question": "a"}, {"question": "b", "answer": "c"}]}': "missing or empty",
    '{"conversation": [{"question": "a", "answer": " "}, {"question": "b", "answer": "c"}]}': "missing or empty",
    '{"conversation": [{"question": "a", "answer": "b"}]}': "1 pairs, not 2 to 5",
    '{"conversation": [{"question": "a", "answer": "b"}, {"question": "A ", "answer": "c"}]}': "repeated question",
    '{"conversation": [{"question": "a", "answer": "\\ud83d"}, {"question": "b", "answer": "c"}]}': "surrogate",
}


@pytest.mark.parametrize("text", BAD, ids=[text[:40] for text in BAD])
def test_other_answers(text: str) -> None:
    with pytest.raises(InvalidAnswer, match=BAD[text]):
        parse_answer(text, TASK)


def test_the_schema_accepts_what_the_parser_accepts() -> None:
    for task in shipped_tasks().values():
        schema = response_format(task)["json_schema"]["schema"]
        for count in range(8):
            value = {"conversation": [{"question": f"q{n}", "answer": "a"} for n in range(count)]}
            try:
                jsonschema.validate(value, schema)
                fits = True
            except jsonschema.ValidationError:
                fits = False
            try:
                parsed = bool(parse_answer(json.dumps(value), task))
            except InvalidAnswer:
                parsed = False
            assert fits == parsed == (task.min_pairs <= count <= task.max_pairs)


GIVEN_AWAY = {
    "The caption says that a dog runs.": "caption",
    "Captions mention two cats.": "caption",
    "Its bounding box is at the left.": "box",
    "Which bounding-boxes overlap?": "box",
    "At the coordinates 0.1 and 0.3.": "box",
    "The description does not say.": "description",
    "Based on the description, it is noon.": "description",
    "From the provided information it is a park.": "given text",
    "The list of objects has a dog.": "object list",
    "As an AI, I cannot see pictures.": "no media",
}


@pytest.mark.parametrize("text", GIVEN_AWAY)
def test_wording_that_gives_the_description_away(text: str) -> None:
    assert leak_of([("What is it?", text)]) == GIVEN_AWAY[text] == leak_of([(text, "A dog.")])
    assert set(GIVEN_AWAY.values()) == set(LEAKS)


@pytest.mark.parametrize(
    "text",
    ["Write a caption for this picture.", "A box lies on the table.", "Give a description of the room.",
     "The dancers coordinated their steps.", "You cannot see the sun, which is behind clouds.", "Captain Hook"],
)  # fmt: skip
def test_other_wording(text: str) -> None:
    assert leak_of([(text, "Fine."), ("And?", text)]) is None


def test_duplicates_differ_in_case_and_punctuation_only() -> None:
    assert normalised([("What is it?", "A dog!")]) == normalised([("what IS it", "a  dog.")])
    assert normalised([("What is it?", "A dog!")]) != normalised([("What is it?", "A cat!")])
