"""Codes in samples: token ids, targets, labels and planned lengths, against sequences derived by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from codes import codes, item, with_codes
from manifests import shards_of
from replicas import replica_data
from tars import write_tar
from tiny import make_config, png

from megatron_anymal.config import ConfigError, RunConfig
from megatron_anymal.config.discrete_validation import check_discrete
from megatron_anymal.data.codes import PlannedCodes
from megatron_anymal.data.context_parallel import held_tokens
from megatron_anymal.data.index_builder import IndexOptions
from megatron_anymal.data.index_folder import make_index
from megatron_anymal.data.records import SAMPLE_KINDS
from megatron_anymal.data.tokenizer import Document, Tokenizer
from megatron_anymal.planning.layouts.workload import measured_workload
from megatron_anymal.train.objective import TokenObjective

PICTURE, OTHER, SPEECH = codes([1, 0, 4]), codes([[2, 2, 3]]), codes([[1, 2], [3, 0]])
FILES = {"a.codes.npy": PICTURE, "b.codes.npy": OTHER, "s.codes.npy": SPEECH, "x.png": png(1)}


def asked(*content: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def said(*content: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": list(content)}


WHAT = {"text": "what is"}
# Name -> sample, its token ids, and the ids that are learned. one=8, two=9, what=17, is=18; a turn begins with the ids
# 26 6 27 and ends with 28.
SAMPLES: dict[str, tuple[dict[str, Any], list[int], list[int]]] = {
    "caption": (
        {"parts": [item("a", "picture"), {"text": "one two"}]},
        [0, 32, 35, 34, 38, 33, 8, 9, 1],
        [8, 9, 1],
    ),
    "generated": (
        {"parts": [{"text": "one two", "loss": False}, item("a", "picture", loss=True)]},
        [0, 8, 9, 32, 35, 34, 38, 33, 1],
        [32, 35, 34, 38, 33, 1],
    ),
    "interleaved": (
        {"parts": [{"text": "one"}, item("a", "picture", loss=True), {"text": "two"}, item("b", "picture", loss=True)]},
        [0, 8, 32, 35, 34, 38, 33, 9, 32, 36, 36, 37, 33, 1],
        [8, 32, 35, 34, 38, 33, 9, 32, 36, 36, 37, 33, 1],
    ),
    # The content codebook alone.
    "recognized": (
        {"parts": [item("s", "speech"), {"text": "one two"}]},
        [0, 39, 42, 43, 40, 8, 9, 1],
        [8, 9, 1],
    ),
    # Content, then timbre.
    "spoken": (
        {"parts": [{"text": "one two", "loss": False}, item("s", "speech", loss=True)]},
        [0, 8, 9, 39, 42, 43, 48, 45, 40, 1],
        [39, 42, 43, 48, 45, 40, 1],
    ),
    "chat": (
        {"messages": [*asked(WHAT, item("s", "speech")), said({"text": "one"}, item("b", "picture"))]},
        [0, 26, 6, 27, 17, 18, 39, 42, 43, 40, 28, 26, 6, 27, 8, 32, 36, 36, 37, 33, 28],
        [8, 32, 36, 36, 37, 33, 28],
    ),
    "spoken chat": (
        {"messages": [*asked(item("s", "speech")), said(item("s", "speech"))]},
        [0, 26, 6, 27, 39, 42, 43, 40, 28, 26, 6, 27, 39, 42, 43, 48, 45, 40, 28],
        [39, 42, 43, 48, 45, 40, 28],
    ),
    # A continuous image, two soft tokens, beside codes.
    "mixed": (
        {"messages": [*asked({"media": "x.png"}, item("a", "picture")), said(item("b", "picture"))]},
        [0, 26, 6, 27, 2, 2, 32, 35, 34, 38, 33, 28, 26, 6, 27, 32, 36, 36, 37, 33, 28],
        [32, 36, 36, 37, 33, 28],
    ),
    # Names of marks and codes in a text are the text: </ picture > < picture : 0 : 1 >.
    "literal": (
        {"parts": [{"text": "</picture> <picture:0:1> one"}, item("a", "picture", loss=True)]},
        [0, *[6] * 10, 8, 32, 35, 34, 38, 33, 1],
        [*[6] * 10, 8, 32, 35, 34, 38, 33, 1],
    ),
}


@pytest.fixture(autouse=True)
def every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pairs be planned, which no job but DPO does."""
    monkeypatch.setattr(TokenObjective, "sample_kinds", SAMPLE_KINDS)


def run(tmp_path: Path, tokenizer: str, lines: list[dict[str, Any]]) -> RunConfig:
    config = with_codes(make_config(shards_of(tmp_path / "data", tokenizer, lines, FILES), tokenizer, tmp_path / "run"))
    config.model.global_batch_size = len(lines)
    return config


