"""Engines that the configuration describes: what the description means, and what is wrong with one, by file and line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from llm_daemon.config import Settings
from llm_daemon.engines.base import ADDRESS, BAD_MODEL, CRASHED, Grant, Location, Missing, Plan, Probe, Tcp
from llm_daemon.engines.command import Command
from llm_daemon.engines.registry import Registry
from llm_daemon.errors import UsageError
from llm_daemon.spec import Artifact, Spec, Wish
from llm_daemon.testing.conformance import EngineConformance
from llm_daemon.testing.fake_engine import SERVER

PORT = ["serve", "--port", "{port}"]
GRANT = Grant("/m.gguf", "m", "e.sock", 512, 3, 2, host="127.9.8.7", port=4711, key="k3y")


def plan(**table: Any) -> Plan:
    return Command("mine", table).plan(
        Spec(Wish("m"), Artifact("file", "/m.gguf", "m")), Location(("/bin/serve",), "1", "config"), GRANT
    )


def test_placeholders() -> None:
    places = "{model} {alias} {host}:{port} {context} {total_context} {parallel} {threads} {{}}"
    made = plan(command=["serve", places], env={"KEY": "{key}"})
    assert made.argv == ("/bin/serve", "/m.gguf m 127.9.8.7:4711 512 1536 3 2 {}")
    assert made.address == Tcp("127.9.8.7", 4711)
    assert made.env == {"KEY": "k3y"}
    assert made.headers == (("Authorization", "Bearer k3y"),)
    assert (made.slots, made.served_id) == (3, "m")


def test_addresses() -> None:
    assert plan(command=["serve", "{socket}"]).address == "e.sock"
    assert plan(command=PORT).address == Tcp("127.0.0.1", 4711)  # it was not told a host
    told = plan(command=["serve", "--port", "0"], port_from_log=r"port (\d+)")
    assert told.address == Tcp("127.0.0.1", 0, told=r"port (\d+)")
    assert plan(command=PORT, rebinds=False).address == Tcp("127.0.0.1", 4711, rebinds=False)


def test_what_it_declares() -> None:
    chat = "/v1/chat/completions"
    plain = plan(command=PORT)
    assert plain.probes == (Probe("/health"), Probe("/v1/models"))
    assert (plain.served_id, plain.slots, plain.warm_up, plain.headers) == (None, 1, None, ())
    assert chat in plain.deaf and not plain.assembled
    assert not plan(command=PORT, cancel="close").deaf
    assert chat in plan(command=PORT, cancel="as-stream").assembled
    odd = plan(
        command=PORT, routes=[chat, "/tokenize"], base_path="/v3", ready="/up", warm_up=True, model_id="{model}", drop=["user"],
        slots=4, grace=1, stall=9,
    )  # fmt: skip
    assert odd.paths == {chat: "/v3/chat/completions"}
    assert odd.probes == (Probe("/up"),)
    assert odd.warm_up is not None
    assert (odd.warm_up.path, b'"/m.gguf"' in odd.warm_up.body) == ("/v3/chat/completions", True)
    assert (odd.served_id, odd.drop, odd.slots, odd.stop.grace, odd.stall) == ("/m.gguf", frozenset({"user"}), 4, 1.0, 9.0)


def test_where_it_is(tmp_path: Path) -> None:
    def locate(*command: str, **more: Any) -> Location | Missing:
        return Command("mine", {"command": [*command, "{port}"], **more}).locate({})

    assert isinstance(locate(sys.executable, "-m", "json"), Location)
    for command, reason in (
        (("no-such-program",), "there is no program no-such-program on PATH"),
        (("./serve",), "./serve is not a whole path"),
        ((str(tmp_path / "x"),), f"there is no program {tmp_path / 'x'}"),
        ((sys.executable, "-m", "no_such_module.server"), f"{sys.executable} has no module no_such_module"),
    ):
        found = locate(*command, hint="build it")
        assert found == Missing(reason, "build it")
    (tmp_path / "own_module.py").touch()
    assert isinstance(locate(sys.executable, "-m", "own_module", env={"PYTHONPATH": str(tmp_path)}), Location)


def test_what_it_accepts(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    mine = Command("mine", {"command": PORT, "accepts": [".gguf", "config.json"]})
    assert mine.accepts("/m.GGUF") is mine.accepts(str(tmp_path)) is None
    assert mine.accepts("/m.bin") == "it loads .gguf, config.json"
    assert mine.accepts("") == "it has no models of its own"
    assert Command("mine", {"command": PORT, "accepts": ["engine"]}).accepts("") is None
    assert "belong into its command" in (mine.refuse(["--x"]) or "")
    assert mine.refuse([]) is None


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('command = ["x", "{prot}"]', 2, "no placeholder {prot}"),
        ('command = ["x", "{port"]', 2, "expected '}'"),
        ("command = []", 2, "must name a program"),
        ('command = "x {port}"', 2, "must be a list of texts"),
        ('command = ["x"]', 2, "say where it listens"),
        ('command = ["x", "{port}", "{socket}"]', 2, "say where it listens, once"),
        ('command = ["x", "{port}", "{key}"]', 2, "put {key} into env"),
        ('command = ["x", "{port}"]\nargs = ["y"]', 3, "belongs into command"),
        ('command = ["x", "{port}"]\nredy = "/up"', 3, "unknown setting 'redy'"),
        ('command = ["x", "{port}"]\nready = "up"', 3, "'up' is not a path"),
        ('command = ["x", "{port}"]\n\ncancel = "never"', 4, "close or stream or as-stream"),
        ('command = ["x", "{port}"]\nroutes = ["/v1/chat"]', 3, "/v1/chat is not a route"),
        ('command = ["x", "{port}"]\nslots = true', 3, "must be how many requests"),
        ('command = ["x", "{port}"]\nslots = 0', 3, "must be 1 or more"),
        ('command = ["x", "{port}"]\nport_from_log = "x"', 3, "the port is known"),
        ('command = ["x"]\nport_from_log = "port"', 3, "one group"),
        ('path = "/x"\nready = "/up"', 3, "unknown setting 'ready'"),
    ],
)
def test_mistakes_are_told_by_file_and_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[engines.mine]\n" + text + "\n")
    with pytest.raises(UsageError) as caught:
        Settings.load({}, str(file))
    assert caught.value.message.startswith(f"{file} line {line}: ")
    assert words in caught.value.message
    assert caught.value.code == "bad_config"


def test_the_registry_makes_it() -> None:
    registry = Registry({"mine": {"command": PORT}})
    assert isinstance(registry.get("mine"), Command)
    with pytest.raises(UsageError, match=r"engines\.mine\.command"):
        Registry({"mine": {"command": ["x"]}})


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("OSError: [Errno 98] error while attempting to bind on address: address already in use", ADDRESS),
        ("llama_model_load: error loading model: corrupted\nPossible causes: insufficient memory", BAD_MODEL),
        ("safetensors_rust.SafetensorError: Error while deserializing header: incomplete metadata", BAD_MODEL),
        ("Traceback\nValueError: odd", CRASHED),
        ("", CRASHED),
    ],
)
def test_symptoms(words: str, kind: str) -> None:
    assert Command("mine", {"command": PORT}).diagnose(1, words)[0] == kind


class TestDescribed(EngineConformance):
    """The fake engine by a description alone."""

    adapter = "mine"
    natural = 1.6
    config = {  # noqa: RUF012
        "command": [
            sys.executable, "-I", "-S", SERVER, "{model}", "--host", "{host}", "--port", "{port}", "--alias", "{alias}",
            "--slots", "{parallel}", "--context", "{context}",
        ],
        "env": {"FAKE_ENGINE_KEY": "{key}"},
        "accepts": [".fake.json"],
    }  # fmt: skip

    @pytest.fixture
    def model_path(self, fake_model: Any) -> str:
        return str(fake_model(tcp=True, tokens=3000, token_ms=2, strict_model=True, ignores_disconnect="nonstream"))

    @pytest.fixture
    def broken_model(self, fake_model: Any) -> tuple[str, str]:
        return str(fake_model(tcp=True, crash_while_loading="failed to load model: tensor 7")), "tensor 7"
