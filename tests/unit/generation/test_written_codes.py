"""Answers with media as codes: every path enforces the grammar and gives the same codes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from codes import codes
from discrete_model import discrete_generator, is_grammatical
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from megatron_anymal.config import ConfigError
from megatron_anymal.data.code_grammar import CodeItem
from megatron_anymal.data.codes import read_codes
from megatron_anymal.data.prompt_encoder import MediaFile, open_parts
from megatron_anymal.data.records import CodesPart, DataError, TextPart
from megatron_anymal.generation.answers import Reply, Stream
from megatron_anymal.generation.chat import Chat
from megatron_anymal.generation.export_generator import ExportedGenerator, _as_json
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.sampling import CodeSampling, Sampling
from megatron_anymal.modalities import MediaError

ALL = ("text", "picture", "speech")
HOT = {name: CodeSampling(temperature=1.3, top_p=1.0) for name in ("picture", "speech")}
GREEDY = {name: CodeSampling(temperature=0.0) for name in ("picture", "speech")}


@pytest.fixture(scope="module")
def generator(tokenizer_folder: str) -> ExportedGenerator:
    return discrete_generator(tokenizer_folder)


def words(count: int) -> Prompt:
    return Prompt([TextPart(" ".join(["seven"] * count))], [])


def ids_of(generator: ExportedGenerator, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[int]]:
    """Tokens of the answers of a running batch."""
    batch = generator.running_batch()
    everyone = [batch.read(prompt, sampling) for prompt in prompts]
    for number, one in enumerate(everyone):
        one.answer.number = number
    batch.join(everyone)
    while batch.running:
        batch.keep([row for row, one in enumerate(batch.running) if not one.answer.done])
        if batch.running:
            batch.step()
    return [one.answer.tokens for one in everyone]


def cut(tokens: Sequence[int]) -> list[int]:
    """Tokens of `generate` up to the end of the answer."""
    return list(itertools.takewhile(lambda token: token not in (1, 28), tokens))


@pytest.mark.parametrize("room", [9, 24])
def test_a_thousand_answers_of_an_untrained_model_obey_the_grammar(generator: ExportedGenerator, room: int) -> None:
    sampling = Sampling(room, temperature=1.5, modalities=ALL, codes=HOT, seed=room)
    answers = ids_of(generator, [words(1 + n % 3) for n in range(500)], sampling)
    assert all(map(is_grammatical, answers))
    assert sum(32 in answer for answer in answers) > 15 and sum(39 in answer for answer in answers) > 15
    assert len(set(map(tuple, answers))) > 300


def test_transformers_generate_obeys_the_grammar(generator: ExportedGenerator) -> None:
    inputs = generator._processor([_as_json(words(1 + n % 3)) for n in range(400)])
    torch.manual_seed(0)
    settings: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "top_k": 0, "max_new_tokens": 20}
    rows = generator._model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()
    answers = list(map(cut, rows))
    assert all(map(is_grammatical, answers)) and sum(39 in answer for answer in answers) > 50
    beams = generator._model.generate(**inputs, num_beams=3, num_return_sequences=2, do_sample=False, max_new_tokens=12)
    assert all(is_grammatical(cut(row)) for row in beams[:, inputs["input_ids"].shape[1] :].tolist())
    drawn = generator._model.generate(**inputs, **settings, modalities=["picture"])
    parts = generator._processor.parts(drawn, inputs)
    assert all(isinstance(part, CodeItem) and part.name == "picture" for row in parts for part in row)
    assert all(row and row[0].codes.shape == (1, 3) for row in parts)


def test_without_the_grammar_it_would_be_broken(generator: ExportedGenerator) -> None:
    """The same model, without its processor of the grammar, writes codes anywhere."""
    from transformers import GenerationMixin

    inputs = generator._processor([_as_json(words(1 + n % 3)) for n in range(50)])
    torch.manual_seed(0)
    output = GenerationMixin.generate(generator._model, **inputs, do_sample=True, top_k=0, max_new_tokens=20)
    answers = [cut(row) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]
    assert not all(map(is_grammatical, answers))


def test_all_paths_give_the_same_codes(generator: ExportedGenerator) -> None:
    prompts = [words(1 + n) for n in range(12)]
    sampling = Sampling(24, modalities=("picture", "speech"), codes=GREEDY)
    replies = generator.replies(prompts, sampling, 5)
    running = ids_of(generator, prompts, sampling)
    assert [generator.grammar.parts(tokens) for tokens in running] == [list(reply.parts) for reply in replies]
    inputs = generator._processor([_as_json(prompt) for prompt in prompts])
    asked = {"modalities": ["picture", "speech"], "max_new_tokens": 24, "do_sample": False}
    cached, plain = (generator._model.generate(**inputs, **asked, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)
    assert generator._processor.parts(cached, inputs) == [list(reply.parts) for reply in replies]
    assert len({reply.parts for reply in replies}) > 6


def test_codes_have_settings_of_their_own(generator: ExportedGenerator) -> None:
    """Text is greedy while codes are drawn from what transformers' processors leave."""
    sampling = Sampling(7, modalities=("picture",), codes={"picture": CodeSampling(temperature=2.0, top_p=0.6)})
    prompt = generator._processor([_as_json(words(1))])["input_ids"][0].tolist()
    with torch.no_grad():
        logits = generator._model(torch.tensor([[*prompt, 32]])).logits[:, -1]
    logits[:, [n for n in range(49) if n not in range(34, 39)]] = float("-inf")
    left = TopPLogitsWarper(0.6)(None, TemperatureLogitsWarper(2.0)(None, logits))[0].softmax(0)[34:39]
    drawn = [
        int(ids_of(generator, [words(1)], Sampling(**{**vars(sampling), "seed": seed}))[0][1]) - 34
        for seed in range(200)
    ]
    counts = torch.bincount(torch.tensor(drawn), minlength=5) / 200
    assert 1 < (left > 0).sum() < 5 and (counts[left == 0] == 0).all()
    assert (counts - left).abs().max() < 0.15


