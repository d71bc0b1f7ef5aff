"""Ids of marks and codes, against MIO's own numbers and a plain list of all entries."""

import subprocess
import sys

import pytest

from megatron_anymal.config import DiscreteConfig
from megatron_anymal.data.discrete_vocabulary import DiscreteCodeError, DiscreteToken, DiscreteVocabulary

MIO = {
    "image": DiscreteConfig(codebooks=[8192], begin="<IMAGE>", end="</IMAGE>"),
    "speech": DiscreteConfig(codebooks=[1024] * 4, begin="<SPCH>", end="</SPCH>"),
}


def test_sizes_of_mio():
    """Section 2.1: the embedding and the head are extended by 4096 + 8192 + 4 = 12292."""
    vocabulary = DiscreteVocabulary(64000, MIO)
    assert (vocabulary.added, vocabulary.total_size) == (12292, 76292)


def test_every_id_as_in_a_plain_list():
    sections = {"x": DiscreteConfig(codebooks=[3]), "y": DiscreteConfig(codebooks=[2, 5], begin="[", end="]")}
    plain: list[DiscreteToken] = []
    for name, books in (("x", [3]), ("y", [2, 5])):
        plain += [DiscreteToken(name, mark="begin"), DiscreteToken(name, mark="end")]
        plain += [DiscreteToken(name, "", book, code) for book, size in enumerate(books) for code in range(size)]
    vocabulary = DiscreteVocabulary(100, sections)
    assert [vocabulary.lookup(100 + index) for index in range(vocabulary.added)] == plain
    for index, token in enumerate(plain):
        if token.mark:
            assert getattr(vocabulary, token.mark)(token.name) == 100 + index
        else:
            assert vocabulary.id_of(token.name, token.codebook, token.code) == 100 + index
    assert [*vocabulary.ids("x"), *vocabulary.ids("y")] == list(range(100, 100 + len(plain)))
    assert list(vocabulary.codebook("y", 1)) == list(range(109, 114)) and vocabulary.codebooks("y") == 2
    assert list(vocabulary.texts()) == (
        ["<x>", "</x>", "<x:0:0>", "<x:0:1>", "<x:0:2>", "[", "]", "<y:0:0>", "<y:0:1>"]
        + [f"<y:1:{code}>" for code in range(5)]
    )


def test_an_appended_section_moves_nothing():
    before = DiscreteVocabulary(50, {"x": DiscreteConfig(codebooks=[3])})
    after = DiscreteVocabulary(50, {"x": DiscreteConfig(codebooks=[3]), "y": DiscreteConfig(codebooks=[2])})
    assert list(before.texts()) == list(after.texts())[: before.added]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda v: v.id_of("image", 0, 8192), "code 8192 of 'image' is outside its codebook 0.*0 to 8191"),
        (lambda v: v.id_of("speech", 3, -1), "code -1 of 'speech' is outside its codebook 3.*0 to 1023"),
        (lambda v: v.id_of("speech", 4, 0), "'speech' has no codebook 4; it has 4"),
        (lambda v: v.codebook("speech", -1), "'speech' has no codebook -1"),
        (lambda v: v.begin("music"), "'music' is not a kind of discrete media.*image, speech"),
        (lambda v: v.lookup(63999), "token 63999 belongs to the text.*64000 to 76291"),
        (lambda v: v.lookup(76292), "token 76292 is outside the vocabulary"),
        (lambda v: v.lookup(-1), "token -1 is outside the vocabulary"),
    ],
)
def test_errors_name_the_value_and_the_range(call, says):
    with pytest.raises(DiscreteCodeError, match=says):
        call(DiscreteVocabulary(64000, MIO))


def test_without_sections_nothing_is_added():
    vocabulary = DiscreteVocabulary(10, {})
    assert (vocabulary.added, vocabulary.total_size, list(vocabulary.texts())) == (0, 10, [])
    with pytest.raises(DiscreteCodeError, match=r"model\.discrete has none"):
        vocabulary.begin("x")


def test_needs_no_torch():
    code = "import sys, megatron_anymal.data.discrete_vocabulary; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
