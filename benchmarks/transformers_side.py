"""The floor of benchmarks/step_vs_transformers.py: the same step as users of transformers write it.

LlamaForCausalLM with its own loss and scaled dot-product attention, the projectors in plain torch, peft's adapters,
torch's fused AdamW. A micro-batch's documents are laid out in one of these ways, prepared beforehand:

packed: as in this trainer's pack, with position ids from which transformers derives the document-wise causal mask
rows: one document per row, padded on the right to the longest, where causal attention needs no mask
... with kept logits: the same, with logits only at the positions with a label (`logits_to_keep` of transformers 5,
    which its Trainer does not use)

Frozen weights and the encoders, which are transformers' and torch's own modules, are shared with this trainer's side;
the projectors start from copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_anymal.config import LoraConfig
from megatron_anymal.data.micro_batch import MicroBatch
from megatron_anymal.data.step_plan import StepPlan
from megatron_anymal.hf.projectors import build_projector
from megatron_anymal.model.hf_llama import to_hf
from megatron_anymal.model.quantized_weights import unquantized
from megatron_anymal.model.unsharded_weights import list_weights
from megatron_anymal.train.build import TrainState
from megatron_anymal.train.optim import learning_rate

# Label that transformers' loss ignores.
IGNORED = -100
# Projection with an adapter -> its HuggingFace module within a layer.
_HF_PATHS = {
    **{name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
}
# peft's name of an adapter that is not given one.
ADAPTER = "default"


def frozen_llama(state: TrainState, attention: str) -> Any:
    """transformers' Llama over a run's frozen weights.

    Args:
        attention: transformers' name of the attention implementation.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(
            state.llama, attn_implementation=attention, dtype=state.models[0].config.params_dtype
        )
    tensors = {}
    for weight in list_weights(state.models[0]):
        if weight.name.startswith("language_model.") and ".lora." not in weight.name:
            tensors |= to_hf(weight.name, state.llama, unquantized(weight.parameter.detach()))
    model.load_state_dict(tensors, assign=True)
    # The rotary frequencies are computed, not stored.
    model.model.rotary_emb = LlamaRotaryEmbedding(config=state.llama).to(state.layout.device)
    return model.requires_grad_(False)


def with_adapters(llama: Any, lora: LoraConfig, adapters: Mapping[str, Mapping[str, Tensor]]) -> Any:
    """Add peft's adapters to all linear layers.

    Args:
        adapters: name of an adapter -> values of a run's weights, by full name; the first one is trained.

    Raises:
        ModuleNotFoundError: peft is not installed.
    """
    from peft import LoraConfig as Settings
    from peft import get_peft_model

    settings = Settings(r=lora.r, lora_alpha=lora.alpha, target_modules=list(_HF_PATHS), task_type="CAUSAL_LM")
    first, *others = adapters
    model = get_peft_model(llama, settings, adapter_name=first, autocast_adapter_dtype=False)
    for adapter in others:
        model.add_adapter(adapter, settings, autocast_adapter_dtype=False)
    for adapter, values in adapters.items():
        for name, value in values.items():
            if ".lora." in name:
                with torch.no_grad():
                    model.get_parameter(peft_name(name, adapter)).copy_(value)
    model.set_adapter(first)
    return model


def peft_name(name: str, adapter: str) -> str:
    """peft's name of an adapter's weight."""
    _, _, rest = name.partition(".layers.")
    layer, projection, part = rest.split(".")[0], *name.split(".")[-2:]
    return f"base_model.model.model.layers.{layer}.{_HF_PATHS[projection]}.lora_{part}.{adapter}.weight"


@dataclass(frozen=True)
class Inputs:
    """A micro-batch as input of transformers' Llama; B rows of L tokens."""

    # [B, L] int64 with placeholders.
    tokens: Tensor
    # [B, L] int64: the next token or IGNORED; [labels] with kept logits.
    labels: Tensor
    # [B, L] int64; None: every row is one document.
    position_ids: Tensor | None
    # By modality: encoder inputs, and [B, L, 1] where the soft tokens go.
    pieces: Mapping[str, Tensor]
    is_placeholder: Mapping[str, Tensor]
    # [B, L] bool: positions whose logits are computed; None: all of them.
    keep: Tensor | None = None


def packed(micro_batch: MicroBatch) -> Inputs:
    """Lay a micro-batch out as one row."""
    positions = torch.cat([torch.arange(length) for length in micro_batch.document_lengths])[None]
    return _inputs(micro_batch, lambda values, fill: values[None], positions)


def rows(micro_batch: MicroBatch) -> Inputs:
    """Lay a micro-batch out with one document per row."""

    def pad(values: Tensor, fill: int) -> Tensor:
        return pad_sequence(values.split(micro_batch.document_lengths), batch_first=True, padding_value=fill)

    return _inputs(micro_batch, pad, None)


