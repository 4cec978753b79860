"""The command line: arguments, messages and exit codes; one file per subcommand, nothing else.

Stages are imported inside the commands, so that `--help` and typing errors answer at once.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import sqlite3
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from novelret.cli import agreement, compare, convert, demo, export, index, label, recipe, search, train
from novelret.cli import eval as eval_command
from novelret.cli.options import error_console, is_first_process
from novelret.errors import UserError
from novelret.progress import shown

_INTERRUPTED = "interrupted; what is finished is kept, the same command goes on from there"

_STORES = "it is --store, NOVELRET_STORE or NOVELRET_EMBEDDINGS, else ~/.cache/novelret"

app = typer.Typer(
    name="novelret",
    help="Finetune a deployed dense retriever for novelty: relevant items that it does not already return.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("novelret"))
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass


app.command("index", epilog=index.EXAMPLES)(index.index)
app.command("label", epilog=label.EXAMPLES)(label.label)
app.command("agreement", epilog=agreement.EXAMPLES)(agreement.agreement)
app.command("train", epilog=train.EXAMPLES)(train.train)
app.command("eval", epilog=eval_command.EXAMPLES)(eval_command.evaluate)
app.command("search", epilog=search.EXAMPLES)(search.search)
app.command("compare", epilog=compare.EXAMPLES)(compare.compare)
app.command("export", epilog=export.EXAMPLES)(export.export)
app.add_typer(recipe.app, name="recipe", epilog=recipe.EXAMPLES)
app.add_typer(convert.app, name="convert", epilog=convert.EXAMPLES)
app.command("demo", epilog=demo.EXAMPLES)(demo.demo)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 when done or stopped at a cap, 1 when a judge did not get to answer all of it, 2 when the user's
        input is wrong, 3 when batches are left under way (--no-wait), 130 when interrupted, 1 for anything
        else.
    """
    for stream in (sys.stdout, sys.stderr):  # one that cannot show a sign shows another
        if isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name != "utf-8":
            stream.reconfigure(errors="replace")
    for argument in sys.argv[1:] if arguments is None else arguments:
        if not argument.isascii() and argument.encode("utf-8", "replace").decode() != argument:
            return _fail(f"{argument!a}: is not UTF-8; type it anew, or rename what it names", 2)
    try:
        app(arguments, standalone_mode=True)
    except SystemExit as stop:
        if _was_interrupted(stop):
            return _fail(_INTERRUPTED, 130)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except UserError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail(_INTERRUPTED, 130)
    except Exception as error:
        if _disk_is_full(error):
            where = getattr(error, "filename", None) or "the output"
            return _fail(f"{where}: no space left on the device; free some and run again", 2)
        if type(error) in (sqlite3.OperationalError, sqlite3.DatabaseError):
            return _fail(f"a store of answers or embeddings cannot be used ({error}); {_STORES}", 2)
        raise
    return 0


def run() -> None:
    """Entry point of the `novelret` script."""
    sys.exit(main())


def _was_interrupted(stop: SystemExit) -> bool:
    """Whether Ctrl-C is behind an exit: typer makes a silent one of it, or an "Aborted!" in some versions."""
    error: BaseException | None = stop
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _disk_is_full(error: Exception) -> bool:
    """Whether a write failed for want of space; safetensors, SQLite and numpy say so in words alone."""
    words = ("No space left on device", "database or disk is full", " requested and ")
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of the disk, the user's part of it, or a single file
    return getattr(error, "errno", None) in full or any(word in str(error) for word in words)


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split())  # messages quote files that may hold anything
    # Of several processes each says its own: on another machine a file may be missing, or a GPU be full.
    who = "" if is_first_process() else f" process {os.environ['RANK']}:"
    error_console().print(f"[bold red]error:[/]{who} {shown(line)}", soft_wrap=True, highlight=False)
    return code
