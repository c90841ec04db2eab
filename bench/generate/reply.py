"""What a contestant's process says: a line of JSON for each request that it reads.

The first line is `{"ready": ...}`, or `{"why_not": "..."}` where it cannot take part. A request is
`{"prompt": [ids], "new": n}`; the reply `{"first": seconds to the first token, "rest": seconds from
it to the last}`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn


class NotHere(Exception):
    """Why a contestant cannot take part."""


class Replies:
    """Standard output as it was, for replies alone: what libraries print goes to standard error."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def say(self, what: dict[str, Any]) -> None:
        print(json.dumps(what), file=self._out, flush=True)


def serve(start: Callable[[], tuple[dict[str, Any], Callable[[list[int], int], Any]]]) -> NoReturn:
    """Starts a contestant and answers requests until standard input ends.

    Args:
        start: gives what is to be said of it, and what takes a prompt and a number of new tokens
            and gives both times. Raises NotHere where it cannot take part.
    """
    replies = Replies()
    try:
        about, generate = start()
    except NotHere as error:
        replies.say({"why_not": str(error)})
        sys.exit(0)
    replies.say({"ready": about})
    for line in sys.stdin:
        request = json.loads(line)
        first, rest = generate(request["prompt"], request["new"])
        replies.say({"first": first, "rest": rest})
    sys.exit(0)
