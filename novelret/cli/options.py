"""Options that every subcommand shares, and how results are shown."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from novelret.errors import BatchesUnderWay, UserError
from novelret.progress import Reporter
from novelret.yaml_file import read_yaml

if TYPE_CHECKING:
    from novelret.label.judge import Asking

_WIDEST = 10_000  # columns
_UNDER_WAY = 3  # exit code: nothing is wrong, but the artifact is not made yet


def error_console() -> Console:
    """The console on stderr, where everything but results goes."""
    return Console(stderr=True, emoji=False)  # a model's name like "a:m:" is no picture


def is_first_process() -> bool:
    """Whether this process speaks; of those that `torchrun` starts, one does."""
    return os.environ.get("RANK", "0") == "0"


def reporter(quiet: bool) -> Reporter:
    """A reporter that speaks on stderr."""
    return Reporter(quiet=quiet, console=error_console()) if is_first_process() else Reporter()


def settings_among(arguments: dict[str, Any], config: type[Asking]) -> dict[str, Any]:
    """Those of a command's arguments that a stage's configuration holds, as it holds them."""
    names = {field.name for field in fields(config)}
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in arguments.items()
        if name in names
    }


def joined(folders: list[Path]) -> str | tuple[str, ...]:
    """One INDEX or LABELS or several, as the settings hold them."""
    return str(folders[0]) if len(folders) == 1 else tuple(map(str, folders))


def show_result(result: dict[str, Any], *, as_json: bool, render: Callable[[Console], None]) -> None:
    """Print a command's result on stdout: as one JSON object, or rendered for people."""
    if not is_first_process():
        return
    try:
        if as_json:
            typer.echo(json.dumps(result, default=str))
        else:
            render(_Output(emoji=False))
    except BrokenPipeError:
        _leave_pipe()


class _Output(Console):
    def on_broken_pipe(self) -> None:
        """Not as rich does, which makes a failure of it."""
        _leave_pipe()


def print_whole(console: Console, table: Table) -> None:
    """Print a table with no figure cut off: what is wider than the terminal is left for it to break."""
    needed = Measurement.get(console, console.options.update(max_width=_WIDEST), table).maximum
    if needed > console.width:
        table.width = needed
    console.print(table, soft_wrap=True)


def _leave_pipe() -> None:
    """Whoever read the result has read enough; the work is done, and written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leave_batches(artifact: str, waiting: BatchesUnderWay, *, as_json: bool) -> typer.Exit:
    """Say which batches are under way, for which there is no artifact yet; the exit that tells it."""
    words = str(waiting)
    show_result(
        {artifact: None, "batches": waiting.batches, "requests_under_way": waiting.requests},
        as_json=as_json,
        render=lambda console: console.print(words),
    )
    return typer.Exit(_UNDER_WAY)


def _load_config(context: typer.Context, path: Path | None) -> Path | None:
    """Let a YAML file fill in options that are not given as flags.

    Its keys are option names; a file for the whole chain holds them under the subcommands' names.
    """
    if path is None:
        return None
    values = read_yaml(path)
    command = str(context.info_name)
    if isinstance(values, dict) and isinstance(values.get(command), dict):
        values = _section(path, values, command)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected option names and values, like `depth: 200`")
    names, repeated = {}, set()
    for parameter in context.command.params:
        names[str(parameter.name)] = parameter.name  # config.yaml of an output names settings, not flags
        for flag in parameter.opts:
            name = flag.lstrip("-").replace("-", "_")
            names[name] = parameter.name
            if getattr(parameter, "multiple", False):
                names[name + "s"] = parameter.name  # as the settings in config.yaml call it
                repeated |= {name, name + "s"}
    unknown = [key for key in values if str(key).replace("-", "_") not in names]
    if unknown:
        flags = {flag for parameter in context.command.params for flag in parameter.opts}
        options = ", ".join(sorted(flag[2:] for flag in flags - {"--config", "--help"} if flag[:2] == "--"))
        raise UserError(
            f"{path}: unknown option {unknown[0]!r} for `novelret {command}` (it knows: {options})"
        )
    given = _given_once(path, values, names)
    for key in repeated & given.keys():
        if given[key] is not None:
            given[key] = given[key] if isinstance(given[key], list) else [given[key]]
    found = {str(names[key]): value for key, value in given.items()}
    _check_values(context, path, found)
    context.default_map = {**(context.default_map or {}), **found}
    return path


def _section(path: Path, values: dict[str, Any], command: str) -> Any:
    """A command's section of a file for the whole chain."""
    beside = next((key for key, value in values.items() if not isinstance(value, dict | None)), None)
    if beside is not None:
        raise UserError(
            f"{path}: {beside!r} stands outside the commands' sections, where nothing reads it; move it into "
            f"{command!r}, or wherever it belongs"
        )
    return values[command]


