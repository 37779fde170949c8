"""Packs what the registry's archive holds: the files that git tracks, less those that .comfyignore names.

python -m tools.archive out/conceptsplit.zip
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 10_000_000  # bytes


def _listed(*options: str) -> set[str]:
    command = ["git", "ls-files", "-z", "--cached", *options]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")) - {""}


def files() -> list[str]:
    """Names of the files, from the repository's root, sorted.

    Git itself reads .comfyignore, whose patterns are those of .gitignore.

    Raises:
        subprocess.CalledProcessError: this is no checkout.
    """
    left_out = _listed("--ignored", "--exclude-from=.comfyignore")
    return sorted(name for name in _listed() - left_out if (ROOT / name).exists())


def write(path: Path) -> int:
    """Writes the archive, compressed as `comfy node publish` does it; its size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in files():
            packed.write(ROOT / name, name)
    return path.stat().st_size


if __name__ == "__main__":
    size = write(Path(sys.argv[1]))
    print(f"{sys.argv[1]}: {len(files())} files, {size / 1e6:.2f} MB of {LIMIT / 1e6:.0f}")
    sys.exit(size >= LIMIT)
