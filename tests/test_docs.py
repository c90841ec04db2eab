"""What the documents show is what comes."""

import doctest
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_the_integer_example():
    ran = doctest.testfile(str(DOCS / "methods.md"), module_relative=False)
    assert ran.attempted >= 15 and not ran.failed
