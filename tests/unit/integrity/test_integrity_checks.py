"""Checks by real classifiers: planted violations are found, scores are those of transformers' pipelines, and whatever
goes wrong rejects."""

from __future__ import annotations

import io
import json
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from integrity_classifiers import (
    VIOLATIONS,
    digits,
    image_section,
    integrity_file,
    png_of,
    sentence,
    text_section,
)
from transformers import pipeline

from megatron_anymal.data.chat_format import open_prompt, parse_messages
from megatron_anymal.data.prompt_encoder import MediaFile
from megatron_anymal.data.records import MediaPart, TextPart
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.integrity.checks import IntegrityChecks, overhead
from megatron_anymal.integrity.classifiers import TextScorer
from megatron_anymal.integrity.config import TextClassifier, read_integrity
from megatron_anymal.modalities import MediaError

KINDS = ("image", "video", "audio", "imu")


@pytest.fixture(scope="module")
def checks(text_model: Path, image_model: Path, tmp_path_factory: pytest.TempPathFactory) -> IntegrityChecks:
    file = tmp_path_factory.mktemp("integrity") / "integrity.yaml"
    sections = {"words": text_section(text_model), "squares": image_section(image_model)}
    return IntegrityChecks(read_integrity(integrity_file(file, sections)), KINDS)


def asked(text: str, *media: tuple[str, bytes]) -> Prompt:
    parts: list[Any] = [MediaPart(f"{n}.{ending}", "") for n, (ending, _) in enumerate(media)]
    return Prompt([*parts, TextPart(text)], [MediaFile(data, ending) for ending, data in media])


def codes(verdicts: list[Any]) -> Counter[str]:
    return Counter(verdict.code if verdict else "passed" for verdict in verdicts)


def test_planted_words_are_found_in_prompts_and_answers(checks: IntegrityChecks) -> None:
    rng = np.random.default_rng(11)
    violating = [sentence(rng, word) for word in VIOLATIONS for _ in range(100)]
    harmless = [sentence(rng) for _ in range(400)]
    empty = asked("what is this")
    for name, rejected, passed in (
        (
            "input",
            checks.check_prompts([asked(t) for t in violating]),
            checks.check_prompts([asked(t) for t in harmless]),
        ),
        ("output", checks.check_answers([empty] * 400, violating), checks.check_answers([empty] * 400, harmless)),
    ):
        assert codes(rejected)["passed"] <= 4 and codes(passed)["passed"] >= 396
        labels = Counter(verdict.label for verdict in rejected if verdict)
        assert {verdict.stage for verdict in rejected if verdict} == {f"{name}_text"}
        assert abs(labels["zorp"] - 200) <= 4 and abs(labels["blick"] - 200) <= 4
    assert checks.check_prompts([asked("")]) == [None]


def test_planted_pictures_are_found(checks: IntegrityChecks) -> None:
    bad, good = digits(True, 1, 400), digits(False, 3, 400)
    rejected = checks.check_prompts([asked("what is this", ("png", png_of(picture))) for picture in bad])
    passed = checks.check_prompts([asked("what is this", ("png", png_of(picture))) for picture in good])
    assert codes(rejected)["input_image/squares/square"] >= 396 and codes(passed)["passed"] >= 396
    # One picture of several, and a violation of the picture comes first.
    several = asked(sentence(np.random.default_rng(0), "zorpal"), *(("png", png_of(p)) for p in [*good[:3], bad[0]]))
    [verdict] = checks.check_prompts([several])
    assert (
        verdict and verdict.stage == "input_image" and verdict.text.startswith("(refused: input_image/squares/square ")
    )


