"""Take a finetuned query encoder to where it is served: sentence-transformers, ONNX, or a few arrays."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from novelret import encode
from novelret.artifacts import (
    Manifest,
    check_output,
    fingerprint_of,
    open_output,
    writable,
    write_manifest,
)
from novelret.errors import UserError
from novelret.export.difference import SAMPLES, difference_of
from novelret.progress import Reporter
from novelret.trained import HASHES, training_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

FORMATS = ("st", "onnx", "npz")


@dataclass(frozen=True)
class Exported:
    """What an export gave.

    Attributes:
        path: the folder or file.
        format: "st", "onnx" or "npz".
        dimension: of an embedding.
        difference: the largest difference between the exported and the original embeddings that was seen.
        keys: how many a memory holds that was written as arrays, else 0.
    """

    path: Path
    format: str
    dimension: int
    difference: float
    keys: int = 0


def export_model(
    model: Path, form: str, out: Path, *, force: bool = False, report: Reporter | None = None
) -> Exported:
    """Write a query encoder in another form, and check that it gives the same embeddings.

    Args:
        model: MODEL folder, or any sentence-transformers folder.
        form: "st", "onnx" (folder with model.onnx and its tokenizer) or "npz" (one file).
        out: what to make.
        force: replace what is there.
        report: for notes.

    Raises:
        UserError: unknown format, unreadable model, a model that this format cannot hold, or `out` exists.
    """
    report = report or Reporter()
    if form not in FORMATS:
        raise UserError(f"--format {form}: unknown; choose from {', '.join(FORMATS)}")
    if form == "npz":
        _check_file(out, force=force)
    else:
        check_output(out, force=force, kind="export", inputs=[str(model)])
    if form == "onnx" and not all(map(find_spec, ("onnxruntime", "onnxscript"))):
        raise UserError("--format onnx needs more packages: pip install 'novelret[onnx]'")
    encoder = encode.load_encoder(model, "cpu").eval()
    keys = 0
    if form == "npz":
        from novelret.export.arrays import write_arrays

        difference, keys = write_arrays(encoder, model, out, report)
    else:
        exported = encode.fingerprint_encoder(encoder)
        identity = fingerprint_of(form, exported)
        with open_output(out, identity, force=force) as folder:
            if form == "onnx":
                from novelret.export.onnx import write_onnx

                difference = write_onnx(encoder, model, folder)
            else:
                difference = _write_folder(encoder, model, folder)
            facts = {"difference": difference, "dimension": encoder.get_embedding_dimension()}
            training = training_of(model)
            if training is not None:
                facts["training"] = training.facts()
                for name in HASHES:
                    if (training.folder / name).is_file():  # a model of before may lack one
                        shutil.copyfile(training.folder / name, folder / name)
            settings = {"model": str(model), "format": form}
            write_manifest(folder, Manifest("export", settings, {"model": exported}, identity, facts))
    return Exported(out, form, int(encoder.get_embedding_dimension() or 0), difference, keys)


def _check_file(out: Path, *, force: bool) -> None:
    """Refuse what cannot become the one file of npz, before the model is loaded."""
    with writable(out):
        if out.suffix != ".npz" or out.is_dir():
            raise UserError(f"{out}: --format npz makes one file; name it like adapter.npz")
        if out.exists() and not force:
            raise UserError(f"{out}: exists already; give another --out, or --force to replace it")


def _write_folder(encoder: SentenceTransformer, model: Path, folder: Path) -> float:
    encoder.save(str(folder), create_model_card=False)
    if (model / "README.md").is_file():
        shutil.copyfile(model / "README.md", folder / "README.md")
    if encode.is_api(encoder):
        return 0.0
    again = encode.load_encoder(folder, "cpu")
    return difference_of(
        encode.encode_queries(again, list(SAMPLES)), encode.encode_queries(encoder, list(SAMPLES))
    )
