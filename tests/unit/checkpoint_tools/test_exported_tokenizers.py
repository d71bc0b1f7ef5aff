"""The tokenizer of an export equals the one the run loaded, whatever its files, and has training's chat format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokenizer_folders
from tiny import LLAMA, make_config, make_conversations
from transformers import AutoTokenizer, LlamaConfig

from checkpoint_tools.exporting import model_files
from checkpoint_tools.exporting.model_files import write_llama_files
from checkpoint_tools.importing import llama as importing
from checkpoint_tools.verifying.chat_ids import ChatIdsError, compare_chat_ids
from megatron_anymal.config import DataConfig
from megatron_anymal.data.discrete_vocabulary import DiscreteVocabulary
from megatron_anymal.data.tokenizer import Tokenizer

TEXTS = ["What is <s>this</s>?\n\n  A cat, 1234.", "<|eot_id|> é 日本", "one two"]


def exported(tokenizer: str, out: Path) -> Path:
    """Write the files of a Llama export other than the weights; return the folder."""
    import torch

    out.mkdir()
    write_llama_files(out, tokenizer, LlamaConfig(**LLAMA), DiscreteVocabulary(0, {}), {"w": (torch.bfloat16, (1,))})
    return out


@pytest.mark.parametrize("name", tokenizer_folders.MAKERS)
def test_a_tokenizer_of_any_files_is_written_whole(name: str, tmp_path: Path) -> None:
    source = tokenizer_folders.make(name, tmp_path / "source")
    run = Tokenizer(source)
    out = exported(source, tmp_path / "out")
    exported_tokenizer = Tokenizer(str(out))
    assert exported_tokenizer.hf.get_vocab() == run.hf.get_vocab()
    assert (exported_tokenizer.begin, exported_tokenizer.end, exported_tokenizer.control) == (
        run.begin,
        run.end,
        run.control,
    )
    for text in TEXTS:
        assert exported_tokenizer.encode(text) == run.encode(text)
    assert json.loads((out / "generation_config.json").read_text())["bos_token_id"] == run.begin
    if name != "dropout":
        assert compare_chat_ids(out, run, {}, DataConfig()) == 5


def test_a_sentencepiece_model_alone_is_carried_along(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(tokenizer_folders.CORPUS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "m"), vocab_size=320, model_type="bpe", byte_fallback=True,
        minloglevel=2, normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    folder = tmp_path / "llama"
    folder.mkdir()
    shutil.copyfile(tmp_path / "m.model", folder / "tokenizer.model")
    config = importing._config(LlamaConfig(**LLAMA).to_dict(), folder)
    assert config.data.tokenizer == str(folder)
    run = Tokenizer(str(folder))
    before = run.fingerprint()
    exported_tokenizer = Tokenizer(str(exported(str(folder), tmp_path / "out")))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in TEXTS:
        ids = run.encode(text)
        assert ids == exported_tokenizer.encode(text) and not {run.begin, run.end} & set(ids)
        assert pieces.decode(ids).strip() == text.strip()
    assert run.fingerprint() == before == Tokenizer(str(folder)).fingerprint()


def test_a_run_without_a_tokenizer_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = exported("", tmp_path / "none")
    assert "left out: a tokenizer" in capsys.readouterr().out and not list(out.glob("tokenizer*"))
    out = exported(str(tmp_path / "gone"), tmp_path / "moved")
    assert f"there is no folder '{tmp_path / 'gone'}'" in capsys.readouterr().out and not list(out.glob("tokenizer*"))
    for folder in ("none", "moved"):
        assert json.loads((tmp_path / folder / "generation_config.json").read_text())["eos_token_id"] == 2


@pytest.mark.parametrize("wrong", ["\n' ~ turn.text | trim", "\n\n' ~ turn.text"])
def test_another_template_than_training_s_is_refused(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tokenizer_folders.make("llama 3", tmp_path / "source")
    right = model_files.chat_template

    def changed(*arguments: object) -> str:
        template = right(*arguments)  # type: ignore[arg-type]
        assert "\n\n' ~ turn.text | trim" in template
        return template.replace("\n\n' ~ turn.text | trim", wrong)

    monkeypatch.setattr(model_files, "chat_template", changed)
    out = exported(source, tmp_path / "out")
    with pytest.raises(ChatIdsError, match=r"built-in conversation \d: training produces .*exported chat template"):
        compare_chat_ids(out, Tokenizer(source), {}, DataConfig())


def test_real_conversations_are_compared(tmp_path: Path) -> None:
    source = tokenizer_folders.make("llama 3", tmp_path / "source")
    data = make_conversations(tmp_path / "data", source, 12, ("image", "text"))
    config = make_config(data, source, tmp_path / "run")
    out = exported(source, tmp_path / "out")
    # Six of the twelve are text only.
    assert compare_chat_ids(out, Tokenizer(source), {}, config.data) == 5 + 6
    placeholders = {name: section.placeholder for name, section in config.model.modalities.items()}
    model_files._write_tokenizer(out, Tokenizer(source), placeholders, DiscreteVocabulary(0, {}))
    assert compare_chat_ids(out, Tokenizer(source), config.model.modalities, config.data) == 5 + 12
    # A tokenizer that splits text differently from the run's.
    body = json.loads((out / "tokenizer.json").read_text())
    body["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\s+|\S+"}
    (out / "tokenizer.json").write_text(json.dumps(body))
    assert AutoTokenizer.from_pretrained(out).encode("1234 a") != Tokenizer(source).hf.encode("1234 a")
    with pytest.raises(ChatIdsError, match="training produces"):
        compare_chat_ids(out, Tokenizer(source), config.model.modalities, config.data)
