"""The quickstart's text corpus and tokenizer."""

import json

import pytest

from examples.quickstart import corpus, instructions
from megatron_anymal.data.chat_format import ROLES
from megatron_anymal.data.content_parts import parse_parts
from megatron_anymal.data.records import TextPart
from megatron_anymal.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return corpus.write_lines(tmp_path_factory.mktemp("corpus") / "text.jsonl", corpus.text_lines(3000, seed=1))


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return corpus.write_lines(tmp_path_factory.mktemp("corpus") / "chats.jsonl", instructions.chat_lines(500, seed=1))


@pytest.fixture(scope="module")
def tokenizer(manifest, chats):
    folder = manifest.parent / "tokenizer"
    size = corpus.train_tokenizer([manifest, chats], folder)
    return Tokenizer(str(folder)), size


def test_corpus_is_text_with_the_paraphrase_in_the_medias_place(manifest):
    for line in manifest.read_text().splitlines():
        parts = parse_parts(json.loads(line)["parts"], "line")
        assert [type(part) for part in parts] == [TextPart] * 3
        assert [part.loss for part in parts] == [False, False, True]


def test_corpus_teaches_every_question_that_media_are_asked(manifest):
    taught = {json.loads(line)["parts"][1]["text"] for line in manifest.read_text().splitlines()}
    for modality in ("image", "video", "audio", "imu"):
        facts = corpus.all_facts(modality)[0]
        assert {turn.parts()[0]["text"] for turn in corpus.turns(modality, facts)} <= taught


def test_captions_tell_all_facts_apart():
    for modality, count in (("image", 10), ("video", 40), ("audio", 6), ("imu", 4)):
        captions = {corpus.turns(modality, facts)[0].answer for facts in corpus.all_facts(modality)}
        assert len(captions) == count


def test_knowledge_answers_are_true():
    for number, digit in enumerate(corpus.DIGITS):
        answer = next(t.answer for t in corpus.turns("image", (digit,)) if t.kind == "knowledge")
        assert answer == ("even", "odd")[number % 2]


def test_tokenizer_keeps_every_text_and_adds_nothing(tokenizer, manifest):
    words, size = tokenizer
    texts = [part["text"] for line in manifest.read_text().splitlines() for part in json.loads(line)["parts"]]
    for text in [*texts[:300], "Grüße, 你好!  two  spaces \n tab\t", "", " don 't , stop ."]:
        ids = words.encode(text)
        assert words.decode(ids) == text
        assert not {words.begin, words.end} & set(ids)
    assert len(words.hf) == size <= 768


def test_reserved_tokens_are_single_ids(tokenizer):
    words, _ = tokenizer
    ids = [words.placeholder(token, "placeholder") for token in corpus.RESERVED]
    assert len(set(ids)) == 8
    assert ids[3] not in words.encode(corpus.RESERVED[3])
    assert words.document([TextPart(corpus.RESERVED[3], control=True)], [], {}, closed=False).tokens[1:] == [ids[3]]


def test_it_has_the_chat_formats_tokens_and_roles(tokenizer):
    words, _ = tokenizer
    assert len(words.chat_tokens) == 4
    # As with Llama 3: training and generation have the same ids before an answer.
    assert not words.joins_headers
    for role in ROLES:
        assert len(words.encode(role)) == 1
    written = words.encode("<|eot_id|>")
    assert words.decode(written) == "<|eot_id|>" and not words.chat_tokens & set(written)


def test_training_it_twice_gives_the_same_tokenizer(tokenizer, manifest, chats, tmp_path):
    corpus.train_tokenizer([manifest, chats], tmp_path)
    assert Tokenizer(str(tmp_path)).fingerprint() == tokenizer[0].fingerprint()
