"""Good requests and answers, and ways to spoil them."""

from __future__ import annotations

from random import Random

HOST = b"Host: 127.0.0.1:1\r\nAuthorization: Bearer t\r\n"
CHAT = b'{"model":"m","messages":[{"role":"user","content":"Hi"}]}'
FORM = (
    b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n'
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc\r\n--x--\r\n'
)
BODIES = [
    CHAT,
    b'{"model":"m","prompt":"Hi","stream":true,"n":1,"stop":["a"],"n_probs":2}',
    b'{"model":"m","input":"Hi","image_url":"data:,x","grammar":"root ::= (a)","n_discard":0,"id_slot":-1}',
    b'{"model":"\\u006d","tools":[{"a":[[{}]]}],"response_format":{"type":"json_schema"},"response_fields":["a/b"]}',
    b"[]",
    b"",
]
PATHS = [
    b"/v1/chat/completions", b"/v1/completions", b"/v1/responses", b"/v1/messages", b"/completion", b"/infill", b"/tokenize",
    b"/v1/embeddings", b"/upstream/m/v1/chat/completions", b"/upstream/m/props?a=b", b"/api/status", b"/nothing",
]  # fmt: skip


def post(path: bytes, body: bytes, more: bytes = b"", kind: bytes = b"application/json") -> bytes:
    head = b"POST %b HTTP/1.1\r\n%bContent-Type: %b\r\n%bContent-Length: %d\r\n\r\n"
    return head % (path, HOST, kind, more, len(body)) + body


def get(path: bytes, more: bytes = b"", method: bytes = b"GET", version: bytes = b"1.1") -> bytes:
    return b"%b %b HTTP/%b\r\n%b%b\r\n" % (method, path, version, HOST, more)


