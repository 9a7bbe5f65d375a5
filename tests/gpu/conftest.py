"""These need an NVIDIA GPU; without one each of them skips itself, saying what is missing."""

from pathlib import Path

import pytest

from headrace_backends.base import BackendUnavailable
from headrace_backends.tensorrt.cuda import CudaDriver


def _why_not():
    try:
        return "" if CudaDriver().gpus() else "the NVIDIA driver shows no GPU"
    except BackendUnavailable as error:
        return str(error)


WHY_NOT = _why_not()


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        # Which version of which library is here is the machine's, and so is what that version warns of.
        item.add_marker(pytest.mark.filterwarnings("ignore"))
        if WHY_NOT:
            item.add_marker(pytest.mark.skip(reason=WHY_NOT))
