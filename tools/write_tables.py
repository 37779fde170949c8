"""Writes the tables of settings in the help pages and the README from conceptsplit_core/settings, and the list of
sentences from the code.

python tools/write_tables.py

A table stands between two marks in its page; what is around them is written by hand.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from conceptsplit_core.options import Option, defaults, options, shown  # noqa: E402
from conceptsplit_core.settings import (  # noqa: E402
    CorrectionConfig,
    GateConfig,
    LoaderConfig,
    LodaConfig,
    SampleConfig,
    TrainConfig,
)
from tools import sentences  # noqa: E402

# Help page of a node to the settings class it shows and whether the basic (False), the advanced or all (None) of it,
# and further classes, shown whole.
PAGES: dict[str, tuple[Any, ...]] = {
    "ConceptSplitLoader": (LoaderConfig, None, GateConfig),
    "ConceptSplitLoraLoader": (LoaderConfig, None),
    "ConceptSplitApply": (LoaderConfig, None, GateConfig),
    "ConceptSplitKSampler": (LodaConfig, False),
    "ConceptSplitGuider": (LodaConfig, False),
    "ConceptSplitLodaOptions": (LodaConfig, True),
    "ConceptSplitCorrectWords": (CorrectionConfig, None),
    "ConceptSplitTrain": (TrainConfig, False),
    "ConceptSplitTrainOptions": (TrainConfig, True),
}
MARKS = re.compile(r"<!-- settings -->\n.*?\n<!-- end of settings -->", re.DOTALL)


def node_table(config: Any, advanced: bool | None, *more: Any) -> str:
    """Every option of a node: name, default, range, what it does and when to change it."""
    rows = ["| setting | default | range | what it does |", "|---|---|---|---|"]
    for each, which in ((config, advanced), *((other, None) for other in more)):
        for name, option in options(each, which).items():
            rows.append(f"| {name} | {shown(defaults(each)[name])} | {limits(each, name, option)} | {option.text} |")
    return "\n".join(rows)


def limits(config: Any, name: str, option: Option) -> str:
    return "on or off" if isinstance(defaults(config)[name], bool) else option.range


def readme_table() -> str:
    """The options that a user changes for a reason, and the reason."""
    rows = ["| setting | meaning | default | when to change it |", "|---|---|---|---|"]
    for config in (TrainConfig, LoaderConfig, GateConfig, SampleConfig, LodaConfig):
        for name, option in options(config).items():
            if option.change:
                rows.append(f"| `{name}` | {option.label} | {shown(defaults(config)[name])} | {option.change} |")
    return "\n".join(rows)


def pages() -> Iterator[tuple[Path, str]]:
    """Every page with tables, and its text as it should be."""
    tables = {ROOT / "web" / "docs" / f"{node}.md": node_table(*which) for node, which in PAGES.items()}
    tables[ROOT / "README.md"] = readme_table()
    for path, table in tables.items():
        text = path.read_text(encoding="utf-8")
        if len(MARKS.findall(text)) != 1:
            raise SystemExit(f"{path.name} needs one pair of marks: <!-- settings --> and <!-- end of settings -->.")
        before, after = MARKS.split(text)
        yield path, f"{before}<!-- settings -->\n{table}\n<!-- end of settings -->{after}"
    yield ROOT / "docs" / "tables" / "sentences.md", sentences.page()


if __name__ == "__main__":
    for page, wanted in pages():
        page.write_text(wanted, encoding="utf-8")
