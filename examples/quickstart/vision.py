"""A small CLIP, trained contrastively on the quickstart's training images and their captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from examples.quickstart.corpus import DIGITS, turns

# Channel statistics of the enlarged scans on a scale of 0 to 1, rounded.
IMAGE_MEAN, IMAGE_STD = 0.3, 0.35
VISION_SHAPE = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
# Patches of a digit look alike at any position: position embeddings must be as large as content from the start.
POSITION_STD = 0.5
# Smallest size of a digit in a training image, relative to the image's side.
SMALLEST = 0.7
# Largest rotation and slant, in radians.
LARGEST_TURN = 0.15


def train_image_encoder(
    manifest: str | Path,
    tokenizer: str | Path,
    folder: str | Path,
    steps: int = 500,
    batch_size: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
) -> dict[str, Any]:
    """Train a CLIP on a manifest's images and save its vision tower for `CLIPVisionModel.from_pretrained`.

    The digits are augmented to different sizes and positions, as in the frames of the videos.

    Args:
        manifest: manifest of the training images; its answers name the digits.
        tokenizer: tokenizer folder.
        folder: output folder for config.json, model.safetensors and preprocessor_config.json.

    Returns:
        "losses": the loss of every step; "accuracy": the share of training images that are closest to their own
        caption.
    """
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(str(tokenizer), trust_remote_code=False)
    captions = _caption_tokens(words)
    pictures, labels = _read_images(Path(manifest))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(len(words), words.bos_token_id, words.eos_token_id)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
        rng = np.random.default_rng(seed)
        losses = []
        for _ in range(steps):
            rows = torch.from_numpy(rng.choice(len(pictures), batch_size, replace=False))
            pixels = _normalise(scatter(pictures[rows], rng))
            # The ten captions are encoded once, then repeated for the images that they belong to.
            logits = model(input_ids=captions, pixel_values=pixels).logits_per_image
            loss = _contrastive_loss(logits[:, labels[rows]], labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    _save(model, Path(folder))
    return {"losses": losses, "accuracy": _accuracy(model, captions, pictures, labels)}


def _caption_tokens(words: Any) -> Tensor:
    """Token ids of the caption of each digit, [10, tokens]."""
    captions = [turns("image", (digit,))[0].answer for digit in DIGITS]
    rows = [
        [words.bos_token_id, *words.encode(" " + c, add_special_tokens=False), words.eos_token_id] for c in captions
    ]
    assert len({len(row) for row in rows}) == 1, "captions of one length need no padding"
    return torch.tensor(rows)


def _read_images(manifest: Path) -> tuple[Tensor, Tensor]:
    """Images [n, 1, side, side] in 0 to 1, and the digits [n] named in their answers."""
    pictures, labels = [], []
    for line in manifest.read_text(encoding="utf-8").splitlines():
        parts = json.loads(line)["parts"]
        file = next(part["media"] for part in parts if "media" in part)
        with Image.open(manifest.parent / file) as picture:
            pictures.append(np.asarray(picture.convert("L"), dtype=np.float32) / 255.0)
        labels.append(next(i for i, digit in enumerate(DIGITS) if digit in parts[-1]["text"].split()))
    return torch.from_numpy(np.stack(pictures))[:, None], torch.tensor(labels)


def _build(vocab_size: int, begin: int, end: int) -> Any:
    from transformers import CLIPConfig, CLIPModel

    # CLIP takes the caption's features at the position of the end token.
    text = {**TEXT_SHAPE, "vocab_size": vocab_size, "bos_token_id": begin, "eos_token_id": end, "pad_token_id": end}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION_SHAPE, projection_dim=32))
    torch.nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=POSITION_STD)
    return model


def scatter(pictures: Tensor, rng: np.random.Generator, smallest: float | None = None) -> Tensor:
    """Randomly shrink, shift, rotate and slant each image [n, 1, side, side] within its frame.

    Args:
        smallest: size of the smallest, relative to the frame; None: SMALLEST.
    """
    n = len(pictures)
    scale = rng.uniform(SMALLEST if smallest is None else smallest, 1.0, n)
    # In grid_sample's coordinates the frame spans -1 to 1: free space on either side of the centre.
    shift = rng.uniform(-1, 1, (n, 2)) * (1 - scale)[:, None]
    angle, slant = rng.uniform(-LARGEST_TURN, LARGEST_TURN, (2, n))
    # Maps positions in the new image to positions in the old one: shift back, then enlarge, rotate and slant.
    turn = np.array([[np.cos(angle), np.sin(angle) + slant], [-np.sin(angle), np.cos(angle)]]) / scale
    theta = np.zeros((n, 2, 3), dtype=np.float32)
    theta[:, :, :2] = turn.transpose(2, 0, 1)
    theta[:, :, 2] = -np.einsum("nij,nj->ni", theta[:, :, :2], shift)
    grid = F.affine_grid(torch.from_numpy(theta), list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, align_corners=False)


def _normalise(pictures: Tensor) -> Tensor:
    """Convert grey images in 0 to 1 to three normalised channels, as the saved preprocessor does."""
    return ((pictures - IMAGE_MEAN) / IMAGE_STD).expand(-1, 3, -1, -1)


def _contrastive_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """CLIP's loss in which every image of a digit matches the digit's caption (Yang et al., 2022, UniCL)."""
    match = (labels[:, None] == labels[None, :]).float()
    target = match / match.sum(dim=1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


@torch.no_grad()
def _accuracy(model: Any, captions: Tensor, pictures: Tensor, labels: Tensor) -> float:
    logits = model(input_ids=captions, pixel_values=_normalise(pictures)).logits_per_image
    return (logits.argmax(dim=1) == labels).float().mean().item()


def _save(model: Any, folder: Path) -> None:
    from transformers import CLIPVisionModel

    tower = CLIPVisionModel(model.config.vision_config)
    own = tower.state_dict()
    weights = model.state_dict()
    nested = "vision_model." if not any(name.startswith("vision_model.") for name in own) else ""
    tower.load_state_dict({name: weights[nested + name] for name in own})
    tower.save_pretrained(str(folder))
    described = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"height": VISION_SHAPE["image_size"], "width": VISION_SHAPE["image_size"]},
        "resample": int(Image.Resampling.BICUBIC),
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [IMAGE_MEAN] * 3,
        "image_std": [IMAGE_STD] * 3,
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
