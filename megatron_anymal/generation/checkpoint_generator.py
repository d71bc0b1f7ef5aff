"""Generation from a training checkpoint.

The prompts of a batch are computed as one pack; after that, each pass has one new token per answer and reads the rest
from a key-value cache (model/key_value_cache.py), the same under tensor and pipeline parallelism. Exported folders use
transformers' cache (generation/export_generator.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_anymal.checkpoint import store
from megatron_anymal.checkpoint.frozen_base import load_base, resolve_language_model
from megatron_anymal.checkpoint.state import load_media_parts
from megatron_anymal.checkpoint.trust import config_of
from megatron_anymal.config import ModelConfig, RunConfig
from megatron_anymal.data.chat_format import END_TURN
from megatron_anymal.data.code_grammar import CodeGrammar
from megatron_anymal.data.codes import CodeLayout
from megatron_anymal.data.discrete_vocabulary import DiscreteVocabulary
from megatron_anymal.data.micro_batch import MediaBatch, MicroBatch
from megatron_anymal.data.planner import length_multiple
from megatron_anymal.data.prompt_encoder import PromptReader, TokenizedPrompt
from megatron_anymal.data.records import DataError
from megatron_anymal.data.tokenizer import Tokenizer
from megatron_anymal.generation.answers import Reply
from megatron_anymal.generation.candidates import candidate_batch
from megatron_anymal.generation.checkpoint_batch import CheckpointBatch
from megatron_anymal.generation.generator import Generator, Result, Watch
from megatron_anymal.generation.next_token import choose_each, observe_each
from megatron_anymal.generation.prompts import Prompt
from megatron_anymal.generation.read_ahead import ReadAhead
from megatron_anymal.generation.running_batch import RunningBatch, RunningPrompt
from megatron_anymal.generation.sampling import Sampling
from megatron_anymal.modalities import Modality
from megatron_anymal.model.anymal import AnyMALModel
from megatron_anymal.model.build import build_models
from megatron_anymal.model.key_value_cache import KeyValueCache
from megatron_anymal.model.quantized_weights import leave_out_quantization
from megatron_anymal.parallel import ParallelLayout, initialize
from megatron_anymal.train.build import build_inputs, check_vocabulary
from megatron_anymal.train.device_prefetch import to_device


class NativeGenerator(Generator):
    """Generates with a model of this trainer, without virtual pipeline chunks or context parallelism."""

    def __init__(
        self,
        section: ModelConfig,
        layout: ParallelLayout,
        tokenizer: Tokenizer,
        modalities: dict[str, Modality],
        model: AnyMALModel,
        max_positions: Optional[int] = None,
    ):
        """Wrap an existing model; it must be in evaluation mode during generation.

        Args:
            section: the section that `model` was built from.
            max_positions: longest prompt and answer together, in tokens; None: no limit.
        """
        self.layout, self.model = layout, model
        self.reports, self.max_positions = layout.reports, max_positions
        self.replica, self.replicas = layout.data_rank, layout.data_size
        self.leads_replica = layout.is_first_stage and layout.tensor_rank == 0
        self.kinds = [modality.kind or name for name, modality in section.modalities.items()]
        layout_of_codes = CodeLayout(DiscreteVocabulary(model.vocab_size, section.discrete), section.discrete)
        self.grammar = CodeGrammar(layout_of_codes) if section.discrete else None
        self._reader = PromptReader(tokenizer, section.modalities, modalities, layout_of_codes)
        self._ahead = ReadAhead(self._read)
        self._placeholders = {
            name: tokenizer.placeholder(modality.placeholder, f"model.modalities.{name}.placeholder")
            for name, modality in section.modalities.items()
        }
        # An answer in a conversation ends with the assistant's turn.
        self._ends = {tokenizer.end, tokenizer.hf.get_vocab().get(END_TURN, tokenizer.end)}
        self._end, self._decode = tokenizer.end, tokenizer.decode
        self._length_multiple = length_multiple(section)

    @classmethod
    def of_checkpoint(cls, config: RunConfig, layout: ParallelLayout, checkpoint: Optional[Path]) -> NativeGenerator:
        """Build the model; without a checkpoint its projectors keep their initial values.

        Raises:
            CheckpointError: the checkpoint, or the one that the Llama comes from, is missing, damaged or does not fit.
            ConfigError: a folder, key or size cannot be used.
            DataError: the tokenizer cannot be used or does not fit the Llama.
        """
        llama, hf = resolve_language_model(config.model.language_model)
        section, precision = replace(config.model, language_model=llama), config.trainer.precision
        tokenizer, modalities = build_inputs(section, config.data)
        check_vocabulary(tokenizer, hf.vocab_size)
        load = partial(load_base, llama.checkpoint)
        [model] = build_models(section, precision, hf, layout, modalities, load)
        if checkpoint is not None:
            load_media_parts([model], checkpoint)
        model.eval().requires_grad_(False)
        return cls(section, layout, tokenizer, modalities, model, hf.max_position_embeddings)

    @classmethod
    def of_run(
        cls,
        path: str,
        tensor_size: Optional[int] = None,
        stages: int = 1,
        *,
        untrained: bool = False,
        trust_plugins: bool = False,
        replicated: bool = False,
    ) -> NativeGenerator:
        """Load the model of a checkpoint or of a run's newest one, spread over all started processes.

        Args:
            tensor_size: tensor-parallel size; None: number of processes / `stages`.
            stages: pipeline-parallel size.
            untrained: keep the projectors' initial values.
            trust_plugins: import the plug-ins that the checkpoint names.
            replicated: let the processes beyond `tensor_size` x `stages` hold further copies of the model.

        Raises:
            CheckpointError, ConfigError: there is no such checkpoint, its plug-ins are not trusted, or the layout does
                not fit it.
            DataError: the parallel sizes do not make the number of started processes.
        """
        folder = store.resolve(path)
        manifest = store.read_manifest(folder, verify=True)
        config = config_of(manifest, folder, trust_plugins=trust_plugins)
        world = int(os.environ.get("WORLD_SIZE", "1"))
        config.trainer.num_nodes, config.trainer.devices = 1, world
        config.model.pipeline_model_parallel_size = stages
        config.model.tensor_model_parallel_size = tensor_size or max(1, world // stages)
        config.model.sequence_parallel = False
        leave_out_quantization(config.model)
        config.model.num_layers_in_first_pipeline_stage = config.model.num_layers_in_last_pipeline_stage = 0
        config.model.context_parallel_size = config.model.virtual_pipeline_model_parallel_size = 1
        model_size = config.model.tensor_model_parallel_size * stages
        if world % model_size and replicated:
            raise DataError(
                f"{world} process(es) were started, but each copy of the model takes {model_size} (tensor- x "
                f"pipeline-parallel size). Start a multiple of {model_size}."
            )
        if model_size != world and not replicated:
            raise DataError(
                f"{world} process(es) were started, but the tensor- and pipeline-parallel sizes make "
                f"{model_size}. Their product must be the number of processes."
            )
        return cls.of_checkpoint(config, initialize(config), None if untrained else folder)

    def on_leader(self, compute: Callable[[], Result]) -> Result:
        """The result of `compute` on the process that leads this copy of the model. Collective over its processes."""
        group = parallel_state.get_model_parallel_group()
        if dist.get_world_size(group) == 1:
            return compute()
        outcome: list[Any] = [None, None]
        if self.leads_replica:
            try:
                outcome = [compute(), None]
            # The other processes wait for the outcome.
            except Exception as error:
                outcome = [None, error]
        # The first stage's first tensor-parallel rank is the group's first.
        dist.broadcast_object_list(outcome, dist.get_process_group_ranks(group)[0], group, self.layout.device)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    @torch.no_grad()
    def _answer(
        self, prompts: Sequence[Prompt], numbers: Sequence[int], sampling: Sampling, watch: Watch
    ) -> list[Reply]:
        everyone = [self._open(number, prompt, sampling) for number, prompt in zip(numbers, prompts)]
        running, cache = everyone, KeyValueCache(len(everyone))
        while running:
            for one, token in zip(running, self._next_tokens(running, cache)):
                one.answer.add(token)
                watch(one.answer)
            left = [row for row, one in enumerate(running) if not one.answer.done]
            if left and len(left) < len(running):
                cache.keep(left)
            running = [running[row] for row in left]
        return [one.answer.reply for one in everyone]

    @torch.no_grad()
    def _log_likelihoods(self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
        asked = [self._reader.read_answered(p.parts, p.media, texts) for p, texts in zip(prompts, candidates)]
        documents = [document for several, _ in asked for document in several]
        for number, document in enumerate(documents):
            self._room(number, len(document.tokens) - 1, Sampling())
        micro_batch = candidate_batch(asked, self._placeholders, self._end, self._length_multiple)
        micro_batch = to_device(micro_batch, self.layout.device)
        soft = self.model.soft_tokens(micro_batch) if self.layout.is_first_stage else {}

        def forward_step(batches: Iterator[MicroBatch], model: AnyMALModel) -> tuple[Tensor, Any]:
            batch = next(batches)
            return model(batch, labels=batch.labels, soft=soft), lambda losses, non_loss_data: losses[0]

        outputs = self._run(forward_step, micro_batch)
        scores = torch.zeros(len(documents), dtype=torch.float64, device=self.layout.device)
        if self.layout.is_last_stage:
            own = outputs[0].double()[: sum(len(document.tokens) for document in documents)]
            scores.copy_(-torch.stack([part.sum() for part in own.split([len(d.tokens) for d in documents])]))
        self._share(scores)
        values = iter(scores.tolist())
        return [[next(values) for _ in texts] for texts in candidates]

    def running_batch(self) -> RunningBatch:
        """Start an empty batch that prompts can join and leave; for one process."""
        return CheckpointBatch(partial(self._open, 0), self._next_tokens)

    def read_in_processes(self, count: int) -> None:
        """Use this many processes for `read_ahead`."""
        self._ahead.processes = count

    def read_ahead(self, batches: Sequence[Sequence[Prompt]]) -> None:
        """Begin to read the media of prompts that `answer_batch` gets next, in other processes."""
        self._ahead.announce([[prompt] for batch in batches for prompt in batch])

    def _read(self, prompts: Sequence[Prompt]) -> TokenizedPrompt:
        [prompt] = prompts
        return self._reader.read(prompt.parts, prompt.media)

    def _open(self, number: int, prompt: Prompt, sampling: Sampling) -> RunningPrompt:
        read = self._ahead.take([prompt])
        answer = self._open_answer(number, len(read.tokens), sampling, self._decode, self._ends)
        return RunningPrompt(read.tokens, read.pieces, answer, sampling)

    def _next_tokens(self, running: Sequence[RunningPrompt], cache: KeyValueCache) -> list[int]:
        micro_batch = to_device(self._batch(running, cache), self.layout.device)
        # Later pipeline stages get their input from the previous stage.
        soft = self.model.soft_tokens(micro_batch) if self.layout.is_first_stage else {}

        def forward_step(batches: Iterator[MicroBatch], model: AnyMALModel) -> tuple[Tensor, Any]:
            return model(next(batches), soft=soft, cache=cache), lambda logits, non_loss_data: logits[0]

        outputs = self._run(forward_step, micro_batch)
        # The likeliest tokens and the chosen ones.
        both = torch.zeros(2, len(running), dtype=torch.int64, device=self.layout.device)
        if self.layout.is_last_stage:
            logits = self.model.whole_logits(outputs[0].float())
            # A placeholder stands for a media item; in an answer it would have no content.
            logits[:, list(self._placeholders.values())] = float("-inf")
            if self.grammar:
                both[0] = logits.argmax(-1)
            both[1] = torch.tensor(choose_each(logits, running))
        self._share(both)
        if self.grammar:
            observe_each(both[0], running)
        chosen: list[int] = both[1].tolist()
        return chosen

    def _run(self, forward_step: Callable[..., Any], micro_batch: MicroBatch) -> list[Tensor]:
        """Run a forward pass over all stages; the last one returns what `forward_step` collects."""
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([micro_batch]),
            model=self.model,
            num_microbatches=1,
            seq_length=micro_batch.tokens.size(1),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )

    @staticmethod
    def _share(values: Tensor) -> None:
        """Overwrite `values` on all stages with those of the last one."""
        last_stage = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(values, src=last_stage, group=parallel_state.get_pipeline_model_parallel_group())

    def _batch(self, running: Sequence[RunningPrompt], cache: KeyValueCache) -> MicroBatch:
        """The prompts, or then the newest token of each answer, padded to a length that sequence parallelism can
        divide."""
        documents = [one.tokens if cache.is_empty else one.tokens[-1:] for one in running]
        if missing := -sum(map(len, documents)) % self._length_multiple:
            documents.append([self._end] * missing)
        return MicroBatch.unlabelled(documents, self._media(running) if cache.is_empty else {})

    def _media(self, running: Sequence[RunningPrompt]) -> dict[str, MediaBatch]:
        """The prompts' media, with the positions of their soft tokens."""
        tokens = torch.tensor([token for one in running for token in one.prompt])
        media = {}
        for name, placeholder in self._placeholders.items():
            pieces = [tensor for one in running for other, tensor in one.pieces if other == name]
            if pieces:
                together, index = torch.cat(pieces), (tokens == placeholder).nonzero().flatten()
                media[name] = MediaBatch(together, ((len(together),),), index)
        return media
