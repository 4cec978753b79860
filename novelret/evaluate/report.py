"""report.html: one self-contained page, every text escaped since items are untrusted."""

from __future__ import annotations

from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from novelret.evaluate.breakdown import (
    Group,
    by_length,
    by_overlap,
    gain_metric,
    gained_items,
    recall_spread,
    spread,
)
from novelret.evaluate.chart import Mark, scatter
from novelret.evaluate.figures import bound_of
from novelret.evaluate.provenance import commands
from novelret.evaluate.side_by_side import side_by_side
from novelret.evaluate.significance import stars
from novelret.evaluate.tables import BOUNDS, Figure, digits_of, figure_of, has_bounds, headline_metrics

if TYPE_CHECKING:
    from novelret.evaluate.evaluate import Evaluation

_MERGED = {
    "MergedAdded": "items added",
    "MergedDensity": "density",
    "MergedCoverage": "coverage",
}
_ALL_PAIRS = 5
# Columns that hold words or bars.
_TEXTS = ("model", "metric", "best (Pareto) in", "fingerprint", "brings", "recall change")
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6575; --rule: #d8dde5; --page: #fff;
  --bar: #8fb8e8; --m0: #1c2330; --m1: #0b6bcb; --m2: #b5460f; --m3: #1d7a46; --m4: #7a3fb0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa5b5; --rule: #343c49;
  --page: #14181f; --bar: #2f5d94;
  --m0: #e6eaf0; --m1: #6cb2ff; --m2: #ff9a62; --m3: #6fd39b; --m4: #c79bf2; } }
body { margin: 0 auto; max-width: 1100px; padding: 24px 20px 64px; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0 0 4px; } h2 { font-size: 1.2rem; margin: 40px 0 8px; }
h3 { font-size: 1rem; margin: 24px 0 4px; } p, li { max-width: 75ch; } .soft { color: var(--soft); }
.lead { font-size: 1.1rem; } .warning { border-left: 4px solid var(--ink); padding-left: 10px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px 5px 0; text-align: right; border-bottom: 1px solid var(--rule);
  white-space: nowrap; }
th:first-child, td:first-child, .name { text-align: left; } td small { display: block; color: var(--soft); }
th { vertical-align: bottom; } .chosen td { font-weight: 650; }
.bar { display: inline-block; height: .8em; background: var(--bar); border: 1px solid var(--ink);
  box-sizing: border-box; vertical-align: baseline; margin-right: 6px; }
td.bars { text-align: left; min-width: 112px; }
.zero { display: inline-block; width: 60px; text-align: right; } .zero .bar { margin: 0; }
.loss { background: repeating-linear-gradient(45deg, var(--bar) 0 2px, transparent 2px 5px); }
.chart { overflow-x: auto; } .chart svg { width: 100%; max-width: 800px; height: auto; }
svg text { fill: var(--ink); font-size: 13px; }
svg .tick { fill: var(--soft); font-size: 12px; } .grid { stroke: var(--rule); }
.rule { stroke: var(--soft); stroke-dasharray: 5 4; } .leader { stroke: var(--rule); }
.ring, .front { fill: none; stroke: var(--soft); stroke-width: 1.5; }
.mark0 { fill: var(--m0); } .mark1 { fill: var(--m1); } .mark2 { fill: var(--m2); }
.mark3 { fill: var(--m3); } .mark4 { fill: var(--m4); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 20px; } .query { margin: 20px 0 4px; }
.pair ol { margin: 4px 0 0; padding-left: 2em; } .pair li small { color: var(--soft); }
.novel { font-weight: 650; } code { font-size: .85em; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; margin: 4px 0; }
@media (max-width: 640px) { .pair { grid-template-columns: 1fr; } body { padding: 16px 14px 48px; }
  .chart svg text { font-size: 19px; } td.bars { min-width: 100px; } }
