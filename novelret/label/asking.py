"""Have candidates judged question by question: what is known is passed over, what comes is stored at once."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import IO, Any

import numpy as np
import pyarrow.parquet as pq

from novelret.artifacts import STATE, Manifest, fingerprint_of, read_json, write_json
from novelret.data.split import Split
from novelret.errors import UserError
from novelret.index import Index
from novelret.label.candidates import Candidates
from novelret.label.cost import Caps, Price
from novelret.label.judge import Judge
from novelret.label.labels import SCHEMA, VERDICTS, judgement_rows
from novelret.label.ledger import Ledger
from novelret.label.questions import Feed, Messages, Reader, Readings, Tally
from novelret.label.store import Answer, Store, key_function, now
from novelret.label.table import UNKNOWN
from novelret.progress import Reporter

_ROWS = 20_000  # judgements written at a time
_EXAMPLES = 3
NOTE = "asking.json"  # what was spent on an output that is not whole yet


@dataclass(frozen=True)
class Plan:
    """What a labelling would ask, before anything is sent.

    Attributes:
        pairs: candidate pairs by source.
        known_by_source: how many of those the store answers already.
        known: questions that the store answers already.
        in_batches: questions that lie in batches under way already, and would not be sent.
        to_ask: questions that would be sent.
        prompt_tokens: of those.
        tokens_are: "counted" by the model's tokeniser, or "estimated" from lengths, an upper figure.
        cost: dollars at most; None where the model's price is not known.
        example: one rendered prompt.
    """

    pairs: dict[str, int]
    known_by_source: dict[str, int]
    known: int
    in_batches: int
    to_ask: int
    prompt_tokens: int
    tokens_are: str
    cost: float | None
    example: Messages


def plan_asking(
    judge: Judge,
    index: Index,
    split: Split,
    candidates: Candidates,
    store_path: Path,
    report: Reporter,
    *,
    retry_unusable: bool,
) -> Plan:
    """Count what would be asked; sends nothing."""
    tally, in_batches = Tally(retrying_since=now()), 0
    # Equal questions are asked once: by the first bytes of their keys, of which millions fit in memory.
    keys, tokens = array("Q"), array("L")
    example: Messages = []
    with closing(Store(store_path)) as store, report.bar("planning", len(candidates)) as advance:
        feed = Feed(index, split, candidates, judge.render, key_function(judge.name, judge.parameters))
        again = judge.read if retry_unusable else None
        ledger = Ledger(store, judge.name)
        is_under_way = bool(ledger.open())
        for question in feed.unanswered(store, tally, advance, again):
            if question is not None:
                advance(1)
                example = example or question.messages
                if is_under_way and ledger.under_way([question.key]):
                    in_batches += 1
                    continue
                keys.append(int.from_bytes(question.key[:8], "little"))
                tokens.append(judge.tokens.count(question.messages))
        if not example:
            example = next(feed.chunks())[0].messages if len(feed) else []
    known = {name: int(n) for name, n in zip(candidates.sources, feed.known, strict=True)}
    _, first = np.unique(np.array(keys, dtype=np.uint64), return_index=True)
    to_ask, prompt_tokens = len(first), int(np.array(tokens, dtype=np.int64)[first].sum())
    return Plan(
        pairs=candidates.counts(),
        known_by_source=known,
        known=sum(known.values()),
        in_batches=in_batches,
        to_ask=to_ask,
        prompt_tokens=prompt_tokens,
        tokens_are="counted" if judge.tokens.exact else "estimated",
        cost=judge.price.of(prompt_tokens, to_ask * judge.longest) if judge.price else None,
        example=example,
    )


def ask_and_write(
    judge: Judge,
    index: Index,
    split: Split,
    candidates: Candidates,
    store_path: Path,
    out: Path,
    report: Reporter,
    *,
    retry_unusable: bool,
    send: bool,
    caps: Caps,
    may_be_empty: bool = False,
    earlier: Manifest | None = None,
    halt: Event | None = None,
    readings: Readings | None = None,
) -> dict[str, Any]:
    """Have the candidates judged and write judgements.parquet, with failures.jsonl beside it.

    The note of what was spent stays there too, until the caller has written that down for good.

    Args:
        judge: who is asked.
        index: for the items' texts.
        split: for the queries' texts.
        candidates: the pairs.
        store_path: the judgement store.
        out: the file to write.
        report: where to say how it goes.
        retry_unusable: ask again where the stored answer cannot be read.
        send: False to use stored answers alone.
        caps: how far to go.
        may_be_empty: whether it is fine that all questions fail.
        earlier: LABELS that this goes on from; the caps count what they cost, and what was spent on `out`
            by runs that were killed or left (its folder's asking.json).
        halt: set from another thread to have the asking end soon.
        readings: of the askings that this one follows, which it adds to.

    Returns:
        Counts and cost, as they go into the manifest.

    Raises:
        UserError: not one question is answered, as all failed, or a cap or what else stopped the asking came
            first.
    """
    before = spent_on(earlier, judge.price)
    note = out.with_name(NOTE)
    noted = read_json(note) if note.is_file() else {}
    spent = _sum(before, noted)
    since = noted or (earlier.facts if earlier is not None else {})
    readings = readings or Readings()
    tally = Tally(
        earlier_requests=spent["requests"],
        earlier_cost=spent["cost"],
        caps=caps,
        run=_run_of(out.parent),
        halt=halt or Event(),
        readings=readings,
        # A run that goes on from another does not ask again what that one has asked again.
        retrying_since=(since.get("retrying_since") or now()) if retry_unusable else "",
    )
    with closing(Store(store_path)) as store:
        feed = Feed(
            index, split, candidates, judge.render, key_function(judge.name, judge.parameters), out.parent
        )

        def status() -> str:
            cost = f"${tally.cost:.2f} " if judge.price and judge.price.of(1, 1) else ""
            useless = f"{readings.unusable} unusable, " if readings.unusable else ""
            return f"{cost}{useless}{tally.retries} retries, {len(tally.failed)} failed {tally.note}"

        if send:
            again = judge.read if retry_unusable else None
            with (
                report.bar(f"asking {judge.name}", len(feed), status) as show,
                _noting(note, tally, before),
            ):
                unanswered = partial(feed.unanswered, store, tally, show, again)
                judge.ask(unanswered, store, tally, show, report.note)
        counts, examples, queries_judged = _write(judge, index, split, feed, store, tally, out)
    judged = sum(counts.values())
    if tally.failed and not judged and not may_be_empty:
        reason = next(iter(tally.failed.values()))
        raise UserError(
            f"{judge.name}: not one of {len(tally.failed):,} questions got an answer (for instance: "
            f"{reason}); see to that, and to OPENAI_BASE_URL, and run the same command again"
        )
    if tally.stopped and tally.stopped != readings.hopeless and not judged and not may_be_empty:
        fault = f" (the last fault: {tally.fault})" if tally.fault else ""
        raise UserError(f"{judge.name}: nothing is judged, {tally.stopped}{fault}")
    usable = judged - counts[VERDICTS[UNKNOWN]]
    if readings.hopeless and not usable and not may_be_empty:
        raise UserError(
            f"{judge.name}: {readings.hopeless}; another --prompt or --answer may fit (the answers are "
            "kept, and another --answer reads them anew)"
        )
    known = {name: int(n) for name, n in zip(candidates.sources, feed.known, strict=True)}
    facts = {
        "verdicts": counts,
        "sources": candidates.counts(),
        "known_by_source": known,
        "pairs": judged,
        "queries": _queries(split, candidates),
        "queries_judged": queries_judged,
        "already_known": sum(known.values()),
        "requests": tally.requests,
        "retries": tally.retries,
        "failed": len(tally.failed),
        "failure_example": next(iter(tally.failed.values()), None),
        "prompt_tokens": tally.prompt_tokens,
        "completion_tokens": tally.completion_tokens,
        "cost": round(tally.cost, 6) if judge.price else None,
        "earlier": spent,
        "stopped": tally.stopped,
        "retrying_since": tally.retrying_since,
        "unusable_examples": examples,
    }
    _report(report, tally, facts, len(candidates) - judged, send=send)
    return facts


def gave_up(facts: dict[str, Any] | None) -> bool:
    """Whether an asking ended before all was asked, and not at a cap of the user's, by its facts."""
    stopped = str((facts or {}).get("stopped") or "")
    return stopped != "" and not stopped.startswith("--")


def say_failed(facts: dict[str, Any]) -> str:
    """How many questions failed, and why one of them did, from the facts of `ask_and_write`."""
    return f"{facts['failed']} questions got no answer (for instance: {facts['failure_example']})"


def spent_on(labels: Manifest | None, price: Price | None = None) -> dict[str, Any]:
    """Requests and dollars that LABELS, and those that they went on from, have cost.

    What was asked while no price was known is counted at this one.
    """
    facts = dict(labels.facts) if labels is not None else {}
    if facts.get("cost") is None and price is not None:
        facts["cost"] = price.of(facts.get("prompt_tokens", 0), facts.get("completion_tokens", 0))
    return _sum(facts, facts.get("earlier") or {})


def _run_of(folder: Path) -> str:
    """Identity of an unfinished output: where it is made, and what of."""
    state = read_json(folder / STATE) if (folder / STATE).is_file() else {}
    return fingerprint_of(str(folder.resolve()), state.get("identity"))


def _sum(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Requests and dollars of two counts of them."""
    return {
        "requests": one.get("requests", 0) + other.get("requests", 0),
        "cost": round((one.get("cost") or 0.0) + (other.get("cost") or 0.0), 6),
    }


@contextmanager
def _noting(path: Path, tally: Tally, counted: dict[str, Any]) -> Iterator[None]:
    """Write down what is spent, before it is: a run that is killed goes on from there, and its caps hold.

    Args:
        path: the note; it holds what was spent on top of `counted`, what is under way at its worst, and
            since when answers are asked for again.
        tally: of this run; its `save` writes the note.
        counted: requests and dollars that the next run will know of anyway.
    """
    before = {"requests": tally.earlier_requests, "cost": tally.earlier_cost}

    def note() -> None:
        worst = {"requests": tally.requests + tally.in_flight, "cost": tally.cost + tally.in_flight_cost}
        uncounted = {name: value - counted[name] for name, value in _sum(before, worst).items()}
        with suppress(OSError):  # a full disk, which stops the asking when the answers are to be stored
            write_json(path, {**uncounted, "retrying_since": tally.retrying_since})

    tally.save = note
    try:
        yield
    finally:
        note()


def _write(
    judge: Judge, index: Index, split: Split, feed: Feed, store: Store, tally: Tally, out: Path
) -> tuple[dict[str, int], list[str], int]:
    """Write what is answered and what failed.

    Returns:
        Verdict counts, examples of unusable answers, and how many queries have an answer.
    """
    counts = dict.fromkeys(VERDICTS.values(), 0)
    examples: dict[str, None] = {}
    candidates, start = feed.candidates, 0
    covered = np.zeros(len(split), dtype=bool)
    with (
        pq.ParquetWriter(out, SCHEMA) as writer,
        out.with_name("failures.jsonl").open("w", encoding="utf-8") as failures,
    ):
        for keys in feed.keys(store, _ROWS):
            stored = store.find(set(keys))
            rows = [n for n, key in enumerate(keys) if key in stored]
            answers = [stored[keys[n]] for n in rows]
            columns = _columns(judge.read, judge.price, answers)
            for answer, verdict in zip(answers, columns["verdict"], strict=True):
                counts[VERDICTS[verdict]] += 1
                if verdict == UNKNOWN and len(examples) < _EXAMPLES:
                    examples[answer.text] = None
            absolute = np.array(rows, dtype=np.int64) + start
            covered[candidates.query_rows[absolute]] = True
            writer.write_table(judgement_rows(index, split, candidates, absolute, columns))
            if tally.failed:
                _write_failures(failures, index, split, candidates, keys, start, tally)
            start += len(keys)
    return counts, list(examples), int(covered.sum())


def _queries(split: Split, candidates: Candidates) -> int:
    """How many queries have candidates."""
    asked_about = np.zeros(len(split), dtype=bool)
    asked_about[candidates.query_rows] = True
    return int(asked_about.sum())


def _columns(read: Reader, price: Price | None, answers: list[Answer]) -> dict[str, list[Any]]:
    parsed = [read(answer.text) for answer in answers]
    return {
        "verdict": [verdict for verdict, _ in parsed],
        "grade": [grade for _, grade in parsed],
        "answer": [answer.text for answer in answers],
        "prompt_tokens": [answer.prompt_tokens for answer in answers],
        "completion_tokens": [answer.completion_tokens for answer in answers],
        "cost": [
            price.of(a.prompt_tokens or 0, a.completion_tokens or 0) if price else None for a in answers
        ],
        "time": [answer.time for answer in answers],
    }


def _write_failures(
    file: IO[str],
    index: Index,
    split: Split,
    candidates: Candidates,
    keys: list[bytes],
    start: int,
    tally: Tally,
) -> None:
    for number, key in enumerate(keys):
        if key in tally.failed:
            row = start + number
            record = {
                "query_id": split.query_ids[int(candidates.query_rows[row])],
                "item_id": index.catalog.ids_at([int(candidates.item_rows[row])])[0],
                "reason": tally.failed[key],
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _report(report: Reporter, tally: Tally, facts: dict[str, Any], without: int, *, send: bool) -> None:
    given = ", ".join(
        f"{facts['known_by_source'][source]:,} of {n:,} from {source}"
        for source, n in facts["sources"].items()
    )
    report.note(f"already judged: {given}")
    if not send:
        report.note(f"read again: {facts['pairs']:,} stored answers; {without:,} pairs have none")
    elif tally.requests or tally.retries:
        report.note(
            f"{tally.requests:,} requests, {tally.prompt_tokens + tally.completion_tokens:,} tokens, "
            f"{'cost unknown' if facts['cost'] is None else f'${tally.cost:.4f}'}; {tally.retries} retries"
        )
    if tally.stopped:
        with_more = f" with a higher {tally.stopped.split()[0]}" if tally.stopped.startswith("--") else ""
        report.warn(
            f"stopped: {tally.stopped}; {without:,} pairs are not judged, {facts['queries_judged']:,} of "
            f"{facts['queries']:,} queries have some that are. Run again{with_more} to go on"
        )
    if tally.failed:
        how = (
            "The same command asks these again, too"
            if tally.stopped
            else "Run again with --force to ask these alone"
        )
        report.warn(f"{say_failed(facts)}; they are listed in failures.jsonl. {how}")
    if facts["verdicts"]["unusable"]:
        shown = ", ".join(
            repr(text[:120]) if text else "no text at all" for text in facts["unusable_examples"]
        )
        report.warn(
            f"{facts['verdicts']['unusable']} answers are not usable, for instance {shown}; another "
            "--answer reads them in another way for free, --force --retry-unusable asks them again alone"
        )
