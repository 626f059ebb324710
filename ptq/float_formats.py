"""Small float formats: how many bits are exponent and mantissa, and what a code stands for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FloatFormat:
    """ExMy: one sign, E exponent and M mantissa bits, all codes finite (no infinities, no NaN), unless ``has_nan``: the
    code of the largest magnitude is then NaN, as in the hardware's E4M3 (``float8_e4m3fn``).

    A code with exponent field p > 0 and mantissa m stands for 2^(p - bias) (1 + m / 2^M), with p = 0 for
    2^(1 - bias) m / 2^M. The scale of a group makes any bias out of this one.
    """

    exponent_bits: int
    mantissa_bits: int
    has_nan: bool = False

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """2^(E-1) - 1 as in IEEE and OCP formats, but at least 1, so that E1My are the multiples of 2^-M below 2."""
        return max(1, 2 ** (self.exponent_bits - 1) - 1)

    @property
    def largest(self) -> float:
        """(2 - 2^-M) 2^(2^E - 1 - bias), or the value below where that code is NaN"""
        return (2 - (1 + self.has_nan) * 2.0**-self.mantissa_bits) * 2.0 ** (2**self.exponent_bits - 1 - self.bias)

    @property
    def top_binade(self) -> float:
        """The power of two at or below the largest value."""
        return 2.0 ** (2**self.exponent_bits - 1 - self.bias)

    def __str__(self) -> str:
        return f"e{self.exponent_bits}m{self.mantissa_bits}" + "fn" * self.has_nan


E2M1 = FloatFormat(2, 1)
E4M3FN = FloatFormat(4, 3, has_nan=True)


def float_formats(bits: int) -> tuple[FloatFormat, ...]:
    """Every ExMy of so many bits with 1 <= E <= 5 (more exponent bits than that overflow)."""
    return tuple(FloatFormat(e, bits - 1 - e) for e in range(min(5, bits - 1), 0, -1))
