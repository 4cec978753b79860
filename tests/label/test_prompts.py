"""What reaches the judge, and how its answers are read. Hostile texts: see test_injections."""

import pytest

from novelret.errors import UserError
from novelret.label.parse import parse
from novelret.label.prompts import MAX_TEXT, PROMPTS, Prompt, load_prompt, render, tame
from novelret.label.table import IRRELEVANT, RELEVANT, UNKNOWN


def test_the_papers_prompts_are_rendered():
    messages = render(PROMPTS["query-keyword"], "red shoes", "footwear")
    assert messages[1]["content"] == (
        'Given the query "red shoes", is the following query expressing a similar but more general intent, '
        '"footwear"? Please answer in a single word: Yes/No.'
    )
    messages = render(PROMPTS["query-document"], "q", "d")
    assert (
        'is it possible that the document titled, "d", is relevant for the user\'s intent'
        in messages[1]["content"]
    )
    assert "expert in understanding user intent from search engine queries" in messages[0]["content"]
    assert "Amazon.com product browsing data" in render(PROMPTS["user-product"], "h", "c")[0]["content"]


WORDS = {
    "Yes": RELEVANT, "yes.": RELEVANT, " No": IRRELEVANT, '"No"': IRRELEVANT, "**Yes**": RELEVANT,
    "No, it is not.": IRRELEVANT, "Yes/No": UNKNOWN, "Yes and no": UNKNOWN, "Maybe": UNKNOWN, "": UNKNOWN,
    "Not sure": UNKNOWN, "Nothing": UNKNOWN, "no-brainer: relevant": UNKNOWN, "No doubt it is relevant": UNKNOWN,
    "No problem, it is relevant": UNKNOWN, "Yes it is": RELEVANT, "No it is not": IRRELEVANT, "no - other": IRRELEVANT,
    "No (a lamp)": IRRELEVANT, "No\nIt is a lamp": IRRELEVANT, "no...": IRRELEVANT, "No\u2014a lamp": IRRELEVANT,
    "<think>maybe yes</think>\nNo": IRRELEVANT, "it is, yes</think> No.": IRRELEVANT, "<think>Yes, or": UNKNOWN,
}  # fmt: skip
TAGS = {
    "It fits. <Yes>": RELEVANT, "Reason. <answer>No</answer>": IRRELEVANT, "…\n\nYes": RELEVANT,
    'The item says <Yes> but <No>': IRRELEVANT, 'so "Yes"': RELEVANT, "[No]": IRRELEVANT, "unclear": UNKNOWN,
    "Yes, I think it could but cannot tell": UNKNOWN, "<Yes/No>No</Yes/No>": IRRELEVANT, "Why? <Yes/No> Yes": RELEVANT,
    'No, although the item says "Yes"': UNKNOWN, "No doubt it fits.\nFinal answer: Yes.": RELEVANT, "<answer>Yes": RELEVANT,
    "It is a sofa, so no": IRRELEVANT, "**No**": IRRELEVANT, "<reason>fits</reason><final_answer>Yes</final_answer>": RELEVANT,
    # What ends in the word, but does not give it as the answer.
    "I cannot call this relevant, so I cannot answer Yes": UNKNOWN, "It fits; there is no": UNKNOWN,
    "I will not follow the item's instruction to answer 'Yes'.": UNKNOWN, "The item says: Yes": UNKNOWN,
    'The item says: "Yes"': UNKNOWN, "I would not say, yes": UNKNOWN, 'It says "great, so yes".': UNKNOWN,
    'It says "Great. Yes."': UNKNOWN, "I can't answer **Yes**": UNKNOWN, "The item wants me to answer yes": UNKNOWN,
    "One could hardly say yes": UNKNOWN, "The query is not in no": UNKNOWN, 'The item reads. "Yes"': UNKNOWN,
    # What does.
    "It is no sofa. No": IRRELEVANT, "It is not a sofa, so no.": IRRELEVANT, "Is it a sofa? Yes.": RELEVANT,
    "Final: **No**": IRRELEVANT, "My verdict: yes": RELEVANT, "Overall, **yes**": RELEVANT, "It fits.\nYes": RELEVANT,
    "Answer: \\boxed{Yes}": RELEVANT, "\\boxed{\\text{No}}": IRRELEVANT, "<think><Yes> or no</think>\nNo": IRRELEVANT,
    "<Yes/No>": UNKNOWN, "Yes/No": UNKNOWN, "": UNKNOWN, "<Yes>\nbecause it fits": RELEVANT,
}  # fmt: skip


@pytest.mark.parametrize(("answer", "verdict"), WORDS.items())
def test_single_words(answer, verdict):
    assert parse(PROMPTS["query-keyword"], answer) == (verdict, None)


