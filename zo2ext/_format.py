"""Formats numbers, sizes and times for people, and text for tokenizers."""

from __future__ import annotations


def gib(nbytes: int) -> str:
    """Return `nbytes` as "1.50 GiB", or in MiB below a tenth of a GiB."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 / 10 else f"{nbytes / 2**20:.2f} MiB"


def seconds_text(value: float) -> str:
    """Return `value` seconds as "1.23 s", or in ms below 0.1 s."""
    return f"{three(value)} s" if value >= 0.1 or value == 0 else f"{three(value * 1e3)} ms"


def three(value: float) -> str:
    """Return `value` with three significant digits, or all digits before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Return a table as text with right-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def without_surrogates(text: str) -> str:
    """Return `text` with U+FFFD for halves of characters, which no tokenizer accepts.

    Truncated JSON strings have them, and command lines that are not UTF-8.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
