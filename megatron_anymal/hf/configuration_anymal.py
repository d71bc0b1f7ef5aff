"""An exported model's configuration: the Llama's, and a section for each modality."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Optional, Union

from transformers import LlamaConfig, PretrainedConfig

from megatron_anymal.config import EncoderConfig, ModalityConfig, ProjectorConfig

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class AnyMALConfig(PretrainedConfig):
    """Configuration of an AnyMAL model.

    Args:
        text_config: the Llama's.
        modalities: name -> section. A section says the kind of media, the encoder (type, config, preprocessor,
            max_pieces_per_call), the projector (type and sizes), options, the placeholder token and its id.
        kwargs: as of every configuration; ids of special tokens that are not given are the Llama's.
    """

    model_type = "anymal"
    sub_configs = {"text_config": LlamaConfig}  # noqa: RUF012  (transformers declares it)

    def __init__(
        self,
        text_config: Optional[Union[LlamaConfig, Mapping[str, Any]]] = None,
        modalities: Optional[Mapping[str, Mapping[str, Any]]] = None,
        **kwargs: Any,
    ):
        llama = text_config if isinstance(text_config, LlamaConfig) else LlamaConfig(**_of_version(text_config or {}))
        self.text_config = llama
        self.modalities = {name: dict(section) for name, section in (modalities or {}).items()}
        kwargs = {**{name: getattr(llama, name) for name in _TOKENS}, **kwargs}
        super().__init__(**{**kwargs, "tie_word_embeddings": llama.tie_word_embeddings})

    @property
    def vocab_size(self) -> int:
        """The Llama's."""
        return self.text_config.vocab_size

    def to_dict(self) -> dict[str, Any]:
        """As transformers': the Llama's rotary embedding under the names of both versions."""
        out = super().to_dict()
        # Read by transformers 4, which would pass over `rope_parameters`; 5 reads them as well.
        rope = dict(out["text_config"].get("rope_parameters") or {})
        if rope:
            out["text_config"]["rope_theta"] = rope.pop("rope_theta")
            out["text_config"]["rope_scaling"] = None if rope.get("rope_type") == "default" else rope
        return out


def _of_version(keys: Mapping[str, Any]) -> dict[str, Any]:
    """A Llama's keys as this transformers reads them: 4 knows no `rope_parameters`, 5 needs nothing beside them."""
    keys = dict(keys)
    if keys.get("rope_parameters"):
        keys.pop("rope_scaling", None)
        theta = keys.pop("rope_theta", None)
        if "rope_parameters" not in inspect.signature(LlamaConfig.__init__).parameters:
            rope = dict(keys.pop("rope_parameters"))
            keys["rope_theta"] = rope.pop("rope_theta", theta)
            keys["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    return keys


def modality_config(section: Mapping[str, Any]) -> ModalityConfig:
    """A section as the trainer's dataclass; `path` of its encoder is empty, the shape and preprocessing are in it."""
    return ModalityConfig(
        kind=section["kind"],
        encoder=EncoderConfig(**section["encoder"]),
        projector=ProjectorConfig(**section["projector"]),
        options=dict(section["options"]),
        placeholder=section["placeholder"],
    )