def _given_once(path: Path, values: dict[Any, Any], names: dict[str, str]) -> dict[str, Any]:
    """Option name → value; two names of one option are refused."""
    given: dict[str, Any] = {}
    keys: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if names[name] in keys:
            raise UserError(f"{path}: {keys[names[name]]!r} and {key!r} are one option; keep one of them")
        given[name], keys[names[name]] = value, key
    return given


def _check_values(context: typer.Context, path: Path, found: dict[str, Any]) -> None:
    """Refuse a value that is none of its option's, which typer would lay at the command line's door."""
    for parameter in context.command.params:
        value = found.get(str(parameter.name))
        try:
            if value is not None:
                parameter.process_value(context, value)
        except Exception as error:
            said = " ".join(str(getattr(error, "message", error)).split())
            raise UserError(f"{path}: {parameter.opts[0].lstrip('-')}: {value!r}: {said}") from None


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", help="YAML file with options; flags override it.", is_eager=True, callback=_load_config
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and notes, only warnings.")]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Replace an existing output, once the new is whole.")
]
JUDGE = "Judge"
"""The panel of --help that holds these."""
MissingOption = Annotated[
    str,
    typer.Option(
        "--missing",
        help="A pair that the judge's file does not list is unknown or irrelevant.",
        rich_help_panel=JUDGE,
    ),
]
PromptOption = Annotated[
    str,
    typer.Option(
        "--prompt",
        help="query-keyword, query-document, user-product or a YAML file. The judge sees the first 2,000 "
        "characters of a query and of an item.",
        rich_help_panel=JUDGE,
    ),
]
AnswerOption = Annotated[
    str | None,
    typer.Option(
        "--answer",
        help="Read answers as word, tag, grade or json, over the prompt's own way.",
        rich_help_panel=JUDGE,
    ),
]
ThresholdOption = Annotated[
    float | None,
    typer.Option(
        "--threshold",
        help="Lowest grade or score that is relevant. (default: the prompt's; 0.5 for a cross-encoder; above "
        "0 in a file)",
        rich_help_panel=JUDGE,
    ),
]
RetryUnusableOption = Annotated[
    bool,
    typer.Option(
        "--retry-unusable",
        help="Ask again where the stored answer cannot be read.",
        rich_help_panel=JUDGE,
    ),
]
StoreOption = Annotated[
    Path | None,
    typer.Option(
        "--store",
        help="Judgement store. (default: NOVELRET_STORE, else the user's cache)",
        rich_help_panel=JUDGE,
    ),
]
MaxCostOption = Annotated[
    float | None,
    typer.Option("--max-cost", help="Stop asking before so many dollars.", rich_help_panel=JUDGE),
]
MaxRequestsOption = Annotated[
    int | None,
    typer.Option("--max-requests", help="Stop asking before more requests.", rich_help_panel=JUDGE),
]
PriceOption = Annotated[
    str | None,
    typer.Option(
        "--price",
        help="INPUT,OUTPUT dollars per million tokens, over the built-in table. Taken as it is, also for "
        "batches: give what a batch costs.",
        rich_help_panel=JUDGE,
    ),
]
ConcurrencyOption = Annotated[
    int, typer.Option("--concurrency", help="Requests under way at once.", rich_help_panel=JUDGE)
]
TimeoutOption = Annotated[
    float, typer.Option("--timeout", help="Seconds for one request.", rich_help_panel=JUDGE)
]
RpmOption = Annotated[
    float | None,
    typer.Option(
        "--rpm", help="Requests per minute. (default: as the endpoint tells)", rich_help_panel=JUDGE
    ),
]
TpmOption = Annotated[
    float | None,
    typer.Option("--tpm", help="Tokens per minute. (default: as the endpoint tells)", rich_help_panel=JUDGE),
]
WaitOption = Annotated[
    bool,
    typer.Option(
        "--wait/--no-wait",
        help="Stay until batches are answered, or submit, leave and run again later.",
        rich_help_panel=JUDGE,
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
DataOption = Annotated[
    str,
    typer.Option(
        "--data", help="BEIR folder (corpus.jsonl, queries.jsonl, qrels/) or Hugging Face data set."
    ),
]
IndexesOption = Annotated[
    list[Path],
    typer.Option(
        "--index",
        help="INDEX made by `novelret index`; several pool the top lists of several deployed models.",
    ),
]
IndexOption = Annotated[Path, typer.Option("--index", help="INDEX made by `novelret index`.")]
IgnoreIdenticalOption = Annotated[
    bool,
    typer.Option(
        "--ignore-identical-ids/--no-ignore-identical-ids",
        help="Leave the item whose id is the query's own out of rankings and feedback, as BEIR does "
        "(the default); with --no- in front, keep it.",
        rich_help_panel="Queries that are items",  # in a panel with others its length would squeeze them
        show_default=False,
    ),
]
