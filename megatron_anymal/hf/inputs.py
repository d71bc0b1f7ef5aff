"""Inputs of an exported model: a padded batch of prompts, with the pieces of their media."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional, Union

import torch
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature

from megatron_anymal.data.prompt_encoder import TokenizedPrompt
from megatron_anymal.data.records import DataError


class AnyMALInputs(BatchFeature):
    """input_ids and attention_mask [B, T], and `media`: name of a modality -> pieces [n, *piece_shape]."""

    def to(self, *arguments: Any, **kwargs: Any) -> AnyMALInputs:
        """Like `Tensor.to`; only pieces change their dtype."""
        device = torch._C._nn._parse_to(*arguments, **kwargs)[0]
        for name, value in self.data.items():
            if isinstance(value, Tensor):
                self.data[name] = value if device is None else value.to(device)
            else:
                self.data[name] = {key: pieces.to(*arguments, **kwargs) for key, pieces in value.items()}
        return self


def batch_of(
    prompts: Sequence[TokenizedPrompt],
    pad: int,
    padding: Union[bool, str] = True,
    max_length: Optional[int] = None,
    return_tensors: Optional[str] = "pt",
) -> AnyMALInputs:
    """Collate prompts into a batch, padded on the left.

    Args:
        pad: the padding id; it is masked, so any id will do except a placeholder's.
        padding: True or "longest"; "max_length"; or False.
        max_length: tokens, for padding="max_length".
        return_tensors: "pt", "np", or None for lists of ids.

    Raises:
        DataError: there are no prompts, or one is longer than max_length.
        ValueError: an unknown setting, or a tensor is requested of unpadded prompts of different lengths.
    """
    if not prompts:
        raise DataError("There are no prompts.")
    if return_tensors not in ("pt", "np", None):
        raise ValueError(f"return_tensors={return_tensors!r}: this processor supports 'pt', 'np' and None (lists).")
    if (padding == "max_length") != (max_length is not None):
        raise ValueError("padding='max_length' and max_length=N go together; prompts are never truncated.")
    longest = max(len(prompt.tokens) for prompt in prompts)
    if padding == "max_length" and max_length is not None:
        if longest > max_length:
            raise DataError(
                f"A prompt has {longest} tokens, more than max_length={max_length}. Prompts are never truncated."
            )
        longest = max_length
    elif padding in (False, "do_not_pad"):
        if return_tensors is not None and any(len(prompt.tokens) != longest for prompt in prompts):
            raise ValueError("Prompts of different lengths need padding: set padding=True, or return_tensors=None.")
        longest = 0
    elif padding not in (True, "longest"):
        raise ValueError(f"padding={padding!r} is not one of True, 'longest', 'max_length' and False.")
    lacking = [max(0, longest - len(prompt.tokens)) for prompt in prompts]
    ids: Any = [[pad] * count + prompt.tokens for count, prompt in zip(lacking, prompts)]
    mask: Any = [[0] * count + [1] * len(prompt.tokens) for count, prompt in zip(lacking, prompts)]
    pieces: dict[str, list[Tensor]] = {}
    for prompt in prompts:
        for name, tensor in prompt.pieces:
            pieces.setdefault(name, []).append(tensor)
    media: dict[str, Any] = {name: torch.cat(tensors) for name, tensors in pieces.items()}
    if return_tensors is not None:
        ids, mask = torch.tensor(ids), torch.tensor(mask)
    if return_tensors == "np":
        ids, mask, media = ids.numpy(), mask.numpy(), {name: tensor.numpy() for name, tensor in media.items()}
    return AnyMALInputs({"input_ids": ids, "attention_mask": mask, "media": media})
