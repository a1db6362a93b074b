"""Where the gateway sends a request: apart from exchange.py, which a starting daemon does not load."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes: the engine's unix socket.  `headers` are added to what the engine gets (a key of its own).

    `assembled`: paths whose plain answers are asked for as streams, because the engine notices only then that the
    client is gone.  `confirms`: see upstream.py.  `label`: the instance as the value of a header.
    """

    instance: str
    socket: str
    headers: tuple[tuple[str, str], ...] = ()
    assembled: frozenset[str] = frozenset()
    confirms: bool = False
    label: str = field(init=False)

    def __post_init__(self) -> None:
        name = self.instance  # with a model's name in it, which may hold anything
        object.__setattr__(self, "label", name if name.isascii() and name.isprintable() else ascii(name))
