"""Quantization while `from_pretrained` loads a model. Importing this imports Transformers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from qkernels.checkpoints import mark_quantized
from qkernels.checkpoints.hf_quantizer import (
    StoredConfig,
    StoredHfQuantizer,
    before_report,
    check_finished,
    outside_of_meta,
    refuse_distributed,
)
from qkernels.checkpoints.native import NATIVE
from qkernels.checkpoints.table import check_holds
from qkernels.checkpoints.written import check_writes
from qkernels.errors import CheckpointError, LayerError, QuantizationError
from qkernels.quantizers.embeddings import embedding_kinds
from qkernels.quantizers.incoming import IncomingLayers, takes_weights_alone
from qkernels.quantizers.model import check_methods, quantize_model
from qkernels.quantizers.plan import plan_layers
from qkernels.quantizers.recipe import Recipe
from qkernels.quantizers.report import QuantizationReport
from qkernels.scheme import QuantScheme
from qkernels.select import check_backend

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ARGUMENTS = (
    *("scheme", "method", "include", "exclude", "overrides"),
    *("backend", "check_kernels", "format"),
)
"""What is written of a `QKernelsConfig`."""


class QKernelsConfig(StoredConfig):
    """How `from_pretrained` is to quantize a model, as its `quantization_config`.

        config = QKernelsConfig(scheme="w4a16-g128")
        model = AutoModelForCausalLM.from_pretrained(name, quantization_config=config)

    A method that looks at weights alone quantizes each as it is read: no more is held than the
    packed model and one parameter. The others run when the whole model is loaded.

    Args:
        scheme, method, include, exclude, overrides, backend, check_kernels, calibration: as for
            `quantize_model`. Calibration is not written to a file.
        format: what `save_pretrained` writes; that must hold all layers. "qkernels" is read by
            `from_pretrained` wherever qkernels is imported, with no other package.

    Attributes:
        report: what was done to a model, in `model.config.quantization_config`, which is a copy;
            see `quantize_model`.

    Raises:
        SchemeError, RecipeError, CheckpointError, NotImplementedError: for a scheme, a method, a
            format or a backend that is not known.
    """

    scheme: str
    method: str
    include: list[str] | None
    exclude: list[str] | None
    overrides: dict[str, str | None]
    backend: str | None
    check_kernels: bool
    format: str
    calibration: Iterable[Any] | None = None
    report: QuantizationReport | None = None

    def __init__(
        self,
        scheme: QuantScheme | str = "w4a16-g128",
        method: Recipe | str = "rtn",
        *,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        overrides: Mapping[str, QuantScheme | str | None] | None = None,
        backend: str | None = None,
        check_kernels: bool = True,
        calibration: Iterable[Any] | None = None,
        format: str = NATIVE.name,
    ) -> None:
        check_backend(backend)
        check_holds(format, {})
        super().__init__(
            scheme=str(QuantScheme.parse(scheme)),
            method=str(Recipe.parse(method, QuantScheme.parse(scheme))),
            include=None if include is None else list(include),
            exclude=None if exclude is None else list(exclude),
            overrides={
                pattern: None if value is None else str(QuantScheme.parse(value))
                for pattern, value in (overrides or {}).items()
            },
            backend=backend,
            check_kernels=check_kernels,
            format=format,
        )
        self.calibration = calibration

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """What `to_dict` gave, or the section of a folder in our format.

        Raises:
            LayerError: for keys that are neither.
        """
        section = {key: value for key, value in config_dict.items() if key != "quant_method"}
        unknown = sorted(section.keys() - set(_ARGUMENTS))
        if "groups" in section:
            config = cls.__new__(cls)
            StoredConfig.__init__(config, **section)
        elif unknown:
            raise LayerError(
                f"a quantization_config of qkernels has no {unknown[0]!r}: it has "
                f"{', '.join(_ARGUMENTS)}"
            )
        else:
            config = cls(**section)
        return (config, kwargs) if return_unused_kwargs else config

    @property
    def is_stored(self) -> bool:
        """Whether it is that of a folder, and says what its layers are."""
        return "scheme" not in vars(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        hidden = ("calibration", "report")
        return copy.deepcopy({k: v for k, v in vars(self).items() if k not in hidden})

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Transformers copies configs, and batches may be large, or come from a generator.
        new = copy.copy(self)
        vars(new).update(self.to_dict())
        return new

    def without_data(self) -> Self:
        """A copy that keeps no calibration alive."""
        new = copy.deepcopy(self)
        vars(new).pop("calibration", None)
        return new

    def arguments(self) -> dict[str, Any]:
        """Those of `quantize_model`."""
        return {name: getattr(self, name) for name in _ARGUMENTS} | {
            "calibration": self.calibration
        }


class QKernelsHfQuantizer(StoredHfQuantizer):
    """Loads folders as `StoredHfQuantizer` does, and quantizes models that are not."""

    quantization_config: QKernelsConfig
    _incoming: IncomingLayers | None = None
    _error: QuantizationError | None = None

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Iterable[str] | None = None, **options: Any
    ) -> None:
        config = self.quantization_config
        if config.is_stored:
            super()._process_model_before_weight_loading(model, checkpoint_files, **options)
            return
        if self.pre_quantized:
            raise CheckpointError(
                f"config.json says how {config.scheme} layers are made, and not which are stored: "
                "take its quantization_config out, and give it to from_pretrained"
            )
        refuse_distributed(model)
        with outside_of_meta():
            self._plan(model)
        before_report(model, lambda info: self._finish(model))

    def _plan(self, model: PreTrainedModel) -> None:
        """Raises for whatever does not fit the model, before its weights are read."""
        config = self.quantization_config
        scheme = QuantScheme.parse(config.scheme)
        recipe = Recipe.parse(config.method, scheme)
        overrides = {
            pattern: None if value is None else QuantScheme.parse(value)
            for pattern, value in config.overrides.items()
        }
        with _tied(model):
            plan = plan_layers(model, scheme, config.include, config.exclude, overrides)
        check_methods(recipe, plan.schemes, calibrated=config.calibration is not None)
        ties = model.all_tied_weights_keys
        incoming = IncomingLayers(
            model,
            plan,
            recipe,
            backend=config.backend,
            check_kernels=config.check_kernels,
            tied={*ties, *ties.values()},
        )
        check_holds(config.format, embedding_kinds(model, plan.embeddings))
        check_writes(config.format, model, incoming.kinds())
        if config.calibration is None and takes_weights_alone(recipe, plan):
            self._incoming = incoming

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **options: Any
    ) -> bool:
        return self._incoming is not None and self._incoming.wants(param_name)

    def get_quantize_ops(self) -> ConversionOps:
        return _Take(self)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        bits = None if self._incoming is None else self._incoming.bits(param_name)
        if bits is None:
            return super().param_element_size(model, param_name, param)
        # With a scale and a zero point for 32 numbers, which is more than most schemes have.
        return bits / 8 + 0.1

    def take(self, parameter: str, values: Tensor) -> None:
        """Quantizes a parameter that is on its way to the model."""
        assert self._incoming is not None
        if self._error is None:
            try:
                self._incoming.take(parameter, values)
            except QuantizationError as error:
                # Transformers would make an error of its own of it, without the reason.
                self._error = error

    def _finish(self, model: PreTrainedModel) -> None:
        config = self.quantization_config
        if self._error is not None:
            raise self._error
        if self._incoming is not None:
            config.report = self._incoming.finish()
            return
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) > 1:
            raise LayerError(
                f"calibration runs on one device, and the model is on {len(devices)}: give "
                "device_map={'': 0}"
            )
        config.report = quantize_model(model.eval(), **config.arguments())

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        if self.quantization_config.is_stored:
            super()._process_model_after_weight_loading(model, **options)
            return
        check_finished(model)
        model.config.quantization_config = self.quantization_config.without_data()
        mark_quantized(model, self.quantization_config.format)


@contextlib.contextmanager
def _tied(model: PreTrainedModel) -> Iterator[None]:
    """Within, parameters are one that will be, which Transformers sees to when they are loaded."""
    places = {}
    for name, source in model.all_tied_weights_keys.items():
        module, _, parameter = name.rpartition(".")
        held = model.get_submodule(module)._parameters
        places[name] = held, parameter, held.get(parameter)
        held[parameter] = model.get_parameter(source)
    try:
        yield
    finally:
        for held, parameter, before in places.values():
            held[parameter] = before


class _Take(ConversionOps):
    """Takes weights that Transformers has read, in place of putting them into the model."""

    def __init__(self, quantizer: QKernelsHfQuantizer) -> None:
        self._quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        *args: Any,
        model: Any = None,
        missing_keys: set[str] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        left = {}
        for name, found in input_dict.items():
            if not self._quantizer.param_needs_quantization(model, name):
                left[name] = found
                continue
            self._quantizer.take(name, found[0] if isinstance(found, list) else found)
            # The parameter stays empty: nothing is to be drawn for it, or reported of it.
            model.get_parameter(name)._is_hf_initialized = True
            if missing_keys is not None:
                missing_keys.discard(name)
        return left


AUTO_QUANTIZATION_CONFIG_MAPPING[NATIVE.name] = QKernelsConfig
AUTO_QUANTIZER_MAPPING[NATIVE.name] = QKernelsHfQuantizer
