"""Reading a safetensors header safely, and writing a file whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import struct
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
    temporary = target.with_name(f".{target.name[:40]}.{secrets.token_hex(8)}.tmp")
    made = False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # O_EXCL: nobody else's file, and no link, is written through. The kernel applies the umask to 0o666; asking
        # for it by os.umask would change it for the other threads of a server.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        handle = os.open(temporary, flags, 0o666)
        made = True
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
        made = False
    except OSError as error:
        raise ConceptSplitError(
            f"Cannot write {target}: {error.strerror or error}; free space or choose another folder."
        ) from error
    finally:
        if made:
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
