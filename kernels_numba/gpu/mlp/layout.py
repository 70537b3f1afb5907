"""Where everything lies in a block's shared memory and in a layer's workspace: byte offsets, constants of a kernel."""

from __future__ import annotations

import math
from typing import NamedTuple


class Shared(NamedTuple):
    """Areas of a block's shared memory, and their total."""

    ring: int  # packets of weight rows in flight; when it is drained, columns of y on their way to their sum
    x: int  # the tokens, each laid out as a slot
    z: int  # V x of all tokens, fp32
    scratch: int  # two areas in turn for the warps' parts of a block's sums
    residuals: int  # of a gated predictor, of the block's own rows
    logits: int  # the warps' parts of the logits of the block's own rows
    claims: int  # claimed packets on their way from the claiming warp, then how many are asked for
    begins: int  # of each packet in the ring its first row, or its first place in the work list
    next: int  # the next two dense packets
    factors: int  # of each dense packet in the ring, and of the one in use, the factors of its rows
    work: int  # the work list: entries of the neurons whose rows the block reads
    work_value: int  # value of each entry and token: the score, or the coefficient given
    received: int  # on top of ``logits``, as are the next two: entries from other blocks
    counts: int  # neurons that each block found
    source: int  # places of the entries dealt to this block
    total: int


class Workspace(NamedTuple):
    """Areas of a layer's workspace in global memory, and their total; zeros before the first launch."""

    counts: int  # neurons that each block found: tagged words
    done: int  # each block's flag: the epoch in which it has left its share of y
    z: int  # V x: tagged words
    entries: int  # what each block found, from its first row on: tagged words
    kept: int  # of each neuron the tokens that keep it, as bits
    claims: int  # two counters of claimed packets, for even and odd epochs
    partial: int  # every block's share of y, fp32
    trace: int  # clocks of every block
    total: int


def offsets(sizes: dict[str, int], alignment: int, start: int = 0) -> dict[str, int]:
    """Offset of each area behind the one before, from ``start`` on, and ``total``: the end of the last."""
    at, found = start, {}
    for name, size in sizes.items():
        found[name] = at
        at += alignment * math.ceil(size / alignment)
    return found | {"total": at}
