"""What a model is loaded for and with, on the real engines: embedding, ranking, adapters, a draft model."""

from __future__ import annotations

import base64
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from llm_daemon import attach
from llm_daemon.client.sync import Lease
from llm_daemon.testing.world import World
from tests import tiny

# Read now: the session takes LLM_DAEMON_* variables away.
LLAMA_SERVER = os.environ.get("LLM_DAEMON_TEST_LLAMA_SERVER")
pytestmark = pytest.mark.real
Ask = Callable[..., dict[str, Any]]
MODEL, WIDTH, LAYERS = "smollm2-135m", 576, 30
QUESTION: dict[str, Any] = {"prompt": "The three largest cities of France are", "max_tokens": 24, "temperature": 0}


@pytest.fixture(params=["xllamacpp", "llama-server"])
def engine(world: World, request: pytest.FixtureRequest) -> str:
    if request.param == "llama-server":
        if not LLAMA_SERVER:
            pytest.skip("no llama-server is built (make llama-server)")
        world.config.write_text(world.config.read_text() + f'[engines.llama-server]\npath = "{LLAMA_SERVER}"\n')
    world.config.write_text(f'default_engine = "{request.param}"\n' + world.config.read_text())
    return str(request.param)


@pytest.fixture
def hold(engine: str) -> Iterator[Callable[..., Lease]]:
    """`hold(model, **options)`: a lease until the test ends, on a model with a small context."""
    held: list[Lease] = []

    def make(model: str, **options: Any) -> Lease:
        held.append(attach(model, context=512, parallel=1, **options))
        return held[-1]

    yield make
    for lease in held:
        lease.close()


def ask(lease: Lease, route: str, status: int = 200, model: str = "", **body: Any) -> dict[str, Any]:
    answer = httpx.post(
        lease.base_url + route, json={"model": model or lease.model, **body}, timeout=60,
        headers={"authorization": f"Bearer {lease.api_key}"},
    )  # fmt: skip
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found


def vectors(answer: dict[str, Any]) -> list[list[float]]:
    return [it["embedding"] for it in sorted(answer["data"], key=lambda it: it["index"])]


def test_an_embedding_model_is_loaded_to_embed(hold: Callable[..., Lease], tmp_path: Path) -> None:
    lease = hold(str(tiny.bert(tmp_path / "tiny.gguf")))
    same, other, again = vectors(ask(lease, "/embeddings", input=["a b c", "the sky", "a b c"]))
    assert len(same) == tiny.WIDTH and math.isclose(sum(x * x for x in same), 1, rel_tol=1e-3)
    assert same == pytest.approx(again, abs=1e-5) and same != pytest.approx(other, abs=1e-2)
    error = ask(lease, "/chat/completions", 400, messages=[{"role": "user", "content": "Hi"}])["error"]
    assert error["code"] == "wrong_mode" and error["message"].endswith("needs mode generate")


def test_a_long_text_is_embedded_whole(hold: Callable[..., Lease], tmp_path: Path) -> None:
    lease = hold(str(tiny.bert(tmp_path / "tiny.gguf")))
    (found,) = vectors(ask(lease, "/embeddings", input="a b c d " * 120))  # 482 tokens, of the 512 that there is room for
    assert len(found) == tiny.WIDTH


def test_a_model_that_writes_says_how_to_have_it_embed(hold: Callable[..., Lease]) -> None:
    writes = hold(MODEL)
    error = ask(writes, "/embeddings", 400, input="Hi")["error"]
    assert error["code"] == "wrong_mode" and error["hint"].startswith(f"ask for the model {MODEL}?")
    assert "mode=embedding" in error["hint"]
    embeds = hold(MODEL, mode="embedding")
    assert embeds.pid != writes.pid
    (found,) = vectors(ask(embeds, "/embeddings", input="Hi"))
    assert len(found) == WIDTH
    assert ask(writes, "/completions", **QUESTION)["choices"][0]["text"]


