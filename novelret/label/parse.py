"""From a judge's raw answer to a verdict. Apart from asking, so that it can be redone for free."""

from __future__ import annotations

import json
import re

from novelret.label.prompts import Prompt
from novelret.label.table import IRRELEVANT, RELEVANT, UNKNOWN

# <Yes>, [Yes], <answer>Yes</answer>, and the paper's own words taken literally: <Yes/No>Yes</Yes/No>.
_TAG = re.compile(
    r"<[a-z_ ]*/?[a-z_ ]+>\s*\W?(yes|no)\W?\s*(?:<|$)|<\s*(yes|no)\s*/?>|\[\s*(yes|no)\s*\]", re.IGNORECASE
)
_LAST_LINE = re.compile(r"\W*(?:(?:the )?(?:final )?answer(?: is)?\W*)?(yes|no)\W*", re.IGNORECASE)


def parse(prompt: Prompt, answer: str) -> tuple[int, float | None]:
    """(verdict, grade) of an answer: UNKNOWN where it cannot be read as one, a grade where one was asked."""
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
    first = re.match(r"\W*(yes|no)\b", answer, re.IGNORECASE)
    return _verdict(first[1]) if first and len(_words(answer)) == 1 else UNKNOWN


def _parse_tag(answer: str) -> int:
    # The last tag is the final answer; the reasoning before it may quote others.
    tags = _TAG.findall(answer)
    if tags:
        return _verdict(next(group for group in tags[-1] if group))
    # Many models leave the tag out and end with the bare word: on a line of its own, or as the only one of
    # the two words. 'No, although the item says "Yes"' is neither.
    lines = answer.strip().splitlines() or [""]
    last = _LAST_LINE.fullmatch(lines[-1])
    if last is None and len(_words(answer)) == 1:
        last = re.search(r"\b(yes|no)\W*$", lines[-1], re.IGNORECASE)
    return _verdict(last[1]) if last else UNKNOWN


def _parse_grade(answer: str, threshold: float) -> tuple[int, float | None]:
    found = re.fullmatch(r"\W*(?:grade|score|relevance)?\W*([0-3])(?:\.0)?\W*", answer.strip(), re.IGNORECASE)
    if not found:
        return UNKNOWN, None
    return _graded(float(found[1]), threshold)


def _parse_json(answer: str, threshold: float) -> tuple[int, float | None]:
    found = re.search(r"\{.*\}", answer, re.DOTALL)
    try:
        value = json.loads(found[0]) if found else None
    except json.JSONDecodeError:
        return UNKNOWN, None
    if not isinstance(value, dict):
        return UNKNOWN, None
    relevant = value.get("relevant", value.get("answer"))
    if isinstance(relevant, bool):
        return (RELEVANT if relevant else IRRELEVANT), None
    if isinstance(relevant, str) and relevant.strip().lower() in ("yes", "no"):
        return _verdict(relevant.strip()), None
    grade = value.get("grade")
    if isinstance(grade, int | float) and not isinstance(grade, bool) and 0 <= grade <= 3:
        return _graded(float(grade), threshold)
    return UNKNOWN, None


def _graded(grade: float, threshold: float) -> tuple[int, float]:
    return (RELEVANT if grade >= threshold else IRRELEVANT), grade
