"""The helper process behind `fetch`: `python -I -m llm_daemon.models.worker`.

One request as a JSON line on standard input; JSON lines on standard output: progress, then `{"path": ...}` or
`{"error": ...}`.  It stops on SIGTERM and when standard input ends, which is how it notices that its parent died.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from ..errors import Bug, LlmDaemonError
from ..spec import Artifact
from .delivery import Delivery, Reporter, bad_weights, mismatch, redact, storage_error
from .gguf import read_header
from .sources import source
from .store import Store


class Stopped(BaseException):
    """Somebody wants us to end; passes every `except Exception` on the way out."""


def obtain(artifact: Artifact, store: Store, report: Reporter) -> Path:
    """The path of the artifact's weights, fetched unless somebody else did so while we waited for the lock."""
    folder = store.folder(artifact)
    try:
        with store.lock(artifact, lambda: report("download", 0, artifact.size or 0, "another process is downloading it")):
            if path := store.path(artifact):
                return path
            folder.mkdir(parents=True, exist_ok=True)
            return _deliver(Delivery(artifact, folder, report), store)
    except OSError as e:
        raise storage_error(e, store.root, artifact.size or 0) from e


def _deliver(delivery: Delivery, store: Store) -> Path:
    artifact = delivery.artifact
    try:
        source(artifact.source).deliver(delivery)
        try:
            _check(delivery)
        except LlmDaemonError:
            delivery.discard_parts()  # they make the wrong weights, and would do so again
            raise
        path = store.commit(artifact, delivery.target, delivery.written, delivery.sha256, delivery.more, delivery.commit)
        delivery.discard_parts()
        return path
    except OSError as e:
        raise storage_error(e, store.root, artifact.size or delivery.asked) from e
    finally:
        delivery.discard_target()


def _check(delivery: Delivery) -> None:
    artifact = delivery.artifact
    delivery.report("verify", delivery.written, delivery.written)
    if artifact.size is not None and delivery.written != artifact.size:
        raise bad_weights(f"{artifact.locator} has {delivery.written:,} bytes of weights, not {artifact.size:,}")
    if artifact.sha256 is not None and delivery.sha256 != artifact.sha256:
        raise mismatch(artifact.locator, artifact.sha256, delivery.sha256)
    if delivery.target.is_dir():
        return  # its source has looked for all its parts
    try:
        for path in (delivery.target, *delivery.more):
            read_header(path)
    except LlmDaemonError as e:  # say whose weights, not the temporary file's name
        raise bad_weights(e.message.replace(delivery.target.name, f"the file in {artifact.locator}")) from e


def _read_line(fd: int) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        if not (chunk := os.read(fd, 65536)):
            break
        line += chunk
    return line


def _stop_at_eof(fd: int) -> None:
    # Plain os.read: a buffered reader's lock, held by this thread, would upset the interpreter's shutdown.
    while os.read(fd, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _on_sigterm(_number: int, _frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough; let the clean-up finish
    raise Stopped


def _emit(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Serves one request; the exit status says only whether it was stopped (143) or the parent is gone."""
    try:
        signal.signal(signal.SIGTERM, _on_sigterm)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole terminal; our parent decides
        if not (line := _read_line(0)):
            return 0  # called off before it began
        request = json.loads(line)
        threading.Thread(target=_stop_at_eof, args=(0,), daemon=True).start()
        wire = request["artifact"]
        artifact = Artifact(**{**wire, "files": tuple(wire["files"])})
        try:
            answer: dict[str, Any] = {"path": str(obtain(artifact, Store(Path(request["root"])), Reporter(_emit)))}
        except LlmDaemonError as e:
            e.message, e.hint = redact(e.message), redact(e.hint)
            answer = {"error": e.to_wire()}
        except Exception as e:
            answer = {"error": Bug(redact(f"fetching {artifact.locator} failed: {e!r}")).to_wire()}
        _emit(answer)
    except (Stopped, BrokenPipeError):
        # Not sys.exit: it would flush into a pipe that nobody reads any more.
        os._exit(128 + signal.SIGTERM)
    return 0


if __name__ == "__main__":
    sys.exit(main())
