"""Every error bound of the tests, in one place. See docs/design.md, section on numerics."""

import torch

FROBENIUS_BOUND = {torch.float16: 2**-10, torch.bfloat16: 2**-7.5, torch.float32: 2**-20}
"""|y - exact| / |y| of a kernel against the float64 product with the same dequantized weight."""

GATE_BOUND = 2**-15
"""|difference| / |exact| of gelu in fp32, down to e^-88: what rounding leaves of e^(-x^2 / 2)."""

GATE_NEAR_BOUND = 2**-19
"""The same down to e^-8."""

DENSE_FACTOR = 2.0
"""How much larger that error may be than that of a dense product of the same dtype."""
FOREIGN_LOGITS = 2**-6.5
"""Logits of a bf16 model by other code than ours: both round each layer's output to bf16."""

SUM_BOUND = 2**-18
"""Of the largest entry: sums of a few hundred fp32 products in two orders."""

FOLDED_BOUND = 2**-14
"""|difference| / |output| of a block whose factors were moved between its layers, in fp32."""
DEEP_LOGITS = 2**-5
"""Logits of a model of 30 layers in bf16 against those of the same weights in fp32."""
SAME_PERPLEXITY = 1e-5
"""Relative, in fp32 with the same weights: only the order of sums differs."""

FOREIGN_LAYER_LOSS = 2**-7
"""Of what a layer's output loses: GPTQ of which a row or two was rounded the other way."""
FOREIGN_SCALES = 2**-22
"""Of a scale in fp32 that two programs divide out of a group's range."""
FOREIGN_FACTORS = 2**-18
"""Of a factor of a column in fp32: two powers of sizes that two programs have summed up to."""
BIN_BOUND = 2**-7
"""Width of a histogram's bin, of its lower edge."""
SMOOTHED_ERROR = 0.8
"""Of the error of rounding to nearest, with a few columns of inputs 12 times the others."""
MIGRATED_ERROR = 0.95
"""The same where norms' weights alone are moved, and one range holds all tokens."""
TRAINED_LOSS = 0.75
"""Of the squared error of rounding to nearest, after 48 steps of training with it at 2 bits."""
DISTILLED_LOSS = 0.97
"""The same of logits, where blocks were trained for 40 steps to give what the dense ones do."""
