"""Tokens of a document: text, id, position, whether they are targets, and media at their positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_anymal.cli.data_page.contents import ShownPack, ShownSample
from megatron_anymal.cli.data_page.markup import count, text, token_text
from megatron_anymal.cli.data_page.numbers import RunView
from megatron_anymal.data.discrete_vocabulary import DiscreteVocabulary

# Tokens at the start and at the end of a long document that are shown; a media item counts as one.
FIRST, LAST = 300, 100


@dataclass(frozen=True)
class TokenEntry:
    """A token, or the soft tokens of a media item."""

    # HTML.
    shown: str
    # Number of tokens.
    tokens: int
    # Number of these tokens that are targets.
    targets: int


def document(view: RunView, pack: ShownPack, sample: ShownSample, span: slice, anchor: str, first: int = 0) -> str:
    """The tokens of one document of a sample, or of a prompt or an answer that continues it.

    A token is marked as a target if the loader's loss mask is 1 at the position before it, which predicts it.

    Args:
        span: its positions in the pack.
        anchor: start of the link targets of the sample's media.
        first: position of the first token in its document.
    """
    entries = list(_entries(view, pack, sample, span, anchor, first))
    if len(entries) > FIRST + LAST:
        hidden = entries[FIRST:-LAST]
        tokens, targets = sum(e.tokens for e in hidden), sum(e.targets for e in hidden)
        gap = f"<span class=gap>{count(tokens)} tokens not shown, {count(targets)} of them targets</span>"
        entries[FIRST:-LAST] = [TokenEntry(gap, tokens, targets)]
    return f"<div class=tokens>{''.join(entry.shown for entry in entries)}</div>"


def _entries(
    view: RunView, pack: ShownPack, sample: ShownSample, span: slice, anchor: str, first: int
) -> Iterator[TokenEntry]:
    ids = pack.micro_batch.tokens[0, span].tolist()
    # The mask at a position applies to the next token.
    target = [False, *(value > 0 for value in pack.micro_batch.loss_mask[0, span].tolist()[:-1])]
    lengths = _soft_tokens(view, sample)
    placeholders = {entry.placeholder for entry in view.loaded.values()}
    at = item = 0
    while at < len(ids):
        if ids[at] in placeholders and item < len(lengths):
            yield _media(sample, item, at, lengths[item], ids[at], anchor)
            at, item = at + lengths[item], item + 1
            continue
        if view.codes and ids[at] >= view.codes.vocabulary.base_size:
            entry = _codes(view.codes.vocabulary, ids, at, target[at], first)
            yield entry
            at += entry.tokens
            continue
        shown = token_text(view.tokenizer.hf.decode([ids[at]]))
        tag = "mark" if target[at] else "span"
        yield TokenEntry(f"<{tag}><sup>{first + at}</sup>{shown}<sub>{ids[at]}</sub></{tag}>", 1, int(target[at]))
        at += 1


def _soft_tokens(view: RunView, sample: ShownSample) -> Sequence[int]:
    media = (item.planned for item in sample.media)
    return [item.pieces * view.loaded[item.modality].soft_tokens_per_piece for item in media]


def _codes(vocabulary: DiscreteVocabulary, ids: list[int], at: int, target: bool, first: int) -> TokenEntry:
    """A media item in the form of codes, with its begin and end marks."""
    name = vocabulary.lookup(ids[at]).name
    stop = ids.index(vocabulary.end(name), at) + 1
    length, tag = stop - at, "mark" if target else "span"
    positions = f"<sup>{first + at}\u2013{first + stop - 1}</sup>"
    return TokenEntry(f"<{tag}>{positions}{text(name)}: {count(length - 2)} codes</{tag}>", length, length * target)


def _media(sample: ShownSample, item: int, at: int, length: int, token: int, anchor: str) -> TokenEntry:
    name = text(sample.media[item].planned.modality)
    link = f"<a href='#{anchor}-{item}'><sup>{at}\u2013{at + length - 1}</sup>"
    return TokenEntry(f"{link}{name} {item + 1}: {count(length)} soft tokens<sub>{token}</sub></a>", length, 0)
