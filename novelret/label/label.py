"""`novelret label`: have candidate pairs judged and write the LABELS artifact."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from novelret.artifacts import (
    Manifest,
    check_output,
    fingerprint_file,
    fingerprint_of,
    open_output,
    put_aside,
    read_manifest,
    write_config,
    write_manifest,
)
from novelret.data.split import Split, load_split
from novelret.errors import UserError
from novelret.index import Index, open_index
from novelret.label.asking import NOTE, Plan, ask_and_write, plan_asking, spent_on
from novelret.label.candidates import Candidates, gather_candidates
from novelret.label.judge import Asking, Judge, check_asking, make_judge, same_judge, split_judge
from novelret.label.judges.file import file_table
from novelret.label.labels import SCHEMA, VERDICTS, judgement_rows, write_queries
from novelret.label.table import RELEVANT, UNKNOWN
from novelret.progress import Reporter

if TYPE_CHECKING:
    from novelret.evaluate.config import EvalConfig

_ROWS = 100_000  # judgements written at a time
_HOW = (
    "concurrency", "timeout", "rpm", "tpm", "wait", "max_requests", "max_cost", "price", "device",
    "retry_unusable",
)  # fmt: skip
"""Settings that decide how, how far and how often questions are asked, not which."""


@dataclass(frozen=True)
class LabelConfig(Asking):
    """Settings of `novelret label`, beside those of `Asking`.

    Attributes:
        data: BEIR folder or Hugging Face data set.
        index: INDEX folder.
        judge: "file:PATH", "openai:MODEL", "openai-batch:MODEL" or "cross-encoder:MODEL".
        split: whose queries are labelled.
        sources: where candidates come from, see `candidates`.
        base_depth: L, the deployed list's length.
        depth: deepest base rank of "base-novel".
        per_query: at most so many pairs of each source for a query, chosen at random.
        reparse: read stored answers alone; nothing is asked.
        retry_unusable: ask again where the stored answer cannot be read.
        wait: stay until batches are answered; otherwise leave once they are submitted.
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
    reparse: bool = False
    retry_unusable: bool = False
    wait: bool = True
    seed: int = 0
    device: str = "auto"
    ignore_identical_ids: bool = True


def build_labels(
    config: LabelConfig, out: Path, *, force: bool = False, report: Reporter | None = None
) -> Manifest:
    """Have the candidates judged and write LABELS; answers go to the store as they come.

    LABELS that stopped early, at a cap that was raised since, are resumed and replaced.

    Raises:
        UserError: bad settings or data, a refused key or model, an existing output.
        BatchesUnderWay: `wait` is off and batches are not answered yet; call again to collect them.
        KeyboardInterrupt: Ctrl-C; every answer so far is in the store.
    """
    report = report or Reporter()
    _check(config)
    earlier = None if force else stopped_early(config, out, "labels")
    read = (config.index, config.judge, *config.sources)
    check_output(out, force=force or earlier is not None, kind="labels", inputs=read)
    is_file = split_judge(config.judge)[0] == "file"
    judge = None if is_file else _make_judge(config, sends=not config.reparse)
    asked = _asked(config, judge)
    index, split, candidates = _prepare(config, report)
    _warn_of_same_answers(config, asked, report)
    inputs = asked | {"index": index.manifest.fingerprint, "split": split.fingerprint} | _confirmed(config)
    # A cap that is raised after a kill leaves what the killed run noted where it is.
    identity = fingerprint_of(what_is_asked(asdict(config)), inputs)
    if earlier is not None and earlier.inputs != inputs:
        check_output(out, force=False)
    if earlier is not None:
        report.note(f"{out}: goes on from {earlier.facts['pairs']:,} judged pairs")
    with open_output(out, identity, force=force or earlier is not None) as folder:
        if earlier is not None:
            check_unchanged(config, out, earlier)
        path = folder / "judgements.parquet"
        if judge is None:
            facts = _label_from_file(config, index, split, candidates, path, report)
        else:
            facts = ask_and_write(
                judge,
                index,
                split,
                candidates,
                config.store_path,
                path,
                report,
                retry_unusable=config.retry_unusable,
                send=not config.reparse,
                caps=config.caps,
                earlier=earlier,
            )
        _check_no_loss(config, out, earlier, facts)
        write_config(folder, config)
        write_queries(folder, split)
        fingerprint = fingerprint_file(path)
        manifest = Manifest("labels", asdict(config), inputs, fingerprint, facts)
        write_manifest(folder, manifest)
    (out / NOTE).unlink(missing_ok=True)  # until here a kill leaves it, and the caps hold
    if facts["verdicts"].get("relevant", 0) == 0:
        report.warn("no pair was judged relevant: training on these labels will find no reward")
    return manifest


