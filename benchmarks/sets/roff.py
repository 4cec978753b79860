"""Names, description and references of a manual page, read from its source (man and mdoc macros)."""

from __future__ import annotations

import re
from collections.abc import Iterator

REFERENCE = re.compile(r"([A-Za-z0-9_.:+@-]*[A-Za-z0-9_+@\]])\s?\((\d[A-Za-z0-9]*|[ln])\)")
PERL_MODULE = re.compile(r"\b\w+(?:::\w+)+")
WORD = re.compile(r"[A-Za-z_]\w{2,}")
PARAGRAPH = re.compile(r"[.']\s*(P|PP|LP|sp|SS|de|ig|TS|TP|IP)\b|\s*$")
# Requests whose arguments are text; those that mix two fonts run their arguments together.
JOINED = {"BR", "RB", "IR", "RI", "BI", "IB"}
SPACED = {"B", "I", "R", "SM", "SB", "Nm", "Nd", "Li", "Pa", "Fn", "Cm"}
ESCAPES = [
    (re.compile(r"\\[\"#].*"), ""),  # comments
    (re.compile(r"\\f(\[[^]]*\]|\(..|.)"), ""),
    (re.compile(r"\\s([-+]?\d|\([-+]?..|\[[^]]*\])"), ""),
    (re.compile(r"\\[mFM]\[[^]]*\]"), ""),
    (re.compile(r"\\[hvwlLoN]'[^']*'"), ""),
    (re.compile(r"\\\((hy|mi|en|em)|\\\[(hy|mi|en|em)\]"), "-"),
    (re.compile(r"\\\((aq|cq|oq)|\\\[(aq|cq|oq)\]|\\\*\(Aq|\\'"), "'"),
    (re.compile(r"\\[*]?(\[[^]]*\]|\(..)|\\\*."), ""),  # strings and other characters
    (re.compile(r"\\[~ 0]"), " "),
    (re.compile(r"\\$"), ""),  # the next line goes on
    (re.compile(r"\\-"), "-"),
    (re.compile(r"\\e"), r"\\"),
    (re.compile(r"\\."), ""),
]


def plain(text: str) -> str:
    """Text without roff's escapes."""
    for pattern, replacement in ESCAPES:
        text = pattern.sub(replacement, text)
    return text


def sections(source: str) -> dict[str, list[str]]:
    """The raw lines of the NAME and SEE ALSO sections, by heading."""
    found: dict[str, list[str]] = {}
    lines, current = iter(source.splitlines()), None
    for line in lines:
        if re.match(r"[.']\s*S[Hh]\b", line):
            heading = plain(line[3:]) if len(line.strip()) > 3 else plain(next(lines, ""))
            heading = heading.replace('"', "").strip(" :\t").upper()
            current = found.setdefault(heading, []) if heading in ("NAME", "SEE ALSO") else None
        elif current is not None:
            current.append(line)
    return found


def words(lines: list[str]) -> Iterator[str]:
    """The lines as a reader sees them: macros that set text are read, others dropped."""
    for line in lines:
        if not line.startswith((".", "'")):
            yield plain(line)
            continue
        name, _, rest = line[1:].strip().partition(" ")
        if name in ("Xr", "MR"):  # .Xr printf 3 ,
            fields = plain(rest).split()
            yield f"{fields[0]}({fields[1]})," if len(fields) > 1 else ""
        elif name in JOINED | SPACED:
            parts = [a or b for a, b in re.findall(r'"((?:[^"]|"")*)"|((?:\\ |\S)+)', rest)]
            yield plain(("" if name in JOINED else " ").join(parts))


def names_and_description(source: str) -> tuple[list[str], str]:
    """What whatis(1) would show: the names of the page and its one-line description.

    Returns:
        The names, and the description; an empty one where the NAME section holds none.
    """
    lines = sections(source).get("NAME", [])
    end = next((i for i, line in enumerate(lines) if i and PARAGRAPH.match(line)), None)
    lines = lines[:end]
    macro = next((i for i, line in enumerate(lines) if line.startswith(".Nd")), None)
    if macro is not None:
        named = [part for line in lines[:macro] if line.startswith(".Nm") for part in line[3:].split()]
        return [n for n in map(plain, named) if n != ","], _one_line(" ".join(words(lines[macro:])))
    before, *after = re.split(r" --? ", re.sub(r"\s+", " ", " ".join(words(lines))), maxsplit=1)
    names = [re.sub(r" ?\(.*", "", name).strip() for name in before.split(",")]
    return [name for name in names if name and " " not in name], _one_line(after[0] if after else "")


def references(source: str) -> list[tuple[str, str]]:
    """(name, section) of every page that SEE ALSO names, in order.

    Perl modules have section '3'. Where the text gives no section at all, every word is returned, with
    section '': some of them are names of neighbouring pages.
    """
    text = " ".join(words(sections(source).get("SEE ALSO", [])))
    found = REFERENCE.findall(text)
    found += [(module, "3") for module in PERL_MODULE.findall(REFERENCE.sub(" ", text))]
    return list(dict.fromkeys(found or [(word, "") for word in WORD.findall(text)]))


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip(" .")
