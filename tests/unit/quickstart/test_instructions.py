"""The quickstart's conversations: distinct answer forms, held-out wording, and pairs that differ only in the
opening."""

from collections import Counter

import pytest

from examples.quickstart import instructions as ins
from examples.quickstart.corpus import all_facts, turns
from examples.quickstart.prepare import conversations
from megatron_anymal.data.records import MediaPart
from megatron_anymal.data.samples import parse_sample

WRITTEN = {
    "word": "seven",
    "capitals": "SEVEN",
    "numeral": "7",
    "hyphens": "s-e-v-e-n",
    "sentence": "The digit is seven.",
    "twice": "seven seven",
}


def items(modality, count=60):
    """Manifest lines of media, as in the media's own manifests."""
    facts = all_facts(modality)
    return [
        {"parts": [{"media": f"{n}.x", "modality": modality}], "facts": list(facts[n % len(facts)])}
        for n in range(count)
    ]


ALL = {kind: items(kind, 200) for kind in ("image", "video", "audio", "imu")}


@pytest.mark.parametrize("form", ins.FORMS)
def test_an_answer_has_its_own_form_and_no_other(form):
    assert ins.write_in(form, "image", "seven") == WRITTEN[form]
    for text in (WRITTEN[form], ins.OPENING + WRITTEN[form]):
        assert [name for name in ins.FORMS if ins.follows(name, text)] == [form]


@pytest.mark.parametrize(
    ("form", "wrong"),
    [
        ("word", "the digit seven"),
        ("word", "Seven"),
        ("capitals", "SEVEn"),
        ("numeral", "7 7"),
        ("hyphens", "s-e-v-e-n-"),
        ("hyphens", "seven"),
        ("sentence", "the digit is seven."),
        ("sentence", "The digit is seven"),
        ("twice", "seven eight"),
        ("twice", "seven seven seven"),
        ("word", "sure:\nsure:\nseven"),
    ],
)
def test_near_misses_do_not_follow(form, wrong):
    assert not ins.follows(form, wrong)


def test_form_does_not_ask_for_the_right_content():
    assert ins.follows("capitals", "EIGHT") and ins.follows("twice", "drum drum")


@pytest.mark.parametrize("modality", ["image", "video", "audio", "imu"])
def test_every_answer_to_every_fact_has_its_form(modality):
    for facts in all_facts(modality):
        for form in ins.forms_of(modality):
            assert ins.follows(form, ins.write_in(form, modality, facts[0]))


def test_what_the_llama_answers_unasked_has_none_of_the_forms():
    for modality in ("image", "video", "audio", "imu"):
        for facts in all_facts(modality):
            answer = turns(modality, facts)[0].answer
            assert not any(ins.follows(form, answer) for form in ins.FORMS)
    for line in ins.chat_lines(200):
        assert not any(ins.follows(form, line["messages"][1]["content"]) for form in ins.FORMS)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_conversations_are_samples_and_their_answers_true(split):
    manifests = conversations(ALL, split)
    assert {name.partition("_")[2] for name in manifests} == set(ins.KINDS)
    for name, lines in manifests.items():
        kind, _, modality = name.partition("_")
        assert len({line["key"] for line in lines}) == len(lines)
        for line in lines:
            sample = parse_sample({k: v for k, v in line.items() if k not in ("form", "words")}, "line")
            assert sample.kind == ("preference" if kind == "preferences" else "messages")
            for document in sample.documents:
                media = [part.modality for part in document if isinstance(part, MediaPart)]
                assert media == ([] if modality == "text" else [modality])
            if kind == "instructions":
                assert ins.follows(line["form"], line["messages"][-1]["content"])


def test_some_conversations_go_on_with_another_form():
    lines = ins.instruction_lines(items("image", 400), "train")
    lengths = Counter(len(line["messages"]) for line in lines)
    assert set(lengths) == {2, 4} and 40 < lengths[4] < 130
    for line in lines:
        answers = [ins.without_opening(m["content"]) for m in line["messages"] if m["role"] == "assistant"]
        assert len(set(answers)) == len(answers)


def test_words_of_new_requests_are_held_out():
    asked = {
        words: {
            part["text"]
            for line in ins.instruction_lines(items("image", 2000), split)
            if line["words"] == words
            for part in line["messages"][0]["content"]
            if "text" in part
        }
        for split, words in (("train", "seen"), ("held_out", "new"))
    }
    assert len(asked["seen"]) > 100 and len(asked["new"]) > 50 and not asked["seen"] & asked["new"]
    assert {line["words"] for line in ins.instruction_lines(items("image"), "train")} == {"seen"}


def test_training_shows_the_opening_half_of_the_time_and_held_out_answers_have_none():
    train = ins.instruction_lines(items("audio", 1000), "train")
    share = sum(line["messages"][-1]["content"].startswith(ins.OPENING) for line in train) / len(train)
    assert 0.44 < share < 0.56
    for line in ins.instruction_lines(items("audio"), "held_out"):
        assert not any(m["content"].startswith(ins.OPENING) for m in line["messages"] if m["role"] == "assistant")


def test_pairs_differ_in_the_opening_alone():
    for line in ins.pairs_of(ins.instruction_lines(items("imu"), "train")):
        assert line["rejected"] == ins.OPENING + line["chosen"]
        assert line["messages"][-1]["role"] == "user" and not line["chosen"].startswith(ins.OPENING)


def test_score_by_hand():
    lines = [
        {"key": key, "form": form, "words": words, "messages": [{"content": content}]}
        for key, form, words, content in [
            ("a", "capitals", "seen", "SEVEN"),
            ("b", "capitals", "new", "SEVEN"),
            ("c", "word", "new", "seven"),
            ("d", "numeral", "seen", "7"),
        ]
    ]
    given = {"a": "sure:\nSEVEN", "b": "EIGHT", "c": "the digit seven", "d": "7"}
    assert ins.score(lines, given) == {
        "followed": 0.75,
        "accuracy": 0.5,
        "opening": 0.25,
        "followed_new_words": 0.5,
        "questions": 4,
    }
