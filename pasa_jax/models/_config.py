"""The sizes of a decoder, read from a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pasa_jax.core.errors import check_choice, wrong
from pasa_jax.models._checks import brief, epsilon, flag, integer, rope_base

FAMILIES = ("qwen2", "llama")
# Fields that change the results, with the only values that are implemented.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}
_SIZES = (
    "vocabulary",
    "width",
    "hidden",
    "layers",
    "heads",
    "kv_heads",
    "head_dim",
    "max_length",
)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The sizes of a Qwen2 or Llama model.

    Arguments:
      vocabulary: number of token ids.
      width: size of the residual stream.
      hidden: width of the gated feed-forward layer.
      layers: number of blocks.
      heads, kv_heads: N and K; N is a multiple of K.
      head_dim: D; even.
      max_length: the most positions that the model was trained for.
      rope_base: θ ≥ 1 of the rotary positions; pair i of a head turns by θ^(−2i/D) a position.
      epsilon: added to the mean square in RMSNorm; in (0, 1].
      qkv_bias, out_bias: whether the projections of attention have a bias.
      tied: whether the head is the transposed embedding.

    Raises:
      ValueError: a number out of its range; heads that cannot be grouped or rotated.
    """

    vocabulary: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_length: int
    rope_base: float = 10_000.0
    epsilon: float = 1e-6
    qkv_bias: bool = False
    out_bias: bool = False
    tied: bool = False

    def __post_init__(self) -> None:
        for name in _SIZES:
            integer(name, getattr(self, name))
        rope_base("rope_base", self.rope_base)
        epsilon("epsilon", self.epsilon)
        if self.heads % self.kv_heads:
            raise wrong("kv_heads", f"divide the number of heads, {self.heads}", self.kv_heads)
        if self.head_dim % 2:
            raise wrong("head_dim", "be even, for rotary positions turn pairs", self.head_dim)

    @staticmethod
    def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
        """The config of a parsed config.json of model_type qwen2 or llama.

        Raises:
          ValueError: another model_type, a key that is missing, or one whose value would change
            the numbers in a way that is not written here: scaled rotary positions, a sliding
            window in use, another activation, biases in the feed-forward layer, quantized
            weights.

        >>> sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        >>> sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}
        >>> config = {"model_type": "qwen2", "max_position_embeddings": 512, **sizes}
        >>> DecoderConfig.from_hf(config).head_dim
        16
        """
        check_choice("model_type", config.get("model_type"), FAMILIES)
        for name, allowed in _REFUSED.items():
            if config.get(name, allowed[0]) not in allowed:
                raise wrong(name, f"be {allowed[0]!r}", brief(config[name]))
        _check_window(config)
        is_qwen = config["model_type"] == "qwen2"
        heads = _size(config, "num_attention_heads")
        width = _size(config, "hidden_size")
        bias = flag("attention_bias", config.get("attention_bias"))
        return DecoderConfig(
            vocabulary=_size(config, "vocab_size"),
            width=width,
            hidden=_size(config, "intermediate_size"),
            layers=_size(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=_size(config, "num_key_value_heads", heads),
            head_dim=_size(config, "head_dim", width // heads),
            max_length=_size(config, "max_position_embeddings"),
            rope_base=_rope_base(config),
            epsilon=epsilon("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
            qkv_bias=is_qwen or bias,
            out_bias=bias and not is_qwen,
            tied=flag("tie_word_embeddings", config.get("tie_word_embeddings")),
        )


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A positive int; ``default`` where the config has none, or null."""
    seen = config.get(name)
    return integer(name, default if seen is None else seen)


def _rope_base(config: Mapping[str, Any]) -> float:
    """θ; transformers 5 writes it into ``rope_parameters``, older ones beside ``rope_scaling``."""
    name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = {} if config.get(name) is None else config[name]
    if not isinstance(rope, Mapping) or any(isinstance(x, Mapping) for x in rope.values()):
        raise wrong(name, "be one object without others in it", brief(rope))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise wrong(name, "be of type 'default': rotary positions as they are", brief(dict(rope)))
    return rope_base("rope_theta", rope.get("rope_theta", config.get("rope_theta", 10_000.0)))


def _check_window(config: Mapping[str, Any]) -> None:
    """Raises if a sliding window is in use; Qwen2's config.json names one in any case."""
    kinds = [] if config.get("layer_types") is None else config["layer_types"]
    if not isinstance(kinds, (list, tuple)) or any(kind != "full_attention" for kind in kinds):
        raise wrong("layer_types", "be 'full_attention' throughout", brief(kinds))
    default = config["model_type"] != "qwen2"
    used = flag("use_sliding_window", config.get("use_sliding_window", default))
    if not used or config.get("sliding_window") is None:
        return
    unwindowed = integer("max_window_layers", config.get("max_window_layers", 0), least=0)
    if unwindowed < _size(config, "num_hidden_layers"):
        way_out = "Set use_sliding_window to false for texts shorter than the window."
        raise wrong("sliding_window", "not be in use", brief(config["sliding_window"]), way_out)
