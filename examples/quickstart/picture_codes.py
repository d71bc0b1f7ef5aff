"""The quickstart's tokenizer of pictures: a small VQ-VAE, and the class that `anymal prepare --encode` loads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from examples.quickstart.vector_quantizer import VectorQuantizer
from examples.quickstart.vision import scatter

# Pictures are made grey and this large, and become GRID x GRID codes.
SIDE, GRID = 16, 4
CODES, WIDTH = 64, 8
WEIGHTS = Path("runs/quickstart/picture_tokenizer.safetensors")
# Weight of the distance to the codebook, as in the paper.
COMMITMENT = 0.25


class PictureAutoencoder(nn.Module):
    """From grey pictures, [n, 1, SIDE, SIDE] in 0 to 1, to codes, [n, GRID x GRID], and back."""

    def __init__(self) -> None:
        """Draw random weights."""
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(64, WIDTH, 3, 1, 1),
        )
        self.codebook = VectorQuantizer(CODES, WIDTH)
        self.decoder = nn.Sequential(
            nn.Conv2d(WIDTH, 64, 3, 1, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 1, 4, 2, 1),
            nn.Sigmoid(),
        )

    def features(self, pictures: Tensor) -> Tensor:
        """One vector per code, [n x GRID x GRID, WIDTH]."""
        return self.encoder(pictures).permute(0, 2, 3, 1).reshape(-1, WIDTH)

    def encode(self, pictures: Tensor) -> Tensor:
        """Codes, row by row from the top left."""
        return self.codebook.nearest(self.features(pictures)).view(len(pictures), -1)

    def decode(self, codes: Tensor) -> Tensor:
        """Pictures of codes."""
        return self._draw(self.codebook.vectors[codes.flatten()])

    def forward(self, pictures: Tensor) -> Tensor:
        """The loss: distance of the pictures to their reconstructions, and of the features to the codebook."""
        quantized, distance = self.codebook(self.features(pictures))
        return F.mse_loss(self._draw(quantized), pictures) + COMMITMENT * distance

    def _draw(self, vectors: Tensor) -> Tensor:
        return self.decoder(vectors.view(-1, GRID, GRID, WIDTH).permute(0, 3, 1, 2))


def train_picture_tokenizer(
    pictures: np.ndarray,
    weights: Path = WEIGHTS,
    steps: int = 400,
    batch_size: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
) -> list[float]:
    """Train the autoencoder and save it for `PictureTokenizer`.

    The pictures are varied as for the image encoder: digits of different sizes and positions, as in frames of videos.

    Args:
        pictures: [n, height, width] uint8, grey.
        weights: output file.

    Returns:
        The loss of every step.
    """
    whole = torch.from_numpy(pictures)[:, None].float() / 255
    rng = np.random.default_rng(seed)
    losses = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PictureAutoencoder()
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
        for _ in range(steps):
            batch = scatter(whole[torch.from_numpy(rng.choice(len(whole), batch_size))], rng)
            loss = model(F.interpolate(batch, size=(SIDE, SIDE), mode="area"))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), weights)
    return losses


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
        """Codes, [1, GRID x GRID], of pictures of any size, [height, width, 3] uint8."""
        grey = [Image.fromarray(item).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX) for item in items]
        pixels = torch.from_numpy(np.stack([np.asarray(one) for one in grey]))[:, None].float() / 255
        return [codes[None].numpy() for codes in self._model.encode(pixels)]

    @torch.no_grad()
    def decode(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Pictures, [SIDE, SIDE, 3] uint8."""
        pixels = self._model.decode(torch.from_numpy(np.stack([np.asarray(one, np.int64) for one in codes])))
        grey = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        return [*grey.expand(-1, -1, -1, 3).numpy()]
