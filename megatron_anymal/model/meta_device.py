"""Build models without weight data, on torch's meta device."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_anymal.config import EncoderConfig, ModelConfig
from megatron_anymal.modalities.architecture import ARCHITECTURES, read_folder, transformers_config
from megatron_anymal.model.quantized_weights import leave_out_quantization

_META = torch.device("meta")


def without_weights(model: ModelConfig) -> ModelConfig:
    """Replace encoder folders by their shapes, and drop settings that need a GPU but do not affect shapes.

    Raises:
        ConfigError: a folder is incomplete or of the wrong kind.
    """
    model = copy.deepcopy(model)
    leave_out_quantization(model)
    model.transformer_impl = "local"
    for section in model.modalities.values():
        encoder = section.encoder
        shape = _encoder_shape(encoder) if encoder.path else {}
        if shape:
            encoder.path, encoder.config = "", shape
    return model


def _encoder_shape(encoder: EncoderConfig) -> dict[str, Any]:
    """Read the keys of an encoder's shape from its folder; empty for a plug-in's encoder."""
    if encoder.type in ARCHITECTURES:
        shape = transformers_config(encoder)
        keys = {key.name for key in dataclasses.fields(shape)}
        return {key: value for key, value in shape.to_diff_dict().items() if key in keys}
    if encoder.type == "imu2clip":
        return {key: value for key, value in read_folder(encoder, ("imu2clip",)).items() if key != "model_type"}
    return {}


@contextmanager
def on_meta() -> Iterator[None]:
    """Create all tensors on the meta device, without data or memory; use no CUDA device."""
    cuda: Any = torch.cuda
    real = cuda.current_device
    cuda.current_device = lambda: _META
    try:
        with _META, _ToMeta():
            yield
    finally:
        cuda.current_device = real


class _ToMeta(TorchFunctionMode):
    """Redirects tensors that are requested on another device to the meta device.

    Except for "cpu", which libraries that support the meta device request when they need actual values.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if isinstance(device, int) or (device is not None and torch.device(device).type != "cpu"):
            kwargs = {**kwargs, "device": _META}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.where and len(args) == 1 and args[0].is_meta:
            # CLAP looks for samples to fuse: there are none, because `is_longer` is all zeros.
            return tuple(torch.empty(0, dtype=torch.int64, device=_META) for _ in range(args[0].dim()))
        return func(*args, **kwargs)
