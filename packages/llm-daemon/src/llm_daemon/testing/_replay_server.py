"""The program that plays a recorded engine; `replay.py` says what a recording holds.

Run as `python -I -S _replay_server.py RECORDING PROGRAM-ARGUMENTS...`.  Standard library only.  What the recording does not know,
this program does not do: an unknown flag, route or method is answered as the recording says that the real one answers it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # -I leaves it out

import _fake_server as fake  # type: ignore[import-not-found, unused-ignore]

TOKEN, LOAD = 0.002, 0.05  # seconds: for each token, and to load
TOKENS = 3000  # what it says if nobody limits it
WHOLE = b"whole\n"  # the end of a model file that can be loaded, or of the largest one in such a folder


def end(entry: dict[str, Any], **words: str) -> None:
    """Says an entry's last lines and ends as it does."""
    for stream, fd in (("stdout", 1), ("stderr", 2)):
        for line in entry.get(stream, ()):
            os.write(fd, fill(line, words).encode() + b"\n")
    os._exit(entry["exit"])


def fill(text: str, words: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda found: words.get(found[1], found[0]), text)


def parse(command: dict[str, Any], argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """(flags, positional arguments), read as strictly as the real program does; ends like it if it would."""
    flags: dict[str, str] = {}
    words: list[str] = []
    rest = list(argv)
    while rest:
        arg = rest.pop(0)
        flag, equals, value = arg.partition("=")
        if not arg.startswith("-") or arg == "-":
            words.append(arg)
            continue
        if flag not in command["flags"] or (equals and not command.get("equals", True)):
            end(command["unknown"], arg=arg)
        takes = command["flags"][flag]
        if takes == 0:
            flags[flag] = ""
            continue
        if not equals:
            if not rest:
                end(command["incomplete"], arg=arg)
            value = rest.pop(0)
        if isinstance(takes, list) and value not in takes:
            end(command["wrong"], arg=flag, value=value)
        flags[flag] = value
    if len(words) > command.get("positional", 0):
        end(command["unknown"], arg=words[-1])
    return flags, words


class Replay(fake.Server):  # type: ignore[misc, unused-ignore]
    def __init__(self, recording: dict[str, Any], flags: dict[str, str], words: list[str]) -> None:
        self.recording, self.flags = recording, flags
        self.model = value(recording.get("model", {}), flags, words)
        self.loaded: set[str] = set()
        self.active, self.leaving = 0, False  # requests being answered; SIGTERM came
        self.address, self.port = listening(recording["address"], flags)
        plain = recording["hangup"]["plain"]
        scenario = {
            "tokens": TOKENS,
            "token_ms": TOKEN * 1000,
            "load_seconds": LOAD,
            "while_loading": "503" if recording["loading"]["listens"] else "refuse",
            "ignores_disconnect": False if plain == 0 else "nonstream",
        }
        alias = value(recording.get("alias", {}), flags, words) or self.model
        slots = value(recording.get("slots", {}), flags, words)
        slots = recording.get("slots", {}).get("values", {}).get(slots, slots) or recording.get("slots", {}).get("default", 1)
        super().__init__(scenario, {"--alias": alias, "--socket": "", "--slots": str(slots)})

    # -- life --

    def run(self) -> None:
        for line in self.recording["loading"].get("stderr", ()):
            self.log(fill(line, {"model": self.model, "port": str(self.port)}))
        super().run()

    def load(self) -> None:
        super().load()
        model = self.recording.get("model")
        if not model:
            return
        data = weights(self.model)
        if data is None:
            end(model["absent"], model=self.model)
        elif not data.endswith(WHOLE):
            end(model["broken"], model=self.model)

    def listen(self) -> None:
        if self.address.endswith(".sock"):
            end(self.recording["address"]["taken"], host=self.address, port=str(self.port))
        sock = socket.socket(socket.AF_INET)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((self.address, self.port))
        except OSError:
            end(self.recording["address"]["taken"], host=self.address, port=str(self.port))
        sock.listen(64)
        for line in self.recording.get("ready", {}).get("stderr", ()):
            self.log(fill(line, {"host": self.address, "port": str(sock.getsockname()[1])}))
        threading.Thread(target=self.accept, args=(sock,), daemon=True).start()

    def on_sigterm(self, *_: object) -> None:
        self.leaving = True
        if not (self.recording["stop"].get("waits_for_requests") and self.active):
            self.leave()

    def leave(self) -> None:
        stop = self.recording["stop"]
        for line in stop.get("stderr", ()):
            self.log(line)
        if "signal" in stop:
            signal.signal(stop["signal"], signal.SIG_DFL)
            os.kill(os.getpid(), stop["signal"])
        os._exit(stop["exit"])

    # -- HTTP --

    def answer(self, client: socket.socket, method: str, path: str, body: bytes) -> None:
        if not self.ready:
            loading = self.recording["loading"]
            self.reply(client, loading["status"], loading["body"], loading.get("headers", {}))
            return
        try:
            request = json.loads(body or b"{}")
        except ValueError:
            request = {}
        entry = self.find(method, path, request if isinstance(request, dict) else {})
        with self.lock:
            self.count += 1
            number = self.count
        if entry is None:
            entry = self.recording["not_found"]
        if "chunks" in entry:
            with self.slots, self.counted():
                self.converse(client, entry, request, number)
            return
        words = self.words_of(request, number)
        if effect := entry.get("effect"):
            (self.loaded.add if effect == "load" else self.loaded.discard)(str(request.get("model", "")))
        self.reply(client, entry["status"], shape(entry["body"], words), entry.get("headers", {}))

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        with self.lock:
            self.active += 1
        try:
            yield
        finally:
            with self.lock:
                self.active -= 1
            if self.leaving and not self.active:
                os.kill(os.getpid(), signal.SIGTERM)  # its handler runs in the main thread, and now leaves

    def turned_away(self, client: socket.socket, path: str, headers: dict[str, str]) -> bool:
        key = self.recording.get("key")
        if not key or path in key["open"] or headers.get("authorization") == f"Bearer {os.environ.get(key['env'])}":
            return False
        self.reply(client, key["status"], key["body"], {})
        return True

    def find(self, method: str, path: str, request: dict[str, Any]) -> dict[str, Any] | None:
        for entry in self.recording["exchanges"]:
            asked = entry["request"]
            if (asked["method"], asked["path"]) != (method, path):
                continue
            if any(request.get(key) != wanted for key, wanted in asked.get("json", {}).items()):
                continue
            if any(key not in request for key in asked.get("needs", ())):
                continue
            if asked.get("loaded") not in (None, bool(self.loaded)):
                continue
            return dict(entry)
        return None

    def words_of(self, request: dict[str, Any], number: int) -> dict[str, Any]:
        model = self.alias if self.recording.get("answers_as") == "alias" else request.get("model")
        return {
            "model": model, "alias": self.alias, "loaded": next(iter(self.loaded), None), "created": 1_790_000_000,
            "id": f"{number:08x}", "embeddings": embeddings(request.get("input")), "text": "", "finish": None,
            "prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3,
        }  # fmt: skip

    def converse(self, client: socket.socket, entry: dict[str, Any], request: dict[str, Any], number: int) -> None:
        limit = next(
            (request[k] for k in ("max_tokens", "max_completion_tokens", "n_predict") if isinstance(request.get(k), int)), None
        )
        words, said = self.words_of(request, number), []
        finish = "length" if limit is not None and limit < TOKENS else "stop"
        stream = bool(request.get("stream"))
        if stream:
            lines = "".join(f"{k}: {v}\r\n" for k, v in entry["chunks"]["headers"].items())
            self.tell(client, f"HTTP/1.1 200 OK\r\n{lines}Transfer-Encoding: chunked\r\n\r\n".encode())
        for word in self.words(client, request):
            said.append(word)
            words |= {"text": word, "completion_tokens": len(said), "total_tokens": 3 + len(said)}
            if stream and len(said) == 1 and "begin" in entry["chunks"]:
                self.event(client, json.dumps(shape(entry["chunks"]["begin"], {**words, "text": ""})))
            if stream:
                self.event(client, json.dumps(shape(entry["chunks"]["each"], words)))
        words["finish"] = finish
        if not stream:
            self.reply(client, entry["status"], shape(entry["body"], {**words, "text": "".join(said)}), entry.get("headers", {}))
            return
        words["text"] = ""
        self.event(client, json.dumps(shape(entry["chunks"]["last"], words)))
        if "usage" in entry["chunks"] and (request.get("stream_options") or {}).get("include_usage"):
            self.event(client, json.dumps(shape(entry["chunks"]["usage"], words)))
        if entry["chunks"].get("done"):
            self.event(client, entry["chunks"]["done"])
        self.tell(client, b"0\r\n\r\n")

    def reply(self, client: socket.socket, status: int, body: object, headers: dict[str, str]) -> None:
        text = isinstance(body, str)
        data = str(body).encode() if text else json.dumps(body).encode()
        lines = "".join(
            f"{k}: {v}\r\n" for k, v in {"Content-Type": "text/plain" if text else "application/json", **headers}.items()
        )
        head = f"HTTP/1.1 {status} {fake.REASONS.get(status, 'Status')}\r\n{lines}Content-Length: {len(data)}\r\n\r\n"
        self.tell(client, head.encode() + data, whole=True)


def weights(path: str) -> bytes | None:
    """The model's file, the largest of its folder, or what lies in the program's own zip archive; None if it is not there."""
    if path.startswith("/zip/"):
        import zipfile

        with zipfile.ZipFile(os.environ["REPLAY_PROGRAM"]) as archive:
            name = path.removeprefix("/zip/")
            return archive.read(name) if name in archive.namelist() else None
    if os.path.isdir(path):
        path = max((entry.path for entry in os.scandir(path)), key=os.path.getsize, default=os.devnull)
    try:
        with open(path, "rb") as f:
            return f.read()
    except OSError:
        return None


def listening(where: dict[str, Any], flags: dict[str, str]) -> tuple[str, int]:
    """(host, port) from the flags, or from the variable HOST:PORT."""
    if "env" in where:
        host, _, port = os.environ.get(where["env"], "").rpartition(":")
        return host or "127.0.0.1", int(port or where["default"])
    return flags.get(where["flag"], "127.0.0.1"), int(flags.get(where["port"], where["default"]))


def value(where: dict[str, Any], flags: dict[str, str], words: list[str]) -> str:
    """What the command line gave for something: by flag or by position."""
    if "flag" in where:
        return flags.get(where["flag"], "")
    at = where.get("positional")
    return words[at] if at is not None and at < len(words) else ""


def shape(template: Any, words: dict[str, Any]) -> Any:
    """A recorded body with its `=name` in place: numbers stay numbers."""
    if isinstance(template, dict):
        return {key: shape(item, words) for key, item in template.items()}
    if isinstance(template, list):
        return [shape(item, words) for item in template]
    if isinstance(template, str) and template.startswith("="):
        return words[template[1:]]
    return fill(template, {k: str(v) for k, v in words.items()}) if isinstance(template, str) else template


def embeddings(texts: Any) -> list[dict[str, Any]]:
    """One vector for each text, the same for the same."""
    known = [texts] if isinstance(texts, str) else texts if isinstance(texts, list) else []
    vectors = [[len(str(text)) / 100, sum(map(ord, str(text))) % 97 / 100] for text in known]
    return [{"object": "embedding", "embedding": vector, "index": i} for i, vector in enumerate(vectors)]


def main(path: str, argv: list[str]) -> None:
    with open(path, encoding="utf-8") as f:
        recording = json.load(f)
    for question in recording.get("questions", ()):  # --version and the like
        if argv == question["argv"]:
            end(question)
    command = recording["command"]
    lead = command.get("lead", [])
    if argv[: len(lead)] != lead:
        end(command["unknown"], arg=" ".join(argv[:1]))
    flags, words = parse(command, argv[len(lead) :])
    Replay(recording, flags, words).run()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
