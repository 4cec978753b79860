"""Adapters behind the deployed encoder: embeddings without encoding anew, and only where that is right."""

import copy
import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize

from novelret import adapted, encode, index
from novelret.data.split import load_split
from novelret.evaluate.config import EvalConfig
from novelret.evaluate.evaluate import evaluate_models
from novelret.progress import Reporter
from novelret.train.config import TrainConfig
from novelret.train.trainer import train_model

TEXTS = ["red car", "buy blue", "green house", "red", "buy a yellow boat"]


def with_adapter(deployed: SentenceTransformer, *, bias: bool = False, drop: int = 0) -> SentenceTransformer:
    """The deployed encoder, less its last modules, with a random residual map behind it."""
    torch.manual_seed(1)
    dense = Dense(16, 16, bias=bias, activation_function=torch.nn.Identity(), use_residual=True)
    return SentenceTransformer(modules=[*[*deployed][: len(deployed) - drop], dense, Normalize()])


def shortened(deployed: SentenceTransformer) -> SentenceTransformer:
    """The deployed encoder without its Normalize module."""
    return SentenceTransformer(modules=[*deployed][:-1])


def test_embeddings_behind_the_deployed_ones_equal_encoding_anew(encoder: Path) -> None:
    deployed = encode.load_encoder(encoder)
    for base in (deployed, shortened(deployed)):
        model = with_adapter(base)
        behind = adapted.modules_behind(model, base)
        assert behind is not None
        assert [type(module) for module in behind] == [Dense, Normalize]
        embeddings = encode.encode_queries(base, TEXTS)
        found = adapted.embed_behind(behind, embeddings, normalized=True, device="cpu")
        np.testing.assert_allclose(found, encode.encode_queries(model, TEXTS), atol=1e-6)
        assert np.abs(found - embeddings).max() > 0.01  # the adapter does something


def test_the_deployed_encoder_itself_has_nothing_behind(encoder: Path) -> None:
    assert adapted.modules_behind(encode.load_encoder(encoder), encode.load_encoder(encoder)) == []


def moved_weight(model: SentenceTransformer) -> None:
    with torch.no_grad():
        next(model[0].parameters()).view(-1)[0] += 1e-3


def other_tokenizer(model: SentenceTransformer) -> None:
    model[0].tokenizer.backend_tokenizer.pre_tokenizer = None


def other_prompt(model: SentenceTransformer) -> None:
    model.prompts = {"query": "buy "}


def other_length(model: SentenceTransformer) -> None:
    model.max_seq_length = 4


def other_pooling(model: SentenceTransformer) -> None:
    model[1].pooling_mode = "cls"


@pytest.mark.parametrize("change", [moved_weight, other_tokenizer, other_prompt, other_length, other_pooling])
def test_whatever_decides_an_embedding_must_be_the_deployed_one(encoder: Path, change) -> None:
    deployed = encode.load_encoder(encoder)
    model = with_adapter(copy.deepcopy(deployed))
    assert adapted.modules_behind(model, deployed) is not None
    change(model)
    assert adapted.modules_behind(model, deployed) is None


def test_a_map_that_needs_the_length_of_its_input_is_encoded_anew(encoder: Path) -> None:
    deployed = encode.load_encoder(encoder)
    assert adapted.modules_behind(with_adapter(deployed, bias=True), deployed) is not None
    bare = shortened(deployed)
    assert adapted.modules_behind(with_adapter(bare, bias=True), bare) is None


def test_a_sweep_of_checkpoints_encodes_the_queries_once(
    world: Path, index_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(
        str(world), str(index_folder), objective="supervised", tune="adapter", steps=12, batch_size=8,
        learning_rate=0.05, validation_fraction=0.3, max_recall_drop=1, eval_every=4, keep=4, base_depth=5, depth=20, device="cpu",
    )  # fmt: skip
    train_model(config, tmp_path / "model")
    checkpoints = tmp_path / "model" / "checkpoints"
    steps = sorted(path.name for path in checkpoints.iterdir())
    assert len(steps) == 4
    # The frozen weights lie once on disk, those of the adapter are each step's own.
    frozen = {(checkpoints / step / "model.safetensors").stat().st_ino for step in steps}
    own = {(checkpoints / step / "3_Dense" / "model.safetensors").read_bytes() for step in steps}
    assert len(frozen) == 1
    assert len(own) == 4

    found = index.open_index(index_folder)
    split = load_split(str(world), "test", found.catalog, ignore_identical_ids=True)
    index.base_query_embeddings(found, split)
    expected = {
        f"m-{step}": found.search(
            index.embed_queries(
                encode.load_encoder(checkpoints / step), split.query_texts, Reporter()
            ), 5, split.excluded,
        )[0]
        for step in steps
    }  # fmt: skip

    def refuse(*_: object) -> None:
        raise AssertionError("encoded anew")

    monkeypatch.setattr(encode, "encode_queries", refuse)
    evaluation = evaluate_models(
        EvalConfig(
            str(world), str(index_folder), models=(f"m={checkpoints}",), base_depth=5, k=(5,), device="cpu"
        ),
        tmp_path / "report",
    )
    for name, rows in expected.items():
        np.testing.assert_array_equal(evaluation.lists[name].rows, rows)


def test_of_a_sweep_of_models_only_the_last_stays_in_memory(encoder):
    gc.collect()
    gc.disable()  # it would come sooner or later
    try:
        first = weakref.ref(encode.load_encoder(encoder))
        again = encode.load_encoder(encoder)
        assert first() is None
        assert len(again) == 3
    finally:
        gc.enable()
