"""Answers of a checked generator: streamed, complete, in a chat; and the whole commands on a real checkpoint."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from engine import train
from integrity_classifiers import image_section, integrity_file, text_section
from ranks import run_ranks
from tiny import make_config, png

from megatron_anymal.__main__ import main
from megatron_anymal.config import ConfigError
from megatron_anymal.data.prompt_encoder import MediaFile
from megatron_anymal.data.records import CodesPart, MediaPart, TextPart
from megatron_anymal.generation.answers import Answer, Reply, Stream
from megatron_anymal.generation.chat import Chat
from megatron_anymal.generation.checkpoint_generator import NativeGenerator
from megatron_anymal.generation.generator import Generator, Watch
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.sampling import Sampling
from megatron_anymal.integrity.checked_generator import CheckedGenerator
from megatron_anymal.integrity.checks import IntegrityChecks
from megatron_anymal.integrity.config import IntegrityConfig, read_integrity

SAMPLING = Sampling(max_new_tokens=400)


class Reciter(Generator):
    """Answers a prompt "N" with the N-th of its texts, character by character, and keeps what it was asked."""

    kinds = ("image",)

    def __init__(self, texts: Sequence[str]):
        self.texts, self.asked, self.spoken = texts, list[str](), 0

    def _log_likelihoods(self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
        raise NotImplementedError

    def _answer(
        self, prompts: Sequence[Prompt], numbers: Sequence[int], sampling: Sampling, watch: Watch
    ) -> list[Reply]:
        replies = []
        for prompt, number in zip(prompts, numbers):
            [text] = [p.text for p in prompt.parts if isinstance(p, TextPart) and not p.control][-1:]
            self.asked.append(text)
            answer = Answer(number, lambda tokens: "".join(map(chr, tokens)), {0}, (), sampling.max_new_tokens)
            for letter in self.texts[len(self.asked) - 1] + "\0":
                if not answer.done:
                    self.spoken += 1
                    answer.add(ord(letter))
                    watch(answer)
            replies.append(answer.reply)
        return replies


@pytest.fixture(scope="module")
def words(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file of the text classifier."""
    return integrity_file(tmp_path_factory.mktemp("words") / "integrity.yaml", {"words": text_section(text_model)})


@pytest.fixture(scope="module")
def config(words: str) -> IntegrityConfig:
    return read_integrity(words)


def prompt(text: str) -> Prompt:
    return Prompt([TextPart(text)], [])


HARMLESS = "The dog runs near the river. What is this? It is a small boat, e.g. a red one. A cat sits"
VIOLATING = "The dog runs near. The old zorpal sits under a tree. The cat sits."


def test_nothing_of_a_violating_sentence_is_streamed(config: IntegrityConfig) -> None:
    reciter, shown = Reciter([VIOLATING]), list[str]()
    checked = CheckedGenerator(reciter, config)
    [answer] = checked.answer([prompt("what is this")], SAMPLING, watch=Stream(shown.append))
    assert "".join(shown) == "The dog runs near."
    assert answer == checked.rejections[0].text and checked.rejections[0].code == "output_text/words/zorp"
    # Generation ended with the sentence: one more character is needed to know its end.
    assert reciter.spoken <= VIOLATING.index("The cat") + 6
    assert "1 queries checked, 1 rejected (output_text/words/zorp 1)" in checked.summary()


def test_a_harmless_stream_is_unchanged(config: IntegrityConfig) -> None:
    shown, plain = list[str](), list[str]()
    checked = CheckedGenerator(Reciter([HARMLESS]), config)
    [answer] = checked.answer([prompt("what is this")], SAMPLING, watch=Stream(shown.append))
    [expected] = Reciter([HARMLESS]).answer([prompt("what is this")], SAMPLING, watch=Stream(plain.append))
    assert "".join(shown) == "".join(plain) == answer == expected and not checked.rejections


def test_a_batch_loses_its_rejected_queries_only(config: IntegrityConfig) -> None:
    reciter = Reciter([HARMLESS, VIOLATING, "A boat."])
    checked = CheckedGenerator(reciter, config)
    prompts = ["what", "the blickan", "is", "this"]
    answers = checked.answer(list(map(prompt, prompts)), SAMPLING, 4)
    # A rejected prompt never reaches the model.
    assert reciter.asked == ["what", "is", "this"]
    assert {n: r.code for n, r in checked.rejections.items()} == {
        1: "input_text/words/blick",
        2: "output_text/words/zorp",
    }
    assert answers == [HARMLESS, checked.rejections[1].text, checked.rejections[2].text, "A boat."]
    # The next call numbers its prompts from 0 again.
    reciter.texts = [*reciter.texts, "One.", "Two."]
    assert checked.answer([prompt("a"), prompt("b")], SAMPLING) == ["One.", "Two."] and 1 not in checked.rejections


