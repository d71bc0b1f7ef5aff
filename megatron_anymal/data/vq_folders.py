"""Tokenizers of media that are HuggingFace folders: Emu3's VQ-VAE for pictures; EnCodec, Mimi and DAC for sounds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_anymal.data.records import DataError
from megatron_anymal.modalities.libraries import library

_SOUNDS = ("encodec", "mimi", "dac")
_PICTURES = ("emu3_vqgan",)


def open_vq_folder(where: str, folder: Path) -> PictureVQ | SoundVQ:
    """Load a tokenizer from its folder, onto the GPU if there is one.

    Args:
        where: the option that names the folder, for messages.
        folder: with config.json, safetensors and, for pictures, preprocessor_config.json.

    Raises:
        DataError: the folder holds another kind of model, or a file is missing or damaged.
    """
    kind = _read(folder / "config.json", where).get("model_type")
    if kind not in (*_SOUNDS, *_PICTURES):
        known = ", ".join((*_PICTURES, *_SOUNDS))
        raise DataError(f"{where}: it holds a {kind!r} model. Known are {known}; for others write a module:Class.")
    if not list(folder.glob("*.safetensors")):
        raise DataError(f"{where}: it has no .safetensors. Convert the weights, or download them.")
    return SoundVQ(folder, kind, where) if kind in _SOUNDS else PictureVQ(folder, where)


def _read(file: Path, where: str) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: {file.name} cannot be read ({error}). Download it again.") from None


def _hash(folder: Path) -> str:
    """Identity of a folder: of its configuration, preprocessing and weights."""
    digest = hashlib.sha256()
    for file in sorted((*folder.glob("*config.json"), *folder.glob("*.safetensors"))):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:32]


def _loaded(model: Any, folder: Path, where: str) -> Any:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return model.from_pretrained(str(folder), use_safetensors=True, dtype=torch.float32).eval().to(device)
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: transformers cannot load it ({error}).") from None


class SoundVQ:
    """EnCodec, Mimi or DAC.

    Raises:
        DataError: the folder cannot be loaded, or the model takes several channels or scales or cuts sounds.
    """

    kind = "audio"

    def __init__(self, folder: Path, kind: str, where: str):
        from transformers import AutoModel

        self._model, self._type, self.hash = _loaded(AutoModel, folder, where), kind, _hash(folder)
        config = self._model.config
        if getattr(config, "audio_channels", 1) != 1:
            raise DataError(f"{where}: it takes {config.audio_channels} channels, but sounds are read as mono.")
        if getattr(config, "normalize", False) or getattr(config, "chunk_length_s", None):
            raise DataError(f"{where}: it scales or cuts sounds (normalize, chunk_length_s), which codes cannot state.")
        self.sampling_rate = int(config.sampling_rate)
        levels = config.n_codebooks if kind == "dac" else config.num_quantizers
        self.codebooks: tuple[int, ...] = (int(config.codebook_size),) * int(levels)

    def encode(self, items: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Codes of sounds, each [samples] float32: [codebooks, codes] integers per sound.

        One item at a time: padding to a common length would change the codes at the end.
        """
        return [self._encode(item) for item in items]

    def _encode(self, item: np.ndarray) -> np.ndarray:
        import torch

        wave = torch.from_numpy(item)[None, None].to(self._model.device)
        # EnCodec uses its lowest bandwidth otherwise, which has fewer codebooks.
        more = {"bandwidth": max(self._model.config.target_bandwidths)} if self._type == "encodec" else {}
        with torch.no_grad():
            codes = self._model.encode(wave, **more).audio_codes
        return np.asarray(codes.reshape(-1, codes.shape[-1]).cpu())

    def decode(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Sounds, [samples] float32, of codes, [codebooks, codes]."""
        import torch

        sounds = []
        for one in codes:
            tensor = torch.from_numpy(np.asarray(one, np.int64))[None].to(self._model.device)
            with torch.no_grad():
                if self._type == "encodec":
                    decoded = self._model.decode(tensor[None], [None])
                elif self._type == "dac":
                    decoded = self._model.decode(audio_codes=tensor)
                else:
                    decoded = self._model.decode(tensor)
            sounds.append(decoded.audio_values.reshape(-1).cpu().numpy())
        return sounds


class PictureVQ:
    """Emu3's VQ-VAE. Pictures are stretched to the size in preprocessor_config.json, so that all have as many codes.

    Raises:
        DataError: the folder cannot be loaded, or preprocessor_config.json has no size or one that the model cannot
            take.
    """

    kind, sampling_rate = "image", 0

    def __init__(self, folder: Path, where: str):
        from transformers import Emu3VQVAE

        stated = _read(folder / "preprocessor_config.json", where)
        size = stated.get("size")
        if not isinstance(size, Mapping) or not {"height", "width"} <= size.keys():
            raise DataError(
                f"{where}: preprocessor_config.json needs `size` with `height` and `width`, so that every picture has "
                "the same number of codes."
            )
        self._size = int(size["width"]), int(size["height"])
        self._mean, self._std = (
            np.array(stated.get(key, [0.5] * 3), np.float32) for key in ("image_mean", "image_std")
        )
        self._model, self.hash = _loaded(Emu3VQVAE, folder, where), _hash(folder)
        self.codebooks: tuple[int, ...] = (int(self._model.config.codebook_size),)
        factor = int(self._model.spatial_scale_factor)
        if any(side % factor for side in self._size):
            raise DataError(f"{where}: height and width in preprocessor_config.json must be multiples of {factor}.")
        self._grid = self._size[1] // factor, self._size[0] // factor

    def pixels(self, item: np.ndarray) -> np.ndarray:
        """A picture, [height, width, 3] uint8, as the model takes it: [3, height, width] float32, normalized."""
        image = library("PIL.Image")
        resized = image.fromarray(item).resize(self._size, image.Resampling.BICUBIC)
        scaled = np.asarray(resized, np.float32) / 255
        return np.ascontiguousarray(((scaled - self._mean) / self._std).transpose(2, 0, 1))

    def encode(self, items: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Codes of pictures, each [height, width, 3] uint8, all at once: [1, codes] integers per picture."""
        import torch

        pixels = torch.from_numpy(np.stack([self.pixels(item) for item in items])).to(self._model.device)
        sizes = torch.tensor([pixels.shape[-2:]] * len(items))
        with torch.no_grad():
            tokens = self._model.encode(pixels, sizes).image_tokens
        return [one.reshape(1, -1).cpu().numpy() for one in tokens]

    def decode(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Pictures, [height, width, 3] uint8, of codes, [1, codes]."""
        import torch

        tokens = np.stack([np.asarray(one, np.int64).reshape(self._grid) for one in codes])
        with torch.no_grad():
            pixels = self._model.decode(torch.from_numpy(tokens).to(self._model.device))
        shown = pixels.permute(0, 2, 3, 1).cpu().numpy() * self._std + self._mean
        return [*(shown.clip(0, 1) * 255).round().astype(np.uint8)]
