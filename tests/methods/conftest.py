"""Lets the tests of this folder import ``filled`` of tests/models."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "models")]
