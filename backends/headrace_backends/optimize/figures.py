"""Numbers as people read them: in the report, on the terminal and in summaries alike."""

from math import floor, isfinite, log10

NOTHING = "-"  # what stands in tables where nothing was measured. ASCII, as all here: terminals may know no more
_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits, no exponent where people read none, thousands apart."""
    if value is None:
        return NOTHING
    if not isfinite(value):
        return str(value)
    if not value:
        return "0"
    magnitude = floor(log10(abs(value)))
    if magnitude < -4 or magnitude > 12:
        return f"{value:.{digits - 1}e}"
    rounded = round(value, digits - 1 - magnitude)
    return f"{rounded:,.{max(0, digits - 1 - floor(log10(abs(rounded))))}f}"


def error(value: float | None) -> str:
    """An error, an agreement or a cosine: four digits tell 0.9998 from 1, and zeros at the end tell nothing."""
    digits, exponent, power = number(value, 4).partition("e")
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + exponent + power


def times(value: float | None) -> str:
    """A speed-up."""
    return NOTHING if value is None else f"{number(value, 3 if abs(value) >= 1 else 2)} x"


def milliseconds(value: float | None) -> str:
    """A latency; in microseconds where it is that short."""
    if value is None:
        return NOTHING
    return f"{number(value * 1e3)} us" if 0 < value < 0.0995 else f"{number(value)} ms"


def per_second(value: float | None) -> str:
    """A throughput."""
    return NOTHING if value is None else f"{number(value)}/s"


def size(count: int | None) -> str:
    """Bytes, in powers of a thousand."""
    if count is None:
        return NOTHING
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(_BYTE_UNITS) - 1:
        value, unit = value / 1e3, unit + 1
    return f"{count} B" if not unit else f"{number(value)} {_BYTE_UNITS[unit]}"


def duration(seconds: float | None) -> str:
    """A time span in the two largest units that it has."""
    if seconds is None or not isfinite(seconds):
        return NOTHING
    if seconds < 59.5:
        return f"{number(seconds, 2)} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole % 60 else "")
    return f"{whole // 3600} h" + (f" {whole % 3600 // 60} min" if whole % 3600 >= 60 else "")
