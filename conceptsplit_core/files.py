"""Files of users: finding and reading them safely, and writing one whole, or not at all, and over nobody else's."""

from __future__ import annotations

import codecs
import json
import os
import re
import secrets
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import ConceptSplitError

# Room for SDXL's 140 tensors thirty times over. JSON may take forty times its length in memory, so this bounds it.
MAX_HEADER_BYTES = 1024 * 1024
# LoRA files keep the tags of all their training pictures there.
MAX_TAGS_BYTES = 32 * 1024 * 1024
# How text in UTF-16 begins, such as a spreadsheet's "Unicode text". Older code pages cannot be told apart.
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
OURS = "Software"  # the text chunk by which pictures that this program wrote are known
PROGRAM = "ConceptSplit"


def user_path(text: str | os.PathLike[str]) -> Path:
    """A path as a user writes it: ~ is the home folder, and so is ~name where there is such a user."""
    path = Path(text)
    try:
        return path.expanduser()
    except RuntimeError:  # no such user: a file may be called so
        return path


def numbered(path: Path, n: int) -> Path:
    """The n-th name of a file that would otherwise replace another: rex, rex_2, rex_3."""
    return path if n == 1 else path.with_name(f"{path.stem}_{n}{path.suffix}")


def decoded(data: bytes, name: str, advice: str) -> str:
    """The text of a file in UTF-8, or in UTF-16 where its mark says so.

    Raises:
        ConceptSplitError: another encoding, with the line and `advice`.
    """
    try:
        return data.decode("utf-16" if data.startswith(UTF16) else "utf-8-sig")
    except UnicodeDecodeError as problem:
        line = data.count(b"\n", 0, problem.start) + 1
        raise ConceptSplitError(f"{name} is not UTF-8 text (line {line}): {advice}.") from None


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


@contextmanager
def held(path: Path, refusal: str) -> Iterator[None]:
    """Keeps other processes out for as long as this one holds the lock file `path`, which is gone afterwards.

    Raises:
        ConceptSplitError: `refusal`, where another process holds it.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConceptSplitError(refusal) from None
    except NotImplementedError:  # a file system that cannot lock
        pass
    try:
        yield
    finally:
        lock.release()
        path.unlink(missing_ok=True)


def written_by_us(path: Path) -> bool:
    """Whether a PNG says that this program wrote it: loss curves, samples, maps, sheets."""
    from PIL import Image

    if path.suffix.lower() != ".png":
        return False
    try:
        with Image.open(path) as opened:
            return str(opened.info.get(OURS, "")).startswith(PROGRAM)
    except Exception:  # damaged files are reported where they are opened to be used
        return False


def check_report(folder: Path, what: str, beside: str = "") -> None:
    """Refuses a folder where a report of somebody else would be replaced.

    Args:
        what: how ours begin to say what they are.
        beside: a file that is ours where report.json is.

    Raises:
        ConceptSplitError: report.json is not such a report, or `beside` lies there without one.
    """
    path = folder / "report.json"
    if path.is_file():
        try:
            found = json.loads(path.read_bytes())
        except (ValueError, RecursionError, OSError):
            found = None
        if isinstance(found, dict) and str(found.get("what", "")).startswith(what):
            return
    elif not (beside and (path := folder / beside).exists()):
        return
    raise ConceptSplitError(
        f"{path} is not a report of {what} and would be replaced: move it away or give another --out."
    )


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
