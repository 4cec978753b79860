"""From a judge's raw answer to a verdict. Apart from asking, so that it can be redone for free."""

from __future__ import annotations

import json
import re
from typing import Any

from novelret.label.prompts import Prompt
from novelret.label.table import IRRELEVANT, RELEVANT, UNKNOWN

# <Yes>, [Yes], <answer>Yes</answer>, and the paper's own words taken literally: <Yes/No>Yes</Yes/No>.
_TAG = re.compile(
    r"<[a-z_ ]*/?[a-z_ ]+>\s*\W?(yes|no)\W?\s*(?:<|$)|<\s*(yes|no)\s*/?>|\[\s*(yes|no)\s*\]"
    r"|\\boxed\{\s*(?:\\text\{)?(yes|no)\b",
    re.IGNORECASE,
)
_THINK, _END_OF_THINK = (re.compile(rf"<{end}think(?:ing)?>", re.IGNORECASE) for end in ("", "/"))
# Not "no-brainer", "no doubt" or "no problem".
_FIRST_WORD = re.compile(
    r"\W*(yes\b|no\b(?!-\w|[^\S\n]+(?!(?:it|this|that|they|these|because|since)\b)\w))", re.IGNORECASE
)
_LAST_LINE = re.compile(r"\W*(?:(?:the )?(?:final )?answer(?: is)?\W*)?(yes|no)\W*", re.IGNORECASE)

_LAST_WORD = re.compile(r"\b(yes|no)\b(\W*)$", re.IGNORECASE)
_SO = re.compile(r"\bso,?$", re.IGNORECASE)
_QUOTES = frozenset("\"'“”‘’«»")
# Of the word's own sentence: it may be refused there, or be somebody else's.
_DENIED = re.compile(
    r"n['’]t\b|\b(?:not|cannot|never|neither|nor|without|hardly|instead|rather|unable|wrong|refus\w*|ignor\w*"
    r"|sa(?:y|id)\w*|reads?|tells?|told|claim\w*|asks?|asked|writes?|written|states?|instruct\w*|quot\w*)\b",
    re.IGNORECASE,
)
_LONGEST = 20_000  # characters of an answer in which JSON is looked for
_JSON_WORDS = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


def parse(prompt: Prompt, answer: str) -> tuple[int, float | None]:
    """(verdict, grade) of an answer: UNKNOWN where it cannot be read as one, a grade where one was asked."""
    # Reasoning that stands in the answer itself; its beginning or its end may be missing.
    answer = _THINK.split(_END_OF_THINK.split(answer)[-1])[0]
    if prompt.answer == "grade":
        return _parse_grade(answer, prompt.threshold)
    if prompt.answer == "json":
        return _parse_json(answer, prompt.threshold)
    if prompt.answer == "tag":
        return _parse_tag(answer), None
    return _parse_word(answer), None


def _verdict(word: str) -> int:
    return RELEVANT if word.lower() == "yes" else IRRELEVANT


def _words(answer: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Za-z]+", answer)} & {"yes", "no"}


def _parse_word(answer: str) -> int:
    # The single word that was asked for, whatever stands around it; "Yes and no" is no answer.
    first = _FIRST_WORD.match(answer)
    return _verdict(first[1]) if first and len(_words(answer)) == 1 else UNKNOWN


def _parse_tag(answer: str) -> int:
    # The last tag is the final answer; the reasoning before it may quote others.
    tags = _TAG.findall(answer)
    if tags:
        return _verdict(next(group for group in tags[-1] if group))
    # Many models leave the tag out and end with the bare word: on a line of its own, or after a clear break
    # as the only one of the two words. 'No, although the item says "Yes"' is neither.
    lines = answer.strip().splitlines() or [""]
    last = _LAST_LINE.fullmatch(lines[-1])
    if last is not None:
        return _verdict(last[1])
    last = _LAST_WORD.search(lines[-1])
    if last is None or len(_words(answer)) != 1 or not _is_meant(lines[-1][: last.start()], last[2]):
        return UNKNOWN
    return _verdict(last[1])


def _is_meant(before: str, after: str) -> bool:
    """Whether a line's last word is its answer, going by what stands before and after it.

    Not where it is no more than a sentence's end, is quoted, or its sentence denies it or tells what somebody
    says.
    """
    bare = before.rstrip(" \t*")
    between = before[len(bare) :]
    is_closed = not _QUOTES.isdisjoint(after)
    if bare[-1:] in _QUOTES:
        bare = bare[:-1].rstrip(" \t*")
        return is_closed and _SO.search(bare) is not None  # so "Yes"
    if is_closed:
        return False
    if _SO.search(bare) or (between and bare[-1:] in (".", "!", "?")):
        return True  # what comes before is another clause, whatever it denies
    sentence = re.split(r"[.!?]\s", bare)[-1]
    return (bare[-1:] in (":", ",") or "*" in between) and _DENIED.search(sentence) is None


def _parse_grade(answer: str, threshold: float) -> tuple[int, float | None]:
    found = re.fullmatch(
        r"\W*(?:grade|score|relevance)?\W*(?<![-−–])([0-3])(?:\.0)?\W*", answer.strip(), re.IGNORECASE
    )
    if not found:
        return UNKNOWN, None
    return _graded(float(found[1]), threshold)


def _parse_json(answer: str, threshold: float) -> tuple[int, float | None]:
    found = _last_object(answer)
    relevant = found.get("relevant", found.get("answer"))
    if isinstance(relevant, str):
        relevant = _JSON_WORDS.get(relevant.strip().rstrip(".").lower())
    if isinstance(relevant, bool | int | float) and relevant in (0, 1):
        return (RELEVANT if relevant else IRRELEVANT), None
    grade = found.get("grade")
    if isinstance(grade, str) and re.fullmatch(r"\s*\d(\.\d+)?\s*", grade):
        grade = float(grade)
    if isinstance(grade, int | float) and not isinstance(grade, bool) and 0 <= grade <= 3:
        return _graded(float(grade), threshold)
    return UNKNOWN, None


def _last_object(answer: str) -> dict[str, Any]:
    """The last JSON object in a text, its names in lower case; empty where there is none that is whole."""
    answer = answer[-_LONGEST:]
    decoder, start = json.JSONDecoder(), answer.find("{")
    found: dict[str, Any] = {}
    while start >= 0:
        try:
            found, end = decoder.raw_decode(answer, start)
        except (ValueError, RecursionError):  # what is cut off was meant to replace what came before
            found, end = {}, start + 1
        start = answer.find("{", end)
    return {name.lower(): value for name, value in found.items()}


def _graded(grade: float, threshold: float) -> tuple[int, float]:
    return (RELEVANT if grade >= threshold else IRRELEVANT), grade
