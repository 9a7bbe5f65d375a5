"""To which side each weight of a layer is rounded, so that the layer's answers change least: pure arithmetic.

Rounding every weight to the nearest step is the best for each alone. A layer's answer is a sum over many, and its
inputs are correlated: what one weight's rounding adds, the next ones can take back. So weights are rounded one input
after the other, and the error of each is spread over those that are still to come, as the inputs' covariance says (the
method of optimal brain surgeons, as GPTQ uses it). ``quantizing`` says what that is worth.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_DAMPING = 0.01  # of the mean variance: few examples know little about rare directions
_BLOCK = 64  # inputs between two updates of all that are to come: matrix products instead of many small steps


def rounded(weights: Floats, scales: Floats, covariance: Floats, most: int = 127) -> npt.NDArray[np.int8]:
    """Whole numbers from ``-most`` to ``most`` that stand for ``weights`` in steps of ``scales``.

    ``weights`` are [groups, outputs, inputs], ``scales`` can be broadcast to [groups, outputs, 1], and ``covariance``
    is [groups, inputs, inputs]: of the values that the layer is given.
    """
    groups, outputs, inputs = weights.shape
    steps = np.broadcast_to(scales, (groups, outputs, 1))[..., 0]
    order = np.argsort(-np.diagonal(covariance, axis1=1, axis2=2).mean(0), kind="stable")  # the loudest first
    left = np.array(weights[:, :, order], np.float32)
    spread = _spreading(covariance[:, order][:, :, order])
    chosen = np.empty((groups, outputs, inputs), np.int8)
    for start in range(0, inputs, _BLOCK):
        end = min(start + _BLOCK, inputs)
        errors = np.empty((groups, outputs, end - start), np.float32)
        for place in range(start, end):
            whole = np.clip(np.rint(left[:, :, place] / steps), -most, most)
            chosen[:, :, place] = whole
            error = (left[:, :, place] - whole * steps) / spread[:, None, place, place]
            errors[:, :, place - start] = error
            left[:, :, place + 1 : end] -= error[:, :, None] * spread[:, None, place, place + 1 : end]
        left[:, :, end:] -= errors @ spread[:, start:end, end:]
    result = np.empty_like(chosen)
    result[:, :, order] = chosen
    return result


def _spreading(covariance: Floats) -> Floats:
    """The upper Cholesky factor of the inverse: row i says how the error of input i goes to those after it."""
    matrix = covariance.astype(np.float64)
    variances = np.diagonal(matrix, axis1=1, axis2=2)
    mean = variances.mean(1)
    damping = np.where(mean > 0, _DAMPING * mean, 1.0)
    matrix = matrix + damping[:, None, None] * np.eye(matrix.shape[-1])
    factor: Floats = np.linalg.cholesky(np.linalg.inv(matrix)).transpose(0, 2, 1).astype(np.float32)
    return factor
