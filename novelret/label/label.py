"""`novelret label`: have candidate pairs judged and write the LABELS artifact."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from novelret.artifacts import (
    Manifest,
    check_output,
    fingerprint_file,
    fingerprint_of,
    open_output,
    write_config,
    write_manifest,
)
from novelret.data.split import Split, load_split
from novelret.errors import UserError
from novelret.index import Index, open_index
from novelret.label.candidates import Candidates, gather_candidates
from novelret.label.cost import Price, estimate_tokens, find_price
from novelret.label.judges.file import file_table
from novelret.label.judges.openai import Limits, Question, Tally, ask_all, check_key, parameters_for
from novelret.label.labels import SCHEMA
from novelret.label.parse import parse
from novelret.label.prompts import Prompt, load_prompt, render
from novelret.label.store import Answer, Store, default_store, key_of
from novelret.label.table import IRRELEVANT, RELEVANT, UNKNOWN
from novelret.progress import Reporter

_CHUNK = 10_000
_VERDICTS = {RELEVANT: "relevant", IRRELEVANT: "not relevant", UNKNOWN: "unusable"}


@dataclass(frozen=True)
class LabelConfig:
    """Settings of `novelret label`.

    Attributes:
        data: BEIR folder or Hugging Face data set.
        index: INDEX folder.
        judge: "file:PATH" or "openai:MODEL".
        split: whose queries are labelled.
        sources: where candidates come from, see `candidates`.
        base_depth: L, the deployed list's length.
        depth: deepest base rank of "base-novel".
        per_query: at most so many pairs of each source for a query, chosen at random.
        missing: what a pair means that a file does not list: "unknown" or "irrelevant".
        prompt: name or file of the prompt.
        store: the judgement store; by default one per user.
        concurrency: requests under way at once.
        timeout: seconds for one request.
        max_requests: stop before more requests than this.
        max_cost: stop before this many dollars could be exceeded.
        price: "INPUT,OUTPUT" in dollars per million tokens, over the built-in table.
        seed: decides which pairs are sampled.
        device: for searches that no cache holds yet.
        ignore_identical_ids: leave the item whose id is the query's own out.
    """

    data: str
    index: str
    judge: str
    split: str = "train"
    sources: tuple[str, ...] = ("base-novel",)
    base_depth: int = 50
    depth: int = 200
    per_query: int | None = None
    missing: str = "unknown"
    prompt: str = "query-document"
    store: str | None = None
    concurrency: int = 32
    timeout: float = 60.0
    max_requests: int | None = None
    max_cost: float | None = None
    price: str | None = None
    seed: int = 0
    device: str = "auto"
    ignore_identical_ids: bool = True


@dataclass(frozen=True)
class Plan:
    """What a labelling would ask, before anything is sent.

    Attributes:
        pairs: candidate pairs by source.
        known: questions that the store answers already.
        to_ask: questions that would be sent.
        prompt_tokens: estimated from lengths, an upper figure.
        cost: dollars at most; None where the model's price is not known.
        example: one rendered prompt.
    """

    pairs: dict[str, int]
    known: int
    to_ask: int
    prompt_tokens: int
    cost: float | None
    example: list[dict[str, str]]


def build_labels(
    config: LabelConfig, out: Path, *, force: bool = False, report: Reporter | None = None
) -> Manifest:
    """Have the candidates judged and write LABELS; answers go to the store as they come.

    Raises:
        UserError: bad settings or data, a refused key or model, an existing output.
        KeyboardInterrupt: Ctrl-C; every answer so far is in the store.
    """
    report = report or Reporter()
    check_output(out, force=force)
    kind, name = split_judge(config.judge)
    if kind == "openai":
        check_key()
    prompt = load_prompt(config.prompt) if kind == "openai" else None
    index, split, candidates = _prepare(config, report)
    inputs = {"index": index.manifest.fingerprint, "split": split.fingerprint}
    inputs |= {"prompt": prompt.fingerprint} if prompt else {"judgements": fingerprint_file(Path(name))}
    identity = fingerprint_of(asdict(config), inputs)
    with open_output(out, identity, force=force) as folder:
        path = folder / "judgements.parquet"
        facts = judge_candidates(config, index, split, candidates, path, report)
        write_config(folder, config)
        fingerprint = fingerprint_file(path)
        manifest = Manifest("labels", asdict(config), inputs, fingerprint, facts)
        write_manifest(folder, manifest)
    if facts["verdicts"].get("relevant", 0) == 0:
        report.warn("no pair was judged relevant: training on these labels will find no reward")
    return manifest


def judge_candidates(
    config: LabelConfig, index: Index, split: Split, candidates: Candidates, out: Path, report: Reporter
) -> dict[str, Any]:
    """Have given pairs judged and write them as judgements.parquet; returns the counts and the cost."""
    kind, name = split_judge(config.judge)
    if kind == "file":
        return _label_from_file(config, Path(name), index, split, candidates, out, report)
    prompt = load_prompt(config.prompt)
    return _label_by_asking(config, name, prompt, index, split, candidates, out, report)


def plan(config: LabelConfig, *, report: Reporter | None = None) -> Plan:
    """What `build_labels` would ask of an LLM, and what it would cost at most; sends nothing."""
    report = report or Reporter()
    check_plan(config.judge)
    load_prompt(config.prompt)
    index, split, candidates = _prepare(config, report)
    return plan_candidates(config, index, split, candidates, report)


def check_plan(judge: str) -> None:
    """Refuse to plan what costs nothing.

    Raises:
        UserError: the judge is none that is paid.
    """
    if split_judge(judge)[0] != "openai":
        raise UserError(f"--plan is for judges that cost money, not for {judge}")


def plan_candidates(
    config: LabelConfig, index: Index, split: Split, candidates: Candidates, report: Reporter
) -> Plan:
    """What having given pairs judged would ask, and cost at most; sends nothing."""
    prompt, model = load_prompt(config.prompt), split_judge(config.judge)[1]
    price = find_price(model, config.price)
    parameters = parameters_for(model, prompt.max_tokens)
    store = Store(_store_path(config))
    known = to_ask = tokens = 0
    example: list[dict[str, str]] = []
    seen: set[bytes] = set()
    with report.bar("planning", len(candidates)) as advance:
        for chunk in _chunks(config, prompt, parameters, index, split, candidates):
            questions = {q.key: q for q in chunk if q.key not in seen}
            seen |= questions.keys()
            stored = store.find(questions)
            missing = [q for key, q in questions.items() if key not in stored]
            known += len(stored)
            to_ask += len(missing)
            tokens += sum(estimate_tokens(q.messages) for q in missing)
            example = example or chunk[0].messages
            advance(len(chunk))
    store.close()
    cost = price.of(tokens, to_ask * prompt.max_tokens) if price else None
    return Plan(candidates.counts(), known, to_ask, tokens, cost, example)


def split_judge(judge: str) -> tuple[str, str]:
    """("file", path) or ("openai", model).

    Raises:
        UserError: neither.
    """
    kind, separator, name = judge.partition(":")
    if kind not in ("file", "openai") or not separator or not name:
        raise UserError(f"--judge {judge}: unknown; use file:PATH.tsv or openai:MODEL")
    if kind == "file" and not Path(name).is_file():
        raise UserError(f"--judge {judge}: {name}: no such file")
    return kind, name


def _prepare(config: LabelConfig, report: Reporter) -> tuple[Index, Split, Candidates]:
    index = open_index(config.index, config.data)
    split = load_split(
        config.data, config.split, index.catalog, ignore_identical_ids=config.ignore_identical_ids
    )
    if config.per_query is not None and config.per_query < 1:
        raise UserError(f"--per-query {config.per_query}: must be at least 1")
    from novelret.encode import pick_device

    candidates = gather_candidates(
        index,
        split,
        config.sources,
        base_depth=config.base_depth,
        depth=config.depth,
        per_query=config.per_query,
        seed=config.seed,
        device=pick_device(config.device),
        report=report,
    )
    given = ", ".join(f"{n:,} from {source}" for source, n in candidates.counts().items())
    report.note(f"candidates: {given}; {len(split):,} queries")
    return index, split, candidates


def _label_from_file(
    config: LabelConfig,
    path: Path,
    index: Index,
    split: Split,
    candidates: Candidates,
    out: Path,
    report: Reporter,
) -> dict[str, Any]:
    table = file_table(path, split.query_ids, index.catalog, config.missing, report)
    verdicts = table.lookup(candidates.query_rows, candidates.item_rows)
    known = np.flatnonzero(verdicts != UNKNOWN)
    with pq.ParquetWriter(out, SCHEMA) as writer:
        for start in range(0, len(known), _CHUNK):
            rows = known[start : start + _CHUNK]
            grades = table.lookup_grades(candidates.query_rows[rows], candidates.item_rows[rows])
            columns = {"verdict": verdicts[rows].tolist(), "grade": grades.tolist()}
            writer.write_table(_table(index, split, candidates, rows, columns))
    return {
        "verdicts": _count(verdicts[known]),
        "sources": candidates.counts(),
        "pairs": len(known),
        "cost": 0.0,
    }


def _label_by_asking(
    config: LabelConfig,
    model: str,
    prompt: Prompt,
    index: Index,
    split: Split,
    candidates: Candidates,
    out: Path,
    report: Reporter,
) -> dict[str, Any]:
    price = find_price(model, config.price)
    if config.max_cost is not None and price is None:
        raise UserError(f"--max-cost: the price of {model} is not known; give it with --price INPUT,OUTPUT")
    parameters = parameters_for(model, prompt.max_tokens)
    limits = Limits(config.concurrency, config.timeout, config.max_requests, config.max_cost, price)
    store, tally = Store(_store_path(config)), Tally()
    counts = {name: 0 for name in _VERDICTS.values()}
    known = done = 0
    unusable: list[str] = []
    with (
        report.bar(f"asking {config.judge}", len(candidates)) as advance,
        pq.ParquetWriter(out, SCHEMA) as writer,
        out.with_name("failures.jsonl").open("w", encoding="utf-8") as failures,
    ):
        for chunk in _chunks(config, prompt, parameters, index, split, candidates):
            unique = {question.key: question for question in chunk}
            stored = store.find(unique)
            known += sum(question.key in stored for question in chunk)
            missing = [question for key, question in unique.items() if key not in stored]
            advance(len(chunk) - len(missing))
            if missing and tally.stopped is None:
                ask_all(iter(missing), model, parameters, store, limits, tally, advance)
                stored |= store.find(question.key for question in missing)
            rows = [n for n, question in enumerate(chunk) if question.key in stored]
            answers = [stored[chunk[n].key] for n in rows]
            columns = _columns(prompt, price, answers)
            _add_counts(counts, columns["verdict"])
            unusable += [a.text for a, v in zip(answers, columns["verdict"], strict=True) if v == UNKNOWN][:3]
            absolute = np.array(rows, dtype=np.int64) + done
            writer.write_table(_table(index, split, candidates, absolute, columns))
            _write_failures(failures, index, split, candidates, chunk, done, tally)
            done += len(chunk)
    store.close()
    judged = sum(counts.values())
    _report_asking(report, tally, known, len(candidates) - judged, counts, unusable, out.parent)
    return {
        "verdicts": counts,
        "sources": candidates.counts(),
        "pairs": judged,
        "already_known": known,
        "requests": tally.requests,
        "retries": tally.retries,
        "failed": len(tally.failed),
        "prompt_tokens": tally.prompt_tokens,
        "completion_tokens": tally.completion_tokens,
        "cost": round(tally.cost, 6) if price else None,
        "stopped": tally.stopped,
    }


def _chunks(
    config: LabelConfig,
    prompt: Prompt,
    parameters: dict[str, Any],
    index: Index,
    split: Split,
    candidates: Candidates,
) -> Iterator[list[Question]]:
    """The candidates' questions, in order, a bounded number at a time."""
    for start in range(0, len(candidates), _CHUNK):
        rows = slice(start, start + _CHUNK)
        items = index.catalog.texts_at(candidates.item_rows[rows])
        queries = (split.query_texts[row] for row in candidates.query_rows[rows])
        questions = []
        for query, item in zip(queries, items, strict=True):
            messages = render(prompt, query, item)
            questions.append(Question(key_of(config.judge, messages, parameters), messages))
        yield questions


