"""Lets `import benchmarks` mean the repository's package here.

pytest's importlib mode names the modules of this folder `benchmarks.test_…` after the folder's own name, and so
puts a package `benchmarks` in the way of the real one.
"""

import sys
from pathlib import Path

_REAL = str(Path(__file__).parents[2] / "benchmarks")
_shadow = sys.modules.get("benchmarks")
if _shadow is not None and _REAL not in getattr(_shadow, "__path__", ()):
    _shadow.__path__ = [_REAL, *getattr(_shadow, "__path__", ())]
