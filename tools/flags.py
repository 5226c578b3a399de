"""Command-line flags made from dataclass fields: an option is declared once, where it is used."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import click

from dllm_export.errors import IncompatibleError, UsageError
from dllm_export.runtime.options import flag, plain_type
from dllm_export.runtime.plugins import Strategies, find_installed
from dllm_export.runtime.policies import POLICIES
from dllm_export.runtime.transfers import TRANSFERS
from dllm_export.tools.machine import pip_line
from dllm_export.tools.output import print_warning

Callback = TypeVar("Callback", bound=Callable[..., object])
Decorator = Callable[[Callback], Callback]

TYPES: Mapping[type, click.ParamType[Any]] = {
    int: click.INT,
    float: click.FLOAT,
    str: click.STRING,
    Path: click.Path(path_type=Path),
}


class Flag(click.Option):
    """An option that knows the section of the help text it belongs to."""

    def __init__(self, declarations: list[str], *, section: str = "Options", **settings: Any) -> None:
        super().__init__(declarations, **settings)
        self.section = section


class Command(click.Command):
    """A command whose help groups its flags by section, in the order of their declaration."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections.setdefault(getattr(parameter, "section", "Output"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def from_fields(options: type[Any], parameter: str, section: str) -> Decorator[Any]:
    """A decorator: one flag per field of the dataclass; the command gets the finished instance as `parameter`."""
    hints = get_type_hints(options)

    def decorate(command: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(command)
        def call(**values: Any) -> object:
            own = {field.name: values.pop(field.name) for field in fields(options)}
            return command(**values, **{parameter: options(**own)})

        decorated: Callable[..., object] = call
        for field in reversed(fields(options)):
            decorated = make_flag(field, hints[field.name], section, field.default)(decorated)
        return decorated

    return decorate


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A flag that picks one of several dataclasses by name, whose fields are flags too."""

    parameter: str
    strategies: Strategies[Any]
    default: str | None
    """None leaves the choice to the bundle's family."""
    section: str
    help: str
    spellings: tuple[str, ...] = ()
    """Other spellings of the flag."""

    def make(self, name: str | None, values: Mapping[str, Any]) -> Any:
        """The strategy of this name with the values that were given (not None); None without a name.

        One that wraps another of its kind passes on what belongs to that, or not to itself.
        """
        if name is None:
            for field, value in values.items():
                if value is not None:
                    owners = self.owners[field]
                    raise UsageError(
                        f"{flag(field)} belongs to the {self.strategies.noun}: {', '.join(owners)}; "
                        f"add {flag(self.parameter)} {owners[0]} or leave it out"
                    )
            return None
        kind = self.strategies.find(name)
        if name in self.strategies.faults:
            print_warning(self.strategies.faults[name])
        given = {field: value for field, value in values.items() if value is not None}
        own = {field.name for field in fields(kind)}
        for wrapped in fields(kind):
            if wrapped.metadata.get("strategy"):
                name_inside = given.pop(wrapped.name, wrapped.default.name)
                inside = {field.name for field in fields(self.strategies.find(name_inside))}
                passed = {field: given.pop(field) for field in [*given] if field in inside or field not in own}
                given[wrapped.name] = self.make(name_inside, passed)
        for field in given:
            if field not in own:
                owners = self.owners[field]
                raise UsageError(
                    f"{flag(field)} is no option of the {self.strategies.noun} '{name}', it belongs to: {', '.join(owners)}; "
                    f"add {flag(self.parameter)} {owners[0]} or leave it out"
                )
        return kind(**given)

    @property
    def owners(self) -> dict[str, list[str]]:
        """The kinds that have an option, by its name."""
        owners: dict[str, list[str]] = {}
        for name, kind in self.strategies.kinds.items():
            for field in fields(kind):
                owners.setdefault(field.name, []).append(name)
        return owners


def strategy_flags(command: Callable[..., object]) -> Callable[..., object]:
    """`--policy` and `--transfer` with all their options, those of installed packages too."""
    installed = find_installed()
    policy = Choice(
        parameter="policy",
        strategies=installed.policies,
        default="none",
        section="Feature cache",
        help="which features to take from the cache",
    )
    transfer = Choice(
        parameter="transfer",
        strategies=installed.transfers,
        default=None,
        section="Decoding rule",
        help="which tokens a step decides; quota, dynamic, dream, origin, ddpm and both sedd keep to --steps, the others "
        "decide as many as they trust; default: the family's own",
        spellings=("--rule",),
    )
    decorated: Callable[..., object] = choice_flags(policy)(choice_flags(transfer)(command))
    return decorated


def policy_flags(default: str, *, without: Sequence[str] = ()) -> Decorator[Any]:
    """A decorator: `--policy` with the options of all built-in policies but some."""
    kinds = {name: kind for name, kind in POLICIES.items() if name not in without}
    choice = Choice(
        parameter="policy",
        strategies=Strategies(noun="cache policy", kinds=kinds, faults={}),
        default=default,
        section="Feature cache",
        help="which features to take from the cache",
    )
    return choice_flags(choice)


def transfer_flags(*names: str) -> Decorator[Any]:
    """A decorator: `--transfer` with the options of some built-in decoding rules."""
    choice = Choice(
        parameter="transfer",
        strategies=Strategies(noun="decoding rule", kinds={name: TRANSFERS[name] for name in names}, faults={}),
        default=None,
        section="Decoding rule",
        help="which tokens a step decides; default: the family's own",
        spellings=("--rule",),
    )
    return choice_flags(choice)


def choice_flags(choice: Choice) -> Decorator[Any]:
    """A decorator: the choosing flag and the fields of all kinds; the command gets the chosen one as the parameter."""
    owners, kinds = choice.owners, choice.strategies.kinds

    def decorate(command: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(command)
        def call(**values: Any) -> object:
            name, own = values.pop(choice.parameter), {field: values.pop(field) for field in owners}
            return command(**values, **{choice.parameter: choice.make(name, own)})

        decorated: Callable[..., object] = call
        for name, names in reversed(owners.items()):
            kind = kinds[names[0]]
            field = next(field for field in fields(kind) if field.name == name)
            note = f"[{', '.join(names)}; default: {_show_defaults(kinds, names, field.name)}]"
            decorated = make_flag(field, get_type_hints(kind)[name], choice.section, None, note)(decorated)
        option = click.option(
            flag(choice.parameter),
            *choice.spellings,
            choice.parameter,
            cls=Flag,
            section=choice.section,
            default=choice.default,
            show_default=choice.default is not None,
            metavar="|".join(kinds),
            help=choice.help,
        )
        return option(decorated)

    return decorate


def make_flag(field: Field[Any], hint: object, section: str, default: object, note: str = "") -> Decorator[Any]:
    """The flag of one field. A default of None means that the flag may stay unset."""
    name, help_text = flag(field.name), f"{field.metadata['help']}  {note}".rstrip()
    kind = plain_type(hint)
    if kind is bool:
        # A field that is off by default needs no flag to switch it off.
        declaration = name if field.default is False else f"{name}/{flag('no_' + field.name)}"
        settings: dict[str, Any] = {"is_flag": True, "show_default": default is True}
    else:
        declaration = name
        settings = {"type": _parameter_type(field, kind), "show_default": default is not None}
    required = default is MISSING
    return click.option(
        declaration,
        field.name,
        cls=Flag,
        section=section,
        default=None if required else default,
        required=required,
        help=help_text,
        **settings,
    )


def shared_flags(command: Callable[..., object]) -> Callable[..., object]:
    """`--json` (the command gets `as_json`) and `--debug`, which `main` looks for itself."""
    debug = click.option(
        "--debug",
        cls=Flag,
        section="Output",
        is_flag=True,
        expose_value=False,
        help="show the traceback of an error",
    )
    as_json = click.option(
        "--json", "as_json", cls=Flag, section="Output", is_flag=True, help="print the result as JSON on stdout"
    )
    return as_json(debug(command))


def report_flag(command: Callable[..., object]) -> Callable[..., object]:
    """`--report FILE`: the JSON of the result in a file as well (the command gets `report`)."""
    decorated: Callable[..., object] = file_flag("--report", "write the result as JSON to this file as well")(command)
    return decorated


def file_flag(name: str, help: str, check: Callable[..., Path | None] | None = None) -> Decorator[Any]:
    """A decorator: a flag that names a file to write, looked at before anything runs."""
    return click.option(
        name,
        cls=Flag,
        section="Output",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        callback=check or check_report,
        help=help,
    )


def check_report(_context: click.Context, _flag: click.Parameter, path: Path | None) -> Path | None:
    """The path, refused before anything runs if its directory is missing."""
    if path is not None and not path.absolute().parent.is_dir():
        raise click.BadParameter(f"the directory {path.parent} does not exist")
    return path


def check_chart(context: click.Context, flag: click.Parameter, path: Path | None) -> Path | None:
    """The path, refused before anything runs if it cannot be written or drawn."""
    if path is None:
        return None
    try:
        importlib.import_module("matplotlib")
    except ModuleNotFoundError:
        raise IncompatibleError(f"--chart needs the package matplotlib: {pip_line('matplotlib')}") from None
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise click.BadParameter(f"{path.name} is no picture that can be drawn, expected a name in .png, .svg or .pdf")
    return check_report(context, flag, path)


def describe(values: object) -> dict[str, object]:
    """Field names and values of an options dataclass, for reports; a strategy that another wraps with its name."""
    return dict(_pairs(values))


def _pairs(values: Any) -> Iterator[tuple[str, object]]:
    for field in fields(values):
        value = getattr(values, field.name)
        yield field.name, {"name": value.name, **describe(value)} if field.metadata.get("strategy") else value


def _parameter_type(field: Field[Any], kind: object) -> click.ParamType[Any]:
    if field.metadata.get("strategy"):
        return click.STRING
    choices = field.metadata.get("choices") or (get_args(kind) if get_origin(kind) is Literal else None)
    if choices:
        return click.Choice(choices)
    assert isinstance(kind, type)
    return TYPES[kind]


def _show_defaults(kinds: Mapping[str, type[Any]], names: Sequence[str], field: str) -> str:
    """The default that these kinds share, or each one's own, in the order of the names."""
    shown = [_show(own.default, field) for name in names for own in fields(kinds[name]) if own.name == field]
    return shown[0] if len(set(shown)) == 1 else ", ".join(shown)


def _show(default: object, name: str) -> str:
    if isinstance(default, bool):
        return flag(name if default else f"no_{name}")
    return str(getattr(default, "name", default))
