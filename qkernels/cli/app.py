"""The commands put together, and what becomes of their errors.

A command imports torch and transformers when it runs, so that help and usage errors are immediate.
"""

from __future__ import annotations

import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from qkernels.cli import bench, convert, doctor, inspect, listing, measure, mixed, quantize
from qkernels.cli.console import INTERRUPTED, complain


class _Commands(TyperGroup):
    """Turns the errors a user can cause into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        from qkernels.errors import QuantizationError

        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            complain("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise
        except (QuantizationError, OSError) as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            else:
                complain(_one_line(error))
            raise typer.Exit(1) from None
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error) or ctx.params.get("debug"):
                raise
            complain(f"out of memory: {_first_line(error)}")
            raise typer.Exit(1) from None


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python, or torch on the CPU or a GPU, got no memory."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no more can be had"])[0]


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


app = typer.Typer(
    name="qkernels",
    cls=_Commands,
    help="Quantize language models and run them on quantized linear layers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Quantize language models and run them on quantized linear layers."""


app.command("doctor")(doctor.doctor)
app.command("quantize")(quantize.quantize)
app.command("sensitivity")(mixed.sensitivity)
app.command("convert")(convert.convert)
app.command("eval")(measure.evaluate)
app.command("generate")(measure.generate)
app.command("explain")(inspect.explain)
app.command("inspect")(inspect.inspect)
app.command("list")(listing.listing)
app.command("bench", add_help_option=False, context_settings=bench.PASS_THROUGH)(bench.bench)
