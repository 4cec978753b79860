"""Pairs of texts that carry no ids: a text's id is its hash, and equal texts are one query or one item."""

from __future__ import annotations

from novelret.convert.writer import Hashes, Writer, hash64


def query_id_of(text: str) -> str:
    """The id of a query text."""
    return f"q{hash64(text):016x}"


def item_id_of(text: str) -> str:
    """The id of an item text."""
    return f"i{hash64(text):016x}"


class PairWriter:
    """Writes pairs; each distinct query and item once, when it is first met."""

    def __init__(self, writer: Writer) -> None:
        """Wrap a writer."""
        self.writer = writer
        self._queries, self._items = Hashes(), Hashes()

    def item(self, where: str, item_id: str, title: str, text: str) -> None:
        """Write an item unless it was written before."""
        if self._items.add(item_id):
            self.writer.item(where, item_id, title, text)

    def query(self, where: str, query_id: str, text: str) -> None:
        """Write a query unless it was written before."""
        if self._queries.add(query_id):
            self.writer.query(where, query_id, text)
