"""Host side of the kernels around the MLP: one launch for a layer's attention, one for each addition and norm."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from numba import cuda

from kernels_numba.gpu import attention, norm, pieces
from kernels_numba.gpu.attention import AttentionPlan
from kernels_numba.gpu.norm import NormPlan

if TYPE_CHECKING:
    from torch import Tensor


@cache
def _attention(plan: AttentionPlan) -> Any:
    """The kernel of a plan, compiled for the current device."""
    decorate = cuda.jit(attention.SIGNATURE, launch_bounds=(attention.THREADS, 1))
    return decorate(attention.make_kernel(plan, pieces))


@cache
def _norm(plan: NormPlan) -> Any:
    return cuda.jit(norm.SIGNATURE, launch_bounds=(plan.threads, 1))(norm.make_kernel(plan, pieces))


# Bytes of the next weight to bring into L2 meanwhile.
AHEAD_OF_PRODUCT, AHEAD_OF_NORM = 12 << 20, 8 << 20


def _stream(tensor: Tensor) -> Any:
    import torch

    handle = torch.cuda.current_stream(tensor.device).cuda_stream
    return cuda.external_stream(handle) if handle else 0


def _processors(tensor: Tensor) -> int:
    import torch

    return int(torch.cuda.get_device_properties(tensor.device).multi_processor_count)


class DecodeAttention:
    """Attention of one layer for one token; its launches can be captured in a CUDA graph.

    Parameters
    ----------
    plan : AttentionPlan
    cos, sin : Tensor, shape (at least length, rotary_dim), dtype of the plan
    kv_cache : Tensor, shape (2, n_kv, length, head_dim)
    ahead : Tensor
        Weight that is read next; its first bytes are brought into L2 meanwhile.

    Raises
    ------
    ValueError
        Heads of another size than the kernel takes.
    """

    def __init__(self, plan: AttentionPlan, cos: Tensor, sin: Tensor, kv_cache: Tensor, ahead: Tensor) -> None:
        import torch

        spare = max(0, _processors(kv_cache) - plan.n_heads * plan.n_splits)
        self.plan = replace(plan, spare=spare).check()
        self._kept = (cos.contiguous(), sin.contiguous(), kv_cache)
        self._partial = torch.zeros(self.plan.partial_floats, dtype=torch.float32, device=kv_cache.device)
        self._counter = torch.zeros(plan.n_heads, dtype=torch.int32, device=kv_cache.device)
        self._ahead, self._n_bytes = ahead, min(AHEAD_OF_PRODUCT, ahead.numel() * ahead.element_size())

    def __call__(self, qkv: Tensor, position: Tensor) -> Tensor:
        """Mixed values (1, n_heads * head_dim) of qkv (1, (n_heads + 2 n_kv) * head_dim); writes the cache."""
        import torch

        plan = self.plan
        out = torch.empty(1, plan.n_kv * plan.group * plan.head_dim, dtype=qkv.dtype, device=qkv.device)
        tensors = (qkv, position, *self._kept, self._partial, self._counter, out, self._ahead)
        grid = plan.n_heads * plan.n_splits + plan.spare
        launch = _attention(plan)[grid, attention.THREADS, _stream(qkv), plan.shared["total"]]
        launch(*(tensor.data_ptr() for tensor in tensors), self._n_bytes)
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

    def __call__(
        self, hidden: Tensor, y: Tensor, inner: Tensor | None, weight: Tensor, ahead: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """New hidden state and its norm, both (1, d_model); ``ahead``: weight that is read next."""
        import torch

        plan = replace(self._plan, n_blocks=_processors(hidden))
        new, normed = torch.empty_like(hidden), torch.empty_like(hidden)
        n_bytes = 0 if ahead is None else min(AHEAD_OF_NORM, ahead.numel() * ahead.element_size())
        tensors = (hidden, y, weight if inner is None else inner, weight, new, normed)
        launch = _norm(plan)[plan.n_blocks if n_bytes else 1, plan.threads, _stream(hidden), 128]
        launch(*(tensor.data_ptr() for tensor in tensors), 0 if ahead is None else ahead.data_ptr(), n_bytes)
        return new, normed
