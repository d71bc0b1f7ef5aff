"""Answers while they grow: where they end, and that the streamed text equals the answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from megatron_anymal.generation.answers import Answer, Stream

END = 256


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, as in a byte-level BPE without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)} | {"<end>": END}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


HF = byte_tokenizer()


def decode(tokens: Sequence[int]) -> str:
    return HF.decode(list(tokens), skip_special_tokens=True)


def grown(text: str, stops: Sequence[str] = (), room: int = 1000) -> tuple[Answer, list[str]]:
    """An answer with the text `text`, and the pieces that were streamed."""
    pieces: list[str] = []
    answer, stream = Answer(0, decode, {END}, stops, room), Stream(pieces.append)
    for token in [*HF.encode(text), END]:
        if not answer.done:
            answer.add(token)
            stream(answer)
            assert answer.text.strip().startswith("".join(pieces))
    assert answer.done
    return answer, pieces


TEXTS = [
    "a cat on a sofa",
    "  two\n\nlines ",
    "naïve 猫🐈 garçon",
    "",
    "ends with 🐈",
    "stop",
    "日本語のテキスト",
    "a �� b �",
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_the_answer(text: str) -> None:
    answer, pieces = grown(text)
    assert answer.text == text and "".join(pieces) == text.strip()
    # No incomplete character is shown: a replacement character that is not in the text would be half of one.
    assert "�" in text or all("�" not in piece for piece in pieces)


def test_the_pieces_come_while_it_grows() -> None:
    assert len(grown("a long answer with many words")[1]) > 6
    assert len(grown("日本語のテキスト")[1]) >= 8


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two STOP three", ["STOP"], "one two "),
        ("one two STOP three", ["three", "STOP", "x"], "one two "),
        ("one STO two", ["STOP"], "one STO two"),
        ("STOP", ["STOP"], ""),
        ("aab", ["ab"], "a"),
        ("ends in ST", ["STOP"], "ends in ST"),
        ("a\n\nb", ["\n\n"], "a"),
        ("gato 🐈 y", ["🐈"], "gato "),
    ],
)
def test_it_ends_before_a_stop_text(text: str, stops: list[str], expected: str) -> None:
    answer, pieces = grown(text, stops)
    assert answer.text == expected
    assert "".join(pieces) == expected.strip()


def test_no_token_is_taken_behind_a_stop_text() -> None:
    answer, _ = grown("one STOP two", ["STOP"])
    assert decode(answer.tokens) == "one STOP"
    answer.add(5)
    assert decode(answer.tokens) == "one STOP"


def test_it_ends_where_there_is_no_room() -> None:
    assert grown("abcdef", room=3)[0].text == "abc"
    answer, pieces = grown("ab 🐈", room=4)
    assert "".join(pieces) == answer.text.strip() == "ab �"


def test_words_that_the_decoder_joins_are_not_shown_too_early(tmp_path: Path) -> None:
    words = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "do", "it", "is", "n't", "'", ",", ".", "##ing", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    hf = BertTokenizerFast(str(tmp_path / "vocab.txt"), clean_up_tokenization_spaces=True)
    pieces: list[str] = []

    def joined(tokens: Sequence[int]) -> str:
        return hf.decode(list(tokens), skip_special_tokens=True)

    answer, stream = Answer(0, joined, {3}, (), 100), Stream(pieces.append)
    wordpieces = ["do", "##ing", "it", "'", "##s", ".", "is", "n't", "it", ",", "do", "n't", "[SEP]"]
    for token in hf.convert_tokens_to_ids(wordpieces):
        answer.add(token)
        stream(answer)
    assert "".join(pieces) == answer.text == "doing it's. isn't it, don't"