def read(config: RunConfig, **layout: int) -> dict[str, list[tuple[list[int], list[int]]]]:
    """Key -> token ids and learned ids of each document, through index, plan and loader."""
    data = replica_data(config, **layout)
    documents_by_key = {}
    for plan in data.planner.plan(0).of_replica(0):
        batch = data.reader[plan]
        assert not batch.bad, batch.bad
        for sample in plan.samples:
            documents = []
            for number, length in enumerate(sample.documents):
                own = (batch.sample_positions[0] == sample.position) & (batch.branch[0] == number)
                tokens, mask = batch.tokens[0, own].tolist()[:length], batch.loss_mask[0, own][:length].bool()
                documents.append((tokens, batch.labels[0, own][:length][mask].tolist()))
            assert sum(len(learned) for _, learned in documents) == sample.targets
            documents_by_key[data.planner.key(sample.dataset, sample.sample).split("/")[1]] = documents
    return documents_by_key


@pytest.mark.parametrize("name", SAMPLES)
def test_tokens_and_labels_are_those_derived_by_hand(name: str, tmp_path: Path, tokenizer_folder: str) -> None:
    sample, tokens, learned = SAMPLES[name]
    config = run(tmp_path, tokenizer_folder, [{"key": "k", **sample}])
    assert read(config)["k"] == [(tokens, learned)]


def test_the_answers_of_a_pair_have_codes_of_their_own(tmp_path: Path, tokenizer_folder: str) -> None:
    earlier = [*asked(WHAT), said(item("s", "speech")), *asked(item("a", "picture"))]
    pair = {"messages": earlier, "chosen": [item("b", "picture")], "rejected": [{"text": "one"}, item("s", "speech")]}
    config = run(tmp_path, tokenizer_folder, [{"key": "k", **pair}, {"key": "c", **SAMPLES["chat"][0]}])
    config.data.seq_length = 128
    # An earlier answer has all codebooks, as when it was generated, but is not learned.
    turn = [26, 6, 27]
    prompt = [0, *turn, 17, 18, 28, *turn, 39, 42, 43, 48, 45, 40, 28, *turn, 32, 35, 34, 38, 33, 28, *turn]
    chosen, rejected = [32, 36, 36, 37, 33, 28], [8, 39, 42, 43, 48, 45, 40, 28]
    assert read(config)["k"] == [([*prompt, *chosen], chosen), ([*prompt, *rejected], rejected)]
    [sample] = [s for s in replica_data(config).planner.plan(0).of_replica(0)[0].samples if len(s.documents) == 2]
    assert sample.documents == (len(prompt) + 6, len(prompt) + 8)
    assert sample.targets == 14


def test_settings_of_codebooks(tmp_path: Path, tokenizer_folder: str) -> None:
    lines = [{"key": name, **SAMPLES[name][0]} for name in ("recognized", "spoken")]
    config = run(tmp_path, tokenizer_folder, lines)
    config.model.discrete["speech"].interleaving = "alternating"
    config.model.discrete["speech"].prompt_codebooks = 0
    documents_by_key = read(config)
    assert documents_by_key["recognized"][0][0] == [0, 39, 42, 48, 43, 45, 40, 8, 9, 1]
    assert documents_by_key["spoken"][0][0] == [0, 8, 9, 39, 42, 48, 43, 45, 40, 1]


def test_packs_of_all_samples_in_two_layouts(tmp_path: Path, tokenizer_folder: str) -> None:
    lines = [{"key": name.replace(" ", "_"), **sample} for name, (sample, _, _) in SAMPLES.items()]
    config = run(tmp_path, tokenizer_folder, lines)
    expected = {name.replace(" ", "_"): [(tokens, learned)] for name, (_, tokens, learned) in SAMPLES.items()}
    assert read(config) == expected
    whole = replica_data(config)
    for rank in range(2):
        part = replica_data(config, context_rank=rank, context_size=2)
        [plan] = part.planner.plan(0).of_replica(0)[:1]
        alone, own = whole.reader[plan], part.reader[plan]
        held = held_tokens(alone.document_lengths, rank, 2)
        for name in ("tokens", "labels", "loss_mask"):
            torch.testing.assert_close(getattr(own, name), getattr(alone, name)[:, held])


def test_members_name_their_section_and_tokenizer(tmp_path: Path, tokenizer_folder: str) -> None:
    """The names of several media of a sample: numbered, and with the section in the ending."""
    members = [("k.0.speech.codes.npy", SPEECH), ("k.1.picture.codes.npy", PICTURE), ("k.txt", b"one")]
    write_tar(tmp_path / "data" / "0.tar", members)
    make_index(str(tmp_path / "data"), IndexOptions(tokenizer_folder, attributes={"speech": {"tokenizer_hash": "ab"}}))
    config = with_codes(make_config(str(tmp_path / "data"), tokenizer_folder, tmp_path / "run"))
    config.model.global_batch_size = 1
    config.model.discrete["speech"].tokenizer_hash = "ab"
    assert read(config)["k"] == [([0, 39, 42, 43, 40, 32, 35, 34, 38, 33, 8, 1], [8, 1])]


