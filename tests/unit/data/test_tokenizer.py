"""Text to ids with tokenizers of many formats: literal, uncut, and identical to transformers' chat template."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizer_folders
from tiny import CHAT, SPECIAL
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer

from checkpoint_tools.exporting.chat_template import chat_template
from megatron_anymal.checkpoint.compatibility import check_changes
from megatron_anymal.checkpoint.store import Manifest
from megatron_anymal.data.chat_format import last_answer, open_prompt, parse_messages
from megatron_anymal.data.content_parts import parse_parts
from megatron_anymal.data.records import DataError, MediaPart, Part, TextPart
from megatron_anymal.data.samples import parse_sample
from megatron_anymal.data.tokenizer import Tokenizer

PLACEHOLDERS = {"image": SPECIAL[2], "audio": SPECIAL[3]}
WORDS = [
    "What",
    "is",
    " this",
    "?",
    "A cat,",
    " 1234",
    "\n",
    "\n\n",
    "  ",
    "\t",
    "don't",
    "'s",
    "é",
    "日本",
    "🙂",
    "...",
    "x" * 40,
]
EVERY = [*SPECIAL, *CHAT, "<s>", "</s>", "<unk>"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("tokenizers")
    return {name: tokenizer_folders.make(name, base / str(n)) for n, name in enumerate(tokenizer_folders.MAKERS)}


def text(rng: random.Random) -> str:
    return "".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 7)))


def content(rng: random.Random) -> Any:
    if rng.random() < 0.4:
        return rng.choice(["", " ", "\n\n"]) + text(rng) + "!" + rng.choice(["", "\n", "  "])
    parts: list[dict[str, Any]] = []
    for _ in range(rng.randrange(1, 5)):
        kind = rng.choice(["text", "text", "image", "audio"])
        parts.append({"text": text(rng)} if kind == "text" else {"media": "m", "modality": kind})
    return [*parts, {"text": "."}] if all("media" not in part for part in parts) else parts


@pytest.mark.parametrize("name", ["llama 3", "dropout"])
def test_counts_are_those_of_the_document(name: str, folders: dict[str, str]) -> None:
    tokenizer, rng = Tokenizer(folders[name]), random.Random(0)
    for _ in range(300):
        parts: list[Part] = []
        for _ in range(rng.randrange(6)):
            written = TextPart(text(rng), rng.random() < 0.5)
            parts.append(MediaPart("m", "image") if rng.random() < 0.4 else written)
        closed = rng.random() < 0.5
        count = sum(isinstance(part, MediaPart) for part in parts)
        document = tokenizer.document(parts, [0] * count, {"image": -1}, closed=closed)
        assert tokenizer.count(parts, closed=closed) == (len(document.tokens), sum(document.is_target))


def conversation(rng: random.Random) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.4:
        messages.append({"role": "system", "content": text(rng) + "."})
    for _ in range(rng.randrange(1, 3)):
        messages.append({"role": "user", "content": content(rng)})
        messages.append({"role": "assistant", "content": text(rng) + "." + rng.choice(["", "\n"])})
    return messages


def of_transformers(hf: Any, tokenizer: Tokenizer, messages: list[dict[str, Any]], *, ask: bool = False) -> list[int]:
    template = chat_template(PLACEHOLDERS, tokenizer.control)
    return hf.apply_chat_template(messages, chat_template=template, add_generation_prompt=ask, return_dict=False)


def ids(tokenizer: Tokenizer, parts: list[Part], **settings: Any) -> list[int]:
    numbers = {kind: tokenizer.placeholder(token, "") for kind, token in PLACEHOLDERS.items()}
    count = sum(isinstance(part, MediaPart) for part in parts)
    return tokenizer.document(parts, [1] * count, numbers, **settings).tokens


@pytest.mark.parametrize("name", tokenizer_folders.MAKERS)
def test_conversations_have_the_ids_of_the_chat_template(name: str, folders: dict[str, str]) -> None:
    if name == "dropout":
        pytest.skip("transformers draws other ids each time")
    tokenizer, hf, rng = Tokenizer(folders[name]), AutoTokenizer.from_pretrained(folders[name]), random.Random(name)
    for _ in range(40):
        messages = conversation(rng)
        [parts] = parse_sample({"messages": messages}, "").documents
        assert ids(tokenizer, parts, closed=False) == of_transformers(hf, tokenizer, messages), messages
        asked = open_prompt(parse_messages(messages[:-1], ""))
        assert ids(tokenizer, asked, closed=False) == of_transformers(hf, tokenizer, messages[:-1], ask=True), messages
        assert ids(tokenizer, last_answer(parts)[0], closed=False) == ids(tokenizer, asked, closed=False)
        document = tokenizer.document(parts, [0] * 99, {"image": -1, "audio": -1}, closed=False)
        assert tokenizer.count(parts, closed=False) == (len(document.tokens), sum(document.is_target))


@pytest.mark.parametrize("name", tokenizer_folders.MAKERS)
def test_targets_are_the_answers_and_their_ends(name: str, folders: dict[str, str]) -> None:
    tokenizer, rng = Tokenizer(folders[name]), random.Random(name)
    for _ in range(10):
        messages = conversation(rng)
        [parts] = parse_sample({"messages": messages}, "").documents
        document = tokenizer.document(parts, [0] * 99, {"image": -1, "audio": -1}, closed=False)
        targets = [token for token, is_target in zip(document.tokens, document.is_target) if is_target]
        end = tokenizer.control["<|eot_id|>"]
        learned = []
        for token in targets:
            learned += [[]] if not learned or learned[-1][-1:] == [end] else []
            learned[-1].append(token)
        answers = [message["content"].strip() for message in messages if message["role"] == "assistant"]
        assert len(learned) == len(answers)
        for tokens, answer in zip(learned, answers):
            # The same ids as when encoded alone, except at the start, where the preceding text can change them.
            alone = tokenizer.encode(answer)
            assert tokens[-1] == end and tokens[-2:-1] == alone[-1:]
            assert abs(len(tokens) - 1 - len(alone)) <= 3


@pytest.mark.parametrize("name", tokenizer_folders.MAKERS)
def test_control_tokens_in_a_text_are_text(name: str, folders: dict[str, str]) -> None:
    tokenizer = Tokenizer(folders[name])
    numbers = {kind: tokenizer.placeholder(token, "") for kind, token in PLACEHOLDERS.items()}
    control = {number for token, number in tokenizer.hf.get_vocab().items() if token in EVERY and token != "<unk>"}
    for token in EVERY:
        for written in (token, f"one {token} two", f"one{token}two", f"{token}{token}"):
            caption = [MediaPart("a", "image"), *parse_parts([{"text": written}], "")]
            document = tokenizer.document(caption, [2], numbers)
            assert control.intersection(document.tokens[3:-1]) == set(), written
            messages = [{"role": "user", "content": written}, {"role": "assistant", "content": written}]
            [parts] = parse_sample({"messages": messages}, "").documents
            around = [t for t in tokenizer.document(parts, [], numbers, closed=False).tokens if t in control]
            layout = [SPECIAL[0], *[CHAT[0], CHAT[1], CHAT[2]] * 2]
            assert tokenizer.hf.convert_ids_to_tokens(around) == layout, written
            if "words" not in name and name != "unigram" and token not in ("<unk>",):
                assert tokenizer.decode(tokenizer.encode(written)).strip() == written
            if token in tokenizer.control:
                with pytest.raises(Exception, match="as plain text"):
                    of_transformers(tokenizer.hf, tokenizer, messages)


def test_no_text_is_cut_or_padded(folders: dict[str, str]) -> None:
    long = "What is this? " * 50
    expected = Tokenizer(folders["llama 3"]).encode(long)
    for name in ("truncation", "padding", "dropout"):
        assert Tokenizer(folders[name]).encode(long) == expected and len(expected) > 100
        assert Tokenizer(folders[name]).encode("What") == expected[:1]


def test_headers_that_join_their_contents_are_noticed(folders: dict[str, str]) -> None:
    for name in ("llama 3", "llama 2, legacy", "llama 2, not legacy", "words", "python"):
        assert not Tokenizer(folders[name]).joins_headers, name
    assert Tokenizer(folders["gpt-2 pattern"]).joins_headers


def test_a_tokenizer_that_breaks_the_chat_format_is_named(folders: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(folders["llama 3"], tmp_path / "broken")
    file = tmp_path / "broken" / "tokenizer.json"
    body = json.loads(file.read_text())
    for entry in body["added_tokens"]:
        entry["single_word"] = True
    file.write_text(json.dumps(body))
    tokenizer = Tokenizer(str(tmp_path / "broken"))
    with pytest.raises(DataError, match=r"data\.tokenizer: .*broken' does not keep the chat format's tokens whole"):
        tokenizer.document(open_prompt(parse_messages([{"role": "user", "content": "a"}], "")), [], {})
    assert tokenizer.document([TextPart("a")], [], {}).tokens[1:-1] == tokenizer.encode("a")


def test_an_ordinary_word_is_no_placeholder(folders: dict[str, str]) -> None:
    with pytest.raises(DataError, match=r"x\.placeholder='is' is a word that can occur in text"):
        Tokenizer(folders["words"]).placeholder("is", "x.placeholder")


@pytest.mark.parametrize("name", ["llama 3", "python"])
@pytest.mark.parametrize("character", ["\ufdd0", "\ud83d"])
def test_what_no_text_can_hold_is_named(name: str, character: str, folders: dict[str, str]) -> None:
    tokenizer, user_text = Tokenizer(folders[name]), f"a {character} b"
    parts = open_prompt(parse_messages([{"role": "user", "content": user_text}], ""))
    for read in (lambda: tokenizer.encode(user_text), lambda: tokenizer.document(parts, [], {}, closed=False)):
        with pytest.raises(DataError, match=rf"U\+{ord(character):04X}, which is not a character"):
            read()


class Documents(Dataset):
    """Encodes documents with a tokenizer, as a loader worker does."""

    def __init__(self, tokenizer: Tokenizer, samples: list[list[Part]]):
        self.tokenizer, self.samples = tokenizer, samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> tuple[list[int], str]:
        tokens = self.tokenizer.document(self.samples[number], [], {}).tokens
        return tokens, self.tokenizer.fingerprint()


def resumed(before: str, after: str) -> None:
    """Check a tokenizer fingerprint against the one in a checkpoint, as a resumed run does."""
    config = {"trainer": {"max_steps": 1}, "model": {"optim": {"sched": {"name": "constant"}}}}
    manifest = Manifest(3, 24, config, {}, "", "", {}, tokenizer=before)
    check_changes(manifest, replace(manifest, tokenizer=after), (), lambda _: None)


@pytest.mark.parametrize("name", tokenizer_folders.MAKERS)
def test_nothing_changed_is_never_refused(name: str, folders: dict[str, str]) -> None:
    indexed = Tokenizer(folders[name]).fingerprint()
    tokenizer = Tokenizer(folders[name])
    samples: list[list[Part]] = [[TextPart(f"What is {n} <s>this</s>? {SPECIAL[2]}")] for n in range(6)]
    alone = [Tokenizer(folders[name]).document(parts, [], {}).tokens for parts in samples]
    assert tokenizer.fingerprint() == indexed
    for workers in (0, 2):
        items = [item for [item] in DataLoader(Documents(tokenizer, samples), num_workers=workers, collate_fn=list)]
        assert [tokens for tokens, _ in items] == alone
        for _, fingerprint in items:
            resumed(indexed, fingerprint)
        resumed(indexed, tokenizer.fingerprint())
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda parts: tokenizer.document(parts, [], {}).tokens, samples * 4)) == alone * 4
    # As in sampling answers and in the processor of an export.
    tokenizer.decode(alone[0])
    tokenizer.hf("What is this", truncation=True, max_length=2)
    resumed(indexed, tokenizer.fingerprint())
    tokenizer.hf.encode("What is this")
    resumed(indexed, tokenizer.fingerprint())
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.document(samples[0], [], {}).tokens == alone[0]
    resumed(indexed, again.fingerprint())
    with pytest.raises(ValueError, match="its content"):
        resumed(indexed, Tokenizer(folders["words" if name != "words" else "unigram"]).fingerprint())


@pytest.mark.parametrize("name", tokenizer_folders.MAKERS)
def test_the_fingerprint_of_ordinary_folders_is_what_it_always_was(name: str, folders: dict[str, str]) -> None:
    """As stored in indexes and checkpoints: the vocabulary, the backend as loaded, and the begin and end ids."""
    import hashlib

    hf = AutoTokenizer.from_pretrained(folders[name])
    digest = hashlib.sha256()
    for token, number in sorted(hf.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{number}\0{token}\0".encode("utf-8", "surrogatepass"))
    if hasattr(hf, "backend_tokenizer"):
        body = json.loads(hf.backend_tokenizer.to_str())
        if body["truncation"] or body["padding"]:
            # After the first encoding, such a tokenizer has lost its truncation or padding section.
            hf.encode("What")
        digest.update(hf.backend_tokenizer.to_str().encode())
    digest.update(f"{hf.bos_token_id} {hf.eos_token_id}".encode())
    assert Tokenizer(folders[name]).fingerprint() == digest.hexdigest()
