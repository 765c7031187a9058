"""``python -m diffrep`` and ``torchrun -m diffrep``."""

from diffrep.cli import main

main()