def test_streamed_or_not_the_verdict_is_the_same(config: IntegrityConfig) -> None:
    for text in (HARMLESS, VIOLATING, "small " * 120 + "blickan " + "red " * 50):
        whole, streamed = (CheckedGenerator(Reciter([text]), config) for _ in range(2))
        first = whole.answer([prompt("what")], Sampling(max_new_tokens=2000))
        second = streamed.answer([prompt("what")], Sampling(max_new_tokens=2000), watch=Stream(lambda text: None))
        assert bool(whole.rejections) == bool(streamed.rejections) == (text != HARMLESS)
        assert re.sub(r"[\d.]+\)", "", first[0]) == re.sub(r"[\d.]+\)", "", second[0])


def test_a_rejected_turn_leaves_the_conversation(config: IntegrityConfig) -> None:
    reciter = Reciter([VIOLATING, "A cat sits."])
    lines = iter(["tell me", "the zorpen", "and now?"])
    shown: list[str] = []

    def read(_: str) -> str:
        if (line := next(lines, None)) is None:
            raise EOFError
        return line

    Chat(CheckedGenerator(reciter, config), SAMPLING, read, shown.append).run()
    output = "".join(shown).splitlines()
    assert output[1] == "The dog runs near." and output[2].startswith("(refused: output_text/words/zorp ")
    assert output[4].startswith("(refused: input_text/words/zorp ") and output[6] == "A cat sits."
    assert reciter.asked == ["tell me", "and now?"] and "zorpal" not in "".join(shown)


