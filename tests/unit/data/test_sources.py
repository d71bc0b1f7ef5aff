"""Published layouts become indexed shards whose samples are those that an independent reading of the folder gives."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import source_folders as made

from megatron_anymal.cli.prepare import main
from megatron_anymal.data.records import DataError, MediaPart, TextPart
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.data.sources.ego4d_imu import plain_text
from megatron_anymal.data.sources.registry import FORMATS

Contents = list[Any]


class Prepare:
    """Runs the verb and reads what it made."""

    def __init__(self, tokenizer: str, folder: Path, capsys: pytest.CaptureFixture[str]):
        self._tokenizer, self.out, self._capsys = tokenizer, folder / "out", capsys
        self.printed = ""

    def run(self, *words: str | Path, at: Path | None = None) -> ShardIndex:
        """Prepare into `out`, or in place in the folder `at`."""
        destination = [] if at else ["--out", str(self.out)]
        assert main([*map(str, words), *destination, "--tokenizer", self._tokenizer, "--workers", "1"]) == 0
        shown = self._capsys.readouterr()
        self.printed = shown.out + shown.err
        return ShardIndex(str(at or self.out))

    def refused(self, *words: str | Path, out: bool = True) -> str:
        """The message of a refusal, which is one line and leaves no shard."""
        destination = ["--out", str(self.out)] if out else []
        with pytest.raises(DataError) as error:
            main([*map(str, words), *destination, "--tokenizer", self._tokenizer, "--workers", "1"])
        assert "\n" not in str(error.value) and not list(self.out.glob("*.tar*"))
        return str(error.value)

    def ledger(self) -> list[dict[str, Any]]:
        lines = (self.out / "index" / "left_out.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture
def prepare(tokenizer_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Prepare:
    return Prepare(tokenizer_folder, tmp_path, capsys)


def contents(index: ShardIndex, sample: int) -> Contents:
    """Texts and media of a sample in order, without the chat format's own text."""
    parts = index.sample(sample).documents[0]
    media = index.read_media(sample, parts, range(sum(isinstance(part, MediaPart) for part in parts)))
    remaining = iter(media)
    items: Contents = []
    for part in parts:
        if isinstance(part, MediaPart):
            items.append((part.modality, next(remaining).data))
        elif not part.control:
            items.append(part.text)
    return items


def all_contents(index: ShardIndex) -> list[Contents]:
    index.check_shards()
    return [contents(index, sample) for sample in range(len(index))]


def test_llava(prepare: Prepare, tmp_path: Path) -> None:
    folder = made.llava(tmp_path / "llava")
    path = folder / "llava_v1_5_mix665k.json"
    index = prepare.run("--from", "llava", path, "--media", folder / "images")
    wanted = []
    for entry in json.loads(path.read_text()):
        sample: Contents = []
        for turn in entry["conversations"]:
            before, mark, after = turn["value"].partition("<image>")
            picture = [("image", (folder / "images" / entry["image"]).read_bytes())] if mark else []
            sample += [text for text in (before,) if text] + picture + [text for text in (after,) if text]
        wanted.append(sample)
    assert all_contents(index) == wanted and len(wanted) == 13
    # Identifiers repeat in the mix; keys do not.
    assert [index.key(n) for n in (0, 1, 12)] == [
        "000000001-000000000000",
        "000000002-000000000000",
        "000000013-text_only",
    ]
    assert "13 samples = 13 in 1 shards" in prepare.printed


