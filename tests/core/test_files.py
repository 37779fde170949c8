"""Writing files whole, as a server with many threads does."""

import os
import stat
import threading

import pytest

from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.files import write_whole


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_threads_that_write_files_leave_the_umask_alone(tmp_path, monkeypatch):
    """REVIEW 0.11: os.umask(0) made other threads' files world-writable for a moment."""
    before = os.umask(0o027)
    asked = []
    genuine = os.umask
    monkeypatch.setattr(os, "umask", lambda mask: asked.append(mask) or genuine(mask))
    modes = set()
    try:

        def work(number):
            for i in range(50):
                write_whole(tmp_path / f"{number}.safetensors", bytes([i]) * 100)
                other = tmp_path / f"{number}.other"
                with open(os.open(other, os.O_CREAT | os.O_WRONLY, 0o666), "wb"):
                    modes.add(stat.S_IMODE(other.stat().st_mode))
                other.unlink()

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        genuine(before)
    assert not asked and modes == {0o640}
    written = sorted(tmp_path.iterdir())
    assert [path.name for path in written] == [f"{n}.safetensors" for n in range(4)]
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o640}
    assert all(path.read_bytes() == bytes([49]) * 100 for path in written)


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "rex.safetensors"
    write_whole(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConceptSplitError, match="Cannot write .*rex.safetensors: No space left on device; free space"):
        write_whole(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["rex.safetensors"] and path.read_bytes() == b"old"
