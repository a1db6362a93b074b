"""What is recommended, what is rejected and why; and the choice in the user's config."""

from __future__ import annotations

import os
import tomllib
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from llm_daemon.config import Settings
from llm_daemon.errors import UsageError
from llm_daemon.models.catalog import Catalog
from llm_daemon.spec import Wish
from llm_daemon_bench.apply import apply, wish_for
from llm_daemon_bench.recommend import Advice, Candidate, Slo, recommend, wishes_of
from llm_daemon_bench.records import TargetInfo
from llm_daemon_bench.report.tables import advice_lines
from llm_daemon_bench.results import Results

from .simulate import CHAT, EXTRACT, Speed, simulate

FAST = Speed(right=0.7, rss_mib=300, file_bytes=100, engine="llama-server")
BIG = Speed(prefill=260, per_token=12, right=1.0, rss_mib=900, file_bytes=300, engine="llama-server")
SLOW = Speed(prefill=900, per_token=40, right=1.0, rss_mib=200, file_bytes=90, engine="xllamacpp")
F, G, S = "llama-server/m/Q4", "llama-server/m/Q8", "xllamacpp/m/Q4"


@pytest.fixture
def three(tmp_path: Path) -> Results:
    return simulate(tmp_path / "three", {F: FAST, G: BIG, S: SLOW}, (CHAT, EXTRACT))


def ids(candidates: tuple[Candidate, ...]) -> list[str]:
    return [c.info.id for c in candidates]


def slos(*texts: str) -> list[Slo]:
    return [Slo.parse(text) for text in texts]


def test_three_wishes_three_winners(three: Results) -> None:
    fast = recommend(three, slos("chat.first_token:p50<=400"))
    assert ids(fast.ranked) == [F, G] and fast.winner and fast.winner.slowness == pytest.approx(1)
    right = recommend(three, slos("chat.first_token:p50<=400"), prefer="quality")
    assert ids(right.ranked) == [G, F] and right.winner and right.winner.quality == 1
    small = recommend(three, [], prefer="size")
    assert ids(small.ranked) == [S, F, G]
    assert ids(recommend(three, [], max_rss_mib=500).ranked) == [F, S]


def test_each_rejected_target_has_one_reason(three: Results) -> None:
    advice = recommend(three, slos("chat.first_token:p50<=400", "extract-json:pass>=0.95"), max_rss_mib=800, observed=True)
    reasons = {c.info.id: c.reason for c in advice.rejected}
    assert reasons.keys() == {F, G, S} and advice.winner is None
    assert reasons[S].startswith("chat.first_token p50 9") and reasons[S].endswith(" > 400")
    assert reasons[G] == "memory 900 MiB > 800 MiB"
    assert reasons[F].startswith("extract-json right ") and reasons[F].endswith("of 18, wanted 95%")
    assert next(advice_lines(advice)) == "No target meets all limits."


def test_the_upper_end_of_the_interval_decides(three: Results) -> None:
    from llm_daemon_bench.cells import group

    cell = next(c for (t, k), c in group(three).items() if t == F and k.checkpoint == "sentence1")
    span, middle = cell.interval, cell.median
    assert span.low < middle < span.high
    for limit, state in ((span.high + 0.01, "met"), ((middle + span.high) / 2, "undecided"), (span.low - 0.01, "missed")):
        advice = recommend(three, slos(f"chat.sentence1:p50<={limit:.6f}"))
        [judged] = next(c for c in (*advice.ranked, *advice.undecided, *advice.rejected) if c.info.id == F).judged
        assert judged.state == state
    near = recommend(three, slos(f"chat.sentence1:p50<={(middle + span.high) / 2:.6f}"))
    assert near.winner is None and near.undecided[0].more and 18 < near.undecided[0].more + 18 < 200
    assert next(advice_lines(near)).startswith(f"Undecided, run {near.more} more trials. Nearest: {F}")
    assert recommend(three, slos(f"chat.sentence1:p50<={(middle + span.high) / 2:.6f}"), observed=True).winner is not None


def test_too_few_trials_are_undecided(tmp_path: Path, three: Results) -> None:
    few = simulate(tmp_path / "few", {F: FAST}, (CHAT,), launches=1, trials=4)
    [one] = recommend(few, slos("chat.first_token:p50<=100000")).undecided
    assert one.more == 2  # six make an interval for a median
    p95 = recommend(three, slos("chat.first_token:p95<=100000"))
    assert {c.more for c in p95.undecided} == {72 - 18}
    share = recommend(three, slos("extract-json:pass>=0.9"))
    assert ids(share.undecided) == [G, S] and share.more == 17  # 35 of 35 are needed for a lower end of 90 %
    assert recommend(three, slos("extract-json:pass>=0.8")).ranked


