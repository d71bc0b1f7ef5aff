"""Contents of a checkpoint in megatron-core's dist_checkpointing format: trainable weights, optimizer state, step."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor, nn

from megatron_anymal.checkpoint import safe_loading, store
from megatron_anymal.checkpoint.discrete_rows import check_discrete_rows, load_first_rows, saved_vocabulary
from megatron_anymal.checkpoint.fp8_scaling import set_scaling, sharded_scaling
from megatron_anymal.checkpoint.optimizer_steps import restore_steps
from megatron_anymal.checkpoint.sharding import sharded_optimizer, sharded_weights
from megatron_anymal.checkpoint.store import CheckpointError, Manifest
from megatron_anymal.checkpoint.tensor_stream import StreamReader
from megatron_anymal.config import LoraConfig, ModalityConfig
from megatron_anymal.model.hf_llama import checkpoint_position
from megatron_anymal.model.quantized_weights import is_quantized
from megatron_anymal.model.unsharded_weights import Weight, list_weights


def content(state: Any, step: int, *, is_loading: bool) -> dict[str, Any]:
    """Sharded state dict that this rank saves from, or loads into, a TrainState. Collective."""
    whole = not state.config.model.language_model.freeze
    weights = sharded_weights(state.models, partial(_is_saved, state.carried, whole))
    return {
        "model": weights,
        "optimizer": sharded_optimizer(state.optimizer, weights, is_loading=is_loading),
        "fp8_scaling": sharded_scaling(state.models),
        "step": step,
    }


def load(state: Any, folder: Path) -> int:
    """Load weights and optimizer state into a TrainState; the checkpoint's layout may differ. Collective.

    Returns:
        The step at which the checkpoint was saved.

    Raises:
        CheckpointError: the checkpoint is damaged, contains a pickle that could run code, or has rows of other marks
            and codes.
    """
    saved = StreamReader(folder)
    # Even an allowed change of the configuration must not load rows of codes as those of others.
    check_discrete_rows(state.config.model, saved.tensors, folder, appended=False)
    state.carried = {name for name in saved.tensors if name.startswith("encoders.")}
    wanted = content(state, 0, is_loading=True)
    # If the FP8 recipe differs from the one that was saved, scaling starts from its initial state.
    objects = saved.objects
    wanted["fp8_scaling"] = {name: s for name, s in wanted["fp8_scaling"].items() if s.unique_key in objects}
    loaded = safe_loading.load(wanted, folder)
    # A stage may have saved no weights or no optimizer state.
    _set(state.models, loaded.get("model", {}))
    set_scaling(state.models, loaded.get("fp8_scaling", {}))
    if any(parameter.requires_grad for model in state.models for parameter in model.parameters()):
        with torch.no_grad():
            state.optimizer.load_state_dict(loaded["optimizer"])
            restore_steps(state.optimizer)
    return int(loaded["step"])


def restore(state: Any, folder: Path, base_hash: str, optimizer: Any) -> list[str]:
    """Initialize a TrainState from another run's weights: projectors, adapters, all else it saved. Collective.

    Args:
        base_hash: hash of this run's frozen Llama.
        optimizer: copies its main weights from the loaded ones.

    Returns:
        Names of trainable weights that were not in the checkpoint.

    Raises:
        CheckpointError: the checkpoint holds none of the weights, weights of other shapes, or adapters that do not fit
            this run, or it lacks a projector that is frozen in this run.
    """
    saved = StreamReader(folder).tensors
    _check_adapters(state.config.model.lora, saved, folder, base_hash)
    _check_projectors(state.config.model.modalities, saved, folder)
    check_discrete_rows(state.config.model, saved, folder, appended=True)
    llama, rows = not state.config.model.language_model.freeze, saved_vocabulary(saved, folder)
    appended = [name for name in state.config.model.discrete if rows.added and name not in rows.names]
    missing = load_media_parts(state.models, folder, llama=llama, first_rows=bool(appended))
    missing += [f"the rows of {name}" for name in appended]
    state.carried = {name for name in saved if name.startswith("encoders.")}
    optimizer.reload_model_params()
    return missing


def load_media_parts(
    models: Sequence[nn.Module], folder: Path, *, llama: bool = False, first_rows: bool = False
) -> list[str]:
    """Load the encoders, projectors, rows of marks and codes, and trainable weights that a checkpoint contains.

    Weights that it does not contain keep their values. Collective.

    Args:
        llama: also load the Llama's own weights that do not train.
        first_rows: the checkpoint has the rows of some kinds of discrete media only.

    Returns:
        Names of trainable weights that were not in the checkpoint.

    Raises:
        CheckpointError: the checkpoint holds none of these weights, or one has another shape.
    """
    if first_rows:
        load_first_rows(models, folder)
    shards = sharded_weights(models, partial(_is_media_part, llama, not first_rows))
    return _load_some(models, shards, folder, loaded=first_rows)


def load_language_model(models: Sequence[nn.Module], folder: Path) -> None:
    """Load all of the Llama's weights from a checkpoint of a run that trained them. Collective.

    Raises:
        CheckpointError: a weight is missing from the checkpoint.
    """
    weights = [weight for model in models for weight in list_weights(model)]
    if any(is_quantized(weight.parameter) for weight in weights):
        # megatron-core would copy straight into the FP8 tensors; whole weights can be quantized one at a time.
        read_language_model(weights, folder)
        return
    shards = sharded_weights(models, lambda name, trains: _is_llama(name))
    _load_some(models, shards, folder)
    saved = StreamReader(folder).tensors
    missing = [name for chunk in shards.values() for name, shard in chunk.items() if shard.key not in saved]
    if missing:
        raise CheckpointError(f"{str(folder)!r} lacks the Llama weight {missing[0]!r}.")


def read_language_model(weights: Iterable[Weight], folder: Path) -> None:
    """Load the Llama's weights one by one, reading each of them whole.

    Raises:
        CheckpointError: a weight is missing from the checkpoint, or has another shape.
    """
    reader = StreamReader(folder)
    for weight in weights:
        if not _is_llama(weight.name):
            continue
        key, layer = checkpoint_position(weight.name)
        if key not in reader.tensors:
            raise CheckpointError(f"{str(folder)!r} lacks the Llama weight {key!r}.")
        try:
            weight.set_from(partial(_read_rows, reader, key, layer, weight.shape[0]))
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{str(folder)!r} holds a different Llama: {error}") from None


def _read_rows(reader: StreamReader, key: str, layer: Optional[int], rows: int) -> Tensor:
    """Read the first rows [R, ...] of a weight, without those that pad the vocabulary for the layout that saved it."""
    return reader.read(key, layer)[:rows]


def _is_saved(carried: Collection[str], llama: bool, name: str, trains: bool) -> bool:
    # Frozen projectors and rows of codes were trained earlier, and their weights are stored nowhere else. A Llama that
    # trains is stored with its frozen rows of the vocabulary.
    return trains or name.startswith(("projectors.", "discrete.")) or name in carried or (llama and _is_llama(name))


def _is_media_part(llama: bool, codes: bool, name: str, trains: bool) -> bool:
    if name.startswith("discrete."):
        return codes
    return trains or name.startswith(("projectors.", "encoders.")) or (llama and _is_llama(name))


def _is_llama(name: str) -> bool:
    return name.startswith("language_model.") and ".lora." not in name


def _check_adapters(lora: LoraConfig, saved: Collection[str], folder: Path, base_hash: str) -> None:
    """Refuse a checkpoint's adapters if this run would drop them, use them differently, or has another Llama."""
    if not any(".lora." in name for name in saved):
        return
    manifest = store.read_manifest(folder)
    check_lora(lora, manifest, folder)
    if manifest.base_hash != base_hash:
        raise CheckpointError(
            f"The adapters in {str(folder)!r} were trained with a Llama whose weights differ from this one. Set "
            "model.language_model to that run's Llama."
        )


