"""Build everything a run needs from its configuration."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Optional

from megatron.core import distributed as mcore_distributed
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from transformers import LlamaConfig

from megatron_anymal import backend
from megatron_anymal.checkpoint.frozen_base import check_codes_are_kept, load_base, resolve_language_model
from megatron_anymal.config import DataConfig, DistributedDataParallelConfig, ModalityConfig, ModelConfig, RunConfig
from megatron_anymal.config.validation import check
from megatron_anymal.data.codes import CodeLayout
from megatron_anymal.data.configured_modality import LoadedModality, PlannedModality
from megatron_anymal.data.discrete_vocabulary import DiscreteVocabulary
from megatron_anymal.data.loader import MicroBatchReader, RankNeeds
from megatron_anymal.data.planner import BatchLayout, BatchPlanner
from megatron_anymal.data.records import DataError
from megatron_anymal.data.shared_prompts import shares_prompts
from megatron_anymal.data.tokenizer import Tokenizer
from megatron_anymal.modalities import Modality, build_modality, load_plugins
from megatron_anymal.model import kept_weights
from megatron_anymal.model.anymal import AnyMALModel
from megatron_anymal.model.build import agree_on_trainable, build_models, frozen_encoders
from megatron_anymal.model.discrete_rows import add_tied_gradients
from megatron_anymal.model.llama import check_model
from megatron_anymal.parallel import ParallelLayout
from megatron_anymal.resilience.stragglers import OwnTime
from megatron_anymal.resilience.survival import may_stay
from megatron_anymal.train.alignment_updates import begin_alignments
from megatron_anymal.train.auto_recompute import fit_recompute, sizes_of_run
from megatron_anymal.train.objective import Objective, build_objective
from megatron_anymal.train.optim import build_optimizer
from megatron_anymal.train.pass_times import AHEAD, PassTimes
from megatron_anymal.train.reference_logprobs import ReferenceAnswers
from megatron_anymal.train.stage_encoding import StageEncoding


@dataclass
class DataSource:
    """A data mixture: its batch planner and this rank's reader."""

    # Plans the global batches.
    planner: BatchPlanner
    # Reads this rank's micro-batches.
    reader: MicroBatchReader


@dataclass
class TrainState:
    """In-memory state of a run."""

    # The run's configuration.
    config: RunConfig
    # The Llama's HuggingFace configuration.
    llama: LlamaConfig
    # This process's place in the parallel layout.
    layout: ParallelLayout
    # Tokenizer of the run.
    tokenizer: Tokenizer
    # Modalities by their names in the configuration.
    modalities: dict[str, Modality]
    # This rank's model chunks: one, or several under a virtual pipeline.
    models: list[AnyMALModel]
    # The same chunks, wrapped for megatron-core's data parallelism.
    wrapped: list[DistributedDataParallel]
    # Optimizer over all trainable weights of this rank.
    optimizer: MegatronOptimizer
    # Training data.
    train_data: DataSource
    # Validation data; None without any.
    validation_data: Optional[DataSource]
    # Loss and metrics.
    objective: Objective
    # Time spent in this rank's own forward passes, in training and validation.
    own_time: OwnTime
    # Time spent in the parts of a step.
    pass_times: PassTimes
    # Which activation recomputation was chosen and why; "" if the configuration sets it.
    recompute: str = ""
    # DPO only, once the reference is loaded.
    reference: Optional[ReferenceAnswers] = None
    # Full names of frozen encoder weights that were restored from another run and must be saved with this one's.
    carried: set[str] = field(default_factory=set)
    # With model.encoder_placement=all_stages: this rank's part in it.
    stage_encoding: Optional[StageEncoding] = None
    # What the frozen weights depend on (model/kept_weights.py).
    frozen_source: str = ""
    # Updates made so far.
    step: int = 0
    # Called in each step before the ranks agree on the update.
    before_update: Callable[[], None] = lambda: None

    def release(self) -> None:
        """Give up training after a failure: keep only the frozen weights, if this process may stay for another attempt.

        The models and the optimizer hold each other through autograd's hooks too, where Python's collector does not
        look.
        """
        if may_stay():
            encoders: Any = self.stage_encoding.encoders if self.stage_encoding else dict(self.models[0].encoders)
            kept_weights.keep(self.frozen_source, self.models, encoders)
        for wrapped in self.wrapped:
            settings: Any = wrapped.config
            settings.grad_scale_func = settings.no_sync_func = None
            wrapped.grad_accs.clear()

    def wait_for_param_gather(self) -> None:
        """Wait until every rank holds the updated weights; with overlapped gathering they only arrive during the next
        step's forward pass. Collective."""
        if self.config.model.ddp.overlap_param_gather:
            for wrapped in self.wrapped:
                wrapped.start_param_sync(force_sync=True)


