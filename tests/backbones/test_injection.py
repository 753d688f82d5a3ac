from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lopa_lightning.backbones.injection import check_placement, insert, position_ids, prompt_layout
from lopa_lightning.errors import LoPAError

PLACEMENTS = ["before", "after_first"]


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """Rows of one length, each with a run of ones and padding on either or both sides."""
    length = draw(st.integers(1, 8))
    start = draw(st.sampled_from([0, 8]))  # at most
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        tokens = draw(st.integers(1, length))
        left = draw(st.integers(0, min(start, length - tokens)))
        rows.append([0] * left + [1] * tokens + [0] * (length - left - tokens))
    return torch.tensor(rows)


def spliced(mask_row: list[int], prompt: list[Any], text: list[Any], placement: str) -> list[Any]:
    """The reference: the prompt's items put into a list of the text's items."""
    first = mask_row.index(1)
    cut = first + 1 if placement == "after_first" else first
    return text[:cut] + prompt + text[cut:]


@settings(max_examples=100)
@given(masks(), st.integers(1, 5), st.sampled_from(PLACEMENTS))
def test_layout_puts_the_prompt_at_the_texts_start_in_every_row(mask: Tensor, m: int, placement: str) -> None:
    length = mask.shape[1]
    expected = [spliced(row, list(range(m)), list(range(m, m + length)), placement) for row in mask.tolist()]
    layout = prompt_layout(mask, m, placement)
    assert layout.index.tolist() == expected
    assert layout.start == (expected[0].index(0) if mask[:, 0].all() else None)


@settings(max_examples=100)
@given(masks(), st.integers(1, 5), st.sampled_from(PLACEMENTS), st.integers(0, 2**32))
def test_insert_moves_vectors_and_numbers_as_the_layout_says(mask: Tensor, m: int, placement: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch, length = mask.shape
    layout = prompt_layout(mask, m, placement)
    rows = mask.tolist()

    prompt = torch.randn(batch, m, 3, generator=generator)
    text = torch.randn(batch, length, 3, generator=generator)
    both = [spliced(row, p, t, placement) for row, p, t in zip(rows, prompt.tolist(), text.tolist())]
    assert insert(layout, prompt, text).tolist() == both

    ids = torch.randint(0, 99, (batch, length), generator=generator)
    with_ids = [spliced(row, [-100] * m, t, placement) for row, t in zip(rows, ids.tolist())]
    inserted = insert(layout, -100, ids)
    assert inserted.tolist() == with_ids
    assert inserted.dtype == ids.dtype


@settings(max_examples=50)
@given(masks(), st.integers(1, 5), st.sampled_from(PLACEMENTS))
def test_text_and_prompt_form_one_unbroken_run(mask: Tensor, m: int, placement: str) -> None:
    layout = prompt_layout(mask, m, placement)
    counts = insert(layout, 1, mask)
    for row, before, start in zip(counts.tolist(), mask.tolist(), mask.argmax(1).tolist()):
        tokens = sum(before) + m
        assert row == [0] * start + [1] * tokens + [0] * (len(row) - start - tokens)


@settings(max_examples=50)
@given(masks(), st.integers(1, 5), st.sampled_from(PLACEMENTS), st.integers(0, 2**32))
def test_gradients_come_back_to_the_place_they_were_taken_from(mask: Tensor, m: int, placement: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch, length = mask.shape
    prompt = torch.randn(batch, m, 2, generator=generator, requires_grad=True)
    layout = prompt_layout(mask, m, placement)
    upstream = torch.randn(batch, m + length, 2, generator=generator)
    (insert(layout, prompt, torch.zeros(batch, length, 2)) * upstream).sum().backward()
    for row, gradient, arriving in zip(mask.tolist(), prompt.grad.tolist(), upstream.tolist()):
        start = row.index(1) + (placement == "after_first")
        assert gradient == arriving[start : start + m]


@settings(max_examples=100)
@given(masks(), st.integers(0, 3))
def test_a_tokens_position_is_the_number_of_tokens_before_it(mask: Tensor, offset: int) -> None:
    for row, positions in zip(mask.tolist(), position_ids(mask, offset).tolist()):
        for place, (is_token, position) in enumerate(zip(row, positions)):
            if is_token:
                assert position == offset + sum(row[:place])
            else:  # not read, but looked up: it must be a position that the text has as well
                assert offset <= position < offset + sum(row)


@pytest.mark.parametrize("placement", ["after", "", "Before"])
def test_unknown_placement_is_an_error_that_lists_the_choices(placement: str) -> None:
    with pytest.raises(LoPAError, match=f"before, after_first, every_layer, got '{placement}'"):
        check_placement(placement)
