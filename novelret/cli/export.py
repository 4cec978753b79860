"""`novelret export`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from novelret.cli.options import ConfigOption, ForceOption, JsonOption, QuietOption, reporter, show_result

EXAMPLES = """
[bold]examples:[/]

  novelret export --model runs/model --format onnx --out serving/query-encoder

  novelret export --model runs/adapter --format npz --out serving/adapter.npz
"""


def export(
    model: Annotated[
        Path, typer.Option(help="MODEL made by `novelret train`, or any sentence-transformers folder.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to make, for npz the file.")],
    form: Annotated[
        str,
        typer.Option(
            "--format", help="st (sentence-transformers), onnx, or npz (the arrays of an adapter or memory)."
        ),
    ] = "st",
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """Write a query encoder for serving, checked against the original."""
    from novelret.export.export import export_model

    made = export_model(model, form, out, force=force, report=reporter(quiet))

    def render(console: Console) -> None:
        console.print(
            f"[bold]{escape(str(out))}[/]: {made.dimension} dimensions, differs from the original by at most "
            f"{made.difference:.1e}",
            soft_wrap=True,
        )
        if form == "npz":
            moved = "query" if not made.keys else "(query + softmax(query @ keys.T) @ values)"
            console.print(
                f"new = {moved} @ matrix; where `normalize` is set, divide by the length before and after",
                style="dim",
                soft_wrap=True,
            )

    show_result(asdict(made), as_json=as_json, render=render)
