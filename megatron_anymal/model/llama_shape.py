"""Shape of the Llama and which parallel sizes divide it; needs no torch."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig

from megatron_anymal.config import NF4_BLOCK, ConfigError, LanguageModelConfig, ModelConfig

_ROPE_TYPES = ("default", "llama3", "linear")


def read_llama_config(language_model: LanguageModelConfig) -> LlamaConfig:
    """Read the HuggingFace configuration of the Llama, from its folder or from the configured keys.

    Raises:
        ConfigError: the folder is missing or holds another architecture, or a value has the wrong type.
    """
    if language_model.path:
        where = str(Path(language_model.path) / "config.json")
        if not Path(where).is_file():
            raise ConfigError(f"model.language_model.path={language_model.path!r} has no config.json.")
        try:
            keys = json.loads(Path(where).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{where!r} is damaged ({error}). Download it again.") from None
        kind = keys.get("model_type") if isinstance(keys, dict) else None
        if kind != "llama":
            raise ConfigError(f"model.language_model.path={language_model.path!r} holds a {kind!r} model, not a Llama.")
    else:
        where, keys = "model.language_model.config", language_model.config
        known = set(LlamaConfig().to_dict()) | {"rope_theta"}
        for key in keys:
            if key not in known:
                raise ConfigError(f"model.language_model.config.{key} is not a key of a transformers LlamaConfig.")
    try:
        hf = LlamaConfig.from_pretrained(language_model.path) if language_model.path else LlamaConfig(**keys)
    except StrictDataclassError as error:
        raise ConfigError(f"{where!r}: {' '.join(str(error).split())}. Correct it.") from None
    _check_rope(hf, where)
    if hf.attention_bias or hf.mlp_bias or hf.hidden_act != "silu":
        raise ConfigError(
            "The Llama's configuration has biases or an activation other than silu; neither is supported."
        )
    return hf


def _check_rope(hf: LlamaConfig, where: str) -> None:
    rope = hf.rope_parameters.get("rope_type", "default")
    if rope not in _ROPE_TYPES:
        raise ConfigError(f"The Llama's RoPE type {rope!r} is not supported; supported are {', '.join(_ROPE_TYPES)}.")
    # transformers accepts any value and fails only when it computes with it.
    for key, value in hf.rope_parameters.items():
        if key not in ("rope_type", "type") and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ConfigError(f"{where!r}: {key} of the rotary embedding is {value!r}, not a number. Correct it.")


def check_sizes(model: ModelConfig, hf: LlamaConfig) -> None:
    """Reject parallel sizes that do not divide this Llama.

    Raises:
        ConfigError: naming the sizes that do not divide.
    """
    ranks = model.tensor_model_parallel_size
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(hf, name) % ranks:
            raise ConfigError(
                f"model.tensor_model_parallel_size={ranks} does not divide the Llama's {name}={getattr(hf, name)}."
            )
    if model.fp8 or model.fp4:
        _check_product_sizes(model, hf, ranks)
    if model.base_quantization:
        _check_nf4_sizes(hf, ranks)
    stages, chunks = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size
    for number, layers in enumerate(layers_of_stages(model, hf)):
        if layers % chunks:
            raise ConfigError(
                f"model.virtual_pipeline_model_parallel_size={chunks} does not divide the {layers} layers of pipeline "
                f"stage {number} of {stages}."
            )
        uniform = model.recompute_granularity == "full" and model.recompute_method == "uniform"
        if uniform and layers // chunks % model.recompute_num_layers:
            raise ConfigError(
                f"model.recompute_num_layers={model.recompute_num_layers} does not divide the {layers // chunks} "
                f"layers of a model chunk on pipeline stage {number}, as model.recompute_method=uniform requires. "
                "Change it, or set model.recompute_method=block."
            )


def _check_product_sizes(model: ModelConfig, hf: LlamaConfig, ranks: int) -> None:
    heads, groups, multiple = hf.num_attention_heads, hf.num_key_value_heads, model.product_multiple
    key, name_of_format = ("fp8", "FP8") if model.fp8 else ("fp4", "NVFP4")
    sizes = {
        "hidden_size": hf.hidden_size,
        "intermediate_size": hf.intermediate_size // ranks,
        "num_attention_heads x head_dim": heads * hf.head_dim // ranks,
        "(num_attention_heads + 2 x num_key_value_heads) x head_dim": (heads + 2 * groups) * hf.head_dim // ranks,
    }
    for name, size in sizes.items():
        if size % multiple:
            raise ConfigError(
                f"model.{key}: the Llama's {name} is {size} on each of {ranks} tensor-parallel rank(s), but "
                f"{name_of_format} matrix products need a multiple of {multiple}. Lower "
                f"model.tensor_model_parallel_size, or set model.{key}=''."
            )


def _check_nf4_sizes(hf: LlamaConfig, ranks: int) -> None:
    """Refuse rows that tensor parallelism would split within a block: their values would depend on the layout."""
    rows = {
        "hidden_size": hf.hidden_size,
        "num_attention_heads x head_dim": hf.num_attention_heads * hf.head_dim // ranks,
        "intermediate_size": hf.intermediate_size // ranks,
    }
    for name, size in rows.items():
        if size % NF4_BLOCK:
            raise ConfigError(
                f"model.base_quantization=nf4: the Llama's {name} is {size} on each of {ranks} tensor-parallel "
                f"rank(s), which is not a multiple of {NF4_BLOCK}, the elements that share a scale. Lower "
                "model.tensor_model_parallel_size, or set model.base_quantization=''."
            )


def layers_of_stages(model: ModelConfig, hf: LlamaConfig) -> list[int]:
    """Return the number of layers per pipeline stage.

    Raises:
        ConfigError: the layers do not divide.
    """
    stages = model.pipeline_model_parallel_size
    edges = [model.num_layers_in_first_pipeline_stage, model.num_layers_in_last_pipeline_stage]
    given, middle = sum(edges), stages - sum(1 for e in edges if e)
    left = hf.num_hidden_layers - given
    if left < middle or (left % middle if middle else left):
        raise ConfigError(
            f"model.pipeline_model_parallel_size={stages} does not divide the Llama's {hf.num_hidden_layers} layers"
            + (f" ({left} left for {middle} stage(s))" if given else "")
            + ". Set model.num_layers_in_first_pipeline_stage or num_layers_in_last_pipeline_stage."
        )
    even = left // middle if middle else 0
    return [edges[0] or even, *[even] * (stages - 2), edges[1] or even] if stages > 1 else [left]
