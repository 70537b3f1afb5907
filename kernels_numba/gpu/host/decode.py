"""Host side of the kernels around the MLP: one launch for a layer's attention, one for each addition and norm."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from numba import cuda

from kernels_numba.gpu.decode import add_rms_norm, attention
from kernels_numba.gpu.decode.add_rms_norm import NormPlan
from kernels_numba.gpu.decode.attention import AttentionPlan
from kernels_numba.gpu.masking import current_stream
from kernels_numba.gpu.ptx import vectors

if TYPE_CHECKING:
    from torch import Tensor


@cache
def _attention(plan: AttentionPlan) -> Any:
    """The kernel of a plan, compiled for the current device."""
    decorate = cuda.jit(attention.SIGNATURE, launch_bounds=(attention.THREADS, 1))
    return decorate(attention.make_kernel(plan, vectors))


@cache
def _norm(plan: NormPlan) -> Any:
    return cuda.jit(add_rms_norm.SIGNATURE, launch_bounds=(plan.threads, 1))(add_rms_norm.make_kernel(plan, vectors))


class DecodeAttention:
    """Attention of one layer for one token; its launches can be captured in a CUDA graph.

    Parameters
    ----------
    plan : AttentionPlan
    cos, sin : Tensor, shape (at least length, rotary_dim), dtype of the plan
    kv_cache : Tensor, shape (2, n_kv, length, head_dim)

    Raises
    ------
    ValueError
        Heads of another size than the kernel takes.
    """

    def __init__(self, plan: AttentionPlan, cos: Tensor, sin: Tensor, kv_cache: Tensor) -> None:
        import torch

        self.plan = plan.check()
        self._kept = (cos.contiguous(), sin.contiguous(), kv_cache)
        self._partial = torch.zeros(self.plan.partial_floats, dtype=torch.float32, device=kv_cache.device)
        self._counter = torch.zeros(plan.n_heads, dtype=torch.int32, device=kv_cache.device)

    def __call__(self, qkv: Tensor, position: Tensor) -> Tensor:
        """Mixed values (1, n_heads * head_dim) of qkv (1, (n_heads + 2 n_kv) * head_dim); writes the cache."""
        import torch

        plan = self.plan
        out = torch.empty(1, plan.n_kv * plan.group * plan.head_dim, dtype=qkv.dtype, device=qkv.device)
        tensors = (qkv, position, *self._kept, self._partial, self._counter, out)
        grid = plan.n_heads * plan.n_splits
        launch = _attention(plan)[grid, attention.THREADS, current_stream(qkv), plan.shared.total]
        launch(*(tensor.data_ptr() for tensor in tensors))
        return out


class AddNorm:
    """Addition to the hidden state and the norm after it, for one token; launches can be captured in a CUDA graph.

    Raises
    ------
    ValueError
        A row of another size than the kernel takes.
    """

    def __init__(self, plan: NormPlan) -> None:
        self._plan = plan.check()

    def __call__(self, hidden: Tensor, y: Tensor, inner: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        """New hidden state and its norm, both (1, d_model)."""
        import torch

        plan = self._plan
        new, normed = torch.empty_like(hidden), torch.empty_like(hidden)
        tensors = (hidden, y, weight if inner is None else inner, weight, new, normed)
        launch = _norm(plan)[1, plan.threads, current_stream(hidden), 128]
        launch(*(tensor.data_ptr() for tensor in tensors))
        return new, normed
