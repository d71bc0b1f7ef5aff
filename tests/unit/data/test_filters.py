"""Filters: the grammar, the same decision for packed and for indexed samples, and exact counts by rule."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import source_folders as made

from megatron_anymal.cli.prepare import main
from megatron_anymal.data.filters import Facts, FilteredError, apply_rules, parse_rules
from megatron_anymal.data.records import DataError
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.data.shard_samples import SampleError


def excluded_by(rules: list[str], facts: Facts) -> str:
    """The rule that excludes a sample; empty if none does."""
    [error] = apply_rules(parse_rules(rules), [facts])
    assert error is None or isinstance(error, FilteredError)
    return error.rule if error else ""


def facts(*media: tuple[str, float, float], text: str = "one two", **columns: Any) -> Facts:
    return Facts(text, media, columns)


@pytest.mark.parametrize(
    ("rule", "kept", "out"),
    [
        # MIO, appendix A: no pair with more than 2:1 aspect ratio or smaller than 224 x 224, no speech above 15 s.
        ("max_aspect=2", facts(("image", 448, 224)), facts(("image", 449, 224))),
        ("max_aspect=2", facts(("image", 224, 448)), facts(("image", 224, 449))),
        ("min_side=224", facts(("image", 224, 900)), facts(("image", 223, 900))),
        ("max_seconds=15", facts(("audio", 15.0, 16_000)), facts(("audio", 15.01, 16_000))),
        ("max_seconds=15", facts(("image", 900, 900)), facts(("image", 9, 9), ("video", 16, 30))),
        ("max_pixels=100", facts(("image", 10, 10)), facts(("image", 5, 5), ("image", 11, 10))),
        ("min_words=3", facts(text="a b  c\n"), facts(text="a b")),
        ("max_characters=3", facts(text="abc"), facts(text="abcd")),
        ("min_column:clip_score=0.28", facts(clip_score=0.28), facts(clip_score="0.27")),
        ("max_column:punsafe=0.5", facts(punsafe=0), facts(punsafe=0.51)),
        ("column:NSFW=UNLIKELY,UNSURE", facts(NSFW="UNSURE"), facts(NSFW="NSFW")),
    ],
)
def test_bounds_are_inclusive(rule: str, kept: Facts, out: Facts) -> None:
    assert excluded_by([rule], kept) == "" and excluded_by([rule], out) == rule
    assert excluded_by(["min_words=0", rule], out) == rule


def test_a_missing_column_is_no_silent_exclusion() -> None:
    for rule, columns in (("min_column:clip=0.3", {"clipp": 1}), ("min_column:clip=0.3", {"clip": "high"})):
        [error] = apply_rules(parse_rules([rule]), [facts(**columns)])
        assert isinstance(error, SampleError) and not isinstance(error, FilteredError)
        assert error.code == "column" and "clip" in str(error)


@pytest.mark.parametrize(
    ("rule", "expected_message"),
    [
        ("min_side", "no `=`"),
        ("side>=256", "'side>' is not a bound"),
        ("min_sied=256", "'min_sied' is not a bound"),
        ("min_side=big", "'big' is not a number"),
        ("min_side=nan", "'nan' is not a number"),
        ("min_column:=1", "'min_column:' is not a bound"),
        ("column:=a", "'column:' is not a bound"),
        ("clip_score=0.3", "not a bound"),
    ],
)
def test_other_rules_are_refused(rule: str, expected_message: str) -> None:
    with pytest.raises(DataError) as error:
        parse_rules(["max_aspect=2", rule])
    assert (
        expected_message in str(error.value)
        and repr(rule) in str(error.value)
        and "min_column:NAME" not in str(error.value)
    )


SIZES = [(40, 30), (90, 30), (20, 20), (64, 64), (64, 20)]
RULES = ["min_side=24", "max_aspect=2", "min_column:score=0.3"]


def expected() -> Counter[str]:
    """The first broken rule of each sample, without the code under test."""
    counts: Counter[str] = Counter()
    for n in range(20):
        short, long = sorted(SIZES[n % 5])
        broken = [short < 24, long / short > 2, n / 20 < 0.3]
        counts[RULES[broken.index(True)] if any(broken) else "kept"] += 1
    return counts


def test_packed_and_indexed_samples_are_filtered_alike(
    tmp_path: Path, tokenizer_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = []
    for n in range(20):
        made.put(tmp_path / f"{n}.jpg", made.jpeg(n, SIZES[n % 5]))
        parts = [{"media": f"{n}.jpg"}, {"text": "one two"}]
        lines.append(json.dumps({"key": f"k{n}", "parts": parts, "score": n / 20}))
    manifest = made.put(tmp_path / "m.jsonl", "\n".join(lines))
    members = [
        (f"k{n}.{ending}", data)
        for n in range(20)
        for ending, data in (
            ("jpg", made.jpeg(n, SIZES[n % 5])),
            ("txt", b"one two"),
            ("json", json.dumps({"score": n / 20}).encode()),
        )
    ]
    made.write_tar(tmp_path / "shards" / "0.tar", members)
    options = [word for rule in RULES for word in ("--filter", rule)] + ["--tokenizer", tokenizer_folder]
    counts = expected()
    kept = counts.pop("kept")
    keys = []
    for folder, words in (
        (tmp_path / "packed", ["--manifest", str(manifest), "--out", str(tmp_path / "packed")]),
        (tmp_path / "shards", ["--index-only", str(tmp_path / "shards")]),
    ):
        # Exclusions are wanted: they do not count as bad.
        assert main([*words, *options, "--workers", "1", "--max-bad-share", "0"]) == 0
        shown = capsys.readouterr().out
        index = ShardIndex(str(folder))
        keys.append([index.key(n) for n in range(len(index))])
        ledger = [json.loads(line) for line in (folder / "index" / "left_out.jsonl").read_text().splitlines()]
        assert Counter(entry["rule"] for entry in ledger) == counts and len(index) == kept
        assert {entry["key"] for entry in ledger} | set(keys[-1]) == {f"k{n}" for n in range(20)}
        by_rule = ", ".join(f"{rule} {count}" for rule, count in counts.most_common())
        assert f"20 samples in = {kept} used + 0 left out + {20 - kept} filtered ({by_rule})" in shown
        written = json.loads((folder / "index" / "index.json").read_text())
        assert written["filtered"] == counts and written["members"]["bad"] == 0
    assert keys[0] == keys[1]
    # Excluded samples are not written.
    assert len(list((tmp_path / "packed").glob("*.tar"))) == 1
    packed = (tmp_path / "packed" / "shard-000000.tar").read_bytes()
    assert packed.count(b".json\0") == kept


def test_a_column_that_no_sample_has_is_named(tmp_path: Path, tokenizer_folder: str) -> None:
    folder = made.img2dataset(tmp_path / "laion")
    words = ["--from", "img2dataset", str(folder), "--filter", "min_column:clip=0.3", "--tokenizer", tokenizer_folder]
    with pytest.raises(DataError, match=r"12 of 12 samples.*no column 'clip'.*--filter.*similarity"):
        main([*words, "--workers", "1"])
