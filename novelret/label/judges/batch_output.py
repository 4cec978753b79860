"""What a finished batch brought: a line of JSON for each of its requests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

from openai import OpenAI
from openai.types import Batch
from openai.types.chat import ChatCompletion

from novelret.endpoint import without_secrets
from novelret.label.judges.endpoint import is_cut, text_of

_Kind = TypeVar("_Kind")


class Reply(NamedTuple):
    """One line of a batch's output.

    Attributes:
        key: the question's; empty where the line cannot be read.
        text: the answer; None where there is none.
        usage: tokens by name, as far as they are told.
        reason: why there never will be an answer; where this is None too, the question is asked again.
        delivered: whether it is paid for.
        cut: whether the limit on its length ended it.
    """

    key: bytes
    text: str | None
    usage: dict[str, Any]
    reason: str | None
    delivered: bool
    cut: bool = False


class OddReply(Exception):
    """A reply of status 200 that is not the protocol's, as a gateway's page of HTML, or that ends early."""


def check_reply(reply: Any, kind: type[_Kind]) -> _Kind:
    """The reply, which the client hands over whatever it is.

    Raises:
        OddReply: it is nothing of that kind.
    """
    if isinstance(reply, kind) and getattr(reply, "id", None):
        return reply
    raise OddReply(f"no {kind.__name__} but {without_secrets(str(reply))[:80]!r}")


def all_batches(client: OpenAI) -> Iterator[Batch]:
    """The endpoint's batches, newest first.

    Raises:
        OddReply: the reply is no list of them.
    """
    try:
        yield from client.batches.list(limit=100)
    except AttributeError:  # of the client, about a reply that is no JSON
        raise OddReply("no list of batches") from None


def replies_in(client: OpenAI, file: str | None) -> Iterator[Reply]:
    """The replies in an output or error file, in the file's order; none where there is no file.

    Raises:
        OddReply: the file breaks off.
    """
    if file is None:
        return
    rest = b""
    try:
        with client.files.with_streaming_response.content(file) as response:
            # The client's own lines end at U+2028 and the like too, which JSON may hold as they are.
            for data in response.iter_bytes():
                *lines, rest = (rest + data).split(b"\n")
                yield from (_read(line) for line in lines if line.strip())
    except Exception as error:
        # The client passes its transport's errors on as they are once a body has begun.
        if not type(error).__module__.startswith("httpx"):
            raise
        raise OddReply(f"file {file} breaks off ({type(error).__name__})") from None
    if rest.strip():
        try:
            json.loads(rest)
        except ValueError:
            raise OddReply(f"file {file} breaks off") from None
        yield _read(rest)


def _read(line: bytes) -> Reply:
    try:
        row = json.loads(line)
        key = bytes.fromhex(row["custom_id"])
        response = row.get("response") or {}
        status, body = response.get("status_code"), response.get("body") or {}
        if status == 200:
            usage = body.get("usage") or {}
            response = ChatCompletion.construct(**body)
            try:
                return Reply(key, text_of(response), usage, None, True, is_cut(response))
            except ValueError:
                return Reply(key, None, usage, None, bool(usage))
        permanent = isinstance(status, int) and 400 <= status < 500 and status not in (408, 409, 429)
        message = (body.get("error") or row.get("error") or {}).get("message", f"status {status}")
    except (ValueError, KeyError, TypeError, AttributeError):  # not the protocol's, and perhaps paid for
        return Reply(b"", None, {}, None, True)
    return Reply(key, None, {}, str(message) if permanent else None, False)
