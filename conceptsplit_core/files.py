"""Reading a safetensors header safely, and writing a file whole or not at all."""

from __future__ import annotations

import json
import os
import re
import secrets
import struct
import tempfile
from pathlib import Path
from typing import Any

from .errors import ConceptSplitError

# Room for SDXL's 140 tensors thirty times over. JSON may take forty times its length in memory, so this bounds it.
MAX_HEADER_BYTES = 1024 * 1024
# LoRA files keep the tags of all their training pictures there.
MAX_TAGS_BYTES = 32 * 1024 * 1024


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


def check_place(path: Path) -> None:
    """Finds out before the work whether the file `path` can be written, and leaves nothing behind.

    Raises:
        ConceptSplitError: a folder of that name, a file that may not be replaced, or no right to write there.
    """
    if path.is_dir():
        raise ConceptSplitError(f"Cannot write {path}: it is a folder, give --out a file name.")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        if path.exists():
            path.open("ab").close()
    except OSError as problem:
        raise ConceptSplitError(f"Cannot write {path}: {problem.strerror or problem}.") from None


# Other files that lie where a safetensors file should, by their first bytes: what they are, and what to do.
_OTHERS = (
    (
        rb"\s*<(?:!doctype|html|\?xml|head)",
        "a web page",
        "the site has asked for a login; log in and download it again",
    ),
    (rb"\s*\{\s*\"(?:error|message|detail)", "a site's error message", "open it in an editor and read why"),
    (rb"version https://git-lfs", "a pointer to the file (Git LFS)", "download the file itself"),
    (rb"PK\x03\x04|\x80[\x02-\x05]", "a pickle, which can run code when it is opened", "get the .safetensors version"),
    (rb"GGUF", "a GGUF file", "get the .safetensors version"),
)


def refuse_others(head: bytes, name: str) -> None:
    """Says what a file is whose first bytes are those of something else.

    Raises:
        ConceptSplitError: a web page, a pointer, a pickle or the like, with what to do about it.
    """
    for start, what, advice in _OTHERS:
        if re.match(start, head[:256], re.IGNORECASE):
            raise ConceptSplitError(f"{name} is not a safetensors file but {what}: {advice}.")


def read_header(data: bytes, name: str, limit: int = MAX_HEADER_BYTES) -> dict[str, Any]:
    """The JSON header of a safetensors file, with its sizes checked before anything is allocated.

    Raises:
        ConceptSplitError: cut off, another kind of file, a header of more than `limit` bytes, or not a JSON table.
    """
    if len(data) < 8:
        raise ConceptSplitError(f"{name} is not a safetensors file: it ends after {len(data)} bytes.")
    (size,) = struct.unpack("<Q", data[:8])
    if size > len(data) - 8:
        refuse_others(data, name)
        raise ConceptSplitError(
            f"{name} is not a readable safetensors file (it ends before its header does): it is cut off, damaged or of "
            "another format; download or train it again."
        )
    if size > limit:
        raise ConceptSplitError(
            f"{name} has a header of {size / 2**20:.1f} MiB, more than a file of this kind can have "
            f"({limit / 2**20:.0f} MiB): if it is a LoRA with its training tags, load it with LoRA Concept Loader "
            "(terminal: --lora)."
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
