"""Cache policies and decoding rules by name: the built-in ones, and those that installed packages bring as entry points.

A package that cannot be imported or used takes none of the others with it: what is wrong is said to who asks for it by name.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, Literal, TypeVar, get_origin, get_type_hints

from dllm_export.errors import StrategyError, UsageError
from dllm_export.runtime.options import COMMAND_FLAGS, OPTION_TYPES, GenerationOptions, flag, plain_type
from dllm_export.runtime.policies import POLICIES, CachePolicy
from dllm_export.runtime.session import SessionOptions
from dllm_export.runtime.transfers import TRANSFERS, Transfer

Kind = TypeVar("Kind")


@dataclass(frozen=True, slots=True, kw_only=True)
class Seam:
    """Where a package can plug in: the entry point group, and what is expected of its members."""

    noun: str
    group: str
    method: str
    built_in: Mapping[str, type[Any]]
    flags: tuple[str, ...] = ()
    """Class attributes that must be True or False."""

    @property
    def article(self) -> str:
        """Whose a flag is, in an error message."""
        return f"a {self.noun}"


POLICY_SEAM = Seam(noun="cache policy", group="dllm_export.policies", method="plan", built_in=POLICIES)
TRANSFER_SEAM = Seam(
    noun="decoding rule",
    group="dllm_export.transfers",
    method="choose",
    built_in=TRANSFERS,
    flags=("keeps_schedule", "ranks", "remasks", "verifies"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin:
    """An entry point of an installed package, and the sentence that says why it cannot be used, if so."""

    noun: str
    name: str
    package: str
    fault: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategies(Generic[Kind]):
    """All policies or all rules that are there. A name in both mappings is a built-in's that a package wanted too."""

    noun: str
    kinds: Mapping[str, type[Kind]]
    faults: Mapping[str, str]

    def find(self, name: str) -> type[Kind]:
        """The class of this name, or an error that says what is wrong with it or lists the names."""
        if name in self.kinds:
            return self.kinds[name]
        if name in self.faults:
            raise StrategyError(self.faults[name])
        near = difflib.get_close_matches(name, self.kinds, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"no {self.noun} is called {name!r}; there are: {', '.join(self.kinds)}{hint}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """Everything that can be chosen on this machine."""

    policies: Strategies[CachePolicy]
    transfers: Strategies[Transfer]
    plugins: tuple[Plugin, ...]


def find_policy(name: str) -> type[CachePolicy]:
    """The cache policy of this name; packages are only looked at for names that are not built in."""
    return POLICIES[name] if name in POLICIES else find_installed().policies.find(name)


def find_transfer(name: str) -> type[Transfer]:
    """The decoding rule of this name; packages are only looked at for names that are not built in."""
    return TRANSFERS[name] if name in TRANSFERS else find_installed().transfers.find(name)


def find_installed() -> Installed:
    """Import what packages bring, check it, and put it behind the built-in strategies."""
    plugins: list[Plugin] = []
    taken = built_in_flags()
    policies = load_seam(POLICY_SEAM, taken, plugins)
    transfers = load_seam(TRANSFER_SEAM, taken, plugins)
    return Installed(policies=policies, transfers=transfers, plugins=tuple(plugins))


def built_in_flags() -> dict[str, tuple[str, object]]:
    """Flags that exist without any package: name -> (whose it is, its type)."""
    taken: dict[str, tuple[str, object]] = {name: ("the command", None) for name in COMMAND_FLAGS}
    for options in (GenerationOptions, SessionOptions):
        taken |= {field.name: ("the command", None) for field in fields(options)}
    for seam in (POLICY_SEAM, TRANSFER_SEAM):
        for kind in seam.built_in.values():
            taken |= {name: (seam.article, hint) for name, hint in hints_of(kind).items()}
    return taken


def load_seam(seam: Seam, taken: dict[str, tuple[str, object]], plugins: list[Plugin]) -> Strategies[Any]:
    """Load one group; new flags go into `taken`, what was found into `plugins`."""
    kinds, faults = dict(seam.built_in), {}
    found: dict[str, list[EntryPoint]] = {}
    for entry in sorted(entry_points(group=seam.group), key=lambda entry: (package_of(entry), entry.name)):
        found.setdefault(entry.name, []).append(entry)
    for name, entries in found.items():
        packages = " and ".join(map(package_of, entries))
        fault, kind = None, None
        if name in seam.built_in:
            fault = "the name is that of a built-in one, which is used in its place"
        elif len(entries) > 1:
            fault = "a name can be used once: uninstall all but one"
        else:
            fault, kind = load_entry(seam, entries[0], taken)
        if fault:
            faults[name] = (
                f"the {seam.noun} '{name}' of the package {packages} cannot be used: {fault}; update or uninstall the "
                f"package, or report this to its author"
            )
        elif kind is not None:
            kinds[name] = kind
            taken |= {field: (seam.article, hint) for field, hint in hints_of(kind).items()}
        plugins += [
            Plugin(noun=seam.noun, name=name, package=package_of(entry), fault=faults.get(name)) for entry in entries
        ]
    return Strategies(noun=seam.noun, kinds=kinds, faults=faults)


def load_entry(
    seam: Seam, entry: EntryPoint, taken: Mapping[str, tuple[str, object]]
) -> tuple[str | None, type[Any] | None]:
    """(what is wrong or None, the class). Whatever the package's code raises is a fault of its own."""
    try:
        kind = entry.load()
        return next(find_faults(seam, entry.name, kind, taken), None), kind
    except (Exception, SystemExit) as error:
        text = (str(error).splitlines() or ["no message"])[0]
        return f"{type(error).__name__}: {text}", None


def find_faults(seam: Seam, name: str, kind: Any, taken: Mapping[str, tuple[str, object]]) -> Iterator[str]:
    """What keeps a loaded object from being a policy or a rule."""
    if not (inspect.isclass(kind) and is_dataclass(kind) and getattr(kind, "__dataclass_params__").frozen):  # noqa: B009
        yield f"{kind!r:.60} is not a frozen dataclass"
        return
    if getattr(kind, "name", None) != name:
        yield f"its class calls itself {getattr(kind, 'name', None)!r}, expected the entry point's name"
    if not callable(getattr(kind, seam.method, None)):
        yield f"its class has no method '{seam.method}'"
    for attribute in seam.flags:
        if not isinstance(getattr(kind, attribute, None), bool):
            yield f"its class has no '{attribute}' that is True or False: derive it from Transfer"
    hints = hints_of(kind)
    for field in fields(kind):
        yield from find_option_faults(seam, field, hints[field.name], taken)
    kind()


def find_option_faults(
    seam: Seam, field: Field[Any], hint: object, taken: Mapping[str, tuple[str, object]]
) -> Iterator[str]:
    """What keeps a field from being a flag."""
    if "help" not in field.metadata or field.default is MISSING:
        yield f"its field '{field.name}' is not declared with dllm_export.runtime.options.option(default, help)"
    plain = plain_type(hint)
    if plain not in OPTION_TYPES and get_origin(plain) is not Literal:
        names = ", ".join(kind.__name__ for kind in OPTION_TYPES)
        yield f"its field '{field.name}' is a {plain}, expected one of {names} or a Literal of texts"
    owner, other = taken.get(field.name, (seam.article, hint))
    if owner != seam.article:
        yield f"its field '{field.name}' would be the flag {flag(field.name)}, which {owner} has already"
    elif other != hint:
        yield f"its field '{field.name}' has another type than the same field of another {seam.noun}"


def hints_of(kind: type[Any]) -> dict[str, object]:
    """Types of a dataclass's fields by name."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def package_of(entry: EntryPoint) -> str:
    """Name and version of the package that brings an entry point."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "(unknown)"