def test_the_defaults_are_those_of_the_paper() -> None:
    sampling = Sampling(temperature=0.5, top_p=0.2)
    image, speech = (sampling.of_codes("x", fixed=fixed) for fixed in (True, False))
    assert (image.temperature, image.top_p, image.repetition_penalty) == (1.0, 0.7, 1.0)
    assert (speech.temperature, speech.top_p, speech.repetition_penalty) == (1.0, 0.7, 1.15)


def test_a_model_that_writes_text_alone_is_asked_for_text(generator: ExportedGenerator) -> None:
    answers = ids_of(generator, [words(n) for n in range(1, 30)], Sampling(20, temperature=1.5))
    assert max(token for answer in answers for token in answer) < 32


def test_an_item_that_does_not_fit_is_not_begun(generator: ExportedGenerator) -> None:
    short = Sampling(4, temperature=1.5, modalities=("text", "picture"), codes=HOT)
    answers = ids_of(generator, [words(1 + n % 3) for n in range(200)], short)
    assert not any(32 in answer for answer in answers) and any(len(answer) == 4 for answer in answers)
    with pytest.raises(ConfigError, match=r"An answer of 4 token\(s\) has no room for an item of picture"):
        generator.replies([words(1)], Sampling(4, modalities=("picture",)))
    with pytest.raises(ValueError, match=r"An answer of 4 token\(s\) has no room for an item of picture"):
        generator._model.generate(torch.tensor([[0, 8]]), modalities=["picture"], max_new_tokens=4)


def test_replies_are_texts_and_items_in_order(generator: ExportedGenerator) -> None:
    sampling = Sampling(40, temperature=1.5, modalities=ALL, codes=HOT, seed=4)
    prompts = [words(1 + n % 5) for n in range(60)]
    replies, tokens = generator.replies(prompts, sampling), ids_of(generator, prompts, sampling)
    interleaved = 0
    for reply, ids in zip(replies, tokens):
        parts = generator.grammar.parts(ids)
        texts = [generator._decode(part) if isinstance(part, list) else part for part in parts]
        assert reply.parts == tuple(part for part in texts if part != "")
        names = [item.name for item in reply.items]
        assert all(f"[{name} {number}]" in reply.text for number, name in enumerate(names, start=1))
        kinds = [isinstance(part, CodeItem) for part in reply.parts]
        interleaved += kinds[:4] in ([False, True, False, True], [True, False, True, False])
    assert interleaved > 3


