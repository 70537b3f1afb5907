"""Compile-time facts of one kernel: its shape and its packets, and from them everything that device code captures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from kernels_numba.gpu.mlp.layout import Shared, Workspace, offsets
from kernels_numba.gpu.ptx.dtypes import BYTES, elements

Kind = Literal["threshold", "predictor", "given", "down"]
Quantity = Literal["gate", "act", "up"]
Phase = Literal["project", "select", "sparse", "reduce"]
PHASES: tuple[Phase, ...] = ("project", "select", "sparse", "reduce")  # project: z = V x of a predictor
MAX_BATCH = 8
STAMPS = ("start", "filled", "first packet", "chosen", "summed", "all summed", "end")
# Phases between stamps by kind; the first overlaps with the kernel in front if launches are dependent.
_END = (("active rows", "chosen", "summed"), ("wait", "summed", "all summed"), ("sum of y", "all summed", "end"))
TRACED: dict[Kind, tuple[tuple[str, str, str], ...]] = {
    "threshold": (
        ("fill", "start", "filled"),
        ("dense and active rows", "filled", "summed"),
        *_END[1:],
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
RESERVE = 2  # neurons that a block of ``threshold`` keeps for the time when no dense packet is left to hide latencies
CLAIMS = 8  # places for claims on their way from the claiming warp to the others
# A longer row gives each thread several 16-byte pieces; beside a claiming warp fewer registers are left for two blocks an SM.
_MAX_THREADS = {"threshold": 512, "predictor": 640, "given": 640, "down": 640}
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
    deterministic : bool
        ``threshold``: deal all rows out beforehand, so that every sum has one order. Else a block that is faster claims
        more rows (``work_queue``). The other kinds are deterministic either way.
    scaled : bool
        ``threshold``: the score is the magnitude times a factor of the neuron, fp32.
    predicted : tuple of (quantity, rank)
        ``predictor``: one or two quantities, each approximated at a rank of its own, that a gated predictor's logit is made
        of; ``act`` is the gate behind the activation function. The ranks add up to ``rank``. None: the logit is U (V x).
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
    deterministic: bool = False
    scaled: bool = False
    predicted: tuple[tuple[Quantity, int], ...] = ()

    # geometry of a row ------------------------------------------------------------------------------------------------
    @property
    def element(self) -> int:
        """Bytes of an element."""
        return BYTES[self.dtype]

    @property
    def vector(self) -> int:
        """Elements of a 16-byte piece."""
        return elements(self.dtype)

    @property
    def pieces(self) -> int:
        """16-byte pieces of a row."""
        return self.d_model // self.vector

    @property
    def chunks(self) -> int:
        """Pieces of a row held by one thread."""
        return math.ceil(self.pieces / _MAX_THREADS[self.kind])

    @cached_property
    def threads(self) -> int:
        """Threads of a block that work on rows: whole warps, enough for a row and for a row of the predictor."""
        wanted = math.ceil(self.pieces / self.chunks)
        if self.rank:
            wanted = max(wanted, self.rank_pieces)
        return 32 * math.ceil(wanted / 32)

    @property
    def claims(self) -> bool:
        """Whether blocks claim dense packets while they run; with 4 tokens or more the claiming warp's registers are missed."""
        return self.kind == "threshold" and self.batch <= 2 and not self.deterministic

    @property
    def launch_threads(self) -> int:
        """Threads of a block: those that work on rows, and the warp that claims."""
        return self.threads + (32 if self.claims else 0)

    @property
    def clerk(self) -> int:
        """The thread of ``threshold`` that notes what packets hold: the first of the last warp that works on rows."""
        return self.threads - 32

    @property
    def warps(self) -> int:
        """Warps that work on rows."""
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
    def parts(self) -> tuple[tuple[int, int], ...]:
        """Columns of U of each dot product, and with zeros added to a whole number of warps; a gated predictor may have two."""
        warp = 32 * self.vector
        ranks = [rank for _, rank in self.predicted] or [self.rank]
        return tuple((rank, warp * math.ceil(rank / warp)) for rank in ranks)

    @property
    def rank_padded(self) -> int:
        """Columns of a row of U, those with zeros too."""
        return sum(padded for _, padded in self.parts)

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

    @property
    def logit_warps(self) -> int:
        """Warps that hold rows of U."""
        return self.logit_rows * self.rank_pieces // 32

    @property
    def logit_packets(self) -> int:
        """Most packets of U that a block reads."""
        return math.ceil(self.block_rows / (self.logit_rows * self.logit_slots)) if self.rank else 0

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
    def packet_bytes(self) -> int:
        """Shared memory of a packet."""
        return self.slots * self.slot_bytes

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
        """Neurons in flight."""
        return self.depth * self.neurons

    @property
    def dense_packets(self) -> int:
        """Packets of the first projection of ``threshold``."""
        return math.ceil(self.d_ff / self.rows)

    @property
    def static_packets(self) -> int:
        """Dense packets that each block has without claiming them: half of its share."""
        return max(self.depth, self.dense_packets // self.n_blocks // 2) if self.claims else self.dense_packets

    @property
    def factor_places(self) -> int:
        """Places for the factors of dense packets: one more than packets, as a packet is refilled while its factors are read."""
        return self.depth + 1

    @property
    def list_size(self) -> int:
        """Places of the circular list of ``threshold``, a power of 2: found and not yet used, or on their way."""
        most = RESERVE + self.neurons + (self.depth + 1) * self.rows + self.held
        return 1 << (most - 1).bit_length()

    @property
    def deals(self) -> bool:
        """Whether blocks that found many neurons give some to blocks that found few; with 8 tokens registers are short."""
        return self.kind == "predictor" and self.n_blocks > 1 and self.batch < 8

    @property
    def received_at(self) -> int:
        """First place of the work list for neurons that other blocks found: asked for two trips round the ring before."""
        return 3 * self.held if self.deals else 0

    @property
    def work_size(self) -> int:
        """Places of a block's work list."""
        if self.kind == "threshold":
            return self.list_size
        return max(self.held, self.received_at) + self.block_rows + self.neurons

    # memory -----------------------------------------------------------------------------------------------------------
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
        return 4 * math.ceil(max(widths) / 4)

    @cached_property
    def shared(self) -> Shared:
        """Areas of a block's shared memory."""
        sizes = {
            "ring": self.depth * self.packet_bytes,
            "x": self.batch * self.slot_bytes,
            "z": self.batch * self.rank_padded * 4,
            "scratch": 2 * self.scratch_floats * 4,
            "residuals": len(self.predicted) * self.block_rows * 4,
            "logits": self.logit_packets * self.logit_slots * self.batch * self.logit_warps * 4 if self.rank else 0,
            "claims": (CLAIMS + 1) * 8 if self.claims else 0,
            "begins": self.depth * 4 if self.kind == "threshold" else 0,
            "next": 2 * 4 if self.claims else 0,
            "factors": self.factor_places * self.rows * 4 if self.scaled else 0,
            "work": self.work_size * 4,
            "work_value": self.work_size * self.batch * 4 if self.kind in ("threshold", "down") else 0,
        }
        # the last reduction runs when the ring is drained, so its columns lie on top of it
        sizes["ring"] = max(sizes["ring"], self.warps * self.column_lanes * 16)
        # neurons are dealt when the logits have been used
        deal = {"received": self.block_rows * 16, "counts": self.n_blocks * 8, "source": self.block_rows * 4}
        if self.deals:
            sizes["logits"] = max(sizes["logits"], offsets(deal, 16)["total"])
        at = offsets(sizes, 16)
        return Shared(**offsets(deal, 16, at["logits"]) | at)

    @cached_property
    def workspace(self) -> Workspace:
        """Areas of the workspace in global memory."""
        sizes = {
            "counts": self.n_blocks * 8,
            "done": self.n_blocks * 8,
            "z": self.batch * self.rank_padded * 8,
            "entries": self.d_ff * 8,
            "kept": self.d_ff * 4,
            "claims": 2 * 128 if self.claims else 0,
            "partial": self.n_blocks * self.batch * self.d_model * 4,
            "trace": self.n_blocks * len(STAMPS) * 8 if self.trace else 0,
        }
        return Workspace(**offsets(sizes, 128))

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
        if self.predicted and (len(self.predicted) > 2 or sum(rank for _, rank in self.predicted) != self.rank):
            raise ValueError(
                f"predicted={self.predicted}: one or two quantities, whose ranks add up to rank={self.rank}"
            )
        if self.scaled and self.kind != "threshold":
            raise ValueError(f"scaled of kind {self.kind}: only a threshold on a projection takes a factor a neuron")
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
        if self.kind == "threshold" and (self.neurons > 14 or self.depth > 15):
            raise ValueError(
                f"neurons={self.neurons}, depth={self.depth}: at most 14 and 15, packets are noted in 4 bits each"
            )
        if self.threads > 1024:
            raise ValueError(f"rank={self.rank}: a row of the predictor must fit in 1024 threads; use a lower rank")
        limit = shared_limit(self.capability)
        if self.shared.total > limit:
            raise ValueError(
                f"{self.shared.total} bytes of shared memory: over the {limit} a block may have; lower depth"
            )
        return self


def shared_limit(capability: tuple[int, int]) -> int:
    """Bytes of shared memory one block may use."""
    known = [c for c in _SHARED_LIMIT if c <= capability]
    return _SHARED_LIMIT[max(known)] * 1024 if capability < (10, 0) and known else 227 * 1024
