"""The quickstart's tokenizer of sounds: a small codec, and the class that `anymal prepare --encode` loads.

Its first codebook carries the content, the second one the residual.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from examples.quickstart.media import AUDIO_RATE
from examples.quickstart.vector_quantizer import VectorQuantizer, train_autoencoder

# Samples per frame of the spectrogram and between two frames; each code stands for this many frames.
WINDOW, HOP, FRAMES = 500, 250, 2
BANDS = WINDOW // 2 + 1
CODEBOOKS, CODES, WIDTH = 2, 64, 8
# Codes of a sound of one second, over both codebooks.
CODES_PER_SECOND = CODEBOOKS * AUDIO_RATE // (HOP * FRAMES)
# Added to magnitudes before their logarithm is taken.
FLOOR = 0.5
# Rounds in which the phases of a decoded sound are made consistent.
PHASE_ROUNDS = 30
WEIGHTS = Path("runs/quickstart/sound_tokenizer.safetensors")
COMMITMENT = 0.25


class SoundAutoencoder(nn.Module):
    """From logarithms of magnitudes, [n, FRAMES x BANDS, codes], to codes, [n, CODEBOOKS, codes], and back."""

    def __init__(self) -> None:
        """Draw random weights."""
        super().__init__()
        values = FRAMES * BANDS
        self.encoder = nn.Sequential(nn.Conv1d(values, 128, 3, 1, 1), nn.ReLU(), nn.Conv1d(128, WIDTH, 1))
        self.levels = [VectorQuantizer(CODES, WIDTH) for _ in range(CODEBOOKS)]
        self.codebooks = nn.ModuleList(self.levels)
        self.decoder = nn.Sequential(nn.Conv1d(WIDTH, 128, 3, 1, 1), nn.ReLU(), nn.Conv1d(128, values, 1))

    def encode(self, spectrograms: Tensor) -> Tensor:
        """Codes: each codebook quantizes what the ones before it leave."""
        rest, codes = self._features(spectrograms), []
        for codebook in self.levels:
            codes.append(codebook.nearest(rest))
            rest = rest - codebook.vectors[codes[-1]]
        return torch.stack([one.view(len(spectrograms), -1) for one in codes], dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """Logarithms of magnitudes of codes."""
        quantized = [codebook.vectors[codes[:, number]] for number, codebook in enumerate(self.levels)]
        decoded: Tensor = self.decoder(torch.stack(quantized).sum(0).transpose(1, 2))
        return decoded

    def forward(self, spectrograms: Tensor) -> Tensor:
        """The loss: distance to the reconstruction, also to that of the content alone, and to the codebooks."""
        rest, loss = self._features(spectrograms), spectrograms.new_zeros(())
        total = torch.zeros_like(rest)
        for codebook in self.levels:
            quantized, distance = codebook(rest)
            rest, total = rest - quantized.detach(), total + quantized
            drawn = self.decoder(total.view(len(spectrograms), -1, WIDTH).transpose(1, 2))
            loss = loss + F.mse_loss(drawn, spectrograms) + COMMITMENT * distance
        return loss

    def _features(self, spectrograms: Tensor) -> Tensor:
        """One vector per code position, [n x codes, WIDTH]."""
        return self.encoder(spectrograms).transpose(1, 2).reshape(-1, WIDTH)


def spectrogram(sound: Tensor) -> Tensor:
    """Logarithms of magnitudes, [n, FRAMES x BANDS, codes], of sounds, [n, samples]; the last code is padded."""
    padded = F.pad(sound, (0, -sound.size(1) % (HOP * FRAMES)))
    complex_ = torch.stft(padded, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True)
    frames = (complex_.abs() + FLOOR).log()[:, :, :-1]
    return frames.transpose(1, 2).reshape(len(sound), -1, FRAMES * BANDS).transpose(1, 2)


def sound_of(spectrograms: Tensor) -> Tensor:
    """Sounds, [n, samples], of logarithms of magnitudes (Griffin and Lim, 1984)."""
    frames = spectrograms.transpose(1, 2).reshape(len(spectrograms), -1, BANDS).transpose(1, 2)
    magnitudes = F.pad((frames.exp() - FLOOR).clamp(min=0), (0, 1), mode="replicate")
    window, length = torch.hann_window(WINDOW), frames.size(2) * HOP
    phases = torch.rand(magnitudes.shape, generator=torch.Generator().manual_seed(0)) * 2 * torch.pi
    for _ in range(PHASE_ROUNDS):
        sound = torch.istft(torch.polar(magnitudes, phases), WINDOW, HOP, window=window, length=length)
        phases = torch.stft(sound, WINDOW, HOP, window=window, return_complex=True).angle()
    return sound.clamp(-1, 1)


def train_sound_tokenizer(
    sounds: np.ndarray,
    weights: Path = WEIGHTS,
    steps: int = 300,
    batch_size: int = 32,
    lr: float = 2e-3,
    seed: int = 0,
) -> list[float]:
    """Train the autoencoder and save it for `SoundTokenizer`.

    Args:
        sounds: [n, samples] float32 at AUDIO_RATE.
        weights: output file.

    Returns:
        The loss of every step.
    """
    whole = spectrogram(torch.from_numpy(sounds))

    def chosen(rows: Tensor, rng: np.random.Generator) -> tuple[Tensor]:
        return (whole[rows],)

    return train_autoencoder(
        SoundAutoencoder, chosen, len(whole), weights, steps=steps, batch_size=batch_size, lr=lr, seed=seed
    )


class SoundTokenizer:
    """A tokenizer plug-in: what `--encode sound=examples.quickstart.sound_codes:SoundTokenizer` loads.

    Attributes:
        kind, sampling_rate, codebooks, hash: as data/media_tokenizers.py asks for.
    """

    kind = "audio"
    sampling_rate = AUDIO_RATE
    codebooks: tuple[int, ...] = (CODES,) * CODEBOOKS

    def __init__(self, weights: Path = WEIGHTS):
        """Load the weights that `train_sound_tokenizer` saved."""
        self._model = SoundAutoencoder().eval()
        self._model.load_state_dict(load_file(weights))
        self.hash = hashlib.sha256(weights.read_bytes()).hexdigest()[:32]

    @torch.no_grad()
    def encode(self, items: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Codes, [CODEBOOKS, codes], of sounds, [samples] float32: 16 per second and codebook."""
        return [self._model.encode(spectrogram(torch.from_numpy(item)[None]))[0].numpy() for item in items]

    @torch.no_grad()
    def decode(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Sounds, [samples] float32."""
        tensors = [torch.from_numpy(np.asarray(one, np.int64))[None] for one in codes]
        return [sound_of(self._model.decode(one))[0].numpy() for one in tensors]
