"""Asking a judge: as fast as the client alone, the whole allowance, nothing for what is known, flat memory.

    python benchmarks/judge_throughput.py [--only bare|allowance|known|load|memory] [--rounds 5]

* bare: requests per second of `novelret label`'s asking beside a bare AsyncOpenAI loop at the same
  concurrency, against a server on loopback whose answers take 50 ms; interleaved rounds, medians.
* allowance: share of a 3,000 requests-per-minute allowance that is used, where the limit is given (--rpm),
  told in headers, or only shows as 429 with Retry-After. Takes three minutes.
* known: seconds to pass over a million pairs whose answers the store holds, and to write the LABELS.
* load: seconds and memory to load 10 million judgements for training.
* memory: what the peak grows by while 20,000 questions of 20,000 and of a million pairs are asked.

The server is a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

CONCURRENCY = 32
ALLOWANCE = 3_000


async def serve(port: Any, delay: float, rpm: float, tells: bool) -> None:
    """A server with as much HTTP as the client needs; `rpm` is a token bucket holding one second's worth."""
    body = {
        "id": "x", "object": "chat.completion", "created": 0, "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "No"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 90, "completion_tokens": 1, "total_tokens": 91},
    }  # fmt: skip
    data = json.dumps(body).encode()
    told = f"x-ratelimit-limit-requests: {rpm:.0f}\r\n" if tells else ""
    good = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n{told}Content-Length: {len(data)}\r\n\r\n"
    later = "HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nContent-Length: 2\r\n\r\n{}"
    state = {"allowance": rpm / 60, "at": time.monotonic()}

    def passes() -> bool:
        now = time.monotonic()
        state["allowance"] = min(rpm / 60, state["allowance"] + (now - state["at"]) * rpm / 60)
        state["at"] = now
        if state["allowance"] < 1:
            return False
        state["allowance"] -= 1
        return True

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                if rpm and not passes():
                    writer.write(later.encode())
                    continue
                await asyncio.sleep(delay)
                writer.write(good.encode() + data)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port.value = server.sockets[0].getsockname()[1]
    await server.serve_forever()


def _serve(port: Any, delay: float, rpm: float, tells: bool) -> None:
    asyncio.run(serve(port, delay, rpm, tells))