def check_run(config: RunConfig) -> None:
    """Reject settings, machines and Llama sizes that cannot work, before any process group is created.

    Raises:
        ConfigError, CheckpointError: naming the key or folder and the fix.
    """
    check(config)
    backend.check_backend(config.model, config.trainer.precision)
    _, hf = resolve_language_model(config.model.language_model)
    check_model(config.model, config.trainer.precision, hf)


def build(config: RunConfig, layout: ParallelLayout) -> TrainState:
    """Build data, model and optimizer; cheap checks come before anything large is allocated.

    Raises:
        ConfigError, DataError, CheckpointError, StorageError: naming the key, folder or sample and the fix.
    """
    config = copy.deepcopy(config)
    config.model.language_model, hf = resolve_language_model(config.model.language_model)
    check_codes_are_kept(config.model)
    precision = config.trainer.precision
    tokenizer, modalities = build_inputs(config.model, config.data)
    check_vocabulary(tokenizer, hf.vocab_size)
    check_codes(tokenizer, DiscreteVocabulary(hf.vocab_size, config.model.discrete))
    read = partial(build_data, config, layout, tokenizer, modalities, vocab_size=hf.vocab_size)
    train_data = read("train")
    validation_data = read("validation") if config.data.validation else None
    model, recompute = config.model, ""
    if model.recompute_granularity == "auto":
        sizes = sizes_of_run(model, precision, batch_layout(config), hf, modalities, reference=config.job == "dpo")
        model, recompute = fit_recompute(model, config.trainer.devices, sizes, layout.device)
    load = partial(load_base, model.language_model.checkpoint)
    source = kept_weights.source(model, precision, layout)
    kept = kept_weights.take(source)
    models = build_models(model, precision, hf, layout, modalities, load, kept)
    every_pass = model.ddp.overlap_grad_reduce
    agree_on_trainable(models, list(model.modalities), layout.device, every_pass=every_pass)
    wrapped = [_wrap(model.ddp, chunk, first=chunk is models[0]) for chunk in models]
    optimizer = build_optimizer(model.optim, model.ddp, config.trainer, wrapped, model.multiplex)
    if model.multiplex:
        begin_alignments(optimizer, model.multiplex)
    times, own_time = PassTimes(layout.device), OwnTime(layout.device)
    encoding = None
    if model.encoder_placement == "all_stages":
        own: Any = dict(models[0].encoders or kept.encoders)
        own = own or frozen_encoders(model, precision, modalities, layout.device)
        tokens = config.data.seq_length * model.micro_batch_size
        encoding = StageEncoding(layout, model, hf, own, own_time, times(AHEAD), tokens)
    _connect(model.ddp, wrapped, optimizer, times, encoding)
    state = TrainState(
        config=config,
        llama=hf,
        layout=layout,
        tokenizer=tokenizer,
        modalities=modalities,
        models=models,
        wrapped=wrapped,
        optimizer=optimizer,
        train_data=train_data,
        validation_data=validation_data,
        objective=build_objective(config.job, model, hf.vocab_size),
        own_time=own_time,
        pass_times=times,
        recompute=recompute,
        stage_encoding=encoding,
        frozen_source=source,
    )
    share_encoding(state, encoding.operations if encoding else {})
    return state


def share_encoding(state: TrainState, costs: Mapping[str, float]) -> None:
    """Let the planners share the encoding among the pipeline stages, if the run does so.

    Args:
        costs: encoder cost of a piece by modality, in any unit; the same on every rank.
    """
    if state.stage_encoding is None:
        return
    state.train_data.planner.share_encoding(state.stage_encoding.shares(costs, ahead=True))
    if state.validation_data is not None:
        # A validation's batches are encoded when they begin.
        state.validation_data.planner.share_encoding(state.stage_encoding.shares(costs, ahead=False))


def build_inputs(model: ModelConfig, data: DataConfig) -> tuple[Tokenizer, dict[str, Modality]]:
    """Build the tokenizer and the modalities, without encoder weights.

    Raises:
        ConfigError: a plug-in or the section of a modality cannot be used.
        DataError: the tokenizer cannot be used.
    """
    load_plugins(model.plugins)
    tokenizer = Tokenizer(data.tokenizer)
    modalities = {name: build_modality(name, section, data.limits) for name, section in model.modalities.items()}
    return tokenizer, modalities


def loaded_modalities(
    sections: Mapping[str, ModalityConfig], tokenizer: Tokenizer, modalities: Mapping[str, Modality]
) -> dict[str, LoadedModality]:
    """Return what the reader needs of each modality.

    Args:
        sections: `model.modalities`.
        modalities: built from them, by the same names.
    """
    return {
        name: LoadedModality(
            modality=modalities[name],
            soft_tokens_per_piece=section.projector.num_tokens,
            placeholder=tokenizer.placeholder(section.placeholder, f"model.modalities.{name}.placeholder"),
        )
        for name, section in sections.items()
    }


