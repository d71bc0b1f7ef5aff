"""Encoders beside an imported Llama: each as a HuggingFace folder of its own inside the checkpoint.

An encoder is never split, so its folder loads under any layout: `model.modalities.NAME.encoder.path` names it. Of a
two-tower model the tower that the trainer uses is kept. Names, types and bytes of its tensors stay what they were.
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

# First parts of the names of what else a folder with an encoder may hold.
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
        name: the modality's, for messages.
        source: a HuggingFace folder with an architecture that the trainer knows.
        target: a new folder.

    Returns:
        Lines that say what was copied and what was left out.

    Raises:
        ConfigError, TensorFileError: the folder is of another architecture, lacks a tensor, holds one in another shape
            or one that belongs nowhere.
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
    # As a run will load it.
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
        f"--encoder {name}={str(source)!r} holds the architecture {model_type!r}. Known are: {known}. An encoder of a "
        "plug-in is named in model.modalities.NAME.encoder.path as it is."
    )


def _tower(section: EncoderConfig, weights: HFWeights) -> tuple[list[str], Counter[str]]:
    """The source's names of the tower's tensors, and how many tensors of each other part are left out.

    transformers decides: names in files are not always those of its modules.
    """
    _, unused = read_transformers(section, attention="eager")
    kept, left_out = [], Counter[str]()
    for tensor in weights:
        part, _, rest = tensor.partition(".")
        # Where the tower is a part of the folder's model, transformers names it without that part.
        is_unused = tensor in unused or rest in unused
        if part in _OTHER_PARTS:
            left_out[part] += 1
        elif tensor.endswith(COMPUTED) and is_unused:
            left_out["computed tensors"] += 1
        elif is_unused:
            raise ConfigError(
                f"{section.path!r}: the tensor {tensor!r} in {weights.file_of(tensor)!r} belongs to no part of a "
                f"{section.type} model that is known. Remove it, or use the published folder."
            )
        else:
            kept.append(tensor)
    return kept, left_out
