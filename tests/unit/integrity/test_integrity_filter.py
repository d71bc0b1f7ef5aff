"""`anymal prepare --filter integrity=FILE`: violating samples are left out and named, packed or indexed."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import source_folders as made
from integrity_classifiers import digits, image_section, integrity_file, png_of, sentence, text_section

from megatron_anymal.cli.prepare import main
from megatron_anymal.config import DEFAULT_LIMITS, ConfigError
from megatron_anymal.data.filters import Facts
from megatron_anymal.data.records import MediaPart, Part, Sample, TextPart
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.data.shard_samples import SampleError
from megatron_anymal.integrity.sample_filter import SampleFilter

# Samples that violate: by their picture, by the question and by the answer.
PICTURE, QUESTION, ANSWER = {1, 9}, {4, 12}, {6, 13, 14}
COUNT = 18


def samples(folder: Path) -> list[dict[str, Any]]:
    """Rows of a manifest, whose pictures are in the folder."""
    rng = np.random.default_rng(0)
    good, bad = digits(False, 3, COUNT), digits(True, 1, COUNT)
    rows = []
    for n in range(COUNT):
        made.put(folder / f"{n}.png", png_of((bad if n in PICTURE else good)[n]))
        question = {"text": sentence(rng, "zorpal" if n in QUESTION else ""), "loss": False}
        answer = {"text": sentence(rng, "blickum" if n in ANSWER else "")}
        rows.append({"key": f"k{n}", "parts": [{"media": f"{n}.png"}, question, answer]})
    return rows


@pytest.fixture
def integrity(text_model: Path, image_model: Path, tmp_path: Path) -> str:
    sections = {"words": text_section(text_model), "squares": image_section(image_model)}
    return integrity_file(tmp_path / "integrity.yaml", sections)


def test_packed_and_indexed_samples_are_left_out_alike(
    integrity: str, tokenizer_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = samples(tmp_path)
    manifest = made.put(tmp_path / "m.jsonl", "\n".join(map(json.dumps, rows)))
    members = []
    for n, row in enumerate(rows):
        parts = [{"media": "png"}, *row["parts"][1:]]
        document = json.dumps({"parts": parts}).encode()
        members += [(f"k{n}.png", (tmp_path / f"{n}.png").read_bytes()), (f"k{n}.json", document)]
    made.write_tar(tmp_path / "shards" / "0.tar", members)
    rule = f"integrity={integrity}"
    options = ["--filter", "max_side=900", "--filter", rule, "--tokenizer", tokenizer_folder, "--max-bad-share", "0"]
    violating, keys = PICTURE | QUESTION | ANSWER, []
    for folder, words in (
        (tmp_path / "packed", ["--manifest", str(manifest), "--out", str(tmp_path / "packed")]),
        (tmp_path / "shards", ["--index-only", str(tmp_path / "shards")]),
    ):
        assert main([*words, *options]) == 0
        shown = capsys.readouterr()
        index = ShardIndex(str(folder))
        keys.append([index.key(n) for n in range(len(index))])
        ledger = [json.loads(line) for line in (folder / "index" / "left_out.jsonl").read_text().splitlines()]
        assert {row["key"] for row in ledger} == {f"k{n}" for n in violating}
        assert {row["rule"] for row in ledger} == {rule} and {row["code"] for row in ledger} == {"filtered"}
        codes = Counter(row["reason"].partition(f"{rule}: ")[2].partition(" ")[0] for row in ledger)
        assert codes == {"input_image/squares/square": 2, "input_text/words/zorp": 2, "output_text/words/blick": 3}
        kept = COUNT - len(violating)
        assert f"{COUNT} samples in = {kept} used + 0 left out + {len(violating)} filtered" in shown.out
        assert f"integrity: {COUNT} queries checked, 7 rejected (" in shown.err and " s in checks, " in shown.err
    assert keys[0] == keys[1] == [f"k{n}" for n in range(COUNT) if n not in violating]


def test_an_interrupted_packing_continues_unless_the_classifier_changed(
    integrity: str, text_model: Path, tokenizer_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_anymal.data import shard_writer

    manifest = made.put(tmp_path / "m.jsonl", "\n".join(map(json.dumps, samples(tmp_path))))
    words = ["--manifest", str(manifest), "--out", str(tmp_path / "out"), "--samples-per-shard", "6"]
    words += ["--filter", f"integrity={integrity}", "--tokenizer", tokenizer_folder]
    checked, refusals = [], SampleFilter.refusals

    def stop_at(limit: int) -> None:
        def refuse(self: SampleFilter, samples: Any) -> Any:
            if 0 <= limit < len(checked) + len(samples):
                raise KeyboardInterrupt
            checked.extend(samples)
            return refusals(self, samples)

        monkeypatch.setattr(SampleFilter, "refusals", refuse)

    stop_at(14)
    with pytest.raises(KeyboardInterrupt):
        main(words)
    # Two finished shards of six samples are not checked again.
    checked.clear()
    stop_at(-1)
    assert main(words) == 0 and len(checked) == 6
    assert len(ShardIndex(str(tmp_path / "out"))) == COUNT - 7 and shard_writer.is_unfinished(tmp_path / "out") is False
    # With other classifiers, packing starts from the beginning.
    stop_at(len(checked) + 14)
    with pytest.raises(KeyboardInterrupt):
        main([*words, "--overwrite"])
    integrity_file(Path(integrity), {"words": text_section(text_model, threshold=0.4)})
    checked.clear()
    stop_at(-1)
    assert main([*words, "--overwrite"]) == 0 and len(checked) == COUNT


def test_a_sample_that_cannot_be_checked_is_bad(
    integrity: str, tokenizer_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_anymal.integrity.classifiers import TextScorer

    def fail(self: Any, inputs: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(TextScorer, "scores", fail)
    manifest = made.put(tmp_path / "m.jsonl", "\n".join(map(json.dumps, samples(tmp_path))))
    words = ["--manifest", str(manifest), "--out", str(tmp_path / "out"), "--filter", f"integrity={integrity}"]
    with pytest.raises(ValueError, match=r"cannot be used, above --max-bad-share.*input_text/words/failed.*no memory"):
        main([*words, "--tokenizer", tokenizer_folder])


def shards_of(rows: list[dict[str, Any]], folder: Path) -> Path:
    """A folder of one shard with the samples of a manifest."""
    members = []
    for n, row in enumerate(rows):
        document = json.dumps({"parts": [{"media": "png"}, *row["parts"][1:]]}).encode()
        members += [(f"k{n}.png", (folder / f"{n}.png").read_bytes()), (f"k{n}.json", document)]
    made.write_tar(folder / "shards" / "0.tar", members)
    return folder / "shards"


@pytest.mark.parametrize("indexed", [False, True])
def test_samples_checked_together_have_the_results_of_each_alone(
    integrity: str, tokenizer_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indexed: bool
) -> None:
    from megatron_anymal.data import filters
    from megatron_anymal.integrity.classifiers import ImageScorer, TextScorer

    rows = samples(tmp_path)
    # Between the samples of a batch, other rules and defects: files that are too small, cut off, or not pictures.
    tiny = io.BytesIO()
    digits(False, 3, 1)[0].resize((6, 6)).save(tiny, "PNG")
    made.put(tmp_path / "2.png", tiny.getvalue())
    made.put(tmp_path / "9.png", tiny.getvalue())
    whole = (tmp_path / "7.png").read_bytes()
    made.put(tmp_path / "7.png", whole[: len(whole) // 2])
    made.put(tmp_path / "10.png", b"no picture")
    manifest = made.put(tmp_path / "m.jsonl", "\n".join(map(json.dumps, rows)))
    words = ["--filter", "min_words=2", "--filter", f"integrity={integrity}", "--filter", "min_side=8"]
    words += ["--tokenizer", tokenizer_folder, "--max-bad-share", "0.2"]
    calls: Counter[str] = Counter()
    for scorer in (ImageScorer, TextScorer):

        def counted(self: Any, inputs: Any, scores: Any = scorer.scores, name: str = scorer.__name__) -> Any:
            calls[name] += 1
            return scores(self, inputs)

        monkeypatch.setattr(scorer, "scores", counted)
    results, counts = [], []
    for together in (1, 5, 64):
        monkeypatch.setattr(filters, "_TOGETHER", together)
        folder = tmp_path / f"of_{together}"
        calls.clear()
        if indexed:
            shutil.copytree(shards_of(rows, tmp_path), folder)
            assert main(["--index-only", str(folder), *words]) == 0
        else:
            assert main(["--manifest", str(manifest), "--out", str(folder), *words]) == 0
        index = ShardIndex(str(folder))
        keys = [index.key(n) for n in range(len(index))]
        ledger = [json.loads(line) for line in (folder / "index" / "left_out.jsonl").read_text().splitlines()]
        results.append((keys, ledger, [path.read_bytes() for path in sorted(folder.glob("*.tar"))]))
        counts.append(calls.copy())
    assert results[0] == results[1] == results[2]
    codes = {row["key"]: row["code"] for row in results[0][1]}
    assert codes.keys() == {f"k{n}" for n in {2, 7, 10} | PICTURE | QUESTION | ANSWER}
    # The small picture of 9 shows no square; its size is the third rule's business.
    assert codes["k7"] == codes["k10"] == "media" and codes["k2"] == codes["k9"] == "filtered"
    assert [row["key"] for row in results[0][1]] == sorted(codes, key=lambda key: int(key[1:]))
    assert counts[0]["ImageScorer"] > 2 * counts[1]["ImageScorer"] and counts[1] > counts[2]


def test_a_picture_that_cannot_be_decoded_costs_its_sample_alone(integrity: str) -> None:
    """Its header is whole, so that only a decoder finds out, for the whole group at once."""
    good, square = (png_of(digits(bad, seed, 1)[0]) for bad, seed in ((False, 3), (True, 1)))

    def facts(data: bytes) -> Facts:
        parts: list[Part] = [MediaPart("0.png", "image"), TextPart("a plain caption")]
        return Facts("", [("image", 8.0, 8.0)], {}, Sample("parts", (parts,)), lambda _: data)

    first, cut, second = SampleFilter(integrity, DEFAULT_LIMITS).refusals(
        [facts(good), facts(good[: len(good) // 2]), facts(square)]
    )
    assert first == "" and isinstance(second, str) and "squares" in second
    assert isinstance(cut, SampleError) and cut.code == "media"


def test_groups_of_samples_end_at_either_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_anymal.data import filters

    rule: Any = filters.Rule("integrity=x", "integrity", check=object())  # type: ignore[arg-type]
    monkeypatch.setattr(filters, "_TOGETHER", 3)
    monkeypatch.setattr(filters, "_TOGETHER_BYTES", 10)
    sizes = [1, 1, 1, 9, 1, 20, 5, 4]
    assert list(filters.checked_together([rule], sizes, int)) == [[1, 1, 1], [9, 1], [20], [5, 4]]
    assert list(filters.checked_together([], sizes, int)) == [[size] for size in sizes]


@pytest.mark.parametrize("unchecked", [[], ["codes"]])
def test_codes_pass_only_if_the_file_says_so(
    text_model: Path, image_model: Path, tokenizer_folder: str, tmp_path: Path, unchecked: list[str]
) -> None:
    sections = {"words": text_section(text_model), "squares": image_section(image_model)}
    file = integrity_file(tmp_path / "integrity.yaml", sections, unchecked_media=unchecked)
    codes = io.BytesIO()
    np.save(codes, np.arange(3))
    members = [("a.picture.codes.npy", codes.getvalue()), ("a.txt", b"what is this"), ("b.txt", b"what is this")]
    made.write_tar(tmp_path / "shards" / "0.tar", members)
    words = ["--index-only", str(tmp_path / "shards"), "--tokenizer", tokenizer_folder, "--text-only"]
    assert main([*words, "--filter", f"integrity={file}", "--max-bad-share", "0"]) == 0
    index = ShardIndex(str(tmp_path / "shards"))
    assert [index.key(n) for n in range(len(index))] == (["a", "b"] if unchecked else ["b"])
    if not unchecked:
        [row] = map(json.loads, (tmp_path / "shards" / "index" / "left_out.jsonl").read_text().splitlines())
        assert row["key"] == "a" and "input_image/unchecked" in row["reason"]


def test_a_missing_file_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file '/none\.yaml'"):
        main(["--manifest", "/none.jsonl", "--out", "x", "--tokenizer", "y", "--filter", "integrity=/none.yaml"])
