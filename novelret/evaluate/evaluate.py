"""`novelret eval`: compare query encoders with the deployed one over an unchanged index.

REPORT/
  metrics.json         the figures, human-corrected ones, the frontier, buckets of traffic
  significance.json    intervals and paired tests
  metrics.csv          figures, intervals and tests, one row per (model, metric)
  table.md, table.tex  the headline figures with their intervals and marks
  per_query.parquet    one row per (model, query)
  runs/NAME.trec       the lists
  to_label.tsv         random pairs of the lists for people to label, where asked for
  qrels/               the held-out feedback and the verdicts, noes too, for other programs
  judgements.parquet   what the judge said of them, where an LLM was asked
  report.html          all of it to read
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from novelret.artifacts import (
    Manifest,
    check_output,
    fingerprint_of,
    open_output,
    write_config,
    write_json,
    write_manifest,
)
from novelret.data.split import Split
from novelret.errors import UserError
from novelret.evaluate.config import BASE, EvalConfig
from novelret.evaluate.figures import (
    Lists,
    bound_of,
    human_corrections,
    judged_share,
    main_metrics,
    mean_figures,
    per_query_figures,
    significance_of,
    with_verdicts,
)
from novelret.evaluate.frontier import Frontier, make_frontier
from novelret.evaluate.gather import Gathered, candidates_of, gather
from novelret.evaluate.human import Corrected
from novelret.evaluate.human_sample import write_sample
from novelret.evaluate.metrics import LOGGED_RECALL
from novelret.evaluate.significance import (
    PairTest,
    compare_pairs,
)
from novelret.evaluate.tables import write_tables
from novelret.evaluate.trec import write_qrels, write_run
from novelret.evaluate.weights import Bucket, merged_by_bucket
from novelret.index import Index
from novelret.label.asking import NOTE, Plan, ask_and_write, plan_asking
from novelret.label.judge import split_judge
from novelret.label.label import check_plan, check_unchanged, stopped_early, what_is_asked
from novelret.label.labels import read_table
from novelret.label.table import IRRELEVANT, UNKNOWN, LabelTable, join_tables, make_table
from novelret.progress import Reporter
from novelret.tradeoff import keeps_recall


@dataclass(frozen=True)
class Evaluation:
    """Everything the report is written from.

    Attributes:
        config: the settings.
        index: the deployed system.
        split: queries and held-out feedback.
        base: (Q, max(L, K)) the deployed model's lists with their verdicts.
        deployed: (Q, width) T_L, what is not novel, −1 padded, with verdicts.
        lists: model name → lists; the base model first.
        per_query: model name → metric name → (Q,) figures.
        means: model name → metric name → figure, as in metrics.json.
        significance: model name → metric name → interval, and p-values against the base.
        pairs: tests between the models compared, on the main metrics.
        judge: who judged, or None.
        judged: share of judged items among all places of the lists; None without a judge.
        asked: what came of asking the judge, as `ask_and_write` says it; None where nothing was asked.
        inputs: fingerprints of everything that went in.
        out: the REPORT folder.
        models: model name → its folder.
        frontier: novelty against recall, and the model selected.
        human: model → metric → the figure corrected by human labels; empty without any.
        buckets: the merged list by query frequency; empty without weights.
        warnings: what a reader of the figures must know.
    """

    config: EvalConfig
    index: Index
    split: Split
    base: Lists
    deployed: Lists
    lists: dict[str, Lists]
    per_query: dict[str, dict[str, np.ndarray]]
    means: dict[str, dict[str, float]]
    significance: dict[str, dict[str, dict[str, Any]]]
    pairs: list[PairTest]
    judge: str | None
    judged: float | None
    asked: dict[str, Any] | None
    inputs: dict[str, str]
    out: Path
    models: dict[str, str]
    frontier: Frontier
    human: dict[str, dict[str, Corrected]]
    buckets: list[Bucket]
    warnings: list[str]


def evaluate_models(
    config: EvalConfig, out: Path, *, force: bool = False, report: Reporter | None = None
) -> Evaluation:
    """Compare models with the deployed one and write the REPORT artifact.

    Raises:
        UserError: unusable settings, data, models, runs or judge, or an existing output.
    """
    from novelret.evaluate.report import write_report

    report = report or Reporter()
    said = len(report.warnings)
    earlier = None if force else stopped_early(config, out, "report")
    named = (*config.indexes, *config.models, *config.runs)
    files = (config.judge or "", config.human or "", config.weights or "")
    check_output(out, force=force or earlier is not None, kind="report", inputs=(*named, *files))
    gathered = gather(config, report)
    index, split = gathered.index, gathered.split
    identity = fingerprint_of(what_is_asked(asdict(config)), gathered.inputs)
    if earlier is not None and earlier.inputs != gathered.inputs:
        check_output(out, force=False)
    with open_output(out, identity, force=force or earlier is not None) as folder:
        if earlier is not None:
            check_unchanged(config, out, earlier)
        table, asked = gathered.known, None
        if table is None:
            table, asked = _ask_judge(config, gathered, folder, report, earlier)
        table = table.without(split.excluded)
        base, lists = with_verdicts(gathered.found, table, max(config.k))
        pool = gathered.pool
        deployed = Lists(pool, None, table.lookup(np.arange(len(pool))[:, None], pool))
        known = table.relevant_and(split.feedback_queries, split.feedback_items)
        per_query = {
            name: per_query_figures(name, of, deployed, split, known, config) for name, of in lists.items()
        }
        means = {name: mean_figures(per_query[name], lists[name], config, len(index)) for name in lists}
        judged = None if config.judge is None else judged_share(lists, deployed)
        _warn_of_weak_figures(config, means, report)
        if judged is not None:
            has_noes = bool((table.verdicts == IRRELEVANT).any())
            _warn_of_few_verdicts(config, means, judged, report, has_noes=has_noes)
        weights = gathered.weights
        evaluation = Evaluation(
            config=config,
            index=index,
            split=split,
            base=base,
            deployed=deployed,
            lists=lists,
            per_query=per_query,
            means=means,
            significance=significance_of(per_query),
            pairs=compare_pairs(
                {name: figures for name, figures in per_query.items() if name != BASE}, main_metrics(config)
            ),
            judge=config.judge,
            judged=judged,
            asked=asked,
            inputs=gathered.inputs,
            out=out,
            models=gathered.models,
            frontier=make_frontier(means, BASE, max(config.k), config.max_recall_drop, config.recall_metric),
            human=human_corrections(lists, deployed, gathered.people, config, report),
            buckets=[] if weights is None else merged_by_bucket(weights, per_query),
            warnings=report.warnings[said:],
        )
        _write(evaluation, _with_implied_noes(table, gathered), folder)
        if config.human_sample is not None:
            rows = [of.rows for of in lists.values()]
            write_sample(folder / "to_label.tsv", rows, config.human_sample, split, index.catalog)
        write_report(evaluation, folder / "report.html")
        write_config(folder, config)
        settings = {**vars(config), "models": list(config.models)}
        facts = {"models": evaluation.means, "asked": asked}
        write_manifest(folder, Manifest("report", settings, gathered.inputs, identity, facts))
    (out / NOTE).unlink(missing_ok=True)  # until here a kill leaves it, and the caps hold
    return evaluation


def plan_judging(config: EvalConfig, report: Reporter | None = None) -> Plan:
    """What `evaluate_models` would ask of its judge, and cost at most; searches, and sends nothing.

    Raises:
        UserError: as `evaluate_models`, or the judge costs nothing.
    """
    report = report or Reporter()
    if config.judge is None:
        raise UserError("--plan: there is nothing to ask without --judge openai:MODEL")
    check_plan(config.judge)
    gathered = gather(config, report, sends=False)
    pairs = candidates_of(gathered)
    assert gathered.judge is not None
    return plan_asking(
        gathered.judge,
        gathered.index,
        gathered.split,
        pairs,
        config.store_path,
        report,
        retry_unusable=config.retry_unusable,
    )


def _warn_of_weak_figures(config: EvalConfig, means: dict[str, dict[str, float]], report: Reporter) -> None:
    """Say where figures mean less than they seem to."""
    beyond = [k for k in config.k if k > config.base_depth]
    if beyond:
        k = max(beyond)
        report.warn(
            f"--k {k} is more than --base-depth {config.base_depth}: the deployed model's own ranks beyond "
            f"{config.base_depth} count as novel there, so that base scores Novelty@{k} "
            f"{means[BASE][f'Novelty@{k}']:.2f} against itself. Read Novelty@{k} as a difference from base, "
            f"or set --base-depth {k}"
        )
    kind = config.recall_metric.partition("@")[0]
    for name, of in means.items():
        recalls = [f"{kind}@{k}" for k in sorted(config.k)[:-1]]
        base, drop = means[BASE], config.max_recall_drop
        lost = [recall for recall in recalls if not keeps_recall(of[recall], base[recall], drop)]
        if lost:
            figures = ", ".join(f"{recall} {of[recall]:.3f} instead of {base[recall]:.3f}" for recall in lost)
            report.warn(
                f"{name} is worse at the top: {figures}. Where no ranker orders the lists anew, that is "
                "what users see"
            )
    base_recall = means[BASE][f"Recall@{max(config.k)}"]
    if base_recall >= LOGGED_RECALL and config.recall_of == "feedback" and len(means) > 1:
        report.warn(
            f"the deployed top {max(config.k)} holds {base_recall:.1%} of the held-out feedback, as it does "
            "where feedback is a log of what it showed: every other list then seems to lose recall. Count "
            "what is judged relevant too (--recall-of known, with --judge)"
        )


def _warn_of_few_verdicts(
    config: EvalConfig,
    means: dict[str, dict[str, float]],
    judged: float,
    report: Reporter,
    *,
    has_noes: bool,
) -> None:
    """Say where counts of relevant items fall short, as too few items are judged."""
    deepest = max(config.k)
    for name, of in means.items():
        if of.get(f"Judged@{deepest}") == 0:
            report.warn(
                f"{config.judge} judged nothing in the lists of {name}; its judged figures say nothing"
            )
    counts = (f"RelevantNovel@{deepest}", f"KnownRecall@{deepest}", "MergedDensity")
    if judged == 0 or not any(bound_of(metric, of, judged) for of in means.values() for metric in counts):
        return
    shares = {
        name: of[f"NovelJudged@{deepest}"] for name, of in means.items() if f"NovelJudged@{deepest}" in of
    }
    fewest = min(shares, key=lambda name: shares[name], default=None)
    of_novel = (
        ""
        if fewest is None
        else f"{shares[fewest]:.1%} of the novel items in the top {deepest} of {fewest}, "
    )
    is_file = split_judge(str(config.judge))[0] == "file"
    remedy = (
        "Pass --missing irrelevant if the file lists all that is relevant" if is_file else "Have more judged"
    )
    others = ", or decide by Precision and NovelPrecision, which leave out what is not judged"
    if not has_noes:
        others = ". It never says no, so that Precision and NovelPrecision are 1 wherever it says anything"
    report.warn(
        f"{config.judge} judged {of_novel}{judged:.1%} of all items in the lists: RelevantNovel, "
        "MergedDensity and MergedCoverage count the others as irrelevant and are lower bounds (≥), "
        f"KnownRecall is of what was judged alone (~). {remedy}{others}"
    )


def _ask_judge(
    config: EvalConfig, gathered: Gathered, folder: Path, report: Reporter, earlier: Manifest | None
) -> tuple[LabelTable, dict[str, Any]]:
    """Verdicts of all that some list holds, asked where the store does not know them; and what came of it."""
    path = folder / "judgements.parquet"
    pairs = candidates_of(gathered)
    index, split = gathered.index, gathered.split
    assert gathered.judge is not None
    asked = ask_and_write(
        gathered.judge,
        index,
        split,
        pairs,
        config.store_path,
        path,
        report,
        retry_unusable=config.retry_unusable,
        send=True,
        caps=config.caps,
        earlier=earlier,
    )
    return read_table(path, split.query_ids, index.catalog), asked


def _with_implied_noes(table: LabelTable, gathered: Gathered) -> LabelTable:
    """The verdicts, and a no for each pair of the lists that the judgements call irrelevant by its absence.

    Other programs take what qrels do not list for not judged, and leave out queries without a line.
    """
    if table.missing == UNKNOWN:
        return table
    pairs = candidates_of(gathered)
    verdicts = table.lookup(pairs.query_rows, pairs.item_rows)
    return join_tables(make_table(pairs.query_rows, pairs.item_rows, verdicts, table.catalog_size), table)


def result_of(evaluation: Evaluation) -> dict[str, Any]:
    """What metrics.json and `--json` hold."""
    config = evaluation.config
    return {
        "k": list(config.k),
        "base_depth": config.base_depth,
        "queries": len(evaluation.split),
        "queries_with_feedback": evaluation.split.clicked,
        "judged": evaluation.judged,
        "models": evaluation.means,
        "human": {
            model: {metric: asdict(figure) for metric, figure in of.items()}
            for model, of in evaluation.human.items()
        },
        "frontier": asdict(evaluation.frontier),
        "pairs": [asdict(pair) for pair in evaluation.pairs],
        "buckets": [asdict(bucket) for bucket in evaluation.buckets],
        "warnings": evaluation.warnings,
    }


def _write(evaluation: Evaluation, table: LabelTable, folder: Path) -> None:
    split = evaluation.split
    write_json(folder / "metrics.json", result_of(evaluation))
    write_json(folder / "significance.json", evaluation.significance)
    write_tables(evaluation, folder)
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
    (folder / "qrels").mkdir(exist_ok=True)
    catalog = evaluation.index.catalog
    feedback = np.ones(len(split.feedback_items), dtype=np.int8)
    path = folder / "qrels" / "feedback.trec"
    write_qrels(path, split.feedback_queries, split.feedback_items, feedback, split.query_ids, catalog)
    if evaluation.judge is not None:
        path = folder / "qrels" / "judged.trec"
        write_qrels(path, table.query_rows, table.item_rows, table.verdicts, split.query_ids, catalog)
