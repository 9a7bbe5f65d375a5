"""Fixtures for every kind of test."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # so that tests import running_server and models
