"""Options: one field each. Their checks, their tables, and that they need no torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.options import defaults, from_values, option, options
from conceptsplit_core.settings import SEEDS, LoaderConfig, LodaConfig, SampleConfig, TrainConfig, seeds
from tools.write_tables import node_table, pages

ROOT = Path(__file__).parents[2]
CONFIGS = (LodaConfig, TrainConfig, LoaderConfig, SampleConfig)


def test_settings_need_no_torch():
    code = "import sys, conceptsplit_core.settings; assert not {'torch', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_is_an_option_in_words(config):
    for each in fields(config):
        about = each.metadata["option"]
        assert about.label and about.help.endswith(".") and (not about.change or about.change.endswith(".")), each.name
        assert about.fault(each.name, each.default) == "", each.name
    assert {*options(config, False), *options(config, True)} == set(options(config))


def beyond(config):
    """Per option values just outside its range, and the range in words."""
    for each in fields(config):
        about = each.metadata["option"]
        if isinstance(each.default, bool):
            continue
        if about.allowed:
            yield each.name, [3 if isinstance(each.default, int) else "x"], str(about.allowed[-1])
        else:
            little = 1 if isinstance(each.default, int) else 1e-9
            far = [about.low - little, about.high * (1 + 1e-9) + little]
            yield each.name, [*far, *([float("nan"), float("inf")] if isinstance(each.default, float) else [])], " to "


@pytest.mark.parametrize(
    ("config", "name", "values", "words"), [(config, *case) for config in CONFIGS for case in beyond(config)]
)
def test_a_value_out_of_range_is_one_sentence_with_name_value_and_range(config, name, values, words):
    for value in values:
        with pytest.raises(ConceptSplitError) as refused:
            config(**{name: value})
        said = str(refused.value)
        assert f"{name} is {value!r}, use " in said and words in said and said.endswith(".") and "\n" not in said
    about = options(config).get(name)
    if about and not about.allowed:  # both ends may be given
        low = config(**{name: type(defaults(config)[name])(about.low)})
        assert getattr(low, name) == about.low


def test_a_start_after_the_end_is_refused():
    with pytest.raises(ConceptSplitError, match=r"start_percent \(0.6\) lies after end_percent \(0.25\)"):
        LoaderConfig(start_percent=0.6, end_percent=0.25)


def test_values_keep_their_types_and_a_base_its_own():
    base = LodaConfig(afg_end=0.25, loda_steps=9)
    made = from_values(LodaConfig, {"map_downscale": "4", "loda_steps": 7, "model": object()}, base)
    assert made == LodaConfig(afg_end=0.25, loda_steps=7, map_downscale=4) and made.map_downscale == 4
    assert base.loda_steps == 9


def test_what_may_change_between_a_training_and_its_continuation():
    stopped = TrainConfig(steps=3, save_every=1)
    on = TrainConfig(steps=9, save_every=0, resume=True, sample_every=4, gradient_checkpointing=True)
    assert stopped.lasting == on.lasting
    for name, other in {"seed": 5, "rank": 3, "alpha": 2.0, "learning_rate": 0.5, "warmup": 1}.items():
        assert TrainConfig(**{name: other}).lasting != stopped.lasting, name


def test_case_20_seeds_wrap_around():
    assert SEEDS == 1 << 64
    assert seeds(SEEDS - 2, 4) == [18446744073709551614, 18446744073709551615, 0, 1]


@pytest.mark.parametrize(("page", "wanted"), list(pages()), ids=lambda value: getattr(value, "stem", ""))
def test_tables_of_the_pages_are_in_step(page, wanted):
    """If this fails: python tools/write_tables.py"""
    assert page.read_text(encoding="utf-8") == wanted


@dataclass(frozen=True)
class Small:
    depth: int = option(3, "depth", "How deep.", "Raise it for fun.", low=-2, high=8)
    wide: bool = option(False, "wide", "Whether wide.", advanced=True)


def test_the_price_of_an_option_is_one_field():
    """A field written here alone has a terminal option and a row in a table; nodes have it in the host's tests."""
    import argparse

    from conceptsplit_core.cli.arguments import add_settings

    parser = argparse.ArgumentParser()
    add_settings(parser, Small, options(Small))
    assert from_values(Small, vars(parser.parse_args(["--depth", "-2", "--wide"]))) == Small(-2, True)
    assert "How deep. Raise it for fun. (-2 to 8; default: 3)" in " ".join(parser.format_help().split())
    assert "| depth | 3 | -2 to 8 | How deep. Raise it for fun. |" in node_table(Small, False)
    assert "| wide | off | on or off | Whether wide. |" in node_table(Small, True)
