"""Prompts become the same tokens and encoder inputs as in the trainer's own data path."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hf_parts import make_config, prompts_about, sections, write_media
from PIL import Image
from tiny import CHAT, WORDS, png
from transformers import AutoTokenizer

from megatron_anymal.data.chat_format import lay_out, open_prompt, parse_messages
from megatron_anymal.data.content_parts import name_modalities, parse_parts
from megatron_anymal.data.records import DataError, MediaPart
from megatron_anymal.data.tokenizer import Tokenizer
from megatron_anymal.hf import media_inputs
from megatron_anymal.hf.processing_anymal import AnyMALProcessor
from megatron_anymal.hf.remote_code import PROCESSOR_AUTO_MAP
from megatron_anymal.modalities import MediaError, build_modality


@pytest.fixture(scope="module")
def processor(tokenizer_folder: str) -> AnyMALProcessor:
    config = make_config(sections("towers"), tokenizer_folder)
    return AnyMALProcessor(AutoTokenizer.from_pretrained(tokenizer_folder), config.modalities)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_media(tmp_path_factory.mktemp("media"))


def same(one: Any, other: Any) -> bool:
    """Whether two outputs of the processor are equal."""
    return (
        torch.equal(one["input_ids"], other["input_ids"])
        and one["media"].keys() == other["media"].keys()
        and all(torch.equal(one["media"][name], other["media"][name]) for name in one["media"])
    )


def test_tokens_and_pieces_are_the_native_ones(
    processor: AnyMALProcessor, files: dict[str, str], tokenizer_folder: str
) -> None:
    own, tokenizer = sections("towers"), Tokenizer(tokenizer_folder)
    kinds = {path: kind.removesuffix("_b") for kind, path in files.items()}
    placeholders = {n: tokenizer.placeholder(section.placeholder, "") for n, section in own.items()}
    loaders = {name: build_modality(name, section) for name, section in own.items()}
    documents, media = [], {name: [] for name in own}
    for prompt in prompts_about(files):
        if "parts" in prompt:
            parts = parse_parts(prompt["parts"], "")
        else:
            parts = open_prompt(parse_messages(prompt["messages"], ""))
        items = [part for part in parts if isinstance(part, MediaPart)]
        soft = []
        for item in items:
            name, path = kinds[item.media], Path(item.media)
            pieces = loaders[name].load(path.read_bytes(), path.suffix[1:], item.attributes)
            media[name].append(pieces)
            soft.append(len(pieces) * own[name].projector.num_tokens)
        named = name_modalities(parts, [kinds[item.media] for item in items])
        documents.append(tokenizer.document(named, soft, placeholders, closed=False).tokens)
    inputs = processor(prompts_about(files))
    for ids, mask, document in zip(inputs["input_ids"], inputs["attention_mask"], documents, strict=True):
        padding = len(ids) - len(document)
        assert mask.tolist() == [0] * padding + [1] * len(document)
        assert ids[padding:].tolist() == document
    assert set(inputs["media"]) == set(own)
    for name, expected in media.items():
        assert torch.equal(inputs["media"][name], torch.cat(expected)) and len(torch.cat(expected)) > 1


def test_the_trained_resize_backend_is_used(files: dict[str, str], tokenizer_folder: str) -> None:
    own = {name: section for name, section in sections("towers").items() if name in ("image", "video")}
    loaded = {}
    for backend in ("pillow", "torch"):
        for section in own.values():
            section.options["resize_backend"] = backend
        saved = json.loads(json.dumps(make_config(own, tokenizer_folder).modalities))
        processor = AnyMALProcessor(AutoTokenizer.from_pretrained(tokenizer_folder), saved)
        for name, section in own.items():
            path = Path(files[name])
            expected = build_modality(name, section).load(path.read_bytes(), path.suffix[1:], {})
            pixels = processor(media=[files[name]])["media"][name]
            assert torch.equal(pixels, expected)
            loaded[backend, name] = pixels
    assert not torch.equal(loaded["pillow", "image"], loaded["torch", "image"])


def test_media_before_a_text_as_on_the_command_line(processor: AnyMALProcessor, files: dict[str, str]) -> None:
    imu = {"media": files["imu"], "rate": 50}
    given = processor(text="what is this", media=[files["image"], imu])
    assert same(given, processor({"parts": [{"media": files["image"]}, imu, {"text": "what is this"}]}))
    both = processor(text=["what is this", "a sound"], media=[[files["image"], imu], []])
    parts = [{"media": files["image"]}, imu, {"text": "what is this"}]
    assert same(both, processor([{"parts": parts}, {"parts": [{"text": "a sound"}]}]))
    # Media alone are a valid prompt.
    alone = processor(media=[files["image"]])
    assert set(alone["input_ids"][0].tolist()) == {0, 2}


def test_conversations_of_transformers_style(processor: AnyMALProcessor, files: dict[str, str]) -> None:
    def chat(*content: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {"role": "system", "content": [{"type": "text", "text": "a motion"}]},
            {"role": "user", "content": list(content)},
        ]

    text = {"type": "text", "text": "what is this"}
    theirs = [
        chat({"type": "image", "path": files["image"]}, text, {"type": "audio", "url": files["audio"]}),
        chat({"type": "video", "video": files["video"]}, {"type": "imu", "path": files["imu"], "rate": 50}, text),
    ]
    ours = [
        chat({"media": files["image"]}, {"text": "what is this"}, {"media": files["audio"]}),
        chat({"media": files["video"]}, {"media": files["imu"], "rate": 50}, {"text": "what is this"}),
    ]
    for messages in ours:
        messages[0]["content"] = "a motion"
    expected = processor([{"messages": messages} for messages in ours])
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    assert same(processor.apply_chat_template(theirs, **options), expected)
    assert same(processor.apply_chat_template(ours), expected)
    assert same(processor.apply_chat_template(theirs[0]), processor({"messages": ours[0]}))
    assert len(expected["media"]) == 4


def test_media_in_memory_are_those_of_files(processor: AnyMALProcessor, files: dict[str, str], tmp_path: Path) -> None:
    with Image.open(files["image"]) as opened:
        picture = opened.convert("RGB")
    expected = processor(media=[files["image"]])
    for item in (Path(files["image"]).read_bytes(), picture, np.asarray(picture), torch.from_numpy(np.array(picture))):
        assert same(processor(media=[{"media": item, "modality": "image"}]), expected)
    assert same(processor(media=[picture]), expected), "the modality of a picture must be inferred"

    wave, rate = soundfile.read(files["audio"], dtype="float32")
    expected = processor(media=[files["audio"]])
    for item in (wave, torch.from_numpy(wave), (wave * 32768).astype(np.int16)):
        assert same(processor(media=[{"media": item, "sampling_rate": rate}]), expected)

    # As open files; two files of the same name stay separate.
    (tmp_path / "a.png").write_bytes(png(7))
    paths = [str(tmp_path / "a.png"), files["image"]]
    handles = [io.BytesIO(Path(path).read_bytes()) for path in paths]
    for handle in handles:
        handle.name = "a.png"
    assert same(processor(media=handles), processor(media=paths))

    signal = np.load(files["imu"])
    expected = processor(media=[{"media": files["imu"], "rate": 50}])
    assert same(processor(media=[{"media": signal, "rate": 50}]), expected)
    assert same(processor({"parts": [{"media": signal, "rate": 50}, {"text": "a"}]}), processor(
        {"parts": [{"media": files["imu"], "rate": 50}, {"text": "a"}]}
    ))  # fmt: skip


def test_an_address_is_fetched(
    processor: AnyMALProcessor, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def answer(url: str, timeout: float) -> io.BytesIO:
        asked.append(url)
        return io.BytesIO(Path(files["image"]).read_bytes())

    monkeypatch.setattr(media_inputs.urllib.request, "urlopen", answer)
    turn = {"role": "user", "content": [{"type": "image", "url": "https://example.org/b/a.png?size=1"}]}
    inputs = processor.apply_chat_template([turn])
    assert asked == ["https://example.org/b/a.png?size=1"]
    assert torch.equal(inputs["media"]["image"], processor(media=[files["image"]])["media"]["image"])


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ({"text": "a"}, DataError, "prompt 0: a prompt has either `parts` or `messages`"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, DataError, "prompt 0: .*end with the user turn"),
        ({"parts": [{"media": "no.png"}, {"text": "a"}]}, DataError, "no media file 'no.png'"),
        ({"parts": [{"media": 3}, {"text": "a"}]}, DataError, "a PIL image or an array, not int"),
        ({"parts": [{"media": b"x"}, {"text": "a"}]}, MediaError, "media item 0 of prompt 0"),
        (
            {"parts": [{"media": b"x", "modality": "image"}, {"text": "a"}]},
            MediaError,
            "media item 0 of prompt 0.*deco",
        ),
        (
            {"parts": [{"media": b"x", "modality": "depth"}, {"text": "a"}]},
            DataError,
            "no modality 'depth'; it has: au",
        ),
        (
            {"parts": [{"type": "image"}, {"text": "a"}]},
            DataError,
            "a part of type 'image' must name its item exactly once",
        ),
        ({"parts": [{"media": np.zeros((9, 6)), "modality": "imu"}, {"text": "a"}]}, MediaError, "no sampling rate"),
        ({"parts": [{"media": np.zeros((9, 2)), "sampling_rate": 8}, {"text": "a"}]}, DataError, "one dimension"),
        ({"parts": [{"media": np.zeros(9, int), "sampling_rate": 8}, {"text": "a"}]}, DataError, "floats within"),
        ("what", DataError, "prompt 0: a prompt is an object"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    processor: AnyMALProcessor, prompt: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        processor([prompt])


def test_arguments_that_would_be_ignored_are_refused(processor: AnyMALProcessor) -> None:
    chat = [{"role": "user", "content": "what"}]
    with pytest.raises(ValueError, match="as in training"):
        processor.apply_chat_template(chat, "{{ messages }}")
    with pytest.raises(ValueError, match="opens a new turn"):
        processor.apply_chat_template(chat, add_generation_prompt=True, continue_final_message=True)
    with pytest.raises(ValueError, match="return_tensors='tf'"):
        processor.apply_chat_template(chat, return_tensors="tf")
    with pytest.raises(ValueError, match="go together"):
        processor(text="a", max_length=3)
    with pytest.raises(ValueError, match="padding='left'"):
        processor(text="a", padding="left")
    with pytest.raises(ValueError, match="different lengths need padding"):
        processor(text=["a", "what is"], padding=False)
    with pytest.raises(DataError, match="more than max_length=2"):
        processor(text="what is", padding="max_length", max_length=2)
    for arguments in ({}, {"prompts": [{"parts": []}], "text": "a"}):
        with pytest.raises(ValueError, match="either prompts, or text and media"):
            processor(**arguments)
    with pytest.raises(DataError, match="2 texts need as many lists of media"):
        processor(text=["a", "b"], media=[[]])
    with pytest.raises(DataError, match="nothing to answer"):
        processor(text="")


def test_a_missing_library_is_named_where_it_is_needed(
    processor: AnyMALProcessor, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    real = importlib.import_module

    def without_sound(name: str, package: str | None = None) -> Any:
        if name in ("soundfile", "PIL.Image"):
            top = name.partition(".")[0]
            raise ModuleNotFoundError(f"No module named {top!r}", name=top)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without_sound)
    assert processor(media=[{"media": files["imu"], "rate": 50}])["media"]["imu"].numel()
    with pytest.raises(ImportError, match="pip install soundfile"):
        processor(media=[files["audio"]])
    with pytest.raises(ImportError, match="pip install pillow"):
        processor(media=[files["image"]])


def test_inputs_move_and_only_pieces_change_type(processor: AnyMALProcessor, files: dict[str, str]) -> None:
    inputs = processor(media=[files["image"]])
    moved = inputs.to("meta", torch.bfloat16)
    assert moved["input_ids"].is_meta and moved["attention_mask"].is_meta
    assert moved["input_ids"].dtype == torch.int64
    assert moved["media"]["image"].is_meta and moved["media"]["image"].dtype == torch.bfloat16
    again = processor(media=[files["image"]]).to(torch.bfloat16)
    assert not again["input_ids"].is_meta and again["media"]["image"].dtype == torch.bfloat16


def test_answers_end_where_they_end(processor: AnyMALProcessor) -> None:
    tokenizer = processor.tokenizer
    end, turn = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(CHAT[2])
    first = tokenizer.convert_tokens_to_ids(WORDS[0])
    inputs = processor(text=["what", "what is"])
    rows = [[first, first + 1, end, first], [first + 2, turn, end, end]]
    output = torch.cat([inputs["input_ids"], torch.tensor(rows)], dim=1)
    assert processor.answers(output, inputs) == ["zero one", "two"]


def test_it_comes_back_from_its_folder(processor: AnyMALProcessor, files: dict[str, str], tmp_path: Path) -> None:
    expected = processor(prompts_about(files))
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    assert settings["modalities"] == processor.modalities and settings["processor_class"] == "AnyMALProcessor"
    again = AnyMALProcessor.from_pretrained(tmp_path)
    assert again.modalities == processor.modalities
    assert same(again(prompts_about(files)), expected)
    # As the exporter writes it.
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"modalities": processor.modalities, "auto_map": PROCESSOR_AUTO_MAP})
    )
    assert same(AnyMALProcessor.from_pretrained(tmp_path)(prompts_about(files)), expected)


def whole(processor: AnyMALProcessor, files: dict[str, str]) -> list[list[dict[str, Any]]]:
    """Conversations in transformers' format that end with an answer."""
    image, sound = {"type": "image", "path": files["image"]}, {"type": "audio", "url": files["audio"]}
    walk = {"type": "imu", "path": files["imu"], "rate": 50}
    say = [{"type": "text", "text": word} for word in (" what is ", "\n this", "a sound ")]
    return [
        [{"role": "user", "content": [image, say[0], image]}, {"role": "assistant", "content": " one two\n"}],
        [
            {"role": "system", "content": [say[1]]},
            {"role": "user", "content": [say[0], sound, say[1], image, walk, say[2]]},
            {"role": "assistant", "content": [say[2]]},
            {"role": "user", "content": "and"},
            {"role": "assistant", "content": "three"},
        ],
    ]