def test_videos_of_llava_may_have_image_placeholders(prepare: Prepare, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nwhat is"}, {"from": "gpt", "value": "one"}]
    entries = [{"id": "a", "video": "a.mp4", "conversations": turns}, {"id": "b", "image": [], "conversations": turns}]
    entries += [
        {"id": n, "conversations": [{**turn, "value": turn["value"][8:] or "x"} for turn in turns]} for n in "cd"
    ]
    path = made.put(tmp_path / "video.json", json.dumps(entries))
    made.put(tmp_path / "a.mp4", b"\0\0\0\x18ftypmp42")
    from megatron_anymal.data.sources.registry import open_source
    from megatron_anymal.data.sources.source_format import SourceOptions

    source = open_source("llava", SourceOptions(path))
    first, second, *_ = source.records()  # type: ignore[union-attr]
    assert first.value["messages"][0]["content"][0] == {"media": "a.mp4", "modality": "video"}
    assert second.wrong is not None and second.wrong.code == "placeholders"


def test_sharegpt_of_llama_factory(prepare: Prepare, tmp_path: Path) -> None:
    folder = made.sharegpt(tmp_path / "sharegpt")
    index = prepare.run("--from", "sharegpt", folder / "mllm_demo.json")
    files = {path.name: path.read_bytes() for path in (folder / "mllm_demo_data").iterdir()}
    for n, sample in enumerate(all_contents(index)):
        first, second = ("image", files[f"{n}.jpg"]), ("image", files[f"{(n + 1) % 6}.jpg"])
        sound = ("audio", files[f"{n}.wav"])
        assert sample == ["a", first, "what is ", second, "this", sound, "one two"]
    assert len(index) == 6 and "6 times a media file was stored again" in prepare.printed


def test_sharegpt_variants(prepare: Prepare, tmp_path: Path) -> None:
    made.put(tmp_path / "0.jpg", made.jpeg(0))
    user, answer = {"from": "human", "value": "<image>what"}, {"from": "gpt", "value": "one"}
    parts = [{"type": "image", "image": "0.jpg"}, {"type": "text", "text": "what"}]
    entries: list[dict[str, Any]] = [
        {"conversations": [user, answer], "image": "0.jpg", "system": "a sound"},
        {"conversations": [user], "images": ["0.jpg"], "chosen": answer, "rejected": {"from": "gpt", "value": "two"}},
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "one"}]},
    ]
    path = made.put(tmp_path / "v.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))
    picture = ("image", made.jpeg(0))
    index = prepare.run("--from", "sharegpt", path)
    assert [contents(index, n) for n in range(3)] == [
        ["a sound", picture, "what", "one"],
        [picture, "what", "one"],
        [picture, "what", "one"],
    ]
    assert [index.sample(n).kind for n in range(3)] == ["messages", "preference", "messages"]
    renamed = [{"talk": entries[0]["conversations"], "picture": "0.jpg"}]
    path = made.put(tmp_path / "renamed.json", json.dumps(renamed))
    columns = ["--column", "messages=talk", "--column", "image=picture", "--overwrite"]
    assert contents(prepare.run("--from", "sharegpt", path, *columns), 0) == [picture, "what", "one"]


def test_conversations_that_do_not_fit_are_left_out_by_name(prepare: Prepare, tmp_path: Path) -> None:
    folder = made.llava(tmp_path / "llava", count=12)
    path = folder / "llava_v1_5_mix665k.json"
    entries = json.loads(path.read_text())
    entries[1]["conversations"][0]["value"] = "no placeholder"
    entries[2]["image"] = "coco/train2017/gone.jpg"
    entries[3]["conversations"].pop()
    entries[4]["conversations"][0]["from"] = "tool"
    entries[5]["conversations"][1]["value"] = " "
    entries[6]["conversations"] = "what"
    path.write_text(json.dumps(entries))
    words = ["--from", "llava", path, "--media", folder / "images"]
    index = prepare.run(*words, "--max-bad-share", "0.5")
    assert len(index) == 7 and "13 samples in = 7 used + 6 left out + 0 filtered" in prepare.printed
    codes = {entry["source"].rpartition("[")[2]: entry["code"] for entry in prepare.ledger()}
    assert codes == {"1]": "placeholders", "2]": "missing_media", **dict.fromkeys(("3]", "4]", "5]", "6]"), "text")}
    keys = {entry["key"] for entry in prepare.ledger()}
    assert keys | {index.key(n) for n in range(7)} == {f"{n + 1:09d}-{e['id']}" for n, e in enumerate(entries)}
    strict = prepare.out.with_name("strict")
    prepare.out = strict
    message = prepare.refused(*words)
    assert "--max-bad-share 0.01" in message and f"{path}[1]" in message
    refused = [json.loads(line) for line in (strict / "index" / "left_out.refused.jsonl").read_text().splitlines()]
    # It stops at once: no further sample can make up for the first.
    assert len(refused) == 1


@pytest.mark.parametrize(("choice", "wanted"), [("each", 20), ("first", 4), ("longest", 4)])
def test_coco(choice: str, wanted: int, prepare: Prepare, tmp_path: Path) -> None:
    folder = made.coco(tmp_path / "coco")
    path = folder / "annotations" / "captions_train2017.json"
    index = prepare.run("--from", "coco", path, "--media", folder / "train2017", "--captions", choice)
    content = json.loads(path.read_text())
    files = {image["id"]: (folder / "train2017" / image["file_name"]).read_bytes() for image in content["images"]}
    captions: dict[int, list[str]] = {}
    for annotation in content["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"].strip())
    chosen = {
        "each": lambda texts: texts,
        "first": lambda texts: texts[:1],
        "longest": lambda texts: [max(texts, key=len)],
    }
    pairs = [[("image", files[n]), text] for n, texts in captions.items() for text in chosen[choice](texts)]
    assert len(index) == wanted and sorted(all_contents(index), key=str) == sorted(pairs, key=str)


