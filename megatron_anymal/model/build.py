"""Build this rank's part of the model from the configuration, with its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Optional

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from transformers import LlamaConfig

from megatron_anymal import backend
from megatron_anymal.config import ModelConfig
from megatron_anymal.data.discrete_vocabulary import DiscreteVocabulary
from megatron_anymal.modalities import Modality
from megatron_anymal.model.anymal import AnyMALModel
from megatron_anymal.model.discrete_rows import DiscreteRows, initialise_rows
from megatron_anymal.model.encoder_sharding import share_gradients
from megatron_anymal.model.encoders import Encoder, seeded_encoder
from megatron_anymal.model.hf_llama import load_hf_llama
from megatron_anymal.model.kept_weights import NOTHING, KeptWeights, set_llama
from megatron_anymal.model.llama import build_gpt, transformer_config
from megatron_anymal.model.lora import add_lora, initialise_lora
from megatron_anymal.model.projectors import build_projector
from megatron_anymal.model.unsharded_weights import list_weights, set_initial_values
from megatron_anymal.parallel import ParallelLayout

# Rows of the embedding that are squared at once.
_ROWS = 256


def build_models(
    model: ModelConfig,
    precision: str,
    hf: LlamaConfig,
    layout: ParallelLayout,
    modalities: Mapping[str, Modality],
    load_base: Callable[[Sequence[AnyMALModel]], None],
    kept: KeptWeights = NOTHING,
) -> list[AnyMALModel]:
    """Build this rank's pipeline stage (one model per virtual pipeline chunk), with weights set and frozen ones marked.

    Args:
        model: with its `language_model` resolved (checkpoint/frozen_base.py).
        precision: `trainer.precision`.
        hf: the Llama's HuggingFace configuration.
        modalities: by their name in the configuration.
        load_base: sets the Llama's weights if `model.language_model.checkpoint` is set.
        kept: frozen weights that need not be read.

    Raises:
        ConfigError: sizes do not match, or a folder is missing or of the wrong kind.
    """
    models = [chunk.to(layout.device) for chunk in assemble(model, precision, hf, modalities, kept.encoders)]
    lm = model.language_model
    weights = [
        w
        for m in models
        for w in list_weights(m)
        if not w.name.startswith(("encoders.", "discrete.")) and ".lora." not in w.name
    ]
    projectors = (w for w in weights if w.name.startswith("projectors."))
    default_std = 0.02 if lm.path and lm.load_weights else hf.initializer_range
    if kept.llama:
        set_initial_values(projectors, model.seed, default_std)
        set_llama(models, kept)
    elif lm.path and lm.load_weights:
        set_initial_values(projectors, model.seed, default_std)
        load_hf_llama(lm.path, hf, weights)
    else:
        set_initial_values(weights, model.seed, default_std)
        if lm.checkpoint:
            load_base(models)
    _set_gains(models[0])
    initialise_rows(models, model.seed, model.discrete_init, hf.initializer_range)
    initialise_lora(models, model.seed)
    return models


def assemble(
    model: ModelConfig,
    precision: str,
    hf: LlamaConfig,
    modalities: Mapping[str, Modality],
    encoders: Mapping[str, Encoder] = MappingProxyType({}),
) -> list[AnyMALModel]:
    """Build the models that `build_models` returns, without setting the weights' values.

    Args:
        encoders: those that need not be built, by modality.

    Raises:
        ConfigError: sizes do not match.
    """
    transformer = transformer_config(model, precision, hf)
    pieces_per_call = {name: m.encoder.max_pieces_per_call for name, m in model.modalities.items()}
    chunks = model.virtual_pipeline_model_parallel_size
    models = []
    for vp_stage in range(chunks) if chunks > 1 else [None]:
        gpt = build_gpt(hf, transformer, backend.transformer_impl(model), vp_stage, model.base_quantization)
        parts = _media_parts(model, transformer, modalities, encoders) if gpt.pre_process else ({}, {})
        attention = backend.attention_kernel(model, precision)
        chunk = AnyMALModel(
            transformer,
            gpt,
            *parts,
            pieces_per_call,
            hf.vocab_size,
            attention,
            model.neftune,
            model.seed,
            _discrete_rows(model, transformer, gpt, hf.vocab_size),
        )
        _freeze(model, chunk)
        models.append(chunk)
    if model.lora.r:
        dropout = add_lora(models, model.lora)
        for chunk in models:
            chunk.lora_dropout = dropout
    return models


def _discrete_rows(
    model: ModelConfig, transformer: TransformerConfig, gpt: GPTModel, vocab_size: int
) -> Optional[DiscreteRows]:
    if not model.discrete or not (gpt.pre_process or gpt.post_process):
        return None
    added = DiscreteVocabulary(vocab_size, model.discrete).added
    tied = gpt.share_embeddings_and_output_weights
    return DiscreteRows(transformer, added, first=gpt.pre_process, last=gpt.post_process, tied=tied)


def _media_parts(
    model: ModelConfig,
    transformer: TransformerConfig,
    modalities: Mapping[str, Modality],
    known: Mapping[str, Encoder],
) -> tuple[dict[str, Encoder], dict[str, Any]]:
    parallel = ModelParallelConfig(
        tensor_model_parallel_size=transformer.tensor_model_parallel_size, params_dtype=transformer.params_dtype
    )
    implementation = backend.transformer_impl(model)
    encoders, projectors = {}, {}
    for name, section in model.modalities.items():
        encoder = known.get(name) or seeded_encoder(name, section.encoder, modalities[name], model.seed)
        encoders[name] = encoder.to(transformer.params_dtype)
        share_gradients(encoder)
        projectors[name] = build_projector(
            name,
            section.projector,
            parallel,
            implementation,
            encoder.feature_tokens,
            encoder.width,
            transformer.hidden_size,
        )
    return encoders, projectors


def frozen_encoders(
    model: ModelConfig, precision: str, modalities: Mapping[str, Modality], device: torch.device
) -> dict[str, Encoder]:
    """Build the encoders of all modalities for a rank whose model has none; they are the first stage's if those come
    from folders or the seed.

    Args:
        precision: `trainer.precision`.
        modalities: by their name in the configuration.

    Raises:
        ConfigError: see `build_encoder`.
    """
    dtype = backend.compute_dtype(precision)
    return {
        name: seeded_encoder(name, section.encoder, modalities[name], model.seed)
        .requires_grad_(False)
        .to(dtype)
        .to(device)
        for name, section in model.modalities.items()
    }


def _set_gains(model: AnyMALModel) -> None:
    """Initialize the projectors' gains to the root mean square of the text embeddings."""
    if not model.projectors:
        return
    table = model.language_model.embedding.word_embeddings.weight.detach()
    # In parts: in double precision, the whole table would take eight times its memory and, on a CPU, ten times as long.
    squares = torch.stack([rows.double().square().sum() for rows in table.split(_ROWS)]).sum()
    dist.all_reduce(squares, group=parallel_state.get_tensor_model_parallel_group())
    rms = (squares / (model.vocab_size * table.size(1))).sqrt()
    gains: list[Any] = [projector.gain for projector in model.projectors.values()]
    with torch.no_grad():
        for gain in gains:
            gain.fill_(rms.item())


