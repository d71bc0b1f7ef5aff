"""This trainer's side of benchmarks/step.py: sizes, data, configuration, its step, and the step's analytic FLOPs.

benchmarks/gpu shares the tokenizer, the step and the FLOP arithmetic.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_anymal.config import DatasetConfig, EncoderConfig, ModalityConfig, ProjectorConfig, RunConfig
from megatron_anymal.data.index_builder import IndexOptions
from megatron_anymal.data.index_folder import make_index
from megatron_anymal.data.manifest import write_shards
from megatron_anymal.data.micro_batch import MicroBatch
from megatron_anymal.data.step_plan import StepPlan
from megatron_anymal.train.build import TrainState
from megatron_anymal.train.step import StepResult, train_step

# Soft tokens of a document, which consists of begin token, soft tokens, text and end token.
SOFT_TOKENS = 2
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"]
# An IMU window: channels, samples.
PIECE = (6, 50)


@dataclass(frozen=True)
class LlamaDimensions:
    """Shape of the Llama without its vocabulary."""

    hidden: int = 512
    """Hidden size of the Llama."""
    layers: int = 8
    """Layers of the Llama."""
    heads: int = 8
    """Attention heads of the Llama."""
    key_value_heads: int = 4
    """Key/value heads of the Llama."""
    ffn: int = 1408
    """Feed-forward size of the Llama."""


@dataclass(frozen=True)
class StepSizes(LlamaDimensions):
    """Shapes and repetitions; every field is an argument of the command."""

    vocabulary: int = 8192
    """Size of the vocabulary."""
    documents: int = 8
    """Documents per step, all of one length."""
    document_tokens: int = 128
    """Tokens of a document."""
    packs: int = 2
    """Packs (micro-batches) per step."""
    batches: int = 4
    """Different batches, used in turn."""
    warm_up: int = 2
    """Rounds before the timed ones."""
    rounds: int = 20
    """Timed rounds, at least 2."""

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.documents * self.document_tokens

    @property
    def targets(self) -> int:
        """Tokens with a label per step: the words and the end token."""
        return self.documents * (self.document_tokens - SOFT_TOKENS - 1)


def write_tokenizer(folder: Path, special: Sequence[str], vocabulary: int) -> list[str]:
    """Write a word-level tokenizer with `vocabulary` ids; return its words.

    Args:
        special: begin token, end token, then other special tokens.
    """
    words = [f"w{number}" for number in range(vocabulary - len(special) - 1)]
    numbers = {token: number for number, token in enumerate([*special, "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1], additional_special_tokens=special[2:]
    ).save_pretrained(str(folder))
    return words


def write_data(folder: Path, sizes: StepSizes) -> None:
    """Write a word-level tokenizer and shards of IMU recordings with random words."""
    words = write_tokenizer(folder / "tokenizer", SPECIAL, sizes.vocabulary)
    rng = np.random.default_rng(0)
    (folder / "source").mkdir()
    lines = []
    for number in range(sizes.documents * sizes.batches):
        signal = io.BytesIO()
        np.save(signal, rng.normal(size=PIECE[::-1]).astype(np.float32))
        (folder / "source" / f"{number}.npy").write_bytes(signal.getvalue())
        text = " ".join(rng.choice(words, size=sizes.document_tokens - SOFT_TOKENS - 2))
        media = {"media": f"{number}.npy", "modality": "imu", "rate": PIECE[1]}
        lines.append({"key": f"{number:06d}", "parts": [media, {"text": text}]})
    manifest = folder / "source" / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_shards(str(manifest), str(folder / "shards"))
    make_index(str(folder / "shards"), IndexOptions(str(folder / "tokenizer")))


def make_config(folder: Path, sizes: StepSizes, freeze: bool) -> RunConfig:
    """Configuration of this trainer with a frozen or a trained Llama."""
    config = RunConfig()
    config.trainer.precision = "32"
    config.model.transformer_impl = "local"
    config.model.language_model.config = {
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.key_value_heads,
        "intermediate_size": sizes.ffn,
        "vocab_size": sizes.vocabulary,
        "tie_word_embeddings": False,
    }
    config.model.language_model.freeze = freeze
    config.model.modalities["imu"] = ModalityConfig(
        encoder=EncoderConfig(type="identity"),
        projector=ProjectorConfig(type="linear", num_layers=1, num_tokens=SOFT_TOKENS),
        options={"rate": float(PIECE[1]), "piece_seconds": 1.0},
        placeholder=SPECIAL[2],
    )
    config.model.global_batch_size = sizes.documents
    config.data.train = {"words": DatasetConfig(path=str(folder / "shards"))}
    config.data.tokenizer = str(folder / "tokenizer")
    config.data.seq_length = -(-sizes.documents // sizes.packs) * sizes.document_tokens
    config.data.num_workers = 0
    return config


class Batches(list[tuple[StepPlan, list[MicroBatch]]]):
    """The first steps of a run, planned and read, with the seconds that planning and reading took."""

    def __init__(self, state: TrainState, count: int):
        super().__init__()
        data = state.train_data
        self.planning: list[float] = []
        self.reading: list[float] = []
        for number in range(count):
            begun = time.perf_counter()
            plan = data.planner.plan(number)
            planned = time.perf_counter()
            self.append((plan, [data.reader[micro_batch] for micro_batch in plan.of_replica(0)]))
            self.planning.append(planned - begun)
            self.reading.append(time.perf_counter() - planned)


class Ours:
    """This trainer's step."""

    def __init__(self, state: TrainState, batches: Sequence[tuple[StepPlan, list[MicroBatch]]]):
        """
        Args:
            batches: batches to use in turn.
        """
        self.state, self.batches = state, batches

    def step(self, number: int) -> StepResult:
        """Train on one of the batches."""
        return train_step(self.state, *self.batches[number % len(self.batches)])


