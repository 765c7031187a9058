"""Lets the tests of this folder import ``tiny`` and ``commands``, which torchrun's processes import too."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
