"""The codebook and the training of the quickstart's tokenizers of pictures and sounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

# Decay of the moving averages, and the uses in 1 / (1 - DECAY) steps below which a code is reset.
DECAY, LEAST_USE = 0.97, 0.5


class VectorQuantizer(nn.Module):
    """Replaces vectors by the nearest of a codebook (VQ-VAE, van den Oord et al., 2017).

    The codebook follows moving averages of the vectors that it replaces (appendix A.1 there). Codes that are hardly
    used move to random vectors of the batch.

    Attributes:
        vectors: the codebook, [codes, width].
    """

    vectors: Tensor
    uses: Tensor
    sums: Tensor

    def __init__(self, codes: int, width: int):
        """Start with a codebook that the first training step replaces.

        Args:
            width: of a vector.
        """
        super().__init__()
        self.register_buffer("vectors", torch.zeros(codes, width))
        self.register_buffer("uses", torch.zeros(codes))
        self.register_buffer("sums", torch.zeros(codes, width))

    def nearest(self, inputs: Tensor) -> Tensor:
        """Code of the nearest vector of the codebook, [n], to each of the inputs, [n, width]."""
        distances = self.vectors.square().sum(1) - 2 * inputs @ self.vectors.T
        return distances.argmin(1)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize inputs, [n, width], and, in training mode, move the codebook towards them.

        Returns:
            The nearest vectors, [n, width], whose gradients go to the inputs; and the mean squared distance, by which
            the inputs are drawn to the codebook.
        """
        codes = self.nearest(inputs)
        quantized = self.vectors[codes]
        if self.training:
            self._follow(inputs.detach(), codes)
        return inputs + (quantized - inputs).detach(), F.mse_loss(inputs, quantized)

    @torch.no_grad()
    def _follow(self, inputs: Tensor, codes: Tensor) -> None:
        chosen = F.one_hot(codes, len(self.vectors)).to(inputs.dtype)
        self.uses.mul_(DECAY).add_((1 - DECAY) * chosen.sum(0))
        self.sums.mul_(DECAY).add_((1 - DECAY) * (chosen.T @ inputs))
        unused = self.uses < (1 - DECAY) * LEAST_USE
        again = inputs[torch.randint(len(inputs), (int(unused.sum()),))]
        self.uses[unused], self.sums[unused] = 1.0, again
        self.vectors.copy_(self.sums / self.uses[:, None])


def train_autoencoder(
    build: Callable[[], nn.Module],
    inputs: Callable[[Tensor, np.random.Generator], tuple[Tensor, ...]],
    samples: int,
    weights: Path,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> list[float]:
    """Train an autoencoder whose forward pass returns its loss, and save its weights.

    Args:
        build: makes the model, with random weights.
        inputs: takes the numbers of a batch's samples, [batch_size], and returns the model's arguments.
        samples: their number.
        weights: output file.

    Returns:
        The loss of every step.
    """
    rng = np.random.default_rng(seed)
    losses = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = build()
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
        for _ in range(steps):
            loss = model(*inputs(torch.from_numpy(rng.choice(samples, batch_size)), rng))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), weights)
    return losses