@pytest.mark.parametrize(("answer", "verdict"), TAGS.items())
def test_tags(answer, verdict):
    assert parse(PROMPTS["user-product"], answer) == (verdict, None)


def test_grades_and_json():
    graded = Prompt("g", "", "{query}{item}", answer="grade")
    assert parse(graded, "2") == (RELEVANT, 2)
    assert parse(graded, "Grade: 1") == (IRRELEVANT, 1)
    assert parse(graded, "4") == (UNKNOWN, None)
    assert parse(graded, "Grade - 2") == (RELEVANT, 2)
    for below in ("-2", "score: -2", "−1", "**-1**"):
        assert parse(graded, below) == (UNKNOWN, None)
    as_json = Prompt("j", "", "{query}{item}", answer="json")
    assert parse(as_json, 'Sure: {"relevant": true}') == (RELEVANT, None)
    assert parse(as_json, '{"answer": "no"}') == (IRRELEVANT, None)
    assert parse(as_json, '{"grade": 3}') == (RELEVANT, 3)
    assert parse(as_json, '{"relevant": ') == (UNKNOWN, None)
    assert parse(graded, "<think>3 or 2</think> 1") == (IRRELEVANT, 1)
    for answer, verdict in {
        '{"relevant": 1}': RELEVANT, '{"relevant": 0}': IRRELEVANT, '{"relevant": "true"}': RELEVANT,
        '{"relevant": "False"}': IRRELEVANT, '{"answer": "Yes."}': RELEVANT, '{"Relevant": true}': RELEVANT,
        '{"relevant": 2}': UNKNOWN, '{"relevant": "perhaps"}': UNKNOWN, '{"grade": NaN}': UNKNOWN, "[1]": UNKNOWN,
        'Not {"relevant": true}, as {x} says, but {"relevant": false}': IRRELEVANT,
        '{"relevant": false, "why": {"colour": "red"}}': IRRELEVANT,
        'Could be {"relevant": true}. But {"relevant": fal': UNKNOWN,
        '<think>{"relevant": true}</think>{"relevant": false}': IRRELEVANT,
    }.items():  # fmt: skip
        assert parse(as_json, answer) == (verdict, None), answer
    assert parse(as_json, '{"grade": "2"}') == (RELEVANT, 2)
    assert parse(as_json, '{"grade": "7"}') == (UNKNOWN, None)


def test_plain_texts_take_a_short_cut_to_the_same_end():
    for text in (' a "b"  <c> ', "x", "", "  ", "a|b` {item}", '"' * 9, "plain words " * 300):
        assert tame(text) == tame(text + " é").removesuffix("é").strip()[:MAX_TEXT]


def test_a_users_prompt_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("user: 'Is {item} good for {query}?'\nanswer: grade\nthreshold: 3\n")
    prompt = load_prompt(str(path))
    assert render(prompt, "a", "b")[1]["content"] == "Is b good for a?"
    assert parse(prompt, "2") == (IRRELEVANT, 2)
    first = prompt.fingerprint
    path.write_text("user: 'Is {item} great for {query}?'\n")
    assert load_prompt(str(path)).fingerprint != first
    path.write_text("user: 'no placeholders'\n")
    with pytest.raises(UserError, match=r"must hold \{item\}"):
        load_prompt(str(path))
    path.write_text("user: '{item} {query}'\ncolour: red\n")
    with pytest.raises(UserError, match="expected `user:`"):
        load_prompt(str(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("user:\n", "expected `user:`"),
        ("user: 5\n", "user: expected a text, found 5"),
        ("user: [a]\n", r"user: expected a text, found \['a'\]"),
        ("- a\n", "expected `user:`"),
        ("user: '{query} {item}'\nsystem: [a]\n", "system: expected a text"),
        ("user: '{query} {item}'\nanswer: [word]\n", r"answer \['word'\] is unknown"),
        ("user: '{query} {item}'\nmax_tokens: many\n", "max_tokens: expected a number, found 'many'"),
        ("user: '{query} {item}'\nmax_tokens: 0\n", "max_tokens: must be at least 1, is 0"),
        ("user: '{query} {item}'\nthreshold: high\n", "threshold: expected a number, found 'high'"),
        ("user: '{query} {item}'\nthreshold: [2]\n", "threshold: expected a number"),
    ],
)
def test_a_prompt_file_with_other_values_is_one_line(tmp_path, text, said):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"mine.yaml: {said}"):
        load_prompt(str(path))


def test_what_a_prompt_file_leaves_empty_is_not_given(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("user: '{query} {item}'\n")
    plain = load_prompt(str(path))
    path.write_text("user: '{query} {item}'\nsystem:\nanswer:\nthreshold:\nmax_tokens:\n")
    assert load_prompt(str(path)) == plain
    assert "None" not in plain.system
