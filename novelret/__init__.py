"""Finetune a deployed dense retriever for novelty.

The four stages as functions, each with its settings; what they make is the same as from the command line:

    from novelret import EvalConfig, IndexConfig, LabelConfig, TrainConfig
    from novelret import build_index, build_labels, evaluate_models, train_model
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "IndexConfig": "novelret.build",
    "build_index": "novelret.build",
    "open_index": "novelret.index",
    "AppendConfig": "novelret.append",
    "append_items": "novelret.append",
    "LabelConfig": "novelret.label.label",
    "build_labels": "novelret.label.label",
    "measure_agreement": "novelret.label.agreement",
    "TrainConfig": "novelret.train.config",
    "train_model": "novelret.train.trainer",
    "EvalConfig": "novelret.evaluate.config",
    "evaluate_models": "novelret.evaluate.evaluate",
    "Reporter": "novelret.progress",
    "UserError": "novelret.errors",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    # Imported when asked for: `novelret --help` needs neither torch nor transformers.
    if name not in _HOMES:
        raise AttributeError(f"module 'novelret' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
