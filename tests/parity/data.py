"""Data, model and hyperparameters of the parity runs: tiny, but with every case that a layout could get wrong."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from tiny import LLAMA, SPECIAL, VIDEOMAE, flac, make_config, make_conversations, make_shards, modalities, npy, png

from megatron_anymal.config import EncoderConfig, ModalityConfig, ProjectorConfig, RunConfig
from parity.layouts import LAYERS

# Sample kinds, repeated in this order.
MEDIA: dict[str, tuple[str, ...]] = {
    "image": ("image",),
    "video": ("video",),
    "audio": ("audio",),
    "imu": ("imu",),
    "text": ("text",),
    "mixed": ("image", "video", "audio", "imu", "text", "mixed"),
    # One sample in eight has media, so most replicas and micro-batches have none.
    "few media": ("image", *["text"] * 7, "imu", *["text"] * 7),
}


def _video(seed: int) -> bytes:
    """Return one or two seconds of random frames, as an AVI file."""
    import av

    rng = np.random.default_rng(seed)
    out = io.BytesIO()
    with av.open(out, "w", format="avi") as container:
        stream = container.add_stream("mjpeg", rate=4)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuvj420p"
        for _ in range(4 * (1 + seed % 2)):
            picture = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return out.getvalue()


# Items yield one to three encoder inputs, so that ranks share those of a single item.
MAKERS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "image": ("png", lambda seed: png(seed, (8 * (1 + seed % 2), 8)), {}),
    "video": ("avi", _video, {}),
    "audio": ("flac", lambda seed: flac(seed, 0.5 * (1 + seed % 3)), {}),
    "imu": ("npy", lambda seed: npy(seed, 50 * (1 + seed % 3)), {"rate": 50}),
}


def make_parity_shards(folder: Path, tokenizer: str, job: str, media: str) -> str:
    """Write shards with the samples of `MEDIA[media]` for a job, and return their location."""
    if job == "pretrain":
        return make_shards(folder, tokenizer, 48, MEDIA[media], makers=MAKERS)
    # Pairs repeat from the third step on, so that the cached log-probabilities are used.
    count = 16 if job == "dpo" else 48
    return make_conversations(folder, tokenizer, count, MEDIA[media], pairs=job == "dpo", makers=MAKERS)


def parity_config(shards: str, tokenizer: str, job: str, media: str) -> RunConfig:
    """Configuration for one process in fp32, with a Llama of LAYERS layers and the modalities in the data."""
    config = make_config(shards, tokenizer, Path("unused"))
    config.job = job
    config.model.language_model.config = {
        **LLAMA,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        # Not divisible by any tensor-parallel size.
        "vocab_size": 29,
    }
    all_modalities = {**modalities(), "video": _video_section()}
    all_modalities["image"].options = {"max_grid": 2}
    config.model.modalities = {name: all_modalities[name] for name in _used(media)}
    config.model.global_batch_size = 8
    # A large eps keeps Adam's first steps from amplifying rounding in tiny gradients. Adapters start at zero, so their
    # gradients are especially small.
    config.model.optim.lr, config.model.optim.eps = 1e-3, 1e-5 if job == "pretrain" else 1e-4
    config.model.optim.weight_decay = 0.1
    config.data.seq_length = {"pretrain": 48, "sft": 64, "dpo": 128}[job]
    if job == "dpo":
        # Large, so that errors in the reference log-probabilities show in the loss.
        config.model.dpo.beta = 0.5
    return config


def _used(media: str) -> list[str]:
    """Modalities of the samples. Text-only data gets one modality, which trains but never occurs."""
    kinds = {"image", "audio"} if "mixed" in MEDIA[media] else set()
    return sorted((kinds | set(MEDIA[media])) & set(MAKERS)) or ["image"]


def _video_section() -> ModalityConfig:
    return ModalityConfig(
        encoder=EncoderConfig(type="videomae", config=VIDEOMAE, max_pieces_per_call=2),
        projector=ProjectorConfig(
            type="resampler", num_layers=2, num_tokens=3, hidden_size=16, num_attention_heads=4, ffn_multiplier=2
        ),
        options={"clip_seconds": 1.0},
        placeholder=SPECIAL[5],
    )
