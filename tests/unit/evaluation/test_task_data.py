"""Every shipped task reads data shaped like the public data set, and reports what is wrong with other data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from benchmark_data import COUNT, MAKERS, make_all, parquet, vqav2
from ranks import run_ranks

from megatron_anymal.config import ConfigError
from megatron_anymal.data.anymal_prompts import BY_TASK
from megatron_anymal.data.records import DataError, MediaPart, TextPart
from megatron_anymal.evaluation.readers import samples_of
from megatron_anymal.evaluation.samples import TaskSample, build_prompt
from megatron_anymal.evaluation.task import Task
from megatron_anymal.evaluation.task_files import find_task, task_paths

# Task -> number of samples of its small data, and references of the first one.
EXPECTED: dict[str, tuple[int, tuple[str, ...]]] = {
    "vqav2": (COUNT, ("three",) * 10),
    "textvqa": (COUNT, ("two",) * 4 + ("a",) * 6),
    "okvqa": (COUNT, ("two",) * 4 + ("a",) * 6),
    "vizwiz": (COUNT, ("two",) * 4 + ("a",) * 6),
    "coco_captions": (COUNT, ("a walk of two motion",)),
    "mmmu": (COUNT, ("B",)),
    "mmbench": (COUNT, ("A",)),
    "ai2d": (COUNT, ("A",)),
    "mathvista": (4, ("B",)),
    "chartqa": (COUNT, ("12.5",)),
    "hateful_memes": (COUNT, ("0",)),
    "audiocaps": (COUNT, ("a sound of two motion", "a sound of three motion")),
    "audiocaps_files": (COUNT, ("a sound of two motion", "a sound of three motion")),
    "egoschema": (COUNT, ("A",)),
    "mvbench": (4, ("B",)),
    "ego4d_imu": (4, ("[Camera wearer] looks around",)),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks") / "data"
    make_all(folder, b"not a video")
    return folder


def read(name: str, folder: Path) -> list[TaskSample]:
    return samples_of(find_task(name), folder)[0]


def texts_of(sample: TaskSample) -> list[str]:
    return [part.text for part in build_prompt(sample).parts if isinstance(part, TextPart) and not part.control]


def test_every_task_has_data_here() -> None:
    assert set(EXPECTED) == set(MAKERS) == set(task_paths())


@pytest.mark.parametrize("name", EXPECTED)
def test_samples(name: str, root: Path) -> None:
    task, samples = find_task(name), read(name, root / name)
    count, references = EXPECTED[name]
    assert len(samples) == count and samples[0].references == references
    for sample in samples:
        prompt = build_prompt(sample)
        media = [part for part in prompt.parts if isinstance(part, MediaPart)]
        assert {part.modality for part in media} == {BY_TASK[task.prompt].modality} and len(media) == len(prompt.media)
        assert all(file.data and file.extension for file in prompt.media)
        if sample.options:
            assert len(sample.candidates) == len(sample.options) >= 2


def test_prompts_are_those_of_section_e1(root: Path) -> None:
    """The user's turn of one sample of each kind, and where media stand."""
    users = {
        "vqav2": "In the image, what is this a ? Reply in one word.",
        "hateful_memes": "Is this a hateful meme? Answer yes or no.",
        "audiocaps": "Describe the sound.",
        "ego4d_imu": "Describe this motion.",
        "mmbench": "a sound of motion Question: what is this? \n\n Options: (A) one (B) two (C) three \n\n "
        "Reply in a single letter.",
        "egoschema": "what is this? Select exactly one option from the following: (A) a one walk (B) a two walk "
        "(C) a three walk (D) a four walk (E) a five walk.",
    }
    for name, user in users.items():
        assert texts_of(read(name, root / name)[1])[-1] == user, name
    system = texts_of(read("hateful_memes", root / "hateful_memes")[0])
    assert system[0].endswith("\n\n Here is the meme: ")
    assert system[1] == "\n This meme contains text: ‘what a sound ’"  # noqa: RUF001


def test_formats_that_need_code(root: Path) -> None:
    mmmu = read("mmmu", root / "mmmu")
    assert [len(sample.media) for sample in mmmu] == [2, 2, 2, 2, 1]
    assert mmmu[0].options == ("one", "two <image 2>", "three")
    assert mmmu[4].prompt == "vqa" and mmmu[4].references == ("two", "2") and not mmmu[4].options
    choice, whole, decimal, _ = read("mathvista", root / "mathvista")
    assert choice.prompt == "mmmu" and whole.prompt == "vqa" and decimal.texts["question"].endswith("(Unit: m)")
    motion = read("ego4d_imu", root / "ego4d_imu")
    assert [sample.references[0] for sample in motion[:2]] == [
        "[Camera wearer] looks around",
        "[Camera wearer] runs",
    ]
    lines = build_prompt(motion[0]).media[0].data.decode().splitlines()
    # 5 seconds at 50 Hz around second 3.
    assert lines[0] == "timestamp_ms,accl_x,accl_y,accl_z,gyro_x,gyro_y,gyro_z" and len(lines) == 251
    assert float(lines[1].split(",")[0]) == 500 and float(lines[-1].split(",")[0]) == 5480
    source = (root / "ego4d_imu" / "v2" / "imu" / "aaaa.csv").read_text().splitlines()[26].split(",")
    assert lines[1].split(",") == [source[2], *source[6:], *source[3:6]]


