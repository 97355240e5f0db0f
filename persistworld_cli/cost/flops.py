"""Count a call's FLOPs and bytes on torch's meta device: takes seconds, with the same result on every machine.

FLOPs are those of matrix products, convolutions and attention by torch's formulas, 2 per multiply-add, without norms
and activation functions. Bytes are those of all tensors alive at once, without kernel workspaces and allocator
fragmentation.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

# What CUDA's autocast computes in the small type, and what in float32; other operations keep their input's type.
_MATMUL = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.baddbmm)
_SMALL: set[Any] = {functional.linear, torch.conv2d, torch.conv3d, *_MATMUL}
_WHOLE: set[Any] = {functional.group_norm, functional.layer_norm, functional.softmax, torch.softmax}


class Work(NamedTuple):
    """FLOPs of a call (``forward``: without its gradient's), and the peak of the bytes that it allocates."""

    flops: int
    peak: int
    forward: int


class AliveBytes:
    """Tracks the bytes of tensors alive; ``known`` tensors are not counted."""

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        self.alive = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}

    def count(self, storage: torch.UntypedStorage) -> None:
        """Count a storage once, until it is freed; views share theirs."""
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.alive -= size


class _Counter(TorchDispatchMode):
    """Adds up FLOPs and tracks the bytes alive."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.flops, self.bytes = 0, AliveBytes(known)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.bytes.count(leaf.untyped_storage())
        return out


class _LikeCuda(TorchFunctionMode):
    """Attention as one fused operation, and the casts of CUDA's autocast to ``dtype`` (float32: none).

    On the meta device attention would be three operations with the full attention matrix between, and autocast does
    not exist; both change what is kept for the gradient.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is functional.scaled_dot_product_attention:
            q, k, v = args[:3] if self.dtype is torch.float32 else (self._cast(x, self.dtype) for x in args[:3])
            fused = torch.ops.aten._scaled_dot_product_flash_attention
            return fused(q, k, v, 0.0, False, False, scale=kwargs.get("scale"))[0]
        if self.dtype is not torch.float32 and (func in _SMALL or func in _WHOLE):
            dtype = self.dtype if func in _SMALL else torch.float32
            args, kwargs = tree_map(lambda x: self._cast(x, dtype), (args, kwargs))
        return func(*args, **kwargs)

    @staticmethod
    def _cast(x: Any, dtype: torch.dtype) -> Any:
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def measure(
    call: Callable[[], torch.Tensor], known: Iterable[torch.Tensor], dtype: torch.dtype, *, backward: bool = False
) -> Work:
    """Cost of a call on the meta device.

    Args:
        call: what is counted; with ``backward``, the gradient of its mean square too.
        known: tensors that were there before (weights): neither they nor their gradients are counted.
        dtype: what CUDA's autocast would compute in; float32 for no autocast.
        backward: whether gradients are wanted; else nothing is kept for them.
    """
    there = list(known)
    if backward:
        learned = [p for p in there if p.requires_grad]
        for p in learned:
            p.grad = torch.empty_like(p)
        there += [p.grad for p in learned if p.grad is not None]
    counter = _Counter(there)
    with counter, nullcontext() if backward else torch.no_grad():
        with _LikeCuda(dtype):
            out = call()
        forward = counter.flops
        if backward:
            torch.autograd.backward(out.float().square().mean())
    del out
    for p in there:
        p.grad = None
    return Work(counter.flops, counter.bytes.peak, forward)


@contextmanager
def checkpointing(unet: Any, dtype: torch.dtype) -> Iterator[None]:
    """Gradient checkpointing of a diffusers network, counted: the mode that `measure` sets does not reach backward."""

    def again(module: nn.Module, *args: Any) -> Any:
        def call(*inner: Any) -> Any:
            with _LikeCuda(dtype):
                return module(*inner)

        return checkpoint(call, *args, use_reentrant=False)

    unet.enable_gradient_checkpointing(again)
    try:
        yield
    finally:
        unet.disable_gradient_checkpointing()