def test_a_reranker_ranks(hold: Callable[..., Lease], tmp_path: Path) -> None:
    lease = hold(str(tiny.bert(tmp_path / "ranker.gguf", tiny.RANK)))
    documents = ["the sky", "a b c", "x y z"]
    results = ask(lease, "/rerank", query="the sky", documents=documents)["results"]
    scores = {it["index"]: it["relevance_score"] for it in results}
    assert sorted(scores) == [0, 1, 2] and all(math.isfinite(score) for score in scores.values())
    assert len(set(scores.values())) == 3
    turned = ask(lease, "/rerank", query="the sky", documents=documents[::-1])["results"]
    assert {2 - it["index"]: pytest.approx(it["relevance_score"], abs=1e-4) for it in turned} == scores
    assert ask(lease, "/embeddings", 400, input="a")["error"]["code"] == "wrong_mode"


def test_an_adapter_changes_what_is_said_as_strongly_as_it_is_told(hold: Callable[..., Lease], tmp_path: Path) -> None:
    path = str(tiny.lora(tmp_path / "adapter.gguf", WIDTH, LAYERS))

    def said(**options: Any) -> str:
        text: str = ask(hold(MODEL, **options), "/completions", **QUESTION)["choices"][0]["text"]
        return text

    plain = said()
    assert said(lora=f"{path}:0") == plain
    assert said(lora=[path]) != plain


def test_a_draft_model_proposes_and_changes_nothing(hold: Callable[..., Lease], tmp_path: Path, smollm2: str) -> None:
    plain = ask(hold(MODEL), "/completions", **QUESTION)
    assert "draft_n" not in plain["timings"]
    drafted = ask(hold(MODEL, draft=small(smollm2, tmp_path)), "/completions", **QUESTION)
    assert drafted["timings"]["draft_n"] > 0
    assert drafted["choices"][0]["text"] == plain["choices"][0]["text"]


def test_a_projector_lets_a_model_see(hold: Callable[..., Lease], tmp_path: Path) -> None:
    lease = hold(MODEL, mmproj=tiny.projector(tmp_path / "eyes.gguf", WIDTH))

    def said(colour: tuple[int, int, int]) -> dict[str, Any]:
        picture = "data:image/png;base64," + base64.b64encode(tiny.png(colour)).decode()
        content = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": picture}}]
        messages = [{"role": "user", "content": content}]
        return ask(lease, "/chat/completions", messages=messages, max_tokens=8, temperature=0)

    red, blue = said((255, 0, 0)), said((0, 0, 255))
    words = ask(lease, "/chat/completions", messages=[{"role": "user", "content": "What is it?"}], max_tokens=1)
    assert red["usage"]["prompt_tokens"] == words["usage"]["prompt_tokens"] + tiny.PATCHES**2
    assert red["choices"][0]["message"]["content"] != blue["choices"][0]["message"]["content"]  # random eyes, but eyes
    assert said((255, 0, 0))["choices"] == red["choices"]


def test_a_model_without_a_projector_says_that_it_cannot_see(hold: Callable[..., Lease]) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    answer = ask(hold(MODEL), "/chat/completions", 500, messages=[{"role": "user", "content": [picture]}])
    assert "mmproj" in answer["error"]["message"]


def small(model: str, folder: Path) -> str:
    """A draft of the model: a smaller quantization, or where that cannot be made another file of the same."""
    tools = Path(__file__).parent.parent / "tools"

    def run(tool: str, *args: str) -> str:
        argv = [sys.executable, str(tools / tool), *args]
        return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout.strip()

    if not run("build_llama_server.py", "--path", "llama-quantize"):
        return str(shutil.copy(model, folder / "draft.gguf"))
    return run("quantize.py", model, "Q3_K_M")


def test_the_command_line_takes_them_and_refuses_what_an_engine_cannot(
    world: World, engine: str, tmp_path: Path, fake_model: Callable[..., str]
) -> None:
    path = str(tiny.bert(tmp_path / "tiny.gguf"))
    done = world.llm_daemon("load", path, "--mode", "embedding", "--context", "256", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == f"{path}?context=256"  # what it is made for need not be said
    done = world.llm_daemon("load", fake_model(), "--engine", "fake", "--lora", path)
    assert done.returncode == 2 and "fake cannot load a model with lora" in done.stderr
    assert "use the engine" in done.stderr and engine in done.stderr
