"""`cross-encoder:MODEL`: a sentence-transformers CrossEncoder, for free labels on one's own machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import CrossEncoder

from novelret.encode import fingerprint_weights, hush_libraries, pick_device
from novelret.errors import UserError, first_line
from novelret.label.questions import Messages, Question, Tally
from novelret.label.store import Store
from novelret.label.table import IRRELEVANT, RELEVANT, UNKNOWN

_AT_ONCE = 2_048  # pairs scored before their scores are stored
_BATCH = 32


def load_cross_encoder(name: str, device: str) -> CrossEncoder:
    """Load a cross-encoder with one output from a folder or by its hub id.

    Raises:
        UserError: it cannot be read, is another kind of model, or gives other than one score.
    """
    is_path = Path(name).exists() or name.startswith((".", "/", "~"))
    if is_path and not (Path(name) / "config.json").is_file():
        raise UserError(f"{name}: holds no cross-encoder (no config.json)")
    hush_libraries()
    try:
        model = CrossEncoder(name, device=pick_device(device))
    except UserError:
        raise
    except Exception as error:  # whatever the libraries raise on a broken model, the user needs one line
        raise UserError(f"{name}: the cross-encoder cannot be read ({first_line(error)})") from None
    if getattr(model[0], "transformer_task", None) == "sequence-classification":
        made_as = model.config.architectures or []
        if not any(kind.endswith("ForSequenceClassification") for kind in made_as):
            # The library has put a random head on it.
            raise UserError(f"{name}: is no cross-encoder but {', '.join(made_as) or 'of no known kind'}")
    if model.num_labels != 1:
        raise UserError(f"{name}: gives {model.num_labels} scores for a pair; a judge needs a model with one")
    return model


def fingerprint(model: CrossEncoder) -> str:
    """Identity of what decides a score: a folder's path may come to hold another model."""
    return f"{fingerprint_weights(model)}-{model.max_seq_length}"


def render_pair(query: str, item: str) -> Messages:
    """The pair as it is; a cross-encoder follows no instructions."""
    return [{"query": query, "item": item}]


def read_score(answer: str, threshold: float) -> tuple[int, float | None]:
    """(verdict, grade) of a stored score, which is the grade: 0 to 1."""
    try:
        score = float(answer)
    except ValueError:
        return UNKNOWN, None
    return (RELEVANT if score >= threshold else IRRELEVANT), score


def score_all(
    questions: Iterator[Question | None],
    name: str,
    model: CrossEncoder,
    store: Store,
    tally: Tally,
    advance: Callable[[int], None],
) -> None:
    """Score every question that the caps allow and store the scores, 0 to 1, some thousand at a time.

    Raises:
        UserError: a score is not finite.
    """
    wanted = (question for question in questions if question is not None)
    while not tally.halt.is_set() and (
        new := {question.key: question for question in islice(wanted, _AT_ONCE)}
    ):
        some = [question for count, question in enumerate(new.values(), 1) if not tally.reached(count, 0.0)]
        tally.stopped = tally.stopped or tally.reached(len(new), 0.0)
        if not some:
            return
        pairs = [(q.messages[0]["query"], q.messages[0]["item"]) for q in some]
        # The logistic function whatever the model's own default: one threshold means the same for all.
        scores: np.ndarray = model.predict(
            pairs, batch_size=_BATCH, show_progress_bar=False, activation_fn=torch.nn.Sigmoid()
        )
        if not np.isfinite(scores).all():
            raise UserError(f"cross-encoder:{name}: gives scores that are not finite; the model is broken")
        texts = [f"{score:.6f}" for score in scores.astype(np.float64)]
        store.add(f"cross-encoder:{name}", [(q.key, t, None, None) for q, t in zip(some, texts, strict=True)])
        tally.requests += len(some)
        advance(len(some))
