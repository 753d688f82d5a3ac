from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lopa_lightning.backbones.injection import insert, position_ids, prompt_layout


@st.composite
def masks(draw: st.DrawFn) -> tuple[Tensor, Tensor | int]:
    """Rows of one length, each with a run of ones and padding on either or both sides, and a position within each."""
    length = draw(st.integers(1, 8))
    start = draw(st.sampled_from([0, 8]))  # at most
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        tokens = draw(st.integers(1, length))
        left = draw(st.integers(0, min(start, length - tokens)))
        rows.append([0] * left + [1] * tokens + [0] * (length - left - tokens))
    if draw(st.booleans()):
        return torch.tensor(rows), draw(st.integers(0, min(map(sum, rows))))
    return torch.tensor(rows), torch.tensor([draw(st.integers(0, sum(row))) for row in rows])


def cuts(mask: Tensor, position: Tensor | int) -> list[int]:
    """Where each row is cut: behind so many of its own tokens."""
    own = position.tolist() if isinstance(position, Tensor) else [position] * len(mask)
    return [row.index(1) + before for row, before in zip(mask.tolist(), own)]


def spliced(cut: int, prompt: list[Any], text: list[Any]) -> list[Any]:
    """The reference: the prompt's items put into a list of the text's items."""
    return text[:cut] + prompt + text[cut:]


@settings(max_examples=100)
@given(masks(), st.integers(1, 5))
def test_layout_puts_the_prompt_at_a_position_of_each_row(masks: tuple[Tensor, Tensor | int], m: int) -> None:
    mask, position = masks
    length, cut = mask.shape[1], cuts(mask, position)
    layout = prompt_layout(mask, m, position)
    assert layout.index.tolist() == [spliced(at, list(range(m)), list(range(m, m + length))) for at in cut]
    assert layout.start == (cut[0] if mask[:, 0].all() and len(set(cut)) == 1 else None)
    moved = [[place if place < at else place + m for place in range(length)] for at in cut]
    assert layout.positions.tolist() == moved


@settings(max_examples=100)
@given(masks(), st.integers(1, 5), st.integers(0, 2**32))
def test_insert_moves_vectors_and_numbers_as_the_layout_says(
    masks: tuple[Tensor, Tensor | int], m: int, seed: int
) -> None:
    mask, position = masks
    generator = torch.Generator().manual_seed(seed)
    batch, length = mask.shape
    layout, cut = prompt_layout(mask, m, position), cuts(mask, position)

    prompt = torch.randn(batch, m, 3, generator=generator)
    text = torch.randn(batch, length, 3, generator=generator)
    both = [spliced(at, p, t) for at, p, t in zip(cut, prompt.tolist(), text.tolist())]
    assert insert(layout, prompt, text).tolist() == both

    ids = torch.randint(0, 99, (batch, length), generator=generator)
    with_ids = [spliced(at, [-100] * m, t) for at, t in zip(cut, ids.tolist())]
    inserted = insert(layout, -100, ids)
    assert inserted.tolist() == with_ids
    assert inserted.dtype == ids.dtype


@settings(max_examples=50)
@given(masks(), st.integers(1, 5))
def test_text_and_prompt_form_one_unbroken_run(masks: tuple[Tensor, Tensor | int], m: int) -> None:
    mask, position = masks
    layout = prompt_layout(mask, m, position)
    counts = insert(layout, 1, mask)
    for row, before, start in zip(counts.tolist(), mask.tolist(), mask.argmax(1).tolist()):
        tokens = sum(before) + m
        assert row == [0] * start + [1] * tokens + [0] * (len(row) - start - tokens)


@settings(max_examples=50)
@given(masks(), st.integers(1, 5), st.integers(0, 2**32))
def test_gradients_come_back_to_the_place_they_were_taken_from(
    masks: tuple[Tensor, Tensor | int], m: int, seed: int
) -> None:
    mask, position = masks
    generator = torch.Generator().manual_seed(seed)
    batch, length = mask.shape
    prompt = torch.randn(batch, m, 2, generator=generator, requires_grad=True)
    layout = prompt_layout(mask, m, position)
    upstream = torch.randn(batch, m + length, 2, generator=generator)
    (insert(layout, prompt, torch.zeros(batch, length, 2)) * upstream).sum().backward()
    for start, gradient, arriving in zip(cuts(mask, position), prompt.grad.tolist(), upstream.tolist()):
        assert gradient == arriving[start : start + m]


@settings(max_examples=100)
@given(masks(), st.integers(0, 3))
def test_a_tokens_position_is_the_number_of_tokens_before_it(masks: tuple[Tensor, Any], offset: int) -> None:
    mask, _ = masks
    for row, positions in zip(mask.tolist(), position_ids(mask, offset).tolist()):
        for place, (is_token, position) in enumerate(zip(row, positions)):
            if is_token:
                assert position == offset + sum(row[:place])
            else:  # not read, but looked up: it must be a position that the text has as well
                assert offset <= position < offset + sum(row)
