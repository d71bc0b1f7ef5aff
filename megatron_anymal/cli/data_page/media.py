"""Media as their encoders receive them: tiles, frames, spectrograms, curves."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence

import numpy as np

from megatron_anymal.cli.data_page.charts import curves, frame, legend, span
from megatron_anymal.cli.data_page.contents import ShownMedia
from megatron_anymal.cli.data_page.markup import amount, count, file_size, short, text
from megatron_anymal.data.configured_modality import LoadedModality
from megatron_anymal.modalities import Modality
from megatron_anymal.modalities.audio import AudioModality
from megatron_anymal.modalities.image import ImageModality
from megatron_anymal.modalities.imu import IMUModality
from megatron_anymal.modalities.libraries import library
from megatron_anymal.modalities.video import VideoModality

# Media items, pictures and spectrograms of a sample that are shown; the others are only counted.
ITEMS, PICTURES, WINDOWS = 4, 20, 4
# Largest side of a picture in pixels: of a single one, and of one among several.
ALONE, AMONG = 224, 96
# Pictures up to this side keep their pixels.
_COARSE = 32
# Columns of a spectrogram.
_COLUMNS = 320
# Formats of the two numbers of `Modality.probe`.
_SIZES: dict[type, str] = {
    ImageModality: "{:.0f} x {:.0f} pixels",
    VideoModality: "{:.6g} s, {:.6g} frames/s",
    AudioModality: "{:.6g} s, {:,.0f} Hz",
    IMUModality: "{:.6g} s, {:.6g} Hz",
}
# Dark blue, green and yellow, readable without colour: lightness rises with the value.
_COLOURS = np.array([[18, 24, 66], [38, 88, 130], [52, 150, 128], [160, 200, 74], [250, 240, 120]], np.float32)
_AXES = ("accelerometer x", "accelerometer y", "accelerometer z", "gyroscope x", "gyroscope y", "gyroscope z")


def item(media: ShownMedia, entry: LoadedModality, number: int, anchor: str, room: float) -> str:
    """One media item of a sample: its description and its encoder inputs.

    Args:
        number: number of the item in its sample, from 0.
        anchor: start of its link target.
        room: share of the sample's pictures that it may show.
    """
    name = media.planned.modality
    known = (words for kind, words in _SIZES.items() if isinstance(entry.modality, kind))
    sizes = next(known, "size {:.6g}, {:.6g}").format(*media.size)
    file = f"<code>{short(media.part.media)}</code>, " if media.part else ""
    given = "".join(f", {text(k)}={short(v)}" for k, v in media.part.attributes.items()) if media.part else ""
    shape = " x ".join(map(str, media.pieces.shape[1:]))
    soft = media.planned.pieces * entry.soft_tokens_per_piece
    return (
        f"<div id='{anchor}-{number}'><h4>{text(name)} {number + 1}</h4><p class=quiet>{file}{sizes}{given}, "
        f"{file_size(media.file_bytes)}; {count(len(media.pieces))} encoder input(s) of {shape}, {count(soft)} soft "
        f"tokens</p>{_inputs(media, entry.modality, room)}</div>"
    )


def _inputs(media: ShownMedia, modality: Modality, room: float) -> str:
    pictures = round(PICTURES * room)
    if isinstance(modality, ImageModality):
        return _tiles(media, modality, pictures)
    if isinstance(modality, VideoModality):
        return _clips(media, modality, pictures)
    if isinstance(modality, AudioModality):
        return _windows(media, modality, max(1, round(WINDOWS * room)))
    if isinstance(modality, IMUModality):
        return _motion(media, modality)
    return _any(media, pictures)


def _tiles(media: ShownMedia, modality: ImageModality, room: int) -> str:
    """Tiles in their grid, after the overview."""
    tiles = modality.pixels.denormalise(media.pieces)
    grid = math.isqrt(len(tiles))
    if len(tiles) == 1:
        return _grid([(_picture(tiles[0], "the whole image", ALONE), "")], 1, 0)
    overview = len(tiles) - grid * grid
    names = [f"tile {at + 1}, row {at // grid + 1}, column {at % grid + 1}" for at in range(grid * grid)]
    shown = [(_picture(tile, name, AMONG), "") for tile, name in zip(tiles[overview:], names)]
    first = _grid([(_picture(tiles[0], "overview", ALONE), "overview")], 1, 0) if overview else ""
    return f"<div class=beside>{first}{_grid(shown[:room], grid, len(shown) - room)}</div>"


def _clips(media: ShownMedia, modality: VideoModality, room: int) -> str:
    """Frames with their times, one row per clip on a wide screen."""
    frames = modality.pixels.denormalise(media.pieces)
    times = modality.sample_times(media.size[0], len(frames))
    flat = [(clip, at) for clip in range(frames.shape[0]) for at in range(frames.shape[1])]
    shown = [
        (_picture(frames[clip, at], f"clip {clip + 1}, frame {at + 1}", AMONG), f"{times[clip, at]:.2f} s")
        for clip, at in flat[:room]
    ]
    return _grid(shown, min(4, frames.shape[1]), len(flat) - room)


def _windows(media: ShownMedia, modality: AudioModality, room: int) -> str:
    """Log-mel spectrograms, one plot per window."""
    decibels = media.pieces * modality.options.mel_std + modality.options.mel_mean
    low, high = float(decibels.min()), float(decibels.max())
    extractor, seconds = modality.extractor, modality.samples / modality.sampling_rate
    plots = []
    for number, window in enumerate(decibels[:room]):
        # The first channel holds the whole window; a fused one has details of it in the others.
        mel = window[0] if window.ndim == 3 else window
        rows = _thinned(mel).T[::-1]
        start = number * seconds
        plots.append(
            frame(
                _picture(_coloured(rows, low, high), f"log-mel window {number + 1}", _COLUMNS),
                f"log-mel spectrogram of window {number + 1}",
                ("seconds", f"{start:g}", f"{start + seconds:g}"),
                ("Hz (mel)", count(extractor.frequency_min), count(extractor.frequency_max)),
                f"log-mel, {mel.shape[1]} bands, dark {low:.0f} dB to light {high:.0f} dB",
            )
        )
    return "".join(plots) + _more(len(decibels) - room, "windows")


def _motion(media: ShownMedia, modality: IMUModality) -> str:
    """Curves of accelerometer and gyroscope over all windows."""
    signal = np.concatenate(list(media.pieces), axis=1)
    windows, seconds = len(media.pieces), signal.shape[1] / modality.options.rate
    borders = [at / windows for at in range(1, windows)]
    unit = "normalised" if modality.options.mean or modality.options.std else "as in the file"
    plots = ""
    for axes in (slice(0, 3), slice(3, 6)):
        names, own = _AXES[axes], list(signal[axes])
        low, high = span(own)
        plots += frame(
            curves(own, names, borders),
            f"curves of {', '.join(names)}",
            ("seconds", "0", f"{seconds:g}"),
            (unit, amount(low), amount(high)),
        ) + legend(names)
    return plots


def _any(media: ShownMedia, room: int) -> str:
    """Pieces of a plug-in's modality: a picture of numbers if they have two dimensions, else a curve."""
    pieces = media.pieces
    low, high = float(pieces.min()), float(pieces.max())
    numbers = f"<p class=quiet>numbers from {amount(low)} to {amount(high)}, mean {amount(float(pieces.mean()))}</p>"
    if pieces.ndim < 3:
        series = [piece.reshape(-1) for piece in pieces[:3]]
        names = [f"input {at + 1}" for at in range(len(series))]
        plot = curves(series, names)
        y = (amount(low), amount(high))
        return numbers + frame(plot, "numbers of the input", ("number", "0", count(series[0].size - 1)), ("value", *y))
    shown = [
        (_picture(_coloured(piece.reshape(-1, *piece.shape[-2:])[0], low, high), f"input {at + 1}", AMONG), "")
        for at, piece in enumerate(pieces[:room])
    ]
    return numbers + _grid(shown, 4, len(pieces) - room)