"""


def write_report(evaluation: Evaluation, path: Path) -> None:
    """Write the page."""
    config = evaluation.config
    judge = escape(evaluation.judge) if evaluation.judge else "none (relevance is not measured)"
    shown = _shown_model(evaluation)
    split = evaluation.split
    some = f" ({split.clicked:,} with feedback, over which recall is measured)"
    unclicked = some if split.clicked < len(split) else ""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'><title>novelret report</title>",
        # Without an icon of its own, a page makes the browser ask a server for one.
        f"<link rel='icon' href='data:,'><style>{_STYLE}</style><h1>What the new retriever brings</h1>",
        f"<p class='soft'>{len(evaluation.split):,} queries of split {escape(config.split)}{unclicked}, "
        f"{len(evaluation.index):,} items; an item is novel when the deployed top {config.base_depth} "
        f"does not hold it; judge: {judge}</p>",
        _decision(evaluation),
        *(f"<p class='warning'><b>Mind:</b> {escape(warning)}</p>" for warning in evaluation.warnings),
        "<h2>Summary</h2>",
        _summary(evaluation),
        _pairs(evaluation),
        _human(evaluation),
        _frontier(evaluation),
        _merged(evaluation),
        _buckets(evaluation),
        _distribution(evaluation),
        _groups(evaluation),
        side_by_side(evaluation, shown) if shown else "",
        _provenance(evaluation),
        "</html>",
    ]
    path.write_text("".join(parts), encoding="utf-8")


def _shown_model(evaluation: Evaluation) -> str | None:
    """The model shown beside the base: the selected one, else the one that brings most."""
    metric = gain_metric(evaluation)
    others = [name for name in evaluation.lists if name != "base"]
    best = max(others, key=lambda name: evaluation.means[name].get(metric, 0.0), default=None)
    return evaluation.frontier.selected or best


def _decision(evaluation: Evaluation) -> str:
    frontier = evaluation.frontier
    if len(evaluation.means) == 1:
        return ""
    budget = f"recall within {frontier.max_recall_drop:.1%} of the deployed model's"
    if frontier.selected is None:
        return f"<p class='lead'>No model brings {gained_items(evaluation)} and keeps {budget}.</p>"
    metric = gain_metric(evaluation)
    figure = figure_of(evaluation, frontier.selected, metric)
    value = "" if figure is None else figure.value
    change = next(p.recall_change for p in frontier.points if p.model == frontier.selected)
    return (
        f"<p class='lead'><b>{escape(frontier.selected)}</b> brings most with {budget}: {metric} {value} "
        f"per query, {frontier.recall_metric} {change:+.1%}.</p>"
    )


def _table(head: list[str], rows: list[str], *, bars: bool = False) -> str:
    cells = "".join(f"<th{' class=name' if bars or name in _TEXTS else ''}>{name}</th>" for name in head)
    return f"<div class='scroll'><table><tr>{cells}</tr>{''.join(rows)}</table></div>"


def _row(cells: list[str], *, chosen: bool = False) -> str:
    """A row of cells; those that are not cells already become one."""
    inside = "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in cells)
    return f"<tr{' class=chosen' if chosen else ''}>{inside}</tr>"


def _summary(evaluation: Evaluation) -> str:
    names = headline_metrics(evaluation)
    rows = [_row([escape(model), *_cells(evaluation, model, names)]) for model in evaluation.means]
    bounds = f" {BOUNDS}" if has_bounds(evaluation) else ""
    return _table(["model", *names], rows) + (
        "<p class='soft'>Novelty and RelevantNovel are mean counts per query, the others shares. "
        "Small print: 95 % bootstrap intervals over queries. * differs from the base with p &lt; 0.05, "
        "** with p &lt; 0.01 "
        f"(paired randomisation test, Holm-corrected over the models).{bounds}</p>"
    )


def _pairs(evaluation: Evaluation) -> str:
    """Models against each other; where they are many, only against the one that is shown."""
    shown = _shown_model(evaluation)
    metrics = list(dict.fromkeys(pair.metric for pair in evaluation.pairs))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for pair in evaluation.pairs:
        if len(evaluation.lists) <= _ALL_PAIRS or shown in (pair.first, pair.second):
            text = f"{pair.difference:+.{digits_of(pair.metric)}f}"
            is_bound = any(
                bound_of(pair.metric, evaluation.means[model], evaluation.judged)
                for model in (pair.first, pair.second)
            )
            text = f"~{text}" if is_bound else text + stars(pair.p_holm)
            rows.setdefault((pair.first, pair.second), {})[pair.metric] = text
    if not rows:
        return ""
    lines = [
        _row([f"{escape(a)} − {escape(b)}", *(cells.get(metric, "–") for metric in metrics)])
        for (a, b), cells in rows.items()
    ]
    said = "Mean differences over the queries for which both have a figure; marks as above."
    return f"<h3>Between the models</h3><p>{said}</p>" + _table(["pair", *metrics], lines)


def _cells(evaluation: Evaluation, model: str, names: list[str]) -> list[str]:
    return [_cell(figure_of(evaluation, model, name)) for name in names]


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "<td>–</td>"
    interval = "" if figure.interval is None else f"<small>{' – '.join(figure.interval)}</small>"
    return f"<td>{figure.value}{figure.mark}{interval}</td>"


def _human(evaluation: Evaluation) -> str:
    cuts, rows = sorted(evaluation.config.k), []
    names = dict.fromkeys([f"Precision@{cuts[0]}", f"Precision@{cuts[-1]}", f"RelevantNovel@{cuts[-1]}"])
    for model, figures in evaluation.human.items():
        for metric, figure in ((name, figures[name]) for name in names if name in figures):
            digits, raw = digits_of(metric), evaluation.means[model].get(metric)
            cells = [escape(model), f"<td class='name'>{metric}", "–" if raw is None else f"{raw:.{digits}f}"]
            cells += [f"{figure.value:.{digits}f}", f"{figure.low:.{digits}f} – {figure.high:.{digits}f}"]
            rows.append(_row([*cells, f"{figure.pairs:,}", f"{figure.queries:,}", f"{figure.trust:.2f}"]))
    if not rows:
        return ""
    head = ["model", "metric", "by the judge", "corrected", "95 % interval", "labels", "queries", "trust"]
    return (
        "<h2>Corrected by human labels</h2><p>What people would have measured, estimated from the judge's "
        "figures and the labels people gave to a random sample (prediction-powered inference). Where the "
        "judge's figure lies outside the interval, do not decide on it. Trust says how far the estimate "
        "leans on the judge, from 0 (not at all) to 1.</p>" + _table(head, rows)
    )


def _frontier(evaluation: Evaluation) -> str:
    frontier = evaluation.frontier
    recall = f"{frontier.recall_metric}, change from base (%)"
    pictures = []
    for metric, value_of, is_best in (
        ("Novelty", lambda p: p.novelty, lambda p: p.pareto_novelty),
        ("RelevantNovel", lambda p: p.relevant_novel, lambda p: p.pareto_relevant_novel),
    ):
        marks = [
            Mark(point.model, 100 * point.recall_change, value_of(point), is_best(point))
            for point in frontier.points
            if value_of(point) is not None
        ]
        if marks:
            budget = -100 * frontier.max_recall_drop
            chart = scatter(marks, recall, f"{metric}@{frontier.k}", line_at=budget)
            pictures.append(f"<div class='chart'>{chart}</div>")
    novelty, relevant_novel = f"Novelty@{frontier.k}", f"RelevantNovel@{frontier.k}"
    rows = []
    for point in frontier.points:
        best = (("Novelty", point.pareto_novelty), ("RelevantNovel", point.pareto_relevant_novel))
        marks_of = ", ".join(name for name, is_on in best if is_on) or "–"
        figure = figure_of(evaluation, point.model, relevant_novel)
        relevant = "–" if figure is None else figure.value
        chosen = point.model == frontier.selected
        name = escape(point.model) + (" (selected)" if chosen else "")
        cells = [name, f"{point.recall:.3f}", f"{point.recall_change:+.1%}", f"{point.novelty:.2f}", relevant]
        rows.append(_row([*cells, f"<td class='name'>{marks_of}"], chosen=chosen))
    head = ["model", frontier.recall_metric, "change", novelty, relevant_novel]
    return (
        "<h2>Novelty against recall</h2><p>Up is more that the deployed system does not return, right is "
        "more recall; the deployed model is the origin. Ringed: no other model is better in both (the Pareto "
        f"set). The dashed line is the recall budget, {frontier.max_recall_drop:.1%} below the base.</p>"
        + "".join(pictures)
        + _table([*head, "best (Pareto) in"], rows)
    )


def _merged(evaluation: Evaluation) -> str:
    names = [name for name in _MERGED if name in evaluation.means["base"]]
    rows = [_row([escape(model), *_cells(evaluation, model, names)]) for model in evaluation.means]
    config = evaluation.config
    budget = "" if config.merge_budget is None else f", at most {config.merge_budget} per query"
    return (
        f"<h2>As deployed: the merged list</h2><p>The deployed top {config.base_depth}, then the novel items "
        f"of the new model's top {max(config.k)}{budget}. Density: relevant items per query. Coverage: share "
        "of queries with a relevant item.</p>" + _table(["model", *(_MERGED[name] for name in names)], rows)
    )


def _buckets(evaluation: Evaluation) -> str:
    if not evaluation.buckets:
        return ""
    names = [name for name in _MERGED if name in evaluation.means["base"]]
    rows = []
    for bucket in evaluation.buckets:
        for place, (model, figures) in enumerate(bucket.models.items()):
            asked = f"{bucket.least:g}–{bucket.most:g}" if bucket.least < bucket.most else f"{bucket.most:g}"
            first = [bucket.name, f"{bucket.queries:,}", asked, f"{bucket.traffic:.0%}"]
            values = [
                f"{bound_of(name, figures, evaluation.judged)}{figures[name]:.{digits_of(name)}f}"
                for name in names
            ]
            rows.append(
                _row([*(first if place == 0 else [""] * 4), f"<td class='name'>{escape(model)}", *values])
            )
    head = ["bucket", "queries", "frequency", "traffic", "model", *(_MERGED[name] for name in names)]
    return (
        "<h3>By query frequency</h3><p>Queries from the most frequent down, a third of the traffic in each "
        "bucket; the last rows count every query by its frequency.</p>" + _table(head, rows)
    )


def _distribution(evaluation: Evaluation) -> str:
    others = [name for name in evaluation.lists if name != "base"]
    if not others:
        return ""
    metric, recall = gain_metric(evaluation), evaluation.config.recall_metric
    shares = {model: spread(evaluation, model) for model in others}
    widest = max(share for of in shares.values() for _, share in of)
    labels = [label for label, _ in shares[others[0]]]
    rows = [
        _row([escape(model), *(_bar_cell(share, widest, f"{share:.0%}") for _, share in of)])
        for model, of in shares.items()
    ]
    changes = []
    for model in others:
        lost, same, won = recall_spread(evaluation, model)
        changes.append(
            _row([escape(model), *(_bar_cell(share, 1.0, f"{share:.0%}") for share in (lost, same, won))])
        )
    return (
        f"<h2>How queries differ</h2><p>Share of queries by {metric}: how many such items they get.</p>"
        + _table(["model", *labels], rows, bars=True)
        + f"<p>Share of queries by {recall} against the base.</p>"
        + _table(["model", "lower", "the same", "higher"], changes, bars=True)
    )


def _groups(evaluation: Evaluation) -> str:
    metric, deepest = gain_metric(evaluation), max(evaluation.config.k)
    head = ["queries", "number", "model", "brings", "recall change", "with lower recall"]
    sections = (
        ("By length of the query", by_length(evaluation)),
        (f"By overlap of the top {deepest} with the base's", by_overlap(evaluation)),
    )
    tables = [f"<h3>{title}</h3>{_table(head, _group_rows(groups))}" for title, groups in sections if groups]
    if not tables:
        return ""
    return (
        f"<h2>Where it gains and loses</h2><p>What a model brings is its {metric}; recall is "
        f"{evaluation.config.recall_metric} against the base's, a hatched bar to the left being a loss.</p>"
        + "".join(tables)
    )


def _group_rows(groups: list[Group]) -> list[str]:
    most = max(group.gain for group in groups)
    reach = max(abs(group.recall_change) for group in groups)
    rows, before = [], ""
    for group in groups:
        if group.queries:
            cells = [group.label if group.label != before else "", f"{group.queries:,}"]
            cells += [
                f"<td class='name'>{escape(group.model)}",
                _bar_cell(group.gain, most, f"{group.gain:.2f}"),
            ]
            cells += [_change_cell(group.recall_change, reach), f"{group.lost:.0%}"]
            rows.append(_row(cells))
            before = group.label
    return rows


def _bar_cell(value: float, most: float, text: str) -> str:
    width = round(60 * value / most) if most > 0 else 0
    return f"<td class='bars'>{_bar(width, 'bar')}{text}</td>"


def _bar(width: int, kind: str) -> str:
    return f"<span class='{kind}' style='width:{width}px'></span>" if width else ""


def _change_cell(value: float, reach: float) -> str:
    """A bar to the left of a middle line, hatched, for a loss, and to its right for a gain."""
    width = round(58 * abs(value) / reach) if reach > 0 else 0
    bar = _bar(width, "bar loss" if value < 0 else "bar")
    left, right = (bar, "") if value < 0 else ("", bar)
    sides = f"<span class='zero'>{left}</span>|<span class='zero' style='text-align:left'>{right}</span>"
    return f"<td class='bars'>{sides} {value:+.3f}</td>"


def _provenance(evaluation: Evaluation) -> str:
    lines = "".join(f"<pre><code>{escape(line)}</code></pre>" for line in commands(evaluation))
    rows = [
        _row([escape(name), f"<td class='name'><code>{value}</code>"])
        for name, value in evaluation.inputs.items()
    ]
    return (
        f"<h2>Where these figures come from</h2><p>novelret {version('novelret')}. The commands that make "
        f"them again:</p>{lines}" + _table(["input", "fingerprint"], rows)
    )
