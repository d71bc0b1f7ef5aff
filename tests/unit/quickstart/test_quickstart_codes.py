"""The quickstart's tokenizers: codebooks, pictures and sounds as codes and back, and the interface of a plug-in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from examples.quickstart import picture_codes, sound_codes
from examples.quickstart.corpus import DIGITS
from examples.quickstart.media import SOUNDS, enlarge, split_digits, synthesise
from examples.quickstart.vector_quantizer import VectorQuantizer
from megatron_anymal.data.media_tokenizers import open_tokenizer

SCANS, LABELS = (values[:200] for values in split_digits(0, 397)["train"])
DIGITS_OF_SCANS = [DIGITS[label] for label in LABELS]


@pytest.fixture(scope="module")
def scans() -> np.ndarray:
    return np.stack([np.asarray(enlarge(picture, 32)) for picture in SCANS])


@pytest.fixture(scope="module")
def sounds() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([synthesise(sound, rng) for sound in SOUNDS for _ in range(8)])


@pytest.fixture(scope="module")
def weights(scans: np.ndarray, sounds: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the weights of both tokenizers after a short training, where the plug-ins look for them."""
    folder = tmp_path_factory.mktemp("tokenizers")
    picture_codes.train_picture_tokenizer(scans, DIGITS_OF_SCANS, folder / picture_codes.WEIGHTS, steps=200)
    sound_codes.train_sound_tokenizer(sounds, folder / sound_codes.WEIGHTS, steps=60)
    return folder


def test_the_nearest_vector_is_found_and_passes_gradients_on() -> None:
    torch.manual_seed(0)
    quantizer, inputs = VectorQuantizer(7, 3).eval(), torch.randn(20, 3, requires_grad=True)
    quantizer.vectors.normal_()
    quantized, distance = quantizer(inputs)
    nearest = torch.cdist(inputs, quantizer.vectors).argmin(1)
    torch.testing.assert_close(quantized, quantizer.vectors[nearest])
    torch.testing.assert_close(distance, (quantizer.vectors[nearest] - inputs).square().mean())
    gradient = torch.randn(20, 3)
    quantized.backward(gradient)
    torch.testing.assert_close(inputs.grad, gradient)


def test_a_codebook_finds_the_centres_of_clusters() -> None:
    torch.manual_seed(0)
    centres = 10 * torch.randn(6, 4)
    quantizer = VectorQuantizer(6, 4)
    for _ in range(300):
        quantizer(centres[torch.randint(6, (120,))] + 0.1 * torch.randn(120, 4))
    distances = torch.cdist(centres, quantizer.vectors).min(1).values
    assert distances.max() < 0.3


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("picture", "examples.quickstart.picture_codes:PictureTokenizer"),
        ("sound", "examples.quickstart.sound_codes:SoundTokenizer"),
    ],
)
def test_it_is_a_plug_in(name: str, spec: str, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(weights)
    tokenizer = open_tokenizer(name, spec)
    assert tokenizer.kind == {"picture": "image", "sound": "audio"}[name]
    assert tokenizer.hash == open_tokenizer(name, spec).hash


def test_pictures_come_back(scans: np.ndarray, weights: Path) -> None:
    tokenizer = picture_codes.PictureTokenizer(weights / picture_codes.WEIGHTS)
    coloured = [*np.repeat(scans[:50, :, :, None], 3, axis=3)]
    codes = tokenizer.encode(coloured)
    assert all(one.shape == (1, 17) and one.min() >= 0 and one.max() < tokenizer.codebooks[0] for one in codes)
    # A larger version of the same picture has the same codes.
    [again] = tokenizer.encode([np.repeat(np.repeat(coloured[3], 2, axis=0), 2, axis=1)])
    assert np.array_equal(again, codes[3])
    small = scans[:50].reshape(50, 16, 2, 16, 2).mean((2, 4))
    drawn = np.stack([picture[:, :, 0] for picture in tokenizer.decode(codes)])
    error = ((drawn - small) ** 2).mean()
    assert error < 0.7 * small.var(0).mean()


def test_the_first_code_tells_the_digit(scans: np.ndarray, weights: Path) -> None:
    model = picture_codes.PictureTokenizer(weights / picture_codes.WEIGHTS)._model
    small = torch.from_numpy(scans.reshape(-1, 1, 16, 2, 16, 2).mean((3, 5)) / 255).float()
    with torch.no_grad():
        predictions = model.meaning(model.codebook.vectors[model.encode(small)[:, 0]]).argmax(1)
    assert (predictions.numpy() == LABELS).mean() > 0.5


def test_sounds_come_back(sounds: np.ndarray, weights: Path) -> None:
    tokenizer = sound_codes.SoundTokenizer(weights / sound_codes.WEIGHTS)
    codes = tokenizer.encode([*sounds])
    assert all(one.shape == (2, 16) and one.min() >= 0 and one.max() < 64 for one in codes)
    made = torch.from_numpy(np.stack(tokenizer.decode(codes)))
    assert made.shape == sounds.shape
    before, after = (sound_codes.spectrogram(one) for one in (torch.from_numpy(sounds), made))
    assert (after - before).square().mean() < 0.6 * before.var(0).mean()
    # The second codebook adds to the first.
    model = tokenizer._model
    whole = torch.from_numpy(np.stack(codes))
    with torch.no_grad():
        both = model.decode(whole)
        content = model.decoder(model.codebooks[0].vectors[whole[:, 0]].transpose(1, 2))
    assert (both - before).square().mean() < (content - before).square().mean()


def test_a_spectrogram_becomes_the_sound_that_it_was_made_of() -> None:
    tone = np.sin(2 * np.pi * 1000 * np.arange(8000) / 8000).astype(np.float32)[None]
    [back] = sound_codes.sound_of(sound_codes.spectrogram(torch.from_numpy(tone))).numpy()
    # Phases are unknown, so that the tone may jump; frames are 16 Hz apart.
    assert abs(np.abs(np.fft.rfft(back)).argmax() - 1000) <= 4
    assert back.std() == pytest.approx(tone.std(), rel=0.1)


def test_other_weights_have_another_hash(scans: np.ndarray, weights: Path, tmp_path: Path) -> None:
    picture_codes.train_picture_tokenizer(scans, DIGITS_OF_SCANS, tmp_path / "again", steps=200)
    picture_codes.train_picture_tokenizer(scans, DIGITS_OF_SCANS, tmp_path / "other", steps=2)
    hashes = [picture_codes.PictureTokenizer(tmp_path / name).hash for name in ("again", "other")]
    first = picture_codes.PictureTokenizer(weights / picture_codes.WEIGHTS).hash
    assert hashes[0] == first != hashes[1]
