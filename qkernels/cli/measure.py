"""`qkernels eval` and `qkernels generate`: perplexity and text of a model, quantized or not."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from qkernels.cli import compare, models
from qkernels.cli.compare import Layers
from qkernels.cli.console import as_json, note, output, progress_bar, table

SchemeOption = Annotated[
    str | None, typer.Option("--scheme", help="Quantize to this scheme first, by rounding.")
]


def evaluate(
    model: models.ModelArgument,
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 text; an English novel is shipped.")
    ] = None,
    scheme: SchemeOption = None,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="DENSE",
            help="The model that MODEL was made from: measure how far it is from that too, by KL "
            "divergence and top-1 agreement, or of encoders by the cosine of embeddings.",
        ),
    ] = None,
    layers: Annotated[
        Layers | None,
        typer.Option(
            help="With --against: signal to noise of the ten worst layers, or of all, on the "
            "inputs that they have in the dense model."
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what was measured there too.")
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(min=1, help="Only this many windows, of encoders paragraphs, evenly spaced."),
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 1,
    dtype: models.StoredPrecisionOption = None,
    device: models.DeviceOption = "auto",
) -> None:
    """Measure the perplexity of a model on a text, and how far it is from its dense one."""
    from qkernels.errors import QuantizationError
    from qkernels.models import evaluation, loading

    if layers is not None and against is None:
        raise QuantizationError("--layers compares with the dense model: name it by --against")
    if json is not None:
        models.check_file(json)
    content = evaluation.read_text(text or evaluation.SHIPPED_TEXT)
    network, tokenizer = _load(model, scheme, dtype, device, causal=against is None)
    rows = table("what", "value")
    rows.add_row("model", f"{model}, {_kind(network)}")
    rows.add_row("text", str(text) if text else f"shipped: {evaluation.SHIPPED_TEXT.name}")
    result: Any
    if against is None:
        ids = evaluation.encode(tokenizer, content)
        with progress_bar("perplexity") as update:
            result = evaluation.perplexity(
                network, ids, window=window, batch=batch, max_windows=windows, progress=update
            )
        rows.add_row("perplexity", f"{result.perplexity:.4f}")
    else:
        result = compare.compare(
            network,
            tokenizer,
            against,
            content,
            device=device,
            causal=loading.is_causal(model),
            window=window,
            batch=batch,
            most=windows,
            layers=layers is not None,
        )
        for what, value in compare.lines(result):
            rows.add_row(what, value)
    if hasattr(result, "windows"):
        rows.add_row(
            "measured on",
            f"{result.tokens:,} of {result.total_tokens:,} tokens, "
            f"{result.windows} windows of {window}",
        )
    size = evaluation.weight_bytes(network)
    rows.add_row("weights of linear layers", models.mebibytes(size))
    rows.add_row(
        "tokens a second", f"{result.tokens / result.seconds:,.0f} in {result.seconds:.1f} s"
    )
    output().print(rows)
    if layers is not None:
        output().print(compare.layer_table(result, layers))
    if json is not None:
        record = {
            "model": str(model),
            "against": None if against is None else str(against),
            "schemes": _kind(network),
            "text": str(text or evaluation.SHIPPED_TEXT.name),
            "weight_bytes": size,
            **asdict(result),
        }
        json.write_text(as_json(record), encoding="utf-8")


def generate(
    model: models.ModelArgument,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue or answer.")],
    scheme: SchemeOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask it as a chat message instead of continuing it.")
    ] = False,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the step from one token to the next first, about a minute; the next time "
            "some seconds. For long texts.",
        ),
    ] = False,
    dtype: models.StoredPrecisionOption = None,
    device: models.DeviceOption = "auto",
) -> None:
    """Continue a text, or answer a chat message, greedily."""
    from qkernels.errors import QuantizationError
    from qkernels.models import evaluation

    if not prompt.strip():
        raise QuantizationError("--prompt is empty")
    network, tokenizer = _load(model, scheme, dtype, device)
    with progress_bar("compiling, then generating" if compile else "generating"):
        result = evaluation.generate_text(
            network, tokenizer, prompt, max_new_tokens=max_new_tokens, chat=chat, compile=compile
        )
    output().print(result.text, soft_wrap=True)
    compiled = f", compiled in {result.compile_seconds:.0f} s" if compile else ""
    note(
        f"{result.tokens} tokens in {result.seconds:.1f} s, "
        f"{result.tokens_per_second:.1f} tokens a second, {_kind(network)}{compiled}"
    )


def _load(
    path: Path,
    scheme: str | None,
    dtype: models.Precision | None,
    device: str,
    *,
    causal: bool = True,
) -> tuple[Any, Any]:
    from qkernels.models.loading import require_causal
    from qkernels.scheme import QuantScheme

    parsed = None if scheme is None else QuantScheme.parse(scheme)
    if causal:
        require_causal(path)
    network, tokenizer = models.load(path, dtype, device, dense=parsed is not None)
    if parsed is not None:
        models.quantize_with_bar(network, parsed)
    return network, tokenizer


def _kind(network: Any) -> str:
    from qkernels.modules import WQLinear

    schemes = {str(m.scheme) for m in network.modules() if isinstance(m, WQLinear)}
    return ", ".join(sorted(schemes)) or models.Precision.of(network.dtype).value
