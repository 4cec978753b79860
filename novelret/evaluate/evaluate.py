"""`novelret eval`: compare query encoders with the deployed one over an unchanged index.

REPORT/
  metrics.json         the figures, human-corrected ones, the frontier, buckets of traffic
  significance.json    intervals and paired tests
  metrics.csv          figures, intervals and tests, one row per (model, metric)
  table.md, table.tex  the headline figures with their intervals and marks
  per_query.parquet    one row per (model, query)
  runs/NAME.trec       the lists
  to_label.tsv         random pairs of the lists for people to label, where asked for
  qrels/               the held-out feedback and the verdicts, for other programs
  judgements.parquet   what the judge said of them, where an LLM was asked
  report.html          all of it to read
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
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
from novelret.evaluate.frontier import Frontier, make_frontier
from novelret.evaluate.human import FEW_PAIRS, Corrected, check_overlap, human_figures, is_uneven
from novelret.evaluate.human_sample import read_sample, write_sample
from novelret.evaluate.significance import (
    PairTest,
    bootstrap_intervals,
    compare_pairs,
    holm,
    randomization_tests,
)
from novelret.evaluate.tables import write_tables
from novelret.evaluate.trec import read_run, write_qrels, write_run
from novelret.evaluate.weights import Bucket, load_weights, merged_by_bucket
from novelret.index import Index, base_lists, embed_queries, load_finetuned, open_deployed, pooled_lists
from novelret.label.asking import Plan
from novelret.label.candidates import Candidates
from novelret.label.judge import split_judge
from novelret.label.judges.file import file_table
from novelret.label.label import LabelConfig, check_plan, judge_candidates, plan_candidates
from novelret.label.labels import read_table
from novelret.label.table import LabelTable, make_table
from novelret.progress import Reporter

BASE = "base"


@dataclass(frozen=True)
class EvalConfig:
    """Settings of `novelret eval`.

    Attributes:
        data: BEIR folder or Hugging Face data set.
        index: INDEX folder; or several of the same catalog, whose top-L lists are pooled into one T_L
            (Definition 1 for several deployed models). The first is the base and what models search.
        models: "NAME=MODEL" for each query encoder to compare; a folder of MODEL folders gives each of them.
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
        human: a few (query, item) pairs labelled by people, drawn at random from the lists.
        human_sample: how many pairs to draw for people to label.
        max_recall_drop: how much of the base's recall the selected model may lose, relative.
        weights: tab-separated query id and frequency; by default the queries' own `weight` field, if any.
        merge_budget: novel items that the merged list takes per query at most; by default the whole top k.
        device: "auto", "cpu" or a CUDA device.
        ignore_identical_ids: leave the item whose id is the query's own out.
    """

    data: str
    index: str | tuple[str, ...]
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
    human: str | None = None
    human_sample: int | None = None
    max_recall_drop: float = 0.01
    weights: str | None = None
    merge_budget: int | None = None
    device: str = "auto"
    ignore_identical_ids: bool = True

    @property
    def indexes(self) -> tuple[str, ...]:
        """All INDEX folders; the first is the base."""
        return (self.index,) if isinstance(self.index, str) else tuple(self.index)


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
        base: (Q, max(L, K)) the deployed model's lists with their verdicts.
        deployed: (Q, width) T_L, what is not novel, −1 padded, with verdicts.
        lists: model name → lists; the base model first.
        per_query: model name → metric name → (Q,) figures.
        means: model name → metric name → figure, as in metrics.json.
        significance: model name → metric name → interval, and p-values against the base.
        pairs: tests between the models compared, on the main metrics.
        judge: who judged, or None.
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
    inputs: dict[str, str]
    out: Path
    models: dict[str, str]
    frontier: Frontier
    human: dict[str, dict[str, Corrected]]
    buckets: list[Bucket]
    warnings: list[str]


@dataclass(frozen=True)
class _Gathered:
    """What is evaluated: inputs read and checked, and every list searched.

    Attributes:
        index: the deployed system.
        split: queries and held-out feedback.
        models: model name → its folder.
        found: name → rows and scores, the base first and max(L, K) deep.
        pool: (Q, W) int64, T_L: the top-L lists of all deployed models, −1 padded.
        known: verdicts that need no asking; None where an LLM judges.
        people: human verdicts, where given.
        weights: (Q,) query frequencies, where given.
        inputs: fingerprints of everything that went in.
    """

    index: Index
    split: Split
    models: dict[str, str]
    found: dict[str, tuple[np.ndarray, np.ndarray | None]]
    pool: np.ndarray
    known: LabelTable | None
    people: LabelTable | None
    weights: np.ndarray | None
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
    said = len(report.warnings)
    check_output(out, force=force)
    if config.human is not None and out.exists() and out.resolve() in Path(config.human).resolve().parents:
        raise UserError(f"--human {config.human}: lies in {out}, which would be replaced; copy it elsewhere")
    gathered = _gather(config, report)
    index, split = gathered.index, gathered.split
    identity = fingerprint_of(config, gathered.inputs)
    with open_output(out, identity, force=force) as folder:
        table = gathered.known
        if table is None:
            table = _ask_judge(config, gathered, folder, report)
        base, lists = _with_verdicts(gathered.found, table, max(config.k))
        pool = gathered.pool
        deployed = Lists(pool, None, table.lookup(np.arange(len(pool))[:, None], pool))
        per_query = {name: _per_query(name, of, deployed, split, config) for name, of in lists.items()}
        means = {name: _means(name, per_query[name], lists[name], config, len(index)) for name in lists}
        _warn_of_weak_figures(config, means, report)
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
            significance=_significance(per_query),
            pairs=compare_pairs(
                {name: figures for name, figures in per_query.items() if name != BASE}, _main(config)
            ),
            judge=config.judge,
            inputs=gathered.inputs,
            out=out,
            models=gathered.models,
            frontier=make_frontier(means, BASE, max(config.k), config.max_recall_drop),
            human=_human(lists, deployed, gathered.people, config, report),
            buckets=[] if weights is None else merged_by_bucket(weights, per_query),
            warnings=report.warnings[said:],
        )
        _write(evaluation, table, folder)
        if config.human_sample is not None:
            rows = [of.rows for of in lists.values()]
            write_sample(folder / "to_label.tsv", rows, config.human_sample, split, index.catalog)
        write_report(evaluation, folder / "report.html")
        write_config(folder, config)
        settings = {**vars(config), "models": list(config.models)}
        facts = {"models": evaluation.means}
        write_manifest(folder, Manifest("report", settings, gathered.inputs, identity, facts))
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
    gathered = _gather(config, report)
    return plan_candidates(
        _label_config(config), gathered.index, gathered.split, _candidates(gathered), report
    )


def _gather(config: EvalConfig, report: Reporter) -> _Gathered:
    """Read and check everything, then search; what is wrong is said before hours of searching."""
    indexes = open_deployed(config.indexes, config.data)
    index = indexes[0]
    models, runs = _check(config, len(index))
    split = load_split(
        config.data, config.split, index.catalog, ignore_identical_ids=config.ignore_identical_ids
    )
    device = encode.pick_device(config.device)
    inputs = {"index": index.manifest.fingerprint, "split": split.fingerprint}
    inputs |= {f"index {n}": more.manifest.fingerprint for n, more in enumerate(indexes[1:], 2)}
    inputs |= {what: fingerprint_file(path) for what, path in _files(config, runs).items()}
    weights = load_weights(config.data, split.query_ids, Path(config.weights) if config.weights else None)
    known = _known_verdicts(config, index, split, report)
    people = None
    if config.human is not None:
        people = read_sample(Path(config.human), split.query_ids, index.catalog)
    longest = max(config.k)
    read = {
        name: read_run(Path(path), split, index.catalog, longest, index.id_rank)
        for name, path in runs.items()
    }
    for name, path in models.items():
        inputs[f"model {name}"] = encode.fingerprint_encoder(load_finetuned(path, index, device))
        _warn_of_same_judge(name, path, config, report)
    depth = max(longest, config.base_depth)
    found: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
    found[BASE] = base_lists(index, split, depth, device=device, report=report)
    pool = pooled_lists(indexes, split, config.base_depth, device=device, report=report)
    for name, path in models.items():
        embeddings = embed_queries(load_finetuned(path, index, device), split.query_texts, report)
        what = f"top lists of {name}"
        found[name] = index.search(
            embeddings, longest, split.excluded, device=device, report=report, what=what
        )
    for name, rows in read.items():
        found[name] = rows, None
        short = int((rows[:, -1] < 0).sum())
        if short:
            report.warn(
                f"{runs[name]}: fewer than {longest} items for {short} of the {len(split)} queries (none for "
                f"{int((rows[:, 0] < 0).sum())}); what is not there counts as not found"
            )
    if people is not None:
        check_overlap(Path(str(config.human)), people, [rows for rows, _ in found.values()])
    return _Gathered(index, split, models, found, pool, known, people, weights, inputs)


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
    if not 0 <= config.max_recall_drop <= 1:
        raise UserError(f"--max-recall-drop {config.max_recall_drop}: expected a share from 0 to 1")
    if config.human_sample is not None and config.human_sample < 1:
        raise UserError(f"--human-sample {config.human_sample}: must be at least 1")
    if config.merge_budget is not None and config.merge_budget < 1:
        raise UserError(f"--merge-budget {config.merge_budget}: must be at least 1")
    if config.judge is not None:
        split_judge(config.judge)
    if config.human is not None and config.judge is None:
        raise UserError("--human: corrects a judge's figures; give the judge too, with --judge")
    models = _expanded(_named("--model", config.models))
    runs = _named("--run", config.runs)
    files = [("--run", path) for path in runs.values()] + [
        ("--human", config.human),
        ("--weights", config.weights),
    ]
    for option, given in files:
        if given is not None and not Path(given).is_file():
            raise UserError(f"{option} {given}: no such file")
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


def _expanded(models: dict[str, str]) -> dict[str, str]:
    """Models with each folder of several MODEL folders replaced by those, named NAME-FOLDER.

    Raises:
        UserError: two get the same name.
    """
    found: dict[str, str] = {}
    for name, path in models.items():
        inside = {
            f"{name}-{part.parent.name}": str(part.parent)
            for part in sorted(Path(path).glob("*/modules.json"))
        }
        if not inside or (Path(path) / "modules.json").is_file():
            inside = {name: path}
        twice = inside.keys() & found.keys()
        if twice:
            raise UserError(f"--model {name}={path}: the name {min(twice)!r} is given twice")
        found |= inside
    return found


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
    if config.judge is not None:
        for name, of in means.items():
            if of[f"Judged@{max(config.k)}"] == 0:
                report.warn(
                    f"{config.judge} judged nothing in the lists of {name}; its judged figures say nothing"
                )


def _main(config: EvalConfig) -> list[str]:
    """The metrics on which models are compared with each other."""
    deepest = max(config.k)
    names = [f"Novelty@{deepest}", f"Recall@{deepest}"]
    if config.judge is not None:
        names += [f"RelevantNovel@{deepest}", f"Precision@{min(config.k)}", "MergedDensity"]
    return names


def _human(
    lists: dict[str, Lists], deployed: Lists, people: LabelTable | None, config: EvalConfig, report: Reporter
) -> dict[str, dict[str, Corrected]]:
    if people is None:
        return {}
    top = deployed.rows
    found = {name: human_figures(of.rows, of.verdicts, top, people, config.k) for name, of in lists.items()}
    # Novel items are rare at shallow cuts; what matters is that the deepest one has its labels.
    main = [f"Precision@{min(config.k)}", f"RelevantNovel@{max(config.k)}"]
    fewest, figure = min(
        (of[metric].pairs if metric in of else 0, f"{metric} of {name}")
        for name, of in found.items()
        for metric in main
        if name != BASE or metric == main[0]
    )
    uneven = [name for name, of in lists.items() if is_uneven(of.rows, top, people)]
    if uneven:
        report.warn(
            f"{config.human}: in the lists of {', '.join(uneven)}, novel and other items are not labelled at "
            "the same rate, as in a random sample of them; their corrected figures are biased"
        )
    if fewest < FEW_PAIRS:
        report.warn(
            f"{config.human}: only {fewest} human labels fall on {figure}; intervals from fewer than "
            f"{FEW_PAIRS} are not to be relied on, label more pairs"
        )
    return found


def _files(config: EvalConfig, runs: dict[str, str]) -> dict[str, Path]:
    """Files that go in beside the artifacts, by what they are."""
    files = {f"run {name}": Path(path) for name, path in runs.items()}
    if config.judge is not None and config.judge.startswith("file:"):
        files["judgements"] = Path(split_judge(config.judge)[1])
    files |= {
        what: Path(path) for what, path in (("human", config.human), ("weights", config.weights)) if path
    }
    return files


def _known_verdicts(config: EvalConfig, index: Index, split: Split, report: Reporter) -> LabelTable | None:
    """Verdicts that need no asking: a file's, or none without a judge; None where an LLM judges."""
    if config.judge is None:
        none = np.empty(0, dtype=np.int64)
        return make_table(none, none, none.astype(np.int8), len(index))
    kind, name = split_judge(config.judge)
    if kind == "file":
        return file_table(Path(name), split.query_ids, index.catalog, config.missing, report)
    return None


