"""``python -m fedcil``."""

from fedcil.cli import main

main()
