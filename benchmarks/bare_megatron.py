"""The floor of benchmarks/step.py and benchmarks/gpu: a step of megatron-core alone.

A GPTModel with the same configuration, layers, weights, documents, data-parallel wrapper and optimizer as one of this
trainer's runs, driven by megatron-core's own schedule on prepared tensors: packing descriptors are built beforehand,
and the loss is one sum. It has no media and no adapters; if the Llama is frozen, the output of the text embedding
requires a gradient, so that the same backward pass runs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_anymal import backend
from megatron_anymal.data.micro_batch import MicroBatch
from megatron_anymal.data.step_plan import StepPlan
from megatron_anymal.model.attention import document_pack
from megatron_anymal.model.llama import build_gpt, transformer_config
from megatron_anymal.train.build import TrainState
from megatron_anymal.train.optim import build_optimizer


@dataclass(frozen=True)
class ReadyMicroBatch:
    """A micro-batch as input of the bare model."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    pack: Any


@dataclass(frozen=True)
class ReadyBatch:
    """The micro-batches of a step."""

    targets: int
    padded_length: int
    micro_batches: list[ReadyMicroBatch]


class Bare:
    """megatron-core's model, wrapper and optimizer, with prepared batches."""

    def __init__(self, state: TrainState, batches: Sequence[tuple[StepPlan, list[MicroBatch]]]):
        """Take the Llama of a run (a copy of it if it trains or has adapters) and prepare its batches."""
        self.frozen = state.config.model.language_model.freeze
        self.gpt = state.models[0].language_model
        if not self.frozen or state.config.model.lora.r:
            model = state.config.model
            settings = transformer_config(model, state.config.trainer.precision, state.llama)
            weights = {n: w for n, w in self.gpt.state_dict().items() if ".lora." not in n}
            self.gpt = build_gpt(state.llama, settings, backend.transformer_impl(model))
            self.gpt.load_state_dict(weights)
            self.gpt.requires_grad_(not self.frozen)
        self.wrapped, self.optimizer = self._wrap(state)
        self.batches = [self._lay_out(state, plan, micro_batches) for plan, micro_batches in batches]

    def _wrap(self, state: TrainState) -> tuple[DistributedDataParallel, Any]:
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=state.config.model.ddp.use_distributed_optimizer,
        )
        # A copy: the run's own config holds the run's hooks for finishing a step.
        transformer: Any = copy.copy(self.gpt.config)
        wrapped = DistributedDataParallel(transformer, settings, self.gpt)
        config = state.config
        optimizer = build_optimizer(config.model.optim, config.model.ddp, config.trainer, [wrapped])
        transformer.grad_scale_func = optimizer.scale_loss
        # The loss is already divided by the number of targets.
        transformer.finalize_model_grads_func = lambda models, tokens=None, **more: finalize_model_grads(
            models, None, **more
        )
        return wrapped, optimizer

    def _lay_out(self, state: TrainState, plan: StepPlan, micro_batches: Sequence[MicroBatch]) -> ReadyBatch:
        device, config = state.layout.device, state.config
        kernel = backend.attention_kernel(config.model, config.trainer.precision)
        ready = [
            ReadyMicroBatch(
                m.tokens.to(device),
                m.labels.to(device),
                m.loss_mask.to(device),
                document_pack(m.document_lengths, device, self.gpt.inv_freq, kernel),
            )
            for m in micro_batches
        ]
        return ReadyBatch(int(plan.targets.sum()), plan.padded_length, ready)

    def step(self, number: int) -> None:
        """Train on one of the batches, which are used in turn."""
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._run(self.batches[number % len(self.batches)], forward_only=False)
        self.optimizer.step()

    @torch.no_grad()
    def forward(self, number: int) -> None:
        """Run only the forward pass."""
        self._run(self.batches[number % len(self.batches)], forward_only=True)

    def _run(self, batch: ReadyBatch, *, forward_only: bool) -> None:
        def forward(micro_batches: Iterator[ReadyMicroBatch], model: Any) -> tuple[Tensor, Any]:
            ready = next(micro_batches)
            embedded = None
            if self.frozen:
                embedded = self.gpt.embedding(input_ids=ready.tokens, position_ids=None).requires_grad_()
            losses = model(
                ready.tokens, None, None, decoder_input=embedded, labels=ready.labels, packed_seq_params=ready.pack
            )

            def loss_of(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
                loss = (losses * ready.loss_mask).sum() / batch.targets
                return loss, torch.zeros((), dtype=torch.int, device=losses.device), {"loss": loss.detach()}

            return losses, loss_of

        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(batch.micro_batches),
            model=self.wrapped,
            num_microbatches=len(batch.micro_batches),
            seq_length=batch.padded_length,
            micro_batch_size=1,
            forward_only=forward_only,
        )
