"""The part of the sampler matrix that every run keeps: all samplers with one scheduler and the options in turn, all
schedulers with one sampler. The whole of it is `python -m tests.host.matrix`, its table
docs/tables/samplers.md.
"""

from __future__ import annotations

import pytest
import torch

from ..matrix import OPTIONS, SAMPLER, SCHEDULER, Case, cases, examine
from .conftest import run
from .helpers import encode, sample, sample_loda

CASES = list(cases())
SAMPLERS = [case.sampler for case in CASES if case.scheduler == SCHEDULER and not case.option]


def reduced():
    """Every sampler once, plain or with an option, in turn; every other scheduler plain."""
    options = ["", *OPTIONS]
    for number, sampler in enumerate(SAMPLERS):
        yield Case(sampler, SCHEDULER, options[number % len(options)])
    for case in CASES:
        if case.sampler == SAMPLER and case.scheduler != SCHEDULER and not case.option:
            yield case


@pytest.fixture
def marked(loaded):
    sd = loaded("tiny")
    return sd.model, run("ConceptSplitMarkWords", clip=sd.clip, words="dog, cat")[0]


@pytest.mark.parametrize("case", reduced(), ids=lambda case: case.name.replace(" / ", "-"))
def test_combination(marked, case):
    assert not examine(*marked, case).faults


def idle(marked, steps, **options):
    """LODA that finds nothing to gain: what is left is who takes its steps."""
    conds = encode(marked[1], "a photo of a dog and a cat"), encode(marked[1], "blurry")
    options = {"steps": 4, "threshold": 1e-12, "afg": False, **options}
    return sample_loda(marked[0], *conds, loda_steps=steps, **options)[0]


@pytest.mark.parametrize("sampler", ["uni_pc", "uni_pc_bh2"])
def test_uni_pc_is_not_left_with_a_single_step(marked, sampler):
    """Of a single step it takes none and returns the noise; that step is an Euler step then."""
    almost = idle(marked, 3, sampler_name=sampler)
    assert torch.equal(almost, idle(marked, 4, sampler_name=sampler)), "all four steps are Euler steps"


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name.endswith("_cfg_pp")])
def test_cfg_pp_samplers_take_cfg_pp_steps(marked, sampler):
    """With the low guidance scale that CFG++ wants, plain Euler steps would hardly follow the prompt."""
    conds = encode(marked[1], "a photo of a dog and a cat"), encode(marked[1], "blurry")
    options = {"sampler_name": sampler, "cfg": 1.5}
    own = {"dpmpp_2m_cfg_pp": "euler_cfg_pp", "gradient_estimation_cfg_pp": "euler_cfg_pp"}
    own |= {"res_multistep_cfg_pp": "euler_cfg_pp", "res_multistep_ancestral_cfg_pp": "euler_ancestral_cfg_pp"}
    wanted = sample(marked[0], *conds, steps=4, **{**options, "sampler_name": own.get(sampler, sampler)})
    assert torch.equal(idle(marked, 4, **options), wanted)
    assert not torch.equal(wanted, idle(marked, 4, **{**options, "sampler_name": "euler"}))
