"""Tables from the terminal: reading them, drawing on the built-in model, going on, and workers that die."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conceptsplit_core.cli import common, options, render
from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.render import folder, server
from conceptsplit_core.render.crew import Crew, Drawing, Task, WorkerLost
from conceptsplit_core.render.table import Row, Table, read_table

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "conceptsplit_core" / "demo"
PIXA, NERO = (DEMO / "adapters" / f"demo_{name}.safetensors" for name in ("pixa", "nero"))
LORAS = tuple(f"{name}={DEMO / 'loras' / f'demo_{name}_lora.safetensors'}" for name in ("pixa", "nero"))
TEMPLATE = ROOT / "tests" / "workflows_api" / "Two LoRAs, two characters.json"


# --- tables ---------------------------------------------------------------------------------------------------


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("sign", [",", ";", "\t"])
def test_a_table_of_lines_has_their_numbers(tmp_path, sign):
    text = 'prompt,seed,\r\n"a cat, ""big""\r\nand a dog",7,\r\n\r\n  a star ,,\r\n'.replace(",", sign)
    table = read_table(write(tmp_path / "t.csv", text, "utf-8-sig"))
    assert (table.unit, table.columns) == ("line", ["prompt", "seed"])
    told = [(row.number, row.cells) for row in table.rows]
    assert told == [(2, {"prompt": f'a cat{sign} "big"\r\nand a dog', "seed": "7"}), (5, {"prompt": "a star"})]


def test_bad_rows_are_told_and_the_others_are_read(tmp_path):
    rows = read_table(write(tmp_path / "t.csv", "prompt,seed\na cat, a dog,3\na star,4\n")).rows
    assert rows[0].number == 2 and "has 3 cells, the table 2 columns" in rows[0].fault
    assert rows[1].cells == {"prompt": "a star", "seed": "4"}
    rows = read_table(write(tmp_path / "t.jsonl", '{"prompt": "x", "seed": null}\n\n{"prompt"\n[1]\n')).rows
    assert [row.number for row in rows] == [1, 3, 4] and rows[0].cells == {"prompt": "x"}
    assert rows[1].fault.startswith("the line is not JSON") and rows[2].fault.startswith("the row is not a table")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("t.csv", "prompt,prompt\na,b\n", "t.csv has two columns 'prompt'"),
        ("t.csv", "prompt,,seed\na,b,3\n", "Column 2 of t.csv has no name"),
        ("t.csv", "prompt,seed\n\n", "t.csv has no rows"),
        ("t.xlsx", "x", "t.xlsx is no table: use a .csv, .tsv, .jsonl or .json file."),
        ("t.json", '{"3": {"class_type": "KSampler"}}', "a graph of ComfyUI belongs to --graph"),
        ("t.csv", "promt,seed\na,3\n", "column 'promt', which is no option of `sample` (did you mean 'prompt'?)"),
        ("t.csv", "prompt,device\na,cpu\n", "column 'device', which is no option of `sample`"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_drawn_is_one_sentence(refused, tmp_path, name, text, said):
    out = tmp_path / "out"
    assert said in refused("render", write(tmp_path / name, text), "--out", out)
    assert not out.exists()


@pytest.mark.parametrize("encoding", ["cp1252", "cp1251", "utf-16-le", "shift-jis"])
def test_other_encodings_are_refused_with_their_line(refused, tmp_path, encoding):
    text = {"cp1251": "кот", "shift-jis": "猫"}.get(encoding, "café")
    table = write(tmp_path / "t.csv", f"prompt;seed\na cat;3\n{text} \udcff;4\n".replace(" \udcff", ""), encoding)
    if encoding == "utf-16-le":  # without its mark; the first zero is ASCII too, the é is not
        assert "t.csv is not UTF-8 text (line 3)" in refused("render", table)
    else:
        assert "t.csv is not UTF-8 text (line 3): save it as CSV UTF-8." in refused("render", table)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("first", ["", "sep=;\r\n"])
def test_a_spreadsheets_table_where_the_comma_is_the_decimal_sign(tmp_path, encoding, first):
    """As Excel saves it in most of Europe: semicolons, decimal commas, quotes, a mark of the encoding."""
    text = 'prompt;cfg;"words, or none";afg-end;seed\r\n"ein ""rotes"" Haus; groß";7,5;a,b;,25;11\r\na star;4;;;12\r\n'
    table = read_table(write(tmp_path / "t.csv", first + text.replace("words, or none", "words"), encoding))
    one, two = render.sample_tasks(table, options.parse(["render", "t.csv"]))
    assert (one.state, two.state) == ("waiting", "waiting"), (one.fault, two.fault)
    assert (one.order["prompt"], one.order["cfg"], one.order["afg_end"]) == ('ein "rotes" Haus; groß', 7.5, 0.25)
    assert (one.order["words"], two.order["cfg"], two.order["seed"]) == ("a,b", 4.0, 12)
    assert [row.number for row in table.rows] == ([3, 4] if first else [2, 3])
    # Where the comma stands between cells, or in JSON, 7,5 is no number.
    (other,) = tasks_of(tmp_path, [{"prompt": "a", "cfg": "7,5"}])
    assert other.fault == "cfg: '7,5' is not a number."
    graph = server.read_graph(TEMPLATE)
    made = server.fill(graph, {"c": ("9", "cfg")}, Row(2, {"c": "-7,25"}), table)
    assert made["9"]["inputs"]["cfg"] == -7.25


@pytest.mark.parametrize("first", ["\n", "\r\n \r\n", ";;\r\n"])
def test_lines_without_anything_before_the_head_do_not_hide_its_separator(tmp_path, first):
    table = read_table(write(tmp_path / "t.csv", f"{first}prompt;cfg\na, b;2,5\n"))
    assert (table.columns, table.comma, table.rows[0].cells) == (
        ["prompt", "cfg"],
        True,
        {"prompt": "a, b", "cfg": "2,5"},
    )
    assert table.rows[0].number == first.count("\n") + 2


def test_cells_of_a_tsv_may_have_every_sign_but_its_own(tmp_path):
    table = read_table(write(tmp_path / "t.tsv", "prompt\na cat, a dog; red\n"))
    assert (table.columns, table.rows[0].cells) == (["prompt"], {"prompt": "a cat, a dog; red"})


def test_a_head_with_the_separator_in_quotes(tmp_path):
    table = read_table(write(tmp_path / "t.csv", '"a, b, c";seed\nx;3\n'))
    assert (table.columns, table.rows[0].cells) == (["a, b, c", "seed"], {"a, b, c": "x", "seed": "3"})


@pytest.mark.parametrize("sign", ["\u2028", "\x0b", "\x0c", "\x85", "\x1c"])
def test_only_line_ends_end_a_line(tmp_path, sign):
    """A text copied from elsewhere may have other signs that Python takes for the end of a line."""
    rows = read_table(write(tmp_path / "t.csv", f"prompt,seed\na{sign}b,3\nc,4\n")).rows
    assert [(row.number, row.cells) for row in rows] == [(2, {"prompt": f"a{sign}b", "seed": "3"}),
                                                         (3, {"prompt": "c", "seed": "4"})]  # fmt: skip
    lines = "".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\r\n" for text in (f"a{sign}b", "c"))
    assert [row.number for row in read_table(write(tmp_path / "t.jsonl", lines)).rows] == [1, 2]


def test_a_cell_of_json_is_one_value(tmp_path):
    rows = [{"prompt": {"a": 1}}, {"prompt": "a", "seed": [3]}, {"prompt": "a", "adapter": [[str(PIXA)]]},
            {"prompt": "a", "afg": {}}, {"prompt": "a", "seed": 5}]  # fmt: skip
    tasks = tasks_of(tmp_path, rows)
    assert [task.fault for task in tasks] == [
        'prompt: {"a": 1} is not one value.', "seed: [3] is not one value.",
        f'adapter: {json.dumps([str(PIXA)])[:60]} is not one value.', "afg: {} is not one value.", "",
    ]  # fmt: skip


def test_a_name_that_stands_twice_in_json_is_told(tmp_path):
    rows = read_table(write(tmp_path / "t.jsonl", '{"seed": 3, "seed ": 4}\n{"seed": 5}\n')).rows
    assert rows[0].fault == "the line is not JSON ('seed' stands twice in one object)" and rows[1].cells == {"seed": 5}


def test_two_columns_for_one_thing_are_refused(refused, tmp_path):
    table = write(tmp_path / "t.csv", "prompt,loda steps,LODA-steps\na,3,4\n")
    assert "t.csv has two columns for --loda-steps: remove one." in refused("render", table)
    table = write(tmp_path / "g.csv", "9.seed,KSampler (LODA).seed\n3,4\n")
    assert "g.csv has two columns for input '9.seed': remove one." in refused("render", table, "--graph", TEMPLATE)


@pytest.mark.parametrize("word", ["yes", "TRUE", "On", 1, True, "no", "False", "off", "0", False])
def test_yes_and_no_are_said_alike_everywhere(tmp_path, word):
    wanted = str(word).lower() in ("yes", "true", "on", "1")
    (task,) = tasks_of(tmp_path, [{"prompt": "a", "afg": word}])
    graph = server.read_graph(TEMPLATE)
    made = server.fill(graph, {"c": ("9", "afg")}, Row(1, {"c": word}), Table("t", "line", ["c"], []))
    assert task.order["afg"] is wanted and made["9"]["inputs"]["afg"] is wanted


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("नमस्ते दुनिया", "नमस्ते दुनिया"), ("e\u0301té", "été"), ("猫" * 90, "猫" * 66), ("🦊 a/b:c?", "_ a_b_c_"),
        ("..", "_"), (" x. ", "x"), ("a" * 79 + " b", "a" * 79),
    ],
)  # fmt: skip
def test_names_of_every_script_begin_a_file(tmp_path, name, wanted):
    (task,) = tasks_of(tmp_path, [{"prompt": "a", "name": name}])
    assert task.name == wanted
    folder.Folder(tmp_path, read_table(tmp_path / "t.json"), [task], bytes).keep(task, Drawing([(".png", b"x")]))
    assert (tmp_path / f"{wanted}-{task.key}.png").read_bytes() == b"x"


def test_ten_thousand_rows_start_at_once_and_stay_small(tmp_path):
    """Tables of 10,000 rows, of options and of a graph: seconds, and little memory a row."""
    count = 10_000
    lines = "".join(f'"a star, a heart {i}",{i},{i % 5 + 1},\n' for i in range(count))
    table = read_table(write(tmp_path / "t.csv", f"prompt,seed,steps,name\n{lines}"))
    began = time.process_time()
    tasks = render.sample_tasks(table, options.parse(["render", "t.csv", "--cfg", "3"]))
    assert len({task.key for task in tasks}) == count == sum(task.state == "waiting" for task in tasks)
    spent = time.process_time() - began
    graphs = read_table(write(tmp_path / "g.csv", "Prompt,9.seed,9.steps,name\n" + lines[:40_000]))
    line = options.parse(["render", "g.csv", "--graph", str(TEMPLATE)])
    tracemalloc.start()
    try:
        made = render.graph_tasks(graphs, line)
        size = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert (made[77].order["9"]["inputs"]["seed"], made[77].order["6"]["inputs"]["text"]) == (77, "a star, a heart 77")
    assert spent < 60 and size < 8000 * len(made) > 5e6, (spent, size)


CELLS = {
    "prompt": "a <pixa> and a <ann>", "negative": "-dull", "seed": "21", "steps": "13", "cfg": "3.5", "size": "96x64",
    "sampler": "euler", "model": "demo", "tokenizer": "x", "prediction": "v_prediction", "precision": "bf16",
    "adapter": f"{PIXA}:0.625", "class-word": "pixa=heart", "words": "cat,dog", "lora": f"ann{LORAS[1][4:]}",
    "loda": "no", "loda_steps": "7", "loda iterations": "5", "--loda-strength": "0.125", "loda_rule": "gradient",
    "divergence": "bhattacharyya", "threshold": "0.75", "map_smoothing": "2.5", "map_downscale": "4", "AFG": "Off",
    "map_part": "down", "afg_inside": "1.25", "afg_outside": "9.5", "afg_region": "0.375", "afg_smoothing": "0.5",
    "afg_end": "0.25", "plan_steps": "3", "afg_rule": "by_place", "area_rule": "top", "suppression": "0.6875",
    "encoder_reuse": "0.125", "plan_guidance": "no", "lora_guidance": "4.25",
    "gate_bias": "0.5", "gate temperature": "0.25",
    "correction": "0.375", "correction-sharpness": "5",
}  # fmt: skip


def tasks_of(tmp_path, rows, *line):
    table = write(tmp_path / "t.json", json.dumps(rows))
    return render.sample_tasks(read_table(table), options.parse(["render", str(table), *line]))


def test_every_option_of_sample_is_a_column(tmp_path):
    (task,) = tasks_of(tmp_path, [CELLS])
    assert task.state == "waiting", task.fault
    named = {column.lower().lstrip("-").replace(" ", "-").replace("_", "-"): cell for column, cell in CELLS.items()}
    switches = {name: cell for name, cell in named.items() if name in ("loda", "afg", "plan-guidance")}
    line = [f"--{name}={cell}" for name, cell in named.items() if name not in switches]
    wanted = vars(options.parse(["sample", *line, *(f"--no-{name}" for name in switches)]))
    drawn = wanted.keys() - {"command", "out", "maps", "device", "batch"}
    assert task.order == {name: wanted[name] for name in drawn}
    assert {name.replace("-", "_") for name in named} == drawn, "an option that this test does not try"


def test_a_cell_goes_before_the_command_and_an_empty_one_takes_it(tmp_path):
    rows = [{"steps": 9, "adapter": [f"{PIXA}:0.5", str(NERO)]}, {"adapter": f"{NERO} ; x={PIXA}", "afg": True}, {}]
    tasks = tasks_of(tmp_path, rows, "--prompt", "a star", "--steps", "12", "--adapter", f"{PIXA}:0.25", "--no-afg")
    assert [task.order["steps"] for task in tasks] == [9, 12, 12]
    assert [task.order["afg"] for task in tasks] == [False, True, False]
    lists = [[f"{PIXA}:0.5", str(NERO)], [str(NERO), f"x={PIXA}"], [f"{PIXA}:0.25"]]
    assert [task.order["adapter"] for task in tasks] == lists


def test_words_of_stages_in_a_cell_belong_to_their_file(tmp_path):
    cell = f"a={LORAS[0][5:]}:star; 0.4: blue star:0.5; b={LORAS[1][5:]}:heart;.25:red heart"
    (task,) = tasks_of(tmp_path, [{"prompt": "<a> and <b>", "lora": cell, "adapter": f"{PIXA};{NERO}:2"}])
    assert task.fault == "" and task.order["adapter"] == [str(PIXA), f"{NERO}:2"]
    assert task.order["lora"] == [
        f"a={LORAS[0][5:]}:star; 0.4: blue star:0.5", f"b={LORAS[1][5:]}:heart;.25:red heart"
    ]  # fmt: skip


def test_a_row_that_no_file_can_hold_is_told_and_the_others_wait(tmp_path):
    rows = [
        {"prompt": "a", "adapter": "~nobodyx/a.safetensors"},
        {"prompt": "a", "adapter": "x" * 300 + ".safetensors"},
        {"prompt": "a", "lora": "y" * 300 + ".safetensors:dog"},
        {"prompt": "a \ud800 cat"},
        {"prompt": "a", "name": "\udfff"},
        {"prompt": "a", "adapter": ["a\0.safetensors"]},
        {"prompt": "a", "\ud800": "b"},
        {"prompt": "a star", "name": "x" * 300, "seed": 3},
    ]
    tasks = tasks_of(tmp_path, rows)
    assert [task.state for task in tasks] == ["failed"] * 7 + ["waiting"]
    said = ["no file ~nobodyx/a", "File name too long", "File name too long", *["holds a sign that is no text"] * 4]
    for task, words in zip(tasks, said, strict=False):
        assert words in task.fault.replace(os.sep, "/"), task.fault
    made = folder.Folder(tmp_path, read_table(tmp_path / "t.json"), tasks, bytes)
    made.report()
    assert report(tmp_path)["counts"]["failed"] == 7
    (task,) = tasks_of(tmp_path, [{}], "--prompt", "a \udc80 cat")
    assert task.fault == "'a \\udc80 cat' holds a sign that is no text: write it anew."


def test_a_batch_is_a_row_per_seed(tmp_path):
    tasks = tasks_of(
        tmp_path, [{"prompt": "a", "seed": 2**64 - 1, "batch": 2, "name": "x/y"}, {"prompt": "a", "seed": 0}]
    )
    assert [(task.name, task.order["seed"]) for task in tasks] == [
        ("x_y-18446744073709551615", 2**64 - 1),
        ("x_y-0", 0),
        ("0002", 0),
    ]
    assert len({task.key for task in tasks}) == 3, "the same picture twice is two pictures"


# --- drawing --------------------------------------------------------------------------------------------------


def table_of(path: Path, rows: list[dict]) -> Path:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


TWO = "a <pixa> and a <nero>"
ROWS = [
    {"prompt": TWO, "seed": 5, "lora": "; ".join(LORAS), "steps": 3, "negative": "dull"},
    {"prompt": "a star", "seed": "five"},
    {"prompt": TWO, "seed": 6, "adapter": f"{PIXA}; {NERO}:0.75", "name": "adapters"},
    {"prompt": "a <rex>", "seed": 7},
    {"prompt": "a star", "seed": 8, "adapter": "nowhere.safetensors"},
    {"prompt": "a heart", "seed": 9, "size": 64},
]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """A table with three good rows: its folder, and how the command ended."""
    base = tmp_path_factory.mktemp("render")
    table = table_of(base / "t.csv", ROWS)
    done = subprocess.run(
        [sys.executable, "-m", "conceptsplit_core", "render", str(table), "--steps", "2", "--out", str(base / "out")],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return base / "out", done


def report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def test_demo_bad_rows_are_told_by_their_lines_and_the_rest_is_drawn(rendered):
    out, done = rendered
    assert done.returncode == 1, done.stderr
    rows = {row["line"]: row for row in report(out)["rows"]}
    assert {line: row["state"] for line, row in rows.items()} == {
        2: "done", 3: "failed", 4: "done", 5: "failed", 6: "failed", 7: "done",
    }  # fmt: skip
    assert rows[3]["fault"] == "seed: 'five' is not a whole number."
    assert rows[5]["fault"].startswith('Prompt "a <rex>" uses <rex>, which no connected loader provides')
    assert "nowhere.safetensors" in rows[6]["fault"]
    for line in (3, 5, 6):
        assert f"line {line}: {rows[line]['fault']}" in done.stderr
        assert f"line {line}: failed: {rows[line]['fault']}\n" in (out / "report.txt").read_text()
    assert report(out)["counts"] == {"done": 3, "kept": 0, "failed": 3, "waiting": 0}
    pictures = [rows[line]["files"][0] for line in (2, 4, 7)]
    assert {path.name for path in out.iterdir()} == {*pictures, "contact-sheet.png", "report.json", "report.txt"}
    assert pictures[1].startswith("adapters-") and pictures[2].startswith("0007-")
    assert "14 layers act at its words; 42 in its region" in rows[2]["notes"][0]


def test_demo_a_row_is_the_picture_that_sample_draws(rendered, call, tmp_path):
    out, _ = rendered
    rows = {row["line"]: row for row in report(out)["rows"]}
    alone = tmp_path / "a.png"
    lines = {
        2: ["--seed", 5, "--steps", 3, "--negative", "dull", *(part for lora in LORAS for part in ("--lora", lora))],
        4: ["--seed", 6, "--steps", 2, "--adapter", PIXA, "--adapter", f"{NERO}:0.75"],
    }
    for line, given in lines.items():
        assert call("sample", "--prompt", TWO, *given, "--out", alone)[0] == 0
        with Image.open(alone) as one, Image.open(out / rows[line]["files"][0]) as two:
            assert one.text == two.text and two.text["prompt"] == TWO
            assert np.array_equal(np.asarray(one), np.asarray(two))


def test_demo_the_same_command_goes_on(rendered, call, tmp_path):
    """Whole pictures are kept, whatever their row's number; a cut one is drawn again."""
    out, _ = rendered
    files = {row["line"]: out / row["files"][0] for row in report(out)["rows"] if row["files"]}
    whole, cut = files[4].stat().st_mtime_ns, files[7].read_bytes()
    files[7].write_bytes(cut[: len(cut) // 2])
    rows = [{"prompt": "a circle", "seed": 4, "steps": 1}, *ROWS]
    moved = table_of(tmp_path / "moved.csv", rows)
    code, _, err = call("render", moved, "--steps", 2, "--out", out)
    assert code == 1 and "3 of 7 pictures to draw, 2 there already." in err
    found = {row["line"]: row for row in report(out)["rows"]}
    assert {line: row["state"] for line, row in found.items()} == {
        2: "done", 3: "kept", 4: "failed", 5: "kept", 6: "failed", 7: "failed", 8: "done",
    }  # fmt: skip
    assert found[5]["files"] == [files[4].name] and files[4].stat().st_mtime_ns == whole
    assert found[8]["files"][0].startswith("0008-") and folder.is_whole(out / found[8]["files"][0])
    # The contact sheet shows the four pictures, the kept ones among them, in cells of 192 pixels.
    sheet = Image.open(out / "contact-sheet.png")
    assert sheet.size == (8 + 3 * 200, 30 + 8 + 2 * 220)
    assert (
        "moved.csv: 1 of 7 pictures to draw, 4 there already." in call("render", moved, "--steps", 2, "--out", out)[2]
    )


def test_demo_a_stopped_run_has_its_report_and_goes_on(call, tmp_path, monkeypatch):
    table = table_of(tmp_path / "t.csv", [{"prompt": "a star", "seed": seed} for seed in (3, 1, 2)])
    genuine, drawn = host.sample, []

    def sample(*given, **more):
        if drawn:
            raise KeyboardInterrupt
        drawn.append(more["seeds"])
        return genuine(*given, **more)

    monkeypatch.setattr(host, "sample", sample)
    line = ("render", table, "--steps", 1, "--out", tmp_path / "out")
    assert call(*line)[0] == 130 and drawn == [[3]]
    assert [row["state"] for row in report(tmp_path / "out")["rows"]] == ["done", "waiting", "waiting"]
    monkeypatch.undo()
    assert call(*line)[0] == 0
    assert [row["state"] for row in report(tmp_path / "out")["rows"]] == ["kept", "done", "done"]


def test_a_place_that_cannot_be_written_is_refused_before_drawing(refused, tmp_path):
    table = table_of(tmp_path / "t.csv", [{"prompt": "a star"}])
    (tmp_path / "file").write_text("x")
    assert "Cannot write" in refused("render", table, "--out", tmp_path / "file" / "out")


def gone(process: subprocess.Popen, seconds: float = 240) -> str:
    return process.communicate(timeout=seconds)[1]


def test_demo_two_runs_do_not_share_a_folder(tmp_path):
    """The second is refused while the first draws, and a run that was killed leaves the folder free."""
    table, out = (
        table_of(tmp_path / "t.csv", [{"prompt": TWO, "seed": 3, "words": "pixa", "steps": 400}]),
        tmp_path / "out",
    )
    line = [sys.executable, "-m", "conceptsplit_core", "render", str(table), "--prompt", "a star", "--out", str(out)]
    told = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True}
    table_of(table, [{"seed": seed, "steps": 900} for seed in range(9)])
    first = subprocess.Popen(line, **told)
    try:
        end = time.monotonic() + 120
        while not (out / ".rendering").exists() and time.monotonic() < end:
            time.sleep(0.05)
        second = subprocess.Popen(line, **told)
        said = gone(second)
        assert second.returncode == 2 and f"Another render is drawing into {out}: wait until it has ended" in said
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    table_of(table, [{"seed": 1, "steps": 1}])
    assert gone(third := subprocess.Popen(line, **told)) and third.returncode == 0
    assert {path.suffix for path in out.iterdir()} == {".png", ".json", ".txt"}


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit on Windows")
def test_demo_a_disk_that_fills_up_ends_the_run_with_one_sentence_and_nothing_half(tmp_path):
    """A limit on the length of files stands for the full disk: small pictures fit, the third does not."""
    import resource

    rows = [{"prompt": "a star", "seed": seed, "size": size} for seed, size in ((1, 64), (2, 64), (3, 256), (4, 64))]
    table, out = table_of(tmp_path / "t.csv", rows), tmp_path / "out"
    line = [sys.executable, "-m", "conceptsplit_core", "render", str(table), "--steps", "1", "--out", str(out)]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, preexec_fn=limit)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(
        r"render: Cannot write .+0004-\w{12}\.png: File too large; free space or choose another", done.stderr
    )
    assert [row["state"] for row in report(out)["rows"]] == ["done", "done", "waiting", "waiting"]
    pictures = sorted(path.name for path in out.iterdir() if path.suffix == ".png")
    assert len(pictures) == 2 and all(folder.is_whole(out / name) for name in pictures)
    assert {path.name for path in out.iterdir()} == {*pictures, "report.json", "report.txt"}
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and report(out)["counts"] == {"done": 2, "kept": 2, "failed": 0, "waiting": 0}