class Server:
    """The server in a process of its own; sets the environment that leads the client to it."""

    def __init__(self, delay: float = 0.05, rpm: float = 0, tells: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        self.port = context.Value("i", 0)
        self.process = context.Process(target=_serve, args=(self.port, delay, rpm, tells), daemon=True)

    def __enter__(self) -> Server:
        self.process.start()
        while not self.port.value:
            time.sleep(0.01)
        os.environ |= {"OPENAI_BASE_URL": f"http://127.0.0.1:{self.port.value}/v1", "OPENAI_API_KEY": "k"}
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()


def messages_of(n: int) -> list[dict[str, str]]:
    from novelret.label.prompts import PROMPTS, render

    return render(
        PROMPTS["query-document"], f"query {n // 20}", f"the document number {n}, about many things"
    )


def bare_loop(requests: int) -> float:
    """Seconds of the plain client: workers that take the next question until there is none."""
    from openai import AsyncOpenAI

    async def ask() -> None:
        numbers = iter(range(requests))
        async with AsyncOpenAI(max_retries=0) as client:

            async def work() -> None:
                for n in numbers:
                    await client.chat.completions.create(
                        model="m", messages=messages_of(n), temperature=0, max_tokens=5
                    )

            await asyncio.gather(*[work() for _ in range(CONCURRENCY)])

    begun = time.perf_counter()
    asyncio.run(ask())
    return time.perf_counter() - begun


class World:
    """An index and candidates made of nothing but texts, as labelling sees them."""

    def __init__(self, folder: Path, pairs: int, items: int = 100_000, per_query: int = 100) -> None:
        import pyarrow as pa

        from novelret.data.catalog import Catalog
        from novelret.label.candidates import Candidates

        ids = pa.chunked_array([pa.array([f"item-{n}" for n in range(items)], pa.large_string())])
        text = (
            "the document number {}, a text about as long as the title and snippet of a page, with many words"
        )
        texts = pa.chunked_array([pa.array([text.format(n) for n in range(items)], pa.large_string())])
        self.catalog = Catalog(ids, texts)
        queries = -(-pairs // per_query)
        self.query_ids = [f"query-{n}" for n in range(queries)]
        self.query_texts = [f"what somebody wants to know, number {n}" for n in range(queries)]
        rng = np.random.default_rng(0)
        rows = np.repeat(np.arange(queries), per_query)[:pairs]
        starts = rng.integers(items, size=queries)
        found = (starts[rows] + 7 * np.tile(np.arange(per_query), queries)[:pairs]) % items
        self.candidates = Candidates(rows, found, np.zeros(pairs, dtype=np.int16), ("base-novel",))
        self.folder, self.store = folder, folder / "store.sqlite"

    def __len__(self) -> int:
        return len(self.query_texts)

    def label(self, name: str, **settings: Any) -> dict[str, Any]:
        from novelret.label.asking import ask_and_write
        from novelret.label.judge import Asking, make_judge
        from novelret.progress import Reporter

        asking = Asking(store=str(self.store), concurrency=CONCURRENCY, **settings)
        judge, index, split = make_judge("openai:m", asking), self, self  # all that asking looks at is here
        (self.folder / name).mkdir()
        return ask_and_write(
            judge,
            index,
            split,
            self.candidates,
            asking.store_path,
            self.folder / name / "judgements.parquet",
            Reporter(),
            retry_unusable=False,
            send=True,
            caps=asking.caps,
        )


def measure_bare(options: argparse.Namespace) -> None:
    ratios, bare, ours = [], [], []
    with Server(), tempfile.TemporaryDirectory() as folder:
        for n in range(options.rounds):
            (Path(folder) / str(n)).mkdir()
            world = World(Path(folder) / str(n), options.requests)
            begun = time.perf_counter()
            facts = world.label("labels")
            ours.append(options.requests / (time.perf_counter() - begun))
            assert facts["requests"] == options.requests
            bare.append(options.requests / bare_loop(options.requests))
            ratios.append(ours[-1] / bare[-1])
    print(
        f"bare AsyncOpenAI loop {statistics.median(bare):.0f} requests/s, novelret label "
        f"{statistics.median(ours):.0f}: {statistics.median(ratios):.2f} of it "
        f"(rounds {', '.join(f'{r:.2f}' for r in ratios)})"
    )


def measure_allowance(options: argparse.Namespace) -> None:
    requests, burst = ALLOWANCE, ALLOWANCE / 60
    for how, tells, settings, gift in (
        ("given with --rpm", False, {"rpm": ALLOWANCE}, 0.0),
        ("told in headers", True, {}, 0.0),
        # Whoever does not pace itself empties the full bucket first: no part of the allowance per minute.
        ("only 429 and Retry-After", False, {}, burst),
    ):
        with Server(rpm=ALLOWANCE, tells=tells), tempfile.TemporaryDirectory() as folder:
            world = World(Path(folder), requests)
            begun = time.perf_counter()
            facts = world.label("labels", **settings)
            took = time.perf_counter() - begun
        print(
            f"limit {how}: {requests} requests in {took:.1f} s, "
            f"{(requests - gift) / (took / 60) / ALLOWANCE:.1%} of the allowance, "
            f"{facts['retries']} refused, {facts['failed']} failed"
        )


def measure_known(options: argparse.Namespace) -> None:
    from novelret.label.judge import Asking, make_judge
    from novelret.label.questions import Feed, Tally
    from novelret.label.store import Store, key_function

    os.environ["OPENAI_API_KEY"] = "k"
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), options.pairs)
        judge = make_judge("openai:m", Asking())
        feed = Feed(world, world, world.candidates, judge.render, key_function(judge.name, judge.parameters))
        with closing(Store(world.store)) as store:
            for chunk in feed.chunks():
                store.add(judge.name, [(q.key, "No", 90, 1) for q in chunk])
        begun, cpu = time.perf_counter(), time.process_time()
        with closing(Store(world.store)) as store:
            feed = Feed(
                world, world, world.candidates, judge.render, key_function(judge.name, judge.parameters)
            )
            asked = sum(q is not None for q in feed.unanswered(store, Tally()))
        skipped, cpu = time.perf_counter() - begun, time.process_time() - cpu
        begun = time.perf_counter()
        facts = world.label("labels")
        took = time.perf_counter() - begun
        assert facts["already_known"] == options.pairs
        assert asked == facts["requests"] == 0
    print(
        f"{options.pairs:,} known pairs passed over in {skipped:.1f} s ({cpu:.1f} s of it on the CPU); "
        f"the whole run, LABELS written, {took:.1f} s"
    )


