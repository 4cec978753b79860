"""Pairs of texts. One without an id has its hash for an id, and equal texts are one query or one item."""

from __future__ import annotations

from novelret.convert.writer import Texts, Writer, hash64


def query_id_of(text: str) -> str:
    """The id of a query text."""
    return f"q{hash64(text):016x}"


def item_id_of(text: str) -> str:
    """The id of an item text."""
    return f"i{hash64(text):016x}"


class PairWriter:
    """Writes pairs; each distinct query and item once, when it is first met.

    An id that the source gives to two texts is refused.
    """

    def __init__(self, writer: Writer) -> None:
        """Wrap a writer."""
        self.writer = writer
        self._queries, self._items = Texts(), Texts()

    def item(self, where: str, item_id: str, title: str, text: str) -> None:
        """Write an item unless it was written before.

        Raises:
            UserError: it was, with another text.
        """
        if self._items.add(where, "item", item_id, f"{title}\t{text}"):
            self.writer.item(where, item_id, title, text)

    def query(self, where: str, query_id: str, text: str) -> None:
        """Write a query unless it was written before.

        Raises:
            UserError: it was, with another text.
        """
        if self._queries.add(where, "query", query_id, text):
            self.writer.query(where, query_id, text)
