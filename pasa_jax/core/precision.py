"""`Precision`: in which type each intermediate of attention is stored."""

from __future__ import annotations

from dataclasses import dataclass

from pasa_jax.core.errors import check_choice, wrong

FLOATS = ("float16", "bfloat16", "float32", "float64")
POLYNOMIALS = ("cubic", "quadratic")  # of exponentials, in float32


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The types in which the intermediates are stored.

    Arguments:
      scores: the shifted scores S', after the matrix product.
      probabilities: the unnormalised probabilities exp(S' − max), as the second product takes
        them. Where it differs from the type of ``value``, that product takes both in float32.
      statistics: row maxima, sums, offsets, and the arithmetic of the softmax.
      accumulator: the output before it is normalised.
      products: the type in which a matrix unit adds up. ``"float16"`` is twice as fast on some
        GPUs and needs float16 inputs. No shift can then see a float32 product, as on a chip that
        rounds products. ``"int8"``: queries, and keys less their block's mean κ, are rounded to
        8 bits, each with a scale of its own; q·κ is added back in float32. The second product,
        P·V, is as with ``"float32"``. There is no gradient.
      exponential: the type in which a tile's exponentials are computed; None: the statistics'.
        ``"float16"`` is twice as fast on GPUs, with a relative error of up to 2^-9.9 (PTX ISA,
        ex2.approx.f16x2) in each probability. ``"cubic"`` and ``"quadratic"`` are float32 by a
        polynomial instead of the chip's own exponential, with a relative error of up to 7.5e-5
        and 1.8e-3.

    The named settings (`Precision.named`) are ``"float16"``, ``"bfloat16"`` and ``"float32"``
    (scores and probabilities of that type, the rest float32), ``"float64"``, ``"paper"``
    (float16 throughout, as published; arXiv 2503.01873, algorithm 2), and ``"int8"`` (products of
    8 bits; a call stores probabilities in the type of its 16-bit inputs).
    """

    scores: str = "float32"
    probabilities: str = "float32"
    statistics: str = "float32"
    accumulator: str = "float32"
    products: str = "float32"
    exponential: str | None = None

    def __post_init__(self) -> None:
        for field in ("scores", "probabilities", "statistics", "accumulator"):
            check_choice(f"precision.{field}", getattr(self, field), FLOATS)
        check_choice("precision.products", self.products, ("float16", "float32", "int8"))
        if self.exponential is not None:
            check_choice("precision.exponential", self.exponential, (*FLOATS, *POLYNOMIALS))
        if "bfloat16" in (self.statistics, self.accumulator):
            raise wrong(
                "precision.statistics and precision.accumulator",
                "be float16, float32 or float64",
                "bfloat16",
                "Eight bits cannot count the keys of a row: use float32.",
            )

    @property
    def eight_bits(self) -> bool:
        """Whether q·k is a product of 8-bit integers, of keys less their block's mean."""
        return self.products == "int8"

    @staticmethod
    def named(name: str) -> Precision:
        """The setting called ``name``.

        >>> Precision.named("paper").statistics
        'float16'
        """
        check_choice("precision", name, (*FLOATS, "paper", "int8"))
        if name == "paper":
            return Precision(**dict.fromkeys(_FIELDS, "float16"))
        if name == "float64":
            return Precision(**dict.fromkeys(_FIELDS, "float64"))
        if name == "int8":
            return Precision(products="int8")
        return Precision(scores=name, probabilities=name)


_FIELDS = ("scores", "probabilities", "statistics", "accumulator")
