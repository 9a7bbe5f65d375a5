"""Which of the named signatures of a TensorFlow or TensorFlow Lite file is served."""

from collections.abc import Sequence

from headrace_backends.base import LoadError

DEFAULT_SIGNATURE = "serving_default"


def chosen_signature(offered: Sequence[str], wanted: object, where: str) -> str | None:
    """The one that the configuration wants, else the one that is meant for serving; None where there is none at all.

    Raises:
        LoadError: there is no such signature, or several could be meant.
    """
    listed = ", ".join(sorted(offered))
    if wanted is not None:
        if wanted not in offered:
            raise LoadError(f"parameters.signature is {wanted!r}, and '{where}' has {listed or 'none'}")
        return str(wanted)
    if DEFAULT_SIGNATURE in offered:
        return DEFAULT_SIGNATURE
    if len(offered) > 1:
        raise LoadError(f"'{where}' has the signatures {listed}; choose one with parameters.signature")
    return offered[0] if offered else None