def test_demo_the_steps_of_a_row_are_shown(call, tmp_path):
    table = table_of(tmp_path / "t.csv", [{"prompt": "a star", "seed": seed, "steps": 60} for seed in (3, 4)])
    code, _, err = call("render", table, "--out", tmp_path / "out")
    steps = [int(step) for step in re.findall(r"line [23]: (\d+)/60", err)]
    assert code == 0 and len(set(steps)) >= 2 and max(steps) <= 60


def drawn_folder(path: Path, count: int, side: int) -> tuple[folder.Folder, list[Task]]:
    """A table of `count` rows whose pictures are there; each of its own colour."""
    path.mkdir(exist_ok=True)
    rows = [Row(i + 2, {"prompt": "a star", "seed": str(i)}) for i in range(count)]
    tasks = [Task(row.number, row.cells, f"{row.number:04d}", row.cells, f"{row.number:012x}") for row in rows]
    for i, task in enumerate(tasks):
        name = f"{task.name}-{task.key}.png"
        if not (path / name).exists():
            Image.new("RGB", (side, side // 2), (i % 251, 7 * i % 239, 90)).save(path / name)
    made = folder.Folder(path, Table("t.csv", "line", ["prompt", "seed"], rows), tasks, common.encode_picture)
    made.find_done()
    return made, tasks


def test_contact_sheets_follow_the_table(tmp_path):
    """Sheets of 48 in the table's order; what shows the same is left alone, and those of a longer table go."""
    made, tasks = drawn_folder(tmp_path, 101, 64)
    assert {task.state for task in tasks} == {"kept"}
    names = [path.name for path in made.sheets()]
    assert names == ["contact-sheet.png", "contact-sheet-2.png", "contact-sheet-3.png"]
    sheet = np.asarray(Image.open(tmp_path / names[1]))
    # 48 pictures stand in nine columns of 200; the twelfth is the third of the second line.
    y, x = 30 + 8 + 220 + 96, 8 + 2 * 200 + 96
    assert tuple(sheet[y, x]) == ((48 + 11) % 251, 7 * (48 + 11) % 239, 90)
    stamps = {name: (tmp_path / name).stat().st_mtime_ns for name in names}
    (tmp_path / "contact-sheet-mine.png").write_bytes(b"not ours")
    shorter, _ = drawn_folder(tmp_path, 60, 64)
    assert [path.name for path in shorter.sheets()] == names[:2]
    assert (tmp_path / names[0]).stat().st_mtime_ns == stamps[names[0]]
    assert (tmp_path / names[1]).stat().st_mtime_ns != stamps[names[1]]
    assert not (tmp_path / names[2]).exists() and (tmp_path / "contact-sheet-mine.png").exists()


def test_sheets_and_reports_of_others_are_left_alone(refused, tmp_path):
    for name in ("contact-sheet.png", "contact-sheet-3.png", "contact-sheet-9.png"):
        Image.new("RGB", (9, 5)).save(tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    made, _ = drawn_folder(tmp_path, 101, 16)
    assert [path.name for path in made.sheets()] == [f"contact-sheet-{n}.png" for n in (2, 4, 5)]
    shorter, _ = drawn_folder(tmp_path, 5, 16)
    assert [path.name for path in shorter.sheets()] == ["contact-sheet-2.png"]
    assert {path: path.read_bytes() for path in before} == before
    assert {path.name for path in tmp_path.glob("contact-sheet*")} == {path.name for path in before} | {
        "contact-sheet-2.png"
    }
    table = table_of(tmp_path / "t.csv", [{"prompt": "a star"}])
    for name, text in (("report.txt", "my notes"), ("report.json", '{"what": "ConceptSplit demo"}')):
        (tmp_path / name).write_text(text)
        said = refused("render", table, "--out", tmp_path)
        assert f"{name} is not a report of ConceptSplit render and would be replaced: move it away or" in said
        assert (tmp_path / name).read_text() == text


def test_a_sheet_of_large_pictures_needs_the_memory_of_a_few(tmp_path):
    made, _ = drawn_folder(tmp_path, 40, 1536)
    tracemalloc.start()
    try:
        assert len(made.sheets()) == 1
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 8 * 1536 * 768 * 3, "40 pictures are read one after the other"


# --- workers that die -----------------------------------------------------------------------------------------


class Hand:
    """A worker of threads: `deadly` orders end it, and it is back after `rest` questions."""

    places = 2

    def __init__(self, name: str, deadly: set[int], rest: float = float("inf")):
        self.name, self.deadly, self.rest, self.closed = name, deadly, rest, False

    def draw(self, order: int, step) -> Drawing:
        time.sleep(0.01)
        if order in self.deadly:
            raise WorkerLost("the power went")
        if order == 13:
            raise ConceptSplitError("Thirteen is unlucky.")
        if order == 14:
            raise KeyError("fourteen")
        return Drawing([(".txt", str(order).encode())])

    def alive(self) -> bool:
        self.rest -= 1
        return self.rest < 0

    def close(self) -> None:
        self.closed = True


def crew(orders: list[int], workers: list[Hand], **more):
    tasks = [Task(i, {}, order=order) for i, order in enumerate(orders)]
    drawn: dict[int, bytes | None] = {}
    said: list[str] = []

    def finished(task, drawing):
        assert task.number not in drawn, "a task is finished once"
        drawn[task.number] = drawing and drawing.files[0][1]

    Crew(tasks, workers, finished, lambda problem: f"Unforeseen {problem!r}", said.append, **more).run()
    assert all(worker.closed for worker in workers) and threading.active_count() < 20
    return tasks, drawn, said


def test_rows_of_a_dead_worker_go_to_others():
    orders = [5, 6, 7, 13, 8, 14, 9]
    tasks, drawn, said = crew(orders, [Hand("one", set(orders)), Hand("two", set())])
    assert drawn == {i: None if order in (13, 14) else str(order).encode() for i, order in enumerate(orders)}
    assert {task.fault for task in tasks} == {"", "Thirteen is unlucky.", "Unforeseen KeyError('fourteen')."}
    assert said == ["one is lost (the power went): its rows go to others."]
    assert 1 <= sum(task.tries == 2 for task in tasks) <= 2 and {task.worker for task in tasks} == {"two"}


def test_a_row_that_ends_three_workers_has_failed():
    tasks, drawn, said = crew([1, 666, 2], [Hand("one", {666}, rest=0), Hand("two", {666}, rest=0)])
    assert drawn == {0: b"1", 1: None, 2: b"2"} and tasks[1].tries == 3
    assert tasks[1].fault == "3 workers were lost while they drew it, the last because the power went."
    assert any("is back." in text for text in said)


def test_without_any_worker_the_run_ends_and_says_what_is_left():
    one = Hand("one", {5, 6})
    one.places = 1  # a second place might be drawing the first row when the worker is lost
    tasks, drawn, _ = crew([4, 5, 6], [one], patience=0.0)
    assert drawn == {0: b"4"} and [task.state for task in tasks] == ["waiting"] * 3 and not tasks[1].fault


def test_a_row_that_is_stopped_with_the_run_has_not_failed():
    """Closing a worker ends what it draws, which is no fault of the row."""
    begun, stopped, ended = threading.Event(), threading.Event(), threading.Event()

    class Stopped(Hand):
        places = 1

        def draw(self, order, step):
            if self.name == "two":
                begun.wait(20)
                return Drawing([(".txt", b"")])
            begun.set()
            try:
                stopped.wait(20)
                raise ConceptSplitError("It was stopped at the server")
            finally:
                ended.set()

        def close(self):
            stopped.set()
            ended.wait(20)
            time.sleep(0.05)

    def full(task, drawing):
        raise ConceptSplitError("The disk is full.")

    tasks = [Task(i, {}, order=i) for i in range(2)]
    with pytest.raises(ConceptSplitError, match="disk is full"):
        Crew(tasks, [Stopped("one", set()), Stopped("two", set())], full, str, print).run()
    assert [task.state for task in tasks] == ["waiting", "waiting"]


def test_a_full_disk_ends_the_run():
    def finished(task, drawing):
        raise ConceptSplitError("Cannot write x: No space left on device; free space or choose another folder.")

    one = Hand("one", set())
    with pytest.raises(ConceptSplitError, match="No space left"):
        Crew([Task(i, {}, order=i) for i in range(9)], [one], finished, str, print).run()
    assert one.closed


# --- a Ray cluster --------------------------------------------------------------------------------------------


def test_ray_that_is_not_installed_is_one_sentence(refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    table = table_of(tmp_path / "t.csv", [{"prompt": "a star"}])
    assert "The package ray is not installed" in refused("render", table, "--ray", "--out", tmp_path / "out")


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="RAY IS NOT INSTALLED: its workers are not tested")
def test_demo_ray_a_killed_worker_loses_nothing(tmp_path):
    """A cluster of two workers on this machine, one of them killed while it draws."""
    rows = [{"prompt": TWO, "seed": seed, "lora": "; ".join(LORAS), "steps": 10} for seed in range(20, 28)]
    rows.insert(3, {"prompt": "a <rex>", "seed": 1})
    table, out = table_of(tmp_path / "t.csv", rows), tmp_path / "out"
    line = [sys.executable, "-m", "conceptsplit_core", "render", str(table), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": "", "PYTHONUNBUFFERED": "1"}
    running = subprocess.Popen(
        [*line, "--ray", "--workers", "2"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(running.stderr), daemon=True)
    reader.start()
    try:
        end = time.monotonic() + 240
        while not list(out.glob("0*.png")) and running.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        processes = re.findall(r"worker (\d): process (\d+) on ", "".join(said))
        assert [number for number, _ in processes] == ["1", "2"], said
        os.kill(int(processes[0][1]), signal.SIGKILL)
        assert running.wait(240) == 1
    finally:
        running.kill()
        reader.join(10)
    found = report(out)
    assert found["counts"] == {"done": 8, "kept": 0, "failed": 1, "waiting": 0}, said
    (bad,) = [row for row in found["rows"] if row["state"] == "failed"]
    assert bad["line"] == 5 and bad["fault"].startswith('Prompt "a <rex>" uses <rex>')
    assert max(row["tries"] for row in found["rows"]) == 2
    assert {row["worker"] for row in found["rows"]} >= {"worker 2"}
    assert any("worker 1 is lost (its process ended): its rows go to others." in text for text in said)
    # The cluster's pictures are this process's: one of them is drawn again here.
    (first,) = found["rows"][0]["files"]
    theirs = (out / first).read_bytes()
    (out / first).unlink()
    assert subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, timeout=240).returncode == 1
    assert report(out)["counts"] == {"done": 1, "kept": 7, "failed": 1, "waiting": 0}
    assert (out / first).read_bytes() == theirs


def start_cluster(base: str, home: Path, port: int) -> None:
    """Starts a Ray cluster that asks for the token in `home`; its processes have `base` in their command lines."""
    line = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}", "--num-cpus=2"]
    line += ["--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={base}"]
    environment = {**os.environ, "HOME": str(home), "RAY_AUTH_MODE": "token", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def kill_cluster(base: str) -> None:
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if base.encode() in command.read_bytes() and int(command.parent.name) != os.getpid():
                os.kill(int(command.parent.name), signal.SIGKILL)
        except OSError:
            continue


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="RAY IS NOT INSTALLED: its workers are not tested")
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds a node's processes as Linux shows them")
def test_demo_ray_a_running_cluster_with_a_token_loses_a_worker_and_nothing_else(tmp_path):
    """A cluster that asks for a token, started by itself; without the token a sentence; one of two workers killed."""
    home, stranger = tmp_path / "home", tmp_path / "stranger"
    (home / ".ray").mkdir(parents=True)
    stranger.mkdir()
    (home / ".ray" / "auth_token").write_text("5eed" * 16)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rows = [{"prompt": TWO, "seed": seed, "lora": "; ".join(LORAS), "steps": 10} for seed in range(40, 46)]
    table, out = table_of(tmp_path / "t.csv", rows), tmp_path / "out"
    line = [sys.executable, "-m", "conceptsplit_core", "render", str(table), "--out", str(out)]
    line += ["--ray", f"127.0.0.1:{port}", "--workers", "2"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    # Sockets have short names: not in pytest's folder.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as base:
        running = None
        try:
            start_cluster(base, home, port)
            told = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 240}
            refused = subprocess.run(line, env={**environment, "HOME": str(stranger)}, **told)
            assert refused.returncode == 2 and not list(out.glob("*.png"))
            assert f"The Ray cluster at 127.0.0.1:{port} lets nobody in from here: put its token into" in refused.stderr
            running = subprocess.Popen(
                line, cwd=ROOT, env={**environment, "HOME": str(home)}, stderr=subprocess.PIPE, text=True
            )
            said: list[str] = []
            reader = threading.Thread(target=lambda: said.extend(running.stderr), daemon=True)
            reader.start()
            end = time.monotonic() + 300
            while not list(out.glob("0*.png")) and running.poll() is None and time.monotonic() < end:
                time.sleep(0.05)
            processes = re.findall(r"worker (\d): process (\d+) on ", "".join(said))
            assert [number for number, _ in processes] == ["1", "2"], said
            os.kill(int(processes[0][1]), signal.SIGKILL)
            assert running.wait(300) == 0, said
            reader.join(10)
        finally:
            if running is not None:
                running.kill()
            kill_cluster(base)
    assert report(out)["counts"] == {"done": 6, "kept": 0, "failed": 0, "waiting": 0}, said
    assert "worker 1 is lost (its process ended): its rows go to others." in "".join(said)
    assert max(row["tries"] for row in report(out)["rows"]) == 2


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="RAY IS NOT INSTALLED: its workers are not tested")
def test_no_cluster_at_an_address_is_one_sentence_at_once(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # `refused` runs here: what it sets must not stay
    table = table_of(tmp_path / "t.csv", [{"prompt": "a star"}])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        began = time.monotonic()
        said = refused("render", table, "--ray", address, "--out", tmp_path / "out")
    assert f"There is no Ray cluster at {address}: " in said and time.monotonic() - began < 30


# --- graphs of ComfyUI (servers: tests/host/suite/test_render.py) ------------------------------------------------


def test_columns_find_their_inputs():
    graph = server.read_graph(TEMPLATE)
    wanted = {
        "Prompt": ("6", "text"), "negative PROMPT.text": ("7", "text"), "9.seed": ("9", "seed"),
        "KSampler (LODA).steps": ("9", "steps"), "ksampler.cfg": ("10", "cfg"), "loda_steps": ("9", "loda_steps"),
        "First LoRA: <pixa>.strength": ("4", "strength"), "width": ("8", "width"),
    }  # fmt: skip
    assert {column: server.find_input(graph, column) for column in wanted} == wanted


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ("seed", "fits several inputs of the graph: name it '9.seed' (KSampler (LODA)) or '10.seed' (KSampler, same"),
        ("9.sed", "is no input of the graph (did you mean '9.seed'?)"),
        ("9.model", "is no input of the graph"),
        ("LoraLoader.lora_name", "fits several inputs of the graph: name it '2.lora_name'"),
    ],
)
def test_a_column_that_fits_none_or_several_inputs_is_refused(refused, tmp_path, column, said):
    table = table_of(tmp_path / "t.csv", [{column: 3}])
    assert said in refused("render", table, "--graph", TEMPLATE, "--out", tmp_path / "out")


def test_cells_take_the_type_of_their_input():
    graph = server.read_graph(TEMPLATE)
    cells = {"9.seed": str(2**64 - 1), "9.cfg": "3", "9.afg": "no", "Prompt": 7, "10.steps": 4, "9.denoise": 1}
    table = Table("t.csv", "line", list(cells), [Row(2, cells)])
    made = server.fill(graph, {column: server.find_input(graph, column) for column in cells}, table.rows[0], table)
    assert made["9"]["inputs"] | {"seed": 2**64 - 1, "cfg": 3.0, "afg": False, "denoise": 1.0} == made["9"]["inputs"]
    assert (made["6"]["inputs"]["text"], made["10"]["inputs"]["steps"]) == ("7", 4)
    assert graph["9"]["inputs"]["seed"] == 1000, "the template is as it was"
    # A page writes 8.0 as 8: what stands there does not say that an input is a whole number.
    for cell, value in (("7.5", 7.5), ("20.0", 20.0), ("9" * 400, int("9" * 400))):
        assert server.fill(graph, {"c": ("9", "seed")}, Row(2, {"c": cell}), table)["9"]["inputs"]["seed"] == value
    for column, cell, said in (
        ("9.seed", "nan", "9.seed: 'nan' is not a number"),
        ("9.steps", "1e999", "9.steps: '1e999' is not a number"),
        ("9.steps", True, "9.steps: 'True' is not a number"),
        ("10.cfg", {"a": 1}, '10.cfg: {"a": 1} is not one value'),
        ("Prompt", ["a", "b"], 'Prompt: ["a", "b"] is not one value'),
        ("9.afg", [True], "9.afg: [true] is not one value"),
        ("9.afg", "maybe", "9.afg: 'maybe' is not yes or no"),
        ("9.cfg", "high", "9.cfg: 'high' is not a number"),
    ):
        with pytest.raises(ConceptSplitError, match=re.escape(said)):
            server.fill(graph, {column: server.find_input(graph, column)}, Row(2, {column: cell}), table)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--server", "127.0.0.1:9", "--graph", TEMPLATE], "server 127.0.0.1:9 cannot be reached: start ComfyUI"),
        (["--server", "127.0.0.1:9"], "--server needs --graph"),
        (["--server", "ftp://x", "--graph", TEMPLATE], "--server ftp://x is no address"),
        (["--server", "127.0.0.1:abc", "--graph", TEMPLATE], "--server 127.0.0.1:abc is no address: write HOST:PORT"),
        (["--server", "127.0.0.1:99999", "--graph", TEMPLATE], "--server 127.0.0.1:99999 is no address"),
        (["--server", "my host:8188", "--graph", TEMPLATE], "--server my host:8188 is no address"),
        (["--server", "http://[::1", "--graph", TEMPLATE], "--server http://[::1 is no address"),
        (["--server", "h\u00a0:1", "--graph", TEMPLATE], "is no address"),
        (["--workers", "3", "--graph", TEMPLATE], "--workers are those of a Ray cluster: add --ray."),
        (["--graph", TEMPLATE, "--cfg", "2"], "--cfg has no effect with --graph: name a column of the table"),
        (["--graph", TEMPLATE, "--ray"], "--ray and --server are two ways to draw a table: use one."),
        (["--graph", ROOT / "workflows" / TEMPLATE.name], "export it with ComfyUI's menu Export (API)"),
    ],
)
def test_servers_that_cannot_be_asked_are_one_sentence(refused, tmp_path, line, said):
    table = table_of(tmp_path / "t.csv", [{"9.seed": 3}])
    told = refused("render", table, *line, "--out", tmp_path / "out")
    assert said in told


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{", "the connection broke: IncompleteRead"),
        (b"what?\r\n\r\n", "the connection broke: what?"),
        (b"HTTP/1.1 502 Bad\r\nContent-Length: 500\r\n\r\n{", "it answers 502 to /queue"),
    ],
)
def test_a_server_that_dies_in_its_answer_is_lost(answer, refused):
    with socket.create_server(("127.0.0.1", 0)) as door:

        def die():
            with door.accept()[0] as line:
                line.recv(4096)
                line.sendall(answer)

        threading.Thread(target=die, daemon=True).start()
        dying = server.Server(f"127.0.0.1:{door.getsockname()[1]}")
        with pytest.raises(WorkerLost, match=re.escape(refused)):
            dying._ask("/queue")


def test_a_node_of_a_graph_may_say_nothing_about_itself(tmp_path):
    graph = {"3": {"class_type": "KSampler", "inputs": {"seed": 1}, "_meta": None}}
    (tmp_path / "g.json").write_text(json.dumps(graph))
    assert server.find_input(server.read_graph(tmp_path / "g.json"), "seed") == ("3", "seed")
    assert server._named(graph, "3") == "KSampler (node 3)"


def test_keys_tell_rows_apart():
    earlier: Counter[str] = Counter()
    keys = [folder.key(order, earlier) for order in ({"a": 1}, {"a": 2}, {"a": 1})]
    assert len(set(keys)) == 3
    earlier = Counter()
    assert [folder.key(order, earlier) for order in ({"a": 1}, {"a": 1})] == [keys[0], keys[2]]


def test_the_example_of_the_page_can_be_drawn(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "render.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```csv\n(.+?)```", page, re.DOTALL)
    monkeypatch.chdir(ROOT)
    table = read_table(write(tmp_path / "t.csv", text))
    tasks = render.sample_tasks(table, options.parse(["render", "t.csv"]))
    assert len(tasks) == 6 and {task.state for task in tasks} == {"waiting"}, [task.fault for task in tasks]
