"""Fixtures for every kind of test, and how they all are run."""

import gc
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # so that tests import running_server and models

# The suite makes up the same examples each time, so that it fails for a change and never by chance. `make explore` has
# ten times as many, other ones each time. A test that wants more than others multiplies `settings().max_examples`.
STEADY = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("suite", derandomize=True, **STEADY)
settings.register_profile("explore", derandomize=False, max_examples=1000, print_blob=True, **STEADY)
settings.load_profile("suite")  # --hypothesis-profile comes later and wins

LONG = ("faults", "system", "conformance", "unit")  # folders by how long a file takes


def pytest_collection_modifyitems(config, items):
    """Where files are dealt out to several processes, let those come first that take long: so all end together."""
    if hasattr(config, "workerinput"):
        here = Path(__file__).parent
        places = {name: place for place, name in enumerate(LONG)}
        items.sort(key=lambda item: places.get(item.path.relative_to(here).parts[0], len(LONG)))


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable():
    """Reports travel between processes as UTF-8, and some tests are about texts that are none."""
    return printable((yield))


def printable(value):
    """The same with escapes for what cannot be encoded."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {printable(key): printable(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(printable, value))
    return value


def pytest_collection_finish():
    """Keep what all imports have made out of the collector's way: many tests collect, with PyTorch 0.4 s each time."""
    gc.collect()
    gc.freeze()
