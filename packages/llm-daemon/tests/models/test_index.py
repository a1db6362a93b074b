from __future__ import annotations

import os
from pathlib import Path

import pytest

from llm_daemon.errors import UsageError
from llm_daemon.models.index import Config, Http, Index, configure, pip_settings


def clean(**more: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_"))} | more


def test_pip_itself_tells_its_settings(tmp_path: Path) -> None:
    file = tmp_path / "pip.conf"
    file.write_text(
        "[global]\nindex-url = https://me:pw@a.example/simple\ntimeout = 3\nfind-links =\n  /one\n  /two\n"
        "[download]\ntimeout = 4\n[search]\nindex = https://no.example\n"
    )
    env = clean(PIP_CONFIG_FILE=str(file), PIP_EXTRA_INDEX_URL="https://b.example/simple https://c.example/simple")
    env |= {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    config = configure(pip_settings(env=env), {})
    assert config.indexes[0] == "https://me:pw@a.example/simple"
    assert {"https://b.example/simple", "https://c.example/simple"} <= set(config.indexes)
    assert {"/one", "/two"} <= set(config.find_links)
    assert (config.timeout, config.default) == (4.0, False)


def test_a_broken_pip_configuration_is_the_users_to_mend(tmp_path: Path) -> None:
    file = tmp_path / "pip.conf"
    file.write_text("index-url = https://me:s3cret@a.example\n")
    with pytest.raises(UsageError) as caught:
        pip_settings(env=clean(PIP_CONFIG_FILE=str(file)))
    assert caught.value.code == "bad_config" and "pip config" in caught.value.message
    assert "s3cret" not in caught.value.full()


@pytest.mark.parametrize(
    ("pip", "env", "expected"),
    [
        ({}, {}, Config()),
        ({"find-links": "/w"}, {}, Config(find_links=("/w",))),
        ({"extra-index-url": "https://e/s"}, {}, Config(indexes=("https://e/s",))),
        ({"index-url": "https://i/s"}, {}, Config(indexes=("https://i/s",), default=False)),
        ({"index-url": "https://i/s"}, {"UV_DEFAULT_INDEX": "https://u/s"}, Config(indexes=("https://u/s",), default=False)),
        ({}, {"UV_INDEX_URL": "https://u/s", "UV_INDEX": "n=https://n/s"}, Config(("https://u/s", "https://n/s"), default=False)),
        ({}, {"UV_EXTRA_INDEX_URL": "https://u/s", "UV_FIND_LINKS": "/a,/b"}, Config(("https://u/s",), ("/a", "/b"))),
        ({"no-index": "true", "index-url": "https://i/s", "find-links": "/w"}, {}, Config((), ("/w",), default=False)),
        ({}, {"UV_NO_INDEX": "1"}, Config(default=False)),
        ({"proxy": "me:pw@p:1"}, {}, Config(proxy="http://me:pw@p:1")),
        ({"proxy": "socks5://p:1", "default-timeout": "9"}, {}, Config(proxy="socks5://p:1", timeout=9)),
        ({"trusted-host": "a b:1", "cert": "/c", "client-cert": "/d"}, {}, Config((), (), True, ("a", "b:1"), "/c", "/d")),
    ],
    ids=range(12),
)
def test_configurations(pip: dict[str, str], env: dict[str, str], expected: Config) -> None:
    assert configure(pip, env) == expected


def test_places_of_this_machine_are_asked_first_and_the_default_stays() -> None:
    index = Index(Config(indexes=("https://e/s", "file:///f"), find_links=("https://l", "/w")))
    try:
        urls = [url for _, url in index._sources]
    finally:
        index.close()
    assert urls[:2] == ["/w", "file:///f"] and {"https://e/s", "https://l"} < set(urls[2:]) and len(urls) == 5


def test_useless_certificates_are_refused_in_words(tmp_path: Path) -> None:
    for config in (Config(cert=str(tmp_path / "none")), Config(client_cert=str(tmp_path / "none")), Config(proxy="moon://x")):
        with pytest.raises(UsageError, match="cert, client-cert or proxy") as caught:
            Http(config, [])
        assert caught.value.code == "bad_config"
