"""What a folder says of a KV cache in 8 bits: nothing here computes with it, and it is kept.

compressed-tensors has `kv_cache_scheme` in its quantization_config and scalars beside the layers:
<attention>.k_scale, v_scale and q_scale, with zero points where the scheme has some, at first
<attention>.k_proj.output_scale; AutoFP8's kv_scale and modelopt's k_proj.k_scale are the same
numbers under other names. Keys and values stay in 16 bits here. A model remembers scheme and
tensors, so that they are saved again by formats that have a place for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from qkernels.checkpoints.config import QUANTIZATION_KEYS, Config, quantization_of, typed
from qkernels.checkpoints.store import Store

KEY = "kv_cache_scheme"
_NAMES = re.compile(
    r"\.(?:[kvq]_(?:scale|zero_point)|kv_scale|[kv]_proj\.output_(?:scale|zero_point))$"
)
_ATTRIBUTE = "_qkernels_kv_cache"


@dataclass(frozen=True)
class KVCache:
    """What is kept.

    Attributes:
        scheme: `kv_cache_scheme` as it stood in the config, or None.
        tensors: by their whole names.
    """

    scheme: dict[str, Any] | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.scheme) or bool(self.tensors)

    def __str__(self) -> str:
        first = next(iter(self.tensors), KEY)
        more = f" and {len(self.tensors) - 1} like it" if len(self.tensors) > 1 else ""
        return f"{first}{more}"


def is_of_cache(name: str) -> bool:
    """Whether a tensor belongs to a KV cache, by its name."""
    return _NAMES.search(name) is not None


def scheme_of(config: Config) -> dict[str, Any] | None:
    """The scheme in a config.json, or None.

    Raises:
        CheckpointError: where it is no object.
    """
    scheme = (quantization_of(config) or {}).get(KEY)
    return typed(scheme, dict, KEY) if scheme else None


def read(config: Config, store: Store, names: Iterable[str]) -> KVCache:
    """What a folder says.

    Args:
        names: of the tensors that belong to the cache.
    """
    return KVCache(scheme_of(config), {name: store.get(name) for name in names})


def keep(model: nn.Module, cache: KVCache) -> None:
    """Makes a model remember `cache`; its state dict stays as it is."""
    if cache:
        vars(model)[_ATTRIBUTE] = cache


def kept(model: nn.Module) -> KVCache:
    """What a model remembers, or what another package has put on its config and modules."""
    cache = vars(model).get(_ATTRIBUTE)
    if isinstance(cache, KVCache):
        return cache
    config: Any = getattr(model, "config", None)
    said: Any = next((s for k in QUANTIZATION_KEYS if (s := getattr(config, k, None))), None)
    if hasattr(said, "to_dict"):
        said = said.to_dict()
    return KVCache(said.get(KEY) or None) if isinstance(said, dict) else KVCache()