def test_coco_without_a_caption_or_an_image(prepare: Prepare, tmp_path: Path) -> None:
    folder = made.coco(tmp_path / "coco")
    path = folder / "annotations" / "captions_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] != 2]
    content["annotations"].append({"image_id": 77, "id": 999, "caption": "a"})
    path.write_text(json.dumps(content))
    index = prepare.run("--from", "coco", path, "--media", folder / "train2017", "--max-bad-share", "0.2")
    assert len(index) == 15
    assert {(entry["code"], entry["source"]) for entry in prepare.ledger()} == {
        ("text", f"{path}: image 2"),
        ("missing_media", f"{path}: annotation 999"),
    }
    content["annotations"] = [{"image_id": 1, "id": 1, "bbox": [0, 0, 1, 1], "category_id": 1}]
    path.write_text(json.dumps(content))
    prepare.out = tmp_path / "other"
    assert "`annotations`[0] has no `caption`" in prepare.refused("--from", "coco", path)


NAMES = {
    "aac-datasets": "{youtube_id}_{start_time}",
    "audiocaps-download": "{audiocap_id}",
    "audioset": "Y{youtube_id}",
    "audioset-download": "{youtube_id}_{ms}_{end_ms}",
    "plain": "{youtube_id}",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=list(NAMES))
