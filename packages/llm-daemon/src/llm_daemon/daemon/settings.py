"""Settings that name things: checked against what there is, before a daemon says that it is up."""

from __future__ import annotations

import difflib

from ..config import Settings
from ..engines.registry import Registry
from ..errors import UsageError
from ..models.catalog import Catalog
from ..spec import Wish


def catalog_and_engines(settings: Settings) -> tuple[Catalog, Registry]:
    """The catalog and the engines of these settings.

    Raises UsageError (`bad_config`) for a catalog entry that cannot be, an adapter that cannot be loaded, and a table or
    default that names an engine or model nobody knows.
    """
    catalog = Catalog.load(settings.catalog)
    registry = Registry(settings.engines)
    known = [*registry.names, *registry.broken]
    for name, where in [*((n, "engines") for n in settings.engines), (settings.default_engine, "default_engine")]:
        if name is not None and name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise UsageError(
                f"{settings.origin(where)}: there is no engine {name!r}", code="bad_config",
                hint=f"did you mean {near[0]!r}?" if near else "engines are " + ", ".join(known),
            )  # fmt: skip
    if settings.origin("default_model") != "default" and "/" not in settings.default_model:  # a file may come later
        try:
            catalog.resolve(Wish.parse(settings.default_model))
        except UsageError as e:
            raise UsageError(f"{settings.origin('default_model')}: {e}", code="bad_config", hint=e.hint) from None
    return catalog, registry
