"""Fixtures for every kind of test."""

import logging
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # so that tests import running_server and models


@pytest.fixture(autouse=True)
def _logging_stays_as_it_is():
    """What a library or a command sets up of logging in one test would hide the lines that another looks for."""
    root = logging.getLogger()
    level, handlers, disabled = root.level, list(root.handlers), root.manager.disable
    yield
    root.setLevel(level)
    root.handlers[:] = handlers
    logging.disable(disabled)
    for name, logger in list(root.manager.loggerDict.items()):
        if name.startswith("headrace") and isinstance(logger, logging.Logger):
            logger.disabled, logger.propagate = False, True
            logger.setLevel(logging.NOTSET)