def _thinned(mel: np.ndarray) -> np.ndarray:
    """Means over neighbouring frames, [at most _COLUMNS, bands]."""
    if len(mel) <= _COLUMNS:
        return mel
    edges = np.linspace(0, len(mel), _COLUMNS + 1).astype(int)
    return np.add.reduceat(mel, edges[:-1]) / np.diff(edges)[:, None]


def _coloured(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Numbers as colours, [height, width, 3] uint8."""
    at = np.clip((values - low) / max(high - low, 1e-9), 0, 1) * (len(_COLOURS) - 1)
    lower = np.minimum(at.astype(int), len(_COLOURS) - 2)
    mixed = _COLOURS[lower] + (at - lower)[..., None] * (_COLOURS[lower + 1] - _COLOURS[lower])
    return mixed.round().astype(np.uint8)


def _picture(pixels: np.ndarray, name: str, side: int) -> str:
    """An inline picture of [height, width, 3] uint8; a large one is scaled down to `side`."""
    picture = library("PIL.Image").fromarray(np.ascontiguousarray(pixels))
    coarse = max(picture.size) <= _COARSE
    picture.thumbnail((side, side))
    out = io.BytesIO()
    picture.save(out, "PNG" if coarse else "JPEG", quality=75, optimize=True)
    kind, data = "png" if coarse else "jpeg", base64.b64encode(out.getvalue()).decode()
    look = " class=coarse" if coarse else ""
    return (
        f"<img{look} alt='{name}' width={picture.width} height={picture.height} src='data:image/{kind};base64,{data}'>"
    )


def _grid(pictures: Sequence[tuple[str, str]], columns: int, hidden: int) -> str:
    """Pictures in columns, each with a caption."""
    width = 14 if columns == 1 else 7
    cells = "".join(
        f"<figure>{picture}{f'<figcaption>{caption}</figcaption>' if caption else ''}</figure>"
        for picture, caption in pictures
    )
    look = f"grid-template-columns:repeat({columns},minmax(0,{width}em))"
    return f"<div class=pictures style='{look}'>{cells}</div>{_more(hidden, 'pictures')}"


def _more(hidden: int, what: str) -> str:
    return f"<p class=quiet>{count(hidden)} more {what} not shown</p>" if hidden > 0 else ""
