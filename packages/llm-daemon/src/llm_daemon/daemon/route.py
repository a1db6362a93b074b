"""Where the gateway sends a request: apart from exchange.py, which a starting daemon does not load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes: the engine's address.  `headers` are added to what the engine gets (a key of its own).

    `assembled`: paths whose plain answers are asked for as streams, because the engine notices only then that the
    client is gone.  `confirms`, `deaf` (paths): see upstream.py.  `label`: the instance as the value of a header.
    `only`, `served_id`, `drop` and `paths` are those of engines.base.Plan (`routes` is `only`).  `plain`: whether requests go
    as they are, without headers or any of those four.
    """

    instance: str
    socket: str
    headers: tuple[tuple[str, str], ...] = ()
    assembled: frozenset[str] = frozenset()
    confirms: bool = False
    deaf: frozenset[str] = frozenset()
    only: frozenset[str] | None = None
    served_id: str | None = None
    drop: frozenset[str] = frozenset()
    paths: Mapping[str, str] = field(default_factory=dict)
    label: str = field(init=False)
    plain: bool = field(init=False)

    def __post_init__(self) -> None:
        plain = self.only is None and not (self.headers or self.deaf or self.served_id or self.drop or self.paths)
        object.__setattr__(self, "plain", plain)
        name = self.instance  # with a model's name in it, which may hold anything
        object.__setattr__(self, "label", name if name.isascii() and name.isprintable() else ascii(name))
