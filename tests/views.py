"""Tensors that lie in memory in every way: transposed, apart, on top of each other, or nowhere."""

from hypothesis import strategies as st


@st.composite
def views(draw, shape, make):
    """A tensor of `shape` with any strides, 0 among them, over what `make(count)` gives.

    `make` makes a tensor of so many elements. What several elements share has one value for all.
    """
    strides = [draw(st.sampled_from((0, 1, 2, 3, *shape))) for _ in shape]
    offset = draw(st.integers(0, 3))
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True) if size)
    return make(offset + max(last, 0) + 1).as_strided(shape, strides, offset)