def test_a_rendered_conversation_encodes_to_the_ids_of_training(
    processor: AnyMALProcessor, files: dict[str, str], tokenizer_folder: str
) -> None:
    tokenizer = Tokenizer(tokenizer_folder)
    image, sound = files["image"], files["audio"]
    walk = {"media": files["imu"], "rate": 50}
    both = whole(processor, files)
    given = [{"images": [image, image]}, {"images": [image], "audio": sound, "media": [walk]}]
    for messages, media in zip(both, given):
        for options in ({"add_generation_prompt": False}, {"continue_final_message": True}):
            text = processor.apply_chat_template(messages, tokenize=False, **options)
            assert isinstance(text, str) and text.count("<|begin_of_text|>") == 1
            direct = processor.apply_chat_template(messages, **options)
            assert same(processor(text=text, **media), direct)
            assert direct["input_ids"][0].tolist().count(tokenizer.begin) == 1
            ids = processor.apply_chat_template(messages, return_dict=False, **options)
            assert torch.equal(ids, direct["input_ids"])
        asked = processor.apply_chat_template(messages[:-1])
        assert same(processor(text=processor.apply_chat_template(messages[:-1], tokenize=False), **media), asked)
        # The layout used in training: media items take more than one position.
        inner = [{**m, "content": [dict(p) for p in m["content"]] if isinstance(m["content"], list) else m["content"]}
                 for m in messages]  # fmt: skip
        for message in inner:
            for part in message["content"] if isinstance(message["content"], list) else []:
                kind = part.pop("type")
                if kind != "text":
                    part.update(media=part.pop("path", None) or part.pop("url"), modality=kind)
        parts = lay_out(parse_messages(inner, ""))
        named = {section["kind"]: (name, section) for name, section in processor.modalities.items()}
        soft, placeholders = [], {}
        for number, part in enumerate(parts):
            if isinstance(part, MediaPart):
                name, section = named[part.modality]
                own = build_modality(name, sections("towers")[name])
                pieces = own.load(Path(part.media).read_bytes(), Path(part.media).suffix[1:], part.attributes)
                soft.append(len(pieces) * section["projector"]["num_tokens"])
                placeholders[name] = section["placeholder_id"]
                parts[number] = MediaPart(part.media, name, part.attributes)
        expected = tokenizer.document(parts, soft, placeholders, closed=False).tokens
        whole_text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        assert processor(text=whole_text, **media)["input_ids"][0].tolist() == expected
    texts = processor.apply_chat_template(both, tokenize=False, add_generation_prompt=False)
    batch = processor(text=texts, images=[[image, image], [image]], audio=[[], [sound]], media=[[], [walk]])
    assert same(batch, processor.apply_chat_template(both, add_generation_prompt=False))


