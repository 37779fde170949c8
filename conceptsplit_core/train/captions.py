"""Neutral captions: what an ordinary prompt is like, for kinds that weigh text encodings by how usual they are."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConceptSplitError
from ..files import UTF16, decoded

MOST, MAX_BYTES = 10_000, 4 * 2**20
COUNT = 300

# 7 openings, 59 things and 23 places: numbers without a common factor meet in ever new combinations.
_OPENINGS = (
    "a photo of {}", "{}", "a picture of {}", "a close-up of {}", "a painting of {}", "there is {}",
    "an old photo of {}",
)  # fmt: skip
_THINGS = (
    "a dog; two cats; a brown horse; a small bird; a herd of sheep; a man; a young woman; an old couple; children; "
    "a baby; a group of people; a soccer player; a cook; a red car; a city bus; an old train; a bicycle; a motorcycle; "
    "a large ship; a yellow airplane; a wooden chair; a long table; a blue sofa; a bed; a lamp; a clock; a mirror; "
    "a stack of books; a laptop; a phone; a television; a guitar; a vase with flowers; a cup of coffee; a bottle; "
    "a plate of pasta; a slice of pizza; a bowl of fruit; a green apple; a birthday cake; a sandwich; a tree; roses; "
    "a mountain; a river; a tall building; a stone church; a bridge; a lighthouse; a tent; an umbrella; a leather bag; "
    "a pair of shoes; a black hat; a white dress; a toy bear; a football; a skateboard; a kite"
).split("; ")
_PLACES = (
    "on a beach; in a park; in the kitchen; on the street; in a forest; by the sea; in a small room; at the market; "
    "on a hill; in the city; near a lake; in a garden; on the floor; at school; in the desert; on a roof; in a museum; "
    "at the airport; in a field; by the window; on a boat; in the mountains; at home"
).split("; ")


def neutral_captions(family: str, count: int = COUNT) -> list[str]:
    """`count` captions, always the same ones; for the demo model of the scenes it was trained on."""
    if family == "demo":
        return _demo_captions(count)
    pick = lambda table, i: table[i % len(table)]
    return [f"{pick(_OPENINGS, i).format(pick(_THINGS, i))} {pick(_PLACES, i)}" for i in range(count)]


def _demo_captions(count: int) -> list[str]:
    import numpy as np

    from ..demo import captions, scenes

    found = []
    for seed in range(count):
        objects, background = scenes.scene_layout(40_000_000 + seed)
        found.append(captions.describe(np.random.default_rng(seed), objects, background)[0])
    return found


def given_captions(lines: list[str], source: str) -> list[str]:
    """A user's captions, one a line, without empty ones.

    Args:
        source: how messages call them.

    Raises:
        ConceptSplitError: none at all, or too many to encode.
    """
    found = [line.strip() for line in lines if line.strip()]
    if not 1 <= len(found) <= MOST:
        raise ConceptSplitError(
            f"{source} has {len(found)} captions: give 1 to {MOST}, one a line, 300 or more if you can."
        )
    return found


def read_captions(path: Path) -> list[str]:
    """The captions of a text file in UTF-8 or UTF-16.

    Raises:
        ConceptSplitError: unreadable, no text or of another encoding, empty or too large.
    """
    try:
        data = path.read_bytes()[: MAX_BYTES + 1]
    except OSError as error:
        raise ConceptSplitError(f"Cannot read {path}: {error.strerror or error}.") from None
    if len(data) > MAX_BYTES or (b"\0" in data and not data.startswith(UTF16)):
        raise ConceptSplitError(f"{path.name} is no list of captions: give a text file with a caption per line.")
    return given_captions(decoded(data, path.name, "save it as UTF-8").splitlines(), path.name)
