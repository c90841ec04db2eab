"""The quantization_config of AWQ, GPTQ, Marlin and AutoRound, which share their keys.

Which layers are quantized stands in the tensors; here stands how. It is in config.json, else in a
file beside it that writers left there at first. What is not said anywhere is None, and the readers
find it in the shapes where these say it.

`dynamic` (GPTQModel) has patterns of how names begin, with what is different there: "+:" before one
may be left out, and "-:" leaves a layer dense; the first that matches counts. `extra_config`
(AutoRound) has names and patterns of parts of names, and 16 bits leave a layer dense.
Sources: AutoAWQ (MIT), GPTQModel, AutoRound and Transformers (Apache-2.0), read as documentation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from qkernels.checkpoints.config import Config, brief, only, quantization_of, read_json, typed
from qkernels.checkpoints.patterns import pattern
from qkernels.checkpoints.store import Store
from qkernels.errors import CheckpointError

AWQ, AWQ_GEMV, AWQ_FAST = "awq", "awq-gemv", "awq-gemv-fast"
GPTQ, GPTQ_V2, MARLIN = "gptq", "gptq_v2", "marlin"

_LAYOUTS: dict[str, dict[str | None, str]] = {
    "awq": {
        **dict.fromkeys((None, "gemm", "exllama", "exllamav2", "ipex"), AWQ),
        "gemv": AWQ_GEMV,
        **dict.fromkeys(("gemv_fast", "llm-awq"), AWQ_FAST),
        "marlin": MARLIN,
    },
    "gptq": {
        **dict.fromkeys((None, "gptq"), GPTQ),
        "gptq_v2": GPTQ_V2,
        "marlin": MARLIN,
    },
    "marlin": dict.fromkeys((None, "gptq", "marlin"), MARLIN),
}
"""quant_method -> what `format` says -> the name of the row; that of None is told what is unknown.

AutoAWQ's exllama and ipex read the words of gemm.
"""

_REFUSED = {
    "marlin_24": "it keeps two of four weights, in an order of tensor cores, and none of our "
    "layouts has a place for which two",
    "gptq_p": "its words hold bits in planes",
    "bitblas": "its words are ordered for one GPU's kernel",
}
"""What is known and not read, and why."""

_SIDE_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where old writers put the section, and whose file it is."""

_SIGNS = (".qweight", ".B")

_MORE = (
    *("activation", "adapter", "rotation", "rotation_config", "rotation_configs"),
    *("static_attention_dtype", "static_kv_dtype", "super_bits", "super_group_size"),
)
"""Keys by which layers compute something else; refused where they say anything."""

_CHANGE_KEYS = frozenset(
    (
        *("bits", "group_size", "sym", "desc_act", "pack_dtype", "data_type", *_MORE),
        *("damp_percent", "damp_auto_increment", "mse", "act_group_aware", "static_groups"),
        *("act_bits", "act_data_type", "act_dynamic", "act_group_size", "act_sym", "scale_dtype"),
    )
)
"""What may be different in a layer."""

_IS_PATTERN = re.compile(r"[*+?^$|()\[\]\\]")
_KEYS = frozenset(
    (
        *("quant_method", "method", "format", "checkpoint_format", "version", "backend"),
        *("w_bit", "q_group_size", "zero_point"),
        *("dynamic", "extra_config", "modules_to_not_convert", "meta", "lm_head"),
        *("is_marlin_format", "awq_gemm_checkpoint", "packing_format"),
        # How codes were found, where they came from and what kernels were to run them.
        "true_sequential",
        *("hyb_act", "model_name_or_path", "model_file_base_name", "tokenizer", "dataset"),
        *("model_seqlen", "block_name_to_quantize", "module_name_preceding_first_block"),
        *("batch_size", "pad_token_id", "max_input_length", "cache_block_outputs"),
        *("modules_in_block_to_quantize", "use_exllama", "disable_exllama", "exllama_config"),
        *("use_cuda_fp16", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "fusing"),
        *("quantize_embed", "offload_to_disk", "offload_to_disk_path", "pack_impl", "v2"),
        *("uri", "quantizer", "fail_safe", "failsafe", "fallback", "preprocessors", "smoother"),
        *("autoround_version", "provider", "amp", "enable_minmax_tuning"),
        *("enable_norm_bias_tuning", "enable_quanted_input", "gradient_accumulate_steps", "iters"),
        *("lr", "minmax_lr", "low_gpu_mem_usage", "nsamples", "quant_block_list"),
        *("seqlen", "supported_types", "to_quant_block_names", "not_use_best_mse", "train_bs"),
        *("static_attention_granularity", "static_kv_granularity", "quant_lm_head"),
    )
).union(_CHANGE_KEYS)


Changes = Mapping[str, Any]
"""What is different in some layers."""


@dataclass(frozen=True)
class Settings:
    """How one layer is quantized; None where nothing says it.

    Attributes:
        group_size: -1 for a scale per channel.
        symmetric: the zero point is half the range, and stored all the same.
        desc_act: columns are in groups by their activations.
    """

    bits: int | None
    group_size: int | None
    symmetric: bool | None
    desc_act: bool | None

    def __str__(self) -> str:
        said = {"bits": self.bits, "group_size": self.group_size, "sym": self.symmetric}
        return ", ".join(f"{k}={v}" for k, v in said.items() if v is not None) or "nothing"


