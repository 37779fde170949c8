"""Makes the pictures of workflows/ small enough for the archive: 384 pixels wide, as the page's cards show them.

    python -m tools.thumbnails

Pictures that are small already stay as they are.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).resolve().parents[1] / "workflows"
SIDE, BYTES = 384, 20_000


def shrink(path: Path) -> bool:
    """Writes a JPEG again if it is wider than SIDE pixels or larger than BYTES; whether it was."""
    with Image.open(path) as picture:
        if picture.width <= SIDE and path.stat().st_size <= BYTES:
            return False
        small = picture.convert("RGB").resize(
            (SIDE, round(picture.height * SIDE / picture.width)), Image.Resampling.LANCZOS
        )
    small.save(path, quality=82, optimize=True, progressive=True)
    return True


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.jpg")):
        if shrink(path):
            print(f"{path.name}: {path.stat().st_size} bytes")
