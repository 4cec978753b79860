"""A real HTTP server on loopback that speaks chat completions, with faults on demand, and counts its bill."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LoopbackJudge:
    """Answers Yes where query and item share a word; `faults` are used up one per request, in order.

    A fault is one of: "429", "429-retry-after", "500", "cut", "malformed", "empty", "refusal", "html", "401",
    "400", "slow".
    """

    def __init__(self, faults: list[str] | None = None, delay: float = 0.0) -> None:
        self.faults = deque(faults or [])
        self.delay = delay
        self.billed: Counter[str] = Counter()
        self.seen: list[dict] = []
        self.authorization: set[str] = set()
        self.lock = threading.Lock()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                judge.handle(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self) -> LoopbackJudge:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        with self.lock:
            self.seen.append(body)
            self.authorization.add(request.headers["Authorization"])
            fault = self.faults.popleft() if self.faults else None
        if self.delay:
            time.sleep(self.delay)
        self.answer(request, body, fault)

    def answer(self, request: BaseHTTPRequestHandler, body: dict, fault: str | None) -> None:
        user = body["messages"][-1]["content"]
        if fault == "slow":
            time.sleep(0.3)
        if fault in ("429", "429-retry-after"):
            headers = {"Retry-After": "0.2"} if fault.endswith("after") else {}
            send(request, 429, json.dumps({"error": {"message": "slow down"}}), headers)
        elif fault == "500":
            send(request, 500, json.dumps({"error": {"message": "oops"}}))
        elif fault == "401":
            key = request.headers["Authorization"].removeprefix("Bearer ")
            send(request, 401, json.dumps({"error": {"message": f"Incorrect API key provided: {key}"}}))
        elif fault == "400":
            send(request, 400, json.dumps({"error": {"message": "content filtered"}}))
        elif fault == "cut":
            request.send_response(200)
            request.send_header("Content-Type", "application/json")
            request.send_header("Content-Length", "1000")
            request.end_headers()
            request.wfile.write(b'{"choices": [')
            request.close_connection = True
        elif fault == "malformed":
            send(request, 200, '{"choices": [{"mess')
        elif fault == "html":
            send(request, 200, "<html>gateway</html>", {"Content-Type": "text/html"})
        elif fault == "empty":
            send(request, 200, completion([]))
        else:
            with self.lock:
                self.billed[user] += 1
            message = {"role": "assistant", "content": verdict(user)}
            if fault == "refusal":
                message = {"role": "assistant", "content": None, "refusal": "I would rather not."}
            send(request, 200, completion([{"index": 0, "message": message, "finish_reason": "stop"}]))


def verdict(user: str) -> str:
    query, item = re.findall(r'"([^"]*)"', user)[:2]
    return "Yes" if set(query.split()) & set(item.split()) else "No."


def completion(choices: list[dict]) -> str:
    usage = {"prompt_tokens": 50, "completion_tokens": 2, "total_tokens": 52}
    return json.dumps(
        {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": choices,
            "usage": usage,
        }
    )


def send(
    request: BaseHTTPRequestHandler, status: int, text: str, headers: dict[str, str] | None = None
) -> None:
    data = text.encode()
    request.send_response(status)
    for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.wfile.write(data)