def test_never_reached_and_never_run(tmp_path: Path) -> None:
    made = simulate(tmp_path / "s", {F: FAST, G: replace(BIG, never={"total": 0.9}), S: SLOW}, (EXTRACT,))
    gone = replace(made, trials=[t for t in made.trials if t.target != S])
    advice = recommend(gone, slos("extract-json.total:p50<=9000", "extract-json.total:reach>=0.5"))
    reasons = {c.info.id: c.reason for c in advice.rejected}
    assert reasons[G] == "extract-json.total p50 not reached > 9000" and reasons[S] == "extract-json: never ran to its end"
    assert ids(advice.ranked) == [F]


def test_what_too_few_trials_did_not_reach_is_told_in_a_sentence(tmp_path: Path) -> None:
    few = simulate(tmp_path / "few", {F: replace(FAST, never={"total": 1.0})}, (EXTRACT,), launches=1, trials=4)
    [one] = recommend(few, slos("extract-json.total:p50<=9000")).undecided
    assert one.reason == "extract-json.total p50 not reached: 0 of 4 reached it; limit 9000"
    some = simulate(tmp_path / "some", {F: replace(FAST, never={"total": 0.4})}, (EXTRACT,))
    [two] = recommend(some, slos("extract-json.total:p50<=9000")).undecided
    assert "not reached to" not in two.reason and two.reason.endswith(" to never; limit 9000")


def test_who_never_ran_wins_nothing(tmp_path: Path) -> None:
    made = simulate(tmp_path / "s", {F: FAST, G: BIG}, (CHAT,))
    failed = [msgspec.structs.replace(t, error="the server died") if t.target == G else t for t in made.trials]
    advice = recommend(replace(made, trials=failed), slos("chat.first_token:p50<=100000"), prefer="quality")
    assert ids(advice.ranked) == [F]
    assert ids(advice.rejected) == [G]


def test_wishes_of_the_suite_and_of_a_fresh_start(three: Results) -> None:
    assert [str(w) for w in wishes_of(three)] == [
        "chat.first_token:p50<=400", "chat.t2_first:p50<=500", "extract-json.total:p50<=600", "extract-json.complete:p50<=900",
    ]  # fmt: skip
    start = recommend(three, slos("extract-json@start.total:p50<=700"))
    assert {c.more for c in start.undecided} == {3}  # three launches, six are needed


@pytest.mark.parametrize(
    "text",
    ["", "chat", "chat.first_token", "chat.first_token:p50>=400", "chat:p50<=400", "chat:pass<=0.9", "chat:pass>=1.5",
     "chat.x:pass>=0.5",     "chat.first_token:p51<=3", "chat.first_token:p50<=3%", "chat:pass>=1s", "chat.first_token:p50<=-3"],
)  # fmt: skip
def test_wishes_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="wish"):
        Slo.parse(text)


