"""Generation gives the same answers for every layout and batch size as transformers does with the same weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import train
from ranks import run_ranks
from tiny import CHAT, LLAMA, SPECIAL, WORDS, make_config, make_conversations
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_anymal.cli import evaluate
from megatron_anymal.config import RunConfig
from megatron_anymal.data.chat_format import open_prompt, parse_messages
from megatron_anymal.data.prompt_encoder import MediaFile
from megatron_anymal.data.records import DataError, MediaPart, Part, TextPart
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.data.tokenizer import Tokenizer
from megatron_anymal.generation.answers import Reply
from megatron_anymal.generation.chat import Chat
from megatron_anymal.generation.checkpoint_generator import NativeGenerator
from megatron_anymal.generation.evaluation import Question, permute_media, read_questions
from megatron_anymal.generation.prompts import Prompt, read_prompts
from megatron_anymal.generation.sampling import Sampling
from megatron_anymal.parallel import initialize

GREEDY = Sampling(max_new_tokens=6)
CUT = Sampling(max_new_tokens=6, repetition_penalty=1.3, stop=("seven",), temperature=1.0, top_k=20)


@pytest.fixture(scope="module")
def run_dir(mixed_shards: str, tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run with a checkpoint."""
    folder = tmp_path_factory.mktemp("generation")
    run_ranks(1, train, make_config(mixed_shards, tokenizer_folder, folder))
    return folder


@pytest.fixture(scope="module")
def chats(tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Conversations of one and two turns, with media in the user turns."""
    return make_conversations(tmp_path_factory.mktemp("chats") / "chats", tokenizer_folder, 24)


@pytest.fixture(scope="module")
def sft_dir(chats: str, tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short SFT run with adapters and a checkpoint."""
    folder = tmp_path_factory.mktemp("sft")
    config = make_config(chats, tokenizer_folder, folder)
    config.job, config.model.lora.r, config.model.optim.lr = "sft", 4, 0.05
    run_ranks(1, train, config)
    return folder


def answers(
    run_dir: Path, shards: str, stages: int, runs: dict[str, tuple[Sampling, int]], untrained: bool = False
) -> dict[str, list[str]]:
    """In a rank: return the checkpoint's answers to all samples for each sampling and batch size."""
    generator = NativeGenerator.of_run(str(run_dir), None, stages, untrained=untrained)
    prompts = [question.prompt for question in read_questions(shards)]
    return {name: generator.answer(prompts, sampling, batch) for name, (sampling, batch) in runs.items()}


@pytest.fixture(scope="module")
def alone(run_dir: Path, mixed_shards: str) -> dict[str, list[str]]:
    """Answers on one process."""
    runs = {
        "greedy": (GREEDY, 64),
        "one by one": (GREEDY, 1),
        "by sevens": (GREEDY, 7),
        "seed 1": (Sampling(6, temperature=1.0, seed=1), 64),
        "seed 1 again": (Sampling(6, temperature=1.0, seed=1), 7),
        "seed 2": (Sampling(6, temperature=1.0, seed=2), 64),
        "tiny top_p": (Sampling(6, temperature=1.0, top_p=1e-6, seed=3), 64),
        "penalty and stop": (CUT, 64),
        "cold": (Sampling(6, temperature=1e-6, seed=4), 64),
    }
    return run_ranks(1, answers, run_dir, mixed_shards, 1, runs)[0]


def test_batch_size_does_not_matter(alone: dict[str, list[str]]) -> None:
    assert len(alone["greedy"]) == 40 and len(set(alone["greedy"])) > 5, "too few distinct answers"
    assert alone["one by one"] == alone["greedy"]
    assert alone["by sevens"] == alone["greedy"]


def test_sampling_is_deterministic_by_seed(alone: dict[str, list[str]]) -> None:
    assert alone["seed 1 again"] == alone["seed 1"]
    assert alone["seed 2"] != alone["seed 1"]
    assert alone["seed 1"] != alone["greedy"]


def test_narrow_sampling_is_greedy(alone: dict[str, list[str]]) -> None:
    assert alone["tiny top_p"] == alone["greedy"]
    assert alone["cold"] == alone["greedy"]


@pytest.mark.parametrize(("world", "stages"), [(2, 1), (2, 2), (4, 2)])
def test_same_answers_under_every_layout(
    run_dir: Path, mixed_shards: str, alone: dict[str, list[str]], world: int, stages: int
) -> None:
    runs = {"greedy": (GREEDY, 16), "penalty and stop": (CUT, 16)}
    for rank_answers in run_ranks(world, answers, run_dir, mixed_shards, stages, runs):
        assert rank_answers == {name: alone[name] for name in runs}


def test_adapters_answer_conversations_the_same_under_every_layout(sft_dir: Path, chats: str) -> None:
    runs = {"greedy": (GREEDY, 7)}
    [alone] = run_ranks(1, answers, sft_dir, chats, 1, runs)
    for stages in (1, 2):
        for rank_answers in run_ranks(2, answers, sft_dir, chats, stages, runs):
            assert rank_answers == alone
    [untrained] = run_ranks(1, answers, sft_dir, chats, 1, runs, True)
    without_media = [n for n, q in enumerate(read_questions(chats)) if q.modality == "text"]
    assert without_media and all(alone["greedy"][n] != untrained["greedy"][n] for n in without_media[:3])


def test_conversations_are_asked_up_to_their_last_turn(chats: str, tokenizer_folder: str) -> None:
    index, questions = ShardIndex(chats), read_questions(chats)
    manifest = Path(chats).with_name("chats_source") / "manifest.jsonl"
    lines = {row["key"]: row for row in map(json.loads, manifest.read_text().splitlines())}
    tokenizer = Tokenizer(tokenizer_folder)
    placeholders = {name: 2 + n for n, name in enumerate(("image", "audio", "imu"))}
    assert len(questions) == 24 and {len(line["messages"]) for line in lines.values()} == {2, 4}
    for number, question in enumerate(questions):
        assert question.answer == lines[question.key]["messages"][-1]["content"]
        asked, whole = (
            tokenizer.document(parts, [2] * len(question.prompt.media), placeholders, closed=False).tokens
            for parts in (question.prompt.parts, index.sample(number).documents[0])
        )
        # The training document is the prompt, the answer and the end-of-turn token.
        assert whole == [*asked, *tokenizer.encode(question.answer), tokenizer.hf.get_vocab()[CHAT[2]]]


def test_a_preference_pair_is_no_question(tokenizer_folder: str, tmp_path: Path) -> None:
    pairs = make_conversations(tmp_path / "pairs", tokenizer_folder, 4, pairs=True)
    with pytest.raises(DataError, match=r"'image-00000'.*preference pair"):
        read_questions(pairs)


USER, ASSISTANT = {"role": "user", "content": "what is this"}, {"role": "assistant", "content": "a sound"}


def test_prompts_are_read_from_messages(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"picture")
    with_media = {"role": "user", "content": [{"text": "and this "}, {"media": "a.png"}]}
    lines = [{"messages": [USER]}, {"messages": [USER, ASSISTANT, with_media]}, {"parts": [{"text": "what"}]}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    one, two, three = read_prompts(str(path))
    assert one.parts == open_prompt(parse_messages([USER], "")) and not one.media
    assert two.parts == open_prompt(parse_messages([USER, ASSISTANT, with_media], ""))
    assert two.media == [MediaFile(b"picture", "png")]
    assert three.parts == [TextPart("what")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": [USER, ASSISTANT]}, "must end with the user turn to be answered, not with the assistant's"),
        ({"messages": [USER], "parts": [{"text": "what"}]}, "either `parts` or `messages`"),
        ({"text": "what"}, "either `parts` or `messages`"),
    ],
)
def test_a_prompt_that_asks_nothing_is_refused(line: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(line))
    with pytest.raises(DataError, match=f"prompts.jsonl:1: .*{message}"):
        read_prompts(str(path))


@pytest.fixture
def hf_folder(tmp_path: Path) -> str:
    """A transformers Llama whose weights are large enough for varied answers."""
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "initializer_range": 0.5}))
    model.save_pretrained(tmp_path / "hf")
    return str(tmp_path / "hf")


