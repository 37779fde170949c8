"""Reading a safetensors header safely, and writing a file whole or not at all."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

from .errors import ConceptSplitError

# Room for SDXL's 140 tensors thirty times over. JSON may take forty times its length in memory, so this bounds it.
MAX_HEADER_BYTES = 1024 * 1024


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file so that it is either the old one or the new one, never half of either.

    Raises:
        ConceptSplitError: the folder cannot be written to or the disk is full; the old file is untouched.
    """
    target = Path(path)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:40]}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files private; an adapter is as readable as any other file the user writes.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        raise ConceptSplitError(
            f"Cannot write {target}: {error.strerror or error}; free space or choose another folder."
        ) from error
    finally:
        if temporary is not None:
            try:
                os.unlink(temporary)
            except OSError:
                pass


def read_header(data: bytes, name: str) -> dict[str, Any]:
    """The JSON header of a safetensors file, with its sizes checked before anything is allocated.

    Raises:
        ConceptSplitError: cut off, larger than a header can be, or not a JSON table.
    """
    if len(data) < 8:
        raise ConceptSplitError(f"{name} is not a safetensors file: it ends after {len(data)} bytes.")
    (size,) = struct.unpack("<Q", data[:8])
    if size > min(MAX_HEADER_BYTES, len(data) - 8):
        raise ConceptSplitError(
            f"{name} is not a readable safetensors file (its header claims {size} bytes): it is damaged or of another "
            "format; download or train it again."
        )
    try:
        header = json.loads(data[8 : 8 + size])
    except (ValueError, RecursionError) as error:
        raise ConceptSplitError(
            f"{name} is not a readable safetensors file (its header is not JSON): it is damaged or of another format; "
            "download or train it again."
        ) from error
    if not isinstance(header, dict):
        raise ConceptSplitError(f"{name} is not a readable safetensors file: its header is not a table of tensors.")
    return header