def agree_on_trainable(
    models: Sequence[AnyMALModel], names: Sequence[str], device: torch.device, *, every_pass: bool
) -> None:
    """Tell every chunk what trains on any rank, so that packs that reach none of it have no backward pass. Collective.

    Read from the weights, not from the configuration: a program may have unfrozen some of them.

    Args:
        models: this rank's chunks, with the final choice of trainable weights.
        names: all modalities in the configuration, in the same order on every rank.
        device: for the reduction.
        every_pass: see AnyMALModel.set_trainable.
    """

    def trains(*modules: nn.Module) -> bool:
        return any(parameter.requires_grad for module in modules for parameter in module.parameters())

    flags = [trains(*(part for chunk in models for part in (chunk.language_model, chunk.discrete) if part))]
    for name in names:
        holders = [chunk for chunk in models if name in chunk.projectors]
        flags.append(trains(*(part[name] for chunk in holders for part in (chunk.encoders, chunk.projectors))))
    agreed = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    llama, *modalities = (bool(flag) for flag in agreed.tolist())
    for chunk in models:
        trainable = [name for name, trained in zip(names, modalities) if trained]
        chunk.set_trainable(llama, trainable, every_pass=every_pass)


def _freeze(model: ModelConfig, chunk: AnyMALModel) -> None:
    def hold(module: nn.Module, frozen: bool) -> None:
        for parameter in module.parameters():
            parameter.requires_grad_(not frozen)

    hold(chunk.language_model, model.language_model.freeze)
    if chunk.discrete is not None:
        hold(chunk.discrete, model.discrete_rows == "none")
        for name, parameter in chunk.language_model.named_parameters():
            if model.discrete_rows != "all" and name.startswith(("embedding.", "output_layer.")):
                parameter.requires_grad_(False)
    for name in chunk.projectors:
        hold(chunk.encoders[name], model.modalities[name].encoder.freeze)
        hold(chunk.projectors[name], model.modalities[name].projector.freeze)
