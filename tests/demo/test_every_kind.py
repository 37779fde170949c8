"""Each kind learns and draws the same in every host: this is the diffusers side, the host suite has the other."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("diffusers")

from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.kinds import FILES
from tests.demo import every_kind

KEPT, FACTS = every_kind.kept()


@pytest.fixture(scope="module")
def model():
    return host.load_model("demo")


def test_every_kind_is_kept_and_differs_from_the_plain_picture():
    assert list(KEPT) == ["plain", *FILES]
    for name, picture in KEPT.items():
        others = [np.abs(picture.astype(int) - other).mean() for key, other in KEPT.items() if key != name]
        assert min(others) > 1, f"{name} looks like another"


@pytest.mark.parametrize("kind", FILES)
def test_diffusers_learns_and_draws_what_is_kept(model, kind):
    adapter = every_kind.learned(model, kind)
    np.testing.assert_allclose(every_kind.measured(adapter.parameters()), FACTS["measured"][kind], rtol=0.02, atol=0.02)
    difference = np.abs(every_kind.drawn(model, adapter).astype(int) - KEPT[kind])
    assert difference.mean() < 0.2
