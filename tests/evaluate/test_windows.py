"""Tests megagrow/evaluate/windows.py."""

from hypothesis import given
from hypothesis import strategies as st

from megagrow.evaluate.windows import spans


@given(st.integers(0, 40), st.integers(1, 12), st.data())
def test_each_token_but_the_first_is_scored_once_with_all_the_context_that_fits(
    num_tokens: int, length: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, length))
    scored = list[int]()
    for start, stop, num_scored in spans(num_tokens, length, stride):
        assert stop - start - 1 <= length and num_scored <= (length if start == 0 else stride)
        assert start == max(0, stop - 1 - length), "what stands before the labels is used as far as it fits"
        scored += range(stop - num_scored, stop)
    assert scored == list(range(1, num_tokens))