def test_audiocaps(name: str, prepare: Prepare, tmp_path: Path) -> None:
    folder = made.audiocaps(tmp_path / "audiocaps", [name])
    index = prepare.run("--from", "audiocaps", folder / "train.csv", "--media", folder / "audio")
    with (folder / "train.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all_contents(index) == [[("audio", made.wav(n)), row["caption"]] for n, row in enumerate(rows)]
    assert index.key(2) == f"000000003-{rows[2]['audiocap_id']}"


def test_sounds_that_were_not_downloaded_are_left_out(prepare: Prepare, tmp_path: Path) -> None:
    folder = made.audiocaps(tmp_path / "audiocaps")
    sounds = sorted((folder / "audio").iterdir())
    sounds[1].unlink()
    words = ["--from", "audiocaps", folder / "train.csv", "--media", folder / "audio"]
    index = prepare.run(*words, "--max-bad-share", "0.2")
    [entry] = prepare.ledger()
    assert len(index) == 5 and entry["code"] == "missing_media" and entry["source"] == f"{folder / 'train.csv'}:3"
    assert all(name in entry["reason"] for name in ("r1nicOVt-1_30", "91140", "Yr1nicOVt-1"))
    text = (folder / "train.csv").read_text()
    (folder / "train.csv").write_text(text.replace("caption", "description", 1))
    prepare.out = tmp_path / "other"
    assert "description" in prepare.refused(*words)


@pytest.mark.parametrize(("choice", "wanted"), [("each", 15), ("longest", 3)])
def test_clotho(choice: str, wanted: int, prepare: Prepare, tmp_path: Path) -> None:
    folder = made.clotho(tmp_path / "clotho")
    path = folder / "clotho_captions_development.csv"
    index = prepare.run("--from", "clotho", path, "--media", folder / "development", "--captions", choice)
    captions = [f"a sound of {' '.join(['motion'] * k)}" for k in range(1, 6)]
    chosen = captions if choice == "each" else captions[-1:]
    assert all_contents(index) == [[("audio", made.wav(n)), text] for n in range(3) for text in chosen]
    assert len(index) == wanted


def test_img2dataset_is_indexed_in_place(prepare: Prepare, tmp_path: Path) -> None:
    folder = made.img2dataset(tmp_path / "laion")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    index = prepare.run("--from", "img2dataset", folder, at=folder)
    sizes = [(40, 30) if n % 3 else (90, 30) for n in range(6)]
    assert all_contents(index) == [[("image", made.jpeg(n, sizes[n])), "one two"] for n in range(6)] * 2
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert "20 downloads tried, 12 in the shards, 8 failed" in prepare.printed and ".json 12" in prepare.printed
    assert "Remove --out" in prepare.refused("--from", "img2dataset", folder)
    files = tmp_path / "files"
    made.put(files / "00000_stats.json", "{}")
    made.put(files / "00000" / "000000000.jpg", made.jpeg(0))
    assert "output_format=webdataset" in prepare.refused("--from", "img2dataset", files, out=False)


def test_energon_captions_in_place_and_packed(prepare: Prepare, tmp_path: Path) -> None:
    folder = made.energon(tmp_path / "energon", "CaptioningSample")
    wanted = [[("image", made.jpeg(n)), "a sound"] for n in range(6)]
    # The folder also has the shard of another split.
    index = prepare.run("--from", "energon", folder)
    assert all_contents(index) == wanted * 2 and index.key(0) == "000000001-sample_0000"
    (folder / "shards" / "val_2.tar").rename(tmp_path / "val_2.tar")
    shards = folder / "shards"
    assert all_contents(prepare.run("--from", "energon", folder, at=shards)) == wanted * 2
    prepare.out = tmp_path / "other"
    assert "there is no split 'dev'" in prepare.refused("--from", "energon", folder, "--split", "dev")


def test_energon_questions_as_megatron_writes_them(prepare: Prepare, tmp_path: Path) -> None:
    folder = made.energon(tmp_path / "energon", "VQASample")
    index = prepare.run("--from", "energon", folder, "--split", "val")
    assert all_contents(index) == [[("image", made.jpeg(n)), "\nwhat is", "one two"] for n in range(6)]
    assert index.sample(0).kind == "messages"
    path = folder / ".nv-meta" / "split.yaml"
    path.write_text(path.read_text().replace("exclude: []", "exclude:\n- shards/val_2.tar/sample_2001"))
    assert len(prepare.run("--from", "energon", folder, "--split", "val", "--overwrite")) == 5


@pytest.mark.parametrize("kind", ["InterleavedSample", "OCRSample", "CrudeWebdataset", "CaptioningSample"])
def test_energon_samples_made_by_code_are_refused(kind: str, prepare: Prepare, tmp_path: Path) -> None:
    folder = made.energon(tmp_path / "energon", kind)
    if kind == "CaptioningSample":
        path = folder / ".nv-meta" / "dataset.yaml"
        path.write_text(path.read_text() + "sample_loader: sample_loader.py:sample_loader\n")
    message = prepare.refused("--from", "energon", folder)
    assert (kind in message or "sample_loader" in message) and "VQASample" in message


def hugging_face(folder: Path, form: str) -> Path:
    """A data set as `datasets` itself writes it."""
    import datasets

    paths = [made.put(folder / "raw" / f"{n}.jpg", made.jpeg(n)) for n in range(5)]
    sounds = [{"bytes": made.wav(n), "path": None} for n in range(5)]
    values = {
        "picture": [str(path) for path in paths],
        "sound": sounds,
        "caption": [f"one {'two ' * n}" for n in range(5)],
        "score": [0.1 * n for n in range(5)],
    }
    features = datasets.Features(
        picture=datasets.Image(),
        sound={"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        caption=datasets.Value("string"),
        score=datasets.Value("float64"),
    )
    data = datasets.Dataset.from_dict(values, features=features)
    # The feature itself encodes with another package.
    data = data.cast_column("sound", datasets.Audio(decode=False))
    if form == "parquet":
        (folder / "data").mkdir()
        data.to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
        return folder
    if form == "dict":
        datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(str(folder / "saved"))
        return folder / "saved"
    data.save_to_disk(str(folder / "saved"), num_shards=2)
    return folder / "saved"


@pytest.mark.parametrize("form", ["saved", "dict", "parquet"])
def test_hugging_face(form: str, prepare: Prepare, tmp_path: Path) -> None:
    path = hugging_face(tmp_path, form)
    roles = [x for role in ("image=picture", "audio=sound", "text=caption") for x in ("--column", role)]
    words = ["--from", "huggingface", path, *roles, *(["--split", "train"] if form == "dict" else [])]
    index = prepare.run(*words, "--filter", "min_column:score=0.15")
    wanted = [[("image", made.jpeg(n)), ("audio", made.wav(n)), f"one {'two ' * n}".strip()] for n in range(5)]
    assert all_contents(index) == wanted[2:]
    assert "5 samples in = 3 used + 0 left out + 2 filtered (min_column:score=0.15 2)" in prepare.printed
    prepare.out = tmp_path / "other"
    message = prepare.refused(*words, "--column", "text=Caption")
    assert "no column 'Caption'" in message and "picture (struct" in message
    assert "--column text=NAME" in prepare.refused(*words[:7], *words[9:])
    if form == "dict":
        assert "train, test" in prepare.refused("--from", "huggingface", path, *roles)


@pytest.mark.parametrize("name", ["narration.json", "all_narrations_redacted.json"])
def test_windows_of_ego4d(name: str, prepare: Prepare, tmp_path: Path) -> None:
    folder = made.ego4d_imu(tmp_path / "ego4d")
    narrations = folder / "annotations" / name
    index = prepare.run("--from", "ego4d-imu", folder / "imu", "--narrations", narrations, "--window", "4")
    table = np.genfromtxt(folder / "imu" / "video-1.csv", delimiter=",", names=True)
    for sample, moment in ((3, 4), (4, 9), (5, 15)):
        (kind, data), text = contents(index, sample)
        times = table["canonical_timestamp_ms"]
        inside = table[(times >= (moment - 2) * 1000) & (times < (moment + 2) * 1000)]
        window = np.genfromtxt(data.decode().splitlines(), delimiter=",", names=True)
        assert kind == "imu" and len(window) == len(inside) > 700
        for name in ("accl_x", "accl_y", "accl_z", "gyro_x", "gyro_y", "gyro_z"):
            np.testing.assert_array_equal(window[name], inside[name])
        np.testing.assert_array_equal(window["timestamp_ms"], inside["canonical_timestamp_ms"])
        assert text == {4: "walk one", 9: "man x run", 15: "is something"}[moment]
    # Seconds, and Hz of the file.
    np.testing.assert_allclose(index.media["size"][3:], [(4.0, 201.0)] * 3, rtol=0.01)
    assert "3 of 5 narrated videos have no IMU file" in prepare.printed


def test_hugging_face_conversations(prepare: Prepare, tmp_path: Path) -> None:
    """Lists of pictures, as struct and as plain bytes, and turns with placeholders; without `datasets`."""
    import pyarrow
    import pyarrow.parquet

    turns = [{"role": "user", "content": "<image>what<image>"}, {"role": "assistant", "content": "one"}]
    rows = [
        {
            "images": [{"bytes": made.jpeg(2 * n), "path": None}, {"bytes": made.jpeg(2 * n + 1), "path": "b.jpg"}],
            "raw": made.jpeg(2 * n),
            "talk": turns if n else [{**turns[0], "content": "<image>"}, turns[1]],
            "ask": "what is",
            "reply": "two" if n != 1 else None,
            "id": f"row {n}",
            "heavy": [0.5] * 100,
        }
        for n in range(3)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    path = tmp_path / "a.parquet"
    words = ["--from", "huggingface", path, "--max-bad-share", "0.4", "--column", "key=id"]
    index = prepare.run(*words, "--column", "messages=talk", "--column", "image=images")
    pictures = [[("image", made.jpeg(2 * n)), ("image", made.jpeg(2 * n + 1))] for n in range(3)]
    assert all_contents(index) == [[pictures[n][0], "what", pictures[n][1], "one"] for n in (1, 2)]
    [entry] = prepare.ledger()
    assert (entry["code"], entry["key"]) == ("placeholders", "000000001-row_0")
    roles = ["--column", "question=ask", "--column", "answer=reply", "--column", "image=raw", "--overwrite"]
    index = prepare.run(*words, *roles)
    assert all_contents(index) == [[pictures[n][0], "what is", "two"] for n in (0, 2)]
    assert "'reply' has no text" in prepare.ledger()[0]["reason"]


def test_windows_at_the_end_and_narrations_in_a_table(prepare: Prepare, tmp_path: Path) -> None:
    folder = made.ego4d_imu(tmp_path / "ego4d", videos=1)
    rows = [("video-0", "1.5", "4.0", "walk"), ("video-0", "18.5", "23.5", "run"), ("video-0", "7", "7", "one")]
    columns = ("video_uid", "start", "end", "text")
    made.write_table(tmp_path / "texts.csv", [dict(zip(columns, row)) for row in rows])
    words = ["--from", "ego4d-imu", folder / "imu", "--narrations", tmp_path / "texts.csv"]
    index = prepare.run(*words, "--max-bad-share", "0.7")
    assert len(index) == 1 and index.media["size"][0][0] == pytest.approx(2.5, rel=0.01)
    assert Counter(entry["code"] for entry in prepare.ledger()) == {"media": 2}
    assert "covers 1.39 of 5.00 s" in prepare.ledger()[1]["reason"]
    prepare.out = tmp_path / "other"
    assert "--window does not apply" in prepare.refused(*words, "--window", "3")
    assert "--narrations" in prepare.refused(*words[:3])
    (folder / "imu" / "video-0.csv").rename(folder / "imu" / "other.csv")
    assert "The file must be video-0.csv" in prepare.refused(*words)


@pytest.mark.parametrize(
    ("narration", "plain"),
    [
        ("#C C walks", "walks"),
        ("#c c Walks", "Walks"),
        ("#O man x talks", "man x talks"),
        ("C# is a language", "C# is a language"),
    ],
)
def test_tags_of_narrations(narration: str, plain: str) -> None:
    assert plain_text(narration) == plain


@pytest.fixture(scope="module")
def every_layout(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Layout -> a file or folder of it."""
    folder = tmp_path_factory.mktemp("layouts")
    hugging_face(folder / "huggingface", "parquet")
    return {
        "llava": made.llava(folder / "llava", 1) / "llava_v1_5_mix665k.json",
        "sharegpt": made.sharegpt(folder / "sharegpt", 1) / "mllm_demo.json",
        "coco": made.coco(folder / "coco", 1) / "annotations" / "captions_train2017.json",
        "audiocaps": made.audiocaps(folder / "audiocaps", count=1) / "train.csv",
        "clotho": made.clotho(folder / "clotho", 1) / "clotho_captions_development.csv",
        "img2dataset": made.img2dataset(folder / "img2dataset", 1, 1),
        "energon": made.energon(folder / "energon", "VQASample", 1),
        "huggingface": folder / "huggingface",
        "ego4d-imu": made.ego4d_imu(folder / "ego4d", 1, 1.0) / "imu",
    }


@pytest.mark.parametrize("named", FORMATS)
def test_a_wrong_layout_names_the_likely_one(named: str, every_layout: dict[str, Path], prepare: Prepare) -> None:
    assert every_layout.keys() == FORMATS.keys()
    for likely, path in every_layout.items():
        # Conversations with one picture are in both layouts.
        if likely != named and (named, likely) != ("sharegpt", "llava"):
            message = prepare.refused("--from", named, path)
            assert f"It looks like --from {likely}," in message


def test_other_input_and_options_that_do_not_apply(prepare: Prepare, tmp_path: Path) -> None:
    manifest = made.put(tmp_path / "m.jsonl", '{"media": "a.jpg", "text": "one"}\n')
    assert f"use --manifest {manifest}" in prepare.refused("--from", "llava", manifest)
    shards = made.put(tmp_path / "shards" / "0.tar", b"").parent
    assert f"use --index-only {shards}" in prepare.refused("--from", "coco", shards)
    assert "Did you mean llava?" in prepare.refused("--from", "lava", manifest)
    assert "no file or folder" in prepare.refused("--from", "llava", tmp_path / "none.json")
    path = made.llava(tmp_path / "llava", 1) / "llava_v1_5_mix665k.json"
    assert "but to coco, clotho" in prepare.refused("--from", "llava", path, "--captions", "each")
    assert "no such folder" in prepare.refused("--from", "llava", path, "--media", tmp_path / "none")
    assert "needs --out" in prepare.refused("--from", "llava", path, out=False)
    assert "--media applies only to --from" in prepare.refused("--manifest", manifest, "--media", tmp_path)
    assert "ROLE=NAME" in prepare.refused("--from", "sharegpt", path, "--column", "image")


def test_texts_are_targets_where_they_should_be(prepare: Prepare, tmp_path: Path) -> None:
    folder = made.llava(tmp_path / "llava", 1)
    index = prepare.run("--from", "llava", folder / "llava_v1_5_mix665k.json", "--media", folder / "images")
    learned = [
        part.text
        for part in index.sample(0).documents[0]
        if isinstance(part, TextPart) and part.loss and not part.control
    ]
    assert learned == ["one two", "five"]
