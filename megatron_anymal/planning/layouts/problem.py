"""From a configuration and options to the problem that the search solves."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import LlamaConfig

from megatron_anymal.config import ConfigError, LanguageModelConfig, ModalityConfig, ModelConfig, RunConfig
from megatron_anymal.data.codes import plan_kinds
from megatron_anymal.data.configured_modality import PlannedModality
from megatron_anymal.data.mix_stages import mean_shares, mean_tokens, plan_stages, stage_lines
from megatron_anymal.data.sample_measures import measure_samples
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.data.shared_prompts import shares_prompts
from megatron_anymal.dry_run.published_models import assume_shapes
from megatron_anymal.modalities import Modality, build_modality, load_plugins
from megatron_anymal.model.llama_shape import read_llama_config
from megatron_anymal.model.memory.media import EncoderSizes
from megatron_anymal.model.memory.recompute import MARGIN, planned_attention
from megatron_anymal.planning.layouts.hardware import Hardware
from megatron_anymal.planning.layouts.search import LayoutProblem
from megatron_anymal.planning.layouts.workload import Workload, assumed_workload, measured_workload

_GB = 1e9


def build_problem(
    config: RunConfig, gpu: Hardware, data: Sequence[str], sample_tokens: int = 0, label_share: float = 0.0
) -> tuple[LayoutProblem, list[str]]:
    """Read the shapes of the models and the lengths of the data. Imports torch if an encoder has to be measured.

    Args:
        config: a checked configuration with the job's nodes and devices.
        data: folders whose indexes replace those of the configuration.
        sample_tokens: LLM tokens of a sample without an index; 0: see `assumed_workload`.
        label_share: share of the tokens with a label, likewise.

    Returns:
        The problem, and lines for the reader: model folders that are not on this machine, layouts that a setting rules
        out.

    Raises:
        ConfigError: a model is neither on this machine nor a published one, or a sample is longer than a pack.
        DataError: an index does not fit the configuration.
        StorageError: an object store cannot be used.
        CheckpointError: the Llama's checkpoint does not exist.
    """
    assumed, notes = assume_shapes(config.model)
    load_plugins(assumed.plugins)
    modalities = {name: build_modality(name, section) for name, section in assumed.modalities.items()}
    hf = _llama(assumed.language_model)
    work = _workload(config, assumed.modalities, modalities, data, sample_tokens, label_share)
    memory = config.model.memory_gb or gpu.memory_gb * (1 - MARGIN)
    trial = copy.copy(config)
    trial.model = assumed
    encoders = _encoders(assumed, config.trainer.precision, modalities)
    if not data:
        notes += stage_lines(config.data.train, config.data.schedule, config.trainer.max_steps)
    if config.trainer.sampled_answers:
        notes.append("trainer.sampled_answers rules out context parallelism and virtual pipelines: 0 includes them")
    return LayoutProblem(trial, hf, gpu, work, encoders, int(memory * _GB)), notes


def _llama(section: LanguageModelConfig) -> LlamaConfig:
    if not section.checkpoint:
        return read_llama_config(section)
    # Imports torch.
    from megatron_anymal.checkpoint.frozen_base import resolve_language_model

    return resolve_language_model(section)[1]


def _encoders(
    model: ModelConfig, precision: str, modalities: Mapping[str, Modality]
) -> list[tuple[ModalityConfig, EncoderSizes]]:
    if not modalities:
        return []
    # Imports torch.
    from megatron_anymal.model.memory.encoder_sizes import measured_encoders

    return measured_encoders(model, precision, modalities, operations=True)


def _workload(
    config: RunConfig,
    sections: Mapping[str, ModalityConfig],
    modalities: Mapping[str, Modality],
    data: Sequence[str],
    sample_tokens: int,
    label_share: float,
) -> Workload:
    """Measure the given folders, or those of the configuration if they are all on this machine, or assume."""
    paths = list(data) or [dataset.path for dataset in config.data.train.values()]
    if data or (paths and not sample_tokens and all(Path(path, "index", "index.json").is_file() for path in paths)):
        planned = [
            PlannedModality(name, section.kind or name, modalities[name], section.projector.num_tokens)
            for name, section in sections.items()
        ]
        samples, length = config.model.global_batch_size, config.data.seq_length
        folders = [(path, 1.0) for path in data] or _mixture(config, planned)
        shared = shares_prompts(config.job, config.model, planned_attention(config.model))
        work = measured_workload(
            folders,
            planned,
            samples,
            length,
            config.data.storage,
            shared_prompts=shared,
            discrete=config.model.discrete,
        )
        of_stages = "" if data or not config.data.schedule else ", the mean over all stages of data.schedule"
        return dataclasses.replace(work, origin=f"{work.origin}{of_stages}")
    if sample_tokens > config.data.seq_length:
        raise ConfigError(
            f"--sample-tokens={sample_tokens} is more than data.seq_length={config.data.seq_length}. Lower it, or "
            "raise data.seq_length."
        )
    trial = copy.copy(config.model)
    trial.modalities = dict(sections)
    return assumed_workload(trial, config.data.seq_length, sample_tokens, label_share)


def _mixture(config: RunConfig, modalities: Sequence[PlannedModality]) -> list[tuple[str, float]]:
    """Folder of each training dataset, and its share in the samples of the whole run."""
    data, by_kind = config.data, {modality.kind: modality for modality in modalities}
    paths = [dataset.path for dataset in data.train.values()]

    def tokens_of(number: int) -> float:
        index = ShardIndex(paths[number], storage=data.storage)
        codes = plan_kinds(index.kinds_used(), config.model.discrete, repr(paths[number]))
        return mean_tokens(lambda rows: measure_samples(index, rows, by_kind, codes), len(index), data.seq_length)

    stages = plan_stages(data.train, data.schedule, 1, tokens_of)
    return list(zip(paths, mean_shares(stages, config.trainer.max_steps)))
