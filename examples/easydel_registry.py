"""PASA as an attention mechanism of EasyDeL, registered from outside.

    pip install easydel==0.3.0                             # pins jax 0.9.2 and flax 0.12.3 …
    pip install jax==0.10.2 jaxlib==0.10.2 flax==0.12.8    # … and runs with these
    python examples/easydel_registry.py

Once this file is imported, any model takes it by name: `LlamaConfig(attn_mechanism="pasa", …)`.
"""

import os

os.environ.setdefault("EASYDEL_AUTO", "0")  # or it sets XLA flags that newer versions die of

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from easydel.caching import TransformerCacheView  # pyright: ignore[reportMissingImports]
from easydel.infra import EasyDeLBaseConfig  # pyright: ignore[reportMissingImports]
from easydel.operations import (  # pyright: ignore[reportMissingImports]
    AttentionOutput,
    CacheType,
    ExecutionMode,
    MetadataField,
    OperationImpl,
    OperationMetadata,
    OperationRegistry,
    OperationRequirements,
)

from pasa_jax import dot_product_attention
from pasa_jax.evidence.plain import float64_attention

Array = jax.Array


@OperationRegistry.register
class PasaAttention(OperationImpl):
    """What EasyDeL asks of an attention, as arguments of `pasa_jax.dot_product_attention`."""

    @classmethod
    def get_impl_name(cls) -> str:
        return "pasa"

    @classmethod
    def get_requirements(cls, mode: Any = ExecutionMode.MIXED) -> OperationRequirements:
        return OperationRequirements.create(
            name="pasa",
            required_metadata=MetadataField.basic(),
            supported_cache=CacheType.TRANSFORMER | CacheType.HYBRID,
            cache_view_class=TransformerCacheView,
        )

    def forward_native(
        self,
        query: Array,
        key: Array,
        value: Array,
        mask_info: Any = None,
        bias: Array | None = None,
        init_bias: Any = None,
        deterministic: bool = True,
        dropout_rng: Array | None = None,
        dropout_prob: float = 0.0,
        softmax_aux: Array | None = None,
        softmax_scale: float | None = None,
        logits_soft_cap: float | None = None,
        causal: bool = False,
        sliding_window: int | tuple[int, int] | None = None,
        **_: Any,
    ) -> AttentionOutput:
        """[B, T, N, D], [B, S, K, D] and [B, S, K, E] to [B, T, N, E]; sinks [N] or None.

        A bias stands in for the mask, as in EasyDeL's own. Sharding is left to the compiler.
        """
        if bias is None and mask_info is None and init_bias is not None:
            bias = init_bias()
        # A single query is a decoder's, and only its mask knows where it stands.
        decodes = query.shape[1] == 1
        if decodes and sliding_window is not None:
            if mask_info is None or not mask_info.sliding_window_baked_in:
                raise ValueError("`mask_info` must hold the window where one token is decoded.")
            sliding_window = None
        drops = not deterministic and dropout_prob > 0 and dropout_rng is not None
        dtype = self.metadata.runtime_dtype
        out = dot_product_attention(
            *(x.astype(dtype) for x in (query, key, value)),
            bias=self._handle_kvhead(bias, query.shape[2], key.shape[2]),
            mask=self._mask(mask_info, query, key) if bias is None else None,
            scale=softmax_scale,
            is_causal=causal and not decodes,
            local_window_size=sliding_window,
            logits_soft_cap=logits_soft_cap,
            sinks=softmax_aux,
            dropout_rate=dropout_prob if drops else 0.0,
            dropout_key=dropout_rng if drops else None,
        )
        return AttentionOutput(attention_outputs=out)

    def _mask(self, mask_info: Any, query: Array, key: Array) -> Array | None:
        """[B, 1 or N, T, S]; EasyDeL's can be longer than the cache in use."""
        if mask_info is None or mask_info.attention_mask is None:
            return None
        mask = mask_info.attention_mask[..., : query.shape[1], : key.shape[1]].astype(bool)
        return self._handle_kvhead(mask, query.shape[2], key.shape[2])


def main(length: int = 256) -> dict[str, float]:
    """Prints and returns the largest errors of EasyDeL's attention and ours, in float16."""
    metadata = OperationMetadata(runtime_dtype=jnp.float16, base_config=EasyDeLBaseConfig())
    rng = np.random.default_rng(0)
    query, key, value = (
        rng.standard_normal((1, length, heads, 64)).astype(np.float16) for heads in (4, 2, 2)
    )
    errors = {}
    for name in ("vanilla", "pasa"):
        for bias in (0, 100):  # of queries and keys alike
            arrays = query + np.float16(bias), key + np.float16(bias), value
            attention = OperationRegistry.create(name, metadata)
            out = attention(*(jnp.asarray(x) for x in arrays), causal=True).attention_outputs
            exact = float64_attention(*arrays, is_causal=True)
            case = f"{name}, biased" if bias else name
            errors[case] = float(np.abs(np.asarray(out, np.float64) - exact).max())
            print(f"{case:16} {errors[case]:.1e}")
    return errors


if __name__ == "__main__":
    main()
