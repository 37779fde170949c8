"""The fuzz runs in short, another seed than the committed ones: everything is usable or one sentence."""

from __future__ import annotations

import json
import mmap
import struct
from pathlib import Path

import pytest

from tests.fuzz import files, images, kinds, watch

SEED = 4711


def test_damaged_adapters():
    tally, _ = files.fuzz_adapters(3000, SEED)
    assert not tally.bad, tally.bad[:5]
    # The damage must be of every kind and the reader must see both sides, or the run says nothing.
    assert set(files.KINDS) <= set(tally.table)
    assert sum(row["adapter"] for row in tally.table.values()) > 100
    assert sum(row["sentence"] for row in tally.table.values()) > 1000


def test_damaged_checkpoints():
    tally, _ = files.fuzz_checkpoints(600, SEED)
    assert not tally.bad, tally.bad[:5]
    assert sum(row["adapter"] for row in tally.table.values()) > 10


def test_reading_a_large_file_takes_no_more_than_twice_its_size():
    for name, ratio in files.large_file_memory().items():
        assert ratio <= 2.1, name


def test_whole_and_damaged_pictures():
    tally, _ = images.fuzz(600, SEED)
    assert not tally.bad, tally.bad[:5]
    assert tally.table["whole"]["picture"] == len(images.whole_files())


def test_inputs_of_the_kinds_that_went_wrong_elsewhere():
    tally, _ = kinds.fuzz(150, SEED)
    assert not tally.bad, tally.bad[:5]
    for kind in ("masks, whole", "names", "seeds", "folders"):
        assert tally.table[kind]["right"] > 20, kind
    assert sum(row["used"] for row in tally.table.values()) > 20
    assert sum(row["sentence"] for row in tally.table.values()) > 100


def test_whatever_a_decoder_raises_is_a_sentence(tmp_path, monkeypatch):
    """A damaged fax made Pillow's TIFF reader raise a TypeError."""
    path = tmp_path / "fax.tif"
    path.write_bytes(images.whole_files()["fax.tif"][0])
    for problem in (TypeError("'float' object\ncannot be interpreted"), struct.error(), KeyError(3), MemoryError()):

        def fail(*_, problem=problem, **__):
            raise problem

        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
        monkeypatch.setattr("PIL.TiffImagePlugin.TiffImageFile.load", fail)
        assert images.read(path) == "sentence", problem


def test_the_watch_sees_what_it_is_there_for(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    with watch.guarded(inside):
        (inside / "x").write_text("fine")
    for touch in (lambda: outside.write_text("x"), lambda: outside.mkdir(), lambda: (inside / "x").rename(outside)):
        with pytest.raises(watch.Elsewhere), watch.guarded(inside):
            touch()
    assert not outside.exists()

    def fresh() -> None:
        """Memory of its own: an allocator may have as much free already, and then the process does not grow."""
        with mmap.mmap(-1, 50_000_000) as area:
            for at in range(0, len(area), 4096):
                area[at] = 1

    grown = watch.peak_bytes(fresh)
    assert grown is None or 40_000_000 < grown < 80_000_000
    assert (
        watch.sentence_problem("A line.\nAnother.") and watch.sentence_problem("") and not watch.sentence_problem("A.")
    )


@pytest.mark.parametrize("name", ["files", "images", "kinds"])
def test_the_committed_runs_are_of_these_kinds_and_nothing_went_wrong(name):
    result = json.loads((Path(__file__).parent / "results" / f"{name}.json").read_text())
    runs = [value for value in result.values() if isinstance(value, dict) and "inputs" in value]
    assert runs and all(run["bad"] == 0 for run in runs)
    if name == "files":
        assert result["adapters"]["inputs"] >= 100_000 and result["checkpoints"]["inputs"] >= 10_000
        assert all(ratio <= 2.1 for ratio in result["process_growth_over_file_size"].values())
        assert set(result["adapters"]["kinds"]) == {*files.KINDS, "large header"}


def test_the_committed_prompts_are_ten_thousand_and_nothing_went_wrong():
    runs = [json.loads(path.read_text()) for path in (Path(__file__).parent / "results").glob("prompts-*.json")]
    counts = [sum(family["prompts"] for family in run["families"].values()) for run in runs]
    assert max(counts) >= 10_000 and all(len(run["families"]) == 3 for run in runs)
    assert not any(family["bad"] for run in runs for family in run["families"].values())
