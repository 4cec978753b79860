"""Read what users bring: a BEIR folder (plain or gzipped), parquet beside it, or a Hugging Face data set.

Everything comes out as rows with a `where` that error messages can name ("corpus.jsonl:17").
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from novelret.artifacts import fingerprint_file
from novelret.errors import UserError

Row = tuple[str, dict[str, Any]]
_QRELS = pa.schema([("query_id", pa.string()), ("item_id", pa.string()), ("score", pa.float64())])
_COLUMNS = ["query-id", "corpus-id", "score"]
_QRELS_FORMS = (".tsv", ".jsonl", ".parquet")
_LINES, _BLOCK = 65_536, 16 << 20  # lines, and bytes, at a time


def find_file(folder: Path, stem: str, suffixes: tuple[str, ...]) -> Path | None:
    """The one of stem + suffix and stem + suffix + ".gz" that is in the folder, if any is.

    Raises:
        UserError: there are several, of which one may be of yesterday.
    """
    names = [stem + suffix + ending for suffix in suffixes for ending in ("", ".gz")]
    found = [name for name in names if (folder / name).is_file()]
    if len(found) > 1:
        raise UserError(f"{folder}: holds both {found[0]} and {found[1]}; keep one")
    return folder / found[0] if found else None


def is_folder(data: str) -> bool:
    """Whether `data` names a folder in BEIR's layout rather than a Hugging Face data set.

    Raises:
        UserError: `data` is empty, a path that does not exist, or a file.
    """
    if not data:
        raise UserError("--data: is empty; give a folder, or a Hugging Face data set")
    path = Path(data)
    if path.is_dir():
        return (
            find_file(path, "corpus", (".jsonl", ".parquet")) is not None or not (path / "README.md").exists()
        )
    if path.exists():
        raise UserError(
            f"{data}: is a file; --data takes a folder with corpus.jsonl, queries.jsonl and qrels/"
        )
    if data.startswith((".", "/", "~")) or data.count("/") > 1:
        raise UserError(f"{data}: no such folder")
    return False


def read_part(data: str, part: str) -> Iterator[Row]:
    """Rows of "corpus" or "queries": `_id`, `text` and, for a corpus, `title`.

    Raises:
        UserError: the file is missing, or a line is not a JSON object.
    """
    if not is_folder(data):
        from novelret.data.hub import read_hub_part

        yield from read_hub_part(data, part)
        return
    path = part_file(data, part)
    yield from _read_parquet(path) if path.suffix == ".parquet" else read_jsonl(path)


def read_qrels(data: str, split: str) -> Iterator[tuple[str, str, str, float]]:
    """Rows (where, query id, item id, score) of one split's qrels.

    Raises:
        UserError: the split is missing (the message lists those that exist), or a line is malformed.
    """
    if not is_folder(data):
        from novelret.data.hub import read_hub_qrels

        yield from read_hub_qrels(data, split)
        return
    yield from read_qrels_file(_qrels_file(data, split))


def read_split_blocks(data: str, split: str) -> Iterator[pa.RecordBatch]:
    """As `read_qrels`, in blocks like those of `read_qrels_blocks`.

    Raises:
        UserError: as above.
    """
    return (
        read_qrels_blocks(_qrels_file(data, split)) if is_folder(data) else _blocks(read_qrels(data, split))
    )


def qrels_name(data: str, split: str) -> str:
    """Where a split's qrels come from, as messages name it."""
    return str(_qrels_file(data, split)) if is_folder(data) else f"{data} (qrels, {split})"


def read_excluded(data: str, split: str) -> Iterator[tuple[str, str, str, float]]:
    """Rows of excluded/SPLIT.tsv: items left out of a query's rankings, like products seen before.

    Its columns are those of qrels, and a score of 0 leaves nothing out; neither does a missing file.

    Raises:
        UserError: a line is malformed, or what the folder holds instead is read for no split.
    """
    path = _optional_file(data, "excluded", split, _QRELS_FORMS)
    if path is not None:
        yield from read_qrels_file(path)


def read_unclicked(data: str, split: str) -> Iterator[tuple[str, str]]:
    """Rows (where, query id) of unclicked/SPLIT.tsv: queries of the split that have no feedback.

    Without such a file there are none.

    Raises:
        UserError: a line has more than one column, or what the folder holds instead is read for no split.
    """
    path = _optional_file(data, "unclicked", split, (".tsv",))
    for number, line in [] if path is None else read_lines(path):
        query_id = _unquoted(line.rstrip("\r\n"))
        if "\t" in query_id:
            raise UserError(f"{path}:{number}: several columns; each line names one query, without an item")
        if (number, query_id) != (1, "query-id"):
            yield f"{path}:{number}", query_id


