"""Fixtures for every kind of test, and how they all are run."""

import gc
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # so that tests import running_server and models

# The suite makes up the same examples each time, so that it fails for a change and never by chance. `make explore` has
# ten times as many, other ones each time. A test that wants more than others multiplies `settings().max_examples`.
STEADY = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("suite", derandomize=True, **STEADY)
settings.register_profile("explore", derandomize=False, max_examples=1000, print_blob=True, **STEADY)
settings.load_profile("suite")  # --hypothesis-profile comes later and wins


def pytest_collection_finish():
    """Keep what all imports have made out of the collector's way: many tests collect, with PyTorch 0.4 s each time."""
    gc.collect()
    gc.freeze()
