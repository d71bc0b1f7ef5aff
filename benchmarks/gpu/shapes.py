"""Cases to measure on a GPU: models, pack lengths and precisions, as configurations of this trainer.

A dry run differs only in that every size is divided, so that it takes moments on a CPU.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_anymal.config import DatasetConfig, EncoderConfig, ModalityConfig, ProjectorConfig, RunConfig
from megatron_anymal.dry_run.published_models import ENCODERS, LLAMAS, Published

# HuggingFace repositories with these shapes.
LLAMA = {"8b": "Meta-Llama-3-8B", "70b": "Meta-Llama-3-70B"}
ENCODER = {"vit_l": "clip-vit-large-patch14-336", "vit_g": "CLIP-ViT-bigG-14"}
# 32: only for dry runs, in which both implementations must agree on the loss to many digits. fp8: matrix products of
# the Llama's layers in FP8; fp8_primary: additionally, its frozen weights are stored only in FP8.
PRECISIONS = ("32", "bf16", "fp8", "fp8_primary")

PLACEHOLDER = "<|reserved_special_token_0|>"
SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    PLACEHOLDER,
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)

_DRY_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
_DRY_ENCODER = {
    "vit_l": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
    "vit_g": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96},
}
_DRY_PIXELS = {"image_size": 16, "patch_size": 8}


@dataclass(frozen=True)
class Scale:
    """Divisors of a dry run; 1 on a GPU."""

    resampler_layers: int = 1
    soft_tokens: int = 1
    tokens: int = 1
    resampler_heads: int = 1


DRY_SCALE = Scale(resampler_layers=6, soft_tokens=16, tokens=32, resampler_heads=8)


@dataclass(frozen=True)
class Case:
    """One case to measure."""

    # pretrain, sft or dpo.
    job: str
    # A key of LLAMA, one of ENCODER.
    llama: str
    encoder: str
    resampler_layers: int
    seq_length: int
    # One of PRECISIONS.
    precision: str
    # Approximate number of packs of seq_length tokens per step.
    packs: int
    # Loader processes.
    workers: int
    dry_run: bool

    @property
    def name(self) -> str:
        """Name for output and file names."""
        return f"{self.job}-{self.llama}-{self.encoder}-r{self.resampler_layers}-{self.seq_length}-{self.precision}"

    @property
    def scale(self) -> Scale:
        """Divisors of the sizes."""
        return DRY_SCALE if self.dry_run else Scale()

    @property
    def soft_tokens(self) -> int:
        """Soft tokens per image."""
        return 64 // self.scale.soft_tokens

    @property
    def llama_shape(self) -> dict[str, Any]:
        """Keys of a LlamaConfig."""
        return dict(_DRY_LLAMA) if self.dry_run else _shape(LLAMA[self.llama], LLAMAS)

    @property
    def encoder_shape(self) -> dict[str, Any]:
        """Keys of a CLIPVisionConfig."""
        if self.dry_run:
            return {**_DRY_ENCODER[self.encoder], **_DRY_PIXELS}
        return _shape(ENCODER[self.encoder], ENCODERS["clip"])


def _shape(folder: str, known: tuple[Published, ...]) -> dict[str, Any]:
    [published] = [model for model in known if folder in model.folders]
    return copy.deepcopy(published.shape)


def make_config(case: Case, folder: Path, mean_tokens: float) -> RunConfig:
    """Build the configuration of a run of this trainer.

    Args:
        folder: folder written by `samples.write_data`.
        mean_tokens: mean LLM tokens per sample.
    """
    config = RunConfig(job=case.job)
    config.trainer.precision = "32" if case.precision == "32" else "bf16"
    config.trainer.max_steps = 1_000_000
    model = config.model
    model.language_model.config = case.llama_shape
    model.modalities["image"] = ModalityConfig(
        encoder=EncoderConfig(type="clip", config=case.encoder_shape),
        projector=ProjectorConfig(
            type="resampler",
            num_layers=case.resampler_layers // case.scale.resampler_layers,
            num_tokens=case.soft_tokens,
            num_attention_heads=16 // case.scale.resampler_heads,
            freeze=case.job == "dpo",
        ),
        options={"max_grid": 1, "overview": False},
        placeholder=PLACEHOLDER,
    )
    if case.precision.startswith("fp8"):
        model.fp8 = "hybrid"
        model.fp8_primary_weights = case.precision == "fp8_primary"
    if case.job != "pretrain":
        model.lora.r, model.lora.alpha = 8, 32.0
    if case.job == "dpo":
        model.dpo.reference = "recomputed"
        # The same work as the peers', which compute whole documents.
        model.dpo.share_prompt = "never"
        # Required by validation only; the adapters of the SFT run are random, too.
        model.restore_from_path = "drawn"
    model.optim.lr, model.optim.sched.name = 1e-5, "constant"
    config.data.seq_length = case.seq_length // case.scale.tokens
    # Leave some slack: packs are at least 97 % full.
    model.global_batch_size = max(2, int(0.97 * case.packs * config.data.seq_length / mean_tokens))
    config.data.train = {case.job: DatasetConfig(path=str(folder / case.job))}
    config.data.tokenizer = str(folder / "tokenizer")
    config.data.num_workers = case.workers
    return config
