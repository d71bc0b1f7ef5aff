"""`--interactive`, driven by scripted lines: turns, media, commands, mistakes, interruptions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_anymal.data.chat_format import open_prompt, parse_messages
from megatron_anymal.data.prompt_encoder import MediaFile
from megatron_anymal.data.records import MediaPart
from megatron_anymal.generation.answers import Answer, Reply
from megatron_anymal.generation.chat import Chat
from megatron_anymal.generation.generator import Generator, Watch
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.running_batch import RunningBatch
from megatron_anymal.generation.sampling import Sampling
from megatron_anymal.modalities import MediaError


class Parrot(Generator):
    """Answers "answer NUMBER has words" character by character, and keeps the prompts it received."""

    kinds = ("image", "imu")
    max_positions = 40

    def __init__(self, interrupt_at: int = -1):
        self.asked: list[Prompt] = []
        self._interrupt_at = interrupt_at
        self.silent = False

    def running_batch(self) -> RunningBatch:
        raise NotImplementedError

    def _log_likelihoods(self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
        raise NotImplementedError

    def _answer(
        self, prompts: Sequence[Prompt], numbers: Sequence[int], sampling: Sampling, watch: Watch
    ) -> list[Reply]:
        [prompt], [first] = prompts, numbers
        if any(file.data == b"broken" for file in prompt.media):
            raise MediaError("'broken.png': cannot be decoded.")
        self._room(first, 3 * len(prompt.parts), sampling)
        self.asked.append(prompt)
        answer = Answer(first, lambda tokens: "".join(map(chr, tokens)), {0}, sampling.stop, 100)
        text = "" if self.silent else f"answer {len(self.asked)} has words"
        for position, letter in enumerate(text + "\0"):
            if position == self._interrupt_at:
                raise KeyboardInterrupt
            answer.add(ord(letter))
            watch(answer)
        return [answer.reply]


def play(generator: Parrot, lines: Sequence[Any]) -> list[str]:
    """Terminal output for the given lines; an exception among them is raised when its turn comes."""
    shown: list[str] = []
    left = iter(lines)

    def read(_: str) -> str:
        line = next(left, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    assert Chat(generator, Sampling(), read, shown.append).run() == 0
    return "".join(shown).splitlines()


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"text": c} if isinstance(c, str) else c for c in content]}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def laid_out(*messages: dict[str, Any]) -> list[Any]:
    return open_prompt(parse_messages(list(messages), ""))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(b"picture")
    (tmp_path / "two words.npy").write_bytes(b"walk")
    (tmp_path / "broken.png").write_bytes(b"broken")
    return tmp_path


def test_turns_build_a_conversation() -> None:
    parrot = Parrot()
    shown = play(parrot, ["hello", "/system be brief", "and now?", "/quit", "never read"])
    assert shown[1:] == ["answer 1 has words", "(system: be brief)", "answer 2 has words"]
    first, second = parrot.asked
    assert first.parts == laid_out(user("hello"))
    system = {"role": "system", "content": "be brief"}
    assert second.parts == laid_out(system, user("hello"), assistant("answer 1 has words"), user("and now?"))


def test_media_stand_where_they_are_named(files: Path) -> None:
    parrot = Parrot()
    play(
        parrot,
        [
            f"/image {files}/a.png",
            "compare \\",
            f"/imu '{files}/two words.npy' rate=50 place=wrist",
            "with",
            f"/media {files}/a.png",
            "",
        ],
    )
    one, two = parrot.asked
    image = {"media": f"{files}/a.png", "modality": "image"}
    imu = {"media": f"{files}/two words.npy", "modality": "imu", "rate": 50, "place": "wrist"}
    turn = user(image, "compare ", imu, "with")
    assert one.parts == laid_out(turn)
    assert one.media == [MediaFile(b"picture", "png"), MediaFile(b"walk", "npy")]
    last = [part for part in two.parts if isinstance(part, MediaPart)]
    assert [part.modality for part in last] == ["image", "imu", ""] and len(two.media) == 3


def test_lines_that_go_on_are_one_text_and_a_doubled_slash_is_a_slash() -> None:
    parrot = Parrot()
    play(parrot, ["", "one\\", "//two", "//help"])
    assert [prompt.parts for prompt in parrot.asked] == [
        laid_out(user("one\n/two")),
        laid_out(user("one\n/two"), assistant("answer 1 has words"), user("/help")),
    ]


MISTAKES: list[tuple[str, str]] = [
    ("/imag a.png", "unknown command /imag. Did you mean /image?"),
    ("/xyzzy", "unknown command /xyzzy. See /help."),
    ("/image /nowhere.png", "no media file '/nowhere.png'"),
    ("/media", "/media needs a file name"),
    ("/image 'a.png", "/image needs a file name"),
    ("/image FILES/a.png rate", "'rate' is not a key=value"),
    ("/image FILES/a.png modality=imu", "'modality=imu' is not a key=value"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_the_conversation_goes_on(line: str, message: str, files: Path) -> None:
    parrot = Parrot()
    shown = play(parrot, [line.replace("FILES", str(files)), "hello"])
    assert len(shown) == 3 and shown[1].startswith("error: ") and message in shown[1]
    assert [prompt.parts for prompt in parrot.asked] == [laid_out(user("hello"))]


def test_a_turn_that_fails_leaves_no_trace(files: Path) -> None:
    parrot = Parrot()
    shown = play(parrot, [f"/image {files}/broken.png", "what is it?", "hello"])
    assert shown[1:] == ["error: 'broken.png': cannot be decoded.", "answer 1 has words"]
    assert parrot.asked[0].parts == laid_out(user("hello")) and not parrot.asked[0].media
    parrot.silent = True
    assert "your turn was dropped" in play(parrot, ["hello"])[1]


def test_a_conversation_that_is_too_long_says_so() -> None:
    parrot = Parrot()
    shown = play(parrot, ["one", "two", "three", "/reset", "four"])
    assert shown[3].startswith("error: The conversation is too long.") and "40 positions" in shown[3]
    assert "/reset" in shown[3] and shown[5] == "answer 3 has words"
    assert parrot.asked[-1].parts == laid_out(user("four"))


def test_ctrl_c_stops_an_answer_and_keeps_what_was_shown() -> None:
    parrot = Parrot(interrupt_at=10)
    shown = play(parrot, ["hello", KeyboardInterrupt(), "more"])
    assert shown[1] == "answer 1 (stopped)" and "/quit" in shown[3]
    assert parrot.asked[1].parts == laid_out(user("hello"), assistant("answer 1"), user("more"))


def test_ctrl_c_drops_the_turn_that_is_being_written(files: Path) -> None:
    parrot = Parrot()
    play(parrot, [f"/image {files}/a.png", "and \\", KeyboardInterrupt(), "hello"])
    assert parrot.asked[0].parts == laid_out(user("hello")) and not parrot.asked[0].media


def test_a_line_of_wrong_bytes_is_a_mistake() -> None:
    shown = play(Parrot(), [UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "hello"])
    assert shown[1:] == ["error: the line is not UTF-8 (invalid start byte).", "answer 1 has words"]


def test_help_names_the_kinds() -> None:
    shown = "\n".join(play(Parrot(), ["/help"]))
    for word in ("/image, /imu", "/media", "/system", "/reset", "/quit", "rate=200"):
        assert word in shown
