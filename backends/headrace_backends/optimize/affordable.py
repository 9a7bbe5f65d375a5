"""By how many examples a model is judged: as many as there is time and memory for. A pure decision."""

MOST_EXAMPLES = 256  # in each half: enough to tell a hundredth
FEWEST_EXAMPLES = 32
_SHARE = 0.1  # of the search's time, for the reference's answers to one half: each candidate is asked them too
_MOST_BYTES = 512 * 1024 * 1024  # of one half's inputs and answers


def affordable(limit_s: float, answer_s: float, example_bytes: int) -> int:
    """How many examples there may be in a half, where one takes so long and, with its answer, so many bytes."""
    by_time = limit_s * _SHARE / answer_s if answer_s else MOST_EXAMPLES
    by_memory = _MOST_BYTES / example_bytes if example_bytes else MOST_EXAMPLES
    return max(FEWEST_EXAMPLES, int(min(MOST_EXAMPLES, by_time, by_memory)))
