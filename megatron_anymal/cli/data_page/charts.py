"""Charts without a script: plots in a frame with axes, histograms, and bars in tables.

Labels are HTML around the plot, so that they keep their size on a narrow screen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_anymal.cli.data_page.markup import amount, count, text

_BINS = 24
# Number of styles in style.py; series also differ by dashes, not by colour alone.
STYLES = 6


def frame(plot: str, label: str, x: tuple[str, str, str], y: tuple[str, str, str], caption: str = "") -> str:
    """A plot with its axes.

    Args:
        plot: HTML that fills the frame.
        label: text that a screen reader reads out instead of the plot.
        x: title of the axis, and its values at the left and the right end.
        y: title of the axis, and its values at the bottom and the top.
    """
    shown = f"<figcaption>{caption}</figcaption>" if caption else ""
    return (
        f"<figure class=plot>{shown}<div class=axes><div class=y><span>{y[2]}</span><em>{y[0]}</em><span>{y[1]}</span>"
        f"</div><div class=area role=img aria-label='{label}'>{plot}</div><div class=x><span>{x[1]}</span>"
        f"<em>{x[0]}</em><span>{x[2]}</span></div></div></figure>"
    )


def histogram(values: np.ndarray, title: str, unit: str, mark: float = 0.0, mark_name: str = "") -> str:
    """A histogram of samples.

    Args:
        values: [n] numbers of at least 0, n > 0.
        title: HTML above it.
        unit: of the values.
        mark: a value to draw a line at, if it is within the range; 0: none.
        mark_name: description of the line.
    """
    low, high = float(values.min()), float(values.max())
    whole = np.issubdtype(values.dtype, np.integer)
    shown = count if whole else amount
    if low == high:
        return f"<figure class=plot><figcaption>{title}</figcaption><p>{shown(low)} {unit} in every sample</p></figure>"
    bins = int(min(_BINS, high - low + 1)) if whole else _BINS
    # Bars of whole numbers are centred on them.
    counts, edges = np.histogram(values, bins, (low - 0.5, high + 0.5) if whole else (low, high))
    tallest = int(counts.max())
    bars = "".join(
        f"<i style='height:{100 * n / tallest:.1f}%' title='{shown(a)} to {shown(b)} {unit}: {count(n)}'></i>"
        for n, a, b in zip(counts, np.ceil(edges) if whole else edges, np.floor(edges[1:]) if whole else edges[1:])
    )
    at = (mark - edges[0]) / (edges[-1] - edges[0])
    line = f"<hr style='left:{100 * at:.1f}%' title='{mark_name}'>" if mark and 0 <= at <= 1 else ""
    middle, p95 = np.median(values), np.percentile(values, 95)
    numbers = f"min {shown(low)}, median {shown(middle)}, p95 {shown(p95)}, max {shown(high)} {unit}"
    return frame(
        f"<div class=bars>{bars}</div>{line}",
        f"histogram of {count(len(values))} samples: {numbers}",
        (unit, shown(low), shown(high)),
        ("samples", "0", count(tallest)),
        f"{title}<br><small>{numbers}</small>",
    )


def curves(series: Sequence[np.ndarray], names: Sequence[str], borders: Sequence[float] = (), points: int = 240) -> str:
    """Curves as an SVG that stretches to its frame.

    Args:
        series: [n] values of each curve.
        names: of the curves.
        borders: positions of vertical lines, between 0 and 1.
        points: curves are thinned to at most this many.
    """
    low, high = span(series)
    drawn = [f"<path class=border d='M{1000 * at:.0f} 0V100'/>" for at in borders]
    for number, (values, name) in enumerate(zip(series, names)):
        thin = values[:: max(1, -(-len(values) // points))]
        x = np.round(np.linspace(0, 1000, len(thin))).astype(int)
        y = np.round(100 * (1 - (thin - low) / (high - low)), 1)
        path = "M" + "L".join(f"{a} {b:g}" for a, b in zip(x, y))
        drawn.append(f"<path class='line s{number % STYLES}' d='{path}'><title>{text(name)}</title></path>")
    return f"<svg viewBox='0 0 1000 100' preserveAspectRatio=none aria-hidden=true>{''.join(drawn)}</svg>"


def span(series: Sequence[np.ndarray]) -> tuple[float, float]:
    """The smallest and the largest value of several curves; at least a millionth apart."""
    low, high = float(min(s.min() for s in series)), float(max(s.max() for s in series))
    return low, max(high, low + 1e-6)


def legend(names: Sequence[str]) -> str:
    """Names with the styles of their curves."""
    line = "<svg viewBox='0 0 24 8' width=24 height=8 aria-hidden=true><path class='line s{}' d='M0 4H24'/></svg>"
    return (
        f"<p class=legend>{' '.join(f'<span>{line.format(n)} {text(name)}</span>' for n, name in enumerate(names))}</p>"
    )


def bar(part: float, whole: float, shown: str) -> str:
    """A bar for a table cell, with its value beside it."""
    width = 100 * part / whole if whole else 0.0
    return f"<span class=bar><i style='width:{width:.1f}%'></i></span> {shown}"


def stacked(parts: Sequence[tuple[str, float]], whole: float) -> str:
    """Parts of a whole side by side; each part gives the CSS class that styles it."""
    drawn = "".join(f"<i class={look} style='width:{100 * n / whole:.2f}%'></i>" for look, n in parts if n)
    return f"<span class='bar wide'>{drawn}</span>"
