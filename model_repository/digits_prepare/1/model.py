"""Turns a grey picture of any size, white ink on black, into the 8x8 image that ``digits`` takes."""

from typing import Any

import numpy as np
import numpy.typing as npt

from headrace_backends.base import Array, InputError

SIDE = 8
FULL_INK = np.float32(16)  # what a cell wholly covered with ink holds in the data that ``digits`` learnt from
LEAST_INK = 32  # of 255: a picture with nothing brighter than this is taken for an empty one


class Model:
    """Crops to the ink, centres it in a square, and averages the square down to 8x8 cells."""

    def infer(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """From ``picture`` UINT8 [height, width] to ``image`` FP32 [1, 64], 0 for black to 16 for full ink.

        Raises:
            InputError: the picture has no ink or no pixels.
        """
        picture: npt.NDArray[Any] = inputs["picture"]
        if not picture.size:
            raise InputError(
                f"input 'picture' has shape {list(picture.shape)}, expected [height, width] of at least [1, 1]"
            )
        brightest = int(picture.max())
        if brightest < LEAST_INK:
            raise InputError(
                f"input 'picture' has no ink: its brightest pixel is {brightest}, "
                f"expected white ink on black, {LEAST_INK} or more"
            )
        ink = crop(picture, brightest // 4)
        covered = to_cells(ink.astype(np.float32))
        # Rounding may take a sum of shares a hair past the whole.
        image = np.minimum(covered * (FULL_INK / np.float32(brightest)), FULL_INK)
        return {"image": image.reshape(1, SIDE * SIDE)}


def crop(picture: npt.NDArray[Any], background: int) -> npt.NDArray[Any]:
    """The smallest part of ``picture`` with all of its pixels brighter than ``background``."""
    ink = picture > background
    rows = np.flatnonzero(ink.any(axis=1))
    columns = np.flatnonzero(ink.any(axis=0))
    return picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def to_cells(ink: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The mean of each of 8x8 cells of the square around ``ink``; around the ink, it is black."""
    square = max(ink.shape)
    height, width = ink.shape
    cells = cell_shares(height, square) @ ink @ cell_shares(width, square).T
    return cells.astype(np.float32, copy=False)


def cell_shares(pixels: int, square: int) -> npt.NDArray[np.float32]:
    """[8, pixels]: the share of each cell that each pixel covers, along one side of the square.

    The pixels lie in the middle of the side, and so do not need to be copied into a padded square.
    """
    cell = square / SIDE
    cell_starts = np.arange(SIDE)[:, np.newaxis] * cell
    pixel_starts = np.arange(pixels) + (square - pixels) / 2
    ends = np.minimum(cell_starts + cell, pixel_starts + 1)
    starts = np.maximum(cell_starts, pixel_starts)
    shares: npt.NDArray[np.float64] = np.maximum(ends - starts, 0) / cell
    return shares.astype(np.float32)
