"""Configuration of an exported model: the Llama's configuration, and one section per modality."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Optional, Union

from transformers import LlamaConfig, PretrainedConfig

from megatron_anymal.config import DiscreteConfig, EncoderConfig, ModalityConfig, ProjectorConfig
from megatron_anymal.data.codes import CodeLayout
from megatron_anymal.discrete_vocabulary import DiscreteVocabulary

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class AnyMALConfig(PretrainedConfig):
    """Configuration of an AnyMAL model.

    Args:
        text_config: configuration of the Llama.
        modalities: name -> section. A section holds the kind of media, the encoder (type, config, preprocessor,
            max_pieces_per_call), the projector (type and sizes), options, the placeholder token and its id.
        discrete: media as codes of the Llama's vocabulary: `base_size`, the first id after the Llama's own, and
            `sections`, name -> section of model.discrete; empty if there are none.
        kwargs: see PretrainedConfig; ids of special tokens default to the Llama's.
    """

    model_type = "anymal"
    sub_configs = {"text_config": LlamaConfig}  # noqa: RUF012  (transformers declares it)

    def __init__(
        self,
        text_config: Optional[Union[LlamaConfig, Mapping[str, Any]]] = None,
        modalities: Optional[Mapping[str, Mapping[str, Any]]] = None,
        discrete: Optional[Mapping[str, Any]] = None,
        **kwargs: Any,
    ):
        llama = text_config if isinstance(text_config, LlamaConfig) else LlamaConfig(**_of_version(text_config or {}))
        self.text_config = llama
        self.modalities = {name: dict(section) for name, section in (modalities or {}).items()}
        self.discrete = dict(discrete or {})
        kwargs = {**{name: getattr(llama, name) for name in _TOKENS}, **kwargs}
        super().__init__(**{**kwargs, "tie_word_embeddings": llama.tie_word_embeddings})

    @property
    def vocab_size(self) -> int:
        """Vocabulary size of the Llama."""
        return self.text_config.vocab_size

    def to_dict(self) -> dict[str, Any]:
        """Serialize the configuration, with the rotary embedding under the key names of transformers 4 and 5."""
        out = super().to_dict()
        # For transformers 4, which ignores `rope_parameters`; transformers 5 reads these keys as well.
        rope = dict(out["text_config"].get("rope_parameters") or {})
        if rope:
            out["text_config"]["rope_theta"] = rope.pop("rope_theta")
            out["text_config"]["rope_scaling"] = None if rope.get("rope_type") == "default" else rope
        return out


def _of_version(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a Llama's keys for the installed transformers: 4 lacks `rope_parameters`, 5 needs only them."""
    keys = dict(keys)
    if keys.get("rope_parameters"):
        keys.pop("rope_scaling", None)
        theta = keys.pop("rope_theta", None)
        if "rope_parameters" not in inspect.signature(LlamaConfig.__init__).parameters:
            rope = dict(keys.pop("rope_parameters"))
            keys["rope_theta"] = rope.pop("rope_theta", theta)
            keys["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    return keys


def code_layout(discrete: Mapping[str, Any]) -> CodeLayout:
    """Ids of media as codes, from `discrete` of a configuration or processor."""
    sections = {name: DiscreteConfig(**section) for name, section in discrete.get("sections", {}).items()}
    return CodeLayout(DiscreteVocabulary(discrete.get("base_size", 0), sections), sections)


def modality_config(section: Mapping[str, Any]) -> ModalityConfig:
    """Convert a section to the trainer's dataclass, with the encoder's shape and preprocessing instead of a path."""
    return ModalityConfig(
        kind=section["kind"],
        encoder=EncoderConfig(**section["encoder"]),
        projector=ProjectorConfig(**section["projector"]),
        options=dict(section["options"]),
        placeholder=section["placeholder"],
    )