@dataclass(frozen=True)
class PackedSection:
    """A quantization_config, understood.

    Attributes:
        named: layer -> what is different in it, None where it stays dense.
        patterns: the same for the layers that match, the first of which counts.
        dense: names of modules that stay dense.
        quantizers: the programs that wrote it, as "name:version".
    """

    settings: Settings
    named: Mapping[str, Changes | None]
    patterns: tuple[tuple[str, Changes | None], ...]
    dense: tuple[str, ...]
    quantizers: tuple[str, ...]

    def of(self, layer: str) -> Settings:
        """How a quantized layer is.

        Raises:
            CheckpointError: where the section says that it stays dense.
        """
        for name in self.dense:
            if layer == name or layer.endswith("." + name):
                raise CheckpointError(
                    f"{layer} is quantized in the file, and modules_to_not_convert has "
                    f"{brief(name)}"
                )
        matching = (
            (text, changes) for text, changes in self.patterns if pattern(text).matches(layer)
        )
        if layer in self.named:
            text, changes = layer, self.named[layer]
        else:
            text, changes = next(matching, ("", {}))
        if changes is None:
            raise CheckpointError(
                f"{layer} is quantized in the file, and the config leaves {brief(text)} dense"
            )
        return _changed(self.settings, changes, f"the config of {brief(text)}")


def row_of(config: Config, store: Store) -> str | None:
    """The name of the row of the table that a folder belongs to, or None where it is none of ours.

    Raises:
        CheckpointError: for a section that is no object, or says two things.
    """
    section = _section(config, store)
    if section is None:
        return _row_by_tensors(store)
    method = _method(section)
    layouts = _LAYOUTS.get(method or "")
    if layouts is None:
        return None
    if method == "gptq" and section.get("is_marlin_format") is True:
        return MARLIN
    return layouts.get(_stated_format(section), layouts[None])


def detects(row: str) -> Callable[[Config, Store], bool]:
    """Whether a folder is of the format with this name."""
    return lambda config, store: row_of(config, store) == row


def read_section(config: Config, store: Store) -> PackedSection:
    """The section of a folder that `row_of` knows.

    Raises:
        CheckpointError: naming what is wrong with it, or unknown here.
    """
    section = _section(config, store)
    if section is None:
        return PackedSection(Settings(None, None, None, None), {}, (), (), ())
    _check_format(section)
    only(section, _KEYS, "quantization_config")
    pack_dtype = section.get("pack_dtype")
    wanted = "int16" if row_of(config, store) == AWQ_FAST else "int32"
    if pack_dtype not in (None, wanted):
        raise CheckpointError(f"pack_dtype {brief(pack_dtype)} is not supported, {wanted!r} is")
    _check_nothing_else(section, "quantization_config")
    named, patterns = _extra(section)
    return PackedSection(
        _changed(Settings(None, None, None, None), section, "quantization_config"),
        named,
        (*_dynamic(section), *patterns),
        _not_converted(section),
        _quantizers(section),
    )


def layer_names(store: Store, signs: tuple[str, ...]) -> list[str]:
    """The layers of a folder that have a tensor with one of these names, in the file's order."""
    named = (key.rpartition(".") for key in store)
    return list(dict.fromkeys(name for name, _, part in named if name and part in signs))


def _section(config: Config, store: Store) -> dict[str, Any] | None:
    section = quantization_of(config)
    if section is not None or not any(key.endswith(_SIGNS) for key in store):
        return section
    for file, method in _SIDE_FILES.items():
        if (store.folder / file).exists():
            return {"quant_method": method, **read_json(store.folder / file)}
    return None


def _method(section: Config) -> str | None:
    """awq, gptq or marlin, in whatever words; None for what is not known here."""
    method = section.get("quant_method", section.get("method"))
    if method in ("auto-round", "intel/auto-round"):
        return "awq" if "awq" in _packing(section) else "gptq"
    return method if isinstance(method, str) else None


def _packing(section: Config) -> str:
    """What AutoRound calls its layout, such as "auto_round:auto_gptq"."""
    return str(section.get("packing_format", section.get("backend", "auto_round:auto_gptq")))


def _stated_format(section: Config) -> str | None:
    method = section.get("quant_method", section.get("method"))
    if method in ("auto-round", "intel/auto-round"):
        return _packed_by_auto_round(_packing(section))
    if section.get("backend") == "llm-awq":
        return "llm-awq"
    keys = ("format", "checkpoint_format", "version")
    said = {key: str(section[key]).lower() for key in keys if section.get(key) is not None}
    if len(set(said.values())) > 1:
        listed = ", ".join(f"{key}={brief(value)}" for key, value in said.items())
        raise CheckpointError(f"quantization_config names two formats: {listed}")
    return next(iter(said.values()), None)


