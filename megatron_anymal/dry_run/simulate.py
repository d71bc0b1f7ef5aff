"""`--dry-run`: check a run, build its model without weight data, and report the memory use of each rank.

One process simulates one rank of each pipeline stage in turn, over fake process groups, and builds that rank's part of
the model on torch's meta device. No GPU, launcher or weights are needed.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig

from megatron_anymal import backend
from megatron_anymal.checkpoint import store
from megatron_anymal.config import ConfigError, LanguageModelConfig, ModelConfig, RunConfig, is_remote
from megatron_anymal.config.validation import check
from megatron_anymal.data.discrete_vocabulary import DiscreteVocabulary
from megatron_anymal.data.mix_stages import MixStage
from megatron_anymal.data.shard_index import ShardIndex
from megatron_anymal.data.tokenizer import Tokenizer
from megatron_anymal.dry_run.published_models import ENCODERS, assume_shapes
from megatron_anymal.modalities import Modality, build_modality, load_plugins
from megatron_anymal.modalities.architecture import ARCHITECTURES, read_json
from megatron_anymal.model.anymal import AnyMALModel
from megatron_anymal.model.build import assemble
from megatron_anymal.model.llama import check_model
from megatron_anymal.model.llama_shape import check_sizes, read_llama_config
from megatron_anymal.model.memory.recompute import Choice, choose, configured, judge, planned_attention
from megatron_anymal.model.memory.run_sizes import matrix_bytes, optimizer_bytes
from megatron_anymal.model.meta_device import on_meta, without_weights
from megatron_anymal.model.unsharded_weights import Weight, list_weights
from megatron_anymal.parallel import ParallelLayout, make_groups, shutdown
from megatron_anymal.train.auto_recompute import memory_to_fit, sizes_of_run
from megatron_anymal.train.build import batch_layout, build_data, check_codes, check_vocabulary, loaded_modalities

_META = torch.device("meta")
# The older weight format, which transformers also reads.
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# Layout of a single process, for the data pipeline.
_ALONE = ParallelLayout(
    _META,
    rank=0,
    world_size=1,
    tensor_rank=0,
    tensor_size=1,
    pipeline_rank=0,
    pipeline_size=1,
    data_rank=0,
    data_size=1,
)


@dataclass(frozen=True)
class ChunkSize:
    """A model chunk of one rank: a pipeline stage, or one of its virtual pipeline chunks."""

    # Indices of its layers, counted from 0 over the whole Llama.
    layers: tuple[int, ...]
    # Other modules: "embedding", "image encoder", "image projector", ..., "head".
    besides: tuple[str, ...]
    # Parameters on this rank, including replicated and padding ones.
    parameters: int
    # Parameters on this rank that train.
    trainable: int
    # Bytes of the weights on this rank.
    weight_bytes: int


@dataclass(frozen=True)
class Stage:
    """Sizes per rank of a pipeline stage, equal for all of its ranks.

    Attributes:
        ranks: the stage's ranks in the job, over all replicas.
        parts: the model chunks of a rank, in order.
        gradient_bytes: fp32 gradients.
        optimizer_bytes: one rank's share of Adam's moments and, with bf16, of the fp32 main weights.
    """

    ranks: range
    parts: tuple[ChunkSize, ...]
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def parameters(self) -> int:
        """Parameters per rank."""
        return sum(part.parameters for part in self.parts)

    @property
    def trainable(self) -> int:
        """Trainable parameters per rank."""
        return sum(part.trainable for part in self.parts)

    @property
    def weight_bytes(self) -> int:
        """Weight bytes per rank."""
        return sum(part.weight_bytes for part in self.parts)


@dataclass(frozen=True)
class Memory:
    """Memory use of the ranks during a step, including activations.

    Attributes:
        choice: the recomputation, chosen or configured, and each stage's memory use with it.
        attention: the attention kernel that the estimate assumes.
        on_cpu: whether it assumes a CPU.
    """

    choice: Choice
    attention: str
    on_cpu: bool


@dataclass
class DryRun:
    """Results of a dry run.

    Attributes:
        config: the run's configuration.
        stages: sizes of each pipeline stage.
        weights: the whole model's weights by name: number of elements, and whether they train. Under every layout, each
            weight appears once, and tied weights are one.
        notes: assumptions, and limitations of this machine.
        missing: key and path of everything that is not on this machine yet.
        samples: number of samples of the existing data sets, by the names of the split and of the data set.
        mixture: the stages of the training data, if all of it is here.
        memory: memory use of the ranks; None until it has been estimated.
    """

    config: RunConfig
    stages: list[Stage] = field(default_factory=list)
    weights: dict[str, tuple[int, bool]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    samples: dict[tuple[str, str], int] = field(default_factory=dict)
    mixture: tuple[MixStage, ...] = ()
    memory: Memory | None = None


def examine(config: RunConfig) -> DryRun:
    """Check a run and build its model without weight data. Leaves no process group behind and writes nothing.

    Raises:
        ConfigError, DataError, CheckpointError, StorageError: anything that would also stop the run, naming the key,
            folder or sample and the fix; or a model that is neither on this machine nor a published one.
        RuntimeError: this process is a rank of a job.
    """
    check(config)
    result = DryRun(config)
    precision = config.trainer.precision
    assumed, result.notes = assume_shapes(config.model)
    load_plugins(config.model.plugins)
    hf = _llama_shape(assumed.language_model)
    limits = config.data.limits
    modalities = {name: build_modality(name, section, limits) for name, section in assumed.modalities.items()}
    try:
        backend.check_backend(config.model, precision)
    except ConfigError as error:
        result.notes.append(f"this machine cannot run it: {error}")
    # `buildable` has no number formats, which have requirements of their own.
    check_sizes(assumed, hf)
    buildable = without_weights(assumed)
    check_model(buildable, precision, hf)
    _look_around(result, hf, modalities)
    for number, models in enumerate(_play_stages(buildable, precision, hf, modalities)):
        _enter_stage(result, number, models)
    result.memory = _memory(result, assumed, hf, modalities)
    return result


def _memory(dry_run: DryRun, model: ModelConfig, hf: LlamaConfig, modalities: dict[str, Modality]) -> Memory:
    """Estimate the memory use of a step; for a run in bf16 or with model.memory_gb, on a GPU, even if there is none.

    Args:
        model: the run's section, with assumed shapes for missing folders.

    Raises:
        ConfigError: model.recompute_granularity=auto, and nothing fits.
    """
    has_gpu, config = torch.cuda.is_available(), dry_run.config
    precision = config.trainer.precision
    planned = has_gpu or model.memory_gb > 0 or precision == "bf16"
    attention = planned_attention(model) if planned and not has_gpu else ""
    batches = batch_layout(config, attention)
    sizes = sizes_of_run(model, precision, batches, hf, modalities, reference=config.job == "dpo", planned=planned)
    known = has_gpu or not planned or model.memory_gb > 0
    memory = memory_to_fit(model.memory_gb, config.trainer.devices) if known else 0
    if model.recompute_granularity == "auto" and known:
        choice = choose(sizes, memory)
    else:
        choice = judge(sizes, configured(model), memory)
        if model.recompute_granularity == "auto":
            dry_run.notes.append(
                "model.recompute_granularity=auto: the choice depends on the GPU's memory, and this machine has no "
                "GPU. Give it with model.memory_gb, for example 80. The figures shown are without recomputation"
            )
    return Memory(choice, sizes.llama.attention, sizes.llama.on_cpu)


def weights_of_stages(model: ModelConfig, precision: str, hf: LlamaConfig) -> list[list[Weight]]:
    """Return the weights of the first rank of each pipeline stage, without their data.

    Args:
        precision: `trainer.precision`.
        hf: the Llama's configuration; the run's own source of it is ignored.

    Raises:
        ConfigError: sizes do not divide, or an encoder's shape is unknown.
        RuntimeError: this process is a rank of a job.
    """
    assumed, _ = assume_shapes(model)
    load_plugins(model.plugins)
    modalities = {name: build_modality(name, section) for name, section in assumed.modalities.items()}
    buildable = without_weights(assumed)
    check_model(buildable, precision, hf)
    return [
        [weight for chunk in chunks for weight in list_weights(chunk)]
        for chunks in _play_stages(buildable, precision, hf, modalities)
    ]


def _play_stages(
    model: ModelConfig, precision: str, hf: LlamaConfig, modalities: dict[str, Modality]
) -> Iterator[list[AnyMALModel]]:
    """Yield the model chunks of each stage's first rank, whose process groups exist until the next iteration."""
    for number in range(model.pipeline_model_parallel_size):
        with _as_rank_of_stage(number, model):
            with on_meta():
                chunks = assemble(model, precision, hf, modalities)
            yield chunks


