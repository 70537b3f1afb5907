"""Compile-time facts of one kernel: its shape and its packets, and from them everything that device code captures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from kernels_numba.gpu.mlp.layout import Shared, Workspace, offsets
from kernels_numba.gpu.mlp.limits import check_plan
from kernels_numba.gpu.mlp.trace import STAMPS
from kernels_numba.gpu.ptx.dtypes import BYTES, elements

Kind = Literal["threshold", "predictor", "given", "down"]
Quantity = Literal["gate", "act", "up"]
Phase = Literal["project", "select", "sparse", "reduce"]
PHASES: tuple[Phase, ...] = ("project", "select", "sparse", "reduce")  # project: z = V x of a predictor
MAX_BATCH = 8
RESERVE = 2  # neurons that a block of ``threshold`` keeps for the time when no dense packet is left to hide latencies
CLAIMS = 8  # places for claims on their way from the claiming warp to the others
# A longer row gives each thread several 16-byte pieces; beside a claiming warp fewer registers are left for two blocks an SM.
_MAX_THREADS = {"threshold": 512, "predictor": 640, "given": 640, "down": 640}


@dataclass(frozen=True)
class Plan:
    """What a kernel is compiled for.

    Parameters
    ----------
    kind
        ``threshold``: one dense projection selects (CATS, M-COUNTDOWN). ``predictor``: a low-rank predictor selects.
        ``given``: the active set is an input. ``down``: as given, and so are the coefficients (the op).
    d_model, d_ff : int
        Multiples of 8.
    rank : int
        Of the predictor, a multiple of 8; of ``threshold``, that of the other projection's approximation, whose square is
        part of the score (md-countdown), 0 without.
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
    ahead, behind, reach : int
        ``threshold`` with a rank: dense packets whose rows of U are in flight; dense packets used before
        the choice from one; dense packets further whose rows of U come into L2.
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
    ahead: int = 4
    behind: int = 2
    reach: int = 12

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
        if self.kind == "predictor":
            wanted = max(wanted, self.rank_pieces)
        return 32 * math.ceil(wanted / 32)

    @property
    def claims(self) -> bool:
        """Whether blocks claim dense packets while they run; with 4 tokens or more the claiming warp's registers are missed."""
        return self.kind == "threshold" and self.batch <= 2 and not self.deterministic

    @property
    def launch_threads(self) -> int:
        """Threads of a block: those that work on rows, the warp that claims, and the one that makes factors."""
        return self.factor_warp + (32 if self.low_rank else 0)

    @property
    def factor_warp(self) -> int:
        """First thread of the warp that makes factors, if there is one: behind those that work on rows and the one that claims."""
        return self.threads + (32 if self.claims else 0)

    @property
    def low_rank(self) -> bool:
        """Whether ``threshold`` makes the factors of its neurons itself, from a low rank of the other projection."""
        return self.kind == "threshold" and self.rank > 0

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

    # predictor and low rank -------------------------------------------------------------------------------------------
    @property
    def rank_lanes(self) -> int:
        """Lanes side by side on a row of U."""
        return 32 // self.rows if self.low_rank else 32

    @property
    def rank_rounds(self) -> int:
        """Pieces of a row of U for each of its lanes."""
        return math.ceil(self.rank / (self.rank_lanes * self.vector))

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """Columns of U of each dot product, and with zeros added to a whole number of warps; a gated predictor may have two."""
        side = self.rank_lanes * self.vector
        ranks = [rank for _, rank in self.predicted] or [self.rank]
        return tuple((rank, side * math.ceil(rank / side)) for rank in ranks)

    @property
    def rank_padded(self) -> int:
        """Columns of a row of U, those with zeros too: each lane has as many pieces. z is so long."""
        return sum(padded for _, padded in self.parts)

    @property
    def rank_pieces(self) -> int:
        """16-byte pieces of a row of U, as stored."""
        return math.ceil(self.rank / self.vector) if self.low_rank else self.rank_padded // self.vector

    @property
    def projects(self) -> bool:
        """Whether a kernel of ``threshold`` computes z."""
        return self.low_rank and "project" in self.phases

    @property
    def z_steps(self) -> int:
        """Packets of V that the block with most of its rows reads."""
        return math.ceil(math.ceil(self.rank / self.n_blocks) / self.rows)

    @property
    def lag(self) -> int:
        """Dense packets issued and not yet chosen from at which a block waits for factors; those of less may not be asked for."""
        return max(self.ahead, self.depth + self.behind)

    @property
    def factor_turns(self) -> int:
        """Places by turns for sums that wait for the choice, for factors, and for the packets they are asked for."""
        return 1 << (self.lag + 1).bit_length()

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
        return math.ceil(self.block_rows / (self.logit_rows * self.logit_slots)) if self.kind == "predictor" else 0

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
        undecided = (self.lag if self.low_rank else self.depth) + 1
        most = RESERVE + self.neurons + undecided * self.rows + self.held
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
        turns, sums = (self.factor_turns, self.dense_sums) if self.low_rank else (0, 0)
        sizes = {
            "ring": self.depth * self.packet_bytes,
            "x": self.batch * self.slot_bytes,
            "z": self.batch * self.rank_padded * 4,
            "scratch": 2 * self.scratch_floats * 4,
            "residuals": len(self.predicted) * self.block_rows * 4,
            "logits": self.logit_packets * self.logit_slots * self.batch * self.logit_warps * 4
            if self.kind == "predictor"
            else 0,
            "claims": (CLAIMS + 1) * 8 if self.claims else 0,
            "begins": self.depth * 4 if self.kind == "threshold" else 0,
            "next": 2 * 4 if self.claims else 0,
            "factors": (self.factor_places * self.rows if self.scaled else 2 * sums) * 4,
            "low": self.ahead * self.rank_rounds * 512 if self.low_rank else 0,
            "missed": self.ahead * 128 if self.low_rank else 0,
            "told": turns * sums * 8,
            "noted": turns * 8,
            "sums": turns * sums * 4,
            "rows": turns * 4,
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
        check_plan(self)
        return self