@pytest.fixture(scope="module")
def run_dir(mixed_shards: str, tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run with a checkpoint."""
    folder = tmp_path_factory.mktemp("integrity_run")
    config = make_config(mixed_shards, tokenizer_folder, folder)
    config.trainer.max_steps = config.exp_manager.checkpoint.every_n_train_steps = 1
    run_ranks(1, train, config)
    return folder


def commands(run_dir: Path, shards: str, folder: Path, *further: str) -> dict[str, Any]:
    """In a rank: what `generate`, `generate --stream` and `evaluate` print; rank 0 writes `a.jsonl` and `e.json`."""
    import contextlib
    import io

    (folder / "prompts.jsonl").write_text('{"parts": [{"text": "what is this"}]}\n{"parts": [{"text": "zorpal"}]}\n')
    outputs = {}
    checkpoint = f"--checkpoint={run_dir}"
    for name, words in {
        "generate": ["generate", checkpoint, f"--prompts={folder / 'prompts.jsonl'}", f"--out={folder / 'a.jsonl'}"],
        "stream": ["generate", checkpoint, "--text=what is this", "--stream"],
        "evaluate": ["evaluate", checkpoint, f"--data={shards}", "--limit=3", f"--out={folder / 'e.json'}"],
    }.items():
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert main([*words, "--max-new-tokens=5", *further]) == 0
        outputs[name] = [out.getvalue(), err.getvalue()]
    return outputs


def written(folder: Path) -> dict[str, str]:
    """What `commands` wrote; read after its ranks have ended, because the others do not wait for rank 0's last file."""
    return {"a": (folder / "a.jsonl").read_text(), "e": (folder / "e.json").read_text()}


def test_commands_with_and_without_the_option(run_dir: Path, mixed_shards: str, tmp_path: Path, words: str) -> None:
    folders = [tmp_path / name for name in ("plain", "checked")]
    for folder in folders:
        folder.mkdir()
    [plain] = run_ranks(1, commands, run_dir, mixed_shards, folders[0])
    [checked] = run_ranks(1, commands, run_dir, mixed_shards, folders[1], f"--integrity={words}")
    files, checked_files = map(written, folders)
    rows, other = ([json.loads(line) for line in contents["a"].splitlines()] for contents in (files, checked_files))
    # Harmless answers are the same, and a rejected prompt has a reason code.
    assert other[0] == rows[0] and "rejected" not in rows[1]
    assert other[1]["answer"].startswith("(refused: input_text/words/zorp ")
    assert other[1]["rejected"]["stage"] == "input_text" and other[1]["rejected"]["score"] >= 0.5
    assert checked["stream"][0] == plain["stream"][0] and checked["evaluate"][0] == plain["evaluate"][0]
    scores = json.loads(checked_files["e"])
    assert scores.pop("rejected") == {"trained": {}} and scores == json.loads(files["e"])
    for name in ("generate", "stream", "evaluate"):
        assert re.search(r"integrity: \d+ queries checked, . rejected.* s in checks, .*% of", checked[name][1])
        assert "integrity" not in "".join(plain[name])


def test_two_processes_reject_the_same(run_dir: Path, mixed_shards: str, tmp_path: Path, words: str) -> None:
    """The classifiers run on one process of a tensor-parallel model; the other one learns what they found."""
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    option = f"--integrity={words}"
    [alone] = run_ranks(1, commands, run_dir, mixed_shards, tmp_path / "one", option)
    first, second = run_ranks(2, commands, run_dir, mixed_shards, tmp_path / "two", option)
    assert written(tmp_path / "two") == written(tmp_path / "one") and first["stream"][0] == alone["stream"][0]
    assert second["stream"] == ["", ""]


def pair_verdicts(run_dir: Path, folder: Path) -> tuple[list[Any], list[Any], list[float]]:
    """In a rank: rejections by a pair classifier at two thresholds, and the expected probability of its first word."""
    picture = MediaFile(png(1), "png")
    about = Prompt([MediaPart("0.png", ""), TextPart("what is this")], [picture])
    plain, answers = Prompt([TextPart("what is this")], []), ["one two", "seven", "walk"]
    section = {"kind": "anymal", "path": str(run_dir), "question": "{answer} is this a motion", "chat": False}
    section["words"] = ["three", "four"]
    generator = NativeGenerator.of_run(str(run_dir))
    asked = [Prompt([about.parts[0], TextPart(f"{answer} is this a motion")], [picture]) for answer in answers]
    scores = generator.log_likelihoods(asked, [["three", "four"]] * 3)
    expected = [1 / (1 + math.exp(second - first)) for first, second in scores]
    verdicts = []
    for threshold in (1e-6, sorted(expected)[1]):
        file = integrity_file(folder / "pair.yaml", {"pair": {**section, "threshold": threshold}})
        checks = IntegrityChecks(read_integrity(file), ("image", "audio"))
        verdicts.append(checks.check_answers([about, about, about, plain], [*answers, "one"]))
    return verdicts[0], verdicts[1], expected


def test_a_pair_classifier_judges_by_likelihood(run_dir: Path, tmp_path: Path) -> None:
    [(all_of_them, some, expected)] = run_ranks(1, pair_verdicts, run_dir, tmp_path)
    # Without media there is no pair.
    assert [r.score if r else None for r in all_of_them] == [*map(pytest.approx, expected), None]
    assert {r.code for r in all_of_them if r} == {"image_and_output/pair/three"}
    assert [bool(r) for r in some[:3]] == [p >= sorted(expected)[1] - 1e-9 for p in expected]


def test_media_that_nothing_can_look_at_are_not_written(text_model: Path, image_model: Path, tmp_path: Path) -> None:
    """Answers with codes, and prompts with them, need the file's permission if it has a classifier of images."""
    sections = {"words": text_section(text_model), "squares": image_section(image_model)}
    drawn = Sampling(max_new_tokens=400, modalities=("text", "picture"))
    item = CodesPart("a.codes.npy", "picture")
    with_codes = Prompt([item, TextPart("what")], [MediaFile(b"", "npy")])
    strict = CheckedGenerator(Reciter([HARMLESS] * 2), read_integrity(integrity_file(tmp_path / "a.yaml", sections)))
    with pytest.raises(ConfigError, match=r"none can look at 'picture'.*--modalities text, or add codes to unch"):
        strict.replies([prompt("what")], drawn)
    assert strict.replies([with_codes], SAMPLING)[0].text == strict.rejections[0].text
    assert strict.rejections[0].code == "input_image/unchecked"
    stated = integrity_file(tmp_path / "b.yaml", sections, unchecked_media=["codes"])
    lenient = CheckedGenerator(Reciter([HARMLESS] * 2), read_integrity(stated))
    assert [reply.text for reply in lenient.replies([with_codes, prompt("what")], drawn)] == [HARMLESS] * 2
    texts = integrity_file(tmp_path / "c.yaml", {"words": text_section(text_model)})
    assert CheckedGenerator(Reciter([HARMLESS]), read_integrity(texts)).replies([prompt("what")], drawn)
