"""Rotated models beside those of llm-compressor, whose SpinQuant has R1 and R2 as fixed matrices.

Theirs are Sylvester's matrices without signs, and ours have random ones, so that both models hold
the same numbers up to one orthogonal matrix for the stream and one for the values of each head:
which are these is read from some weights, and all others must agree.

The package takes the mean of each embedding away, which leaves what LayerNorm gives as it is, but
not what RMSNorm does. Here these means are zero.
"""

import pytest
import torch

from qkernels.quantizers.hadamard import hadamard
from tests.bounds import FOLDED_BOUND
from tests.oracles.block_quantizers import LLMCOMPRESSOR_PREPARED, model_of, theirs, tokens_of
from tests.oracles.packages import package, require
from tests.quantizers.test_rotate import logits, relative, rotate

HEAD = 32


def centered_model():
    model = model_of()
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings -= embeddings.mean(dim=1, keepdim=True)
        # A rotation moves no bias of a head in the package.
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return model


def solved(theirs, ours):
    """R with theirs @ R = ours, fp64."""
    return torch.linalg.lstsq(theirs.double(), ours.double()).solution


def is_orthogonal(matrix):
    return float((matrix @ matrix.T - torch.eye(len(matrix))).abs().max()) < FOLDED_BOUND


def test_weights_are_those_of_llmcompressor_behind_other_signs(tmp_path):
    require("llmcompressor")
    dense, made = centered_model(), centered_model()
    other = theirs(LLMCOMPRESSOR_PREPARED, tmp_path, dense, modifier="spinquant")
    tokens = tokens_of()
    rotate(made)
    for model in (made, other):
        assert relative(logits(model, tokens), logits(dense, tokens)) < FOLDED_BOUND
    ours, others = (
        {n: p.detach().double() for n, p in m.named_parameters()} for m in (made, other)
    )
    block = "model.layers.0."
    # The embeddings do not tell: their rows have no part along the ones.
    inputs = [f"{block}mlp.{part}_proj.weight" for part in ("gate", "up")]
    stream = solved(*(torch.cat([own[name] for name in inputs]) for own in (others, ours)))
    assert is_orthogonal(stream) and relative(stream, torch.eye(len(stream))) > 0.5
    for name in (
        "model.embed_tokens.weight",
        *inputs,
        *(f"{block}self_attn.{part}_proj.weight" for part in "qk"),
        "lm_head.weight",
    ):
        assert relative(others[name] @ stream, ours[name]) < FOLDED_BOUND, name
    down = f"{block}mlp.down_proj.weight"
    assert relative(stream.T @ others[down], ours[down]) < FOLDED_BOUND
    for name in ours:
        if "norm" in name:
            assert (others[name] == 1).all() and (ours[name] == 1).all(), name
    values, output = (f"{block}self_attn.{part}_proj.weight" for part in "vo")
    # Rows of one head, and their columns in the output projection, where two heads read each.
    turned, wanted = (
        weight.view(-1, HEAD, len(stream)) for weight in (others[values] @ stream, ours[values])
    )
    head = solved(turned[0].T, wanted[0].T)
    assert is_orthogonal(head) and relative(head, torch.eye(HEAD)) > 0.5
    assert relative(head.T @ turned, wanted) < FOLDED_BOUND
    back = (stream.T @ others[output]).view(len(stream), -1, HEAD) @ head
    assert relative(back.flatten(1), ours[output]) < FOLDED_BOUND


@pytest.mark.parametrize("n", [1, 2, 64, 512])
def test_matrices_of_powers_of_two_are_theirs(n):
    package("compressed_tensors")
    from compressed_tensors.transform.utils.hadamard import deterministic_hadamard_matrix

    assert torch.equal(hadamard(n), deterministic_hadamard_matrix(n, torch.float64))
