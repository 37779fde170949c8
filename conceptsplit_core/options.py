"""What an option is: a dataclass field that carries its name, range and words.

Node inputs, terminal options and the tables of help pages and README are made from such fields. Free of torch, so that
help starts at once. The options themselves are in `settings`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import ConceptSplitError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class Option:
    """What there is to know about one field.

    label: a few words for it.  help: one sentence on what it does.  change: when to change it, and how.
    low, high: range of a number, both ends allowed.
    step: by how much a widget's arrows change it.
    choices: allowed values, or a registry whose names are allowed.
    advanced: rarely changed; nodes show it behind an options node or an unfolded section.
    shown: False for what a host sets itself.
    continues: may differ between a training and the one that resumes it.
    drawn: a node draws another value for each run.
    """

    label: str
    help: str
    change: str = ""
    low: float = 0
    high: float = 1
    step: float = 1
    choices: Collection = ()
    advanced: bool = False
    shown: bool = True
    continues: bool = False
    drawn: bool = False

    @property
    def allowed(self) -> tuple:
        """The choices; what a registry holds now."""
        return tuple(self.choices)

    @property
    def text(self) -> str:
        """All that is to be said to a user, in sentences."""
        return f"{self.help} {self.change}".strip()

    @property
    def range(self) -> str:
        """What may be given, in words: '0 to 1', 'jsd or kl'."""
        if self.allowed:
            return " or ".join(", ".join(map(str, self.allowed)).rsplit(", ", 1))
        return f"{shown(self.low)} to {shown(self.high)}"

    def fault(self, name: str, value: Any) -> str:
        """What is wrong with `value` in a few words, '' if nothing is."""
        if isinstance(value, bool):
            return ""
        good = value in self.allowed if self.allowed else self.low <= value <= self.high  # nan is not
        return "" if good else f"{name} is {value!r}, use {self.range}"


def option(default: Any, label: str, help: str, change: str = "", **rest: Any) -> Any:
    """A dataclass field that is an option; `rest` as in `Option`."""
    return field(default=default, metadata={"option": Option(label, help, change, **rest)})


_EXTENDED: dict[type, type] = {}


def extends(config: type) -> Callable[[type], type]:
    """Registers a subclass whose further fields are options of `config` too, in the nodes and in the terminal.

    A field at the end of its class is the usual way; this is for a package that stands beside this one.
    """

    def register(extended: type) -> type:
        _EXTENDED[config] = extended
        return extended

    return register


def options(config: Any, advanced: bool | None = None) -> dict[str, Option]:
    """Options that a user may set, by name, in order: all, or the basic or the advanced ones."""
    return {
        name: found
        for name, found in all_options(config)
        if found.shown and (advanced is None or found.advanced == advanced)
    }


def all_options(config: Any) -> Iterator[tuple[str, Option]]:
    """Every option by name, those that a host sets itself included."""
    for each in fields(_EXTENDED.get(config, config)):
        yield each.name, each.metadata["option"]


def defaults(config: Any) -> dict[str, Any]:
    """Default of every field."""
    return {each.name: each.default for each in fields(_EXTENDED.get(config, config))}


def shown(value: Any) -> str:
    """A value as help pages and tables show it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


Config = TypeVar("Config", bound="DataclassInstance")


def from_values(config: type[Config], values: Mapping[str, Any], base: Config | None = None) -> Config:
    """`base`, or the defaults, with those of `values` that are options of `config`; the rest of `values` is left alone.

    Raises:
        ConceptSplitError: a value out of its range.
    """
    given = {name: values[name] for name in options(config) if name in values}
    # A list of choices reaches us as text, whatever its values are.
    given = {name: type(default)(given[name]) for name, default in defaults(config).items() if name in given}
    return _EXTENDED.get(config, config)(**given) if base is None else replace(base, **given)


def check(config: Any, what: str) -> None:
    """Refuses a value out of its range.

    Args:
        what: whose settings they are, as the sentence begins: 'LODA', 'Training'.

    Raises:
        ConceptSplitError: naming the option, its value and its range.
    """
    for name, found in all_options(config):
        if fault := found.fault(name, getattr(config, name)):
            raise ConceptSplitError(f"{what} setting out of range: {fault}.")
