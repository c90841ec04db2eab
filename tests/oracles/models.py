"""A small model that packages quantize."""

import torch
from torch import nn

from tests.checkpoints.models import transformers


def llama(dtype=torch.bfloat16, tied=False):
    """Of one layer, whose sizes most kernels of packages take, with random biases."""
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        tie_word_embeddings=tied,
        attention_bias=True,
        dtype=dtype,
    )
    model = transformers.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model.to(dtype).eval()
