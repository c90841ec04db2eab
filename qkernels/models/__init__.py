"""Models from folders, what to judge them by, and the texts that are shipped for it."""

from qkernels.models.calibration_text import calibration_batches
from qkernels.models.comparison import compare_encoders, compare_models

__all__ = ["calibration_batches", "compare_encoders", "compare_models"]