def stopped_early(config: LabelConfig | EvalConfig, out: Path, kind: str) -> Manifest | None:
    """The manifest of LABELS or of a REPORT that asked the same and stopped early, to be resumed.

    Its facts are what came of the asking.

    Raises:
        UserError: what stopped them would do so again at once.
    """
    try:
        # A kill may have left them aside, in the moment in which others take their place.
        before = read_manifest(out if out.exists() else put_aside(out), kind)
    except (UserError, OSError):  # nothing there, or nothing to go on from
        return None
    if kind == "report":
        before = replace(before, facts=before.facts.get("asked") or {})
    stopped = before.facts.get("stopped")
    if not stopped or what_is_asked(before.config) != what_is_asked(asdict(config)):
        return None
    for name in ("max_requests", "max_cost"):
        cap, now, option = before.config.get(name), getattr(config, name), f"--{name.replace('_', '-')}"
        if stopped.startswith(f"{option} ") and cap is not None and now is not None and now <= cap:
            spent = spent_on(before)
            raise UserError(
                f"{out}: {option} {cap} is reached already, with {spent['requests']:,} requests at "
                f"${spent['cost']:.4f}; give a higher one to go on"
            )
    return before


def check_unchanged(config: LabelConfig | EvalConfig, out: Path, earlier: Manifest) -> None:
    """Refuse to go on from what another process has gone on from, and spent on, before `out` was locked.

    Raises:
        UserError: the output has changed since.
    """
    if stopped_early(config, out, earlier.kind) != earlier:
        raise UserError(f"{out}: another process has gone on from it meanwhile; run the same command again")


