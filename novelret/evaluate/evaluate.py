"""`novelret eval`: compare query encoders with the deployed one over an unchanged index.

REPORT/
  metrics.json         the figures
  significance.json    intervals and paired tests
  per_query.parquet    one row per (model, query)
  runs/NAME.trec       the lists
  judgements.parquet   what the judge said of them, where an LLM was asked
  report.html          all of it to read
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from novelret import encode
from novelret.artifacts import (
    Manifest,
    check_output,
    fingerprint_file,
    fingerprint_of,
    open_output,
    read_manifest,
    write_config,
    write_json,
    write_manifest,
)
from novelret.data.split import Split, load_split
from novelret.errors import UserError
from novelret.evaluate import metrics
from novelret.evaluate.significance import bootstrap_intervals, holm, randomization_tests
from novelret.evaluate.trec import read_run, write_run
from novelret.index import Index, base_lists, embed_queries, load_finetuned, open_index
from novelret.label.candidates import Candidates
from novelret.label.judge import split_judge
from novelret.label.judges.file import file_table
from novelret.label.label import LabelConfig, judge_candidates
from novelret.label.labels import read_table
from novelret.label.table import LabelTable, make_table
from novelret.progress import Reporter

BASE = "base"


@dataclass(frozen=True)
class EvalConfig:
    """Settings of `novelret eval`.

    Attributes:
        data: BEIR folder or Hugging Face data set.
        index: INDEX folder.
        models: "NAME=MODEL" for each query encoder to compare.
        runs: "NAME=FILE" for each TREC run of any other retriever.
        split: the held-out feedback.
        judge: "file:PATH" or "openai:MODEL" for precision and relevance; better another than the labels'.
        missing: what a pair means that a judgement file does not list: "unknown" or "irrelevant".
        prompt: name or file of the prompt.
        store: the judgement store.
        max_requests: stop asking before more requests than this.
        max_cost: stop asking before this many dollars could be exceeded.
        price: "INPUT,OUTPUT" in dollars per million tokens.
        base_depth: L, the deployed list's length: items beyond it are novel.
        k: cuts of the lists.
        device: "auto", "cpu" or a CUDA device.
        ignore_identical_ids: leave the item whose id is the query's own out.
    """

    data: str
    index: str
    models: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    split: str = "test"
    judge: str | None = None
    missing: str = "unknown"
    prompt: str = "query-document"
    store: str | None = None
    max_requests: int | None = None
    max_cost: float | None = None
    price: str | None = None
    base_depth: int = 50
    k: tuple[int, ...] = (10, 20, 50)
    device: str = "auto"
    ignore_identical_ids: bool = True


@dataclass(frozen=True)
class Lists:
    """A model's lists for every query of the split.

    Attributes:
        rows: (Q, K) catalog rows, −1 padded.
        scores: (Q, K) scores rounded to six decimals; None for a run that was read.
        verdicts: (Q, K) int8.
    """

    rows: np.ndarray
    scores: np.ndarray | None
    verdicts: np.ndarray


@dataclass(frozen=True)
class Evaluation:
    """Everything the report is written from.

    Attributes:
        config: the settings.
        index: the deployed system.
        split: queries and held-out feedback.
        base: (Q, max(L, K)) the deployed lists with their verdicts.
        lists: model name → lists; the base model first.
        per_query: model name → metric name → (Q,) figures.
        means: model name → metric name → figure, as in metrics.json.
        significance: model name → metric name → interval, and p-values against the base.
        judge: who judged, or None.
        inputs: fingerprints of everything that went in.
    """

    config: EvalConfig
    index: Index
    split: Split
    base: Lists
    lists: dict[str, Lists]
    per_query: dict[str, dict[str, np.ndarray]]
    means: dict[str, dict[str, float]]
    significance: dict[str, dict[str, dict[str, Any]]]
    judge: str | None
    inputs: dict[str, str]


def evaluate_models(
    config: EvalConfig, out: Path, *, force: bool = False, report: Reporter | None = None
) -> Evaluation:
    """Compare models with the deployed one and write the REPORT artifact.

    Raises:
        UserError: unusable settings, data, models, runs or judge, or an existing output.
    """
    from novelret.evaluate.report import write_report

    report = report or Reporter()
    check_output(out, force=force)
    index = open_index(config.index, config.data)
    models, runs = _check(config, len(index))
    split = load_split(
        config.data, config.split, index.catalog, ignore_identical_ids=config.ignore_identical_ids
    )
    device = encode.pick_device(config.device)
    inputs = {"index": index.manifest.fingerprint, "split": split.fingerprint}
    depth = max(*config.k, config.base_depth)
    found: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
    found[BASE] = base_lists(index, split, depth, device=device, report=report)
    for name, path in models.items():
        model = load_finetuned(path, index, device)
        inputs[f"model {name}"] = encode.fingerprint_encoder(model)
        _warn_of_same_judge(name, path, config, report)
        embeddings = embed_queries(model, split.query_texts, report)
        found[name] = index.search(
            embeddings,
            max(config.k),
            split.excluded,
            device=device,
            report=report,
            what=f"top lists of {name}",
        )
    for name, path in runs.items():
        inputs[f"run {name}"] = fingerprint_file(Path(path))
        found[name] = (
            read_run(Path(path), split.query_ids, index.catalog, max(config.k), index.id_rank),
            None,
        )
    identity = fingerprint_of(config, inputs)
    with open_output(out, identity, force=force) as folder:
        table = _judge(config, index, split, found, folder, report)
        base, lists = _with_verdicts(found, table, max(config.k))
        per_query = {name: _per_query(name, of, base, split, config) for name, of in lists.items()}
        evaluation = Evaluation(
            config,
            index,
            split,
            base,
            lists,
            per_query,
            {name: _means(name, per_query[name], lists[name], config, len(index)) for name in lists},
            _significance(per_query),
            config.judge,
            inputs,
        )
        _write(evaluation, folder)
        write_report(evaluation, folder / "report.html")
        write_config(folder, config)
        settings = {**vars(config), "models": list(config.models)}
        write_manifest(folder, Manifest("report", settings, inputs, identity, {"models": evaluation.means}))
    return evaluation


def _check(config: EvalConfig, catalog_size: int) -> tuple[dict[str, str], dict[str, str]]:
    """Names and paths of models and runs.

    Raises:
        UserError: one line naming the option.
    """
    if not config.k or min(config.k) < 1:
        raise UserError(f"--k {','.join(map(str, config.k))}: expected cuts of at least 1, like 10,20,50")
    if max(config.k) > catalog_size:
        raise UserError(f"--k {max(config.k)}: the catalog holds {catalog_size} items; lower it")
    if not 1 <= config.base_depth <= catalog_size:
        raise UserError(
            f"--base-depth {config.base_depth}: must be from 1 to the catalog's {catalog_size} items"
        )
    if config.judge is not None:
        split_judge(config.judge)
    models = _named("--model", config.models)
    runs = _named("--run", config.runs)
    twice = (models.keys() & runs.keys()) | ({BASE} & (models.keys() | runs.keys()))
    if twice:
        raise UserError(
            f"the name {min(twice)!r} is used twice ({BASE!r} is the deployed model); choose another"
        )
    return models, runs


def _named(option: str, values: tuple[str, ...]) -> dict[str, str]:
    named: dict[str, str] = {}
    for value in values:
        name, separator, path = value.partition("=")
        if not separator or not name or not path:
            raise UserError(f"{option} {value}: expected NAME=PATH")
        if "/" in name or name.startswith("."):
            raise UserError(f"{option} {value}: the name {name!r} cannot be a file name")
        if name in named:
            raise UserError(f"{option} {value}: the name {name!r} is given twice")
        named[name] = path
    return named


def _warn_of_same_judge(name: str, path: str, config: EvalConfig, report: Reporter) -> None:
    if config.judge is None or config.judge.startswith("file:"):
        return
    if (Path(path) / "manifest.json").is_file():
        trained_by = read_manifest(Path(path), "model").facts.get("judge")
        if str(trained_by).replace("openai-batch:", "openai:") == config.judge.replace(
            "openai-batch:", "openai:"
        ):
            report.warn(
                f"{name} was trained on labels of {config.judge}, which now judges it; "
                "another, stronger judge would be fairer"
            )


def _judge(
    config: EvalConfig,
    index: Index,
    split: Split,
    found: dict[str, tuple[np.ndarray, np.ndarray | None]],
    folder: Path,
    report: Reporter,
) -> LabelTable:
    """Verdicts of everything in some list: looked up in a file, or asked of an LLM where not yet known."""
    if config.judge is None:
        none = np.empty(0, dtype=np.int64)
        return make_table(none, none, none.astype(np.int8), len(index))
    kind, name = split_judge(config.judge)
    if kind == "file":
        return file_table(Path(name), split.query_ids, index.catalog, config.missing, report)
    rows = np.concatenate([rows for rows, _ in found.values()], axis=1)
    queries, columns = np.nonzero(rows >= 0)
    pairs = np.unique(queries * np.int64(len(index)) + rows[queries, columns])
    candidates = Candidates(
        pairs // len(index), pairs % len(index), np.zeros(len(pairs), dtype=np.int16), ("eval",)
    )
    settings = LabelConfig(
        data=config.data,
        index=config.index,
        judge=config.judge,
        split=config.split,
        prompt=config.prompt,
        store=config.store,
        max_requests=config.max_requests,
        max_cost=config.max_cost,
        price=config.price,
    )
    path = folder / "judgements.parquet"
    judge_candidates(settings, index, split, candidates, path, report)
    return read_table(path, split.query_ids, index.catalog)


def _with_verdicts(
    found: dict[str, tuple[np.ndarray, np.ndarray | None]], table: LabelTable, longest: int
) -> tuple[Lists, dict[str, Lists]]:
    lists = {}
    for name, (rows, scores) in found.items():
        lists[name] = Lists(rows, scores, table.lookup(np.arange(len(rows))[:, None], rows))
    base = lists[BASE]
    scores = None if base.scores is None else base.scores[:, :longest]
    lists[BASE] = Lists(base.rows[:, :longest], scores, base.verdicts[:, :longest])
    return base, lists


def _per_query(
    name: str, lists: Lists, base: Lists, split: Split, config: EvalConfig
) -> dict[str, np.ndarray]:
    """Every metric's figure per query."""
    top = base.rows[:, : config.base_depth]
    feedback = (split.feedback_queries, split.feedback_items)
    figures: dict[str, np.ndarray] = {}
    for k in config.k:
        figures[f"Novelty@{k}"] = metrics.novelty(lists.rows, top, k)
        figures[f"Recall@{k}"] = metrics.recall(lists.rows, *feedback, k)
        figures[f"nDCG@{k}"] = metrics.ndcg(lists.rows, *feedback, k)
        figures[f"MRR@{k}"] = metrics.reciprocal_rank(lists.rows, *feedback, k)
        if config.judge is not None:
            figures[f"RelevantNovel@{k}"] = metrics.relevant_novelty(lists.rows, top, lists.verdicts, k)
            figures[f"Precision@{k}"] = metrics.precision(lists.verdicts, k)
            figures[f"Judged@{k}"] = metrics.judged(lists.rows, lists.verdicts, k)
            figures[f"NovelPrecision@{k}"] = metrics.novel_precision(lists.rows, top, lists.verdicts, k)
    if config.judge is not None:
        # The base beside itself adds nothing: its own list is what the others are merged behind.
        rows = np.full_like(lists.rows, -1) if name == BASE else lists.rows
        merged = metrics.merge(rows, top, lists.verdicts, base.verdicts[:, : config.base_depth])
        figures["MergedAdded"] = merged.added
        figures["MergedDensity"] = merged.density
        figures["MergedCoverage"] = merged.covered
    return {metric: values.astype(np.float64) for metric, values in figures.items()}


