"""Memory orders of kernels. Nothing outside of this package knows bit order."""

from qkernels.layouts.fragment import FRAGMENT, pack_words
from qkernels.layouts.fragment_int8 import FRAGMENT_INT8
from qkernels.layouts.packed import (
    Layout,
    PackedWeight,
    allocate,
    empty_like,
    pack,
    write_rows,
)
from qkernels.layouts.plain import PLAIN
from qkernels.layouts.planar import PLANAR, plane_height
from qkernels.layouts.vnni import VNNI

LAYOUTS: dict[str, Layout] = {
    layout.name: layout for layout in (PLAIN, PLANAR, FRAGMENT, FRAGMENT_INT8, VNNI)
}

__all__ = [
    "FRAGMENT",
    "FRAGMENT_INT8",
    "LAYOUTS",
    "PLAIN",
    "PLANAR",
    "VNNI",
    "Layout",
    "PackedWeight",
    "allocate",
    "empty_like",
    "pack",
    "pack_words",
    "plane_height",
    "write_rows",
]
