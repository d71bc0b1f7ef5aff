"""Judges of what the quickstart's any-to-any model makes: classifiers of scikit-learn.

They are trained on the held-out scans and sounds, which neither the tokenizers nor the model have seen.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

# Side of the pictures that a classifier sees, and of a scan in them.
SIDE, SCAN = 16, 12
# Magnitudes are averaged over this many equal ranges of frequency.
BANDS = 25


class DigitJudge:
    """Tells which digit a picture shows, wherever in it the digit is."""

    def __init__(self, manifest: Path):
        """Train on the scans of a manifest of the quickstart."""
        from sklearn.svm import SVC

        lines = _read(manifest)
        scans = [read_picture(_file(manifest, line)) for line in lines]
        # The penalty and the kernel's width are scikit-learn's defaults, except that errors cost ten times as much.
        self._classifier = SVC(C=10.0)
        self._classifier.fit(np.stack([_centred(scan, SCAN) for scan in scans]), [line["facts"][0] for line in lines])

    def name(self, picture: np.ndarray, side: int = SCAN) -> str:
        """Name of the digit.

        Args:
            picture: [height, width] uint8.
            side: size to which it is resized; SIDE for frames of videos, in which digits are smaller.
        """
        return str(self._classifier.predict(_centred(picture, side)[None])[0])

    def accuracy(self, manifest: Path) -> float:
        """Share of a manifest's scans that are recognized."""
        lines = _read(manifest)
        scans = np.stack([_centred(read_picture(_file(manifest, line)), SCAN) for line in lines])
        return float(self._classifier.score(scans, [line["facts"][0] for line in lines]))


class SoundJudge:
    """Tells which sound a recording of one second has."""

    def __init__(self, manifest: Path):
        """Train on the recordings of a manifest of the quickstart."""
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
        from sklearn.svm import SVC

        lines = _read(manifest)
        waves = [soundfile.read(_file(manifest, line))[0] for line in lines]
        self._classifier = make_pipeline(StandardScaler(), SVC(C=10.0))
        self._classifier.fit(np.stack([_bands(wave) for wave in waves]), [line["facts"][0] for line in lines])

    def name(self, wave: np.ndarray) -> str:
        """Name of the sound of a recording, [samples], at the rate of the quickstart's recordings."""
        return str(self._classifier.predict(_bands(wave)[None])[0])

    def accuracy(self, manifest: Path) -> float:
        """Share of a manifest's recordings that are recognized."""
        lines = _read(manifest)
        waves = np.stack([_bands(soundfile.read(_file(manifest, line))[0]) for line in lines])
        return float(self._classifier.score(waves, [line["facts"][0] for line in lines]))


def read_picture(path: Path) -> np.ndarray:
    """A picture, [height, width] uint8, grey."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("L"))


def centre(picture: np.ndarray) -> np.ndarray:
    """Centre of the light in a picture, [row, column], as shares of its height and width."""
    light = picture.astype(np.float64) + 1e-6
    rows, columns = (np.arange(size) + 0.5 for size in light.shape)
    weighted = np.array([(light.sum(1) * rows).sum(), (light.sum(0) * columns).sum()]) / light.sum()
    return weighted / np.array(light.shape)


def _centred(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture resized to `side`, its centre of light moved to the middle of SIDE x SIDE; flattened, in 0 to 1."""
    resized = np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BOX), np.float32) / 255
    canvas = np.zeros((SIDE, SIDE), np.float32)
    canvas[:side, :side] = resized
    shift = np.rint(SIDE / 2 - centre(canvas * 255) * SIDE).astype(int)
    return np.roll(canvas, shift, (0, 1)).ravel()


def _bands(wave: np.ndarray) -> np.ndarray:
    """Mean and deviation over time of the logarithms of magnitudes, by range of frequency."""
    frames = np.lib.stride_tricks.sliding_window_view(wave, 400)[::200]
    magnitudes = np.abs(np.fft.rfft(frames * np.hanning(400)))[:, : BANDS * 8]
    logarithms = np.log(magnitudes.reshape(len(frames), BANDS, 8).mean(2) + 0.3)
    return np.concatenate([logarithms.mean(0), logarithms.std(0)])


def _read(manifest: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]


def _file(manifest: Path, line: dict[str, Any]) -> Path:
    return manifest.parent / line["parts"][0]["media"]
