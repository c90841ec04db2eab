from tests.cli.conftest import run, text_file

__all__ = ["run", "text_file"]
