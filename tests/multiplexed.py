"""Multiplexed runs of four tiny alignments, and the same alignments alone, for tests to compare."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from parity.data import MAKERS, make_parity_shards, parity_config
from tiny import WORDS

from megatron_anymal.config import AlignmentConfig, DatasetConfig, OptimConfig, RunConfig, ScheduleConfig
from megatron_anymal.data.index_builder import IndexOptions
from megatron_anymal.data.index_folder import make_index
from megatron_anymal.data.loader import steps
from megatron_anymal.data.manifest import write_shards
from megatron_anymal.model.unsharded_weights import gather_weights
from megatron_anymal.parallel import initialize
from megatron_anymal.train.build import TrainState, build
from megatron_anymal.train.stage_encoding import with_coming
from megatron_anymal.train.step import StepResult, train_step

NAMES = ("image", "audio", "video", "imu")
# Tokens of the samples of `make_data_of_one_length`.
LENGTH = 14
# Global batches in the proportions of AnyMAL's Table 11.
BATCHES = dict(zip(NAMES, (16, 1, 8, 2)))


@dataclass(frozen=True)
class Trace:
    """What an alignment did.

    Attributes:
        losses: mean loss of each step.
        norms: norm of the gradient of each step, before clipping.
        rates: learning rate of each step.
        weights: trained weights at the end.
    """

    losses: list[float]
    norms: list[float]
    rates: list[float]
    weights: dict[str, np.ndarray]


def make_data(folder: Path, tokenizer: str) -> dict[str, str]:
    """Write a folder of 48 samples for each modality."""
    return {name: make_parity_shards(folder / name, tokenizer, "pretrain", name) for name in NAMES}


def make_data_of_one_length(folder: Path, tokenizer: str, name: str) -> str:
    """Write 24 samples of LENGTH tokens with one piece each."""
    source = folder.with_name(folder.name + "_source")
    source.mkdir(parents=True)
    ending, maker, attributes = MAKERS[name]
    lines = []
    for number in range(24):
        # Makers use even seeds for small items.
        (source / f"{number}.{ending}").write_bytes(maker(6 * number))
        # Besides the text: the piece's soft tokens, and the tokens that begin and end a document.
        words = np.random.default_rng(number).choice(WORDS, LENGTH - 2 - (3 if name == "video" else 2))
        media = {"media": f"{number}.{ending}", "modality": name, **attributes}
        lines.append({"key": f"{number:02}", "parts": [media, {"text": " ".join(words)}]})
    (source / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_shards(str(source / "manifest.jsonl"), str(folder))
    make_index(str(folder), IndexOptions(tokenizer))
    return str(folder)


def multiplexed_config(data: dict[str, str], tokenizer: str, run_dir: Path) -> RunConfig:
    """Four alignments that differ in everything that they may differ in; the encoder of IMU signals trains, too."""
    config = parity_config("unused", tokenizer, "pretrain", "mixed")
    config.exp_manager.explicit_log_dir = str(run_dir)
    config.model.optim, config.model.global_batch_size = OptimConfig(), RunConfig().model.global_batch_size
    config.data.train = {f"{name}_text": DatasetConfig(path=path) for name, path in data.items()}
    config.data.seq_length = 96
    for number, name in enumerate(NAMES):
        config.model.multiplex[name] = AlignmentConfig(
            datasets=[f"{name}_text"],
            global_batch_size=BATCHES[name],
            # The norms of the gradients are around 1, so that some are clipped.
            gradient_clip_val=(0.05, 1.0, 0.0, 0.2)[number],
            optim=OptimConfig(
                lr=(2e-3, 1e-3, 5e-4, 4e-3)[number],
                betas=[(0.9, 0.8, 0.9, 0.85)[number], (0.95, 0.95, 0.99, 0.9)[number]],
                eps=(1e-5, 2e-5, 1e-5, 1e-4)[number],
                weight_decay=(0.0, 0.1, 0.05, 0.0)[number],
                sched=ScheduleConfig(name=("cosine", "linear", "constant", "cosine")[number], warmup_steps=number),
            ),
        )
    return config


def alone(config: RunConfig, name: str) -> RunConfig:
    """The configuration that runs one of the alignments alone."""
    config = copy.deepcopy(config)
    one = config.model.multiplex[name]
    config.exp_manager.explicit_log_dir += f"-{name}"
    config.model.multiplex = {}
    config.model.modalities = {name: config.model.modalities[name]}
    for split in (config.data.train, config.data.validation):
        for dataset in [dataset for dataset in split if dataset not in one.datasets]:
            del split[dataset]
    config.model.global_batch_size, config.model.optim = one.global_batch_size, one.optim
    config.trainer.gradient_clip_val = one.gradient_clip_val
    config.trainer.max_steps = one.max_steps or config.trainer.max_steps
    return config


def traces(
    config: RunConfig, before: Callable[[], None] | None = None, look: Callable[[TrainState], None] | None = None
) -> dict[str, Trace]:
    """In a rank: train to trainer.max_steps, and return the trace of each alignment, or of the run's only one.

    Args:
        before: called first, to plant a bug.
        look: called with the state that was built.
    """
    if before is not None:
        before()
    state = build(config, initialize(config))
    if look is not None:
        look(state)
    results: list[StepResult] = []
    data, last = state.train_data, config.trainer.max_steps
    planned = steps(
        data.planner, data.reader, replica=state.layout.data_rank, start=0, stop=last, num_workers=0, prefetch_steps=1
    )
    for plan, batches, coming in with_coming(planned, ahead=state.stage_encoding is not None):
        results.append(train_step(state, plan, batches, coming))
    state.wait_for_param_gather()
    return of_results(results, trained(state))


def trained(state: TrainState) -> dict[str, np.ndarray]:
    """Weights of encoders and projectors, whole; {} on all ranks but the first. Collective."""
    weights = gather_weights(state.models) or {}
    return {name: w.float().numpy() for name, w in weights.items() if name.startswith(("encoders.", "projectors."))}


def of_results(results: list[StepResult], weights: dict[str, np.ndarray]) -> dict[str, Trace]:
    """The traces in the results of a run's steps."""
    names = list(dict.fromkeys(name for result in results for name in result.rates or result.loss_by_modality))
    named_traces = {}
    for name in names:
        own = [result for result in results if name in result.loss_by_modality]
        named_traces[name] = Trace(
            [result.loss_by_modality[name] for result in own],
            [result.grad_norms.get(name, result.grad_norm) for result in own],
            [result.rates.get(name, result.lr) for result in own],
            {key: value for key, value in weights.items() if key.split(".")[1] == name},
        )
    return named_traces


def apart(one: Trace, other: Trace) -> float:
    """Largest relative difference between two traces: of a step's loss, and of the weights of the encoder or the
    projector (norm of the difference over the norm)."""
    assert one.rates == other.rates and one.weights.keys() == other.weights.keys() and one.weights
    losses = [abs(a - b) / abs(b) for a, b in zip(one.losses, other.losses, strict=True)]
    weights = []
    for part in ("encoders.", "projectors."):
        mine, theirs = (
            # An encoder may have no weights.
            np.concatenate([np.zeros(0), *(value.ravel() for name, value in t.weights.items() if part in name)])
            for t in (one, other)
        )
        weights.append(float(np.linalg.norm(mine - theirs) / max(np.linalg.norm(theirs), 1e-30)))
    return max(losses + weights)