def test_codes_without_a_name_belong_to_the_only_section(tmp_path: Path, tokenizer_folder: str) -> None:
    write_tar(tmp_path / "data" / "0.tar", [("k.codes.npy", PICTURE), ("k.txt", b"one")])
    make_index(str(tmp_path / "data"), IndexOptions(tokenizer_folder))
    config = with_codes(make_config(str(tmp_path / "data"), tokenizer_folder, tmp_path / "run"))
    config.model.global_batch_size = 1
    del config.model.discrete["speech"]
    assert read(config)["k"] == [([0, 32, 35, 34, 38, 33, 8, 1], [8, 1])]


def test_an_expected_step_counts_codes(tmp_path: Path, tokenizer_folder: str) -> None:
    config = run(tmp_path, tokenizer_folder, [{"key": "k", **SAMPLES["generated"][0]}])
    expected = measured_workload([(config.data.train["mix"].path, 1.0)], [], 2, 64, discrete=config.model.discrete)
    assert (expected.tokens, expected.labels) == (18, 12)


def test_an_option_names_the_section_of_codes(tmp_path: Path, tokenizer_folder: str) -> None:
    write_tar(tmp_path / "data" / "0.tar", [("k.codes.npy", PICTURE), ("k.txt", b"one")])
    make_index(str(tmp_path / "data"), IndexOptions(tokenizer_folder, {"codes.npy": "picture"}))
    config = with_codes(make_config(str(tmp_path / "data"), tokenizer_folder, tmp_path / "run"))
    config.model.global_batch_size = 1
    assert read(config)["k"] == [([0, 32, 35, 34, 38, 33, 8, 1], [8, 1])]


def test_samples_that_are_too_long_count_their_codes(tmp_path: Path, tokenizer_folder: str) -> None:
    config = run(tmp_path, tokenizer_folder, [{"key": "k", **SAMPLES["interleaved"][0]}])
    config.data.seq_length = 14
    replica_data(config)
    config.data.seq_length = 13
    with pytest.raises(ValueError, match="longest is 'mix/k' with 14 tokens"):
        replica_data(config)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [("interleaving", "random", "speech.interleaving='random'"), ("prompt_codebooks", 3, "prompt_codebooks=3 must be")],
)
def test_bad_settings_are_refused(key: str, value: Any, says: str) -> None:
    config = with_codes(RunConfig())
    setattr(config.model.discrete["speech"], key, value)
    with pytest.raises(ConfigError, match=says):
        check_discrete("pretrain", config.model)


def test_planned_lengths_are_exact_for_every_dtype(tmp_path: Path, tokenizer_folder: str) -> None:
    for number, dtype in enumerate(("uint8", "int32", "uint64")):
        write_tar(
            tmp_path / "data" / f"{number}.tar",
            [(f"{number}.picture.codes.npy", codes([1, 0, 4], dtype)), (f"{number}.txt", b"one")],
        )
    make_index(str(tmp_path / "data"), IndexOptions(tokenizer_folder))
    config = with_codes(make_config(str(tmp_path / "data"), tokenizer_folder, tmp_path / "run"))
    config.model.global_batch_size = 3
    assert {tuple(documents[0][0]) for documents in read(config).values()} == {(0, 32, 35, 34, 38, 33, 8, 1)}
    assert np.array_equal(replica_data(config).planner.plan(0).length, [8, 8, 8])


def test_an_end_mark_outside_the_loss_is_caught(
    tmp_path: Path, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run(tmp_path, tokenizer_folder, [{"key": "k", **SAMPLES["generated"][0]}])
    document = Tokenizer.document

    def planted(self: Tokenizer, *arguments: Any, **more: Any) -> Document:
        right = document(self, *arguments, **more)
        learned = [target and token != 33 for token, target in zip(right.tokens, right.is_target)]
        return Document(right.tokens, learned, right.media_starts)

    monkeypatch.setattr(Tokenizer, "document", planted)
    with pytest.raises(AssertionError, match="Rebuild the index"):
        read(config)


def test_a_plan_without_end_marks_is_caught(
    tmp_path: Path, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run(tmp_path, tokenizer_folder, [{"key": "k", **SAMPLES["generated"][0]}])
    monkeypatch.setattr(PlannedCodes, "tokens", lambda self, codes: 1 + codes.astype(np.int64) * self.codebooks)
    with pytest.raises(AssertionError, match="Rebuild the index"):
        read(config)
