"""The codebooks equal the published constants to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
from bitsandbytes import functional

from halfbyte.quant.codebook import FORMATS, codebook, dynamic_map, fp4_codebook, nf4_codebook, thresholds

# QLoRA (arXiv 2305.14314), appendix E.
PUBLISHED_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def test_nf4_equals_the_published_constants_bit_for_bit():
    published = np.array(PUBLISHED_NF4, dtype=np.float32)
    assert nf4_codebook().tobytes() == published.tobytes()


def test_codebooks_and_dynamic_map_equal_bitsandbytes_bit_for_bit():
    for fmt in FORMATS:
        theirs = functional.get_4bit_type(fmt, device="cpu").numpy()
        np.testing.assert_array_equal(codebook(fmt), theirs)  # theirs has +0 for FP4's minus zero
    assert dynamic_map().tobytes() == functional.create_dynamic_map().numpy().tobytes()


def test_fp4_is_symmetric_and_has_both_zeros():
    values = fp4_codebook()
    np.testing.assert_array_equal(values[:8], -values[8:])
    assert np.signbit(values[8])
    assert not np.signbit(values[0])


@pytest.mark.parametrize("fmt", FORMATS)
def test_thresholds_send_every_value_to_itself_and_halfway_to_the_lower(fmt):
    values = codebook(fmt)
    bounds, order = thresholds(values)
    ascending = values[order]
    distinct = int(np.isfinite(bounds).sum()) + 1
    for rank in range(distinct):
        assert int((ascending[rank] > bounds).sum()) == rank
    for rank in range(distinct - 1):
        halfway = bounds[rank]
        assert int((halfway > bounds).sum()) == rank
        assert int((np.nextafter(halfway, np.float32(2)) > bounds).sum()) == rank + 1


def test_tables_cannot_be_written_to():
    for table in (nf4_codebook(), fp4_codebook(), dynamic_map()):
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 0.5
