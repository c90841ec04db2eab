import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.library import opcheck

import qkernels as qk
from qkernels import WQEmbedding, WQLinear, ops
from qkernels.errors import LayerError, SchemeError, WeightError
from qkernels.layouts import LAYOUTS, pack
from qkernels.modules.view import WeightView
from tests import schemes

N, K = 37, 200
IDS = torch.tensor([[36, 0, 7], [8, 8, 15]])
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SOME = ("w4a16-g64", "w8a16-g64-sym", "w3a16-g24", "nf4-g64-dq", "fp8e4m3-a16")


def dense(n=N, k=K, **kwargs):
    return nn.Embedding(n, k, **kwargs)


def quantized(text="w4a16-g64", **kwargs):
    return WQEmbedding.from_embedding(dense(**kwargs), text)


def head_and_embedding(text="w4a16-g64", bias=False, dtype=torch.bfloat16):
    head = WQLinear.from_linear(nn.Linear(K, N, bias=bias, dtype=dtype), text)
    return head, WQEmbedding(head)


class Tied(nn.Module):
    def __init__(self, text="w4a16-g64", bias=True):
        super().__init__()
        head, self.embed = head_and_embedding(text, bias)
        self.lm_head = head

    def forward(self, ids):
        return self.lm_head(self.embed(ids))


def named(model):
    return model.named_buffers(remove_duplicate=False)


@pytest.mark.parametrize("text", schemes.WEIGHT_ONLY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_those_of_the_weight(text, dtype):
    embedding = WQEmbedding.from_embedding(dense().to(dtype), text)
    rows = embedding(IDS)
    assert rows.shape == (2, 3, K) and rows.dtype == dtype and not rows.requires_grad
    assert torch.equal(rows, embedding.dequantize()[IDS].to(dtype))
    assert torch.equal(rows, embedding(IDS.int()))
    assert torch.equal(embedding(IDS.t()), rows.transpose(0, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("text", [*schemes.WEIGHT_ONLY, "w8a8", "w4a8-g64", "fp8-a8"])
def test_rows_of_a_head_in_any_layout(layout, text):
    weight = WQLinear.from_linear(nn.Linear(K, N), text).to_weight()
    if LAYOUTS[layout].why_not(weight.scheme) is not None:
        pytest.skip(f"{layout} does not hold {text}")
    embedding = WQEmbedding(WQLinear(pack(weight, LAYOUTS[layout]), check_kernels=False))
    for dtype in DTYPES:
        embedding.dtype = dtype
        assert torch.equal(embedding(IDS), weight.dequantize()[IDS].to(dtype))


@pytest.mark.parametrize("text", schemes.WEIGHT_ONLY)
@pytest.mark.parametrize("layout", ["plain", "vnni"])
def test_torch_looks_up_what_the_compiled_part_does(text, layout, monkeypatch):
    packed = pack(WQLinear.from_linear(nn.Linear(K, N), text).to_weight(), LAYOUTS[layout])
    buffers, spec = list(packed.buffers.values()), str(ops.PackedSpec.of(packed))
    found = [ops.embedding_operator(IDS, buffers, spec, dtype) for dtype in DTYPES]
    monkeypatch.setattr(ops, "_cpu_embedding", lambda spec: None)
    for dtype, rows in zip(DTYPES, found, strict=True):
        assert torch.equal(rows, ops.embedding_operator(IDS, buffers, spec, dtype))


def test_many_rows_are_looked_up_by_several_threads():
    embedding = quantized("w4a16-g32", n=300, k=257)
    ids = torch.randint(0, 300, (1000,))
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(embedding(ids), embedding.dequantize()[ids])
    finally:
        torch.set_num_threads(before)


def test_fields_that_only_the_reference_knows():
    weight = quantized("w8a16-g64-sym").to_weight()
    full = weight.replace(
        input_factor=torch.rand(K) + 0.5,
        perm=torch.randperm(K),
        outlier_columns=torch.tensor([3, 150]),
        outlier_values=torch.randn(N, 2, dtype=torch.float16),
    )
    embedding = WQEmbedding.from_weight(full, dtype=torch.float32)
    assert torch.equal(embedding(IDS), full.dequantize()[IDS])
    offsets = qk.WQEmbedding.from_embedding(dense(), "w4a16-g32").to_weight()
    offsets = offsets.replace(offsets=torch.randn(offsets.scales.shape, dtype=torch.float16))
    embedding = WQEmbedding.from_weight(offsets, dtype=torch.float32)
    assert torch.equal(embedding(IDS), offsets.dequantize()[IDS])


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3), ()])
def test_any_shape_of_indices(shape):
    embedding, ids = quantized(), torch.zeros(shape, dtype=torch.long)
    assert embedding(ids).shape == (*shape, K)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_float64(tied):
    embedding = (head_and_embedding()[1] if tied else quantized()).double()
    assert torch.equal(embedding(IDS), embedding.dequantize()[IDS].double())