@pytest.mark.parametrize(
    ("text", "hint"), [("no.first:p50<=1", "chat"), ("chat.no:p50<=1", "sentence1"), ("chat:pass>=0.5", "check")]
)
def test_wishes_about_nothing_are_refused(three: Results, text: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        recommend(three, slos(text))
    assert hint in caught.value.hint


# -- apply ---------------------------------------------------------------------------------------------------------------

CONFIG = """\
# my settings
ttl = 300   # five minutes

[catalog]   # names of mine
tiny = "smollm2-135m?context=512"  # keep
mine = { path = "/models/mine.gguf" }

[engines.fake]
adapter = "llm_daemon.testing.fake_engine:FakeEngine"
"""


@pytest.fixture
def info(tmp_path: Path) -> TargetInfo:
    """A target whose weights are a file that no name of the catalog means."""
    weights = tmp_path / "w.gguf"
    weights.write_bytes(b"GGUF")
    made = simulate(tmp_path / "one", {F: FAST}, (CHAT,))
    artifact = made.session.targets[0].artifact
    assert artifact
    return msgspec.structs.replace(made.session.targets[0], artifact=msgspec.structs.replace(artifact, path=str(weights)))


def test_apply_changes_two_entries_and_nothing_else(tmp_path: Path, info: TargetInfo) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(CONFIG)
    file.chmod(0o640)
    done = apply(info, file=str(file))
    text = file.read_text()
    assert done.backup and done.backup.read_text() == CONFIG
    kept = [line for line in CONFIG.splitlines() if line]
    assert [line for line in text.splitlines() if line in kept] == kept  # comments, order, spacing
    added = [line for line in text.splitlines() if line and line not in kept]
    assert added == ['default_model = "m"', f'm = "{tmp_path}/w.gguf?engine=llama-server"']
    assert file.stat().st_mode & 0o777 == 0o640 and not list(tmp_path.glob("mine.toml.[!b]*"))
    settings = Settings.load({}, str(file))
    assert (settings.default_model, settings.ttl) == ("m", 300)
    again = apply(info, file=str(file))
    assert file.read_text() == text and again.wish == done.wish


def test_what_was_applied_is_what_attach_resolves(tmp_path: Path, info: TargetInfo) -> None:
    file = tmp_path / "sub" / "new.toml"
    done = apply(info, name="fast", file=str(file))
    assert done.backup is None and tomllib.loads(file.read_text())["default_model"] == "fast"
    spec = Catalog.load(Settings.load({}, str(file)).catalog).resolve(Wish.of("fast"))
    assert (spec.wish.engine, spec.artifact.locator) == ("llama-server", str(tmp_path / "w.gguf"))


def test_a_name_of_the_catalog_is_kept_where_it_means_the_same_weights(info: TargetInfo, tmp_path: Path) -> None:
    named = msgspec.structs.replace(info, model="smollm2-135m", quant="Q4_1", artifact=None)
    assert str(wish_for(named)) == "smollm2-135m@Q4_1?engine=llama-server"
    file = tmp_path / "c.toml"
    apply(named, file=str(file))
    spec = Catalog.load(Settings.load({}, str(file)).catalog).resolve(Wish.of("smollm2-135m"))  # an alias of its own name
    assert (spec.wish.model, spec.wish.engine) == ("smollm2-135m", "llama-server")
    assert apply(named, file=str(file)).wish == "smollm2-135m@Q4_1?engine=llama-server"
    other = msgspec.structs.replace(info, model="smollm2-135m", quant="Q4_1")  # the same name, a file of the user's own
    assert str(wish_for(other)).startswith(str(tmp_path / "w.gguf"))


def test_what_was_fetched_is_written_by_its_name(info: TargetInfo, tmp_path: Path) -> None:
    artifact = info.artifact
    assert artifact
    gone = msgspec.structs.replace(artifact, path=str(tmp_path / "deleted.gguf"))
    for name in ("smollm2-135m", "hf:org/repo:Q4_K_M"):
        fetched = msgspec.structs.replace(info, weights=name, artifact=gone)
        assert str(wish_for(fetched)) == f"{name}?engine=llama-server"
    other = msgspec.structs.replace(info, weights="smollm2-135m")  # the name means another file by now
    for kept in (other, msgspec.structs.replace(info, weights=artifact.path)):
        assert str(wish_for(kept)) == f"{artifact.path}?engine=llama-server"


def test_a_link_stays_a_link(tmp_path: Path, info: TargetInfo) -> None:
    (tmp_path / "dotfiles").mkdir()
    real, link = tmp_path / "dotfiles" / "c.toml", tmp_path / "c.toml"
    real.write_text("ttl = 5\n")
    link.symlink_to(real)
    apply(info, file=str(link))
    assert link.is_symlink() and "default_model" in real.read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [("ttl = ", "not valid TOML"), ("catalog = 3\n", "must be a table"),
     ('[catalog]\nm = { path = "/x.gguf" }\n', "model of your own"),
     ("nonsense = 1\n", "unknown setting 'nonsense'")],
)  # fmt: skip
def test_a_file_that_cannot_be_changed_stays_as_it_is(tmp_path: Path, info: TargetInfo, text: str, said: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=said) as caught:
        apply(info, file=str(file))
    assert str(file) in str(caught.value) and caught.value.hint
    assert file.read_text() == text and os.listdir(tmp_path).count("c.toml.bak") == 0 and not list(tmp_path.glob("c.toml.*"))


@pytest.mark.parametrize("name", ["", " ", "bad name?", "a@Q4", "./m", "m.gguf"])
def test_a_name_that_nobody_can_ask_for_is_not_written(tmp_path: Path, info: TargetInfo, name: str) -> None:
    file = tmp_path / "c.toml"
    with pytest.raises(UsageError, match="nobody can ask for a model called") as caught:
        apply(info, name=name, file=str(file))
    assert "--as" in caught.value.hint and not file.exists()


def test_a_target_without_an_engine_cannot_be_applied(tmp_path: Path, info: TargetInfo) -> None:
    with pytest.raises(UsageError, match="no engine"):
        apply(msgspec.structs.replace(info, engine=None), file=str(tmp_path / "c.toml"))
    with pytest.raises(UsageError, match="no weights"):
        apply(msgspec.structs.replace(info, artifact=None), file=str(tmp_path / "c.toml"))


def test_advice_is_the_same_every_time(three: Results) -> None:
    def told() -> list[str]:
        advice: Advice = recommend(three, wishes_of(three))
        return list(advice_lines(advice))

    assert told() == told()
