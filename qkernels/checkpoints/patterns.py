"""Regular expressions that a file brings along, matched in bounded time.

`re` tries one way of matching after the other, and a pattern such as (a+)+b has exponentially many.
Where there may be too many, a pattern is matched by positions instead: from the set of those where
a part may begin follows the set of those where it may end, each worked out once. That takes at most
(length of the pattern) * (length of the text)^2 steps. It needs patterns that remember nothing, so
backreferences are refused, and with them what else no pattern for names needs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NoReturn

from qkernels.checkpoints.config import brief
from qkernels.errors import CheckpointError

LONGEST = 500
"""Characters of a pattern, and of a name that is matched."""

WAYS = 4 * 10**6
"""Ways that `re` may try: a fraction of a second."""

_DEEPEST = 30
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:[AbBdDsSwWZafnrtv]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[^0-9A-Za-z])")
_COUNT = re.compile(r"[*+?]|\{(?!\})(\d*)(,?)(\d*)\}")
_GROUP = re.compile(r"\((?:\?(?::|P<\w+>|(?P<look>[=!])))?(?!\?)")


class Pattern:
    """A regular expression, matched from the beginning of a text as by `re.match`.

    Raises:
        CheckpointError: for what is none, or not supported here.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        if len(text) > LONGEST:
            raise CheckpointError(f"{text[:40]!r}... is longer than {LONGEST} characters")
        try:
            self._plain = re.compile(text)
        # re fails in its own ways at counts and nesting beyond what it takes.
        except (re.error, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{brief(text)} is no regular expression: {error}") from None
        self._root = _Parser(text).parse()

    def matches(self, name: str) -> bool:
        """Whether a text that begins like `name` does is one of the pattern's.

        Raises:
            CheckpointError: for a name of more than 500 characters.
        """
        if len(name) > LONGEST:
            raise CheckpointError(f"the name {name[:40]!r}... is longer than {LONGEST} characters")
        if self._root.ways(len(name)) <= WAYS:
            return self._plain.match(name) is not None
        return bool(self._root.ends(_Text(name), 0))


@lru_cache(maxsize=1024)
def pattern(text: str) -> Pattern:
    """The `Pattern` of a text; those made before are remembered."""
    return Pattern(text)


@dataclass(eq=False)
class _Text:
    """What is matched, and where the parts end that were tried before."""

    text: str
    known: dict[tuple[_Node, int], frozenset[int]] = field(default_factory=dict)


class _Node:
    """A part of a pattern."""

    def ways(self, length: int) -> int:
        """How many ways of matching there may be in a text of this length; beyond WAYS, any."""
        raise NotImplementedError

    def find(self, text: _Text, start: int) -> frozenset[int]:
        raise NotImplementedError

    def ends(self, text: _Text, start: int) -> frozenset[int]:
        """Where the part may end that begins at `start`."""
        key = (self, start)
        if key not in text.known:
            text.known[key] = self.find(text, start)
        return text.known[key]

    def all_ends(self, text: _Text, starts: frozenset[int]) -> frozenset[int]:
        return frozenset(end for start in starts for end in self.ends(text, start))


@dataclass(eq=False)
class _Atom(_Node):
    """One character, or a condition such as \\b."""

    regex: re.Pattern[str]

    def ways(self, length: int) -> int:
        return 1

    def find(self, text: _Text, start: int) -> frozenset[int]:
        match = self.regex.match(text.text, start)
        return frozenset() if match is None else frozenset((match.end(),))


@dataclass(eq=False)
class _Sequence(_Node):
    parts: list[_Node]

    def ways(self, length: int) -> int:
        product = 1
        for part in self.parts:
            product = min(product * part.ways(length), WAYS + 1)
        return product

    def find(self, text: _Text, start: int) -> frozenset[int]:
        found = frozenset((start,))
        for part in self.parts:
            found = part.all_ends(text, found)
        return found


@dataclass(eq=False)
class _Choice(_Node):
    options: list[_Node]

    def ways(self, length: int) -> int:
        return sum(option.ways(length) for option in self.options)

    def find(self, text: _Text, start: int) -> frozenset[int]:
        return frozenset(end for option in self.options for end in option.ends(text, start))


@dataclass(eq=False)
class _Repeat(_Node):
    body: _Node
    least: int
    most: int | None

    def ways(self, length: int) -> int:
        if not isinstance(self.body, _Atom):
            return self.body.ways(length) + 1 if self.most == 1 else WAYS + 1
        return 2 if self.most == 1 else length + 1

    def find(self, text: _Text, start: int) -> frozenset[int]:
        # Of more repetitions than characters some are empty, and of those one more or less is the
        # same.
        longest = len(text.text) + 1
        now = frozenset((start,))
        for _ in range(min(self.least, longest)):
            now = self.body.all_ends(text, now)
        found, more = now, longest if self.most is None else self.most - self.least
        for _ in range(min(more, longest)):
            now = self.body.all_ends(text, now) - found
            if not now:
                break
            found |= now
        return found


@dataclass(eq=False)
class _Look(_Node):
    """A condition on what follows."""

    body: _Node
    wanted: bool

    def ways(self, length: int) -> int:
        return self.body.ways(length)

    def find(self, text: _Text, start: int) -> frozenset[int]:
        found = bool(self.body.ends(text, start))
        return frozenset((start,)) if found == self.wanted else frozenset()


class _Parser:
    """Takes apart a pattern that `re` accepts."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def parse(self) -> _Node:
        return self._choice(0)

    def _choice(self, depth: int) -> _Node:
        if depth > _DEEPEST:
            self._refuse(f"groups more than {_DEEPEST} deep")
        options = [self._sequence(depth)]
        while self._peek() == "|":
            self.at += 1
            options.append(self._sequence(depth))
        return options[0] if len(options) == 1 else _Choice(options)

    def _sequence(self, depth: int) -> _Node:
        parts: list[_Node] = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._counted(self._part(depth)))
        return parts[0] if len(parts) == 1 else _Sequence(parts)

    def _part(self, depth: int) -> _Node:
        if self._peek() != "(":
            return self._atom()
        group = _GROUP.match(self.text, self.at)
        if group is None:
            self._refuse(self.text[self.at : self.at + 4])
        self.at = group.end()
        body = self._choice(depth + 1)
        self.at += 1
        return body if group["look"] is None else _Look(body, group["look"] == "=")

    def _atom(self) -> _Node:
        kinds = {"[": _CLASS, "\\": _ESCAPE}
        match = kinds.get(self._peek(), re.compile(".", re.DOTALL)).match(self.text, self.at)
        if match is None:
            self._refuse(self.text[self.at : self.at + 2])
        self.at = match.end()
        # A # or a space means itself without flags, which are refused.
        return _Atom(re.compile(match[0]))

    def _counted(self, part: _Node) -> _Node:
        match = _COUNT.match(self.text, self.at)
        if match is None:
            return part
        self.at = match.end()
        if self._peek() == "?":
            # The shortest way counts; whether there is one does not depend on that.
            self.at += 1
        elif self._peek() == "+":
            self._refuse("+ after a count")
        if match[0][0] != "{":
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[match[0]]
            return _Repeat(part, least, most)
        least = int(match[1] or 0)
        if not match[2]:
            return _Repeat(part, least, least)
        return _Repeat(part, least, int(match[3]) if match[3] else None)

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _refuse(self, what: str) -> NoReturn:
        raise CheckpointError(f"{brief(self.text)} has {what}, which is not supported in a pattern")
