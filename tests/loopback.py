"""A real HTTP server on loopback that speaks chat completions, with faults on demand, and counts its bill."""

from __future__ import annotations

import contextlib
import email
import json
import math
import random
import re
import sys
import threading
import time
from collections import Counter, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

_REFUSALS: dict[str | None, tuple[int, str, dict[str, str]]] = {
    "408": (408, "too slow", {}),
    "429": (429, "slow down", {}),
    "429-retry-after": (429, "slow down", {"Retry-After": "0.2"}),
    "429-for-an-hour": (429, "the day is over", {"Retry-After": "3600"}),
    "500": (500, "oops", {}),
    "400": (400, "content filtered", {}),
    "403": (403, "this text is not allowed", {}),
    "504": (504, "the gateway gave up", {}),
    "504-retry-after": (504, "the gateway gave up", {"Retry-After": "0.02"}),
    "503-retry-after": (503, "come back later", {"Retry-After": "0.05"}),
    "error": (200, "model overloaded", {}),
}


class LoopbackJudge:
    """Answers Yes where query and item share a word; `faults` are used up one per request, in order.

    A fault is one of: "408", "429", "429-retry-after", "503-retry-after", "504-retry-after", "500", "cut", "malformed", "empty", "refusal", "html", "401",
    "400", "403", "504", "slow", "late" (by a second), "trickle" (space by space, without end), "echo" (of the key), "429-for-an-hour",
    "no-usage", "error" (in a reply of status 200), and "filtered" and "length", replies without text. `always` is the fault of every request
    that has none of its own. `delivered` counts the replies with a usage: what a vendor puts on the bill.

    Of more than `at_once` requests at a time the others get 429, which names no time to wait.

    `rpm` is a token bucket that holds `burst` requests; what exceeds it gets 429 with Retry-After, and where it
    `tells`, every answer carries the limit in its headers.

    Batches are answered `batch_delay` seconds after they were made; `batch_faults` are used up one per batch:
    "expired" and "cancelled" (every second request has no answer), "errors" (every third is refused, every third
    fails), "crowded" (refused as a whole, for now), "bad" (refused for good), "create-cut" (made, but the connection
    breaks), "create-500" (not made), "create-refused" (not made, for good), "look-500" (the first look at it fails).
    Without `batches`, there is nothing at their paths.
    A batch is crowded, too, where more requests than `room` would lie in batches with it. The first times that a file is asked
    for it breaks off as if that were all of it, "in" a line or "after" one as `cut_files` says; the first
    `html_pages` times that a batch is, there comes a page of HTML.
    """

    def __init__(
        self,
        faults: list[str] | None = None,
        delay: float = 0.0,
        batch_faults: list[str] | None = None,
        batch_delay: float = 0.0,
        rpm: float | None = None,
        burst: int = 1,
        tells: bool = False,
        always: str | None = None,
        at_once: int | None = None,
        batches: bool = True,
    ) -> None:
        self.at_once, self.under_way = at_once, 0
        self.always, self.delivered = always, 0
        self.rpm, self.burst, self.tells = rpm, burst, tells
        self.allowance, self.allowance_at = float(burst), time.monotonic()
        self.faults = deque(faults or [])
        self.batch_faults = deque(batch_faults or [])
        self.batch_delay = batch_delay
        self.room = math.inf
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict] = {}
        self.has_batches = batches
        self.delay = delay
        self.cut_files: deque[str] = deque()
        self.html_pages = 0
        self.filtered = "content filtered"
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
                if self.path.rsplit("/", 1)[-1] in ("files", "batches"):
                    judge.take(self)
                else:
                    judge.handle(self)

            def do_GET(self) -> None:
                judge.give(self)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256  # connections that come all at once are not refused

            def handle_error(self, *address: Any) -> None:
                # A client that was killed or gave up waiting is no fault of the server's, and what is
                # printed of it may come during a later test that reads stderr.
                if not isinstance(sys.exception(), ConnectionError):
                    super().handle_error(*address)

        self.server = Server(("127.0.0.1", 0), Handler)
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
            fault = self.faults.popleft() if self.faults else self.always
            self.under_way += 1
            crowded = self.at_once is not None and self.under_way > self.at_once
        try:
            self.handle_one(request, body, "429" if crowded else fault)
        finally:
            with self.lock:
                self.under_way -= 1

    def handle_one(self, request: BaseHTTPRequestHandler, body: dict, fault: str | None) -> None:
        if self.delay:
            time.sleep(self.delay)
        if self.rpm and not self.may_pass():
            send(request, 429, json.dumps({"error": {"message": "slow down"}}), {"Retry-After": "0.05"})
            return
        self.answer(request, body, fault)

    def may_pass(self) -> bool:
        with self.lock:
            now = time.monotonic()
            self.allowance = min(self.burst, self.allowance + (now - self.allowance_at) * self.rpm / 60)
            self.allowance_at = now
            if self.allowance < 1:
                return False
            self.allowance -= 1
            return True

    def answer(self, request: BaseHTTPRequestHandler, body: dict, fault: str | None) -> None:
        user = body["messages"][-1]["content"]
        if fault in ("slow", "late"):
            time.sleep(0.3 if fault == "slow" else 1.0)
        if fault in _REFUSALS:
            status, message, headers = _REFUSALS[fault]
            send(request, status, json.dumps({"error": {"message": message}}), headers)
        elif fault == "401":
            key = request.headers["Authorization"].removeprefix("Bearer ")
            send(request, 401, json.dumps({"error": {"message": f"Incorrect API key provided: {key}"}}))
        elif fault in ("cut", "trickle"):
            send_a_part(request, fault)
        elif fault == "malformed":
            send(request, 200, '{"choices": [{"mess')
        elif fault == "html":
            send(request, 200, "<html>gateway</html>", {"Content-Type": "text/html"})
        elif fault == "empty":
            with self.lock:
                self.delivered += 1
            send(request, 200, completion([]))
        else:
            with self.lock:
                self.billed[user] += 1
                self.delivered += 1
            message, reason = {"role": "assistant", "content": verdict(user)}, "stop"
            if fault == "echo":
                message["content"] = f"You sent {request.headers['Authorization']}"
            if fault == "refusal":
                message = {"role": "assistant", "content": None, "refusal": "I would rather not."}
            elif fault in ("filtered", "length"):
                message = {"role": "assistant", "content": None if fault == "filtered" else ""}
                reason = "content_filter" if fault == "filtered" else "length"
            choices = [{"index": 0, "message": message, "finish_reason": reason}]
            headers = {"x-ratelimit-limit-requests": str(int(self.rpm))} if self.rpm and self.tells else {}
            text = completion(choices)
            if fault == "no-usage":
                text = json.dumps(
                    {name: value for name, value in json.loads(text).items() if name != "usage"}
                )
            send(request, 200, text, headers)

    # Files and batches.

    def take(self, request: BaseHTTPRequestHandler) -> None:
        """POST /files and /batches."""
        data = request.rfile.read(int(request.headers["Content-Length"]))
        with self.lock:
            self.authorization.add(request.headers["Authorization"])
        if not self.has_batches:
            send(request, 404, json.dumps({"error": {"message": "no such path"}}))
            return
        if request.path.endswith("/files"):
            message = email.message_from_bytes(
                b"Content-Type: " + request.headers["Content-Type"].encode() + b"\r\n\r\n" + data
            )
            parts = {
                part.get_param("name", header="content-disposition"): part for part in message.get_payload()
            }
            assert parts["purpose"].get_payload(decode=True) == b"batch"
            name = f"file-{len(self.files)}"
            self.files[name] = parts["file"].get_payload(decode=True)
            send(request, 200, json.dumps({"id": name, "object": "file", "purpose": "batch"}))
            return
        body = json.loads(data)
        with self.lock:
            fault = self.batch_faults.popleft() if self.batch_faults else None
            if fault == "create-500":
                send(request, 500, json.dumps({"error": {"message": "oops"}}))
                return
            if fault == "create-refused":
                send(request, 400, json.dumps({"error": {"message": "no such model"}}))
                return
            lying = [
                b for b in self.batches.values() if b["status"] == "in_progress" and b["fault"] != "crowded"
            ]
            files = [self.files.get(one.get("input_file_id"), b"") for one in (*lying, body)]
            if sum(file.count(b"\n") for file in files) > self.room:
                fault = "crowded"
            name = f"batch_{len(self.batches)}"
            self.batches[name] = {
                "id": name, "object": "batch", "endpoint": body["endpoint"], "input_file_id": body["input_file_id"],
                "completion_window": "24h", "status": "in_progress", "created_at": int(time.time()),
                "metadata": body.get("metadata"), "fault": fault, "made": time.time(),
                "due": 0 if fault == "crowded" else time.time() + self.batch_delay,
            }  # fmt: skip
        if fault == "create-cut":
            request.close_connection = True
            return
        send(request, 200, json.dumps(self.shown(name)))

    def give(self, request: BaseHTTPRequestHandler) -> None:
        """GET /batches, /batches/ID and /files/ID/content."""
        url = urlsplit(request.path)
        words = url.path.split("/")
        if not self.has_batches:
            send(request, 404, json.dumps({"error": {"message": "no such path"}}))
        elif words[-1] == "content" and words[-2] not in self.files:
            send(request, 404, json.dumps({"error": {"message": "no such file"}}))
        elif words[-1] == "content" and self.cut_files:
            data = self.files[words[-2]]
            end = data.index(b"\n", len(data) // 2) + (1 if self.cut_files.popleft() == "after" else -9)
            request.send_response(200)
            request.send_header("Connection", "close")  # without a length: the end of the reply is its end
            request.end_headers()
            request.wfile.write(data[:end])
            request.close_connection = True
        elif words[-1] in self.batches and self.batches[words[-1]].get("fault") == "look-500":
            self.batches[words[-1]]["fault"] = None
            send(request, 500, json.dumps({"error": {"message": "oops"}}))
        elif words[-1] in self.batches and self.html_pages:
            self.html_pages -= 1
            send(request, 200, "<html>gateway</html>", {"Content-Type": "text/html"})
        elif words[-1] == "content":
            send(request, 200, self.files[words[-2]].decode(), {"Content-Type": "application/octet-stream"})
        elif words[-1] == "batches":
            after = dict(parse_qsl(url.query)).get("after")
            names = list(reversed(self.batches))  # the newest first, two to a page
            start = names.index(after) + 1 if after else 0
            page = [self.shown(name) for name in names[start : start + 2]]
            listing = {"object": "list", "data": page, "has_more": start + 2 < len(names)}
            send(request, 200, json.dumps(listing))
        elif words[-1] in self.batches:
            send(request, 200, json.dumps(self.shown(words[-1])))
        else:
            send(request, 404, json.dumps({"error": {"message": "no such batch"}}))

    def shown(self, name: str) -> dict:
        """A batch as it stands now; it is worked off, and billed, when it is due."""
        with self.lock:
            batch = self.batches[name]
            if batch["status"] == "in_progress" and time.time() >= batch["due"]:
                self.work_off(batch)
            return {key: value for key, value in batch.items() if key not in ("due", "fault", "made")}

    def work_off(self, batch: dict) -> None:
        fault = batch["fault"]
        if fault in ("crowded", "bad"):
            code = "token_limit_exceeded" if fault == "crowded" else "model_not_found"
            batch |= {
                "status": "failed",
                "errors": {"object": "list", "data": [{"code": code, "message": code}]},
            }
            return
        answers, errors = [], []
        requests = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
        assert len({r["custom_id"] for r in requests}) == len(requests)
        for number, one in enumerate(requests):
            self.seen.append(one["body"])
            row = {"id": f"r{number}", "custom_id": one["custom_id"], "response": None, "error": None}
            if fault in ("expired", "cancelled") and number % 2:
                row["error"] = {
                    "code": f"batch_{fault}",
                    "message": "This request could not be executed in time.",
                }
                errors.append(row)
            elif fault == "errors" and number % 3:
                status = 400 if number % 3 == 1 else 500
                body = {"error": {"message": self.filtered if status == 400 else "oops"}}
                row["response"] = {"status_code": status, "body": body}
                errors.append(row)
            else:
                user = one["body"]["messages"][-1]["content"]
                self.billed[user] += 1
                message = {"role": "assistant", "content": verdict(user)}
                choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
                row["response"] = {"status_code": 200, "body": json.loads(completion(choices))}
                answers.append(row)
        random.shuffle(answers)  # results come in any order
        for rows, field in ((answers, "output_file_id"), (errors, "error_file_id")):
            if rows:
                batch[field] = f"file-{len(self.files)}"
                self.files[batch[field]] = "".join(json.dumps(row) + "\n" for row in rows).encode()
        batch["request_counts"] = {
            "total": len(requests), "completed": len(answers), "failed": len(errors)
        }  # fmt: skip
        batch["status"] = fault if fault in ("expired", "cancelled") else "completed"


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


def send_a_part(request: BaseHTTPRequestHandler, fault: str) -> None:
    """A reply that breaks off, or that comes space by space until the other side has had enough."""
    request.send_response(200)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", "1000")
    request.end_headers()
    with contextlib.suppress(OSError):
        request.wfile.write(b'{"choices": [')
        for _ in range(300 if fault == "trickle" else 0):
            request.wfile.write(b" ")
            time.sleep(0.1)
    request.close_connection = True
