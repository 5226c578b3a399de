"""Which family a checkpoint is of: by its architecture, and only without a known one by its model type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from dllm_export.errors import CheckpointError
from dllm_export.graphs.families.family import Family, KnownFamily, Source


def find_family(
    supported: Mapping[str, Family], known: Mapping[str, KnownFamily], source: Source, name: str | None
) -> Family:
    """The family of this name, or the one that the checkpoint shows; an error says why there is none."""
    found: Family | KnownFamily
    if name is None:
        found = match_family((*supported.values(), *known.values()), source)
    elif name in supported or name in known:
        found = supported[name] if name in supported else known[name]
    else:
        raise CheckpointError(
            f"no family is called {name!r}; there are: {', '.join(supported)} ('dllm-export families' says more)"
        )
    if isinstance(found, KnownFamily):
        raise CheckpointError(f"family {found.title} is recognised but not supported: {found.reason}")
    return found


def find_by_files(families: Iterable[Family | KnownFamily], files: Iterable[str]) -> Family | None:
    """The family that publishes no config.json and whose files these are: two of them at least, as one may be called so by
    chance."""
    files = set(files)
    for family in families:
        if len(files.intersection(family.marks.files)) >= 2:
            if isinstance(family, KnownFamily):
                raise CheckpointError(f"family {family.title} is recognised but not supported: {family.reason}")
            return family
    return None


def match_family(families: Iterable[Family | KnownFamily], source: Source) -> Family | KnownFamily:
    """The one family whose marks the checkpoint bears."""
    families = tuple(families)
    kinds = source.architecture, source.model_type
    for kind, marks in zip(kinds, ("architectures", "model_types"), strict=True):
        bearing = [
            family
            for family in families
            if any(fnmatchcase(kind, pattern) for pattern in getattr(family.marks, marks))
            and family.marks.confirm(source)
        ]
        if len(bearing) > 1:
            names = ", ".join(family.name for family in bearing)
            raise CheckpointError(f"config.json fits several families: {names}; choose one with --family")
        if bearing:
            return bearing[0]
    evidence = ", ".join(f"{key} {source.config.get(key)!r}" for key in ("architectures", "model_type"))
    names = "; ".join(f"{family.name} ({family.title})" for family in families if isinstance(family, Family))
    raise CheckpointError(
        f"config.json describes no supported family: {evidence}. Supported: {names}; 'dllm-export families' lists all"
    )
