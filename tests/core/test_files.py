"""Writing files whole, as a server with many threads does."""

import os
import stat
import threading
from contextlib import nullcontext

import pytest

from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.files import check_report, held, user_path, write_whole


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


def test_a_name_behind_a_tilde_need_not_be_a_user(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert user_path("~/a b") == tmp_path / "a b" and str(user_path("~nobodyx/a")) == os.path.join("~nobodyx", "a")


def test_a_lock_keeps_others_out_and_is_gone_afterwards(tmp_path):
    path = tmp_path / "deep" / ".rex.lock"
    with held(path, "It is taken."):
        with pytest.raises(ConceptSplitError, match=r"^It is taken\.$"), held(path, "It is taken."):
            pass
        assert path.exists()
    assert not path.exists()


@pytest.mark.parametrize(
    ("name", "text", "fits"),
    [
        ("report.json", '{"what": "ConceptSplit demo: pictures"}', True),
        ("report.json", '{"what": "ConceptSplit render"}', False),
        ("report.json", '["ConceptSplit demo"]', False),
        ("report.json", "{", False),
        ("notes.txt", "mine", False),
        ("report.txt", "mine", True),
        ("other.json", "{}", True),
    ],
)
def test_only_an_own_report_is_replaced(tmp_path, name, text, fits):
    (tmp_path / name).write_text(text)
    refusal = pytest.raises(ConceptSplitError, match=f"{name} is not a report of ConceptSplit demo and would be replac")
    with nullcontext() if fits else refusal:
        check_report(tmp_path, "ConceptSplit demo", "notes.txt")
