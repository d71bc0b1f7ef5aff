"""Small tokenizer folders in the formats that model publishers use, with the files that accompany them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny import CHAT, SPECIAL
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

ALL = [*SPECIAL, *CHAT]
# Llama 3's pattern, from its tokenizer.json.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CORPUS = [
    "What is this? A cat, 1234 years old.\n\nIt doesn't walk.\nuser assistant system",
    "one two three four five six seven eight nine zero what is a sound of motion walk run",
    "\n\n",
    "the picture shows a red circle above a blue square <s>old</s> price",
] * 20


def _trained(model: Any, trainer: Any, **parts: Any) -> Tokenizer:
    backend = Tokenizer(model)
    for name, part in parts.items():
        setattr(backend, name, part)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def byte_level(*, split: str = SPLIT, special: list[str] = ALL, **parts: Any) -> Tokenizer:
    """Byte-level BPE after a split pattern, as in Llama 3."""
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=special,
        show_progress=False,
    )
    backend = _trained(
        models.BPE(),
        trainer,
        pre_tokenizer=pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        decoder=decoders.ByteLevel(),
    )
    for name, part in parts.items():
        setattr(backend, name, part)
    return backend


def begin_template(token: str = SPECIAL[0], number: int = 0) -> Any:
    """A post-processor that prepends the begin token."""
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, number)]
    )


def sentencepiece_like(*, legacy: bool, special: list[str] = ALL) -> Tokenizer:
    """BPE over characters with "▁" for spaces and byte fallback, as in Llama 2, with `<s>` and `</s>`."""
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=520, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False, max_token_length=8
    )
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    whole = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    trained = _trained(models.BPE(unk_token="<unk>"), trainer, normalizer=spaces)
    body = json.loads(trained.to_str())
    body["model"] |= {"byte_fallback": True, "fuse_unk": True}
    # Byte tokens are ordinary vocabulary entries.
    body["added_tokens"] = [entry for entry in body["added_tokens"] if not entry["content"].startswith("<0x")]
    if not legacy:
        body["normalizer"] = None
    backend = Tokenizer.from_str(json.dumps(body))
    if not legacy:
        backend.pre_tokenizer = whole
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return backend


def unigram() -> Tokenizer:
    """A unigram model; control tokens are in its vocabulary, where a probability of 1 would match them in plain
    text."""
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", *ALL], unk_token="<unk>", show_progress=False
    )
    space = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    return _trained(models.Unigram(), trainer, pre_tokenizer=space, decoder=decoders.Metaspace())


def word_level() -> Tokenizer:
    """Whitespace-separated words."""
    trainer = trainers.WordLevelTrainer(special_tokens=[*ALL, "<unk>"], show_progress=False)
    return _trained(models.WordLevel(unk_token="<unk>"), trainer, pre_tokenizer=pre_tokenizers.WhitespaceSplit())


def word_piece() -> Tokenizer:
    """Lower-case WordPiece, as in BERT."""
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["<unk>", *ALL], show_progress=False)
    return _trained(
        models.WordPiece(unk_token="<unk>"),
        trainer,
        normalizer=normalizers.BertNormalizer(clean_text=False),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
    )


SETTINGS: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": SPECIAL[0],
    "eos_token": SPECIAL[1],
    "clean_up_tokenization_spaces": False,
}


def save(folder: Path, backend: Tokenizer, settings: dict[str, Any] | None = SETTINGS, **files: Any) -> None:
    """Write tokenizer.json, tokenizer_config.json (unless `settings` is None) and `files`, each JSON or a Jinja
    template."""
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, content in files.items():
        ending = ".jinja" if isinstance(content, str) else ".json"
        (folder / (name + ending)).write_text(content if isinstance(content, str) else json.dumps(content))


def _cut(folder: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(max_length=5)
    save(folder, backend)


def _padded(folder: Path) -> None:
    backend = byte_level()
    backend.enable_padding(length=32, pad_id=1, pad_token=SPECIAL[1])
    save(folder, backend)


def _random(folder: Path) -> None:
    backend = byte_level()
    backend.model.dropout = 0.5
    save(folder, backend)


def _settings_only(folder: Path) -> None:
    """The chat format's tokens appear only in tokenizer_config.json."""
    backend = byte_level(special=SPECIAL)
    first = backend.get_vocab_size()
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    added = {str(first + number): {"content": token, **flags} for number, token in enumerate(CHAT)}
    save(folder, backend, {**SETTINGS, "added_tokens_decoder": added, "additional_special_tokens": CHAT})


def _blanks(folder: Path) -> None:
    """Control tokens absorb the whitespace around them; runs of whitespace are tokens of their own."""
    body = json.loads(byte_level().to_str())
    for entry in body["added_tokens"]:
        entry |= {"lstrip": True, "rstrip": True}
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": False}
    first = len(body["model"]["vocab"])
    body["added_tokens"] += [
        {"id": first + number, "content": content, **flags}
        for number, content in enumerate(["  ", "\n\n\n", "What is"])
    ]
    save(folder, Tokenizer.from_str(json.dumps(body)))


def _normalized(folder: Path) -> None:
    """Control tokens are matched after normalization."""
    body = json.loads(byte_level(normalizer=normalizers.NFKC()).to_str())
    for entry in body["added_tokens"]:
        entry["normalized"] = True
    save(folder, Tokenizer.from_str(json.dumps(body)))


def _of_python(folder: Path) -> None:
    """A tokenizer implemented in Python: ByT5, over bytes."""
    from transformers import ByT5Tokenizer

    made = ByT5Tokenizer(
        bos_token=SPECIAL[0], eos_token=SPECIAL[1], extra_ids=0, additional_special_tokens=[*SPECIAL[2:], *CHAT]
    )
    made.save_pretrained(folder)


LLAMA_2 = {**SETTINGS, "unk_token": "<unk>"}
ENDS = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
MAKERS: dict[str, Callable[[Path], None]] = {
    "llama 3": lambda f: save(f, byte_level(post_processor=begin_template())),
    "no post-processor": lambda f: save(f, byte_level()),
    "gpt-2 pattern": lambda f: save(
        f, byte_level(split=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    ),
    "llama 2, legacy": lambda f: save(f, sentencepiece_like(legacy=True), LLAMA_2),
    "llama 2, not legacy": lambda f: save(f, sentencepiece_like(legacy=False), {**LLAMA_2, "legacy": False}),
    "truncation": _cut,
    "padding": _padded,
    "dropout": _random,
    "tokens in tokenizer_config.json": _settings_only,
    "special_tokens_map.json": lambda f: save(
        f, byte_level(), {"tokenizer_class": "PreTrainedTokenizerFast"}, special_tokens_map=ENDS
    ),
    "no tokenizer_config.json": lambda f: save(f, byte_level(), None, special_tokens_map=ENDS),
    "composed letters": lambda f: save(f, byte_level(normalizer=normalizers.NFC())),
    "a template beside it": lambda f: save(f, byte_level(), chat_template="{{ messages[0].content }}"),
    "blanks": _blanks,
    "normalized tokens": _normalized,
    "words": lambda f: save(f, word_level(), LLAMA_2),
    "pieces of words": lambda f: save(f, word_piece(), LLAMA_2),
    "unigram": lambda f: save(f, unigram(), LLAMA_2),
    "python": _of_python,
}


def make(name: str, folder: Path) -> str:
    """Build the tokenizer `name` of MAKERS in a new folder; return its path."""
    shutil.rmtree(folder, ignore_errors=True)
    MAKERS[name](folder)
    return str(folder)
