"""`novelret index`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from novelret.cli.options import (
    ConfigOption,
    DataOption,
    DeviceOption,
    ForceOption,
    JsonOption,
    QuietOption,
    reporter,
    show_result,
)

EXAMPLES = """
[bold]examples:[/]

  novelret index --data my-data --model sentence-transformers/all-MiniLM-L6-v2 --out runs/index

  novelret index --data my-data --model ./items --query-model ./queries --dtype float16 --out runs/index
"""


def index(
    data: DataOption,
    model: Annotated[str, typer.Option(help="The deployed encoder: a folder or a hub id.")],
    out: Annotated[Path, typer.Option(help="The INDEX folder to make.")],
    query_model: Annotated[
        str | None, typer.Option(help="The deployed query encoder, where it is another model.")
    ] = None,
    factory: Annotated[str, typer.Option(help="faiss index factory string; Flat is exact.")] = "Flat",
    dtype: Annotated[str, typer.Option(help="How embeddings are stored: float32 or float16.")] = "float32",
    batch_size: Annotated[int, typer.Option(help="Texts per forward pass.")] = 64,
    device: DeviceOption = "auto",
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """Encode the catalog with the deployed encoder: the frozen item side everything else works against."""
    from novelret.index import IndexConfig, build_index

    settings = IndexConfig(data, model, query_model, factory, dtype, batch_size, device)
    made = build_index(settings, out, force=force, report=reporter(quiet))
    result = {"index": str(out), "fingerprint": made.manifest.fingerprint, **made.manifest.facts}

    def render(console: Console) -> None:
        facts = made.manifest.facts
        console.print(f"[bold]{out}[/]: {facts['items']:,} items x {facts['dimension']} dimensions ({dtype})")

    show_result(result, as_json=as_json, render=render)
