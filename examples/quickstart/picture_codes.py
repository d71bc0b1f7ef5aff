"""The quickstart's tokenizer of pictures: a small VQ-VAE, and the class that `anymal prepare --encode` loads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from examples.quickstart.corpus import DIGITS
from examples.quickstart.vector_quantizer import VectorQuantizer, train_autoencoder
from examples.quickstart.vision import scatter

# Pictures are converted to greyscale, resized to SIDE x SIDE, and become 1 + GRID x GRID codes: one for the whole, then
# those of the parts.
SIDE, GRID = 16, 4
CODES, WIDTH = 128, 16
WEIGHTS = Path("runs/quickstart/picture_tokenizer.safetensors")
# Loss weights: commitment, as in the paper, and classification of the digit.
COMMITMENT, MEANING = 0.25, 0.1


class PictureAutoencoder(nn.Module):
    """From grey pictures, [n, 1, SIDE, SIDE] in 0 to 1, to codes, [n, 1 + GRID x GRID], and back."""

    def __init__(self) -> None:
        """Draw random weights."""
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, 2, 1),
            nn.ReLU(),
        )
        self.whole, self.parts = nn.Linear(64 * GRID * GRID, WIDTH), nn.Conv2d(64, WIDTH, 3, 1, 1)
        self.codebook = VectorQuantizer(CODES, WIDTH)
        # Used in training only: the digit, from the first code.
        self.meaning = nn.Linear(WIDTH, len(DIGITS))
        self.decoder = nn.Sequential(
            nn.Conv2d(2 * WIDTH, 64, 3, 1, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 1, 4, 2, 1),
            nn.Sigmoid(),
        )

    def features(self, pictures: Tensor) -> Tensor:
        """One vector per code, [n x (1 + GRID x GRID), WIDTH]."""
        seen = self.encoder(pictures)
        parts = self.parts(seen).flatten(2).transpose(1, 2)
        return torch.cat([self.whole(seen.flatten(1))[:, None], parts], dim=1).reshape(-1, WIDTH)

    def encode(self, pictures: Tensor) -> Tensor:
        """Codes: of the whole, then of the parts, row by row from the top left."""
        return self.codebook.nearest(self.features(pictures)).view(len(pictures), -1)

    def decode(self, codes: Tensor) -> Tensor:
        """Pictures of codes."""
        return self._draw(self.codebook.vectors[codes.flatten()])

    def forward(self, pictures: Tensor, digits: Tensor) -> Tensor:
        """The loss: distance of the pictures to their reconstructions, and of the features to the codebook; and the
        classification of the digit by the first code.

        As with MIO's tokenizers, codes carry meaning as well as appearance, so a Llama learns to read them faster.

        Args:
            digits: [n], what the pictures show.
        """
        quantized, distance = self.codebook(self.features(pictures))
        logits = self.meaning(quantized.view(len(pictures), -1, WIDTH)[:, 0])
        drawn = F.mse_loss(self._draw(quantized), pictures)
        return drawn + COMMITMENT * distance + MEANING * F.cross_entropy(logits, digits)

    def _draw(self, vectors: Tensor) -> Tensor:
        whole, parts = vectors.view(-1, 1 + GRID * GRID, WIDTH).transpose(1, 2).split([1, GRID * GRID], dim=2)
        return self.decoder(torch.cat([whole.expand_as(parts), parts], dim=1).unflatten(2, (GRID, GRID)))


def train_picture_tokenizer(
    pictures: np.ndarray,
    digits: Sequence[str],
    weights: Path = WEIGHTS,
    steps: int = 1200,
    batch_size: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
) -> list[float]:
    """Train the autoencoder and save it for `PictureTokenizer`.

    The pictures are varied as for the image encoder: digits of different sizes and positions, as in frames of videos.

    Args:
        pictures: [n, height, width] uint8, grey.
        digits: name of the digit of each picture.
        weights: output file.

    Returns:
        The loss of every step.
    """
    whole = torch.from_numpy(pictures)[:, None].float() / 255
    labels = torch.tensor([DIGITS.index(digit) for digit in digits])

    def varied(rows: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        return F.interpolate(scatter(whole[rows], rng), size=(SIDE, SIDE), mode="area"), labels[rows]

    return train_autoencoder(
        PictureAutoencoder, varied, len(whole), weights, steps=steps, batch_size=batch_size, lr=lr, seed=seed
    )


class PictureTokenizer:
    """A tokenizer plug-in: what `--encode picture=examples.quickstart.picture_codes:PictureTokenizer` loads.

    Attributes:
        kind, sampling_rate, codebooks, hash: as data/media_tokenizers.py asks for.
    """

    kind = "image"
    sampling_rate = 0
    codebooks: tuple[int, ...] = (CODES,)

    def __init__(self, weights: Path = WEIGHTS):
        """Load the weights that `train_picture_tokenizer` saved."""
        self._model = PictureAutoencoder().eval()
        self._model.load_state_dict(load_file(weights))
        # The codes depend on nothing else.
        self.hash = hashlib.sha256(weights.read_bytes()).hexdigest()[:32]

    @torch.no_grad()
    def encode(self, items: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Codes, [1, 1 + GRID x GRID], of pictures of any size, [height, width, 3] uint8."""
        grey = [Image.fromarray(item).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX) for item in items]
        pixels = torch.from_numpy(np.stack([np.asarray(one) for one in grey]))[:, None].float() / 255
        return [codes[None].numpy() for codes in self._model.encode(pixels)]

    @torch.no_grad()
    def decode(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Pictures, [SIDE, SIDE, 3] uint8."""
        pixels = self._model.decode(torch.from_numpy(np.stack([np.asarray(one, np.int64) for one in codes])))
        grey = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        return [*grey.expand(-1, -1, -1, 3).numpy()]
