"""Compile-time facts of one kernel: shape, packets, and where everything lies in shared and global memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Kind = Literal["threshold", "predictor", "given", "down"]
Phase = Literal["select", "sparse", "reduce"]
PHASES: tuple[Phase, ...] = ("select", "sparse", "reduce")
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
MAX_BATCH = 8
STAMPS = ("start", "filled", "first packet", "chosen", "summed", "all summed", "end")
# Phases between stamps by kind; the first overlaps with the kernel in front if launches are dependent.
_BEGIN = (("fill", "start", "filled"), ("first packet", "filled", "first packet"))
_END = (("active rows", "chosen", "summed"), ("wait", "summed", "all summed"), ("sum of y", "all summed", "end"))
TRACED: dict[Kind, tuple[tuple[str, str, str], ...]] = {
    "threshold": (
        ("fill", "start", "filled"),
        ("first packet", "filled", "first packet"),
        ("choose", "first packet", "chosen"),
        *_END,
    ),
    "predictor": (
        ("fill", "start", "filled"),
        ("z = V x", "filled", "first packet"),
        ("logits", "first packet", "chosen"),
        *_END,
    ),
    "given": (("fill", "start", "chosen"), *_END),
    "down": (("fill", "start", "chosen"), *_END),
}
_MAX_THREADS = 640  # a longer row gives each thread several 16-byte pieces
_SHARED_LIMIT = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227}  # KiB a block may use


@dataclass(frozen=True)
class Plan:
    """What a kernel is compiled for.

    Parameters
    ----------
    kind
        ``threshold``: one dense projection selects (CATS, M-COUNTDOWN). ``predictor``: a low-rank predictor selects.
        ``given``: the active set is an input. ``down``: as given, and so are the coefficients (the op).
    d_model, d_ff, rank : int
        Multiples of 8; rank 0 without a predictor.
    dtype, activation : str
    first
        Projection computed densely by ``threshold``.
    batch : 1, 2, 4 or 8
        Tokens a launch can hold.
    n_blocks : int
        All of them must be resident at once: they wait for each other.
    rows, neurons, depth : int
        Rows of a dense packet, neurons of a sparse packet, packets in flight.
    phases
        Compiled phases; fewer than all for the simulator and for timing a phase alone.
    overlap : bool
        Programmatic dependent launch: load weights before the kernel in front has ended (compute capability 9).
    resident : int
        Blocks an SM must have registers for; 2 lets the next layer's blocks start beside this one's.
    capability : (int, int)
    hint : str
        Prefetch size of a copy, as PTX spells it.
    value_dtype : str
        Type of the coefficients of ``down``.
    trace : bool
        Write the clock of every block's first thread at each phase into the workspace (``STAMPS``).
    """

    kind: Kind
    d_model: int
    d_ff: int
    dtype: str = "bfloat16"
    activation: str = "silu"
    first: Literal["gate", "up"] = "up"
    rank: int = 0
    batch: int = 1
    n_blocks: int = 132
    rows: int = 4
    neurons: int = 2
    depth: int = 6
    phases: tuple[Phase, ...] = PHASES
    overlap: bool = False
    resident: int = 1
    capability: tuple[int, int] = (9, 0)
    hint: str = "L2::128B"
    value_dtype: str = "float32"
    trace: bool = False

    # geometry of a row ------------------------------------------------------------------------------------------------
    @property
    def element(self) -> int:
        """Bytes of an element."""
        return BYTES[self.dtype]

    @property
    def vector(self) -> int:
        """Elements of a 16-byte piece."""
        return 16 // self.element

    @property
    def pieces(self) -> int:
        """16-byte pieces of a row."""
        return self.d_model // self.vector

    @property
    def chunks(self) -> int:
        """Pieces of a row held by one thread."""
        return math.ceil(self.pieces / _MAX_THREADS)

    @cached_property
    def threads(self) -> int:
        """Threads of a block: whole warps, enough for a row and for a row of the predictor."""
        wanted = math.ceil(self.pieces / self.chunks)
        if self.rank:
            wanted = max(wanted, self.rank_pieces)
        return 32 * math.ceil(wanted / 32)

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return self.threads // 32

    @property
    def chunk_bytes(self) -> int:
        """Distance in a slot of two pieces of one thread."""
        return self.threads * 16

    @property
    def slot_bytes(self) -> int:
        """Bytes of a ring slot: one row as the block sees it."""
        return self.chunks * self.chunk_bytes

    # predictor --------------------------------------------------------------------------------------------------------
    @property
    def rank_padded(self) -> int:
        """Rank with zero columns added so that a row of U is a whole number of warps wide."""
        return 32 * self.vector * math.ceil(self.rank / (32 * self.vector))

    @property
    def rank_pieces(self) -> int:
        """16-byte pieces of a row of U."""
        return self.rank_padded // self.vector

    @property
    def logit_rows(self) -> int:
        """Rows of U in a slot."""
        return min(32, self.threads // self.rank_pieces)

    @cached_property
    def logit_slots(self) -> int:
        """Slots of a packet of U: at most 32 rows in all, one a lane, and 32 sums a warp."""
        return max(1, min(self.slots, 32 // self.logit_rows, 32 // self.batch))

    # packets ----------------------------------------------------------------------------------------------------------
    @property
    def matrices(self) -> int:
        """Rows read for each active neuron."""
        return {"threshold": 2, "predictor": 3, "given": 3, "down": 1}[self.kind]

    @property
    def slots(self) -> int:
        """Slots of a packet."""
        dense = self.rows if self.kind in ("threshold", "predictor") else 1
        return max(dense, self.neurons * self.matrices)

    @property
    def ring_bytes(self) -> int:
        """Shared memory of all packets in flight."""
        return self.depth * self.slots * self.slot_bytes

    @property
    def dense_sums(self) -> int:
        """Sums of a dense packet, a power of 2."""
        return self.rows * self.batch

    @property
    def sparse_sums(self) -> int:
        """Sums of a sparse packet, a power of 2."""
        return max(1, self.neurons * (self.matrices - 1)) * self.batch

    @property
    def block_rows(self) -> int:
        """Most rows of a dense matrix that a block owns."""
        return math.ceil(self.d_ff / self.n_blocks)

    @property
    def held(self) -> int:
        """Work-list places for neurons whose rows are copied while the block still chooses."""
        return self.depth * self.neurons

    @property
    def work_size(self) -> int:
        """Most entries of a block's work list."""
        return self.held + self.block_rows + self.neurons

    # shared memory, byte offsets --------------------------------------------------------------------------------------
    def scratch_width(self, sums: int) -> int:
        """Floats that ``sums`` partial sums of every warp take."""
        lanes = 32 // sums
        return sums * lanes * math.ceil(self.warps / lanes)

    @cached_property
    def scratch_floats(self) -> int:
        """Floats of one of the two scratch areas."""
        widths = [self.scratch_width(self.sparse_sums)]
        if self.kind in ("threshold", "predictor"):
            widths.append(self.scratch_width(self.dense_sums))
        if self.kind == "predictor":
            widths.append(self.logit_slots * self.batch * self.warps)
        return 4 * math.ceil(max(widths) / 4)

    @cached_property
    def shared(self) -> dict[str, int]:
        """Offset of every area, and ``total``."""
        sizes = {
            "ring": self.ring_bytes,
            "x": self.batch * self.slot_bytes,
            "z": self.batch * self.rank_padded * 4,
            "scratch": 2 * self.scratch_floats * 4,
            "columns": self.warps * self.column_lanes * 16 * 4 if "reduce" in self.phases else 0,
            "found": self.block_rows * 4,
            "found_value": self.block_rows * self.batch * 4,
            "work": self.work_size * 4,
            "work_value": self.work_size * self.batch * 4,
        }
        # the reduction runs when the ring is drained, so its scratch lies on top of it
        del sizes["columns"]
        sizes["ring"] = max(sizes["ring"], self.warps * self.column_lanes * 16)
        offsets, at = {}, 0
        for name, size in sizes.items():
            offsets[name] = at
            at += 16 * math.ceil(size / 16)
        offsets["total"] = at
        return offsets

    # global workspace, byte offsets -----------------------------------------------------------------------------------
    @cached_property
    def workspace(self) -> dict[str, int]:
        """Offset of every area, and ``total``."""
        sizes = {
            "counts": self.n_blocks * 8,
            "z_done": self.n_blocks * 8,
            "done": self.n_blocks * 8,
            "z": self.batch * self.rank_padded * 4,
            "index": self.d_ff * 4,
            "value": self.d_ff * self.batch * 4,
            "partial": self.n_blocks * self.batch * self.d_model * 4,
            "trace": self.n_blocks * len(STAMPS) * 8 if self.trace else 0,
        }
        offsets, at = {}, 0
        for name, size in sizes.items():
            offsets[name] = at
            at += 128 * math.ceil(size / 128)
        offsets["total"] = at
        return offsets

    # final reduction --------------------------------------------------------------------------------------------------
    @property
    def column_groups(self) -> int:
        """Groups of 4 output columns, over all tokens."""
        return self.batch * self.d_model // 4

    @property
    def block_groups(self) -> int:
        """Most groups a block reduces at a time."""
        return min(32, math.ceil(self.column_groups / self.n_blocks))

    @property
    def column_lanes(self) -> int:
        """``block_groups`` rounded up to a power of 2: lanes side by side in a warp."""
        return 1 << (self.block_groups - 1).bit_length()

    def check(self) -> Plan:
        """Raise ValueError if this cannot be compiled."""
        if self.dtype not in BYTES:
            raise ValueError(f"dtype {self.dtype}: the CUDA kernels take {', '.join(BYTES)}; cast the weights")
        for name, value in (("d_model", self.d_model), ("d_ff", self.d_ff)):
            if value <= 0 or value % 8:
                raise ValueError(f"{name}={value}: the CUDA kernels need a positive multiple of 8; pad the weights")
        if self.d_ff >= 1 << 24:
            raise ValueError(f"d_ff={self.d_ff}: the kernels pack a neuron into 24 bits; split the layer")
        if self.activation not in ("silu", "gelu_tanh"):
            raise ValueError(f"activation {self.activation!r}: the CUDA kernels know silu and gelu_tanh")
        if (self.kind == "predictor") != (self.rank > 0):
            raise ValueError(f"rank={self.rank} of kind {self.kind}: a predictor, and nothing else, has a rank > 0")
        if self.batch not in (1, 2, 4, 8):
            raise ValueError(f"batch={self.batch}: a launch holds 1, 2, 4 or 8 tokens; pad with rows of zeros")
        if self.capability < (8, 0):
            major, minor = self.capability
            raise ValueError(
                f"compute capability {major}.{minor}: the kernels need 8.0 (cp.async); use the masked backend"
            )
        for sums in (self.dense_sums if self.kind in ("threshold", "predictor") else 1, self.sparse_sums):
            if sums > 32 or sums & (sums - 1):
                raise ValueError(f"{sums} sums a packet: rows and neurons times batch must be a power of 2 up to 32")
        if self.threads > 1024:
            raise ValueError(f"rank={self.rank}: a row of the predictor must fit in 1024 threads; use a lower rank")
        limit = shared_limit(self.capability)
        if self.shared["total"] > limit:
            raise ValueError(
                f"{self.shared['total']} bytes of shared memory: over the {limit} a block may have; lower depth"
            )
        return self


def shared_limit(capability: tuple[int, int]) -> int:
    """Bytes of shared memory one block may use."""
    known = [c for c in _SHARED_LIMIT if c <= capability]
    return _SHARED_LIMIT[max(known)] * 1024 if capability < (10, 0) and known else 227 * 1024