def test_scores_are_those_of_the_pipelines(checks: IntegrityChecks, text_model: Path, image_model: Path) -> None:
    rng = np.random.default_rng(3)
    texts = [sentence(rng, word) for word in ["", *VIOLATIONS]]
    expected = pipeline("text-classification", str(text_model), top_k=None)(texts)
    for scores, rows in zip(checks._scorers["words"].scores(texts), expected):
        assert scores == pytest.approx({row["label"]: row["score"] for row in rows}, abs=1e-5)
    pictures = [*digits(True, 1, 3), *digits(False, 1, 3)]
    expected = pipeline("image-classification", str(image_model))(pictures)
    for scores, rows in zip(checks._scorers["squares"].scores(pictures), expected):
        assert scores == pytest.approx({row["label"]: row["score"] for row in rows}, abs=1e-5)


@pytest.mark.parametrize("position", [0, 7, 15, 29])
def test_long_texts_are_cut_into_windows(checks: IntegrityChecks, position: int) -> None:
    rng = np.random.default_rng(position)
    sentences = [sentence(rng) for _ in range(30)]
    assert checks.check_prompts([asked(" ".join(sentences))]) == [None]
    sentences[position] = sentence(rng, "blickan")
    verdicts = checks.check_prompts([asked(" ".join(sentences)), asked("what is this")])
    assert codes(verdicts) == {"input_text/words/blick": 1, "passed": 1}


def test_all_turns_of_a_conversation_are_checked(checks: IntegrityChecks) -> None:
    turns = [("user", "Zorpal runs."), ("assistant", "The dog runs."), ("user", "What is this?")]
    for first, expected in (("The zorpen sits near.", "input_text/words/zorp"), ("The cat sits near.", "passed")):
        messages = [{"role": role, "content": text} for role, text in [("user", first), *turns[1:]]]
        prompt = Prompt(open_prompt(parse_messages(messages, "")), [])
        assert codes(checks.check_prompts([prompt])) == {expected: 1}


def video(planted: int, frames: int = 32) -> bytes:
    """Frames of a digit, one of which has the planted square, at 8 frames per second."""
    [plain], [bad] = digits(False, 3, 1), digits(True, 1, 1)
    out = io.BytesIO()
    with av.open(out, "w", format="matroska") as container:
        # Without loss.
        stream = container.add_stream("ffv1", rate=8)
        stream.width = stream.height = 16
        stream.pix_fmt = "bgr0"
        for number in range(frames):
            picture = bad if number == planted else plain
            container.mux(stream.encode(av.VideoFrame.from_image(picture).reformat(format="bgr0")))
        container.mux(stream.encode())
    return out.getvalue()


def test_as_many_frames_of_a_video_are_looked_at_as_stated(image_model: Path, tmp_path: Path) -> None:
    """8 of 32 frames: those at 2, 6, 10, ..."""
    file = integrity_file(tmp_path / "i.yaml", {"squares": image_section(image_model)}, video_frames=8)
    checks = IntegrityChecks(read_integrity(file), KINDS)
    prompts = [asked("what is this", ("mkv", video(planted))) for planted in (-1, 6, 8, 30)]
    assert list(map(bool, checks.check_prompts(prompts))) == [False, True, False, True]


def test_media_that_no_classifier_looks_at(image_model: Path, text_model: Path, tmp_path: Path) -> None:
    sections = {"squares": image_section(image_model)}
    sound = asked("what is this", ("flac", b"sound"))
    strict = IntegrityChecks(read_integrity(integrity_file(tmp_path / "a.yaml", sections)), KINDS)
    [verdict] = strict.check_prompts([sound])
    assert verdict and verdict.code == "input_image/unchecked" and "unchecked_media: [audio]" in verdict.detail
    stated = integrity_file(tmp_path / "b.yaml", sections, unchecked_media=["audio", "imu"])
    assert IntegrityChecks(read_integrity(stated), KINDS).check_prompts([sound]) == [None]
    # Without an image classifier in the file, media are not checked, and it need not list them.
    texts = integrity_file(tmp_path / "c.yaml", {"words": text_section(text_model)})
    assert IntegrityChecks(read_integrity(texts), KINDS).check_prompts([sound]) == [None]


