"""Bit streams: hand-computed words and round trips."""

import pytest
import torch

from ptq.numerics.bitstream import pack, unpack, words_per_row


def test_three_bit_words_by_hand():
    codes = torch.arange(8).repeat(4)[None]
    expected = torch.tensor([[0x88FAC688, 0xC688FAC6, 0xFAC688FA]], dtype=torch.int64)
    assert torch.equal(pack(codes, 3).to(torch.int64) & 0xFFFFFFFF, expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("n", [1, 31, 32, 33, 100, 256])
def test_round_trip(bits, n):
    generator = torch.Generator().manual_seed(bits * 1000 + n)
    codes = torch.randint(0, 2**bits, (5, n), generator=generator)
    words = pack(codes, bits)
    assert words.shape == (5, words_per_row(n, bits)) and words.dtype == torch.int32
    assert torch.equal(unpack(words, bits, n), codes.to(torch.uint8))


def test_codes_out_of_range_are_refused():
    with pytest.raises(ValueError, match="do not fit 3 bits"):
        pack(torch.tensor([[8]]), 3)
