"""Rows of marks and codes through a run's whole life: first values, training, metrics, resume, reshard, archive."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine import losses, train
from parity.discrete import SECTIONS, codes_in_documents
from parity.reference import Reference
from parity.samples import Sample, read_steps
from ranks import run_ranks
from tiny import LLAMA, make_config, make_conversations
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoint_tools.reshard import main as reshard
from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.tensor_stream import StreamReader
from megatron_anymal.config import ConfigError, DatasetConfig, DiscreteConfig, LoraConfig, RunConfig
from megatron_anymal.config.validation import check
from megatron_anymal.data.discrete_vocabulary import DiscreteVocabulary
from megatron_anymal.data.loader import steps
from megatron_anymal.data.micro_batch import MicroBatch
from megatron_anymal.model.unsharded_weights import gather_weights
from megatron_anymal.parallel import initialize
from megatron_anymal.train.build import TrainState, build
from megatron_anymal.train.step import train_step

EMBEDDING, HEAD = "language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"
CODES, CODES_HEAD = "discrete.embedding.weight", "discrete.head.weight"
# 15 marks and codes after an odd number of the Llama's own entries.
VOCABULARY = DiscreteVocabulary(33, SECTIONS)
# Text, marks and codes from both ends of their ranges.
TOKENS = [0, 8, 32, 33, 34, 35, 39, 40, 41, 47, 9, 1]


@pytest.fixture
def config(text_shards: str, tokenizer_folder: str, tmp_path: Path) -> RunConfig:
    """A text-only run with discrete media."""
    config = make_config(text_shards, tokenizer_folder, tmp_path / "run")
    config.model.modalities, config.model.discrete = {}, dict(SECTIONS)
    config.model.language_model.config = {**LLAMA, "vocab_size": 33}
    config.model.optim.sched.decay_steps = 6
    return config


def laid_out(config: RunConfig, world: int = 1, **layout: Any) -> RunConfig:
    config = copy.deepcopy(config)
    config.trainer.devices = world
    for name, value in layout.items():
        setattr(config.model, name, value)
    return config


def train_on_codes(config: RunConfig, look: Any = None) -> dict[str, Any]:
    with codes_in_documents(config.model):
        return train(config, look)


def first_values(config: RunConfig) -> dict[str, np.ndarray] | None:
    weights = gather_weights(build(config, initialize(config)).models)
    return weights and {name: weight.numpy() for name, weight in weights.items()}


def test_first_values_have_the_statistics_of_the_llamas_rows(config: RunConfig) -> None:
    # Wide codebooks, so that 4,000 rows estimate a mean to a few percent of the deviation.
    config.model.discrete["picture"] = copy.copy(config.model.discrete["picture"])
    config.model.discrete["picture"].codebooks = [4000]
    [weights] = run_ranks(1, first_values, config)
    for llama, codes in ((EMBEDDING, CODES), (HEAD, CODES_HEAD)):
        old, new = weights[llama], weights[codes]
        deviation = old.std(0, ddof=1)
        assert np.abs((new.mean(0) - old.mean(0)) / deviation).max() < 0.1
        assert np.abs(new.std(0, ddof=1) / deviation - 1).max() < 0.1
        assert len(np.unique(new, axis=0)) == len(new)
    assert not np.array_equal(weights[CODES], weights[CODES_HEAD])
    config.model.discrete_init = "normal"
    [weights] = run_ranks(1, first_values, config)
    assert weights[CODES].std() == pytest.approx(LLAMA["initializer_range"], rel=0.02)


def test_the_llamas_rows_are_those_of_a_folder(config: RunConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**config.model.language_model.config))
    llama.save_pretrained(tmp_path / "llama")
    config.model.language_model.path, config.model.language_model.config = str(tmp_path / "llama"), {}
    plain = copy.deepcopy(config)
    plain.model.discrete = {}
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    two = laid_out(config, 4, pipeline_model_parallel_size=2, **layout)
    weights = [run_ranks(c.trainer.devices, first_values, c)[0] for c in (plain, config, two)]
    assert weights[1].keys() == weights[2].keys() == weights[0].keys() | {CODES, CODES_HEAD}
    for name, value in weights[1].items():
        assert np.array_equal(value, weights[2][name]), name
        assert name not in weights[0] or np.array_equal(value, weights[0][name]), name
    assert np.array_equal(weights[1][EMBEDDING], llama.model.embed_tokens.weight.detach().numpy())


def optimizer_elements(state: TrainState) -> dict[str, int]:
    optimizer: Any = state.optimizer
    inner = [one.optimizer for one in getattr(optimizer, "chained_optimizers", [optimizer])]
    moments = [value for one in inner for kept in one.state.values() for value in kept.values()]
    return {
        "moments": sum(tensor.numel() for tensor in moments if tensor.dim()),
        "gradients": sum(p.main_grad.numel() for m in state.models for p in m.parameters() if p.requires_grad),
    }


@pytest.mark.parametrize("world", [1, 2])
def test_only_the_rows_of_codes_change(config: RunConfig, world: int) -> None:
    config = laid_out(config, world, tensor_model_parallel_size=world)
    config.trainer.max_steps = 2
    first = run_ranks(world, first_values, config)[0]
    results = run_ranks(world, train_on_codes, config, optimizer_elements)
    for name, value in results[0]["weights"].items():
        assert np.array_equal(value, first[name]) == (name not in (CODES, CODES_HEAD)), name
    rows = -(-VOCABULARY.added // world) * LLAMA["hidden_size"]
    for result in results:
        # Two weights, and two moments of each.
        assert result["seen"] == {"moments": 4 * rows, "gradients": 2 * rows}


def test_a_frozen_part_of_a_trained_llama(config: RunConfig) -> None:
    """The Llama trains, its rows of the vocabulary do not; the checkpoint holds them nevertheless."""
    config.model.language_model.freeze, config.trainer.max_steps = False, 2
    first = run_ranks(1, first_values, config)[0]
    trained = run_ranks(1, train_on_codes, config)[0]["weights"]
    changed = {name for name, value in trained.items() if not np.array_equal(value, first[name])}
    assert changed == trained.keys() - {EMBEDDING, HEAD}
    other = copy.deepcopy(config)
    other.exp_manager.explicit_log_dir += "_next"
    # A run with another seed starts from all of them.
    other.model.restore_from_path, other.model.seed = config.exp_manager.explicit_log_dir, 5
    other.trainer.max_steps, other.model.optim.lr = 1, 0.0
    again = run_ranks(1, train_on_codes, other)[0]["weights"]
    assert again.keys() == trained.keys()
    assert all(np.array_equal(value, trained[name]) for name, value in again.items())


@pytest.mark.parametrize("tied", [False, True])
def test_resume_and_another_layout(config: RunConfig, tied: bool, tmp_path: Path) -> None:
    """Bit for bit under the same layout; up to rounding under an entirely different one, from a resharded file."""
    config.model.language_model.config["tie_word_embeddings"] = tied
    three = laid_out(config, 2, pipeline_model_parallel_size=2)
    three.trainer.max_steps = 3
    run_ranks(2, train_on_codes, three)
    out = tmp_path / "other" / "checkpoints" / "step_00000003"
    sizes = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "1"]
    source = str(store.resolve(three.exp_manager.explicit_log_dir))
    assert reshard(["--checkpoint", source, "--out", str(out), *sizes]) == 0
    run_ranks(2, train_on_codes, laid_out(config, 2, pipeline_model_parallel_size=2))
    resumed = losses(Path(config.exp_manager.explicit_log_dir))
    whole = laid_out(config, 2, pipeline_model_parallel_size=2)
    whole.exp_manager.explicit_log_dir = str(tmp_path / "whole")
    assert run_ranks(2, train_on_codes, whole)[0]["losses"] == resumed
    other = laid_out(config, 2, tensor_model_parallel_size=2, sequence_parallel=True)
    other.exp_manager.explicit_log_dir = str(tmp_path / "other")
    assert run_ranks(2, train_on_codes, other)[0]["losses"] == pytest.approx(resumed[3:], rel=1e-5)


def one_step(config: RunConfig) -> dict[str, Any]:
    """In a rank: losses by kind of target token of the first step."""
    with codes_in_documents(config.model):
        state = build(config, initialize(config))
        start = gather_weights(state.models)
        data = state.train_data
        [(plan, batches)] = steps(
            data.planner,
            data.reader,
            replica=state.layout.data_rank,
            start=0,
            stop=1,
            num_workers=0,
            prefetch_steps=1,
        )
        result = train_step(state, plan, batches)
    start = start and {name: weight.numpy() for name, weight in start.items()}
    return {"start": start, "losses": result.loss_by_kind, "targets": result.targets_by_kind, "loss": result.loss}


def by_kind(config: RunConfig, start: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, int]]:
    """Mean losses and numbers of targets of the first step, in plain torch, one document at a time."""
    model = Reference(config, LlamaConfig(**config.model.language_model.config), start).eval()
    losses: dict[str, list[float]] = {}
    with codes_in_documents(config.model), torch.no_grad():
        for sample in next(read_steps(config, 1)):
            values = F.cross_entropy(model(sample), sample.labels, reduction="none")
            for value, label, mask in zip(values, sample.labels.tolist(), sample.loss_mask):
                kind = VOCABULARY.lookup(label).name if label >= VOCABULARY.base_size else "text"
                if mask:
                    losses.setdefault(kind, []).append(float(value))
    return {kind: float(np.mean(v)) for kind, v in losses.items()}, {kind: len(v) for kind, v in losses.items()}


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, {"loss_normalization": "sample"}),
        (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2}),
        (4, {"context_parallel_size": 2}),
    ],
)
def test_losses_by_kind_of_target(config: RunConfig, world: int, layout: dict[str, Any]) -> None:
    results = run_ranks(world, one_step, laid_out(config, world, **layout))
    expected, targets = by_kind(config, results[0]["start"])
    assert targets.keys() == {"text", *SECTIONS}
    for result in results:
        assert result["targets"] == targets
        assert result["losses"] == pytest.approx(expected, rel=1e-5)


def logits_of_all(config: RunConfig) -> tuple[dict[str, np.ndarray] | None, np.ndarray]:
    """In a rank: the weights, and the logits of every position of a document, over the whole vocabulary."""
    state = build(config, initialize(config))
    [model] = state.models
    start = gather_weights(state.models)
    with torch.no_grad():
        logits = model.eval().whole_logits(model(MicroBatch.unlabelled([TOKENS], {})))
    return start and {name: weight.numpy() for name, weight in start.items()}, logits[0].numpy()


@pytest.mark.parametrize("tied", [False, True])
def test_gathered_logits_are_in_the_order_of_the_ids(config: RunConfig, tied: bool) -> None:
    config.model.language_model.config["tie_word_embeddings"] = tied
    two = laid_out(config, 2, tensor_model_parallel_size=2, sequence_parallel=True)
    results = run_ranks(2, logits_of_all, two)
    model = Reference(config, LlamaConfig(**config.model.language_model.config), results[0][0]).eval()
    tokens = torch.tensor(TOKENS)
    with torch.no_grad():
        expected = model(Sample(tokens, tokens, torch.ones(len(tokens)), {}, {})).numpy()
    for _, logits in results:
        assert logits.shape == (len(TOKENS), VOCABULARY.total_size)
        assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


def test_they_are_logged(config: RunConfig, text_shards: str) -> None:
    config.data.validation = dict(config.data.train)
    config.trainer.max_steps = config.trainer.val_check_interval = 1
    run_ranks(1, train_on_codes, config)
    text = (Path(config.exp_manager.explicit_log_dir) / "metrics.jsonl").read_text()
    for name in ("target_loss/text", "target_tokens/picture", "target_loss/speech", "val_target_loss/picture"):
        assert f'"{name}"' in text


def test_other_codes_are_refused(config: RunConfig) -> None:
    config.trainer.max_steps = 1
    run_ranks(1, train_on_codes, config)
    config.trainer.max_steps = 2
    config.model.discrete = dict(reversed(config.model.discrete.items()))
    with pytest.raises(pytest.fail.Exception, match=r"the order of model.discrete \['picture', 'speech'\] -> "):
        run_ranks(1, train_on_codes, config)
    config.resilience.allow_changes = ["config"]
    with pytest.raises(pytest.fail.Exception, match=r"for picture \[5\].*, speech \[3, 3\].*in the same order"):
        run_ranks(1, train_on_codes, config)
    config.resilience.allow_changes = []
    config.model.restore_from_path = config.exp_manager.explicit_log_dir
    config.exp_manager.explicit_log_dir += "_next"
    with pytest.raises(pytest.fail.Exception, match=r"for picture \[5\].*, speech \[3, 3\].*in the same order"):
        run_ranks(1, train_on_codes, config)
    config.model.discrete = {}
    with pytest.raises(pytest.fail.Exception, match="would be lost"):
        run_ranks(1, train_on_codes, config)


def test_a_kind_of_media_is_appended(config: RunConfig) -> None:
    """A later run has one more kind: it begins with the earlier rows, under another layout, and draws the new ones."""
    config.trainer.max_steps = 1
    first = run_ranks(1, train_on_codes, config)[0]["weights"]
    config.model.restore_from_path = config.exp_manager.explicit_log_dir
    config.exp_manager.explicit_log_dir += "_next"
    config.model.discrete["music"] = DiscreteConfig(codebooks=[4])
    config.model.optim.lr = 0.0
    two = laid_out(config, 2, tensor_model_parallel_size=2)
    fresh = run_ranks(2, first_values, two)[0]
    second = run_ranks(2, train_on_codes, two)[0]["weights"]
    for name in (CODES, CODES_HEAD):
        assert np.array_equal(second[name][: VOCABULARY.added], first[name])
        assert np.array_equal(second[name][VOCABULARY.added :], fresh[name][VOCABULARY.added :])
    config.model.discrete_rows = "none"
    config.exp_manager.explicit_log_dir += "_again"
    with pytest.raises(pytest.fail.Exception, match=r"has no rows of music \[4\].*would leave them random"):
        run_ranks(1, train_on_codes, config)


def test_dpo_keeps_the_rows_of_its_sft_run(config: RunConfig, tokenizer_folder: str, tmp_path: Path) -> None:
    """Preference optimization trains the adapters only; its checkpoint holds the rows that it started from."""
    config.job, config.model.lora, config.trainer.max_steps = "sft", LoraConfig(r=2), 1
    data = make_conversations(tmp_path / "sft", tokenizer_folder, 24, ("text",))
    config.data.train, config.data.seq_length = {"mix": DatasetConfig(path=data)}, 128
    sft = run_ranks(1, train_on_codes, config)[0]["weights"]
    config.job, config.model.discrete_rows = "dpo", "none"
    config.model.restore_from_path = config.exp_manager.explicit_log_dir
    config.exp_manager.explicit_log_dir += "_dpo"
    pairs = make_conversations(tmp_path / "pairs", tokenizer_folder, 24, ("text",), pairs=True)
    config.data.train = {"mix": DatasetConfig(path=pairs)}
    dpo = run_ranks(2, train_on_codes, laid_out(config, 2, tensor_model_parallel_size=2))[0]["weights"]
    assert any(not np.array_equal(value, sft[name]) for name, value in dpo.items())
    saved = StreamReader(store.resolve(config.exp_manager.explicit_log_dir))
    for name in (CODES, CODES_HEAD):
        assert np.array_equal(dpo[name], sft[name])
        assert np.array_equal(saved.read(name)[: VOCABULARY.added].numpy(), sft[name])


def test_dpo_may_not_train_the_rows(config: RunConfig) -> None:
    config.job, config.model.lora, config.model.restore_from_path = "dpo", LoraConfig(r=2), "somewhere"
    with pytest.raises(ConfigError, match=r"Set model\.discrete_rows=none"):
        check(config)
