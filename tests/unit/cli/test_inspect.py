"""`anymal inspect`: the check of a data folder, and samples as the model sees them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny import SPECIAL, flac, make_config, make_tokenizer
from transformers import PreTrainedTokenizerFast

from megatron_anymal.cli.inspect import main
from megatron_anymal.config import ConfigError, RunConfig
from megatron_anymal.data.planner import BatchPlanner
from megatron_anymal.data.records import DataError, MediaPart
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.parallel import ParallelLayout
from megatron_anymal.train.build import build_data, build_inputs


@pytest.fixture
def folder(mixed_shards: str, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(mixed_shards, tmp_path / "data"))


@pytest.fixture
def run_folder(mixed_shards: str, tokenizer_folder: str, tmp_path: Path) -> Path:
    """A configuration folder with tiny.yaml, a run on the shards."""
    values = make_config(mixed_shards, tokenizer_folder, tmp_path / "run").to_dict()
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"defaults": ["anymal", "_self_"], **values}))
    return tmp_path


def media_bytes(folder: Path, key: str) -> tuple[Path, int, int]:
    """Shard file and byte range of a sample's first media item."""
    index = ShardIndex(str(folder))
    number = next(n for n in range(len(index)) if index.key(n) == key)
    row = index.media_rows(number)[0]
    return folder / index.header.shards[index.samples[number]["shard"]], int(row["offset"]), int(row["length"])


def overwrite(file: Path, offset: int, data: bytes) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        opened.write(data)


