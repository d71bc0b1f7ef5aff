"""Baseline: the same work in HuggingFace transformers, as its users would run it.

LlamaForCausalLM with its own loss, peft's LoRA, the same encoder (this trainer uses transformers' encoder), the
resampler in plain torch, torch's fused AdamW. Weights are copied from this trainer; frozen ones share its memory if
their layout allows. Attention is flash-attn for packed documents, torch's flex attention if flash-attn is not
installed, and scaled dot-product attention with a mask on CPUs. Autograd skips gradients that are not required, and
trained parameters exist in the compute dtype only, which is cheaper than this trainer's fp32 main weights.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from measuring import storages
from torch import Tensor, nn
from transformers_side import IGNORED, frozen_llama, with_adapters

from megatron_anymal.data.micro_batch import MicroBatch
from megatron_anymal.data.step_plan import StepPlan
from megatron_anymal.hf.projectors import build_projector
from megatron_anymal.train.build import TrainState
from megatron_anymal.train.device_prefetch import to_device

Batches = Sequence[tuple[StepPlan, list[MicroBatch]]]
POLICY, REFERENCE = "default", "reference"


class PlainMedia:
    """Encoder and projector alone: forward and, if the projector trains, backward and optimizer step."""

    def __init__(self, state: TrainState, weights: Mapping[str, Tensor], batches: Batches):
        """
        Args:
            weights: values of the run's projector and adapters, by full name.
        """
        self.config, self.batches, self.device = state.config, batches, state.layout.device
        section = state.config.model.modalities["image"].projector
        self.encoder: Any = state.models[0].encoders["image"]
        dtype = self.encoder.dtype
        self.projector = build_projector(
            section, self.encoder.feature_tokens, self.encoder.width, state.llama.hidden_size
        ).to(self.device, dtype)
        self.projector.load_state_dict(
            {n.removeprefix("projectors.image."): w for n, w in weights.items() if n.startswith("projectors.")}
        )
        self.projector.requires_grad_(not section.freeze)
        self._prepare()

    def modules(self) -> list[nn.Module]:
        """The modules of this side."""
        return [self.encoder, self.projector]

    def _prepare(self) -> None:
        self.trained = [p for module in self.modules() for p in module.parameters() if p.requires_grad]
        self.optimizer: Optional[torch.optim.Optimizer] = None
        if self.trained:
            optim = self.config.model.optim
            self.optimizer = torch.optim.AdamW(
                self.trained, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), weight_decay=0.0, fused=True
            )

    def step(self, number: int) -> tuple[Tensor, Tensor]:
        """Train on one of the batches, used in turn; return the loss and the gradient norm before clipping."""
        plan, micro_batches = self.batches[number % len(self.batches)]
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for micro_batch in micro_batches:
            loss = self.loss(plan, to_device(micro_batch, self.device))
            if self.optimizer is not None:
                loss.backward()
            total += loss.detach()
        norm = torch.zeros(())
        if self.optimizer is not None:
            norm = nn.utils.clip_grad_norm_(self.trained, self.config.trainer.gradient_clip_val)
            self.optimizer.step()
        return total, norm

    def loss(self, plan: StepPlan, micro_batch: MicroBatch) -> Tensor:
        """A scalar to run the backward pass from."""
        return self.soft_tokens(micro_batch).float().mean()

    def soft_tokens(self, micro_batch: MicroBatch) -> Tensor:
        """Soft tokens [positions, hidden size] in the order of the placeholders."""
        media = micro_batch.media["image"]
        with torch.no_grad():
            features = self.encoder(media.pieces)
        soft = self.projector(features).flatten(0, 1)
        return soft if media.soft_index is None else soft[media.soft_index]

    def stored(self) -> int:
        """Bytes held between two steps, including shared weights."""
        parameters = [p for module in self.modules() for p in module.parameters()]
        gradients = [p.grad for p in parameters if p.grad is not None]
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        moments = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return sum(storages([*parameters, *gradients, *moments]).values())


class HuggingFace(PlainMedia):
    """A training step of the run with transformers."""

    def __init__(
        self,
        state: TrainState,
        weights: Mapping[str, Tensor],
        reference: Mapping[str, Tensor],
        batches: Batches,
        *,
        checkpointing: bool,
    ):
        """
        Args:
            weights: see PlainMedia.
            reference: values of DPO's reference adapters.
            checkpointing: keep one activation per layer and recompute the others.

        Raises:
            ModuleNotFoundError: peft is needed but not installed.
        """
        self.attention = _attention(state.layout.device)
        self.llama: Any = frozen_llama(state, self.attention)
        if checkpointing:
            self.llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if state.config.model.lora.r:
            values = {POLICY: weights, **({REFERENCE: reference} if reference else {})}
            self.llama = with_adapters(self.llama, state.config.model.lora, values)
        self.llama.train()
        super().__init__(state, weights, batches)

    def modules(self) -> list[nn.Module]:
        """The modules of this side."""
        return [*super().modules(), self.llama]

    def loss(self, plan: StepPlan, micro_batch: MicroBatch) -> Tensor:
        """Contribution of a micro-batch to the batch's mean loss."""
        inputs = self._inputs(micro_batch)
        labels = micro_batch.labels.masked_fill(micro_batch.loss_mask == 0, IGNORED)
        if self.config.job == "dpo":
            return self._preferences(plan, micro_batch, inputs, labels)
        output = self.llama(
            **inputs, labels=labels, shift_labels=labels, num_items_in_batch=int(plan.targets.sum()), use_cache=False
        )
        return output.loss

    def _inputs(self, micro_batch: MicroBatch) -> dict[str, Any]:
        """Embeddings with soft tokens inserted, position ids, and document boundaries."""
        embedded = self.llama.get_input_embeddings()(micro_batch.tokens)
        soft = self.soft_tokens(micro_batch).to(embedded.dtype)
        is_placeholder = torch.zeros_like(micro_batch.tokens, dtype=torch.bool)
        is_placeholder[0, micro_batch.media["image"].token_index] = True
        embedded = embedded.masked_scatter(is_placeholder.unsqueeze(-1), soft)
        lengths = micro_batch.document_lengths
        positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0).to(self.device)
        inputs: dict[str, Any] = {"inputs_embeds": embedded, "position_ids": positions}
        if self.attention == "flash_attention_2":
            # Pass the boundaries, so that layers need not derive them from the positions.
            borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(self.device)
            inputs |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
            inputs |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        return inputs

    def _preferences(
        self, plan: StepPlan, micro_batch: MicroBatch, inputs: Mapping[str, Any], labels: Tensor
    ) -> Tensor:
        """Conservative DPO loss (Mitchell 2023), as in trl."""
        with torch.no_grad():
            self.llama.set_adapter(REFERENCE)
            reference = self._answers(micro_batch, inputs, labels)
        self.llama.set_adapter(POLICY)
        change = self._answers(micro_batch, inputs, labels) - reference
        dpo = self.config.model.dpo
        scaled = dpo.beta * (change[:, 0] - change[:, 1])
        eps = dpo.label_smoothing
        losses = -(1 - eps) * F.logsigmoid(scaled) - eps * F.logsigmoid(-scaled)
        return losses.sum() / int((plan.targets > 0).sum())

    def _answers(self, micro_batch: MicroBatch, inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
        """Log-probabilities of the chosen and the rejected answers, [pairs, 2]."""
        logits = self.llama(**inputs, use_cache=False).logits[0].float()
        losses = F.cross_entropy(logits, labels[0], ignore_index=IGNORED, reduction="none")
        pair_positions = [sample.position for sample in micro_batch.plan.samples]
        number = torch.zeros(max(pair_positions) + 1, dtype=torch.int64, device=self.device)
        number[pair_positions] = torch.arange(len(pair_positions), device=self.device)
        assert micro_batch.branch is not None
        owners, branch = micro_batch.sample_positions[0], micro_batch.branch[0]
        documents = (2 * number[owners.clamp(min=0)] + branch.clamp(min=0)).where(owners >= 0, 0)
        # Padding has no labels and thus no loss, so it does not matter which document it is added to.
        return -torch.zeros(2 * len(pair_positions), device=self.device).index_add(0, documents, losses).view(-1, 2)


def _attention(device: torch.device) -> str:
    if device.type != "cuda":
        return "sdpa"
    return "flash_attention_2" if importlib.util.find_spec("flash_attn") else "flex_attention"