@pytest.mark.parametrize("indices", [IDS[:, 1], torch.arange(20)[::3], torch.tensor(7).expand(4)])
def test_indices_of_any_strides(indices):
    for given in (indices, indices.int()):
        embedding = quantized()
        assert torch.equal(embedding(given), embedding.dequantize()[indices])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("wrong", [-1, N, N + 5, 1 << 40])
@pytest.mark.parametrize("compiled", [True, False])
def test_an_index_out_of_range(tied, wrong, compiled, monkeypatch):
    embedding = head_and_embedding()[1] if tied else quantized()
    if not compiled:
        monkeypatch.setattr(ops, "_cpu_embedding", lambda spec: None)
    with pytest.raises(IndexError, match=f"out of range for an embedding of {N} rows"):
        embedding(torch.tensor([0, wrong]))


def test_wrong_input():
    embedding = quantized()
    with pytest.raises(WeightError, match="indices must be int64 or int32, got"):
        embedding(torch.ones(3))
    with pytest.raises(WeightError, match="indices are on meta and the weight on cpu"):
        embedding(torch.zeros(3, dtype=torch.long, device="meta"))


def test_what_cannot_be_an_embedding():
    with pytest.raises(LayerError, match="max_norm"):
        WQEmbedding.from_embedding(dense(max_norm=1.0), "w4a16-g64")

    class Other(nn.Embedding):
        pass

    with pytest.raises(LayerError, match="a Other, a subclass of"):
        WQEmbedding.from_embedding(Other(N, K), "w4a16-g64")
    with pytest.raises(LayerError, match="is a Linear, not an"):
        WQEmbedding.from_embedding(nn.Linear(K, N), "w4a16-g64")
    with pytest.raises(LayerError, match="quantized already, as w4a16-g64"):
        WQEmbedding.from_embedding(quantized(), "w4a16-g64")
    with pytest.raises(SchemeError, match=r"no activations to quantize as w8a8.*such as w8a16"):
        WQEmbedding.from_embedding(dense(), "w8a8", name="tokens")
    broken = dense()
    broken.weight.data[3, 4] = float("nan")
    with pytest.raises(WeightError, match="tokens: "):
        WQEmbedding.from_embedding(broken, "w4a16-g64", name="tokens")
    with pytest.raises(WeightError, match="padding_idx"):
        WQEmbedding.from_weight(quantized().to_weight(), padding_idx=N)


def test_it_is_an_embedding_to_whoever_asks():
    embedding = quantized(padding_idx=-1)
    assert isinstance(embedding, nn.Embedding) and not list(embedding.parameters())
    assert (embedding.num_embeddings, embedding.embedding_dim) == (N, K)
    assert embedding.padding_idx == N - 1 and embedding.max_norm is None
    view = embedding.weight
    assert isinstance(view, WeightView) and view.shape == (N, K) and view.dtype == torch.float32
    assert torch.equal(view[3], embedding(torch.tensor(3)))
    x = torch.randn(4, K)
    assert torch.allclose(nn.functional.linear(x, view), x @ embedding.dequantize().t(), atol=1e-4)
    assert torch.equal(nn.functional.embedding(IDS, view), embedding(IDS))
    assert "scheme=w4a16-g64" in repr(embedding)
    with pytest.raises(LayerError, match="cannot be set to a parameter"):
        embedding.weight = nn.Parameter(torch.zeros(N, K))
    with pytest.raises(LayerError, match="cannot be initialized"):
        embedding.reset_parameters()
    with pytest.raises(LayerError, match="writes to the weight"):
        embedding.weight.data = torch.zeros(N, K)


