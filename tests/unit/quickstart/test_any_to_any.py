"""The quickstart's any-to-any stage: its samples, its judges, and the grammar that it counts."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import fork_server
import numpy as np
import pytest

from examples.quickstart import creations
from examples.quickstart.__main__ import CREATION_TOOL, UNDERSTOOD, draw, evaluate
from examples.quickstart.any_to_any import NEXT, SHOWN
from examples.quickstart.corpus import DIGITS, SOUNDS
from examples.quickstart.creations_page import REQUESTS, any_to_any_numbers, any_to_any_section
from examples.quickstart.judges import DigitJudge, SoundJudge, centre, read_picture
from megatron_anymal.config import DiscreteConfig
from megatron_anymal.data.code_grammar import CodeItem
from megatron_anymal.data.codes import ANSWER, PROMPT, CodesKind
from megatron_anymal.data.prompt_encoder import open_parts
from megatron_anymal.data.samples import parse_sample
from megatron_anymal.data.shard_index import ShardIndex

Line = dict[str, Any]


def lines(folder: Path, name: str) -> list[Line]:
    return [json.loads(line) for line in (folder / "media" / f"any_to_any_{name}.jsonl").read_text().splitlines()]


def media_of(line: Line) -> list[str]:
    contents = [line["parts"]] if "parts" in line else [turn["content"] for turn in line["messages"]]
    return [part["media"] for content in contents for part in content if "media" in part]


def test_training_samples_use_training_media_only(quickstart_folder: Path) -> None:
    train, held_out = lines(quickstart_folder, "train"), lines(quickstart_folder, "held_out")
    kinds = Counter(line["key"].partition("-")[0] for line in train)
    assert kinds.keys() == {"codes", "draw", "two", "next", "say"}
    assert not [name for line in train for name in media_of(line) if "held_out" in name]
    assert all("held_out" in name for line in held_out for name in media_of(line))


def test_held_out_questions_are_those_of_the_encoders(quickstart_folder: Path) -> None:
    media = quickstart_folder / "media"
    asked = [line for name in ("image", "audio") for line in map(json.loads, (media / f"{name}_held_out.jsonl").open())]
    questions = lines(quickstart_folder, "held_out")
    assert [line["parts"][1:] for line in questions] == [line["parts"][1:] for line in asked]
    assert [media_of(line) for line in questions] == [media_of(line) for line in asked]


def test_answers_are_what_requests_ask_for(quickstart_folder: Path) -> None:
    """A drawn picture is one of the digit that the request names."""
    media = quickstart_folder / "media"
    facts = {
        line["parts"][0]["media"]: line["facts"][0] for line in map(json.loads, (media / "image_train.jsonl").open())
    }
    checked = 0
    for line in lines(quickstart_folder, "train"):
        if line["key"].startswith(("draw", "two")) and all(name in facts for name in media_of(line)):
            request = line["messages"][0]["content"][0]["text"].rstrip(".").replace(",", "").split()
            assert [word for word in request if word in DIGITS] == [facts[name] for name in media_of(line)]
            checked += 1
    assert checked > 10


def test_codes_are_stored_in_prompts_and_answers(quickstart_folder: Path) -> None:
    index = ShardIndex(str(quickstart_folder / "data" / "any_to_any_train"))
    assert len(index) == len(lines(quickstart_folder, "train"))
    stored = set()
    for number in range(len(index)):
        media = index.sample(number).media
        for part, item in zip(media, index.read_media(number, media, range(len(media)))):
            codes = np.load(io.BytesIO(item.data))
            kind = CodesKind.parse(part.modality)
            assert kind
            stored.add((kind.name, kind.role, codes.shape))
    shapes = {"picture": (1, 17), "sound": (2, 16)}
    assert stored == {(name, role, shape) for name, shape in shapes.items() for role in (PROMPT, ANSWER)}


def test_requests_can_be_asked(quickstart_folder: Path) -> None:
    requests = lines(quickstart_folder, "requests")
    assert Counter(line["asked"] for line in requests).keys() == {"digit", "two digits", "video", "sound"}
    for line in requests:
        assert open_parts(line, "line")
        assert all((quickstart_folder / "media" / name).is_file() for name in media_of(line))
        parse_sample({"messages": [*line["messages"], {"role": "assistant", "content": "x"}]}, "line")


@pytest.mark.parametrize(
    ("codes", "complete"),
    [
        ([[0, 3], [3, 0]], True),
        ([[0, 3]], False),
        ([[0], [3]], False),
        ([[0, 4], [3, 0]], False),
        ([[-1, 3], [0, 0]], False),
    ],
)
def test_an_item_is_complete(codes: list[list[int]], complete: bool) -> None:
    section = DiscreteConfig(codebooks=[4, 4], codes_per_item=4)
    assert creations.is_complete(CodeItem("sound", np.array(codes)), section) == complete


def test_judges_know_media_of_the_other_split(quickstart_folder: Path) -> None:
    media = quickstart_folder / "media"
    assert DigitJudge(media / "image_held_out.jsonl").accuracy(media / "image_train.jsonl") > 0.93
    sounds = SoundJudge(media / "audio_held_out.jsonl")
    assert sounds.accuracy(media / "audio_train.jsonl") > 0.9
    assert sounds.name(np.random.default_rng(0).normal(0, 0.2, 8000)) == "noise"
    assert set(SOUNDS) >= {"noise"}


def test_the_centre_is_that_of_the_light() -> None:
    picture = np.zeros((8, 16), np.uint8)
    picture[1, 12] = 200
    np.testing.assert_allclose(centre(picture), [1.5 / 8, 12.5 / 16], atol=1e-3)


def test_a_video_goes_on(quickstart_folder: Path) -> None:
    """Judged on the real frames of held-out videos: as asked for, in reverse, and another digit's."""
    media = quickstart_folder / "media"
    judge = DigitJudge(media / "image_held_out.jsonl")
    verdicts: list[list[bool]] = []
    for row in (line for line in lines(quickstart_folder, "requests") if line["asked"] == "video"):
        names = [row["last"].replace(f"-{SHOWN[-1]}.png", f"-{number}.png") for number in NEXT]
        frames = [read_picture(media / name) for name in names]
        other = {**row, "facts": [DIGITS[(DIGITS.index(row["facts"][0]) + 1) % 10], row["facts"][1]]}
        asked = (row, frames), (row, frames[::-1]), (other, frames)
        verdicts.append([creations._goes_on(quickstart_folder, line, shown, judge) for line, shown in asked])
    right, reversed_, wrong = np.mean(verdicts, axis=0)
    assert right > 0.8 and reversed_ == 0 and wrong < 0.2