def rank_needs(layout: ParallelLayout) -> RankNeeds:
    """Return what this rank reads: the first stage tokens and media, the last stage labels, the others only lengths.

    Besides, the plan may give a stage media to encode.
    """
    return RankNeeds(
        text=layout.is_first_stage or layout.is_last_stage,
        media=layout.is_first_stage,
        stage=layout.pipeline_rank,
        tensor_rank=layout.tensor_rank,
        tensor_size=layout.tensor_size,
        context_rank=layout.context_rank,
        context_size=layout.context_size,
    )


def batch_layout(config: RunConfig, attention: str = "") -> BatchLayout:
    """Return the settings of a run that affect packing.

    Args:
        attention: attention kernel; "": the one that the run would use on this machine.
    """
    attention = attention or backend.attention_kernel(config.model, config.trainer.precision)
    return BatchLayout.of(
        config.model,
        config.data.seq_length,
        config.data_parallel_size,
        shared_prompts=shares_prompts(config.job, config.model, attention),
    )


def build_data(
    config: RunConfig,
    layout: ParallelLayout,
    tokenizer: Tokenizer,
    modalities: dict[str, Modality],
    split: str,
    *,
    vocab_size: int = 0,
) -> DataSource:
    """Build the mixture of data.train or data.validation.

    Args:
        config: of the run.
        layout: of this rank.
        tokenizer: `data.tokenizer`.
        modalities: by their names in the configuration.
        split: train or validation.
        vocab_size: of the Llama, without padding; needed to read discrete media.

    Raises:
        DataError, StorageError: see BatchPlanner.
    """
    planned = [
        PlannedModality(name, section.kind or name, modalities[name], section.projector.num_tokens)
        for name, section in config.model.modalities.items()
    ]
    planner = BatchPlanner(
        getattr(config.data, split),
        planned,
        tokenizer,
        batch_layout(config),
        global_batch_size=config.model.samples_per_step,
        seed=config.model.seed,
        too_long=config.data.too_long,
        check_shards=layout.reports,
        sample_kinds=build_objective(config.job, config.model).sample_kinds,
        limits=config.data.limits,
        storage=config.data.storage,
        section=f"data.{split}",
        discrete=config.model.discrete,
        schedule=config.data.schedule if split == "train" else (),
        alignments=config.model.multiplex,
    )
    loaded = loaded_modalities(config.model.modalities, tokenizer, modalities)
    codes = CodeLayout(DiscreteVocabulary(vocab_size, config.model.discrete), config.model.discrete)
    return DataSource(planner, MicroBatchReader(planner, tokenizer, loaded, rank_needs(layout), codes))


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Reject a tokenizer with ids outside the Llama's vocabulary.

    Raises:
        DataError: naming the largest id.
    """
    largest = max(tokenizer.hf.get_vocab().values())
    if largest >= vocab_size:
        raise DataError(
            f"data.tokenizer={tokenizer.hf.name_or_path!r} has ids up to {largest}, but the Llama's vocabulary has "
            f"only {vocab_size} entries. Set it to the tokenizer that belongs to the Llama."
        )


def check_codes(tokenizer: Tokenizer, vocabulary: DiscreteVocabulary) -> None:
    """Reject marks and codes of discrete media that are tokens of the tokenizer already.

    Raises:
        DataError: naming the first of them.
    """
    known = tokenizer.hf.get_vocab()
    for text in vocabulary.texts():
        if text in known:
            raise DataError(
                f"model.discrete: {text!r} is already a token of data.tokenizer={tokenizer.hf.name_or_path!r}, with "
                f"the id {known[text]}. Choose other marks or another name."
            )


def _wrap(ddp: DistributedDataParallelConfig, chunk: AnyMALModel, *, first: bool) -> DistributedDataParallel:
    settings = mcore_distributed.DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=ddp.use_distributed_optimizer,
        overlap_grad_reduce=ddp.overlap_grad_reduce,
        overlap_param_gather=ddp.overlap_param_gather,
        bucket_size=ddp.bucket_size or None,
    )
    # Only the first virtual chunk needs buckets: its backward pass runs last, with nothing after it to overlap with.
    return DistributedDataParallel(chunk.config, settings, chunk, disable_bucketing=not first)


def _connect(
    ddp: DistributedDataParallelConfig,
    wrapped: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    times: PassTimes,
    encoding: Optional[StageEncoding],
) -> None:
    """Set the hooks with which megatron-core's schedules time and finish a step."""
    settings: Any = wrapped[0].config
    settings.timers = times
    settings.grad_scale_func = optimizer.scale_loss
    settings.finalize_model_grads_func = partial(_finalize, encoding)
    if ddp.overlap_grad_reduce:
        settings.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync


def _finalize(encoding: Optional[StageEncoding], models: list[Any], num_tokens: Any = None, **settings: Any) -> None:
    """Reduce gradients; they already belong to the batch's mean loss, so they are not divided by a token count."""
    if encoding is not None:
        # The first stage still computes.
        encoding.finish()
    finalize_model_grads(models, None, **settings)
    add_tied_gradients([chunk.module for chunk in models])