def saved_and_read(root: Path, folder: Path) -> list[tuple[str, tuple[str, ...], bytes]]:
    """In a rank: the samples of VQAv2 saved by `datasets`, as one split and among splits."""
    from datasets import DatasetDict, Image, load_dataset

    files = [str(path) for path in sorted((root / "vqav2").rglob("*.parquet"))]
    data = load_dataset("parquet", data_files={"rows": files}, split="rows").cast_column("image", Image())
    data.save_to_disk(str(folder / "one"))
    DatasetDict({"validation": data, "test": data.select([0])}).save_to_disk(str(folder / "several"))
    return [
        [(s.key, s.references, build_prompt(s).media[0].data) for s in read("vqav2", source)]  # type: ignore[misc]
        for source in (root / "vqav2", folder / "one", folder / "several")
    ]


def test_data_saved_by_datasets_are_the_same(root: Path, tmp_path: Path) -> None:
    [(plain, one, several)] = run_ranks(1, saved_and_read, root, tmp_path)
    assert len(plain) == COUNT and plain == one == several


def vqav2_without(column: str, folder: Path) -> None:
    vqav2(folder)
    for path in folder.rglob("*.parquet"):
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(path).drop_columns([column]).to_pylist()
        parquet(path, rows)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    vqav2_without("answers", tmp_path)
    with pytest.raises(DataError, match=r"the column 'answers' is missing; present: question_type, .*image"):
        read("vqav2", tmp_path)


def test_a_missing_media_file_is_named(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "hateful_memes", tmp_path / "memes")
    (tmp_path / "memes" / "img" / "8003.png").unlink()
    with pytest.raises(DataError, match=r"dev_seen.jsonl', row 3: there is no media file .*8003.png"):
        read("hateful_memes", tmp_path / "memes")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "Z"}, r"row 0: answer='Z' is not one of the 2 options as letter"),
        ({"B": "nan"}, r"row 0: the columns A, B, C, D, E hold fewer than two options"),
        ({"index": None}, r"row 0: the key index is empty"),
    ],
)
def test_unusable_rows(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    usual = {"index": 1, "question": "q", "hint": "", "A": "one", "B": "two", "answer": "A", "L2-category": "x"}
    parquet(tmp_path / "en" / "dev-0.parquet", [{**usual, "image": {"bytes": b"x", "path": None}, **row}])
    with pytest.raises(DataError, match=message):
        read("mmbench", tmp_path)


def test_rows_with_the_same_key(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "1.png").write_bytes(b"x")
    line = json.dumps({"id": 1, "img": "img/1.png", "label": 0, "text": "t"})
    (tmp_path / "dev_seen.jsonl").write_text(f"{line}\n{line}\n")
    with pytest.raises(DataError, match=r"rows 0 and 1: both have the key '1'"):
        read("hateful_memes", tmp_path)


def test_hidden_answers_are_refused(root: Path) -> None:
    task = find_task("egoschema")
    hidden = Task(**{**vars(task), "files": ("GENERATION/test-*.parquet",)})
    with pytest.raises(DataError, match="answer='' is not one of the 5 options"):
        samples_of(hidden, root / "egoschema")


def test_data_folders_that_hold_something_else(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no data folder"):
        read("vqav2", tmp_path / "none")
    with pytest.raises(DataError, match=r"holds no files data/validation-\*.parquet"):
        read("vqav2", tmp_path)
    with pytest.raises(DataError, match="held-out split is not published"):
        (tmp_path / "narration.json").write_text("{}")
        read("ego4d_imu", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("metrics: vqa_acuracy", "unknown name 'vqa_acuracy'. Did you mean 'vqa_accuracy'?"),
        ("prompt: vqaa", "Did you mean 'vqa'?"),
        ("promt: vqa", "Did you mean 'prompt'?"),
        ("media: {colum: image}", "Did you mean 'column'?"),
        ("max_new_tokens: many", "max_new_tokens='many' must be of type int"),
        ("key: [1]", "key must be a text or a list of texts"),
        ("- a list", "a task file is a mapping"),
    ],
)
def test_mistakes_in_task_files(change: str, message: str, tmp_path: Path) -> None:
    usual = "title: t\nsource: s\nfiles: x\nprompt: vqa\nkey: id\nmedia: {column: image}\nmetrics: vqa_accuracy\n"
    key = change.split(":")[0]
    lines = [line for line in usual.splitlines() if not line.startswith(f"{key}:")]
    (tmp_path / "own.yaml").write_text(change if change.startswith("-") else "\n".join([*lines, change]))
    with pytest.raises(ConfigError) as error:
        find_task("own", [str(tmp_path)])
    assert message in str(error.value), error.value


def test_a_missing_key_and_an_unknown_task(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("title: t")
    with pytest.raises(ConfigError, match="the key 'source' is missing"):
        find_task("own", [str(tmp_path)])
    with pytest.raises(ConfigError, match=r"--task: unknown name 'vqa2'. Did you mean 'vqav2'?"):
        find_task("vqa2")
    with pytest.raises(ConfigError, match="holds no task files"):
        find_task("vqav2", [str(tmp_path / "none")])