def _ask_judge(config: EvalConfig, gathered: _Gathered, folder: Path, report: Reporter) -> LabelTable:
    """Verdicts of everything in some list, asked of an LLM where the store does not know them yet."""
    path = folder / "judgements.parquet"
    candidates = _candidates(gathered)
    judge_candidates(_label_config(config), gathered.index, gathered.split, candidates, path, report)
    return read_table(path, gathered.split.query_ids, gathered.index.catalog)


def _candidates(gathered: _Gathered) -> Candidates:
    """Every (query, item) pair of every list, once."""
    size = np.int64(len(gathered.index))
    pairs = np.empty(0, dtype=np.int64)
    for rows in (gathered.pool, *(rows for rows, _ in gathered.found.values())):
        queries, columns = np.nonzero(rows >= 0)
        pairs = np.union1d(pairs, queries * size + rows[queries, columns])
    return Candidates(pairs // size, pairs % size, np.zeros(len(pairs), dtype=np.int16), ("eval",))


def _label_config(config: EvalConfig) -> LabelConfig:
    return LabelConfig(
        data=config.data,
        index=config.indexes[0],
        judge=str(config.judge),
        split=config.split,
        prompt=config.prompt,
        store=config.store,
        max_requests=config.max_requests,
        max_cost=config.max_cost,
        price=config.price,
    )


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
    name: str, lists: Lists, deployed: Lists, split: Split, config: EvalConfig
) -> dict[str, np.ndarray]:
    """Every metric's figure per query."""
    top = deployed.rows
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
    # The base beside itself adds nothing: its own list is what the others are merged behind.
    rows = np.full_like(lists.rows, -1) if name == BASE else lists.rows
    merged = metrics.merge(rows, top, lists.verdicts, deployed.verdicts, config.merge_budget)
    figures["MergedAdded"] = merged.added
    if config.judge is not None:
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
    # All models side by side in one matrix share the resamples and the sign flips.
    shape = (-1, len(names))
    low, high = (
        end.reshape(shape) for end in bootstrap_intervals(np.concatenate([*figures.values()], axis=1))
    )
    p_values = np.empty((0, len(names)))
    if others:
        differences = np.concatenate([figures[model] - figures[BASE] for model in others], axis=1)
        p_values = randomization_tests(differences).reshape(shape)
    corrected = holm(p_values)
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for place, model in enumerate(figures):
        ends = zip(names, low[place].tolist(), high[place].tolist(), strict=True)
        result[model] = {name: {"low": start, "high": end} for name, start, end in ends}
    for place, model in enumerate(others):
        for name, p, p_holm in zip(names, p_values[place].tolist(), corrected[place].tolist(), strict=True):
            result[model][name] |= {"p": p, "p_holm": p_holm}
    return result


def result_of(evaluation: Evaluation) -> dict[str, Any]:
    """What metrics.json and `--json` hold."""
    config = evaluation.config
    return {
        "k": list(config.k),
        "base_depth": config.base_depth,
        "queries": len(evaluation.split),
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