def _packed_by_auto_round(packing: str) -> str:
    if "awq" in packing:
        return "gemm"
    if "gptqmodel" in packing:
        return "gptq_v2"
    # Where it names GPTQ zero points are stored less one, where it names a kernel they are not.
    kernels = ("auto_round", "auto_round:exllamav2", "auto_round:tritonv2", "auto_round:marlin")
    if packing in kernels:
        return "gptq_v2"
    return "gptq" if "gptq" in packing or packing == "auto" else packing


def _check_format(section: Config) -> None:
    method, stated = _method(section), _stated_format(section)
    layouts = _LAYOUTS[method or ""]
    if stated not in layouts:
        known = ", ".join(name for name in layouts if name is not None)
        reason = f": {_REFUSED[stated]}" if stated in _REFUSED else f"; known are {known}"
        raise CheckpointError(f"the {method} format {brief(stated)} is not supported{reason}")


def _changed(settings: Settings, section: Mapping[str, Any], where: str) -> Settings:
    """`settings` with what a section says."""
    said: dict[str, Any] = {}
    for field, keys, kind in (
        ("bits", ("bits", "w_bit"), int),
        ("group_size", ("group_size", "q_group_size"), int),
        ("symmetric", ("sym",), bool),
        ("desc_act", ("desc_act",), bool),
    ):
        for key in keys:
            if section.get(key) is not None:
                said[field] = typed(section[key], kind, f"{where}: {key}")
    if section.get("zero_point") is not None:
        # Transformers writes sym=true beside it, whatever it is.
        said["symmetric"] = not typed(section["zero_point"], bool, f"{where}: zero_point")
    return replace(settings, **said)


def _dynamic(section: Config) -> list[tuple[str, Changes | None]]:
    found: list[tuple[str, Changes | None]] = []
    for text, value in typed(section.get("dynamic") or {}, dict, "dynamic").items():
        changes = None if text.startswith("-:") else _changes(value, f"dynamic[{brief(text)}]")
        found.append((text.removeprefix("-:").removeprefix("+:"), changes))
    return found


def _extra(
    section: Config,
) -> tuple[dict[str, Changes | None], list[tuple[str, Changes | None]]]:
    named: dict[str, Changes | None] = {}
    patterns: list[tuple[str, Changes | None]] = []
    for text, value in typed(section.get("extra_config") or {}, dict, "extra_config").items():
        where = f"extra_config[{brief(text)}]"
        bits = typed(value, dict, where).get("bits")
        dense = isinstance(bits, int) and bits >= 16
        changes = None if dense else _changes(value, where)
        if _IS_PATTERN.search(text):
            patterns.append((f".*(?:{text})", changes))
        else:
            named[text] = changes
    return named, patterns


def _changes(value: object, where: str) -> Changes:
    changes = typed(value, dict, where)
    only(changes, _CHANGE_KEYS, where)
    if changes.get("pack_dtype") not in (None, "int32"):
        raise CheckpointError(f"{where}: pack_dtype must be 'int32'")
    _check_nothing_else(changes, where)
    return changes


def _check_nothing_else(section: Config, where: str) -> None:
    """Raises where a section says that layers compute more than a product with their weights."""
    for key in _MORE:
        if section.get(key):
            raise CheckpointError(
                f"{where}: {key} is not supported: {brief(section[key])} changes what layers "
                "compute"
            )
    kind = section.get("data_type")
    if kind not in (None, "int") and not str(kind).startswith("int_"):
        raise CheckpointError(f"{where}: data_type {brief(kind)} is not supported, 'int' is")
    bits = section.get("act_bits")
    if bits is not None and typed(bits, int, f"{where}: act_bits") < 16:
        raise CheckpointError(f"{where}: activations of {bits} bits are not supported")


def _not_converted(section: Config) -> tuple[str, ...]:
    names = section.get("modules_to_not_convert") or []
    where = "modules_to_not_convert"
    return tuple(typed(name, str, where) for name in typed(names, list, where))


def _quantizers(section: Config) -> tuple[str, ...]:
    meta = typed(section.get("meta") or {}, dict, "meta")
    named = meta.get("quantizer") or []
    return tuple(str(name) for name in (named if isinstance(named, list) else [named]))


def _row_by_tensors(store: Store) -> str | None:
    """The row of a folder that says nothing, by the types and shapes of its first layer."""
    for name in layer_names(store, ("qweight", "B")):
        if f"{name}.B" in store:
            return MARLIN if f"{name}.s" in store else None
        scales = f"{name}.scales"
        if scales not in store or len(store.shape(scales)) != 2:
            return None
        words, n = store.shape(f"{name}.qweight"), store.shape(scales)[1]
        if len(words) != 2:
            return None
        if store.dtype(f"{name}.qweight") == torch.int16:
            return AWQ_FAST
        if f"{name}.g_idx" in store or words[1] == n:
            return GPTQ
        if f"{name}.qzeros" not in store:
            return MARLIN if words[1] == 2 * n else None
        if 8 * words[1] == n:
            return AWQ
        return AWQ_GEMV if store.shape(scales)[0] == words[0] else None
    return None
