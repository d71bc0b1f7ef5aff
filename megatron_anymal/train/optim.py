"""AdamW and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

import megatron.core.optimizer as mcore_optimizer
import torch
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    clip_grads,
    distrib_optimizer,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import optimizer as mixed_precision
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from torch import Tensor, nn
from torch.optim.adamw import adamw

from megatron_anymal import backend
from megatron_anymal.config import DistributedDataParallelConfig, OptimConfig, TrainerConfig
from megatron_anymal.dependencies.megatron_line import match_parameter_groups


def learning_rate(optim: OptimConfig, max_steps: int, step: int) -> float:
    """Return the learning rate of step `step` (from 0): a pure function, so resuming needs no scheduler state.

    Linear warm-up over `warmup_steps` (its last step has the full rate), then the schedule down to
    `lr x min_lr_ratio` at `decay_steps`, or at `max_steps` if that is 0.
    """
    sched = optim.sched
    if step < sched.warmup_steps:
        return optim.lr * (step + 1) / sched.warmup_steps
    if sched.name == "constant":
        return optim.lr
    end = sched.decay_steps or max_steps
    done = min(1.0, (step - sched.warmup_steps) / max(1, end - sched.warmup_steps))
    left = 1.0 - done if sched.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return optim.lr * (sched.min_lr_ratio + (1.0 - sched.min_lr_ratio) * left)


def build_optimizer(
    optim: OptimConfig,
    ddp: DistributedDataParallelConfig,
    trainer: TrainerConfig,
    models: Sequence[nn.Module],
    alignments: Collection[str] = (),
) -> MegatronOptimizer:
    """Build megatron-core's optimizer over the trainable parameters of this rank's wrapped models.

    Args:
        trainer: for its precision and gradient clipping.
        alignments: names in `model.multiplex`. Each has parameter groups of its own, which the key "alignment" numbers.
    """
    # megatron-core takes the kernels of an installed Transformer Engine or apex, which need a GPU.
    if mcore_optimizer.USING_PYTORCH_OPTIMIZER or not torch.cuda.is_available():
        _use_torch()
    match_parameter_groups(*(["alignment"] if alignments else []))
    dtype = backend.compute_dtype(trainer.precision)
    settings = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        clip_grad=trainer.gradient_clip_val,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=ddp.use_distributed_optimizer,
        overlap_param_gather=ddp.overlap_param_gather,
    )
    return get_megatron_optimizer(settings, list(models), _overrides(settings, alignments) if alignments else None)


def _overrides(settings: OptimizerConfig, alignments: Collection[str]) -> dict[Any, Any]:
    """What megatron-core's parameter groups differ by: whether weights decay, and the alignment."""
    overrides: dict[Any, Any] = {**get_standard_config_overrides(settings)}
    for number, name in enumerate(alignments):
        middle = tuple(f".{part}.{name}." for part in ("encoders", "projectors"))
        key = ParamKey(with_name_predicate=ParamWithNamePredicate(name, partial(_is_within, middle)))
        overrides[key] = {"alignment": number}
    return overrides


def _is_within(middle: Sequence[str], parameter: Tensor, name: str) -> bool:
    return any(part in f".{name}" for part in middle)


def set_rates(optimizer: MegatronOptimizer, rate: float, weight_decay: float) -> None:
    """Set the learning rate and weight decay from now on.

    megatron-core puts biases and one-dimensional weights in groups of their own, to exempt them from weight decay, but
    leaves it to the caller to apply `wd_mult`.
    """
    for group in optimizer.param_groups:
        set_group_rate(group, rate, weight_decay)


def set_group_rate(group: dict[str, Any], rate: float, weight_decay: float) -> None:
    """Set the learning rate and weight decay of a parameter group; see `set_rates`."""
    group["lr"] = rate
    group["weight_decay"] = weight_decay * group["wd_mult"]


def components(optimizer: MegatronOptimizer) -> Iterator[Any]:
    """megatron-core's optimizers with parameters on this rank."""
    for component in getattr(optimizer, "chained_optimizers", [optimizer]):
        if component.optimizer is not None:
            yield component


def begin_state(optimizer: MegatronOptimizer) -> None:
    """Create the initial state of an optimizer that has not updated yet, so that it can be saved.

    The optimizer itself creates it with its first update, which may have been skipped.
    """
    for component in components(optimizer):
        inner = component.optimizer
        if inner.state:
            continue
        component.init_state_fn(inner, component.config)
        for group in inner.param_groups:
            group.setdefault("step", 0)


class AdamW(torch.optim.Optimizer):
    """torch's AdamW with the step count in the parameter group, where megatron-core's checkpoints look for it.

    Replaces the fused Adam of Transformer Engine or NVIDIA apex if neither is installed, or there is no GPU.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        **unused: Any,
    ):
        assert adam_w_mode, "only decoupled weight decay"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            done = group.get("step", 0)
            group["step"] = done + 1
            parameters = [p for p in group["params"] if p.grad is not None and p.numel()]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter.data)
                    self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter.data)
            if parameters:
                self._update(parameters, group, done)

    def _update(self, parameters: list[Tensor], group: dict[str, Any], done: int) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        steps = torch.full((len(parameters),), float(done), device=parameters[0].device)
        adamw(
            parameters,
            gradients,
            [self.state[p]["exp_avg"] for p in parameters],
            [self.state[p]["exp_avg_sq"] for p in parameters],
            [],
            list(steps.unbind()),
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _use_torch() -> None:
    """Make megatron-core use `AdamW`, `_norm` and `_scale` in place of kernels of Transformer Engine or apex.

    Its own substitutes loop over the parameters, and wait for the device once for each.
    """
    optimizer: Any = mcore_optimizer
    distributed: Any = distrib_optimizer
    clipping: Any = clip_grads
    copying: Any = mixed_precision
    optimizer.Adam = distributed.Adam = AdamW
    optimizer.USING_PYTORCH_OPTIMIZER = distributed.USING_TE_OPTIMIZER = False
    distributed.HAVE_APEX_OR_TE = distributed.USING_APEX_OPTIMIZER = True
    clipping.l2_norm_impl = _norm
    clipping.multi_tensor_scale_impl = copying.multi_tensor_scale_impl = _scale


def _norm(chunk_size: int, overflow: Tensor, tensors: list[list[Tensor]], per_tensor: bool) -> tuple[Tensor, None]:
    """Norm [1] of all tensors together, with the signature of apex's multi_tensor_l2norm."""
    return nn.utils.get_total_norm(tensors[0]).float().view(1), None


def _scale(chunk_size: int, overflow: Tensor, tensors: list[list[Tensor]], factor: float) -> None:
    """Scale tensors[0] into tensors[1], with the signature of apex's multi_tensor_scale."""
    sources, targets = tensors
    torch._foreach_copy_(targets, torch._foreach_mul(sources, factor))
