"""The sizes of a decoder, read from a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pasa_jax._errors import check_choice, wrong

FAMILIES = ("qwen2", "llama")
# Beside these, with other values than the ones allowed here, the numbers would be others.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}


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
      rope_base: θ of the rotary positions; pair i of a head turns by θ^(−2i/D) a position.
      epsilon: added to the mean square in RMSNorm.
      qkv_bias, out_bias: whether the projections of attention have a bias.
      tied: whether the head is the transposed embedding.

    Raises:
      ValueError: heads that cannot be grouped or rotated.
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
                raise wrong(name, f"be {allowed[0]!r}", repr(config[name]))
        _check_window(config)
        is_qwen = config["model_type"] == "qwen2"
        heads = _required(config, "num_attention_heads")
        width = _required(config, "hidden_size")
        bias = bool(config.get("attention_bias"))
        return DecoderConfig(
            vocabulary=_required(config, "vocab_size"),
            width=width,
            hidden=_required(config, "intermediate_size"),
            layers=_required(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or width // heads,
            max_length=_required(config, "max_position_embeddings"),
            rope_base=_rope_base(config),
            epsilon=float(config.get("rms_norm_eps", 1e-6)),
            qkv_bias=is_qwen or bias,
            out_bias=bias and not is_qwen,
            tied=bool(config.get("tie_word_embeddings", False)),
        )


def _required(config: Mapping[str, Any], name: str) -> int:
    if not isinstance(config.get(name), int):
        raise wrong(name, "be an int of config.json", repr(config.get(name)))
    return config[name]


def _rope_base(config: Mapping[str, Any]) -> float:
    """θ; transformers 5 keeps it in ``rope_parameters``, older ones beside ``rope_scaling``."""
    name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(name) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise wrong(name, "be of type 'default': rotary positions as they are", repr(dict(rope)))
    return float(rope.get("rope_theta", config.get("rope_theta", 10_000.0)))


def _check_window(config: Mapping[str, Any]) -> None:
    """Qwen2's window is written in every config.json and in use in few."""
    kinds = set(config.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise wrong("layer_types", "be 'full_attention' throughout", sorted(kinds))
    used = config.get("use_sliding_window", config["model_type"] != "qwen2")
    past_some = config.get("max_window_layers", 0) < config.get("num_hidden_layers", 0)
    if used and config.get("sliding_window") is not None and past_some:
        way_out = "Set use_sliding_window to false for texts shorter than the window."
        raise wrong("sliding_window", "not be in use", config["sliding_window"], way_out)
