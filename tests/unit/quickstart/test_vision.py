"""The small CLIP learns, and its folder loads like that of any CLIP vision tower."""

import numpy as np
import pytest
import torch

from examples.quickstart import corpus, media, vision
from megatron_anymal.config import EncoderConfig, ModalityConfig
from megatron_anymal.modalities import build_modality
from megatron_anymal.model.encoders import build_encoder

SIZES = media.QuickstartSizes(
    train_videos=1, held_out_videos=1, train_audio=1, held_out_audio=1, train_imu=1, held_out_imu=1
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    manifests = media.write_media(folder / "data", sizes=SIZES)
    text = corpus.write_lines(folder / "text.jsonl", corpus.text_lines(500))
    corpus.train_tokenizer([text], folder / "tokenizer")
    report = vision.train_image_encoder(
        manifests["image"]["train"], folder / "tokenizer", folder / "clip", steps=60, batch_size=32
    )
    return folder, manifests, report


def test_it_learns(made):
    report = made[2]
    assert np.mean(report["losses"][-5:]) < 0.75 * np.mean(report["losses"][:5])
    assert report["accuracy"] > 0.35


def test_the_folder_is_an_encoder_and_describes_its_pixels(made):
    folder, manifests, _ = made
    config = EncoderConfig(type="clip", path=str(folder / "clip"))
    modality = build_modality("image", ModalityConfig(encoder=config, options={"max_grid": 1}))
    encoder = build_encoder(config, modality.piece_shape)
    assert (encoder.feature_tokens, encoder.width) == (16, 96)
    pictures, _ = vision._read_images(manifests["image"]["train"])
    file = sorted((folder / "data" / "image_train").glob("*.png"))[0]
    seen = modality.load(file.read_bytes(), "png", {})
    torch.testing.assert_close(seen, vision._normalise(pictures[:1]))
    # The trained tower rather than a new one: position embeddings keep their large values.
    assert encoder.model.embeddings.position_embedding.weight.std() > 0.3


def test_pictures_of_one_digit_are_all_matches():
    labels = torch.tensor([0, 0, 1])
    match = torch.tensor([[9.0, 9.0, -9.0], [9.0, 9.0, -9.0], [-9.0, -9.0, 9.0]])
    # The minimum loss: the mean entropy of the targets.
    torch.testing.assert_close(
        vision._contrastive_loss(match, labels), torch.tensor(2 / 3 * np.log(2), dtype=torch.float32)
    )


def test_scatter_without_room_or_turn_changes_nothing(monkeypatch):
    monkeypatch.setattr(vision, "SMALLEST", 1.0)
    monkeypatch.setattr(vision, "LARGEST_TURN", 0.0)
    pictures = torch.rand(3, 1, 32, 32)
    torch.testing.assert_close(vision.scatter(pictures, np.random.default_rng(0)), pictures, atol=1e-4, rtol=1e-4)