def test_answers_are_judged_and_shown(quickstart_folder: Path, tmp_path: Path) -> None:
    """The stage's commands after its training, with a model that has learned next to nothing."""
    folder = tmp_path / "runs" / "quickstart"
    shutil.copytree(quickstart_folder, folder)
    for module, arguments in (
        ("megatron_anymal", evaluate("any_to_any", ["any_to_any"], UNDERSTOOD)),
        (CREATION_TOOL, [str(folder)]),
        ("megatron_anymal", draw()),
    ):
        done = fork_server.python("-m", module, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    scores = json.loads((folder / "creations" / "scores.json").read_text())
    asked = lines(folder, "requests")
    assert scores["answers"] == len(asked) and scores["as_asked"].keys() == {line["asked"] for line in asked}
    assert scores["grammatical"] == 1.0
    numbers = any_to_any_numbers(folder, tmp_path / UNDERSTOOD)
    assert {"drawn_as_asked", "understood", "grammatical"} <= numbers.keys()
    encoders = {name: {"accuracy": 0.5} for name in ("image", "audio")}
    page = any_to_any_section(folder, {"any_to_any": numbers, "modalities": encoders})
    assert page.count("<div class='card small'>") == sum(
        min(count, sum(line["asked"] == kind for line in asked)) for kind, (_, count) in REQUESTS.items()
    )
    assert "data:image/png;base64," in page