def measure_load(options: argparse.Namespace) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from novelret.label.labels import SCHEMA

    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), 10_000_000)
        path = Path(folder) / "judgements.parquet"
        queries, items = pa.array(world.query_ids), world.catalog.ids.cast(pa.string()).combine_chunks()
        with pq.ParquetWriter(path, SCHEMA) as writer:
            for start in range(0, len(world.candidates), 100_000):
                rows = slice(start, start + 100_000)
                n = len(world.candidates.query_rows[rows])
                columns = {
                    "query_id": queries.take(pa.array(world.candidates.query_rows[rows])),
                    "item_id": items.take(pa.array(world.candidates.item_rows[rows])),
                    "verdict": pa.array(np.arange(n) % 10 == 0).cast(pa.int8()),
                    "answer": pa.array(["No"] * n),
                }
                empty = [None] * n
                arrays = [columns.get(f.name, pa.array(empty, f.type)) for f in SCHEMA]
                writer.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA))
        # In a process that has done nothing else: what the writing took would hide what the reading takes.
        process = multiprocessing.get_context("spawn").Process(target=_load, args=(Path(folder), path))
        process.start()
        process.join()


def _load(folder: Path, path: Path) -> None:
    from novelret.label.labels import read_table

    world = World(folder, 10_000_000)
    del world.candidates
    before = current()
    begun = time.perf_counter()
    table = read_table(path, world.query_ids, world.catalog)
    took = time.perf_counter() - begun
    print(f"{len(table):,} judgements loaded in {took:.1f} s; at most {peak() - before:,.0f} MB meanwhile")


def measure_memory(options: argparse.Namespace) -> None:
    growth = []
    with Server(delay=0.0):
        for pairs in (20_000, options.pairs):
            with tempfile.TemporaryDirectory() as folder:
                world = World(Path(folder), pairs, per_query=1000)
                world.label("warm", max_requests=2_000)
                before = peak()
                world.label("labels", max_requests=20_000)
                growth.append((pairs, peak() - before))
    for pairs, grown in growth:
        print(f"{pairs:,} pairs, 20,000 of them asked: the peak grew by {grown:.0f} MB")


def current() -> float:
    """Resident memory now, MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def peak() -> float:
    """Largest resident memory so far, MB."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / 1e6 if sys.platform == "darwin" else size / 1e3


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "bare": measure_bare,
    "allowance": measure_allowance,
    "known": measure_known,
    "load": measure_load,
    "memory": measure_memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=list(MEASUREMENTS))
    parser.add_argument("--requests", type=int, default=3_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    options = parser.parse_args()
    gc.freeze()  # as the command line does
    for name in [options.only] if options.only else MEASUREMENTS:
        MEASUREMENTS[name](options)


if __name__ == "__main__":
    main()
