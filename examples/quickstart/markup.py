"""Media and curves as parts of the quickstart's self-contained page."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_COLOURS = ("#1f618d", "#b9770e", "#196f3d", "#922b21", "#6c3483", "#5f6a6a")


def media_html(modality: str, data: bytes, extension: str) -> str:
    """A media item embedded in the page: an image, a video or audio player, or a plot of motion.

    Args:
        data: content of its file.
        extension: extension of the file's name, without the dot.
    """
    encoded = base64.b64encode(data).decode()
    if modality == "image":
        return f"<img src='data:image/{extension};base64,{encoded}' alt=''>"
    if modality == "video":
        return f"<video src='data:video/mp4;base64,{encoded}' autoplay loop muted controls></video>"
    if modality == "audio":
        return f"<audio src='data:audio/{extension};base64,{encoded}' controls></audio>"
    signals = np.load(io.BytesIO(data), allow_pickle=False)
    return lines([signals[:, channel].tolist() for channel in range(signals.shape[1])], 220, 110)


def curve(metrics: Path, title: str, what: str = "loss") -> str:
    """Plot all metrics named `what`/..., with their last values."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    names = sorted({key for row in rows for key in row if key.startswith(f"{what}/")})
    series = [[row[name] for row in rows if name in row] for name in names]
    legend = "  ".join(
        f"<b style='color:{_COLOURS[number % len(_COLOURS)]}'>{name.removeprefix(f'{what}/')}</b> {values[-1]:.3f}"
        for number, (name, values) in enumerate(zip(names, series))
    )
    low, high = min(0.0, *map(min, series)), max(map(max, series))
    return (
        f"<h3>{title}</h3><div>{what}, from {high:.2f} (top) to {low:.2f}, over {rows[-1]['step']} steps</div>"
        f"{lines(series, 640, 180, low)}<p>final values: {legend}</p>"
    )


def lines(series: Sequence[Sequence[float]], width: int, height: int, low: float | None = None) -> str:
    """Curves as an inline SVG, all on one scale that starts at `low` (default: their smallest value)."""
    low = min(min(s) for s in series) if low is None else low
    high = max(max(s) for s in series)
    drawn = []
    for number, values in enumerate(series):
        points = " ".join(
            f"{width * i / max(1, len(values) - 1):.1f},{height * (1 - (v - low) / max(1e-9, high - low)):.1f}"
            for i, v in enumerate(values)
        )
        drawn.append(f"<polyline points='{points}' fill=none stroke='{_COLOURS[number % len(_COLOURS)]}'/>")
    return f"<svg viewBox='-4 -4 {width + 8} {height + 8}' width={width}>{''.join(drawn)}</svg>"
