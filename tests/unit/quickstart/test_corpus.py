"""The quickstart's words and tokenizer."""

import json

import pytest

from megatron_anymal.data.samples import parse_parts
from megatron_anymal.data.tokenize import Tokenizer
from megatron_anymal.data.types import TextPart
from megatron_anymal.quickstart import corpus


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return corpus.write_corpus(tmp_path_factory.mktemp("corpus") / "text.jsonl", count=3000, seed=1)


@pytest.fixture(scope="module")
def tokenizer(manifest):
    folder = manifest.parent / "tokenizer"
    size = corpus.train_tokenizer(manifest, folder)
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
    assert len(words.hf) == size <= 512


def test_reserved_tokens_are_single_ids(tokenizer):
    words, _ = tokenizer
    ids = [words.placeholder(token, "placeholder") for token in corpus.RESERVED]
    assert len(set(ids)) == 8
    assert words.encode(corpus.RESERVED[3]) == [ids[3]]


def test_training_it_twice_gives_the_same_tokenizer(tokenizer, manifest, tmp_path):
    corpus.train_tokenizer(manifest, tmp_path)
    assert Tokenizer(str(tmp_path)).fingerprint() == tokenizer[0].fingerprint()