@pytest.mark.parametrize("text", SOME)
def test_copies_and_state_dicts(text):
    embedding = quantized(text)
    want = embedding(IDS)
    assert torch.equal(copy.deepcopy(embedding)(IDS), want)
    assert torch.equal(pickle.loads(pickle.dumps(embedding))(IDS), want)
    file = io.BytesIO()
    torch.save(embedding.state_dict(), file)
    file.seek(0)
    for assign in (False, True):
        target = quantized(text)
        target.load_state_dict(torch.load(file, weights_only=True), assign=assign)
        file.seek(0)
        assert torch.equal(target(IDS), want)
    with pytest.raises(RuntimeError, match=r"expected torch\.int32"):
        target.load_state_dict({**embedding.state_dict(), "words": torch.zeros(1, 1)})


@pytest.mark.parametrize("bias", [False, True])
def test_a_tied_embedding_shares_the_memory_of_the_head(bias):
    model = Tied(bias=bias)
    want = model(IDS)
    assert model.embed.source is model.lm_head and "embed" in dict(model.named_children())
    total = sum(buffer.nbytes for buffer in model.buffers())
    assert total == sum(buffer.nbytes for buffer in model.lm_head.buffers())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.embed.source is other.lm_head
        assert torch.equal(other(IDS), want)
    # Half of a model alone takes its weight along.
    alone = copy.deepcopy(model.embed)
    assert torch.equal(alone(IDS), model.embed(IDS))


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_of_a_tied_embedding(assign):
    model, other = Tied(), Tied()
    state = model.state_dict()
    mine, heads = ([n for n in state if n.startswith(p)] for p in ("embed.", "lm_head."))
    assert {n.partition(".")[2] for n in heads} - {n.partition(".")[2] for n in mine} == {"bias"}
    assert all(state[n].data_ptr() == state[n.replace("embed", "lm_head")].data_ptr() for n in mine)
    other.load_state_dict(state, assign=assign)
    assert torch.equal(other(IDS), model(IDS))
    assert other.embed.source is other.lm_head
    missing = {name: tensor for name, tensor in state.items() if name not in mine}
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(missing)
    assert set(other.load_state_dict(missing, strict=False).missing_keys) == set(mine)


@pytest.mark.parametrize("tied", [False, True])
def test_devices_and_types(tied):
    model = Tied() if tied else nn.Sequential(quantized())
    embedding = model.embed if tied else model[0]
    before = embedding.dequantize()
    model.half()
    assert embedding(IDS).dtype == torch.float16 == embedding.weight.dtype
    assert torch.equal(embedding(IDS), before[IDS].half())
    model.float()
    assert torch.equal(embedding(IDS), before[IDS])
    model.to("meta")
    assert embedding.weight.is_meta and embedding(IDS.to("meta")).shape == (2, 3, K)
    with pytest.raises(WeightError, match="indices are on cpu and the weight on meta"):
        embedding(IDS)


def test_moving_a_tied_embedding_moves_the_head():
    model = Tied()
    model.embed.to("meta")
    assert model.lm_head.weight.is_meta


def test_a_tied_embedding_follows_the_head():
    moved = Tied()
    want = moved.embed(IDS)
    layout = LAYOUTS["planar"]
    moved.lm_head._install(pack(moved.lm_head.to_weight(), layout))
    assert torch.equal(moved.embed(IDS), want) and "planar of another module" in repr(moved.embed)
    assert all(held is moved.lm_head.get_buffer(name) for name, held in moved.embed.named_buffers())
    total = sum(buffer.nbytes for buffer in moved.buffers())
    assert total == sum(buffer.nbytes for buffer in moved.lm_head.buffers())
    # Both names are of one tensor, as those of two dense modules are.
    copies = {id(tensor): tensor + 0 for tensor in moved.buffers()}
    state = {name: copies[id(tensor)] for name, tensor in named(moved)}
    assert torch.equal(torch.func.functional_call(moved, state, (IDS,)), moved(IDS))
    del state["embed.words_planar"]
    assert torch.equal(torch.func.functional_call(moved, state, (IDS,)), moved(IDS))


