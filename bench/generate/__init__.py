"""Tokens a second of whole models, beside other engines: `python -m bench.generate`."""
