"""Conversations and preference pairs in shards, in the index, and in the output of `anymal inspect`."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from manifests import shards_of
from numpy.lib.recfunctions import drop_fields
from replicas import replica_data
from tiny import CHAT, SPECIAL, flac, make_config, make_conversations, npy, png

from megatron_anymal.cli.inspect import main
from megatron_anymal.data.index_builder import IndexOptions
from megatron_anymal.data.index_folder import make_index
from megatron_anymal.data.manifest import write_shards
from megatron_anymal.data.planner import BatchLayout, BatchPlanner
from megatron_anymal.data.records import DataError, MediaPart, TextPart
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.data.tokenizer import Tokenizer

FILES = {"a.png": png(1), "b.flac": flac(2), "c.npy": npy(3)}
ASKED = [
    {"role": "system", "content": "this is a sound"},
    {"role": "user", "content": [{"text": "what is"}, {"media": "a.png"}, {"text": "of"}, {"media": "b.flac"}]},
    {"role": "assistant", "content": "one two"},
    {"role": "user", "content": [{"media": "c.npy", "modality": "imu", "rate": 50}]},
]
LINES = [
    {"key": "told", "messages": [*ASKED, {"role": "assistant", "content": "walk"}], "source": "somewhere"},
    {"key": "pair", "messages": ASKED, "chosen": "run", "rejected": {"role": "assistant", "content": "walk a walk"}},
    {"key": "parts", "parts": [{"text": "what", "loss": False}, {"media": "a.png"}, {"text": "zero"}]},
]
# Tokens around a content: its header (start, role, end) and the end of the turn.
AROUND = 4
PROMPT_TOKENS = 1 + 4 * AROUND + 4 + 3 + 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> str:
    """A folder with one sample of each kind."""
    return shards_of(tmp_path_factory.mktemp("shards") / "mixed", tokenizer_folder, LINES, FILES)


def test_a_manifest_of_every_kind_comes_back(folder: str) -> None:
    index = ShardIndex(folder)
    assert [index.key(n) for n in range(3)] == ["told", "pair", "parts"]
    assert index.sample_kinds() == {"parts": 1, "messages": 1, "preference": 1}
    conversation, pair, parts = (index.sample(n) for n in range(3))
    assert [s.kind for s in (conversation, pair, parts)] == ["messages", "preference", "parts"]
    assert [len(s.documents) for s in (conversation, pair, parts)] == [1, 2, 1]
    for number, documents in ((0, conversation.documents), (1, pair.documents)):
        for document in documents:
            media = [part for part in document if isinstance(part, MediaPart)]
            assert [(m.modality, dict(m.attributes)) for m in media] == [
                ("image", {}),
                ("audio", {}),
                ("imu", {"rate": 50}),
            ]
            assert [m.data for m in index.read_media(number, document, range(3))] == list(FILES.values())
    assert pair.documents[0][:-2] == pair.documents[1][:-2]
    assert [d[-2] for d in pair.documents] == [TextPart(text) for text in ("run", "walk a walk")]
    assert index.parts(2) == list(parts.documents[0])
    with pytest.raises(DataError, match=r"'told'.*is a conversation.*`parts`"):
        index.parts(0)


def test_tokens_and_targets_of_every_document_are_counted(folder: str) -> None:
    tokens, targets = ShardIndex(folder).lengths(np.array([2, 0, 1]))
    # begin, what, zero, end; the turns with the tokens around their words.
    assert tokens.tolist() == [
        [4, 0],
        [PROMPT_TOKENS + AROUND + 1, 0],
        [PROMPT_TOKENS + AROUND + 1, PROMPT_TOKENS + AROUND + 3],
    ]
    # Both answers of the conversation with their end tokens; only the last answers of the pair.
    assert targets.tolist() == [[2, 0], [3 + 2, 0], [2, 4]]


def tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def test_plain_shards_with_messages(tmp_path: Path, tokenizer_folder: str) -> None:
    conversation = {
        "messages": [{"role": "user", "content": [{"media": "Left.png"}]}, {"role": "assistant", "content": "one"}]
    }
    members = {
        "k.json": json.dumps(conversation).encode(),
        "k.left.png": png(1),
        "x.json": b'{"url": 1}',
        "x.txt": b"one",
    }
    tar(tmp_path / "f" / "0.tar", members)
    make_index(str(tmp_path / "f"), IndexOptions(tokenizer_folder))
    index = ShardIndex(str(tmp_path / "f"))
    assert [index.sample(n).kind for n in range(2)] == ["messages", "parts"]
    assert index.read_media(0, index.sample(0).documents[0], [0])[0].data == png(1)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (LINES[0], ["'k'", "'a.png'", "not in the shard"]),
        ({"messages": ASKED, "chosen": "one"}, ["'k'", "`rejected` is missing"]),
        ({"messages": ASKED[:2]}, ["'k'", "no assistant turn"]),
    ],
)
def test_wrong_samples_of_a_shard_are_named(
    value: dict[str, Any], words: list[str], tmp_path: Path, tokenizer_folder: str
) -> None:
    tar(tmp_path / "f" / "0.tar", {"k.json": json.dumps(value).encode()})
    with pytest.raises(DataError) as error:
        make_index(str(tmp_path / "f"), IndexOptions(tokenizer_folder))
    assert all(word in str(error.value) for word in ["1 of 1", *words])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (LINES[0], ["manifest.jsonl:2", "no media file", "a.png"]),
        (
            {"messages": [{"role": "user", "content": "x"}], "rejected": "y"},
            ["manifest.jsonl:2", "`chosen` is missing"],
        ),
        ({"key": "x"}, ["manifest.jsonl:2", "`parts`, `messages`, or `media` and `text`"]),
    ],
)
def test_wrong_lines_of_a_manifest_are_named(line: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_text('{"parts": [{"text": "one"}]}\n' + json.dumps(line))
    with pytest.raises(DataError) as error:
        write_shards(str(path), str(tmp_path / "out"))
    assert all(word in str(error.value) for word in words)


def test_a_tokenizer_without_the_format_is_refused(folder: str, tokenizer_folder: str, tmp_path: Path) -> None:
    copy, other = (
        shutil.copytree(folder, tmp_path / "copy"),
        Path(shutil.copytree(tokenizer_folder, tmp_path / "other")),
    )
    for file in other.iterdir():
        file.write_text(file.read_text().replace(CHAT[2], "<|stop|>"))
    with pytest.raises(DataError, match=r"2 of 3.*'told'.*/other'.*'<\|eot_id\|>'"):
        make_index(str(copy), IndexOptions(str(other)))


def test_an_index_of_version_1_still_serves(mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> None:
    old = Path(shutil.copytree(mixed_shards, tmp_path / "old"))
    samples = np.load(old / "index" / "samples.npy")
    added = ["kind", "rejected_tokens", "rejected_targets"]
    np.save(old / "index" / "samples.npy", np.array(drop_fields(samples, added, usemask=False)))
    header = old / "index" / "index.json"
    body = json.loads(header.read_text())
    del body["content"]
    header.write_text(json.dumps({**body, "version": 1}, indent=1))
    old_index, wanted = ShardIndex(str(old)), ShardIndex(mixed_shards)
    assert old_index.header.version == 1 and set(old_index.samples.dtype.names or ()).isdisjoint(added)
    assert old_index.sample_kinds() == {"parts": len(wanted)}
    assert all(old_index.sample(n) == wanted.sample(n) for n in range(len(wanted)))
    plans = []
    for folder in (str(old), mixed_shards):
        planner = replica_data(make_config(folder, tokenizer_folder, tmp_path / "run")).planner
        assert bool(planner.content()) == (folder == mixed_shards)
        plans.append([planner.plan(step).of_replica(0) for step in range(5)])
    assert plans[0] == plans[1]
    # The header that a run records is unchanged.
    accounting = ("members", "left_out", "limits", "options", "counts", "content")
    written = {k: v for k, v in json.loads(header.read_text()).items() if k not in accounting}
    assert old_index.header.to_json(40, 40) == json.dumps(written, indent=1)
    assert main([str(old), "--tokenizer", tokenizer_folder]) == 0


def test_a_run_names_the_kinds_it_learns_from(folder: str, tokenizer_folder: str) -> None:
    config = make_config(folder, tokenizer_folder, Path("run"))
    layout = BatchLayout(1, 1, 64)

    def plan(*kinds: str) -> BatchPlanner:
        return BatchPlanner(
            config.data.train, [], Tokenizer(tokenizer_folder), layout, global_batch_size=1, seed=0, sample_kinds=kinds
        )

    with pytest.raises(DataError, match=r"contains samples with `messages`.* with `chosen` and `rejected`\."):
        plan("preference")
    with pytest.raises(
        DataError, match=r"contains samples with `chosen` and `rejected`.* with `parts` or `messages`\."
    ):
        plan("messages", "parts")
    # The next error: no modality for the images.
    with pytest.raises(DataError, match="no modality is configured"):
        plan("messages", "parts", "preference")


def test_inspect_shows_conversations_and_pairs(
    folder: str, tokenizer_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([folder, "--tokenizer", tokenizer_folder]) == 0
    shown = capsys.readouterr().out
    assert "(conversations 1, preference pairs 1)" in shown and "none bad" in shown
    pair = 2 * PROMPT_TOKENS + 2 * AROUND + 4
    assert f"min 4, median {PROMPT_TOKENS + AROUND + 1}," in shown and f"max {pair}" in shown
    values = make_config(folder, tokenizer_folder, tmp_path / "run").to_dict()
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"defaults": ["anymal", "_self_"], **values}))
    assert main(["--config-name=tiny", f"--config-path={tmp_path}", "--sample", "pair"]) == 0
    _, chosen, rejected = capsys.readouterr().out.replace("  rejected:", "  chosen:").split("  chosen:")
    end = CHAT[2]
    for text, answer in ((chosen, ["run", end]), (rejected, ["walk", "a", "walk", end])):
        targets = [line.split("'")[1] for line in text.splitlines() if line.endswith("'  target")]
        assert targets == answer
        assert all(f"{placeholder} x 2" in text for placeholder in SPECIAL[2:5])
        assert f"{PROMPT_TOKENS + 6 + AROUND - 1 + len(answer)} tokens, {len(answer)} targets" in text
    assert main([folder, "--tokenizer", tokenizer_folder, "--sample", "told"]) == 0
    shown = capsys.readouterr().out
    assert "text   target  'one two'" in shown and r"'<|start_header_id|>user<|end_header_id|>\n\n'" in shown
    assert "chosen" not in shown


def test_inspect_finds_counts_that_are_not_the_index_s(
    folder: str, tokenizer_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    samples = np.load(copy / "index" / "samples.npy")
    samples["rejected_targets"][1] += 1
    np.save(copy / "index" / "samples.npy", samples)
    assert main([str(copy), "--tokenizer", tokenizer_folder]) == 1
    assert "bad: pair: it has" in capsys.readouterr().out


def test_shards_of_conversations_are_all_read(tmp_path: Path, tokenizer_folder: str) -> None:
    for pairs, kind in ((False, "messages"), (True, "preference")):
        made = make_conversations(tmp_path / kind, tokenizer_folder, 10, pairs=pairs)
        assert ShardIndex(made).sample_kinds() == {kind: 10}
        assert main([made, "--tokenizer", tokenizer_folder]) == 0
