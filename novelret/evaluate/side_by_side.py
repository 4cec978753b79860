"""The report's lists side by side: the queries that gained and lost most, as in the paper's Table 3."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import numpy as np

from novelret.evaluate.breakdown import gain_metric
from novelret.evaluate.metrics.novelty import novel
from novelret.label.table import IRRELEVANT, RELEVANT

if TYPE_CHECKING:
    from novelret.evaluate.evaluate import Evaluation

_SHOWN_QUERIES = 5
_SHOWN_ITEMS = 10
_FIRST_NOVEL = 5


def side_by_side(evaluation: Evaluation, model: str) -> str:
    """Base and model for the queries that gained most and those that lost most recall."""
    metric, recall = gain_metric(evaluation), evaluation.config.recall_metric
    change = evaluation.per_query[model][metric] - evaluation.per_query["base"][metric]
    loss = evaluation.per_query[model][recall] - evaluation.per_query["base"][recall]
    gained = [q for q in np.argsort(-change, kind="stable")[:_SHOWN_QUERIES] if change[q] > 0]
    lost = [q for q in np.argsort(loss, kind="stable")[:_SHOWN_QUERIES] if loss[q] < 0]
    parts = [
        f"<h2>Side by side: base and {escape(model)}</h2>",
        "<p>+ novel (and bold), ✓ judged relevant, ✗ judged not relevant, ● held-out feedback; the rank in "
        f"base stands behind an item that the base has, too. The top {_SHOWN_ITEMS} of each list, and the "
        "model's first novel items below.</p>",
    ]
    if gained:
        parts.append(f"<h3>Most gained ({metric})</h3>")
        parts += [_query(evaluation, model, int(q), f"{change[q]:+g}") for q in gained]
    if lost:
        parts.append(f"<h3>Most lost ({recall})</h3>")
        parts += [_query(evaluation, model, int(q), f"{loss[q]:+.2f}") for q in lost]
    return "".join(parts) if gained or lost else ""


def _query(evaluation: Evaluation, model: str, query: int, figure: str) -> str:
    columns = "".join(
        f"<div><b>{escape(name)}</b><ol>{_items(evaluation, name, query)}</ol></div>"
        for name in ("base", model)
    )
    text = escape(evaluation.split.query_texts[query][:300])
    title = f"<p class='query'><b>{text}</b> <span class='soft'>{figure}</span></p>"
    return f"{title}<div class='pair'>{columns}</div>"


def _items(evaluation: Evaluation, name: str, query: int) -> str:
    """List items: the top of the list and, for a model, its first novel items below that."""
    split, lists = evaluation.split, evaluation.lists[name]
    deployed = evaluation.deployed.rows[query : query + 1]
    feedback = set(split.feedback_items[split.feedback_queries == query].tolist())
    rank_in_base = {row: place + 1 for place, row in enumerate(evaluation.base.rows[query].tolist())}
    new = novel(lists.rows[query : query + 1], deployed)[0]
    places = np.flatnonzero(lists.rows[query, :_SHOWN_ITEMS] >= 0).tolist()
    if name != "base":
        places += [place for place in np.flatnonzero(new).tolist() if place >= _SHOWN_ITEMS][:_FIRST_NOVEL]
    rows = lists.rows[query, places]
    shown = []
    for place, row, text in zip(places, rows.tolist(), evaluation.index.catalog.texts_at(rows), strict=True):
        marks = ("+" if new[place] else "") + ("●" if row in feedback else "")
        marks += {RELEVANT: "✓", IRRELEVANT: "✗"}.get(int(lists.verdicts[query, place]), "")
        rank = f" <small>base {rank_in_base[row]}</small>" if name != "base" and row in rank_in_base else ""
        style = " class='novel'" if new[place] else ""
        shown.append(f"<li value='{place + 1}'{style}>{escape(text[:160])} {marks}{rank}</li>")
    return "".join(shown)
