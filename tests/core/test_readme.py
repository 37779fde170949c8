"""Every number that the README claims to have measured comes from a row of a committed results file.

A number of the section *Measured* is followed by an HTML comment that names its source, which readers do not see:

    36 / 57 %<!-- % separation.json groups/main/.../mean groups/main/.../mean -->

The comment begins with how the value is shown: `%` a share in per cent, `+%` what a ratio exceeds 1 by in per cent, `-`
the first of two values less the second, or nothing, as it is. `<` comes before it where the text says "less than".
Then, for every number, come a file of benchmarks/results and a path in it. In a list of rows the path goes on with the
model and with what was measured.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMENT = re.compile(r"<!--(.*?)-->", re.DOTALL)
# Not a part of a name (SD1.5, 512²) or of a version (0.33.0).
NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?![\w²]|\.\d)")
FORMS = {
    "": lambda value: value,
    "%": lambda value: 100 * value,
    "+%": lambda value: 100 * (value - 1),
    "-": lambda value: value,
}


@cache
def results(file: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / file).read_text(encoding="utf-8"))


def value_at(file: str, path: str) -> float:
    """The number at a path of a results file.

    Raises:
        KeyError, or ValueError where the path does not lead to one number.
    """
    at = results(file)
    parts = path.split("/")
    while parts:
        part = parts.pop(0)
        if isinstance(at, list):
            what = parts.pop(0)
            (at,) = [row for row in at if (row["model"], row["what"]) == (part, what)]
        else:
            at = at[part]
    if not isinstance(at, int | float):
        raise ValueError(f"{path} of {file} is no number: {at!r}")
    return float(at)


def faults(text: str) -> list[str]:
    """Sentences on numbers of a Markdown text that have no source, or another value than their source."""
    found = []
    end = 0
    for comment in COMMENT.finditer(text):
        numbers = NUMBER.findall(text[end : comment.start()])
        end = comment.end()
        form, _, rest = comment[1].strip().partition(" ")
        if form.endswith(".json"):
            form, rest = "", f"{form} {rest}"
        less, form = form.startswith("<"), form.removeprefix("<")
        sources = re.findall(r"(\w+\.json) (.*?)(?= \w+\.json |$)", " ".join(rest.split()))
        values = [value_at(*source) for source in sources]
        if form == "-":
            values = [ours - peer for ours, peer in zip(values[::2], values[1::2], strict=True)]
        if len(values) != len(numbers):
            found.append(f"{numbers} have {len(values)} sources")
            continue
        for number, value in zip(numbers, map(FORMS[form], values), strict=True):
            shown = float(number.replace(",", ""))
            decimals = len(number.partition(".")[2])
            if not (value < shown if less else round(value, decimals) == shown):
                found.append(f"{number} is {value:.6g} in {comment[1].strip()}")
    found += [f"{number} has no source" for number in NUMBER.findall(text[end:])]
    return found


def measured() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"\n## Measured\n(.*?)\n## ", text, re.DOTALL)
    assert section is not None
    # Addresses of pages and pictures hold no claims.
    return re.sub(r"\]\([^)]*\)", "]", section[1])


def test_every_measured_number_has_a_source_that_says_the_same():
    text = measured()
    assert len(COMMENT.findall(text)) > 20
    assert faults(text) == []


def test_no_measured_number_stands_outside_that_section():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rest = re.sub(r"\n## Measured\n.*?\n## ", "\n", text, flags=re.DOTALL)
    assert re.findall(r"\d+(?:\.\d+)? ?%|\d\.\d+ times|0\.\d+ (?:to|of)", rest) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("it takes 8 % more", "8 has no source"),
        ("36<!-- % separation.json groups/main/arms/tova/success/mean -->", "36 is 25.3906 in % separation.json"),
        ("25 / 39<!-- % separation.json groups/main/arms/tova/success/mean -->", "['25', '39'] have 1 sources"),
        ("0.1 %<!-- <+% speed.json rows/SDXL 1024²/training, work per image/ours -->", "0.1 is "),
    ],
)
def test_a_number_without_its_row_is_found(text, fault):
    assert len(faults(text)) == 1 and faults(text)[0].startswith(fault)


def test_a_right_number_passes_and_a_missing_row_does_not():
    path = "separation.json groups/main/arms/tova/success/mean"
    assert faults(f"On SD1.5 it is 25 %<!-- % {path} -->, in ComfyUI 0.33.0") == []
    with pytest.raises(KeyError):
        faults(f"25<!-- % {path.replace('tova', 'nobody')} -->")