def what_is_asked(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what is asked, as JSON holds them."""
    kept = {name: value for name, value in config.items() if name not in _HOW}
    plain: dict[str, Any] = json.loads(json.dumps(kept))
    return plain


def _check_no_loss(config: LabelConfig, out: Path, earlier: Manifest | None, facts: dict[str, Any]) -> None:
    """Keep LABELS that hold more than what would replace them: the store has lost answers since."""
    if earlier is not None and facts["pairs"] < earlier.facts["pairs"]:
        raise UserError(
            f"{out}: holds {earlier.facts['pairs']:,} judged pairs, not all of which {config.store_path} "
            "knows any more; it is left as it is: give another --out, or --force to replace it"
        )


def plan(config: LabelConfig, *, report: Reporter | None = None) -> Plan:
    """What `build_labels` would ask, and what it would cost at most; sends nothing.

    Raises:
        UserError: bad settings or data, or a judge that is a file.
    """
    report = report or Reporter()
    _check(config)
    check_plan(config.judge)
    judge = _make_judge(config, sends=False)  # a bad prompt or price is said before anything is searched
    index, split, candidates = _prepare(config, report)
    _warn_of_same_answers(config, _asked(config, judge), report)
    return plan_asking(
        judge, index, split, candidates, config.store_path, report, retry_unusable=config.retry_unusable
    )


def check_plan(judge: str) -> None:
    """Refuse to plan what costs nothing.

    Raises:
        UserError: the judge is a file.
    """
    if split_judge(judge)[0] == "file":
        raise UserError(f"--plan is for judges that are asked, not for {judge}")


def _make_judge(config: LabelConfig, *, sends: bool) -> Judge:
    return make_judge(config.judge, config, device=config.device, wait=config.wait, sends=sends)


def _prepare(config: LabelConfig, report: Reporter) -> tuple[Index, Split, Candidates]:
    index = open_index(config.index, config.data)
    split = load_split(
        config.data, config.split, index.catalog, ignore_identical_ids=config.ignore_identical_ids
    )
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


def _asked(config: LabelConfig, judge: Judge | None) -> dict[str, str]:
    """What decides the judge's answers beside its name, as it goes into the manifest; None is a file."""
    kind, name = split_judge(config.judge)
    if judge is None:
        return {"judgements": fingerprint_file(Path(name))}
    return {"prompt" if kind.startswith("openai") else "model": judge.fingerprint}


def _confirmed(config: LabelConfig) -> dict[str, str]:
    """Each yes:LABELS source → its fingerprint."""
    return {
        source: read_manifest(Path(source.removeprefix("yes:")), "labels").fingerprint
        for source in config.sources
        if source.startswith("yes:")
    }


def _warn_of_same_answers(config: LabelConfig, asked: dict[str, str], report: Reporter) -> None:
    """Say so where a yes would be held against itself: same judge, same question, read the same way."""
    for source in _confirmed(config):
        before = read_manifest(Path(source.removeprefix("yes:")), "labels")
        same = all(before.inputs.get(name) == value for name, value in asked.items())
        same = same and all(
            before.config.get(name) == getattr(config, name) for name in ("answer", "threshold")
        )
        # Files and weights are the same by what they hold, wherever they lie.
        if same and ("prompt" not in asked or same_judge(before.config["judge"], config.judge)):
            report.warn(
                f"--from {source}: {config.judge} has been asked these very questions before; the same "
                "answers come again, at no cost, and nothing is learned: pass another --judge or --prompt"
            )


def _label_from_file(
    config: LabelConfig,
    index: Index,
    split: Split,
    candidates: Candidates,
    out: Path,
    report: Reporter,
) -> dict[str, Any]:
    path = Path(split_judge(config.judge)[1])
    table = file_table(
        path, split.query_ids, index.catalog, config.missing, report, threshold=config.threshold
    )
    verdicts = table.lookup(candidates.query_rows, candidates.item_rows)
    if table.missing == UNKNOWN and (table.verdicts == RELEVANT).all():
        report.warn(
            f"{path}: calls no pair irrelevant, so all that it does not list stays unknown; where it lists "
            "everything relevant, say so by --missing irrelevant"
        )
    known = np.flatnonzero(verdicts != UNKNOWN)
    with pq.ParquetWriter(out, SCHEMA) as writer:
        for start in range(0, len(known), _ROWS):
            rows = known[start : start + _ROWS]
            grades = table.lookup_grades(candidates.query_rows[rows], candidates.item_rows[rows])
            columns = {"verdict": pa.array(verdicts[rows]), "grade": pa.array(grades)}
            writer.write_table(judgement_rows(index, split, candidates, rows, columns))
    return {
        "verdicts": _count(verdicts[known]),
        "sources": candidates.counts(),
        "pairs": len(known),
        "cost": 0.0,
    }


def _check(config: LabelConfig) -> None:
    """Refuse settings that make no sense, before any work is done."""
    check_asking(config)
    for name, value in {"per-query": config.per_query, "base-depth": config.base_depth}.items():
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    if config.seed < 0:
        raise UserError(f"--seed {config.seed}: must be at least 0")
    if config.reparse and config.retry_unusable:
        raise UserError("--reparse asks nothing, --retry-unusable asks again: pass one of them")


def _count(verdicts: np.ndarray) -> dict[str, int]:
    return {name: int((verdicts == value).sum()) for value, name in VERDICTS.items()}
