"""An adapter file gives the same picture in every host: this is the diffusers side, the host suite has the other."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("diffusers")

from tests.demo import one_picture


def test_diffusers_draws_the_committed_pair():
    drawn, kept = one_picture.draw().astype(int), one_picture.kept().astype(int)
    assert np.abs(kept[0] - kept[1]).mean() > 5, "LODA must show"
    assert np.abs(drawn - kept).max() <= 3 and np.abs(drawn - kept).mean() < 0.1
