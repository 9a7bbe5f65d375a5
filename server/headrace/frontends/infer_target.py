"""The model and version that an inference URL names."""

from functools import lru_cache
from urllib.parse import unquote_to_bytes

CACHED_URL_BYTES = 512


def infer_target(url: bytes) -> tuple[str, str] | None:
    """The model and version that an inference URL names; None for any other URL."""
    return _cached_target(url) if len(url) <= CACHED_URL_BYTES else _parse_target(url)


def _parse_target(url: bytes) -> tuple[str, str] | None:
    parts = url.split(b"?", 1)[0].split(b"/")
    if len(parts) not in (5, 7) or parts[:3] != [b"", b"v2", b"models"] or parts[-1] != b"infer":
        return None
    if len(parts) == 7 and parts[4] != b"versions":
        return None
    try:
        model = unquote_to_bytes(parts[3]).decode()
        version = unquote_to_bytes(parts[5]).decode() if len(parts) == 7 else ""
    except UnicodeDecodeError:
        return None
    if not model or (len(parts) == 7 and not version):
        return None
    return model, version


_cached_target = lru_cache(maxsize=4096)(_parse_target)