def _means(
    name: str, figures: dict[str, np.ndarray], lists: Lists, config: EvalConfig, catalog_size: int
) -> dict[str, float]:
    means = {metric: _mean(values) for metric, values in figures.items()}
    for k in config.k:
        means[f"CatalogCoverage@{k}"] = metrics.catalog_coverage(lists.rows, k, catalog_size)
    return {metric: value for metric, value in means.items() if not math.isnan(value)}


def _mean(values: np.ndarray) -> float:
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else math.nan


def _significance(per_query: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Intervals of every mean; p-values against the base, corrected over the models compared."""
    names = list(per_query[BASE])
    figures = {model: np.stack([of[name] for name in names], axis=1) for model, of in per_query.items()}
    others = [model for model in figures if model != BASE]
    p_values = np.array([randomization_tests(figures[model] - figures[BASE]) for model in others])
    corrected = holm(p_values) if others else p_values
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for model, values in figures.items():
        low, high = bootstrap_intervals(values)
        result[model] = {name: {"low": float(low[n]), "high": float(high[n])} for n, name in enumerate(names)}
        if model != BASE:
            row = others.index(model)
            for n, name in enumerate(names):
                result[model][name] |= {"p": float(p_values[row, n]), "p_holm": float(corrected[row, n])}
    return result


def _write(evaluation: Evaluation, folder: Path) -> None:
    config, split = evaluation.config, evaluation.split
    write_json(
        folder / "metrics.json",
        {
            "k": list(config.k),
            "base_depth": config.base_depth,
            "queries": len(split),
            "models": evaluation.means,
        },
    )
    write_json(folder / "significance.json", evaluation.significance)
    tables = [
        pa.table(
            {"model": [name] * len(split), "query_id": split.query_ids}
            | {metric: pa.array(values) for metric, values in figures.items()}
        )
        for name, figures in evaluation.per_query.items()
    ]
    pq.write_table(pa.concat_tables(tables), folder / "per_query.parquet")
    (folder / "runs").mkdir(exist_ok=True)
    for name, lists in evaluation.lists.items():
        if lists.scores is not None:
            path = folder / "runs" / f"{name}.trec"
            write_run(path, lists.rows, lists.scores, split.query_ids, evaluation.index.catalog, name)
