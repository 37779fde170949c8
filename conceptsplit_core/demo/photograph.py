"""A real photograph that comes with the pack: SpaceX's Falcon 9 with DSCOVR, 2015, in the public domain.

scikit-image ships the original, 640 x 427, as `skimage.data.rocket`; here it is shrunk to 384 x 256.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .checkpoint import FOLDER

PLACE = (192, 8, 272, 92)
"""Left, top, right, bottom of the ellipse painted on the photograph: free sky beside the rocket's tip."""


def photograph() -> NDArray[np.uint8]:
    """RGB [256, 384, 3]."""
    with Image.open(FOLDER / "rocket.jpg") as opened:
        return np.asarray(opened.convert("RGB"))


def place() -> NDArray[np.uint8]:
    """255 in the ellipse that is painted on the photograph, 0 elsewhere; [256, 384]."""
    mask = Image.new("L", (384, 256), 0)
    ImageDraw.Draw(mask).ellipse(PLACE, fill=255)
    return np.asarray(mask)
