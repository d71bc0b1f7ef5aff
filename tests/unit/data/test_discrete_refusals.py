"""Codes that cannot be used: each is named, with its sample and the fix."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from codes import codes, item, with_codes
from manifests import shards_of
from replicas import replica_data
from tars import write_tar
from tiny import make_config, png

from megatron_anymal.config import RunConfig
from megatron_anymal.data.chat_format import parse_conversation
from megatron_anymal.data.codes import read_codes
from megatron_anymal.data.index_builder import IndexOptions
from megatron_anymal.data.index_folder import make_index
from megatron_anymal.data.records import DataError
from megatron_anymal.data.samples import parse_sample
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.modalities import MediaError


def run(tmp_path: Path, tokenizer: str, file: bytes, modality: str, **more: Any) -> RunConfig:
    """One sample, `k`, with one item."""
    parts = [item("a", modality, **more), {"text": "one"}]
    folder = shards_of(tmp_path / "data", tokenizer, [{"key": "k", "parts": parts}], {"a.codes.npy": file})
    config = with_codes(make_config(folder, tokenizer, tmp_path / "run"))
    config.model.global_batch_size = 1
    return config


@pytest.mark.parametrize(
    ("values", "modality", "says"),
    [
        ([1, 5, 0], "picture", r"has the code 5 at position 1, outside codebook 0 of 'picture', .* 0 to 4; encode it"),
        ([1, 0], "picture", "has 2 codes per codebook, but model.discrete.picture.codes_per_item=3 means 3; encode it"),
        ([[1, 1], [0, 4]], "speech", r"has the code 4 at position 1, outside codebook 1 of 'speech'.* 0 to 3"),
    ],
)
def test_a_bad_item_costs_its_sample(
    values: Any, modality: str, says: str, tmp_path: Path, tokenizer_folder: str
) -> None:
    data = replica_data(run(tmp_path, tokenizer_folder, codes(values), modality))
    [plan] = data.planner.plan(0).of_replica(0)
    batch = data.reader[plan]
    assert list(batch.bad) == [0] and "mix/k: media '0.codes.npy'" in batch.bad[0]
    assert batch.loss_mask.sum() == 0
    assert re.search(says, batch.bad[0])


@pytest.mark.parametrize(
    ("file", "says"),
    [
        (codes([1.5], "float32"), "has values of type float32; codes are integers, such as int16"),
        (codes([True], "bool"), "has values of type bool"),
        (codes([[[1]]]), r"has the shape \(1, 1, 1\); codes have the shape \[codes\] or \[codebooks, codes\]"),
        (codes(3), r"has the shape \(\)"),
        (codes([]), r"has the shape \(0,\), without any codes"),
        (codes([0, -2]), "has the code -2; codes count from 0"),
        (codes([2**63], "uint64"), "has the code 9223372036854775808"),
        (b"no array", "is not an .npy file of codes"),
        (b"", "is not an .npy file of codes"),
        (codes(list(range(50)))[:-3], "is not an .npy file of codes"),
    ],
)
def test_files_that_are_not_codes(file: bytes, says: str) -> None:
    with pytest.raises(MediaError, match=says):
        read_codes(file)


def test_archives_and_objects_are_not_codes() -> None:
    for save in (lambda f: np.savez(f, a=[1]), lambda f: np.save(f, np.array([{}]), allow_pickle=True)):
        file = io.BytesIO()
        save(file)
        with pytest.raises(MediaError, match=r"is not an .npy file|has values of type"):
            read_codes(file.getvalue())


def test_an_index_leaves_unreadable_codes_out_by_name(tmp_path: Path, tokenizer_folder: str) -> None:
    members = [
        *[("g.picture.codes.npy", codes([1, 0, 4])), ("g.txt", b"one")],
        *[("b.picture.codes.npy", codes([0.5], "float64")), ("b.txt", b"one")],
    ]
    write_tar(tmp_path / "0.tar", members)
    make_index(str(tmp_path), IndexOptions(tokenizer_folder), max_bad_share=0.5)
    [entry] = ShardIndex(str(tmp_path)).left_out()
    assert (entry.key, entry.code) == ("b", "media")
    assert "its member 'picture.codes.npy' has values of type float64" in entry.reason


@pytest.mark.parametrize(
    ("modality", "values", "says"),
    [
        ("music", [1], r"has codes of 'music', but model.discrete has: picture, speech. Add model.discrete.music"),
        ("", [1], r"has codes without a name, but model.discrete has several sections \(picture, speech\)"),
        ("picture", [[1, 0, 4]] * 2, r"'picture' with 2 codebook\(s\), but model.discrete.picture.codebooks has 1"),
        ("picture", [1, 0, 4], "'picture' of the tokenizer 'old', but model.discrete.picture.tokenizer_hash=new"),
    ],
)
def test_codes_that_no_section_fits_stop_a_run(
    modality: str, values: Any, says: str, tmp_path: Path, tokenizer_folder: str
) -> None:
    config = run(tmp_path, tokenizer_folder, codes(values), modality, tokenizer_hash="old")
    config.model.discrete["picture"].tokenizer_hash = "new" if "hash" in says else ""
    with pytest.raises(DataError, match=says):
        replica_data(config)


def test_codes_of_an_unknown_tokenizer_stop_a_run(tmp_path: Path, tokenizer_folder: str) -> None:
    config = run(tmp_path, tokenizer_folder, codes([1, 0, 4]), "picture")
    config.model.discrete["picture"].tokenizer_hash = "new"
    with pytest.raises(DataError, match=r"of an unknown tokenizer.*--attribute picture.tokenizer_hash=new"):
        replica_data(config)
    make_index(
        config.data.train["mix"].path, IndexOptions(tokenizer_folder, attributes={"picture": {"tokenizer_hash": "new"}})
    )
    replica_data(config)


def test_a_run_without_discrete_media_refuses_codes(tmp_path: Path, tokenizer_folder: str) -> None:
    config = run(tmp_path, tokenizer_folder, codes([1, 0, 4]), "picture")
    config.model.discrete = {}
    with pytest.raises(DataError, match=r"has codes of 'picture', but model.discrete has: none. Add"):
        replica_data(config)


def test_an_answer_needs_every_codebook(tmp_path: Path, tokenizer_folder: str) -> None:
    """A recording whose content codebook alone is stored can be understood, but not learned."""
    replica_data(run(tmp_path / "a", tokenizer_folder, codes([1, 2]), "speech"))
    with pytest.raises(DataError, match=r"with 1 codebook.*has 2, of which an answer needs 2"):
        replica_data(run(tmp_path / "b", tokenizer_folder, codes([1, 2]), "speech", loss=True))


def test_parts_and_turns() -> None:
    with pytest.raises(DataError, match="the `loss` of codes must be true or false"):
        parse_sample({"parts": [item("a", "picture", loss=1), {"text": "one"}]}, "k")
    with pytest.raises(DataError, match="it has no text, so there is nothing to learn"):
        parse_sample({"parts": [item("a", "picture")]}, "k")
    answer = {"role": "assistant", "content": [{"media": "x.png"}]}
    with pytest.raises(DataError, match=r"cannot be targets unless they are codes.*--encode"):
        parse_conversation({"messages": [{"role": "user", "content": "a"}, answer]}, "k")


def test_a_name_that_a_section_cannot_have(tmp_path: Path, tokenizer_folder: str) -> None:
    write_tar(
        tmp_path / "0.tar", [("k.a:b.codes.npy", codes([1])), ("k.txt", b"one"), ("l.png", png(1)), ("l.txt", b"a")]
    )
    make_index(str(tmp_path), IndexOptions(tokenizer_folder), max_bad_share=0.5)
    [entry] = ShardIndex(str(tmp_path)).left_out()
    assert "has the modality 'a:b'" in entry.reason
