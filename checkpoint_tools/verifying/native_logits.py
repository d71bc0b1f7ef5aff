"""Logits of the trainer's own model, in fp32 on the weights as the run had them."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch

from checkpoint_tools.verifying.samples import VerificationSample
from megatron_anymal.checkpoint.frozen_base import load_base, resolve_language_model
from megatron_anymal.checkpoint.state import load_media_parts
from megatron_anymal.checkpoint.tensor_stream import StreamReader
from megatron_anymal.config import LanguageModelConfig, RunConfig
from megatron_anymal.data.micro_batch import MediaBatch, MicroBatch
from megatron_anymal.data.prompt_encoder import PromptReader
from megatron_anymal.modalities import Modality
from megatron_anymal.model.build import build_models
from megatron_anymal.model.lora import merge_lora
from megatron_anymal.model.quantized_weights import leave_out_quantization
from megatron_anymal.parallel import initialize
from megatron_anymal.train.build import build_inputs
from megatron_anymal.train.device_prefetch import to_device


class NativeModel:
    """A checkpoint's model in one process."""

    def __init__(self, folder: Path, config: RunConfig, *, llama_only: bool, merge: bool) -> None:
        """Build the model.

        Args:
            folder: checkpoint folder.
            config: configuration of its run.
            llama_only: leave out encoders and projectors.
            merge: merge the adapters, which rounds the Llama's weights to the run's dtype as in the export.
        """
        config = _on_one_process(config)
        if not config.model.language_model.freeze:
            config.model.language_model = LanguageModelConfig(checkpoint=str(folder), freeze=False)
        if llama_only:
            config.model.modalities = {}
            # A Llama stored in the checkpoint itself is exported in its stored dtype, not rounded to the run's.
            config.trainer.precision = config.trainer.precision if config.model.language_model.freeze else "32"
        self._layout = initialize(config)
        model = config.model
        model.language_model, hf = resolve_language_model(model.language_model)
        modalities: dict[str, Modality] = {}
        if not llama_only:
            tokenizer, modalities = build_inputs(model, config.data)
            self._reader = PromptReader(tokenizer, model.modalities, modalities)
            self._placeholders = {
                name: tokenizer.placeholder(section.placeholder, name) for name, section in model.modalities.items()
            }
        load = partial(load_base, model.language_model.checkpoint)
        [native] = build_models(model, config.trainer.precision, hf, self._layout, modalities, load)
        saved = [name for name in StreamReader(folder).tensors if not name.startswith("optimizer.")]
        # For a frozen Llama alone, without adapters, the checkpoint contains no weights.
        media = ("discrete.",) if llama_only else ("projectors.", "encoders.", "discrete.")
        if any(name.startswith(media) or ".lora." in name for name in saved):
            load_media_parts([native], folder)
        if merge:
            merge_lora([native])
        # Encoders and base were rounded to the run's dtype above; the comparison itself runs in fp32.
        self._model = native.float().eval().requires_grad_(False)
        # Features become soft tokens in this dtype.
        self._model.config.params_dtype = torch.float32

    @torch.no_grad()
    def run(self, sample: VerificationSample) -> dict[str, Any]:
        """Return `tokens` [T], `media` (modality -> encoder inputs) and `logits` [T, V] of a sample."""
        media: dict[str, Any] = {}
        tokens = sample.tokens
        if sample.prompt is not None:
            read = self._reader.read(sample.prompt.parts, sample.prompt.media)
            tokens = read.tokens
            for name in dict.fromkeys(name for name, _ in read.pieces):
                media[name] = torch.cat([pieces for other, pieces in read.pieces if other == name])
        ids = torch.tensor(tokens)
        positions = {name: (ids == self._placeholders[name]).nonzero().flatten() for name in media}
        batches = {name: MediaBatch(pieces, ((len(pieces),),), positions[name]) for name, pieces in media.items()}
        micro_batch = to_device(MicroBatch.unlabelled([tokens], batches), self._layout.device)
        logits = self._model.whole_logits(self._model(micro_batch)[0])
        return {"tokens": ids, "media": media, "logits": logits.float().cpu()}


def _on_one_process(config: RunConfig) -> RunConfig:
    config = copy.deepcopy(config)
    config.trainer.num_nodes = config.trainer.devices = 1
    model = config.model
    leave_out_quantization(model)
    model.tensor_model_parallel_size = model.pipeline_model_parallel_size = model.context_parallel_size = 1
    model.virtual_pipeline_model_parallel_size, model.sequence_parallel = 1, False
    model.num_layers_in_first_pipeline_stage = model.num_layers_in_last_pipeline_stage = 0
    return config
