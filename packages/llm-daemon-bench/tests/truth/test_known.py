"""V0: our client against a server of known times; and the same by way of a whole run."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from llm_daemon.cli.main import run
from llm_daemon_bench import results
from llm_daemon_bench.testing.script import Script
from llm_daemon_bench.testing.scripted import ScriptedServer
from llm_daemon_bench.validate import known
from llm_daemon_bench.validate.agreement import Line
from llm_daemon_bench.validate.known import KNOWN, Known, Seen

ATTEMPTS = 12  # on a machine that is busy with other tests; an error of ours disagrees each time


def disagreeing(one: Known, repeats: int = 4) -> list[Line]:
    left: list[Line] = []
    for _ in range(ATTEMPTS):
        lines = known.check([one], repeats)
        assert len(lines) >= 5
        left = [line for line in lines if not line.agrees]
        if not any(line.reference is not None for line in left):  # what is exact is exact at once
            break
    return left


@pytest.mark.parametrize("one", KNOWN, ids=lambda k: k.name)
def test_what_we_see_is_what_was_sent(one: Known) -> None:
    assert disagreeing(one) == []


def spoiled(monkeypatch: pytest.MonkeyPatch, spoil: str) -> None:
    """Makes our client wrong in one way."""
    true = known.ask

    def ask(*args: object) -> Seen:
        seen = true(*args)  # type: ignore[arg-type]
        t_ms, pieces = seen.reply.t_ms, seen.reply.pieces
        match spoil:
            case "the first event is taken for the first token":
                t_ms["first_token"] = t_ms["first_event"]
            case "stamps are late":
                t_ms.update({name: ms + 1.5 for name, ms in t_ms.items()})
            case "a chunk is taken for a token":
                seen.reply.usage, seen.reply.timings = {}, {}
                for i, piece in enumerate(pieces, 1):
                    piece.tok = i
            case "checkpoints are seen a piece later":
                later = {a.ms: b.ms for a, b in pairwise(pieces)}
                reached = {n: msgspec.structs.replace(r, ms=later.get(r.ms or 0, r.ms)) for n, r in seen.reached.items()}
                return replace(seen, reached=reached)
            case "text is lost":
                return replace(seen, text=seen.text[:-1])
        return seen

    monkeypatch.setattr(known, "ask", ask)


@pytest.mark.parametrize(
    ("spoil", "script"),
    [
        ("the first event is taken for the first token", "role at once, slow prompt"),
        ("stamps are late", "plain"),
        ("a chunk is taken for a token", "four tokens a chunk"),
        ("checkpoints are seen a piece later", "four tokens a chunk"),
        ("text is lost", "characters cut in two"),
    ],
)
def test_a_client_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch, spoil: str, script: str) -> None:
    spoiled(monkeypatch, spoil)
    (one,) = [k for k in KNOWN if k.name == script]
    assert [line for line in known.check([one], 3) if line.agrees is False]


SUITE = """
[suite]
name = "known"
trials = 6
launches = 1
[[server]]
id = "scripted"
attach = "{url}"
timings = "llamacpp"
model_name = "slow"
[[case]]
id = "said"
prompt = "So, when was it?"
checkpoints = [ {{ id = "march", contains = "14 March" }}, {{ id = "never", contains = "Wednesday" }} ]
"""


def test_a_whole_run_records_what_was_sent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = Script(known.ANSWER, role_first=True, prefill_ms=80, token_ms=6)
    with ScriptedServer({"slow": script}) as server:
        (tmp_path / "known.toml").write_text(SUITE.format(url=server.base_url))
        assert run(["bench", "run", "known.toml", "--out", "out", "--json"]) == 0
        truths = [t for t in server.truths() if t.text == "".join(known.ANSWER)]
    trials = results.load(json.loads(capsys.readouterr().out)["folder"]).measured()
    assert len(trials) == 6
    assert {(t.tokens.out, t.tokens.source, t.cp["never"].ms, t.error) for t in trials} == {
        (len(known.ANSWER), "usage", None, None)
    }
    # Records hold no absolute times; how long it took from the request on is known all the same.
    for name in ("first_token", "last_token"):
        ours = min(t.t_ms[name] for t in trials)
        sent = min((t.events()[name] - t.read_ns) / 1e6 for t in truths)
        assert ours == pytest.approx(sent, rel=0.02, abs=4), name


@pytest.mark.parametrize(
    ("prompt_ms", "doubted"), [(0.0, "over the server's own prompt time"), (500.0, "before the server had read")]
)
def test_a_run_doubts_itself_where_the_server_says_otherwise(tmp_path: Path, prompt_ms: float, doubted: str) -> None:
    script = Script(("a", " b"), prefill_ms=80, told_prompt_ms=prompt_ms)
    with ScriptedServer({"slow": script}) as server:
        (tmp_path / "known.toml").write_text(SUITE.format(url=server.base_url))
        assert run(["bench", "run", "known.toml", "--out", "out", "--plain"]) == 0
    (folder,) = Path("out").glob("*/")
    (note,) = [n for n in results.load(folder).session.notes if "prompt" in n]
    assert doubted in note
