"""The command line and the library name each default once more: here they are held against each other."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest

import novelret
from novelret.cli import compare, convert, index, label, train
from novelret.cli import eval as eval_command
from novelret.convert.orcas import convert_orcas
from novelret.convert.query_keyword import convert_query_keyword
from novelret.convert.recformer import convert_recformer
from novelret.evaluate.compare import CompareConfig


@pytest.mark.parametrize(
    ("command", "settings", "as_typed"),
    [
        # Left out, these two are as the index that is appended to.
        (index.index, novelret.IndexConfig, {"factory": None, "dtype": None}),
        (label.label, novelret.LabelConfig, {"sources": None}),
        (train.train, novelret.TrainConfig, {}),
        (eval_command.evaluate, novelret.EvalConfig, {"k": "10,20,50", "models": None, "runs": None}),
        (compare.compare, CompareConfig, {"query_ids": None}),
    ],
    ids=["index", "label", "train", "eval", "compare"],
)
def test_a_flag_left_out_is_the_librarys_default(
    command: Callable[..., Any], settings: Any, as_typed: dict[str, Any]
):
    fields = {field.name: field.default for field in dataclasses.fields(settings)}
    fields = {name: value for name, value in fields.items() if value is not dataclasses.MISSING} | as_typed
    flags = {name: flag.default for name, flag in inspect.signature(command).parameters.items()}
    both = flags.keys() & fields.keys()
    assert len(both) >= 5
    assert {name: flags[name] for name in both} == {name: fields[name] for name in both}


@pytest.mark.parametrize(
    ("command", "function"),
    [
        (convert.orcas, convert_orcas),
        (convert.query_keyword, convert_query_keyword),
        (convert.recformer, convert_recformer),
    ],
    ids=lambda value: value.__name__,
)
def test_a_converters_flag_left_out_is_the_librarys_default(
    command: Callable[..., Any], function: Callable[..., Any]
):
    flags, arguments = inspect.signature(command).parameters, inspect.signature(function).parameters
    both = flags.keys() & arguments.keys()
    both = {name for name in both if arguments[name].default is not inspect.Parameter.empty}
    assert "force" in both
    assert {name: flags[name].default for name in both} == {name: arguments[name].default for name in both}