def test_answers_with_items_are_streamed(generator: ExportedGenerator) -> None:
    for seed in range(6):
        pieces: list[str] = []
        sampling = Sampling(30, temperature=1.5, modalities=ALL, codes=HOT, seed=seed)
        [reply] = generator.replies([words(2)], sampling, watch=Stream(pieces.append))
        assert "".join(pieces) == reply.text.strip()


def test_a_stop_text_is_looked_for_in_texts_alone(generator: ExportedGenerator) -> None:
    sampling = Sampling(30, temperature=1.5, modalities=ALL, codes=HOT, stop=("picture", "speech", "seven"))
    replies = generator.replies([words(1 + n % 4) for n in range(80)], sampling)
    assert any(len(reply.items) > 1 for reply in replies) and not any("seven" in reply.text for reply in replies)


def test_grammatical_says_what_the_model_would_have_done(generator: ExportedGenerator, tokenizer_folder: str) -> None:
    sampling = Sampling(12, modalities=ALL)
    assert not all(reply.grammatical for reply in generator.replies([words(1 + n) for n in range(8)], sampling))
    good = discrete_generator(tokenizer_folder)
    # One of two text tokens is always likelier than anything else.
    head = good._model.language_model.lm_head.weight
    with torch.no_grad():
        head[9] = -head[8]
        head[[n for n in range(49) if n not in (8, 9)]] = 0
    assert all(reply.grammatical for reply in good.replies([words(1 + n) for n in range(8)], sampling))


def item_prompt(name: str, data: bytes, **more: Any) -> Prompt:
    value = {"parts": [{"media": f"{name}.codes.npy", "modality": name, **more}, {"text": "what is this"}]}
    return Prompt(open_parts(value, "a prompt"), [MediaFile(data, "npy")])


def test_prompts_have_codes(generator: ExportedGenerator) -> None:
    def ids(prompt: Prompt) -> list[int]:
        return generator._processor([_as_json(prompt)])["input_ids"][0].tolist()

    plain = ids(Prompt([TextPart("what is this")], []))
    assert ids(item_prompt("picture", codes([4, 0, 1]))) == [0, 32, 38, 34, 35, 33, *plain[1:]]
    # Speech in a prompt is its content; in an earlier answer, all of it.
    assert ids(item_prompt("speech", codes([[1, 2], [3, 0]]))) == [0, 39, 42, 43, 40, *plain[1:]]
    assert ids(item_prompt("speech", codes([[1, 2], [3, 0]]), loss=True)) == [0, 39, 42, 43, 48, 45, 40, *plain[1:]]
    twice = open_parts(
        {"messages": [{"role": "user", "content": [{"media": "a.codes.npy", "modality": "picture"}] * 2}]}, ""
    )
    files = [MediaFile(codes([4, 4, 4]), "npy"), MediaFile(codes([0, 0, 0]), "npy")]
    assert [n for n in ids(Prompt(twice, files)) if n > 31] == [32, 38, 38, 38, 33, 32, 34, 34, 34, 33]


BAD: list[tuple[Prompt, str]] = [
    (item_prompt("picture", codes([1, 5, 0])), "'picture.codes.npy' has the code 5 at position 1, outside codebook 0"),
    (item_prompt("picture", codes([1, 0])), "'picture.codes.npy' has 2 codes per codebook"),
    (
        item_prompt("sound", codes([1, 0])),
        "'sound.codes.npy' has codes of 'sound', but model.discrete has: picture, speech",
    ),
    (item_prompt("picture", b"no"), "'picture.codes.npy' is not an .npy file of codes"),
    (item_prompt("speech", codes([1]), loss=True), r"has codes of 'speech' with 1 codebook\(s\)"),
]


