"""The functions that the fuzzer gives to a call, and how a call's arrays become its arguments.

The functions are of whole numbers, for JAX's arrays and for NumPy's alike. A script that shows a
failure holds the text of this module.
"""

from typing import Any

from pasa_jax import BlockMask, LowRankBias


def dilated(b: Any, h: Any, q: Any, kv: Any) -> Any:
    """Every third key, from another one in each head."""
    return (q - kv + h) % 3 == 0


def stairs(b: Any, h: Any, q: Any, kv: Any) -> Any:
    """Whole blocks that begin nowhere near a tile's; none for the first rows of entry 1."""
    return (kv // 11 <= q // 7) & ((b == 0) | (q > 5))


FUNCTIONS = {"dilated": dilated, "stairs": stairs}


def as_arguments(arrays: dict[str, Any], static: dict[str, Any]) -> tuple[dict, dict]:
    """The arrays and the static arguments of `dot_product_attention`, from those of a signature."""
    arrays, static = dict(arrays), dict(static)
    if "query_segments" in arrays:
        arrays["segment_ids"] = (arrays.pop("query_segments"), arrays.pop("key_segments"))
    if "q_factors" in arrays:
        arrays["bias"] = LowRankBias(arrays.pop("q_factors"), arrays.pop("k_factors"))
    if "mask_mod" in static:
        static["mask_mod"] = FUNCTIONS[static["mask_mod"]]
    if "kinds" in arrays:
        lengths = (arrays["query"].shape[1], arrays["key"].shape[1])
        kinds, block = arrays.pop("kinds"), static.pop("block")
        static["block_mask"] = BlockMask.from_kinds(kinds, lengths, block, dilated)
    return arrays, static
