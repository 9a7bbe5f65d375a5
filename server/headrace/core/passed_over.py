"""Files that say nothing of a model, whoever finds them in its folder."""


def is_passed_over(name: str) -> bool:
    """Whether a file or folder of this name is hidden, temporary or a cache, and so says nothing of a model."""
    return name.startswith(".") or name.endswith((".tmp", ".part", "~")) or name == "__pycache__"
