"""Patterns give what `re.match` gives, in bounded time, or are refused."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qkernels.checkpoints import patterns
from qkernels.checkpoints.patterns import Pattern
from qkernels.errors import CheckpointError

ATOMS = st.sampled_from(
    ["a", "b", ".", r"\.", r"\d", "[ab]", "[^a.]", "[]a]", "^", "$", r"\b", "{", "x", r"\w", "}"]
)
COUNTS = st.sampled_from(["", "", "*", "+", "?", "{2}", "{1,}", "{,2}", "{0,3}", "*?", "+?", "{,}"])


@st.composite
def pattern_texts(draw, depth=3):
    """A pattern, most often one that `re` takes."""
    kind = draw(st.integers(0, 4)) if depth else 0
    if kind < 2:
        return draw(ATOMS) + draw(COUNTS)
    inner = draw(pattern_texts(depth - 1))
    if kind == 2:
        return inner + draw(pattern_texts(depth - 1))
    if kind == 3:
        return f"{inner}|{draw(pattern_texts(depth - 1))}"
    opened = draw(st.sampled_from(["(", "(?:", "(?P<n>", "(?=", "(?!"]))
    return f"{opened}{inner}){draw(COUNTS)}"


@pytest.mark.parametrize("ways", [patterns.WAYS, 0])
@settings(max_examples=1500, deadline=None)
@given(pattern_texts(), st.text("ab.x1{}", max_size=7))
@example(r"model\.layers\.\d+\.mlp", "model.layers.11.mlp.up")
@example("(a|ab)(c|bcd)(d*)", "abcd")
@example("(?:a{0,2}){3}b", "aaaab")
def test_they_match_what_re_matches(ways, text, name):
    try:
        expected = re.match(text, name) is not None
    except re.error:
        with pytest.raises(CheckpointError, match="is no regular expression"):
            Pattern(text)
        return
    try:
        made = Pattern(text)
    except CheckpointError:
        # Counts that never give back, which some versions of Python know.
        assert re.search(r"[*+?}]\+", text)
        return
    # With none allowed to `re`, everything is matched by positions.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patterns, "WAYS", ways)
        assert made.matches(name) == expected


@pytest.mark.parametrize(
    "text",
    [
        "(a+)+b",
        "(a|a)*b",
        "(a*)*b",
        "a?" * 120 + "a" * 120 + "b",
        "(a|ab|aa)" * 40 + "c",
        "(.*a){40}b",
        ".*.*.*.*.*.*.*.*b",
        "(?:(?:a{1,500}){1,500}){1,99}b",
        "(?!(a+)+b)(a*)*c",
        "(((a*)*)*)*b",
    ],
)
def test_none_takes_longer_than_its_size_allows(text):
    steps = 0
    made = Pattern(text)
    find = patterns._Atom.find

    def counted(self, *arguments):
        nonlocal steps
        steps += 1
        return find(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patterns._Atom, "find", counted)
        assert made._root.ways(200) > patterns.WAYS
        assert not made.matches("a" * 200)
    assert 0 < steps <= 201 * len(text)


@pytest.mark.parametrize(
    "text",
    [r".*layers\.\d+\.mlp\.(gate|up|down)_proj$", ".*", r"re.*experts\.\d+\..*", "(?!.*lm_head).*"],
)
def test_what_people_write_is_left_to_re(text):
    assert Pattern(text)._root.ways(100) <= patterns.WAYS


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("(", "is no regular expression"),
        ("*a", "is no regular expression"),
        ("a{99999999999}", "is no regular expression"),
        (r"(a)\1", r"has \\1, which is not supported"),
        ("(?P<x>a)(?P=x)", r"has \(\?P=, which is not supported"),
        ("(?i)a", r"has \(\?i\), which is not supported"),
        ("(?<=a)b", r"has \(\?<=, which is not supported"),
        ("(?>a*)b" if hasattr(re, "NOFLAG") else r"\1", "not supported|no regular expression"),
        ("(" * 40 + ")" * 40, "groups more than 30 deep"),
        ("a" * 501, "longer than 500 characters"),
    ],
)
def test_what_is_not_supported_is_named(text, named):
    with pytest.raises(CheckpointError, match=named):
        Pattern(text)


def test_names_have_a_length():
    assert Pattern("a*$").matches("a" * 500)
    with pytest.raises(CheckpointError, match=r"the name 'aaa.* is longer than 500 characters"):
        Pattern("a*").matches("a" * 501)