def test_a_damaged_picture_is_the_users_error(checks: IntegrityChecks) -> None:
    with pytest.raises(MediaError, match=r"'0\.png': cannot be decoded"):
        checks.check_prompts([asked("what is this", ("png", b"no picture"))])


class Failing:
    """A classifier that fails on one text, or gives it an invalid score or none."""

    def __init__(self, inner: Any, wrong: Any):
        self._inner, self._wrong = inner, wrong

    def scores(self, inputs: Any) -> Any:
        all_scores = [dict(scores) for scores in self._inner.scores(inputs)]
        for text, scores in zip(inputs, all_scores):
            if "boat" in text:
                if isinstance(self._wrong, Exception):
                    raise self._wrong
                scores["zorp"] = self._wrong
        return all_scores[:-1] if self._wrong == "short" else all_scores


@pytest.mark.parametrize("wrong", [RuntimeError("no memory"), float("nan"), 1.5, "short"])
def test_a_classifier_that_fails_rejects(
    wrong: Any, checks: IntegrityChecks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(checks._scorers, "words", Failing(checks._scorers["words"], wrong))
    texts = ["The dog runs.", "The boat runs.", "The zorpal runs."]
    if wrong == "short":
        expected = {"input_text/words/failed": 3}
    else:
        expected = {"passed": 1, "input_text/words/failed": 1, "input_text/words/zorp": 1}
    verdicts = checks.check_prompts(list(map(asked, texts)))
    assert codes(verdicts) == expected
    assert verdicts[1] and verdicts[1].label == "failed" and verdicts[1].detail
    if isinstance(wrong, Exception):
        assert "'words' failed, so the query is rejected: RuntimeError: no memory" in capsys.readouterr().err
        gate = checks.gate(asked("what is this"))
        assert gate.add("The dog runs. The boat ") == "The dog runs. " and gate.add("runs. The dog") == ""
        assert gate.finish() == "" and gate.rejection and gate.rejection.label == "failed"


def test_counts_and_time(checks: IntegrityChecks, text_model: Path, tmp_path: Path) -> None:
    file = integrity_file(tmp_path / "i.yaml", {"words": text_section(text_model)})
    own = IntegrityChecks(read_integrity(file), KINDS)
    own.check_prompts([asked("The zorpal runs."), asked("The dog runs.")])
    own.check_answers([asked("what")], ["The blickum runs."])
    line = overhead(own, 100 * own.seconds)
    assert own.seconds > 0 and "2 queries checked, 2 rejected" in line and "1.0% of" in line
    assert "input_text/words/zorp 1" in line and "output_text/words/blick 1" in line


def test_threads_take_turns(checks: IntegrityChecks) -> None:
    verdicts: list[Any] = []
    texts = ["The zorpal runs.", "The dog runs."] * 4
    threads = [
        threading.Thread(target=lambda t=text: verdicts.extend(checks.check_prompts([asked(t)]))) for text in texts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes(verdicts) == {"input_text/words/zorp": 4, "passed": 4}


def test_labels_belong_to_their_numbers_in_whatever_order_the_file_has_them(text_model: Path, tmp_path: Path) -> None:
    """Folders sorted by text have label 10 before label 2."""
    folder = tmp_path / "model"
    shutil.copytree(text_model, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["id2label"] = dict(reversed(settings["id2label"].items()))
    (folder / "config.json").write_text(json.dumps(settings))
    texts = ["what is zorpal", "what is blickan", "what is this"]
    expected = pipeline("text-classification", str(folder), top_k=None)(texts)
    scorer = TextScorer(TextClassifier(path=str(folder), labels=["zorp"], threshold=0.5, overlap=8), "here")
    for scores, oracle in zip(scorer.scores(texts), expected):
        assert scores == pytest.approx({row["label"]: row["score"] for row in oracle}, abs=1e-6)
