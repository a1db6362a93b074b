"""Gets an artifact's weights onto this machine, with the work in a helper process.

The daemon stays small (HTTP client, zip and pip's configuration live in the helper), a download never blocks its loop, and
cancelling is sure: the helper is ended, and ends by itself when we die, because its standard input does.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import Bug, LlmDaemonError, Unavailable, UsageError, from_wire
from ..spec import Artifact
from .delivery import redact
from .gguf import header
from .store import Store

_GRACE = 3.0  # seconds between asking the helper to stop and making it
_LINE = 2**20  # bytes; a line of the helper is far shorter


def _ignore(_: dict[str, Any]) -> None:
    pass


async def fetch(
    artifact: Artifact,
    root: Path,
    on_progress: Callable[[dict[str, Any]], None] = _ignore,
    *,
    python: str = sys.executable,
    env: Mapping[str, str] | None = None,
) -> Path:
    """The path of the artifact's weights under `root`, fetched if they are not there yet.

    `on_progress` gets `{"phase": "resolve"|"download"|"verify"|"extract", "done": int, "total": int, "unit": "bytes",
    "message": str}`, at most some ten times a second, `total` 0 while unknown; what it raises ends the fetch.  Several
    fetches of one artifact, in any processes, download once.  Cancelling ends the helper and keeps what was downloaded: the next
    fetch resumes.  A GGUF file in place is checked by its header.

    Raises UsageError (`bad_model`, `hash_mismatch`, `cache_unwritable`, `no_such_package`, ...) and Unavailable
    (`download_failed`, `disk_full`).
    """
    if path := Store(root).path(artifact):
        if artifact.source == "file" and path.suffix.lower() == ".gguf":
            await asyncio.to_thread(header, path)
        return path
    if artifact.source == "file":
        raise UsageError(f"no model file {artifact.locator}", code="unknown_model", status=404, hint="check the path")
    request = json.dumps({"artifact": asdict(artifact), "root": str(root)}).encode() + b"\n"
    # Isolated (-I): neither the current folder nor PYTHONPATH may put other modules in the helper's way.
    helper = await asyncio.create_subprocess_exec(
        python, "-I", "-m", "llm_daemon.models.worker",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env=None if env is None else dict(env), limit=_LINE,
    )  # fmt: skip
    assert helper.stdin and helper.stdout and helper.stderr
    words = asyncio.create_task(_last_words(helper.stderr))
    try:
        helper.stdin.write(request)  # and stays open: its end is how the helper learns of ours
        answer = await _listen(helper.stdout, on_progress)
        if answer is None:
            status = await helper.wait()
            raise _died(status, await words)
    finally:
        await asyncio.shield(_end(helper, words))
    return answer


async def _listen(lines: asyncio.StreamReader, on_progress: Callable[[dict[str, Any]], None]) -> Path | None:
    """Passes progress on until the path comes; None if the helper ends without a word.  Raises the error it reports."""
    while line := await lines.readline():
        message = json.loads(line)
        if "path" in message:
            return Path(message["path"])
        if "error" in message:
            raise from_wire(message["error"])
        on_progress(message)
    return None


async def _last_words(stream: asyncio.StreamReader) -> str:
    tail = b""
    while chunk := await stream.read(4096):
        tail = (tail + chunk)[-4096:]
    return redact(tail.decode("utf-8", "replace"))


async def _end(helper: asyncio.subprocess.Process, words: asyncio.Task[str]) -> None:
    if helper.returncode is None:
        assert helper.stdin and helper.stdout
        helper.stdin.close()  # the helper takes this as an order to stop, if it has not finished
        rest = asyncio.create_task(helper.stdout.read())  # so that it cannot hang on a full pipe
        try:
            async with asyncio.timeout(_GRACE):
                await helper.wait()
        except TimeoutError:
            helper.kill()  # it waits in a system call, say for a name server; it has nothing to clean up there
            await helper.wait()
        await rest
    await words


def _died(status: int, words: str) -> LlmDaemonError:
    if status < 0:
        return Unavailable(
            f"the download helper was killed (signal {-status})",
            code="download_failed",
            hint="try again: the download resumes where it stopped",
        )
    return Bug(f"the download helper ended with status {status} and no answer", last_words=words)


def fetch_sync(
    artifact: Artifact,
    root: Path,
    on_progress: Callable[[dict[str, Any]], None] = _ignore,
    *,
    python: str = sys.executable,
    env: Mapping[str, str] | None = None,
) -> Path:
    """`fetch` for scripts; not from inside a running event loop."""
    return asyncio.run(fetch(artifact, root, on_progress, python=python, env=env))
