"""A short soak; the long one is `python -m tests.host.soak`."""

from __future__ import annotations

from ..soak import Soak


def test_twelve_mixed_prompts():
    soak = Soak(12, seed=1)
    try:
        soak.run()
        report = soak.report()
    finally:
        soak.close()
    assert not report["faults"] and report["prompts"] == 12
