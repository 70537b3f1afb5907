"""Tokens in scope of one pass, and their positions, from masks of every shape."""

from types import SimpleNamespace

import torch

from suite.modeling.scope import ScopeRule


def tokens_of(llama, mask, *, past, width):
    cache = SimpleNamespace(get_seq_length=lambda: past)
    given = {"input_ids": torch.full((1, width), 5), "attention_mask": mask, "past_key_values": cache}
    found = ScopeRule(llama, "all").tokens((), given, None)
    rows = torch.arange(found.total)[found.index]
    return rows.tolist(), found.positions.tolist()


def test_a_mask_of_four_dimensions_begins_after_the_past(llama):
    """The first token of the pass is padding; the keys of the past before it, which nobody sees here, do not count."""
    past, width = 3, 3
    mask = torch.zeros(1, 1, width, 8, dtype=torch.bool)
    for token in (1, 2):
        mask[0, 0, token, past + token] = True
    assert tokens_of(llama, mask, past=past, width=width) == ([1, 2], [3, 4])
    as_numbers = torch.where(mask, 0.0, -torch.inf)
    assert tokens_of(llama, as_numbers, past=past, width=width) == ([1, 2], [3, 4])


def test_positions_leave_padding_out(llama):
    """From a mask of two dimensions, which covers the past, and from one of four without a past."""
    assert tokens_of(llama, torch.tensor([[0, 0, 1, 1, 1]]), past=0, width=5) == ([2, 3, 4], [0, 1, 2])
    assert tokens_of(llama, torch.tensor([[0, 0, 1, 1, 1]]), past=3, width=2) == ([0, 1], [1, 2])
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    for token in (2, 3):
        mask[0, 0, token, token] = True
    assert tokens_of(llama, mask, past=0, width=4) == ([2, 3], [0, 1])
