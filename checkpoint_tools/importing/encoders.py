"""Encoders imported along with a Llama: each one becomes a HuggingFace folder inside the checkpoint.

An encoder is never sharded, so its folder loads under any layout; refer to it in `model.modalities.NAME.encoder.path`.
For a two-tower model, only the tower that the trainer uses is copied. Tensor names, dtypes and bytes are preserved.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

from megatron_anymal.config import ConfigError, EncoderConfig
from megatron_anymal.hf_weights import SINGLE, HFWeights
from megatron_anymal.modalities.architecture import ARCHITECTURES, read_json
from megatron_anymal.model.encoders.base import COMPUTED, read_transformers
from megatron_anymal.safetensors_io import SafetensorsWriter

# Name prefixes of other components that a folder with an encoder may contain.
_OTHER_PARTS = {
    "text_model",
    "text_projection",
    "visual_projection",
    "audio_projection",
    "logit_scale",
    "logit_scale_a",
    "logit_scale_t",
    # VideoMAE's pre-training decoder and classifiers.
    "decoder",
    "encoder_to_decoder",
    "mask_token",
    "position_embeddings",
    "classifier",
    "fc_norm",
}
_BESIDE = ("config.json", "preprocessor_config.json", "processor_config.json")


def import_encoder(name: str, source: Path, target: Path) -> list[str]:
    """Copy an encoder's tower, its configuration and its preprocessing.

    Args:
        name: modality name, for messages.
        source: HuggingFace folder with an architecture that the trainer supports.
        target: folder to create.

    Returns:
        Report lines: the tensors that were copied and those that were left out.

    Raises:
        ConfigError, TensorFileError: the architecture is not supported, or a tensor is missing, unknown or of the wrong
            shape.
    """
    section = EncoderConfig(type=_type_of(name, source), path=str(source))
    weights = HFWeights(source)
    kept, left_out = _tower(section, weights)
    target.mkdir(parents=True)
    for file in _BESIDE:
        if (source / file).is_file():
            shutil.copyfile(source / file, target / file)
    entries = {tensor: (weights.entry(tensor).dtype, weights.entry(tensor).shape) for tensor in kept}
    with SafetensorsWriter(target / SINGLE, entries, {"format": "pt"}) as writer:
        for tensor in entries:
            writer.append(tensor, weights[tensor])
    # Check that a run can load it.
    read_transformers(EncoderConfig(type=section.type, path=str(target)), attention="eager")
    lines = [f"encoder {name}: {section.type}, {len(kept)} tensors"]
    lines += [f"encoder {name}: left out {variant}, a variant in another type" for variant in weights.variants]
    lines += [f"encoder {name}: left out {part}, {count} tensor(s)" for part, count in sorted(left_out.items())]
    return lines


def _type_of(name: str, source: Path) -> str:
    model_type = read_json(source, "config.json").get("model_type")
    for encoder_type, architecture in ARCHITECTURES.items():
        if model_type in architecture.model_types:
            return encoder_type
    known = ", ".join(sorted(t for a in ARCHITECTURES.values() for t in a.model_types))
    raise ConfigError(
        f"--encoder {name}={str(source)!r} has the unknown architecture {model_type!r}. Known are: {known}. For an "
        "encoder of a plug-in, set model.modalities.NAME.encoder.path to its own folder."
    )


def _tower(section: EncoderConfig, weights: HFWeights) -> tuple[list[str], Counter[str]]:
    """Return the source names of the tower's tensors, and the number of tensors left out per other component.

    transformers decides which tensors are unused, since names in files do not always match its module names.
    """
    _, unused = read_transformers(section, attention="eager")
    kept, left_out = [], Counter[str]()
    for tensor in weights:
        part, _, rest = tensor.partition(".")
        # If the tower is a submodule of the folder's model, transformers reports names without its prefix.
        is_unused = tensor in unused or rest in unused
        if part in _OTHER_PARTS:
            left_out[part] += 1
        elif tensor.endswith(COMPUTED) and is_unused:
            left_out["computed tensors"] += 1
        elif is_unused:
            raise ConfigError(
                f"{section.path!r}: the tensor {tensor!r} in {weights.file_of(tensor)!r} belongs to no known "
                f"component of a {section.type} model. Remove it, or use the published folder."
            )
        else:
            kept.append(tensor)
    return kept, left_out