@dataclass(frozen=True)
class StepOperations:
    """Analytic floating-point operations of a step, two per multiply-add."""

    # Parameters of the Llama used in matrix products: layers and output layer, not the embedding.
    parameters: int
    # Per parameter and token: 2 forward, 2 for the input's gradient, and 2 for the weight's gradient if it trains.
    products: float
    # Scores and weighted sums of values within documents: 2 n d L^2 forward (half of the square is masked), 2.5 times
    # that backward.
    attention: float
    # As for a trained weight: megatron-core's linear computes its input's gradient although the features need none.
    projector: float

    @property
    def total(self) -> float:
        """Total."""
        return self.products + self.attention + self.projector


# Ratio of backward to forward in attention, whose backward kernels recompute the scores.
ATTENTION_BACKWARD = 2.5


def layer_parameters(hidden: int, heads: int, key_value_heads: int, head_size: int, ffn: int) -> int:
    """Parameters used in the matrix products of one Llama layer."""
    return 2 * hidden * head_size * (heads + key_value_heads) + 3 * hidden * ffn


def output_parameters(hidden: int, heads: int, head_size: int, ffn: int) -> int:
    """The part of them after the layer's attention, which the last layer uses only at positions with a label."""
    return hidden * head_size * heads + 3 * hidden * ffn


def attention_by_hand(heads: int, head_size: int, layers: int, squares: int) -> float:
    """Floating-point operations of causal attention's forward pass.

    Args:
        squares: sum of the documents' squared lengths.
    """
    return 2.0 * heads * head_size * squares * layers


def work_by_hand(sizes: StepSizes, freeze: bool) -> StepOperations:
    """Analytic FLOPs of a step of this trainer, without the optimizer."""
    width = sizes.hidden // sizes.heads
    layer = layer_parameters(sizes.hidden, sizes.heads, sizes.key_value_heads, width, sizes.ffn)
    last = output_parameters(sizes.hidden, sizes.heads, width, sizes.ffn)
    parameters = sizes.layers * layer + sizes.vocabulary * sizes.hidden
    attention = attention_by_hand(sizes.heads, width, sizes.layers, sizes.document_tokens**2 * sizes.documents)
    return StepOperations(
        parameters=parameters,
        # The output layer runs on targets only; if it trains, the backward pass recomputes its logits.
        products=(4.0 if freeze else 6.0)
        * (sizes.layers * layer * sizes.tokens - last * (sizes.tokens - sizes.targets))
        + (4.0 if freeze else 8.0) * sizes.vocabulary * sizes.hidden * sizes.targets,
        attention=(1 + ATTENTION_BACKWARD) * attention,
        projector=6.0 * PIECE[0] * PIECE[1] * sizes.hidden * sizes.documents,
    )
