"""TREC collections: documents as `<DOC>` markup, JSON lines or two columns; topics as markup or two columns.

Qrels have four columns: topic, iteration, document, relevance.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path

from novelret.convert.collections import Part, Rows, write_collection
from novelret.convert.msmarco import read_two_columns
from novelret.convert.writer import Converted, converted, open_writer
from novelret.data.catalog import read_text
from novelret.data.source import read_jsonl, read_lines
from novelret.errors import UserError
from novelret.progress import Reporter

_TAG = re.compile(r"</?[A-Za-z!?][^<>]*>")  # a bare < is a letter like another
_TITLE = re.compile(r"<(TITLE|HEADLINE|TTL|HL)>(.*?)</\1>", re.IGNORECASE | re.DOTALL)
_DOCNO = re.compile(r"<DOCNO>(.*?)</DOCNO>", re.IGNORECASE | re.DOTALL)
_NUMBER = re.compile(r"<num>\s*(?:Number:)?\s*([^\s<]+)", re.IGNORECASE)
_TOPIC_TITLE = re.compile(
    r"<(?:title|query)>\s*(?:Topic:)?\s*(.*?)\s*(?=</?[A-Za-z]|\Z)", re.IGNORECASE | re.DOTALL
)
_ATTRIBUTE = re.compile(r"<topic[^>]*\bnumber\s*=\s*[\"']([^\"']+)", re.IGNORECASE)


def convert_trec(
    corpus: list[Path], parts: list[Part], out: Path, *, force: bool = False, report: Reporter | None = None
) -> Converted:
    """Write documents, topics and qrels, judgements of 0 and below included.

    Raises:
        UserError: a split's name is unusable, a missing, broken or malformed file, a document id that
            repeats, a topic id with two texts, or an existing output.
    """
    files = [*corpus, *(file for part in parts for file in (part.queries, part.qrels))]
    names = tuple(part.name for part in parts)
    with open_writer(out, "trec", {"splits": names}, files, names, force=force) as writer:
        rows = (row for path in corpus for row in read_documents(path))
        write_collection(rows, parts, read_topics, writer, report or Reporter(), qrels_id=_unpadded)
    return converted(out, writer)


def read_documents(path: Path) -> Rows:
    """Documents of one file, whatever its form (JSON lines, two columns, or `<DOC>` markup).

    Raises:
        UserError: malformed, or a document without an id.
    """
    name = path.name.removesuffix(".gz")
    if name.endswith((".jsonl", ".json")):
        yield from _read_json(path)
    elif name.endswith(".tsv"):
        yield from read_two_columns(path)
    else:
        for where, block in _blocks(path, "doc"):
            number = _DOCNO.search(block)
            if number is None:
                raise UserError(f"{where}: a document without <DOCNO>")
            title = _TITLE.search(block)
            rest = block.replace(number.group(0), "").replace(title.group(0) if title else "\0", "")
            yield where, number.group(1).strip(), _plain(title.group(2)) if title else "", _plain(rest)


def read_topics(path: Path) -> Rows:
    """Topics of one file: two columns in a .tsv or .txt without markup, `<top>` or `<topic number=…>` else.

    Raises:
        UserError: malformed, or a topic without a number.
    """
    first = next((line for _, line in read_lines(path)), "")
    if "\t" in first and not first.lstrip().startswith("<"):
        yield from read_two_columns(path)
        return
    tag = "top" if any(re.search(r"<top>", line, re.IGNORECASE) for _, line in read_lines(path)) else "topic"
    for where, block in _blocks(path, tag):
        number = _ATTRIBUTE.search(block) or _NUMBER.search(block)
        title = _TOPIC_TITLE.search(block)
        if number is None or title is None:
            raise UserError(f"{where}: a topic without a number or a title")
        yield where, number.group(1), "", _plain(title.group(1))


def _blocks(path: Path, tag: str) -> Iterator[tuple[str, str]]:
    """Each <tag …> up to its </tag>, with the line it begins on; a line may hold several.

    Raises:
        UserError: there is none, or one is not closed.
    """
    begin = re.compile(rf"<{tag}[\s>]", re.IGNORECASE)
    end = re.compile(rf"</{tag}>", re.IGNORECASE)
    block: list[str] = []
    where, found = "", False
    for number, line in read_lines(path):
        at = 0
        while at < len(line):
            if not block:
                opened = begin.search(line, at)
                if opened is None:
                    break
                where, found, at = f"{path}:{number}", True, opened.start()
            closed = end.search(line, at)
            stop = closed.end() if closed else len(line)
            block.append(line[at:stop])
            if closed:
                yield where, "".join(block)
                block = []
            at = stop
    if block:
        raise UserError(f"{where}: <{tag}> is not closed; the file is cut off")
    if not found:
        raise UserError(f"{path}: holds no <{tag}>; expected TREC markup, .jsonl or two columns in a .tsv")


def _read_json(path: Path) -> Rows:
    for where, row in read_jsonl(path, "a JSON object"):
        identity = _first_of(where, row, "_id", "id", "docno", "docid")
        if not identity:
            raise UserError(f"{where}: no id, _id, docno or docid")
        text = _first_of(where, row, "text", "contents", "body")
        yield where, identity, read_text(where, row, "title"), text


def _first_of(where: str, row: dict[str, object], *names: str) -> str:
    """The first of some values that is there, empty where none is."""
    return next((text for name in names if (text := read_text(where, row, name))), "")


def _unpadded(topic: str) -> str:
    """A topic's number as TREC's qrels write it: where a topic says `Number: 051`, they say 51."""
    return (topic.lstrip("0") or "0") if topic.isdecimal() else topic


def _plain(markup: str) -> str:
    return " ".join(html.unescape(_TAG.sub(" ", markup)).split())