def _llama_shape(section: LanguageModelConfig) -> LlamaConfig:
    if section.checkpoint:
        return LlamaConfig.from_dict(store.read_manifest(store.resolve(section.checkpoint)).llama)
    return read_llama_config(section)


@contextmanager
def _as_rank_of_stage(number: int, model: ModelConfig) -> Iterator[None]:
    """Simulate the first rank of a pipeline stage of one replica, without the other processes."""
    if dist.is_initialized():
        raise RuntimeError("A dry run simulates ranks itself and cannot be a rank of a job.")
    ranks = model.model_parallel_size
    first = number * (ranks // model.pipeline_model_parallel_size)
    dist.init_process_group("fake", store=FakeStore(), rank=first, world_size=ranks)
    try:
        make_groups(model, cpu_groups=False)
        # megatron-core initializes weights under a GPU RNG state; this tracker keeps none.
        initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
        yield
    finally:
        initialize_rng_tracker(force_reset=True)
        shutdown()


def _enter_stage(dry_run: DryRun, number: int, models: list[AnyMALModel]) -> None:
    """Add the sizes of a stage's model chunks, with the encoders that it holds for the first stage."""
    config, chunks = dry_run.config, []
    for model in models:
        weights = list_weights(model)
        local = [weight.parameter for weight in weights]
        decoder: Any = model.language_model.decoder
        media = [f"{name} {half}" for name in model.projectors for half in ("encoder", "projector")]
        chunks.append(
            ChunkSize(
                layers=tuple(layer.layer_number - 1 for layer in decoder.layers),
                besides=(*["embedding"] * model.pre_process, *media, *["head"] * model.post_process),
                parameters=sum(p.numel() for p in local),
                trainable=sum(p.numel() for p in local if p.requires_grad),
                weight_bytes=sum(_bytes_of(weight, config.model) for weight in weights),
            )
        )
        dry_run.weights.update({w.name: (math.prod(w.shape), w.parameter.requires_grad) for w in weights})
    if number and config.model.encoder_placement == "all_stages":
        chunks[0] = _with_encoders(chunks[0], dry_run.weights, backend.compute_dtype(config.trainer.precision))
    ranks = config.world_size // config.model.pipeline_model_parallel_size
    trainable = sum(chunk.trainable for chunk in chunks)
    sharers = config.data_parallel_size * config.model.context_parallel_size
    state = optimizer_bytes(backend.compute_dtype(config.trainer.precision).itemsize) * trainable
    if config.model.ddp.use_distributed_optimizer:
        state = -(-state // sharers)
    dry_run.stages.append(Stage(range(number * ranks, (number + 1) * ranks), tuple(chunks), 4 * trainable, state))


def _with_encoders(chunk: ChunkSize, weights: Mapping[str, tuple[int, bool]], dtype: torch.dtype) -> ChunkSize:
    """Add the encoders that a stage holds for the first one.

    Args:
        weights: those of the first stage by name: number of elements, and whether they train.
    """
    encoders = {name: count for name, (count, _) in weights.items() if name.startswith("encoders.")}
    names = dict.fromkeys(f"{name.split('.')[1]} encoder" for name in encoders)
    added = sum(encoders.values())
    return dataclasses.replace(
        chunk,
        besides=(*names, *chunk.besides),
        parameters=chunk.parameters + added,
        weight_bytes=chunk.weight_bytes + added * dtype.itemsize,
    )


def _bytes_of(weight: Weight, model: ModelConfig) -> int:
    """Bytes of a rank's shard of a weight."""
    parameter = weight.parameter
    in_layer = weight.name.startswith("language_model.decoder.layers.") and ".lora." not in weight.name
    size = parameter.element_size()
    return int(parameter.numel() * (matrix_bytes(model, size) if in_layer and parameter.dim() == 2 else size))


def _look_around(dry_run: DryRun, hf: LlamaConfig, modalities: dict[str, Modality]) -> None:
    """Check the existing tokenizer, weights and data, count samples, and list everything that is missing."""
    config = dry_run.config
    lm = config.model.language_model
    if lm.path and lm.load_weights:
        dry_run.missing += [("model.language_model.path", path) for path in _missing_weights(lm.path)]
    for name, section in config.model.modalities.items():
        encoder = section.encoder
        # The files in a plug-in encoder's folder are unknown here.
        if encoder.path and (encoder.type in ENCODERS or not Path(encoder.path).exists()):
            missing = _missing_weights(encoder.path, _PICKLED if encoder.type in ARCHITECTURES else ())
            dry_run.missing += [(f"model.modalities.{name}.encoder.path", path) for path in missing]
    if config.model.restore_from_path:
        if Path(config.model.restore_from_path).exists():
            store.resolve(config.model.restore_from_path)
        else:
            dry_run.missing.append(("model.restore_from_path", config.model.restore_from_path))
    tokenizer = None
    if Path(config.data.tokenizer).exists():
        tokenizer = Tokenizer(config.data.tokenizer)
        check_vocabulary(tokenizer, hf.vocab_size)
        check_codes(tokenizer, DiscreteVocabulary(hf.vocab_size, config.model.discrete))
        loaded_modalities(config.model.modalities, tokenizer, modalities)
    else:
        dry_run.missing.append(("data.tokenizer", config.data.tokenizer))
    for split in ("train", "validation"):
        _look_at_data(dry_run, split, tokenizer, modalities)


def _missing_weights(path: str, instead: Sequence[str] = ()) -> list[str]:
    """Return the folder if it is missing, or else the weight files missing from it.

    Args:
        instead: files any of which may replace the safetensors.
    """
    folder = Path(path)
    if not folder.exists():
        return [path]
    if any((folder / name).is_file() for name in instead):
        return []
    index = read_json(folder, "model.safetensors.index.json")
    names = sorted(set(index.get("weight_map", {}).values())) or ["model.safetensors"]
    return [str(folder / name) for name in names if not (folder / name).is_file()]


def _look_at_data(dry_run: DryRun, split: str, tokenizer: Tokenizer | None, modalities: dict[str, Modality]) -> None:
    configured, existing = getattr(dry_run.config.data, split), {}
    for name, dataset in configured.items():
        if is_remote(dataset.path):
            dry_run.notes.append(f"data.{split}.{name}.path={dataset.path} was not checked: it is not a local folder")
        elif Path(dataset.path).exists():
            existing[name] = dataset
        else:
            dry_run.missing.append((f"data.{split}.{name}.path", dataset.path))
    if tokenizer is None:
        indexes = [ShardIndex(dataset.path) for dataset in existing.values()]
    elif existing or (split == "train" and not configured):
        config = copy.deepcopy(dry_run.config)
        setattr(config.data, split, existing)
        if len(existing) < len(configured):
            # Some of its data are not here.
            config.data.schedule = []
        planner = build_data(config, _ALONE, tokenizer, modalities, split).planner
        indexes = planner.indexes
        if split == "train" and len(existing) == len(configured):
            dry_run.mixture = planner.stages
    else:
        return
    dry_run.samples.update({(split, name): len(index) for name, index in zip(existing, indexes)})
