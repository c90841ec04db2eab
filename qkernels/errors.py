"""Errors a user of qkernels can cause. Each message names the offending value and the remedy."""


class QuantizationError(Exception):
    """Base class of every error that qkernels raises about a user's input."""


class SchemeError(QuantizationError, ValueError):
    """A scheme that does not parse or combines parts that exclude each other."""


class RecipeError(QuantizationError, ValueError):
    """A recipe of quantization methods that does not parse or whose parts exclude each other."""


class WeightError(QuantizationError, ValueError):
    """A weight, scale or activation tensor with a wrong shape, dtype, device or value."""


class LayerError(QuantizationError, ValueError):
    """A layer or model that cannot be quantized as asked."""


class CheckpointError(QuantizationError):
    """A model file that is missing, damaged or of an unknown format."""


class NoKernelError(QuantizationError, NotImplementedError):
    """No kernel can run the problem; the message lists every kernel with its reason."""