def read_qrels_file(path: Path) -> Iterator[tuple[str, str, str, float]]:
    """Rows (where, query id, item id, score) of a qrels file, tab-separated (BEIR) or TREC's four columns.

    A first line whose last column is a word is a header (see `is_header`). Where it names further columns, as
    to_label.tsv of an evaluation does, these are passed over, as are lines without a score. Between tabs,
    what is quoted as csv does (`"b""c"`) is unquoted. Also reads parquet, and JSON lines (MTEB), with BEIR's
    column names, by the same rules.

    Raises:
        UserError: the file is missing, a line is malformed, or the header has the columns in another order.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".parquet" or path.name.removesuffix(".gz").endswith(".jsonl"):
        expected = "a JSON object with query-id, corpus-id and score"
        rows = _read_parquet(path) if path.suffix == ".parquet" else read_jsonl(path, expected)
        for where, row in rows:
            score = row.get("score", 1)
            is_empty = score is None or (isinstance(score, float) and math.isnan(score))
            if not (is_empty and len(row) > 3):
                yield where, *_qrels_columns(where, row)
        return
    has_texts = False
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        columns = names = split_columns(line)
        has_texts |= number == 1 and len(columns) > 3 and columns[:3] == _COLUMNS
        columns = columns[:3] if has_texts else columns
        if has_texts and not columns[-1].strip():
            continue
        if len(columns) == 4:  # TREC: query, iteration, item, score
            columns = [columns[0], columns[2], columns[3]]
        if number == 1:
            _check_order(where, names, columns)
        if len(columns) != 3:
            raise UserError(
                f"{where}: {len(columns)} columns, expected query-id, corpus-id, score (tab-separated)"
            )
        if number > 1 or not is_header(columns[2]):
            yield where, columns[0], columns[1], _score(where, columns[2])


def split_columns(line: str) -> list[str]:
    """The columns of a tab-separated line, unquoted; without a tab, what stands between spaces."""
    columns = line.rstrip("\r\n").split("\t")
    if len(columns) == 1:
        return line.split()
    return [_unquoted(column) for column in columns] if '"' in line else columns


def is_header(last: str) -> bool:
    """Whether a first line is a header by its last column: a word, where lines of data have a number.

    A number with a slip in it ("1,5") is none of either.
    """
    return last[:1].isalpha() and not is_number(last)


def _unquoted(column: str) -> str:
    inner = column[1:-1]
    is_quoted = len(column) > 1 and column[0] == column[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if is_quoted else column


def quoted(identity: str) -> str:
    """An id as tab-separated files hold it: quoted, as csv does, where its own quotes would be taken off."""
    if identity.startswith('"') and identity.endswith('"'):
        return '"' + identity.replace('"', '""') + '"'
    return identity


def _check_order(where: str, names: list[str], taken: list[str]) -> None:
    """Refuse a header whose names are not those of the columns that are taken for them."""
    expected = [name for name in _COLUMNS if name in names]
    if {"query-id", "corpus-id"} <= set(expected) and taken[: len(expected)] != expected:
        raise UserError(
            f"{where}: the columns are {', '.join(names)}; put them in the order {', '.join(_COLUMNS)}"
        )


def read_qrels_blocks(path: Path) -> Iterator[pa.RecordBatch]:
    """As `read_qrels_file`, in blocks with the columns query_id, item_id and score (float64).

    Millions of lines of three columns take a tenth of the time; what else there is, is read line by line.

    Raises:
        UserError: as above.
    """
    done = 0
    try:
        for block in _three_columns(path):
            yield block
            done += len(block)
        return
    except (pa.ArrowInvalid, OSError, EOFError, zlib.error):
        pass  # the reader of lines takes more forms, and names the line that it does not take
    yield from _blocks(islice(read_qrels_file(path), done, None))


def _blocks(rows: Iterator[tuple[str, str, str, float]]) -> Iterator[pa.RecordBatch]:
    while some := list(islice(rows, _LINES)):
        _, *columns = zip(*some, strict=True)
        yield pa.record_batch(
            [pa.array(values, kind.type) for values, kind in zip(columns, _QRELS, strict=True)], _QRELS
        )


def _three_columns(path: Path) -> Iterator[pa.RecordBatch]:
    """Blocks of a tab-separated file without quotes.

    Raises:
        pa.ArrowInvalid: it is none, from some line on.
        OSError, EOFError, zlib.error: it cannot be read.
    """
    with _open(path) as file:
        line = file.readline()
    first = line.rstrip(b"\r\n").split(b"\t")
    if len(first) != 3 or path.suffix == ".parquet" or b'"' in line:
        raise pa.ArrowInvalid("other columns")
    if b"query-id" in first[1:] or b"corpus-id" in (first[0], first[2]):
        raise pa.ArrowInvalid("another order")
    skipped = int(is_header(first[2].decode("utf-8", "replace")))
    with (
        pa.input_stream(str(path), compression="gzip" if path.suffix == ".gz" else None) as stream,
        csv.open_csv(
            stream,
            csv.ReadOptions(column_names=_QRELS.names, skip_rows=skipped, block_size=_BLOCK),
            csv.ParseOptions(delimiter="\t", quote_char=False, double_quote=False),
            csv.ConvertOptions(column_types=_QRELS, null_values=[]),
        ) as batches,
    ):
        for batch in batches:
            if not np.isfinite(batch["score"].to_numpy()).all():
                raise pa.ArrowInvalid("not a number")
            if any(pc.any(pc.starts_with(batch[name], '"')).as_py() for name in ("query_id", "item_id")):
                raise pa.ArrowInvalid("quoted")
            yield batch


def fingerprint_part(data: str, part: str) -> str:
    """Fingerprint of the corpus, the queries, or "qrels/SPLIT" as they lie there now."""
    if not is_folder(data):
        from novelret.data.hub import fingerprint_hub_part

        return fingerprint_hub_part(data, part)
    if part.startswith("qrels/"):
        return fingerprint_file(_qrels_file(data, part.removeprefix("qrels/")))
    return fingerprint_file(part_file(data, part))


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file, gzipped or not; blank lines are passed over.

    Raises:
        UserError: the file is missing, is cut off, or is not UTF-8.
    """
    number = 0
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, 1):
                text = raw.decode("utf-8")
                if text.strip():
                    yield number, text.removeprefix("\ufeff") if number == 1 else text
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}:{number}: not UTF-8 (byte {error.object[error.start]:#04x}); convert the file with iconv"
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path}: the gzip data breaks off after line {number} ({error}); fetch it again"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _open(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def read_jsonl(path: Path, expected: str = "a JSON object with _id and text") -> Iterator[Row]:
    """(where, object) of every line.

    Raises:
        UserError: a line is not JSON, or no object; `expected` says what it should be.
    """
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        try:
            row = json.loads(line.rstrip("\r\n"))  # the decoder counts columns from the last line break
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: malformed JSON ({error.msg} at column {error.colno})") from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets
            raise UserError(f"{where}: JSON that cannot be read ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected {expected}, found {type(row).__name__}")
        if "\\u" in line:  # only an escape can hold half of a surrogate pair, of a text cut in an emoji
            row = {name: mended(value) for name, value in row.items()}
        yield where, row


def mended(value: Any) -> Any:
    """A value of JSON that can be written as UTF-8: halves of surrogate pairs in a string become U+FFFD."""
    return (
        value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if isinstance(value, str)
        else value
    )


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not readable as parquet ({str(error).splitlines()[0]})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: holds a text that is not UTF-8, behind row {number} ({error})") from None


def part_file(data: str, part: str) -> Path:
    """The file of a folder's corpus or queries.

    Raises:
        UserError: there is none, or there are several.
    """
    path = find_file(Path(data), part, (".jsonl", ".parquet"))
    if path is None:
        raise UserError(
            f"{Path(data) / (part + '.jsonl')}: no such file (looked for .jsonl, .jsonl.gz, .parquet)"
        )
    return path


def _qrels_file(data: str, split: str) -> Path:
    folder = Path(data) / "qrels"
    path = find_file(folder, split, _QRELS_FORMS)
    if path is None:
        raise UserError(
            f"{folder / (split + '.tsv')}: no such file (splits there: {', '.join(_splits(data)) or 'none'})"
        )
    return path


def _splits(data: str) -> list[str]:
    """The splits that a folder has qrels of."""
    names = [path.name.removesuffix(".gz") for path in (Path(data) / "qrels").glob("*.*")]
    return sorted({Path(name).stem for name in names if name.endswith(_QRELS_FORMS)})


def _optional_file(data: str, part: str, split: str, forms: tuple[str, ...]) -> Path | None:
    """The file of a split in a folder that data need not have, and that need not hold every split.

    Raises:
        UserError: there is none, but a file that no split's name makes sense of: this one's, misnamed.
    """
    if not is_folder(data):
        return None
    folder = Path(data) / part
    path = find_file(folder, split, forms)
    if path is None:
        known = {name + form + ending for name in _splits(data) for form in forms for ending in ("", ".gz")}
        names = sorted(p.name for p in folder.glob("[!.]*") if p.suffix != ".md" and p.name not in known)
        if names:
            raise UserError(
                f"{folder / names[0]}: is read for no split; name it {split}{forms[0]}, or move it"
            )
    return path


def _qrels_columns(where: str, row: dict[str, Any]) -> tuple[str, str, float]:
    try:
        return str(row["query-id"]), str(row["corpus-id"]), _score(where, row.get("score", 1))
    except KeyError as error:
        raise UserError(f"{where}: no column {error}; qrels need query-id, corpus-id and score") from None


def _score(where: str, value: Any) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise UserError(f"{where}: the score {value!r} is not a number")
    return score


def is_number(text: str) -> bool:
    """Whether a text is a number, finite or not."""
    try:
        float(text)
    except ValueError:
        return False
    return True