REQUESTS = [
    *(post(path, CHAT) for path in PATHS),
    *(post(b"/v1/chat/completions", body) for body in BODIES),
    post(b"/v1/audio/transcriptions", FORM, kind=b"multipart/form-data; boundary=x"),
    post(b"/v1/chat/completions", CHAT, b"X-LLM-Lane: interactive\r\nX-LLM-Supersede: k\r\nX-LLM-Deadline-Ms: 5\r\n"),
    post(b"/v1/chat/completions", CHAT, b"Expect: 100-continue\r\n"),
    post(b"/v1/chat/completions", CHAT, b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: A\r\n"),
    b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5;a=b\r\n{    \r\n1\r\n}\r\n0\r\nT: x\r\n\r\n",
    get(b"/health"),
    get(b"/health", version=b"1.0"),
    get(b"/v1/models/m", b"Connection: close\r\n"),
    get(b"/upstream/m/", method=b"HEAD"),
    get(b"/ui/"),
    get(b"/v1/models", b"Origin: http://127.0.0.1:1\r\nAccess-Control-Request-Method: POST\r\n", b"OPTIONS"),
    get(b"/upstream/m/ws", b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n") + b"early",
]  # fmt: skip


def answer(body: bytes, status: bytes = b"200 OK", more: bytes = b"Content-Type: application/json\r\n") -> bytes:
    return b"HTTP/1.1 %b\r\n%bContent-Length: %d\r\n\r\n" % (status, more, len(body)) + body


def stream(*events: bytes, name: bytes = b"") -> bytes:
    whole = b"".join(b"%bdata: %b\n\n" % (name, event) for event in events)
    pieces = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in (whole[:9], whole[9:]) if p)
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n"


STREAMS = [
    [
        b'{"choices":[{"index":0,"delta":{"role":"assistant","content":"Hi"},"finish_reason":null}],"id":"c"}',
        b'{"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"id":"t","function":{"name":"f","arguments":"{"}}]}}]}',
        b'{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"usage":{"n":1},"timings":{"predicted_n":2}}',
        b"[DONE]",
    ],
    [
        b'{"choices":[{"index":0,"text":"Hi","logprobs":{"tokens":["a"]}}]}',
        b'{"choices":[{"index":0,"text":"","finish_reason":"length"}]}',
        b"[DONE]",
    ],
    [b'{"type":"response.output_text.delta"}', b'{"type":"response.completed","response":{"output":[{}],"created_at":1}}'],
    [
        b'{"type":"message_start","message":{"id":"m","usage":{"input_tokens":1}}}',
        b'{"type":"content_block_start","index":0,"content_block":{"type":"tool_use","id":"t"}}',
        b'{"type":"content_block_delta","index":0,"delta":{"type":"input_json_delta","partial_json":"{}"}}',
        b'{"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":2}}',
        b'{"type":"message_stop"}',
    ],
    [b'{"index":0,"content":"Hi","tokens_predicted":1}', b'{"index":0,"content":"","stop":true,"generation_settings":{}}'],
    [b'{"error":{"code":400,"message":"no"}}'],
]
ANSWERS = [
    answer(b'{"ok":true}'),
    answer(b"x" * 300_000),
    answer(b"", b"304 Not Modified"),
    answer(b"no", b"503 Busy", b"Connection: close, x-a\r\nX-A: b\r\nRetry-After: 1\r\nSet-Cookie: a\r\n"),
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" + answer(b"late"),
    b"HTTP/1.0 200 OK\r\nContent-Type: text/html\r\n\r\nuntil the end",
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nframes",
    *(stream(*events) for events in STREAMS),
    b"",
]
CONTROL = [
    b'{"op":"HELLO","proto":1,"lease":true}\n{"op":"PING","n":[1,null,1.5,"\\u00e4"]}\n',
    b'{"op":"ENSURE","id":7,"spec":{"model":"m"}}\n',
]
TOKENS = [
    b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b",", b"\r\n\r\n", b"\r\n ", b"0\r\n\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Content-Length: 5\r\n", b"Content-Length: 99999999999999999999\r\n", b"Connection: close\r\n", b"Connection: Upgrade\r\n",
    b"Upgrade: websocket\r\n", b"Host: evil\r\n", b"Expect: 100-continue\r\n", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"PRI * ",
    b"CONNECT ", b"ffffffffffffffff", b"7fffffff\r\n", b"-1", b"1e999", b"\xff", b"\xc3\xa4", b'"', b"\\u0000", b"\\ud800",
    b"[" * 70, b"{" * 1200, b"null", b"true", b"image", b"data: ", b"event: error\n", b"id", b"9" * 25, b"x" * 9000,
    b"--x", b'name="model"',
]  # fmt: skip


def spoil(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    """`data` with a few changes."""
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 6))):
        at = rng.randint(0, len(data))
        to = min(len(data), at + rng.choice((1, 1, 2, 4, 16, 200)))
        match rng.randrange(7):
            case 0:
                data = data[:at] + data[to:]
            case 1:
                data = data[:at] + data[at:to] * 2 + data[to:]
            case 2:
                data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
            case 3:
                data = data[:at]
            case 4:
                other = rng.choice(others)
                data = data[:at] + other[rng.randint(0, len(other)) :]
            case _:
                data = data[:at] + rng.choice(TOKENS) + data[rng.choice((at, to)) :]
    return data


def request(rng: Random) -> bytes:
    """One request, spoilt as bytes or only in its parts, with a head that fits."""
    match rng.randrange(4):
        case 0:
            return rng.choice(REQUESTS)
        case 1:
            more = rng.choice((b"", b"", b"Connection: close\r\n", b"Expect: 100-continue\r\n"))
            return post(rng.choice(PATHS), spoil(rng, rng.choice(BODIES), BODIES), more)
        case _:
            return spoil(rng, rng.choice(REQUESTS), REQUESTS)


def engine_answer(rng: Random) -> bytes:
    """One answer of an engine, spoilt or not."""
    match rng.randrange(4):
        case 0:
            return rng.choice(ANSWERS)
        case 1:
            events = rng.choice(STREAMS)
            return stream(*(spoil(rng, rng.choice(events), events) for _ in range(rng.randrange(5))), *events)
        case _:
            return spoil(rng, rng.choice(ANSWERS), ANSWERS)


def cut(rng: Random, data: bytes, most: int = 6) -> list[bytes]:
    """`data` in pieces, none empty."""
    at = sorted(rng.randint(0, len(data)) for _ in range(rng.randrange(most)))
    return [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True) if a < b]
