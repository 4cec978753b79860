"""`novelret search`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from novelret.cli.options import (
    ConfigOption,
    DataOption,
    DeviceOption,
    IndexOption,
    JsonOption,
    QuietOption,
    show_result,
)
from novelret.errors import UserError

EXAMPLES = """
[bold]examples:[/]

  novelret search --data my-data --index runs/index --model pg-ret=runs/pg-ret "grey settee"
"""


def search(
    query: Annotated[str, typer.Argument(help="What to look for.")],
    data: DataOption,
    index: IndexOption,
    model: Annotated[str | None, typer.Option(help="NAME=MODEL to show beside the base.")] = None,
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

    results = compare_query(data, index, model, query, k=k, base_depth=base_depth, device=device)

    def render(console: Console) -> None:
        table = Table(title=escape(query), title_justify="left", show_lines=False)
        for name in results:
            table.add_column(escape(name))
            table.add_column("score", justify="right")
            if name != "base":
                table.add_column("rank in base", justify="right")
        columns = list(results.items())
        for place in range(max(len(hits) for hits in results.values())):
            cells: list[str] = []
            for name, hits in columns:
                if place >= len(hits):
                    cells += [""] * (2 if name == "base" else 3)
                    continue
                hit = hits[place]
                mark = "[bold]+ [/]" if hit["novel"] else "  "
                cells += [f"{mark}{escape(hit['text'])}", f"{hit['score']:.3f}"]
                if name != "base":
                    cells.append(
                        f"beyond {base_depth}" if hit["base_rank"] is None else str(hit["base_rank"])
                    )
            table.add_row(*cells)
        console.print(table)
        if len(results) > 1:
            console.print(f"+ novel: not in the deployed top {base_depth}", style="dim")

    show_result(
        {"query": query, "base_depth": base_depth, "results": results}, as_json=as_json, render=render
    )