@pytest.mark.parametrize(("prompt", "says"), BAD)
def test_bad_codes_in_prompts_are_named(generator: ExportedGenerator, prompt: Prompt, says: str) -> None:
    with pytest.raises((DataError, MediaError), match=says):
        generator.replies([prompt], Sampling(4))


def test_codes_of_another_tokenizer_are_refused(tokenizer_folder: str) -> None:
    from megatron_anymal.config import DiscreteConfig

    strict = discrete_generator(
        tokenizer_folder, {"picture": DiscreteConfig(codebooks=[5], codes_per_item=3, tokenizer_hash="h1")}
    )
    with pytest.raises(DataError, match=r"codes of 'picture' of the tokenizer 'h2', but .*tokenizer_hash=h1"):
        strict.replies([item_prompt("picture", codes([1, 2, 3]), tokenizer_hash="h2")], Sampling(4))
    assert strict.replies([item_prompt("picture", codes([1, 2, 3]), tokenizer_hash="h1")], Sampling(4))


def test_what_the_model_does_not_write_is_refused(generator: ExportedGenerator, tokenizer_folder: str) -> None:
    with pytest.raises(ConfigError, match="This model cannot generate 'sound'; it can generate: text, picture, s"):
        generator.replies([words(1)], Sampling(9, modalities=("text", "sound")))
    with pytest.raises(ConfigError, match="This model cannot generate 'sound'"):
        generator.replies([words(1)], Sampling(9, codes={"sound": CodeSampling()}))
    with pytest.raises(ValueError, match="This model cannot generate 'sound'"):
        generator._model.generate(torch.tensor([[0, 8]]), modalities=["sound"], max_new_tokens=9)
    from served_models import export_generator

    plain = export_generator(tokenizer_folder)
    with pytest.raises(
        ConfigError, match=r"'picture' cannot be written by this model, whose run has no model.discrete"
    ):
        plain.replies([words(1)], Sampling(9, modalities=("picture",)))
    with pytest.raises(ValueError, match="this model writes text only"):
        plain._model.generate(torch.tensor([[0, 8]]), modalities=["picture"], max_new_tokens=9)
    with pytest.raises(DataError, match=r"'picture.codes.npy' is codes, but the model's vocabulary has none"):
        plain.replies([item_prompt("picture", codes([1]))], Sampling(9))


def test_a_prompt_that_ends_within_an_item_is_refused(generator: ExportedGenerator) -> None:
    with pytest.raises(ValueError, match=r"Row 1 of input_ids ends within an item of 'picture', after 1 code\(s\)"):
        generator._model.generate(torch.tensor([[0, 8, 8, 8], [0, 8, 32, 34]]), max_new_tokens=9)


def test_a_stopped_answer_keeps_its_items(generator: ExportedGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Prompt] = []
    answer = generator.replies

    def interrupted(prompts: Sequence[Prompt], sampling: Sampling, batch_size: int, watch: Any) -> list[Reply]:
        asked.extend(prompts)

        def look(growing: Any) -> None:
            watch(growing)
            if len(asked) == 1 and growing.reply.items:
                raise KeyboardInterrupt

        return answer(prompts, sampling, batch_size, look)

    monkeypatch.setattr(generator, "replies", interrupted)
    lines, shown = iter(["one", "two", "/quit"]), list[str]()
    assert Chat(generator, Sampling(15, modalities=("picture",)), lambda _: next(lines), shown.append).run() == 0
    assert "(stopped)" in "".join(shown)
    [kept] = [part for part in asked[1].parts if isinstance(part, CodesPart)]
    assert kept.modality == "picture" and kept.generated and read_codes(asked[1].media[0].data).shape == (1, 3)


def test_replies_of_parts_drop_empty_texts() -> None:
    item = CodeItem("picture", torch.tensor([[1]]).numpy())
    reply = Reply.of_parts(["", "a ", item, "", item])
    assert reply.text == "a [picture 1][picture 2]" and reply.parts == ("a ", item, item)
