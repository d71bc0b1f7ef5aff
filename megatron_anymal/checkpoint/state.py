"""What a checkpoint holds: trainable weights, optimizer and step, in megatron-core's dist_checkpointing format."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import nn

from megatron_anymal.checkpoint import safe_loading, store
from megatron_anymal.checkpoint.fp8_scaling import set_scaling, sharded_scaling
from megatron_anymal.checkpoint.sharding import sharded_optimizer, sharded_weights
from megatron_anymal.checkpoint.store import CheckpointError, Manifest
from megatron_anymal.checkpoint.tensor_stream import StreamReader
from megatron_anymal.config import LoraConfig, ModalityConfig
from megatron_anymal.model.fp8_weights import is_quantized
from megatron_anymal.model.hf_llama import checkpoint_place
from megatron_anymal.model.unsharded_weights import Weight, list_weights


def content(state: Any, step: int, *, is_loading: bool) -> dict[str, Any]:
    """What this rank saves of a TrainState, or asks a checkpoint for, as megatron-core's shards. Collective."""
    weights = sharded_weights(state.models, partial(_is_saved, state.carried))
    return {
        "model": weights,
        "optimizer": sharded_optimizer(state.optimizer, weights, is_loading=is_loading),
        "fp8_scaling": sharded_scaling(state.models),
        "step": step,
    }


def load(state: Any, folder: Path) -> int:
    """Load weights and optimizer into a TrainState, whatever layout wrote them. Collective.

    Returns:
        The step it was saved at.
    """
    saved = StreamReader(folder)
    state.carried = {name for name in saved.tensors if name.startswith("encoders.")}
    wanted = content(state, 0, is_loading=True)
    # A run that now scales otherwise than the one that saved begins its scaling anew.
    there = saved.objects
    wanted["fp8_scaling"] = {name: s for name, s in wanted["fp8_scaling"].items() if s.unique_key in there}
    loaded = safe_loading.load(wanted, folder)
    # A stage may have saved no weights, or no optimizer's state.
    _set(state.models, loaded.get("model", {}))
    set_scaling(state.models, loaded.get("fp8_scaling", {}))
    if any(parameter.requires_grad for model in state.models for parameter in model.parameters()):
        with torch.no_grad():
            state.optimizer.load_state_dict(loaded["optimizer"])
    return int(loaded["step"])


def restore(state: Any, folder: Path, base_hash: str, optimizer: Any) -> list[str]:
    """Start a TrainState from another run's weights: projectors, adapters, what else it trained or carried. Collective.

    Args:
        base_hash: of this run's frozen Llama.
        optimizer: told to copy its main weights from the new ones.

    Returns:
        Names of weights that train here and were not in the checkpoint.

    Raises:
        CheckpointError: it holds none of them, weights of other shapes, or adapters that do not belong here, or it
            lacks a projector that is frozen here.
    """
    saved = StreamReader(folder).tensors
    _check_adapters(state.config.model.lora, saved, folder, base_hash)
    _check_projectors(state.config.model.modalities, saved, folder)
    missing = load_media_parts(state.models, folder)
    state.carried = {name for name in saved if name.startswith("encoders.")}
    optimizer.reload_model_params()
    return missing


def load_media_parts(models: Sequence[nn.Module], folder: Path) -> list[str]:
    """Set what a checkpoint holds of encoders, projectors, adapters and all that trains; others keep their values.
    Collective.

    Returns:
        Names of weights that train here and were not in the checkpoint.

    Raises:
        CheckpointError: it holds none of them, or one of another shape.
    """
    return _load_some(models, sharded_weights(models, _is_media_part), folder)


def load_language_model(models: Sequence[nn.Module], folder: Path) -> None:
    """Set all of the Llama's weights from a checkpoint that trained them. Collective.

    Raises:
        CheckpointError: one is not in it.
    """
    weights = [weight for model in models for weight in list_weights(model)]
    if any(is_quantized(weight.parameter) for weight in weights):
        # megatron-core would load into FP8 tensors as they are; whole weights can be quantized one at a time.
        read_language_model(weights, folder)
        return
    shards = sharded_weights(models, lambda name, trains: name.startswith("language_model.") and ".lora." not in name)
    _load_some(models, shards, folder)
    saved = StreamReader(folder).tensors
    missing = [name for of_part in shards.values() for name, shard in of_part.items() if shard.key not in saved]
    if missing:
        raise CheckpointError(f"{str(folder)!r} lacks {missing[0]!r} of the Llama.")