def packed_with_kept_logits(micro_batch: MicroBatch) -> Inputs:
    """Lay a micro-batch out as one row; compute logits only at the positions with a label."""
    return _with_kept_logits(packed(micro_batch))


def rows_with_kept_logits(micro_batch: MicroBatch) -> Inputs:
    """Lay a micro-batch out with one document per row; compute logits only at the positions with a label."""
    return _with_kept_logits(rows(micro_batch))


def _with_kept_logits(inputs: Inputs) -> Inputs:
    keep = inputs.labels != IGNORED
    return replace(inputs, labels=inputs.labels[keep], keep=keep)


def _inputs(micro_batch: MicroBatch, lay_out: Callable[[Tensor, int], Tensor], position_ids: Tensor | None) -> Inputs:
    positions = {}
    for name, media in micro_batch.media.items():
        flags = torch.zeros(micro_batch.tokens.size(1), dtype=torch.bool)
        flags[media.token_index] = True
        positions[name] = lay_out(flags, 0)[:, :, None]
    labels = micro_batch.labels.masked_fill(micro_batch.loss_mask == 0, IGNORED)
    return Inputs(
        lay_out(micro_batch.tokens[0], 0),
        lay_out(labels[0], IGNORED),
        position_ids,
        {name: media.pieces for name, media in micro_batch.media.items()},
        positions,
    )


class Transformers:
    """A training step of an alignment or SFT run on one process, with a frozen Llama and every encoder frozen."""

    def __init__(
        self,
        state: TrainState,
        batches: Sequence[tuple[StepPlan, list[MicroBatch]]],
        lay_out: Callable[[MicroBatch], Inputs],
    ):
        """
        Args:
            batches: batches to use in turn.
            lay_out: `packed` or `rows`.
        """
        self.config, self.done = state.config, state.step
        self.batches = [(int(plan.targets.sum()), [lay_out(m) for m in micros]) for plan, micros in batches]
        self.encoders: Any = state.models[0].encoders
        self.llama = frozen_llama(state, "sdpa").train()
        self.projectors = nn.ModuleDict(
            {
                name: build_projector(
                    section.projector,
                    self.encoders[name].feature_tokens,
                    self.encoders[name].width,
                    state.llama.hidden_size,
                )
                for name, section in state.config.model.modalities.items()
            }
        )
        weights = {w.name: w.parameter.detach().clone() for w in list_weights(state.models[0])}
        self.projectors.load_state_dict(
            {n.removeprefix("projectors."): w for n, w in weights.items() if n.startswith("projectors.")}
        )
        if state.config.model.lora.r:
            self.llama = with_adapters(self.llama, state.config.model.lora, {ADAPTER: weights})
        # By our names.
        self.trained = {w.name: self._own(w.name) for w in list_weights(state.models[0]) if w.parameter.requires_grad}
        self.optimizer = self._optimizer()

    def _own(self, name: str) -> nn.Parameter:
        """This side's parameter of one of our names."""
        if ".lora." in name:
            return self.llama.get_parameter(peft_name(name, ADAPTER))
        return self.projectors.get_parameter(name.removeprefix("projectors."))

    def _optimizer(self) -> torch.optim.Optimizer:
        optim = self.config.model.optim
        matrices = [p for p in self.trained.values() if p.dim() > 1]
        others = [p for p in self.trained.values() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps, fused=True)

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the last step, by our names; 0 for weights that its samples did not reach."""
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self.trained.items()}

    def step(self, number: int) -> float:
        """Train on one of the batches; return the mean loss over its target tokens."""
        targets, micro_batches = self.batches[number % len(self.batches)]
        self.optimizer.zero_grad()
        total = torch.zeros(())
        for inputs in micro_batches:
            loss = self._loss(inputs, targets)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.trained.values(), self.config.trainer.gradient_clip_val)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.model.optim, self.config.trainer.max_steps, self.done)
        self.optimizer.step()
        self.done += 1
        return float(total)

    def _loss(self, inputs: Inputs, targets: int) -> Tensor:
        """Contribution of a micro-batch to the mean over the batch's target tokens."""
        return self.llama(
            inputs_embeds=self._embed(inputs),
            position_ids=inputs.position_ids,
            labels=inputs.labels,
            shift_labels=inputs.labels,
            num_items_in_batch=targets,
            logits_to_keep=0 if inputs.keep is None else inputs.keep,
            use_cache=False,
        ).loss

    def _embed(self, inputs: Inputs) -> Tensor:
        """[B, L, H]: text embeddings with soft tokens in place of the placeholders."""
        embedded = self.llama.get_input_embeddings()(inputs.tokens)
        for name, pieces in inputs.pieces.items():
            with torch.no_grad():
                features = self.encoders[name](pieces)
            soft = self.projectors[name](features).flatten(0, 1)
            embedded = embedded.masked_scatter(inputs.is_placeholder[name], soft)
        return embedded
