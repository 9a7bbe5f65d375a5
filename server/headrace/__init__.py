"""Headrace: a deep-learning inference server."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace_backends.optimize.library import Optimized, optimize

__version__ = "0.1.0"
__all__ = ["Optimized", "__version__", "optimize"]


def __getattr__(name: str) -> Any:
    """What needs the frameworks is imported when it is asked for."""
    if name in ("Optimized", "optimize"):
        from headrace_backends.optimize import library

        return getattr(library, name)
    raise AttributeError(f"module 'headrace' has no attribute '{name}'")
