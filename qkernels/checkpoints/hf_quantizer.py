"""What Transformers asks of the quantizer of a model. Importing this imports Transformers."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qkernels.checkpoints import layer_types
from qkernels.checkpoints.dense import quantized_layers
from qkernels.checkpoints.hf_loading import PendingLayers
from qkernels.checkpoints.native import NATIVE
from qkernels.checkpoints.pretrained import mark_quantized
from qkernels.checkpoints.save import SavePlan
from qkernels.checkpoints.table import FORMATS
from qkernels.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_quantization_config(NATIVE.name)
class StoredConfig(QuantizationConfigMixin):
    """The quantization_config of a folder, as Transformers holds it: what is written there.

    A format's reader understands it, and Transformers nothing but its `quant_method`.
    """

    def __init__(self, **section: Any) -> None:
        # The mixin's own field, whose listed methods are those of Transformers.
        vars(self).update({"quant_method": NATIVE.name, **section})


@register_quantizer(NATIVE.name)
class StoredHfQuantizer(HfQuantizer):
    """The quantizer of a folder, or of a model whose layers are quantized already.

    It puts the layers of a folder into the model that `from_pretrained` makes, and says how
    `save_pretrained` writes a model.

    Args:
        format: what a model is saved in where that holds all of its layers; None for the first
            format of the table that does.
    """

    def __init__(
        self, quantization_config: StoredConfig, format: str | None = None, **options: Any
    ) -> None:
        super().__init__(quantization_config, **options)
        self._format = format
        self._layers: PendingLayers | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **options: Any) -> None:
        """Is asked before the model is made, and again where Transformers chose the devices.

        Raises:
            CheckpointError: for a map with parts that are to be offloaded.
        """
        devices = {str(device) for device in _values(device_map)}
        away = devices & ({"disk"} if devices <= {"cpu", "disk"} else {"cpu", "disk"})
        if away:
            raise CheckpointError(
                f"the device_map offloads parts of the model to {' and '.join(sorted(away))}, "
                "which quantized layers do not do: give devices that hold all of it, such as "
                "device_map={'': 0}, or more max_memory"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Iterable[str] | None = None, **options: Any
    ) -> None:
        refuse_distributed(model)
        with outside_of_meta():
            self._layers = PendingLayers(model, checkpoint_files)
        # What is left is dense: Transformers is to read and cast it as in any other model.
        self.pre_quantized = False
        before_report(model, self._layers.fill)

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """None for our own format, whose tensors are those of the model under its names."""
        native = self._layers is not None and self._layers.format == NATIVE.name
        return [] if native else weight_conversions

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes for each number of a parameter, by which devices are chosen."""
        nbytes = None if self._layers is None else self._layers.nbytes(param_name)
        return param.element_size() if nbytes is None else nbytes

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        assert self._layers is not None
        check_finished(model)
        # By the format's own name Transformers and PEFT know modules of another package.
        vars(model)["quantization_method"] = NATIVE.name
        model.config.quantization_config = StoredConfig(**self.quantization_config.to_dict())
        mark_quantized(model, self._layers.format)

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What `save_pretrained` writes.

        `model.config` is made to say the same, since it is written next.

        Raises:
            CheckpointError: for a model with some of its weights offloaded.
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            # Adapters alone are saved.
            return None, {}
        if not quantized_layers(model):
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            return None, {}
        plan = self._save_plan(model)
        tensors: dict[str, Tensor] = {}
        storages: set[int] = set()
        for name, tensor in plan.tensors():
            # Transformers takes two names of one storage for one tensor.
            kept = tensor.detach()
            if kept.untyped_storage().data_ptr() in storages:
                kept = kept.clone()
            storages.add(kept.untyped_storage().data_ptr())
            tensors[name] = kept
        model.config.quantization_config = StoredConfig(**plan.quantization_config())
        vars(model.config).pop(layer_types.KEY, None)
        others = layer_types.written(plan.layers, model.dtype)
        if others:
            setattr(model.config, layer_types.KEY, others)
        if plan.untied:
            for section in (model.config, *vars(model.config).values()):
                if getattr(section, "tie_word_embeddings", None) is True:
                    section.tie_word_embeddings = False
        # Names stay those of the modules, which the quantization_config speaks of.
        vars(model)["_weight_conversions"] = []
        # Nor is one left out that Transformers computes again, as Marian's positions: not all do.
        vars(model)["_keys_to_ignore_on_save"] = None
        return tensors, {}

    def _save_plan(self, model: PreTrainedModel) -> SavePlan:
        plan = self._chosen_plan(model)
        if plan.left_out is not None:
            warnings.warn(plan.left_out, stacklevel=4)
        return plan

    def _chosen_plan(self, model: PreTrainedModel) -> SavePlan:
        if self._format is not None and FORMATS[self._format].writes:
            try:
                return SavePlan.of(model, self._format)
            except CheckpointError as error:
                reason = f"since {error}"
        else:
            reason = "since compressed-tensors does not hold all layers"
        plan = SavePlan.of(model, None)
        if plan.row is NATIVE:
            warnings.warn(
                f"saved in the qkernels format, {reason}: qkernels.load_model reads it, and "
                "from_pretrained where qkernels is imported; Transformers alone does not",
                stacklevel=5,
            )
        return plan

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top of the layers are."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


_REPORT = "_adjust_missing_and_unexpected_keys"
"""The method of a model by which Transformers prepares its report."""


def _values(device_map: Any) -> Iterable[Any]:
    return device_map.values() if isinstance(device_map, Mapping) else ()


@contextlib.contextmanager
def outside_of_meta() -> Iterator[None]:
    """Within, tensors have values, and are of float32 where no type is said: Transformers changes
    both where it makes a model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def refuse_distributed(model: PreTrainedModel) -> None:
    """Raises CheckpointError where `from_pretrained` was asked for a part of each layer."""
    if getattr(model.config, "distributed_config", None) is not None:
        raise CheckpointError(
            "quantized layers are not distributed over processes: leave out tp_plan, tp_size and "
            "distributed_config"
        )


def before_report(model: PreTrainedModel, finish: Callable[[Any], None]) -> None:
    """Has `from_pretrained` call `finish` with its report, when all that it has is in the model.

    That is before it says what is missing, and before accelerate puts its hooks on modules, which
    are the last things it does.
    """
    adjust = getattr(model, _REPORT, None)
    if adjust is None:
        raise _unknown_transformers()

    @functools.wraps(adjust)
    def adjust_and_finish(info: Any) -> None:
        del vars(model)[_REPORT]
        adjust(info)
        finish(info)

    vars(model)[_REPORT] = adjust_and_finish


def check_finished(model: PreTrainedModel) -> None:
    """Raises CheckpointError where Transformers did not do what `before_report` asks of it."""
    if _REPORT in vars(model):
        raise _unknown_transformers()


def _unknown_transformers() -> CheckpointError:
    return CheckpointError(
        f"from_pretrained of Transformers {transformers.__version__} loads this model in a way "
        "that quantized layers do not follow: use qkernels.load_model or qkernels.quantize_model"
    )
