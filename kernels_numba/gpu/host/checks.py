"""Checks of what the CUDA layers are given: one clear error before any launch."""

from __future__ import annotations

import torch
from torch import Tensor

NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def unavailable(device: str | torch.device = "cuda") -> str:
    """Reason why the kernels cannot run on the device, with its remedy; empty if they can."""
    if not torch.cuda.is_available():
        return "no CUDA device: torch.cuda.is_available() is False"
    try:
        import numba.cuda  # noqa: F401
        from cuda.bindings import driver  # noqa: F401
    except (ImportError, AttributeError) as error:  # AttributeError: numba-cuda 0.30 under numpy 2.5
        return f"numba-cuda cannot be imported ({error}): install numba-cuda[cu13] and numpy < 2.5"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]}: the kernels need 8.0 or newer"
    return ""


def check_weight(name: str, value: Tensor, shape: tuple[int, ...], like: Tensor | None) -> None:
    """Raise ValueError unless a tensor is a contiguous CUDA matrix of a known dtype, this shape and ``like``'s device."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}: pass a torch tensor")
    if value.device.type != "cuda":
        raise ValueError(f"{name} is on {value.device}: the CUDA kernels need it on a CUDA device")
    if value.dtype not in NAMES:
        raise ValueError(f"{name} has dtype {value.dtype}: convert it to {', '.join(NAMES.values())}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: expected {shape}")
    if not value.is_contiguous():
        raise ValueError(f"{name} is not contiguous (strides {value.stride()}): call contiguous() once, before binding")
    if value.data_ptr() % 16:
        raise ValueError(f"{name} starts at an address that is not a multiple of 16 bytes: clone() it")
    if like is not None and (value.dtype, value.device) != (like.dtype, like.device):
        raise ValueError(
            f"{name} is {value.dtype} on {value.device}: the other weights are {like.dtype} on {like.device}"
        )


def check_list(name: str, value: Tensor, device: torch.device, *, one: bool = False) -> None:
    """Raise ValueError unless a tensor is a contiguous int32 vector (``one``: one element) on the device."""
    if not isinstance(value, Tensor) or value.dtype != torch.int32 or value.device != device:
        raise ValueError(f"{name} must be an int32 tensor on {device}: the kernel reads it there")
    if not value.is_contiguous() or (one and value.numel() != 1) or (not one and value.dim() != 1):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}: expected {'one element' if one else 'a contiguous vector'}"
        )


def check_factors(name: str, value: Tensor, n: int, device: torch.device) -> None:
    """Raise ValueError unless a tensor is a contiguous fp32 vector of ``n`` entries on the device."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}: pass a torch tensor, or None for no factor")
    if value.dtype != torch.float32 or value.device != device:
        raise ValueError(f"{name} is {value.dtype} on {value.device}: the kernel reads torch.float32 on {device}")
    if tuple(value.shape) != (n,) or not value.is_contiguous():
        raise ValueError(f"{name} has shape {tuple(value.shape)}: expected a contiguous vector of {n} entries")


def check_range(indices: Tensor, count: Tensor, d_ff: int) -> None:
    """Raise ValueError if the count or an index it covers is out of range or given twice; waits for the device."""
    n = int(count.item())
    if not 0 <= n <= min(len(indices), d_ff):
        raise ValueError(f"count={n}: must be 0 to {min(len(indices), d_ff)}")
    used = indices[:n]
    if n and (int(used.min()) < 0 or int(used.max()) >= d_ff):
        raise ValueError(f"indices run from {int(used.min())} to {int(used.max())}: must be in [0, {d_ff})")
    ordered = used.sort().values
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise ValueError(f"indices hold {int(twice[0])} more than once: each neuron once, else it would count twice")