def test_a_good_folder(mixed_shards: str, tokenizer_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([mixed_shards, "--tokenizer", tokenizer_folder]) == 0
    shown = capsys.readouterr()
    assert "40 samples, 40 media items" in shown.out and "none bad" in shown.out and "bad: " not in shown.out
    assert re.search(r"image: 16 items, width 8 / 8 / 8", shown.out)
    tokens = ShardIndex(mixed_shards).samples["tokens"]
    assert (
        f"min {tokens.min()}, median {np.median(tokens):g}, p95 {np.percentile(tokens, 95):g}, max {tokens.max()}"
        in shown.out
    )
    # The bars of the histogram count every sample once.
    bars = re.findall(r"^ +\d+(?:-\d+)? +#* +(\d+)$", shown.out, re.M)
    assert sum(map(int, bars)) == 40
    assert "reading samples: 40 in" in shown.err


def test_damaged_samples_are_named(folder: Path, tokenizer_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    file, offset, length = media_bytes(folder, "image-00000")
    overwrite(file, offset + length // 2, b"\0\0\0\0")
    assert main([str(folder), "--tokenizer", tokenizer_folder]) == 1
    shown = capsys.readouterr().out
    assert len(re.findall(r"^bad: ", shown, re.M)) == 1
    assert "bad: image-00000: " in shown and "differ from those indexed" in shown
    assert main([str(folder), "--tokenizer", tokenizer_folder, "--sample", "image-00000"]) == 1
    assert "bad: " in capsys.readouterr().out
    # Samples before the damage and other keys are still fine.
    assert main([str(folder), "--tokenizer", tokenizer_folder, "--sample", "audio-00001"]) == 0


def test_media_that_do_not_decode_are_found_though_their_checksums_hold(
    tmp_path: Path, tokenizer_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_anymal.data.index_builder import IndexOptions
    from megatron_anymal.data.index_folder import make_index
    from megatron_anymal.data.manifest import write_shards

    sound = flac(0)
    (tmp_path / "a.flac").write_bytes(sound)
    (tmp_path / "b.flac").write_bytes(sound[: len(sound) // 2])
    lines = [f'{{"key": "{n}", "media": "{n}.flac", "text": "one"}}' for n in "ab"]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    write_shards(str(tmp_path / "m.jsonl"), str(tmp_path / "cut"))
    # Indexing reads only a sound's header, so it does not notice.
    make_index(str(tmp_path / "cut"), IndexOptions(tokenizer_folder))
    assert main([str(tmp_path / "cut"), "--tokenizer", tokenizer_folder]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"^bad: b: media '0.flac' ", shown, re.M) and "bad: a" not in shown
    assert main([str(tmp_path / "cut"), "--tokenizer", tokenizer_folder, "--limit", "1"]) == 0
    assert "read 1 of 2 samples" in capsys.readouterr().out


def test_a_missing_shard_and_another_tokenizer(
    folder: Path, tokenizer_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_tokenizer(tmp_path / "other")
    hf = PreTrainedTokenizerFast.from_pretrained(other)
    hf.add_tokens(["surplus"])
    hf.save_pretrained(other)
    assert main([str(folder), "--tokenizer", other]) == 1
    shown = capsys.readouterr().out
    # Not once more for every sample.
    assert "different tokenizer" in shown and shown.count("bad: ") == 1
    lost = ShardIndex(str(folder)).header.shards[0]
    (folder / lost).unlink()
    assert main([str(folder), "--tokenizer", tokenizer_folder]) == 1
    shown = capsys.readouterr().out
    assert f"bad: Shard '{lost}'" in shown and re.search(r"(\d+) bad$", shown, re.M)


def test_samples_as_the_model_sees_them(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config-name=tiny", f"--config-path={run_folder}"]
    assert main([*arguments, "--sample", "mixed-00004"]) == 0
    shown = capsys.readouterr().out
    assert "image '0.png': width 8, height 8, 268 B, 1 piece(s)" in shown
    # Two soft tokens per encoder input, in the order of the parts.
    assert shown.index(f"{SPECIAL[2]} x 2") < shown.index(f"{SPECIAL[3]} x 2")
    index = ShardIndex(
        str(Path(yaml.safe_load((run_folder / "tiny.yaml").read_text())["data"]["train"]["mix"]["path"]))
    )
    assert main([*arguments, "--sample", "4", "model.modalities.image.projector.num_tokens=3"]) == 0
    shown = capsys.readouterr().out
    assert f"{SPECIAL[2]} x 3" in shown
    # The text shown is that of the tokenizer and the sample.
    last = index.parts(4)[-1]
    assert not isinstance(last, MediaPart)
    targets = re.findall(r"'(.*?)'  target$", shown, re.M)
    assert targets == [*last.text.split(), SPECIAL[1]]


def test_without_a_configuration_media_stand_in_their_place(
    mixed_shards: str, tokenizer_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([mixed_shards, "--tokenizer", tokenizer_folder, "--sample", "mixed-00004"]) == 0
    shown = capsys.readouterr().out
    order = [shown.index(text) for text in (SPECIAL[0], "<image>", "'what'", "<audio>", "'what'  target")[:4]]
    assert order == sorted(order) and "piece" not in shown and " x " not in shown
    with pytest.raises(DataError, match=r"--sample 999"):
        main([mixed_shards, "--tokenizer", tokenizer_folder, "--sample", "999"])


def lengths_and_fill(run_folder: Path, steps: int) -> tuple[np.ndarray, float]:
    """Document lengths and pack fill as the engine's own plan has them."""
    from megatron_anymal.config.compose import compose

    config: RunConfig = compose("tiny", run_folder, []).config
    tokenizer, modalities = build_inputs(config.model, config.data)
    layout = ParallelLayout(None, 0, 1, 0, 1, 0, 1, 0, 1)  # type: ignore[arg-type]
    planner: BatchPlanner = build_data(config, layout, tokenizer, modalities, "train").planner
    lengths: dict[int, int] = {}
    fills = []
    for step in range(steps):
        batches = planner.plan(step).of_replica(0)
        lengths.update((s.sample, s.length) for batch in batches for s in batch.samples)
        real = sum(s.length for batch in batches for s in batch.samples)
        fills.append(real / sum(batch.padded_length for batch in batches))
    return np.array([lengths[n] for n in sorted(lengths)]), float(np.mean(fills))


def test_a_run_tells_what_is_too_long_and_how_full_its_packs_are(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config-name=tiny", f"--config-path={run_folder}", "trainer.max_steps=100"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    lengths, fill = lengths_and_fill(run_folder, 20)
    assert len(lengths) == 40, "twenty steps of eight samples must cover all forty"
    assert "longer than data.seq_length=64: 0 of 40" in shown
    assert f"first 20 steps: {fill:.1%} of the computed tokens are real" in shown
    limit = int(np.median(lengths))
    too_long = int((lengths > limit).sum())
    assert main([*arguments, f"data.seq_length={limit}"]) == 1
    assert f"bad: longer than data.seq_length={limit}: {too_long} of 40" in capsys.readouterr().out
    assert main([*arguments, f"data.seq_length={limit}", "data.too_long=drop"]) == 0
    assert f"{too_long} of 40 (they are left out" in capsys.readouterr().out


def test_every_stage_of_a_run_is_shown(run_folder: Path, text_shards: str, capsys: pytest.CaptureFixture[str]) -> None:
    stages = "[{name: a, steps: 3, weights: {mix: 1}}, {weights: {mix: 1, text: 3}, by: token}]"
    more = ["trainer.max_steps=100", f"+data.train.text.path={text_shards}", f"data.schedule={stages}"]
    assert main(["--config-name=tiny", f"--config-path={run_folder}", *more]) == 0
    shown = capsys.readouterr().out.splitlines()
    [first, second] = [number for number, line in enumerate(shown) if line.startswith("stage ")]
    assert shown[first] == "stage 1 of 2, a: steps 1 to 3, mix 100.00% of the samples"
    assert shown[second].startswith("stage 2 of 2: steps 4 to 100, mix 25.00%, text 75.00% of the tokens (mix ")
    # The mix has media, whose soft tokens make its samples longer: by samples it has less than a quarter.
    match = re.search(r"\(mix ([\d.]+)%, text", shown[second])
    assert match and float(match[1]) < 22
    assert shown[first + 1].startswith("first 3 steps: ") and shown[second + 1].startswith("first 20 steps: ")
    assert shown[first + 1].split("real")[0] != shown[second + 1].split("real")[0]


def test_mistakes(mixed_shards: str, tokenizer_folder: str, run_folder: Path) -> None:
    with pytest.raises(DataError, match="--tokenizer is missing"):
        main([mixed_shards])
    with pytest.raises(DataError, match="nothing to inspect"):
        main(["--tokenizer", tokenizer_folder])
    with pytest.raises(DataError, match=r"Add model\.modalities\.audio"):
        main(["--config-name=tiny", f"--config-path={run_folder}", "~model.modalities.audio"])
    with pytest.raises(ConfigError, match="nodes"):
        main(["--config-name=tiny", f"--config-path={run_folder}", "trainer.nodes=2"])
