"""From the plan to tensors: planned samples, read samples, and the handling of unusable samples."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from manifests import shards_of
from PIL import Image
from replicas import replica_data
from tiny import CHAT, SPECIAL, WORDS, make_config, make_shards, make_tokenizer, png

from megatron_anymal.config import DatasetConfig, RunConfig
from megatron_anymal.data.context_parallel import held_tokens
from megatron_anymal.data.loader import share_out, steps
from megatron_anymal.data.micro_batch import MicroBatch
from megatron_anymal.data.records import DataError, TextPart
from megatron_anymal.data.stage_shares import StageShares
from megatron_anymal.train.build import DataSource


@pytest.fixture
def config(mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> RunConfig:
    return make_config(mixed_shards, tokenizer_folder, tmp_path / "run")


def parts_of(samples: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Manifest lines from a mapping of key -> parts."""
    return [{"key": key, "parts": parts} for key, parts in samples.items()]


def micro_batches(data: DataSource, step: int) -> list[MicroBatch]:
    return [data.reader[m] for m in data.planner.plan(step).of_replica(0)]


def by_position(batches: list[MicroBatch]) -> dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Position in the global batch -> tokens, labels, loss mask."""
    tensors = {}
    for m in batches:
        for sample in m.plan.samples:
            sample_mask = m.sample_positions[0] == sample.position
            tensors[sample.position] = (m.tokens[0, sample_mask], m.labels[0, sample_mask], m.loss_mask[0, sample_mask])
    return tensors


def test_labels_are_the_next_token_and_only_answers_are_targets(config: RunConfig) -> None:
    data = replica_data(config)
    placeholders = {SPECIAL.index(s.placeholder) for s in config.model.modalities.values()}
    targets = 0
    for step in range(10):
        plan = data.planner.plan(step)
        for position, (tokens, labels, mask) in by_position(micro_batches(data, step)).items():
            torch.testing.assert_close(labels[:-1], tokens[1:])
            # A document's last token has no target: its label would be in the next document.
            assert mask[-1] == 0
            is_target = torch.zeros(len(tokens), dtype=torch.bool)
            is_target[1:] = mask[:-1] > 0
            assert not placeholders & set(tokens[is_target].tolist())
            # "what is this" after each media item is a prompt; the text after the last prompt is the answer.
            parts = data.planner.indexes[0].parts(int(plan.sample[position]))
            text = parts[-1]
            assert isinstance(text, TextPart)
            # Vocabulary order: special tokens, the unknown word, the words.
            answer = [len(SPECIAL) + 1 + WORDS.index(word) for word in text.text.split()]
            assert tokens[is_target].tolist() == [*answer, SPECIAL.index(SPECIAL[1])]
            assert int(mask.sum()) == plan.targets[position]
            targets += int(mask.sum())
        assert targets
        padding = [m.loss_mask[0][m.sample_positions[0] < 0] for m in micro_batches(data, step)]
        assert sum(float(p.sum()) for p in padding) == 0


def test_documents_lie_one_after_the_other_and_padding_is_a_document(config: RunConfig) -> None:
    config.model.tensor_model_parallel_size, config.model.sequence_parallel = 2, True
    config.trainer.devices = 2
    data = replica_data(config, tensor_size=2)
    for step in range(5):
        plan = data.planner.plan(step)
        for m in micro_batches(data, step):
            assert m.tokens.shape == (1, plan.padded_length) and plan.padded_length % 2 == 0
            assert sum(m.document_lengths) == plan.padded_length and min(m.document_lengths) > 0
            owners = np.repeat(
                [
                    *[s.position for s in m.plan.samples],
                    *([-1] if len(m.document_lengths) > len(m.plan.samples) else []),
                ],
                m.document_lengths,
            )
            np.testing.assert_array_equal(m.sample_positions[0], owners)


def test_soft_tokens_go_to_the_placeholders_in_the_order_of_the_pieces(config: RunConfig) -> None:
    data = replica_data(config)
    item_count = 0
    for m in micro_batches(data, 0) + micro_batches(data, 1):
        for name, media in m.media.items():
            section = config.model.modalities[name]
            placeholder = SPECIAL.index(section.placeholder)
            assert (m.tokens[0, media.token_index] == placeholder).all()
            assert (
                len(media.token_index)
                == len(media.pieces) * section.projector.num_tokens
                == (m.tokens == placeholder).sum()
            )
            at = 0
            for sample in m.plan.samples:
                index = data.planner.indexes[sample.dataset]
                parts = index.parts(sample.sample)
                for number, planned in enumerate(sample.media):
                    if planned.modality == name:
                        [item] = index.read_media(sample.sample, parts, [number])
                        expected = data.reader._modalities[name].modality.load(
                            item.data, item.extension, item.part.attributes
                        )
                        torch.testing.assert_close(media.pieces[at : at + planned.pieces], expected)
                        at += planned.pieces
                        item_count += 1
            assert at == len(media.pieces)
    assert item_count > 10


@pytest.mark.parametrize(("tensor_size", "context_size"), [(3, 1), (1, 2), (2, 4)])
def test_ranks_share_the_encoding(config: RunConfig, tensor_size: int, context_size: int) -> None:
    sizes = {"tensor_size": tensor_size, "context_size": context_size}
    plans = replica_data(config, **sizes).planner.plan(0).of_replica(0)
    alone = replica_data(config).reader
    readers = [
        [replica_data(config, tensor_rank=t, context_rank=c, **sizes).reader for t in range(tensor_size)]
        for c in range(context_size)
    ]
    for plan in plans:
        for name, media in alone[plan].media.items():
            parts = [[reader[plan].media[name] for reader in row] for row in readers]
            torch.testing.assert_close(torch.cat([p.pieces for row in parts for p in row]), media.pieces)
            shares = tuple(tuple(len(p.pieces) for p in row) for row in parts)
            assert all(p.shares == shares for row in parts for p in row)


@pytest.mark.parametrize("sizes", [{}, {"tensor_size": 2, "tensor_rank": 1}, {"context_size": 2, "context_rank": 1}])
def test_stages_share_the_decoding(config: RunConfig, sizes: dict[str, int]) -> None:
    """Each piece is decoded on one of three stages, and the first stage knows where its soft tokens go."""
    alone = replica_data(config, **sizes)
    parts = [replica_data(config, stage=stage, stages=3, **sizes) for stage in range(3)]
    for part in parts:
        part.planner.share_encoding(StageShares(3, {"image": 2.0, "audio": 1.0, "imu": 1.0}, 4.0))
    decoded = [0, 0, 0]
    for step in range(2):
        plans = parts[0].planner.plan(step).of_replica(0)
        for plan, before in zip(plans, alone.planner.plan(step).of_replica(0), strict=True):
            assert plan.samples == before.samples
            whole, read = alone.reader[before], [part.reader[plan] for part in parts]
            assert list(read[0].media) == list(whole.media)
            for name, media in whole.media.items():
                stage, first = plan.encoder_stage(name), read[0].media[name]
                torch.testing.assert_close(read[stage].media[name].pieces, media.pieces)
                decoded[stage] += len(media.pieces)
                for number, other in enumerate(read):
                    if number and number != stage:
                        assert name not in other.media
                assert stage == 0 or not len(first.pieces)
                assert first.shares == media.shares and torch.equal(first.token_index, media.token_index)
            assert torch.equal(read[0].tokens, whole.tokens) and torch.equal(read[2].labels, whole.labels)
    assert min(decoded[1:]) > decoded[0]


@pytest.mark.parametrize("context_size", [2, 4])
def test_context_parallel_ranks_hold_all_of_a_pack_once(config: RunConfig, context_size: int) -> None:
    plan = replica_data(config, context_size=context_size).planner.plan(0).of_replica(0)[0]
    one = replica_data(config).reader[plan]
    assert all(length % (2 * context_size) == 0 for length in one.document_lengths)
    seen = torch.zeros(one.tokens.size(1), dtype=torch.int64)
    for rank in range(context_size):
        mine = replica_data(config, context_rank=rank, context_size=context_size).reader[plan]
        held = held_tokens(one.document_lengths, rank, context_size)
        seen[held] += 1
        for field in ("tokens", "labels", "loss_mask", "sample_positions"):
            torch.testing.assert_close(getattr(mine, field), getattr(one, field)[:, held])
        for name, media in mine.media.items():
            assert media.soft_index is not None
            # Every held soft token goes to the same position as in the whole pack.
            torch.testing.assert_close(held[media.token_index], one.media[name].token_index[media.soft_index])
    assert seen.eq(1).all()


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("pieces", [0, 1, 4, 17])
def test_share_out_is_even(ranks: int, pieces: int) -> None:
    shares = share_out(pieces, ranks)
    assert len(shares) == ranks and sum(shares) == pieces and max(shares) - min(shares) <= 1


def test_a_text_only_micro_batch(text_shards: str, config: RunConfig) -> None:
    config.data.train["mix"].path = text_shards
    data = replica_data(config)
    for m in micro_batches(data, 0):
        assert m.media == {} and m.bad == {} and m.loss_mask.sum() > 0


def long_and_short(tmp_path: Path, tokenizer: str) -> str:
    samples: dict[str, list[dict[str, Any]]] = {
        f"short{n}": [{"media": "a.png", "modality": "image"}, {"text": f"one {WORDS[n]}"}] for n in range(7)
    }
    samples["long"] = [{"media": "a.png", "modality": "image"}, {"text": "two " * 40}]
    return shards_of(tmp_path / "shards", tokenizer, parts_of(samples), {"a.png": png(0)})


def test_a_sample_too_long_is_refused_by_name(tmp_path: Path, tokenizer_folder: str) -> None:
    config = make_config(long_and_short(tmp_path, tokenizer_folder), tokenizer_folder, tmp_path / "run")
    config.data.seq_length = 40
    # begin, two soft tokens, 40 words, end.
    with pytest.raises(DataError, match=r"1 sample.*seq_length=40.*'mix/long'.*44 tokens.*too_long=drop"):
        replica_data(config)
    config.data.seq_length = 44
    replica_data(config)


def test_a_sample_too_long_is_dropped_and_leaves_the_others_in_place(tmp_path: Path, tokenizer_folder: str) -> None:
    config = make_config(long_and_short(tmp_path, tokenizer_folder), tokenizer_folder, tmp_path / "run")
    whole = replica_data(config)
    config.data.seq_length, config.data.too_long = 40, "drop"
    data = replica_data(config)
    for step in range(4):
        plan, full = data.planner.plan(step), whole.planner.plan(step)
        # Eight samples, batches of eight: the long one occurs once in each batch.
        [dropped_position] = plan.dropped
        assert data.planner.key(0, int(plan.sample[dropped_position])) == "mix/long"
        assert plan.targets[dropped_position] == 0 and full.targets[dropped_position] == 41 and full.dropped == ()
        np.testing.assert_array_equal(plan.sample, full.sample)
        kept, expected = by_position(micro_batches(data, step)), by_position(micro_batches(whole, step))
        assert set(expected) - set(kept) == {dropped_position}
        for position, tensors in kept.items():
            for tensor, wanted in zip(tensors, expected[position]):
                torch.testing.assert_close(tensor, wanted)


def test_a_batch_of_nothing_but_dropped_samples(tmp_path: Path, tokenizer_folder: str) -> None:
    config = make_config(long_and_short(tmp_path, tokenizer_folder), tokenizer_folder, tmp_path / "run")
    config.data.seq_length, config.data.too_long = 2, "drop"
    data = replica_data(config, 2)
    [m] = micro_batches(data, 0)
    assert m.plan.samples == () and m.loss_mask.sum() == 0 and len(data.planner.plan(0).dropped) == 8


def truncated_jpeg() -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "JPEG", quality=95)
    return out.getvalue()[:1500]


def test_unreadable_samples_leave_the_others_as_they_are(tmp_path: Path, tokenizer_folder: str) -> None:
    image = {"media": "a.png", "modality": "image"}
    samples: dict[str, list[dict[str, Any]]] = {f"good{n}": [image, {"text": f"one {WORDS[n]}"}] for n in range(6)}
    # Its header is intact but its pixels are not, so the index accepts it.
    samples["bad-image"] = [{"media": "cut.jpg", "modality": "image"}, {"text": "two"}, image]
    samples["literal"] = [{"text": f"one {SPECIAL[2]} two {SPECIAL[1]}"}, image]
    files = {"a.png": png(0, (64, 64)), "cut.jpg": truncated_jpeg()}
    folder = shards_of(tmp_path / "shards", tokenizer_folder, parts_of(samples), files)
    config = make_config(folder, tokenizer_folder, tmp_path)
    config.data.seq_length = 128
    data = replica_data(config)
    plan = data.planner.plan(0)
    keys = {int(p): data.planner.key(0, int(plan.sample[p])) for p in range(8)}
    batches = micro_batches(data, 0)
    bad = {bad_position: why for m in batches for bad_position, why in m.bad.items()}
    # A placeholder or end token written in a text is ordinary text.
    assert {keys[bad_position] for bad_position in bad} == {"mix/bad-image"}
    # The ledger prepends the sample's name.
    assert all("decoded" in why for why in bad.values())
    for m in batches:
        # Pictures that could not be read keep their positions.
        planned = sum(p.pieces for s in m.plan.samples for p in s.media)
        assert len(m.media["image"].pieces) == planned and len(m.media["image"].token_index) == 2 * planned
        assert torch.isfinite(m.media["image"].pieces).all()
    good = {p for p, key in keys.items() if "good" in key}
    for position, (tokens, _, mask) in by_position(batches).items():
        assert len(tokens) == plan.length[position]
        if position in good:
            assert int(mask.sum()) == plan.targets[position] == 3


def test_a_kind_without_a_modality(config: RunConfig) -> None:
    del config.model.modalities["audio"]
    with pytest.raises(DataError, match=r"contains audio.*imu.*model\.modalities\.audio"):
        replica_data(config)


def test_another_tokenizer(config: RunConfig, tmp_path: Path) -> None:
    config.data.tokenizer = make_tokenizer(tmp_path / "copy")
    replica_data(config)
    file = tmp_path / "copy" / "tokenizer.json"
    body = json.loads(file.read_text())
    body["model"]["vocab"]["seven"], body["model"]["vocab"]["eight"] = (
        body["model"]["vocab"]["eight"],
        body["model"]["vocab"]["seven"],
    )
    file.write_text(json.dumps(body))
    with pytest.raises(DataError, match=r"different tokenizer.*--index-only"):
        replica_data(config)


def test_unusable_tokenizers_and_placeholders(config: RunConfig, tmp_path: Path) -> None:
    config.data.tokenizer = str(tmp_path / "none")
    with pytest.raises(DataError, match="no folder"):
        replica_data(config)
    (tmp_path / "empty").mkdir()
    config.data.tokenizer = str(tmp_path / "empty")
    with pytest.raises(DataError, match=r"data\.tokenizer"):
        replica_data(config)


@pytest.mark.parametrize("token", ["<|no_such_token|>", SPECIAL[0], SPECIAL[1], *CHAT])
def test_a_placeholder_must_be_a_reserved_token(config: RunConfig, token: str) -> None:
    config.model.modalities["image"].placeholder = token
    with pytest.raises(DataError, match=r"model\.modalities\.image\.placeholder"):
        replica_data(config)


def test_no_dataset(config: RunConfig) -> None:
    config.data.train = {}
    with pytest.raises(DataError, match=r"data\.train\.NAME\.path"):
        replica_data(config)


def test_datasets_mix_by_weight(config: RunConfig, text_shards: str) -> None:
    config.data.train["text"] = DatasetConfig(path=text_shards, weight=3.0)
    planner = replica_data(config).planner
    dataset = np.concatenate([planner.plan(step).dataset for step in range(128)])
    assert abs(int((dataset == 1).sum()) - 768) <= 1
    assert planner.key(1, 0) == "text/text-00000"


def test_fingerprint_changes_with_what_decides_the_samples(config: RunConfig, text_shards: str) -> None:
    def fingerprint(**changes: Any) -> str:
        for name, value in changes.items():
            setattr(config.model, name, value)
        return replica_data(config).planner.fingerprint()

    prints = [fingerprint(), fingerprint(seed=5), fingerprint(global_batch_size=4)]
    config.data.train["mix"].weight = 2.0
    prints.append(fingerprint())
    config.data.train["text"] = DatasetConfig(path=text_shards)
    prints.append(fingerprint())
    assert len(set(prints)) == 5
    config.data.seq_length, config.model.micro_batch_size = 100, 2
    assert fingerprint() == prints[-1] == replica_data(config, 3).planner.fingerprint()


def test_no_steps(config: RunConfig) -> None:
    data = replica_data(config)
    assert list(steps(data.planner, data.reader, replica=0, start=3, stop=3, num_workers=0, prefetch_steps=1)) == []


def test_long_samples_are_found_in_a_folder_of_many(tmp_path: Path, tokenizer_folder: str) -> None:
    folder = make_shards(tmp_path / "s", tokenizer_folder, 30, ("text", "image"))
    config = make_config(folder, tokenizer_folder, tmp_path / "run")
    planner = replica_data(config).planner
    plans = [planner.plan(step) for step in range(30)]
    by_sample = {int(s): int(n) for plan in plans for s, n in zip(plan.sample, plan.length)}
    lengths = np.array([by_sample[s] for s in range(30)])
    config.data.seq_length = int(lengths.max()) - 1
    with pytest.raises(DataError, match=f"^{int((lengths == lengths.max()).sum())} sample"):
        replica_data(config)
