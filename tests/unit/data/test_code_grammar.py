"""The grammar of text with media as codes, against a regular expression and by exhausting what it allows."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from codes import codes, sections
from discrete_model import is_grammatical

from megatron_anymal.config import DiscreteConfig
from megatron_anymal.data.code_grammar import CodeGrammar, CodeItem, OpenItem
from megatron_anymal.data.codes import CodeLayout
from megatron_anymal.data.discrete_vocabulary import DiscreteCodeError, DiscreteVocabulary

ENDS = (1, 28)


def grammar_of(discrete: dict[str, DiscreteConfig]) -> CodeGrammar:
    return CodeGrammar(CodeLayout(DiscreteVocabulary(32, discrete), discrete))


GRAMMAR = grammar_of(sections())
# Text, the marks and a code of pictures, the marks and a code of both codebooks of speech.
ALPHABET = (5, 32, 33, 38, 39, 40, 44, 45)
OTHERS = {
    "alternating": {"speech": DiscreteConfig(codebooks=[4, 4], interleaving="alternating")},
    "fixed speech": {"speech": DiscreteConfig(codebooks=[4, 4], codes_per_item=4)},
    "fixed alternating": {"speech": DiscreteConfig(codebooks=[4, 4], codes_per_item=4, interleaving="alternating")},
    "one codebook": {"sound": DiscreteConfig(codebooks=[4])},
    "four codebooks": {"speech": DiscreteConfig(codebooks=[4, 3, 2, 1])},
    "both": sections(),
}


def accepts(grammar: CodeGrammar, tokens: tuple[int, ...]) -> bool:
    try:
        grammar.parts(tokens)
    except DiscreteCodeError:
        return False
    return True


def test_it_accepts_what_a_regular_expression_accepts() -> None:
    accepted = 0
    for length in range(6):
        for tokens in itertools.product(ALPHABET, repeat=length):
            assert accepts(GRAMMAR, tokens) == is_grammatical(tokens), tokens
            accepted += accepts(GRAMMAR, tokens)
    assert accepted == 10
    for tokens in ([32, 34, 35, 36, 33], [39, 41, 42, 45, 46, 40], [5, 39, 41, 45, 40, 5, 32, 34, 34, 34, 33]):
        assert is_grammatical(tokens) and accepts(GRAMMAR, tuple(tokens))


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("room", [2, 5, 6, 7, 11, 30])
@pytest.mark.parametrize("text", [True, False])
def test_what_it_allows_ends_within_the_room(name: str, room: int, text: bool) -> None:
    grammar, draws = grammar_of(OTHERS[name]), random.Random(0)
    modalities = [*(["text"] if text else []), *OTHERS[name]]
    try:
        contents = grammar.contents(modalities, ENDS, room)
    except DiscreteCodeError:
        # The shortest item of the speech with the most codebooks has 6 tokens; those of the others have no more.
        assert not text and room < 6
        return
    items = 0
    for _ in range(60):
        tokens: list[int] = []
        while len(tokens) < room and not set(tokens) & set(ENDS):
            item = grammar.open_item(tokens)
            choices = grammar.next_ids(item, contents, room - len(tokens), empty=not tokens)
            # Codes as often as possible, so that items come to their limits.
            tokens.append(draws.choice(draws.choice(choices[-2:])))
        parts = grammar.parts([token for token in tokens if token not in ENDS])
        items += sum(isinstance(part, CodeItem) for part in parts)
        assert text or isinstance(parts[0], CodeItem)
        assert {part.name for part in parts if isinstance(part, CodeItem)} <= set(OTHERS[name])
    assert items or (text and room < 6)


@pytest.mark.parametrize("interleaving", ["sequential", "alternating"])
def test_items_are_what_samples_make_tokens_of(interleaving: str) -> None:
    discrete = {"speech": DiscreteConfig(codebooks=[4, 5, 3], interleaving=interleaving)}
    grammar = grammar_of(discrete)
    values = np.array([[0, 3], [4, 1], [2, 2]])
    tokens = grammar.layout.tokens("speech", codes(values), generated=True)
    [item] = grammar.parts(tokens)
    assert item == CodeItem("speech", values)
    assert grammar.layout.tokens("speech", item.file(), generated=True) == tokens
    assert item != CodeItem("speech", values + 1) and len({item, CodeItem("speech", values.copy())}) == 1


MISTAKES = [
    ([5, 34], r"Token 1: <picture:0:0> is outside an item"),
    ([33], r"Token 0: </picture> is outside an item"),
    (
        [32, 34, 5],
        r"Token 2: the text token 5 follows 1 code\(s\) of an item of 'picture' instead of <picture:0:0> to ",
    ),
    ([32, 34, 34, 34, 34], r"Token 4: <picture:0:0> follows 3 code\(s\) of an item of 'picture' instead of </picture>"),
    ([32, 41], r"Token 1: <speech:0:0> follows 0 code\(s\) of an item of 'picture'"),
    ([39, 41, 45, 41], r"Token 3: <speech:0:0> follows 2 code\(s\) of an item of 'speech' instead of </speech>"),
    ([39, 41, 42, 45, 40], r"Token 4: </speech> follows 3 code\(s\) of an item of 'speech' instead of <speech:1:0> to"),
    ([5, 32, 34], r"item of 'picture' that begins at token 1 is not closed: it has 1 code\(s\) and no </picture>"),
    ([49], r"token 49 is outside the vocabulary"),
]


@pytest.mark.parametrize(("tokens", "says"), MISTAKES)
def test_mistakes_are_named(tokens: list[int], says: str) -> None:
    with pytest.raises(DiscreteCodeError, match=says):
        GRAMMAR.parts(tokens)


def test_where_a_sequence_stands() -> None:
    assert GRAMMAR.open_item([]) is None and GRAMMAR.open_item([5, 32, 34, 34, 34, 33, 1]) is None
    assert GRAMMAR.open_item([39, 41, 45, 40, 5, 39, 41, 42, 45]) == OpenItem("speech", 3, 2)
    assert GRAMMAR.open_item([32]) == OpenItem("picture")
    assert GRAMMAR.can_follow(None, 5) and not GRAMMAR.can_follow(OpenItem("picture"), 5)


def test_requests_that_cannot_be_met_are_refused() -> None:
    with pytest.raises(DiscreteCodeError, match="This model cannot generate 'sound'; it can generate: text, pic"):
        GRAMMAR.contents(["text", "sound"], ENDS, 10)
    with pytest.raises(DiscreteCodeError, match=r"An answer of 4 token\(s\) has no room for an item of picture, .* 5 "):
        GRAMMAR.contents(["picture"], ENDS, 4)
    assert GRAMMAR.contents(["speech", "picture"], ENDS, 4).names == ("speech", "picture")