def check_lora(lora: LoraConfig, manifest: Manifest, folder: Path) -> None:
    """Refuse LoRA settings that differ from a checkpoint's.

    Raises:
        CheckpointError: a key differs; the message names it and the checkpoint's value.
    """
    saved = manifest.config["model"].get("lora", {"r": 0})
    for key in ("r", "alpha", "targets") if lora.r or saved["r"] else ():
        value = getattr(lora, key)
        if saved.get(key) != value:
            raise CheckpointError(
                f"{str(folder)!r} was trained with model.lora.{key}={saved.get(key)!r}; with {value!r} its adapters "
                "would be lost, or give a different model. Set model.lora as in that run."
            )


def _check_projectors(modalities: Mapping[str, ModalityConfig], saved: Collection[str], folder: Path) -> None:
    """Refuse a frozen projector that the checkpoint lacks: it would keep its random initialization."""
    for name, section in modalities.items():
        if section.projector.freeze and not any(key.startswith(f"projectors.{name}.") for key in saved):
            raise CheckpointError(
                f"{str(folder)!r} has no projector for {name!r}, and model.modalities.{name}.projector.freeze=true "
                f"would leave it random. Remove model.modalities.{name}, or use a checkpoint of a run that trained it."
            )


def _load_some(models: Sequence[nn.Module], shards: dict[str, Any], folder: Path, *, loaded: bool = False) -> list[str]:
    """Load the shards that the checkpoint has, at least one unless others were `loaded`; return the trainable rest."""
    saved = StreamReader(folder).tensors
    vocab_size = store.read_manifest(folder).llama.get("vocab_size")
    same_vocabulary = all(model.vocab_size == vocab_size for model in models)
    wanted = {
        index: {name: shard for name, shard in chunk.items() if shard.key in saved} for index, chunk in shards.items()
    }
    for shard in (shard for chunk in wanted.values() for shard in chunk.values()):
        if not isinstance(shard, ShardedTensor):
            # A fused weight of two halves, which megatron-core splits when it loads; it checks their shapes itself.
            continue
        saved_shape, shape = tuple(saved[shard.key].shape), tuple(shard.global_shape)
        if shard.allow_shape_mismatch and same_vocabulary:
            # The number of rows depends on the vocabulary padding, which depends on the tensor-parallel size.
            saved_shape, shape = saved_shape[1:], shape[1:]
        if saved_shape != shape:
            raise CheckpointError(
                f"{str(folder)!r} holds {shard.key!r} with the shape {list(saved_shape)}; with this run's "
                f"configuration it is {list(shape)}. Configure the model with the sizes it was trained with."
            )
    count = torch.tensor([sum(map(len, wanted.values()))], device=torch.device("cuda"))
    dist.all_reduce(count)
    if not int(count) and not loaded:
        raise CheckpointError(f"{str(folder)!r} holds none of the weights that this model would load from it.")
    if int(count):
        _set(models, safe_loading.load({"model": wanted}, folder).get("model", {}))
    trains = {name for model in models for name, parameter in model.named_parameters() if parameter.requires_grad}
    return sorted(
        name for index, chunk in shards.items() for name in chunk.keys() - wanted[index].keys() if name in trains
    )


def _set(models: Sequence[nn.Module], tensors: dict[str, Any]) -> None:
    with torch.no_grad():
        for index, chunk in tensors.items():
            parameters = dict(models[int(index)].named_parameters())
            for name, tensor in chunk.items():
                parameters[name].copy_(tensor)