def answer_prompts(config: RunConfig, prompts: list[list[Part]], sampling: Sampling) -> list[str]:
    """In a rank: return a Llama's answers to texts and conversations."""
    generator = NativeGenerator.of_checkpoint(config, initialize(config), None)
    return generator.answer([Prompt(parts, []) for parts in prompts], sampling)


def chat_tokens(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Encode messages in the published chat format. The role names are not in this vocabulary, hence <unk>."""
    start, header_end, turn_end = tokenizer.convert_tokens_to_ids(CHAT)
    header = [start, tokenizer.unk_token_id or tokenizer.convert_tokens_to_ids("<unk>"), header_end]
    tokens = [tokenizer.bos_token_id]
    for message in messages:
        tokens += [*header, *tokenizer.encode(message["content"], add_special_tokens=False), turn_end]
    return tokens + header


@pytest.mark.parametrize("kind", ["texts", "conversations"])
@pytest.mark.parametrize("world", [1, 2])
def test_greedy_answers_are_those_of_transformers(
    hf_folder: str, mixed_shards: str, tokenizer_folder: str, tmp_path: Path, world: int, kind: str
) -> None:
    config = make_config(mixed_shards, tokenizer_folder, tmp_path / "run")
    config.model.language_model.config, config.model.language_model.path = {}, hf_folder
    config.trainer.devices = config.model.tensor_model_parallel_size = world
    texts = [" ".join(WORDS[n : n + 1 + n % 5]) for n in range(12)]
    hf, tokenizer = LlamaForCausalLM.from_pretrained(hf_folder).eval(), AutoTokenizer.from_pretrained(tokenizer_folder)
    if kind == "texts":
        prompts = [[TextPart(text)] for text in texts]
        asked = [[tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)] for text in texts]
    else:
        turns = ["user", "assistant", "user"]
        chats = [
            [{"role": role, "content": texts[n - position]} for position, role in enumerate(turns[2 * (n % 2) :])]
            for n in range(12)
        ]
        prompts = [open_prompt(parse_messages(messages, "")) for messages in chats]
        asked = [chat_tokens(tokenizer, messages) for messages in chats]
    generated = run_ranks(world, answer_prompts, config, prompts, Sampling(max_new_tokens=20))[0]
    ends = tokenizer.convert_tokens_to_ids([SPECIAL[1], CHAT[2]])
    expected, last = [], []
    for tokens in asked:
        start = len(tokens)
        # A full forward pass for each token, without a cache that could hide an error.
        while len(tokens) < start + 20:
            with torch.no_grad():
                logits = hf(torch.tensor([tokens])).logits[0, -1]
            # Placeholder tokens are never generated.
            logits[tokenizer.convert_tokens_to_ids(SPECIAL[2:5])] = float("-inf")
            tokens.append(int(logits.argmax()))
            if tokens[-1] in ends:
                break
        expected.append(tokenizer.decode(tokens[start:], skip_special_tokens=True))
        last.append(tokens[-1])
    assert generated == expected
    assert len(set(expected)) > 5 and any(len(text.split()) >= 8 for text in expected)
    assert set(ends) & set(last), "no answer ends with an end token"


def questions() -> list[Question]:
    """Questions with an image, audio, an image and audio in this order, text only, and a single one with IMU data."""
    kinds = [("image",)] * 7 + [("audio",)] * 2 + [("image", "audio")] * 3 + [("imu",)] + [()] * 4
    made = []
    for number, of_this in enumerate(kinds):
        media = [MediaPart(f"{number}-{kind}", kind, {"rate": number}) for kind in of_this]
        parts = [part for one in media for part in (one, TextPart(f"question {number}"))] or [TextPart("no media")]
        files = [MediaFile(f"{number}-{kind}".encode(), "x") for kind in of_this]
        made.append(Question(f"key {number}", Prompt(parts, files), Reply.of_parts([f"answer {number}"])))
    return made


@pytest.mark.parametrize("seed", range(5))
def test_permuted_media_are_a_derangement_within_their_kinds(seed: int) -> None:
    before = questions()
    after = permute_media(before, seed)
    assert [(q.key, q.answer) for q in after] == [(q.key, q.answer) for q in before]
    for old, new in zip(before, after):
        texts = [[part for part in q.prompt.parts if isinstance(part, TextPart)] for q in (old, new)]
        assert texts[0] == texts[1]
        media = [[part for part in q.prompt.parts if isinstance(part, MediaPart)] for q in (old, new)]
        assert [m.modality for m in media[0]] == [m.modality for m in media[1]]
        assert [type(part) for part in old.prompt.parts] == [type(part) for part in new.prompt.parts]
        # Attributes and bytes of an item stay together.
        assert [m.media.encode() for m in media[1]] == [file.data for file in new.prompt.media]
        alone_in_its_kind = not media[0] or media[0][0].modality == "imu"
        assert (old.prompt == new.prompt) == alone_in_its_kind
    given = sorted(file.data for q in after for file in q.prompt.media)
    assert given == sorted(file.data for q in before for file in q.prompt.media)


def talk(run_dir: Path, lines: list[str]) -> tuple[list[str], list[str]]:
    """In a rank: return the output of a chat session, and the answers to its turns from direct calls."""
    shown: list[str] = []
    left = iter([*lines, "/quit"])
    generator = NativeGenerator.of_run(str(run_dir))
    sampling = Sampling(6, temperature=1.5, seed=7)
    Chat(generator, sampling, lambda _: next(left), shown.append).run()
    messages: list[dict[str, Any]] = []
    answers = []
    for line in lines:
        messages.append({"role": "user", "content": line})
        prompt = Prompt(open_prompt(parse_messages(messages, "")), [])
        [answer] = generator.answer([prompt], replace(sampling, seed=7 + len(messages) - 1))
        messages.append({"role": "assistant", "content": answer})
        answers.append(answer.strip())
    return "".join(shown).splitlines()[1:], answers


def test_a_checkpoint_can_be_talked_to(sft_dir: Path) -> None:
    shown, expected = run_ranks(1, talk, sft_dir, ["what is this", "one two three"])[0]
    assert shown == expected and all(expected)


def run_evaluate(argv: list[str]) -> int:
    return evaluate.main(argv)


def test_evaluate_counts_exact_answers(run_dir: Path, mixed_shards: str, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    argv = ["--checkpoint", str(run_dir), "--data", mixed_shards, "--limit", "10", "--max-new-tokens", "4"]
    argv += ["--permute-media", "--untrained", "--out", str(out)]
    assert run_ranks(1, run_evaluate, argv) == [0]
    result: dict[str, Any] = json.loads(out.read_text())
    assert set(result["scores"]) == {"trained", "permuted", "untrained"}
    for name, scores in result["scores"].items():
        rows = result["answers"][name]
        assert len(rows) == 10 and sum(score["samples"] for score in scores.values()) == 10
        for modality, score in scores.items():
            right = [row["given"] == row["expected"] for row in rows if row["modality"] == modality]
            assert score["accuracy"] == pytest.approx(sum(right) / len(right))
    assert result["answers"]["untrained"] != result["answers"]["trained"]