def test_a_rendered_string_needs_its_media_and_cannot_quote_control_tokens(
    processor: AnyMALProcessor, files: dict[str, str]
) -> None:
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}
    text = processor.apply_chat_template([turn], tokenize=False)
    for images in (None, [files["image"]] * 2):
        with pytest.raises(DataError, match="holds 1 placeholders of image"):
            processor(text=text, images=images)
    quoting = [{"role": "user", "content": "what is <|eot_id|>"}]
    with pytest.raises(DataError, match="as text, which in a string would become"):
        processor.apply_chat_template(quoting, tokenize=False)
    tensors = processor.apply_chat_template(quoting)["input_ids"][0].tolist()
    end = processor.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert tensors.count(end) == 1
    with pytest.raises(DataError, match="no modality 'smell'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "smell"}]}], tokenize=False)


@pytest.mark.parametrize("text", ["what is <|eot_id|> this", "<|begin_of_text|>what", "<|reserved_special_token_0|> a"])
def test_any_other_text_is_literal_and_begins_once(
    processor: AnyMALProcessor, files: dict[str, str], text: str
) -> None:
    own = processor._tokenizer
    for given in ({}, {"images": files["image"]}, {"media": [files["image"]]}):
        [ids] = processor(text=text, **given)["input_ids"].tolist()
        assert ids.count(own.begin) == 1 and ids[0] == own.begin
        assert ids[-len(own.encode(text)) :] == own.encode(text)
        assert same(processor(text=text, **given), processor({"parts": [
            *([{"media": files["image"]}] if given else []), {"text": text}]}))  # fmt: skip


def test_what_others_pass_to_processors(processor: AnyMALProcessor, files: dict[str, str]) -> None:
    with Image.open(files["image"]) as opened:
        picture = opened.convert("RGB")
    expected = processor(text="what", media=[picture])
    for images in (picture, [picture], [[picture]]):
        assert same(processor(text="what", images=images), expected)
    pair = processor(text=["what", "a sound of"], images=[picture, picture])
    assert same(pair, processor(text=["what", "a sound of"], images=[[picture], [picture]]))
    assert same(pair, processor(text=["what", "a sound of"], media=[[picture], [picture]]))
    wave, rate = soundfile.read(files["audio"], dtype="float32")
    assert same(processor(text="a", audio=wave, sampling_rate=rate), processor(text="a", media=[files["audio"]]))
    assert same(processor(text="a", videos=files["video"]), processor(text="a", media=[files["video"]]))
    arrays = processor(text=["what", "a sound of"], return_tensors="np")
    assert isinstance(arrays["input_ids"], np.ndarray)
    lists = processor(text=["what", "a sound of"], return_tensors=None, padding=False)["input_ids"]
    assert [len(row) for row in lists] == [2, 4] and lists[1] == arrays["input_ids"][1].tolist()
    wide = processor(text=["what", "a sound of"], padding="max_length", max_length=7)
    assert wide["attention_mask"].tolist() == [[0] * 5 + [1] * 2, [0] * 3 + [1] * 4]
    assert wide["input_ids"][1, 3:].tolist() == lists[1]
    with pytest.raises(DataError, match="2 texts need as many"):
        processor(text=["what", "a"], images=[picture])
