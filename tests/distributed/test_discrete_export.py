"""A folder is imported, grows by marks and codes, trains, is exported, and transformers alone gives the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from discrete_runs import VOCABULARY, run_of, train_on_codes
from export_server import run_in_rank
from parity.discrete import SECTIONS, codes_in_documents
from parity.reference import Reference
from parity.samples import Sample
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny import LLAMA, make_config
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from checkpoint_tools import export_hf
from checkpoint_tools.exporting.discrete_tokens import with_discrete_tokens
from megatron_anymal.config import DiscreteConfig, LoraConfig, RunConfig
from megatron_anymal.config.discrete_validation import check_discrete
from megatron_anymal.data.discrete_vocabulary import DiscreteVocabulary
from megatron_anymal.data.records import DataError
from megatron_anymal.data.tokenizer import Tokenizer
from megatron_anymal.model.unsharded_weights import gather_weights
from megatron_anymal.nemo.archive import portable
from megatron_anymal.nemo.model import MegatronAnyMALModel, from_cfg


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_gives_the_same_logits(
    tied: bool, text_shards: str, tokenizer_folder: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    config = run_of(text_shards, tokenizer_folder, tmp_path, tied=tied)
    if tied:
        config.model.lora = LoraConfig(r=2)
    weights = run_ranks(2, train_on_codes, config)[0]["weights"]
    out = tmp_path / "export"
    arguments = ["--checkpoint", config.exp_manager.explicit_log_dir, "--out", str(out), "--llama-only"]
    assert run_in_rank(export_hf.main, arguments) == 0
    assert "verified random tokens" in capfd.readouterr().out
    exported = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert exported.config.vocab_size == VOCABULARY.total_size == exported.lm_head.weight.size(0)
    tokens = torch.randint(VOCABULARY.total_size, (40,), generator=torch.Generator().manual_seed(1))
    hf = LlamaConfig.from_pretrained(tmp_path / "llama")
    sample = Sample(tokens, tokens, torch.ones(40), {}, {})
    config.model.language_model.config = hf.to_dict()
    with torch.no_grad():
        expected = Reference(config, hf, weights).eval()(sample).numpy()
        logits = exported(tokens[None]).logits[0].numpy()
    assert np.abs(logits - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())
    tokenizer = AutoTokenizer.from_pretrained(out)
    for number in range(VOCABULARY.base_size, VOCABULARY.total_size):
        assert tokenizer.convert_tokens_to_ids(VOCABULARY.text(number)) == number
    begin, end = VOCABULARY.begin("picture"), VOCABULARY.end("picture")
    codes = [VOCABULARY.id_of("picture", 0, 4), VOCABULARY.id_of("picture", 0, 0)]
    text = "what is <picture><picture:0:4><picture:0:0></picture> this"
    plain = AutoTokenizer.from_pretrained(tokenizer_folder)
    inner = [*plain.encode("what is", add_special_tokens=False), begin, *codes, end]
    assert tokenizer.encode(text, add_special_tokens=False) == [*inner, *plain.encode("this", add_special_tokens=False)]


def test_swapped_rows_are_found(
    text_shards: str, tokenizer_folder: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """The verification of an export looks at codes: with two of their rows exchanged, it fails."""
    from checkpoint_tools import verify

    config = run_of(text_shards, tokenizer_folder, tmp_path, tied=False)
    run_ranks(2, train_on_codes, config)
    out = tmp_path / "export"
    arguments = ["--checkpoint", config.exp_manager.explicit_log_dir, "--out", str(out), "--llama-only"]
    assert run_in_rank(export_hf.main, arguments) == 0
    tensors = load_file(out / "model.safetensors")
    rows = tensors["model.embed_tokens.weight"]
    rows[[35, 36]] = rows[[36, 35]].clone()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    arguments = ["--checkpoint", config.exp_manager.explicit_log_dir, "--export", str(out)]
    assert run_in_rank(verify.main, arguments) == 1
    assert "logits differ" in capfd.readouterr().err


def test_a_mark_that_is_a_token_already_is_refused(tokenizer_folder: str) -> None:
    sections = {"x": DiscreteConfig(codebooks=[2], begin="<|eot_id|>")}
    with pytest.raises(DataError, match=r"'<\|eot_id\|>' is already a token of .*Choose other marks"):
        with_discrete_tokens(Tokenizer(tokenizer_folder), DiscreteVocabulary(33, sections))


def save(config: RunConfig, path: Path) -> dict[str, np.ndarray] | None:
    """In a rank: train on codes, write an archive, and return the weights it must hold."""
    with codes_in_documents(config.model):
        model = MegatronAnyMALModel(config)
        model.fit()
        model.save_to(path)
    weights = gather_weights(model.state.models)
    return weights and {name: weight.numpy() for name, weight in weights.items()}


def restore(path: Path) -> dict[str, np.ndarray] | None:
    """In a rank: the weights of an archive, on one process and with another seed."""
    cfg: Any = MegatronAnyMALModel.restore_from(path, return_config=True)
    config = from_cfg(cfg)
    config.trainer.devices = config.model.tensor_model_parallel_size = 1
    config.model.seed = 999
    model: Any = MegatronAnyMALModel.restore_from(path, override_config_path=config)
    weights = gather_weights(model.state.models)
    return weights and {name: weight.numpy() for name, weight in weights.items()}


def test_an_archive_carries_the_rows(text_shards: str, tokenizer_folder: str, tmp_path: Path) -> None:
    config = make_config(text_shards, tokenizer_folder, tmp_path / "run")
    config.model.modalities, config.model.discrete = {}, dict(SECTIONS)
    config.model.language_model.config = {**LLAMA, "vocab_size": 33}
    config.trainer.max_steps, config.trainer.devices = 1, 2
    config.model.tensor_model_parallel_size = 2
    expected = run_ranks(2, save, config, tmp_path / "model.nemo")[0]
    [weights] = run_ranks(1, restore, tmp_path / "model.nemo")
    assert weights.keys() == expected.keys() >= {"discrete.embedding.weight", "discrete.head.weight"}
    assert all(np.array_equal(value, expected[name]) for name, value in weights.items())


def test_an_archive_keeps_frozen_rows(tmp_path: Path) -> None:
    """The archive holds the rows itself, so that its configuration is valid without another run."""
    config = make_config("data", "tok", tmp_path)
    config.model.modalities, config.model.discrete = {}, dict(SECTIONS)
    config.model.discrete_rows, config.model.restore_from_path = "none", "somewhere"
    result, _ = portable(config, LLAMA)
    assert result.model.discrete == config.model.discrete
    check_discrete("pretrain", result.model)
