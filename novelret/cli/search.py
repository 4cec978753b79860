"""`novelret search`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from novelret.cli.compare import lists_table
from novelret.cli.options import (
    ConfigOption,
    DataOption,
    DeviceOption,
    IndexOption,
    JsonOption,
    QuietOption,
    reporter,
    show_result,
)
from novelret.errors import UserError
from novelret.progress import shown

EXAMPLES = """
[bold]examples:[/]

  novelret search --data my-data --index runs/index --model pg-ret=runs/pg-ret "grey settee"
"""


def search(
    query: Annotated[str, typer.Argument(help="What to look for.")],
    data: DataOption,
    index: IndexOption,
    model: Annotated[str | None, typer.Option(help="MODEL or NAME=MODEL to show beside the base.")] = None,
    k: Annotated[int, typer.Option(help="Items to show.")] = 10,
    base_depth: Annotated[int, typer.Option(help="L: items beyond the deployed top L are novel.")] = 50,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """Show base and model side by side for one query, with the novel items marked."""
    if not query.strip():
        raise UserError("the query is empty")
    from novelret.evaluate.compare import compare_query

    results = compare_query(
        data, index, model, query, k=k, base_depth=base_depth, device=device, report=reporter(quiet)
    )

    def render(console: Console) -> None:
        console.print(f"[bold]{shown(query)}[/]", highlight=False, soft_wrap=True)
        console.print(lists_table(results, base_depth))
        if len(results) > 1:
            console.print(f"+ novel: not in the deployed top {base_depth}", style="dim")

    show_result(
        {"query": query, "base_depth": base_depth, "results": results}, as_json=as_json, render=render
    )
