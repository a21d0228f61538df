"""Numbers as people read them: three digits and a unit."""

from __future__ import annotations

_DURATIONS = ((60.0, 1 / 60, "min"), (1.0, 1.0, "s"), (1e-3, 1e3, "ms"), (0.0, 1e6, "µs"))
_SIZES = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def duration(seconds: float | None) -> str:
    """Seconds as ``1.23 s``, ``45.6 ms`` or ``7.89 µs``; a dash for None."""
    if seconds is None:
        return "-"
    scale, unit = next((scale, unit) for least, scale, unit in _DURATIONS if seconds >= least)
    return f"{three_digits(seconds * scale)} {unit}"


def duration_range(low: float, high: float) -> str:
    """``45.6 - 47.2 ms``: both ends in the unit of the lower one."""
    scale, unit = next((scale, unit) for least, scale, unit in _DURATIONS if low >= least)
    return f"{three_digits(low * scale)} - {three_digits(high * scale)} {unit}"


def size(count: float | None) -> str:
    """Bytes as ``12.3 MiB``; a dash for None."""
    if count is None:
        return "-"
    for least, unit in _SIZES:
        if abs(count) >= least:
            return f"{three_digits(count / least)} {unit}"
    return f"{count:.0f} B"


def ratio(value: float | None) -> str:
    """``1.23 x``; a dash for None."""
    return "-" if value is None else f"{three_digits(value)} x"


def error(value: float | None) -> str:
    """A relative error such as ``3.1e-07``; a dash for None."""
    if value is None:
        return "-"
    return "0" if value == 0 else f"{value:.1e}"


def count(value: float | None) -> str:
    """A whole number with commas; a dash for None."""
    return "-" if value is None else f"{value:,.0f}"


def three_digits(value: float) -> str:
    """Three significant digits without an exponent: ``0.0123``, ``1.23``, ``123``, ``1,230``."""
    if value == 0:
        return "0"
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    if abs(value) >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.9995 else f"{value:.3g}"


def join(words: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
