"""What Transformers asks of the quantizer of a model. Importing this imports Transformers."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qkernels.checkpoints import layer_types
from qkernels.checkpoints.dense import quantized_layers
from qkernels.checkpoints.native import NATIVE
from qkernels.checkpoints.save import SavePlan
from qkernels.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_quantization_config(NATIVE.name)
class QKernelsConfig(QuantizationConfigMixin):
    """The quantization_config of our own format, as Transformers holds it."""

    def __init__(self, **section: Any) -> None:
        # The mixin's own field, whose listed methods are those of Transformers.
        vars(self).update(section, quant_method=NATIVE.name)


@register_quantizer(NATIVE.name)
class QKernelsHfQuantizer(HfQuantizer):
    """The quantizer of a model whose layers are quantized already: it says how they are saved."""

    def __init__(self, quantization_config: QKernelsConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)

    def validate_environment(self, *args: Any, **options: Any) -> None:
        """Raises CheckpointError: `from_pretrained`, which asks this, does not make our layers."""
        raise CheckpointError("this model is in the qkernels format: use qkernels.load_model")

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What `save_pretrained` writes: compressed-tensors where it holds all layers, else ours.

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
        plan = SavePlan.of(model, None)
        if plan.row is NATIVE:
            warnings.warn(
                "saved in the qkernels format, since compressed-tensors does not hold all layers: "
                "load it by qkernels.load_model; Transformers alone does not read it",
                stacklevel=3,
            )
        tensors: dict[str, Tensor] = {}
        storages: set[int] = set()
        for name, tensor in plan.tensors():
            # Transformers takes two names of one storage for one tensor.
            kept = tensor.detach()
            if kept.untyped_storage().data_ptr() in storages:
                kept = kept.clone()
            storages.add(kept.untyped_storage().data_ptr())
            tensors[name] = kept
        model.config.quantization_config = plan.quantization_config()
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

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top of the layers are."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True