def _columns(prompt: Prompt, price: Price | None, answers: list[Answer]) -> dict[str, list[Any]]:
    parsed = [parse(prompt, answer.text) for answer in answers]
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


def _table(
    index: Index, split: Split, candidates: Candidates, rows: np.ndarray, columns: dict[str, list[Any]]
) -> pa.Table:
    sources = np.array(candidates.sources, dtype=object)[candidates.source_numbers[rows]]
    filled = {
        "query_id": [split.query_ids[row] for row in candidates.query_rows[rows]],
        "item_id": index.catalog.ids_at(candidates.item_rows[rows]),
        "source": sources.tolist(),
    } | columns
    return pa.table(
        {f.name: pa.array(filled.get(f.name, [None] * len(rows)), f.type) for f in SCHEMA}, schema=SCHEMA
    )


def _write_failures(
    file: Any,
    index: Index,
    split: Split,
    candidates: Candidates,
    chunk: list[Question],
    start: int,
    tally: Tally,
) -> None:
    for number, question in enumerate(chunk):
        if question.key in tally.failed:
            row = start + number
            record = {
                "query_id": split.query_ids[int(candidates.query_rows[row])],
                "item_id": index.catalog.ids_at([int(candidates.item_rows[row])])[0],
                "reason": tally.failed[question.key],
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _report_asking(
    report: Reporter,
    tally: Tally,
    known: int,
    without: int,
    counts: dict[str, int],
    unusable: list[str],
    folder: Path,
) -> None:
    report.note(
        f"{tally.requests:,} requests, {tally.prompt_tokens + tally.completion_tokens:,} tokens, "
        f"${tally.cost:.4f}; {known:,} answers were known already; {tally.retries} retries"
    )
    if tally.stopped:
        report.warn(f"stopped: {tally.stopped}; {without:,} pairs are not judged. Run again to go on")
    if tally.failed:
        reason = next(iter(tally.failed.values()))
        report.warn(
            f"{len(tally.failed)} questions got no answer (for instance: {reason}); they are listed in "
            "failures.jsonl. Run again with --force to ask these alone"
        )
    if counts["unusable"]:
        report.warn(f"{counts['unusable']} answers are not usable, for instance {unusable[0][:120]!r}")


def _store_path(config: LabelConfig) -> Path:
    return Path(config.store) if config.store else default_store()


def _count(verdicts: np.ndarray) -> dict[str, int]:
    return {name: int((verdicts == value).sum()) for value, name in _VERDICTS.items()}


def _add_counts(counts: dict[str, int], verdicts: list[int]) -> None:
    for verdict in verdicts:
        counts[_VERDICTS[verdict]] += 1
