"""Artifacts: folders that say what made them, from which inputs, and that appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from novelret.errors import UserError
from novelret.locks import try_lock

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What an artifact is and where it came from.

    Attributes:
        kind: "data", "index", "labels", "model", "report" or "export".
        config: the resolved settings that made it.
        inputs: name of each input → its fingerprint. Later stages compare these.
        fingerprint: identity of what the artifact holds. Two artifacts with the same fingerprint are
            interchangeable.
        facts: figures worth keeping (counts, dimensions, results).
        created: UTC time, ISO 8601.
        novelret: version of the program.
        format: layout version of the folder.
    """

    kind: str
    config: dict[str, Any]
    inputs: dict[str, str]
    fingerprint: str
    facts: dict[str, Any] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    novelret: str = field(default_factory=lambda: version("novelret"))
    format: int = FORMAT


def fingerprint_file(path: Path) -> str:
    """Hash of a file's bytes (BLAKE2b, 128 bits, hex).

    Raises:
        UserError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def fingerprint_of(*parts: object) -> str:
    """Hash of JSON-like values, stable across runs and machines (BLAKE2b, 128 bits, hex)."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def fingerprint_strings(strings: Iterator[str] | list[str]) -> str:
    """Hash of a sequence of strings, order included, without holding them all in one piece."""
    digest = hashlib.blake2b(digest_size=16)
    for string in strings:
        data = string.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def hash_texts(texts: list[str]) -> np.ndarray:
    """(n,) uint64 hashes of texts, the same on every machine."""
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, dtype="<u8")


def fingerprint_array(array: np.ndarray) -> str:
    """Hash of an array's type, shape and values, the same on every machine."""
    values = np.ascontiguousarray(array)
    values = values.astype(values.dtype.newbyteorder("<"), copy=False)
    digest = hashlib.blake2b(f"{values.dtype.str} {values.shape}".encode(), digest_size=16)
    digest.update(values.data)
    return digest.hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(
        json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8"
    )
    temporary.replace(path)


def write_config(folder: Path, config: Any) -> None:
    """Write a stage's resolved settings as config.yaml, which `--config` takes back."""
    text = yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)
    (folder / "config.yaml").write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); make the artifact again") from None


def read_manifest(folder: Path, kind: str) -> Manifest:
    """Read and check an artifact's manifest.

    Raises:
        UserError: there is no such folder, it is not an artifact, or it is one of another kind or format.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; make it with `novelret {_maker(kind)}`")
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"{folder}: holds no {MANIFEST}, expected {_named(kind)} of novelret; point to a finished one"
        )
    data = read_json(folder / MANIFEST)
    if not isinstance(data, dict) or data.get("kind") != kind:
        found = data.get("kind") if isinstance(data, dict) else None
        raise UserError(f"{folder}: is {_named(found)}, expected {_named(kind)}")
    if data.get("format") != FORMAT:
        raise UserError(
            f"{folder}: has layout {data.get('format')}, this novelret reads {FORMAT}; make it again"
        )
    known = {name: data[name] for name in Manifest.__dataclass_fields__ if name in data}
    return Manifest(**known)


def is_kind(folder: Path, kind: str) -> bool:
    """Whether a folder holds a finished artifact of a kind."""
    return _kind_of(folder) == kind


def _kind_of(folder: Path) -> str | None:
    """The kind of the finished artifact that a folder holds, if it holds one."""
    found = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else None
    return found.get("kind") if isinstance(found, dict) else None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest; last of all files, since it says that the folder is whole."""
    write_json(folder / MANIFEST, asdict(manifest))