def read_language_model(weights: Iterable[Weight], folder: Path) -> None:
    """The same weight by weight, each read whole.

    Raises:
        CheckpointError: one is not in it, or has another shape.
    """
    reader = StreamReader(folder)
    for weight in weights:
        if not weight.name.startswith("language_model.") or ".lora." in weight.name:
            continue
        key, layer = checkpoint_place(weight.name)
        if key not in reader.tensors:
            raise CheckpointError(f"{str(folder)!r} lacks {key!r} of the Llama.")
        # Without the rows that padded the vocabulary for the layout that saved it.
        whole = reader.read(key, layer)[: weight.shape[0]]
        try:
            weight.set(whole)
        except ValueError as error:
            raise CheckpointError(f"{str(folder)!r} holds another Llama: {error}") from None


def _is_saved(carried: Collection[str], name: str, trains: bool) -> bool:
    # A projector that is frozen now was trained before, and is nowhere else.
    return trains or name.startswith("projectors.") or name in carried


def _is_media_part(name: str, trains: bool) -> bool:
    return trains or name.startswith(("projectors.", "encoders."))


def _check_adapters(lora: LoraConfig, saved: Collection[str], folder: Path, base_hash: str) -> None:
    """Refuse a checkpoint's adapters where they would be lost, mean another model, or stand beside another Llama."""
    if not any(".lora." in name for name in saved):
        return
    manifest = store.read_manifest(folder)
    check_lora(lora, manifest, folder)
    if manifest.base_hash != base_hash:
        raise CheckpointError(
            f"The adapters in {str(folder)!r} were trained beside a Llama with other weights than this one. Name that "
            "run's Llama in model.language_model."
        )


def check_lora(lora: LoraConfig, manifest: Manifest, folder: Path) -> None:
    """Refuse other adapters than a checkpoint's.

    Raises:
        CheckpointError: naming the key and its value there.
    """
    there = manifest.config["model"].get("lora", {"r": 0})
    for key in ("r", "alpha", "targets") if lora.r or there["r"] else ():
        here = getattr(lora, key)
        if there.get(key) != here:
            raise CheckpointError(
                f"{str(folder)!r} was trained with model.lora.{key}={there.get(key)!r}; with {here!r} its adapters "
                "would be lost, or make another model. Set model.lora as that run had it."
            )


def _check_projectors(modalities: Mapping[str, ModalityConfig], saved: Collection[str], folder: Path) -> None:
    """Refuse a frozen projector that the checkpoint lacks: it would stay as it was drawn."""
    for name, section in modalities.items():
        if section.projector.freeze and not any(key.startswith(f"projectors.{name}.") for key in saved):
            raise CheckpointError(
                f"{str(folder)!r} has no projector for {name!r}, and model.modalities.{name}.projector.freeze=true "
                f"would leave a random one. Remove model.modalities.{name}, or name a run that trained it."
            )


def _load_some(models: Sequence[nn.Module], shards: dict[str, Any], folder: Path) -> list[str]:
    saved = StreamReader(folder).tensors
    vocab_size = store.read_manifest(folder).llama.get("vocab_size")
    same_vocabulary = all(model.vocab_size == vocab_size for model in models)
    wanted = {
        part: {name: shard for name, shard in of_part.items() if shard.key in saved} for part, of_part in shards.items()
    }
    for shard in (shard for of_part in wanted.values() for shard in of_part.values()):
        if not isinstance(shard, ShardedTensor):
            # A weight of two halves, which megatron-core takes apart when it loads; it checks their shapes itself.
            continue
        there, here = tuple(saved[shard.key].shape), tuple(shard.global_shape)
        if shard.allow_shape_mismatch and same_vocabulary:
            # Its rows differ by what pads the vocabulary for each tensor-parallel size.
            there, here = there[1:], here[1:]
        if there != here:
            raise CheckpointError(
                f"{str(folder)!r} holds {shard.key!r} with the shape {list(there)}; this run's configuration makes it "
                f"{list(here)}. Give the model the sizes it was trained with."
            )
    found = torch.tensor([sum(map(len, wanted.values()))], device=torch.device("cuda"))
    dist.all_reduce(found)
    if not int(found):
        raise CheckpointError(f"{str(folder)!r} holds none of the weights that this model asks it for.")
    _set(models, safe_loading.load({"model": wanted}, folder).get("model", {}))
    trains = {name for model in models for name, parameter in model.named_parameters() if parameter.requires_grad}
    return sorted(
        name for part, of_part in shards.items() for name in of_part.keys() - wanted[part].keys() if name in trains
    )


def _set(models: Sequence[nn.Module], tensors: dict[str, Any]) -> None:
    with torch.no_grad():
        for part, of_part in tensors.items():
            parameters = dict(models[int(part)].named_parameters())
            for name, tensor in of_part.items():
                parameters[name].copy_(tensor)