@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_accelerate_offloads_it(way, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = Tied()
    want = model(IDS)
    options = {"execution_device": torch.device("cpu"), "offload_buffers": True}
    if way == "cpu":
        accelerate.cpu_offload(model, **options)
    else:
        accelerate.disk_offload(model, tmp_path, **options)
    assert all(buffer.is_meta for buffer in model.buffers())
    assert torch.equal(model(IDS), want)
    assert all(buffer.is_meta for buffer in model.buffers())


def test_its_rows_get_a_gradient_where_a_hook_asks_for_it():
    """What `enable_input_require_grads` of Transformers does, for adapters behind it."""
    embedding = quantized()
    embedding.register_forward_hook(lambda module, args, out: out.requires_grad_(True))
    rows = embedding(IDS)
    assert rows.is_leaf and rows.requires_grad
    rows.sum().backward()
    assert torch.equal(rows.grad, torch.ones_like(rows))


@pytest.mark.parametrize("tied", [False, True])
def test_the_operator(tied):
    embedding = head_and_embedding()[1] if tied else quantized()
    arguments = (IDS, embedding._packed_buffers(), embedding._spec, torch.bfloat16)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    opcheck(ops.embedding_operator, arguments, test_utils=tests)


def test_torch_compile_breaks_no_graph():
    model = Tied()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(IDS), model(IDS))
    assert torch.equal(compiled(IDS[:1]), model(IDS[:1]))


@pytest.mark.parametrize("tied", [False, True])
def test_another_number_of_rows_makes_it_dense(tied):
    embedding = head_and_embedding()[1] if tied else quantized(padding_idx=3)
    before = embedding(IDS)
    values = torch.zeros(N + 3, K, dtype=embedding.dtype)
    values[:N] = embedding.weight.data[:N]
    embedding.weight.data = values
    assert type(embedding) is nn.Embedding and embedding.num_embeddings == N + 3
    assert isinstance(embedding.weight, nn.Parameter) and not list(embedding.buffers())
    assert torch.equal(embedding(IDS), before)
    assert embedding.padding_idx == (None if tied else 3)
    assert list(embedding.state_dict()) == ["weight"]
    embedding(torch.tensor([N + 2])).sum().backward()


def test_embeddings_of_transformers_that_multiply_their_rows():
    pytest.importorskip("transformers", reason="the classes are those of transformers")
    from transformers.models.bart.modeling_bart import (
        BartLearnedPositionalEmbedding,
        BartScaledWordEmbedding,
    )
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    for kind in (BartScaledWordEmbedding, Gemma3TextScaledWordEmbedding):
        source = kind(N, K, 0, embed_scale=1.7).to(torch.bfloat16)
        embedding = WQEmbedding.from_embedding(source, "w8a16-g64")
        source.weight.data = embedding.dequantize().to(torch.bfloat16)
        assert torch.equal(embedding(IDS), source(IDS)), kind
        for module in (embedding, source):
            module.half().float()
        assert embedding.embed_scale == source.embed_scale
        assert "embed_scale" not in embedding.state_dict()
        embedding.weight.data = torch.zeros(N + 1, K)
        assert type(embedding) is kind and embedding(IDS).abs().max() == 0
    with pytest.raises(LayerError, match="a BartLearnedPositionalEmbedding, a subclass"):
        WQEmbedding.from_embedding(BartLearnedPositionalEmbedding(N, K), "w8a16-g64")


def test_a_class_without_its_source_may_compute_something_else(monkeypatch):
    pytest.importorskip("transformers", reason="the classes are those of transformers")
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

    def missing(function):
        raise OSError("could not get source code")

    monkeypatch.setattr("qkernels.modules.kinds.inspect.getsource", missing)
    with pytest.raises(LayerError, match="a BartScaledWordEmbedding, a subclass"):
        WQEmbedding.from_embedding(BartScaledWordEmbedding(N, K, 0), "w8a16-g64")
