"""``python -m conceptsplit_core``: train, sample, inspect and demo from a terminal."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
