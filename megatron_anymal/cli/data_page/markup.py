"""HTML of texts, numbers and tables. All text on the page is escaped here, since data may contain anything."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Sequence

# Characters shown as a visible sign.
_SIGNS = {" ": "\u00b7", "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d"}
# Unicode categories without a visible shape: controls, formats (among them those that reverse text), surrogates,
# private use, unassigned, line and paragraph separators.
_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def text(value: object) -> str:
    """Escape a text, also for attributes; characters that hide or reorder others become `\\u202e` and the like."""
    return html.escape("".join(c if c in "\n\t" else _seen(c) for c in str(value)))


def token_text(value: str) -> str:
    """Escape the text of a token, with signs for its white space."""
    return html.escape("".join(_SIGNS.get(c) or _seen(c) for c in value)) or "\u2205"


def _seen(character: str) -> str:
    if unicodedata.category(character) not in _UNSEEN:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode()


def short(value: object, limit: int = 160) -> str:
    """`text`, cut after `limit` characters."""
    whole = str(value)
    return text(whole if len(whole) <= limit else f"{whole[: limit - 1]}\u2026")


def count(value: float) -> str:
    """A whole number with separators: 1,234."""
    return f"{value:,.0f}"


def amount(value: float) -> str:
    """A number with three digits and its unit prefix: 1.23 M."""
    for prefix in ("", " k", " M", " G"):
        if abs(value) < 999.5:
            return f"{value:.3g}{prefix}"
        value /= 1000
    return f"{value:.3g} T"


def file_size(value: float) -> str:
    """Bytes with a binary unit: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"


def share(part: float, whole: float) -> str:
    """A percentage, or a dash if `whole` is 0."""
    return f"{part / whole:.1%}" if whole else "\u2013"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str, texts: int = 1) -> str:
    """A table of cells that are already HTML; it scrolls within the page if it is too wide.

    Args:
        texts: number of leading columns that hold text; the others hold numbers.
    """
    kinds = ["" if at < texts else " class=n" for at in range(len(head))]
    top = "".join(f"<th scope=col{kind}>{cell}</th>" for kind, cell in zip(kinds, head))
    body = "".join(
        f"<tr><th scope=row>{row[0]}</th>{''.join(f'<td{k}>{cell}</td>' for k, cell in zip(kinds[1:], row[1:]))}</tr>"
        for row in rows
    )
    # Not a <caption>, which would be cut off with a table that is too wide.
    return (
        f"<p class=quiet>{caption}</p><div class=scroll tabindex=0 role=region aria-label='{caption}'>"
        f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def notes(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of names and values, both already HTML."""
    return f"<dl>{''.join(f'<div><dt>{name}</dt><dd>{value}</dd></div>' for name, value in pairs)}</dl>"
