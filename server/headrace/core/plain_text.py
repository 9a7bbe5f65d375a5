"""Text that can be written wherever people read it."""


def plain(text: str) -> str:
    """What stands for bytes that are no UTF-8, as in the name of a file, becomes question marks."""
    return text.encode(errors="replace").decode()
