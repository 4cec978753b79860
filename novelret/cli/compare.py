"""`novelret compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from novelret.cli.options import (
    ConfigOption,
    DataOption,
    DeviceOption,
    IgnoreIdenticalOption,
    IndexOption,
    JsonOption,
    QuietOption,
    reporter,
    show_result,
)
from novelret.progress import shown

EXAMPLES = """
[bold]examples:[/]

  novelret compare --data my-data --index runs/index --model pg-ret=runs/pg-ret --judgements judgements.tsv

  novelret compare --data my-data --index runs/index --model pg-ret=runs/pg-ret --most lost --queries 10

  novelret compare --data my-data --index runs/index --model pg-ret=runs/pg-ret --query-id q17 --query-id q23
"""


def compare(
    data: DataOption,
    index: IndexOption,
    model: Annotated[str, typer.Option(help="MODEL or NAME=MODEL to show beside the base.")],
    split: Annotated[str, typer.Option(help="Whose queries are shown.")] = "test",
    query_ids: Annotated[
        list[str] | None, typer.Option("--query-id", help="A query to show; may be repeated.")
    ] = None,
    most: Annotated[
        str, typer.Option(help="Without --query-id: the queries that gained or lost most.")
    ] = "gained",
    queries: Annotated[int, typer.Option(help="How many of those.")] = 5,
    judgements: Annotated[
        Path | None,
        typer.Option(help="Qrels, LABELS or a REPORT with a judge, to mark what is relevant."),
    ] = None,
    missing: Annotated[
        str, typer.Option(help="A pair that the qrels do not list is unknown or irrelevant.")
    ] = "unknown",
    k: Annotated[int, typer.Option(help="Items to show of each list.")] = 10,
    base_depth: Annotated[int, typer.Option(help="L: items beyond the deployed top L are novel.")] = 50,
    device: DeviceOption = "auto",
    ignore_identical_ids: IgnoreIdenticalOption = True,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """Show base and model side by side for queries of a split, novel and relevant items marked."""
    from novelret.evaluate.compare import CompareConfig, compare_split

    settings = CompareConfig(
        data=data,
        index=str(index),
        model=model,
        split=split,
        query_ids=tuple(query_ids or ()),
        most=most,
        queries=queries,
        judgements=str(judgements) if judgements else None,
        missing=missing,
        k=k,
        base_depth=base_depth,
        device=device,
        ignore_identical_ids=ignore_identical_ids,
    )
    compared = compare_split(settings, reporter(quiet))
    gained = f"{'RelevantNovel' if judgements else 'Novelty'}@{base_depth}"

    def render(console: Console) -> None:
        if not compared:
            console.print(f"no query {most} ({gained if most == 'gained' else f'Recall@{base_depth}'})")
            return
        for query in compared:
            title = f"{query['text']} ({query['id']})"
            change = query["recall_change"]
            recall = "no feedback" if change is None else f"Recall@{base_depth} {change:+.2f}"
            figures = f"{gained} {query['gain']}, {recall}"
            console.print(f"[bold]{shown(title)}[/]  {figures}", highlight=False, soft_wrap=True)
            console.print(lists_table(query["results"], base_depth))
        console.print(
            f"+ novel: not in the deployed top {base_depth}; ✓ relevant, ✗ not; ● held-out feedback",
            style="dim",
        )

    show_result({"base_depth": base_depth, "queries": compared}, as_json=as_json, render=render)


def lists_table(results: dict[str, list[dict[str, Any]]], base_depth: int) -> Table:
    """Lists side by side: marks, texts, scores and, for a model's, the rank in base."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), expand=True)
    for name in results:
        table.add_column("#", justify="right", no_wrap=True)
        table.add_column(escape(name), ratio=1)
        table.add_column("score", justify="right", no_wrap=True)
        if name != "base":
            table.add_column("in base", justify="right", no_wrap=True)
    for place in range(max(len(hits) for hits in results.values())):
        cells: list[str] = []
        for name, hits in results.items():
            width = 3 if name == "base" else 4
            cells += _cells(hits[place], place, base_depth)[:width] if place < len(hits) else [""] * width
        table.add_row(*cells)
    return table


def _cells(hit: dict[str, Any], place: int, base_depth: int) -> list[str]:
    relevant = {True: "✓", False: "✗"}.get(hit.get("relevant"), "")  # type: ignore[arg-type]
    marks = ("+" if hit["novel"] else "") + relevant + ("●" if hit.get("feedback") else "")
    text = f"{marks} {shown(hit['text'][:160])}" if marks else shown(hit["text"][:160])
    rank = f">{base_depth}" if hit["base_rank"] is None else str(hit["base_rank"])
    marked = f"[bold]{text}[/]" if hit["novel"] else text
    return [str(hit.get("rank", place + 1)), marked, f"{hit['score']:.3f}", rank]