@contextlib.contextmanager
def writable(out: Path) -> Iterator[None]:
    """Turn what the file system says against an output into one line.

    Raises:
        UserError: the block met an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None


def check_output(out: Path, *, force: bool, kind: str | None = None, inputs: Iterable[str] = ()) -> None:
    """Refuse an output that exists, before any work is done.

    Args:
        out: the folder to make.
        force: replace what is there.
        kind: of artifact to make; another kind is not replaced.
        inputs: what the command reads, as its options name it (PATH, NAME=PATH or KIND:PATH); nothing of
            that is replaced either.

    Raises:
        UserError: `out` exists and `force` is off, `out` is something novelret did not make, of another kind
            or an input, or it cannot be looked at; or it is the working folder, which a process cannot
            replace under itself.
    """
    with writable(out):
        if not out.exists():
            return
    if os.path.ismount(out):  # which nothing can be renamed to
        raise UserError(f"{out}: is a mount point, which cannot be replaced; give a folder inside it")
    if not force:
        raise UserError(f"{out}: exists already; give another --out, or --force to replace it")
    if out.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f"{out}: is the folder you are in, which cannot be replaced; call from another one")
    empty = out.is_dir() and not any(out.iterdir())
    if not empty and not (out / MANIFEST).is_file():
        raise UserError(
            f"{out}: was not made by novelret, so --force does not replace it; remove it yourself"
        )
    found = None
    with contextlib.suppress(UserError):  # a broken manifest, of what may as well be replaced
        found = _kind_of(out)
    if kind is not None and found not in (kind, None):
        raise UserError(
            f"{out}: is {_named(found)}, which --force does not replace by {_named(kind)}; give another --out"
        )
    for given in inputs:
        paths = (given, given.partition("=")[2], given.partition(":")[2])
        if any(out.resolve() in (Path(p).resolve(), *Path(p).resolve().parents) for p in paths if p):
            raise UserError(f"{out}: holds {given}, which this command reads; give another --out")


@contextlib.contextmanager
def open_output(
    out: Path, identity: str, *, force: bool, settings: dict[str, Any] | None = None
) -> Iterator[Path]:
    """Give a working folder that becomes `out` when the block ends well.

    The working folder `OUT.partial` outlives a failure or a kill, so that the next run with the same
    identity finds what was done. A run with another identity starts it anew, unless `settings` say that
    what lies there was dear: then it is refused.

    Args:
        out: the folder to make.
        identity: fingerprint of everything that decides the content (configuration and inputs).
        force: replace an existing artifact, once the new one is whole, and drop an unfinished one.
        settings: what `identity` was made of, for stages whose unfinished work is worth hours.

    Raises:
        UserError: `out` exists and `force` is off, an unfinished run with other settings lies there, or
            the place cannot be written.
    """
    out = _real(out)
    check_output(out, force=force)
    partial = partial_of(out)
    with writable(out):
        try:
            partial.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(
                f"{out}: cannot be made, a file stands in its way; choose another --out"
            ) from None
    with _alone(partial):
        check_output(out, force=force)  # another run may have made it meanwhile
        with writable(out):
            state = _state_of(partial)
            if state.get("identity") != identity:
                if not _is_own(partial):
                    raise UserError(
                        f"{partial}: is where {out} would be made, and holds what novelret did not put "
                        "there; move it away, or choose another --out"
                    )
                if settings is not None and not force and isinstance(state.get("settings"), dict):
                    raise UserError(_differences(partial, state["settings"], settings))
                _empty(partial)
            write_json(partial / STATE, {"identity": identity, "settings": settings})
        yield partial
        if not (partial / MANIFEST).is_file():
            raise RuntimeError(f"{partial} has no manifest")
        old = put_aside(out)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)  # of a run that was killed here
            out.replace(old)
        partial.replace(out)
        (out / STATE).unlink(missing_ok=True)  # until here a kill leaves something to resume
        shutil.rmtree(old, ignore_errors=True)


def partial_of(out: Path) -> Path:
    """The working folder of an output that is being made (see `open_output`)."""
    out = _real(out)
    return out.with_name(out.name + ".partial")


def put_aside(out: Path) -> Path:
    """Where an artifact lies for the moment in which another takes its place; nobody's own name."""
    out = _real(out)
    return out.with_name(f".{out.name}.replaced-by-novelret")


def _real(out: Path) -> Path:
    """The folder itself where `out` is a link to it, as to a larger disk: the link stays one."""
    return out.resolve() if out.is_symlink() else out


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder; a kill frees it.

    Raises:
        UserError: another process works in it.
    """
    busy = UserError(f"{folder}: another novelret is at work there; wait for it, or choose another --out")
    if os.name != "posix":  # only there can a folder be opened, and locked
        yield
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # it has just become an artifact
        raise busy from None
    try:
        if try_lock(handle) is False:
            raise busy
        yield
    finally:
        os.close(handle)


def drop_partial(folder: Path) -> None:
    """Remove an unfinished output; if killed midway, what is left of it is never resumed."""
    with contextlib.suppress(OSError):
        _empty(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _is_own(partial: Path) -> bool:
    """Whether a working folder is empty or was begun by novelret: its state is in it all along."""
    return (partial / STATE).is_file() or all(path.name.startswith(STATE) for path in partial.iterdir())


def _empty(folder: Path) -> None:
    write_json(folder / STATE, {})  # first: half of what was done would be taken for all of it
    for path in folder.iterdir():
        if path.name == STATE:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def fsync_file(path: Path) -> None:
    """Make sure that a file's bytes are on disk before progress is recorded."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _state_of(partial: Path) -> dict[str, Any]:
    try:
        state = json.loads((partial / STATE).read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _differences(partial: Path, before: dict[str, Any], now: dict[str, Any]) -> str:
    plain: dict[str, Any] = json.loads(json.dumps(now, default=str))
    changed = [
        f"{name} {before.get(name)!r} → {plain.get(name)!r}"
        for name in sorted({*before, *plain})
        if before.get(name) != plain.get(name)
    ]
    return (
        f"{partial}: holds an unfinished run with other settings ({'; '.join(changed)}); "
        "go on with those, pass another --out, or --force to start anew"
    )


def _named(kind: str | None) -> str:
    """A kind of artifact as people say it; None where the manifest names none."""
    names = {
        "data": "a data folder",
        "export": "an exported model",
        "index": "an INDEX",
        "labels": "LABELS",
        "model": "a MODEL",
        "report": "a REPORT",
    }
    return names.get(str(kind), "an unknown artifact")


def _maker(kind: str) -> str:
    return {"index": "index", "labels": "label", "model": "train", "report": "eval"}[kind]
