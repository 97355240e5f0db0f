"""Run code for CUDA without a card: CUDA tensors have shapes and no numbers, CPU tensors stay real.

A mix of devices or types raises, as on a card. Where the host would wait for the device (`.item()`, a blocking copy, a
result whose shape depends on numbers) the wait is noted with its place in the package, and the host gets made-up
numbers; a result of unknown shape raises. Bytes alive on the device are counted operation by operation.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from persistworld_cli.config.settings import ModelSettings, WorldSettings
from persistworld_cli.cost.flops import AliveBytes
from persistworld_cli.models.world_model import WorldModel, build_world_model

CUDA = torch.device("cuda")
PACKAGE = str(Path(sys.modules["persistworld_cli"].__path__[0]))
FEW = 64  # numbers of a loss at most
_aten = torch.ops.aten
_swap_tensors = torch.utils.swap_tensors
_sdpa = torch.nn.functional.scaled_dot_product_attention
_COPIES = {_aten._to_copy.default, _aten.copy_.default, _aten.copy.default}
_READS = {_aten._local_scalar_dense.default, _aten.equal.default, _aten.is_nonzero.default}
_ONE_TYPE = {
    *(_aten.addmm, _aten.mm, _aten.bmm, _aten.baddbmm, _aten.convolution, _aten.linear),
    *(_aten.native_group_norm, _aten.native_layer_norm, _aten.lerp),
}
_INDEXED = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default}


class CudaTrace(TorchDispatchMode):
    """See the module; `waits`: place -> how often the host waited there."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits: Counter[str] = Counter()
        self.bytes = AliveBytes()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = any(isinstance(x, FakeTensor) and x.device.type == "cuda" for x in tensors)
        target = kwargs.get("device")
        if not there and (target is None or torch.device(target).type != "cuda"):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func._overloadpacket in _ONE_TYPE and len({x.dtype for x in tensors if x.is_floating_point()}) > 1:
            raise RuntimeError(f"{func} of mixed dtypes: {[x.dtype for x in tensors]}")  # fake tensors let some pass
        if func in _READS:
            self._wait()
            return _made_up(func, args[0])
        if torch.Tag.dynamic_output_shape in func.tags and (func not in _INDEXED or _by_mask(args[1])):
            self._wait()  # and raises below: the shape depends on numbers
        if func in _COPIES and (out := self._copy(func, args, kwargs)) is not None:
            return self._counted(out)
        if func in _INDEXED and any(
            x.device.type == "cpu" for x in tree_leaves(args[1]) if isinstance(x, torch.Tensor)
        ):
            self._wait()
        with self.fake:
            return self._counted(func(*args, **kwargs))

    def _counted(self, out: Any) -> Any:
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cuda":
                self.bytes.count(leaf.untyped_storage())
        return out

    def _copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
        """A copy between devices; None if there are not two."""
        if func is _aten._to_copy.default:
            source, to = args[0], torch.device(kwargs.get("device") or args[0].device)
            blocking = not kwargs.get("non_blocking", False)
        else:
            source, to = args[1], args[0].device
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if source.device.type != to.type and (blocking or to.type == "cpu"):
            self._wait()
        dtype = kwargs.get("dtype") or source.dtype
        if to.type == "cuda":
            if source.device.type == "cuda":
                return None
            with self.fake:  # not by a conversion, which would hold on to a module's parameter
                made = torch.empty_strided(source.shape, source.stride(), dtype=dtype, device=CUDA)
                return made if func is _aten._to_copy.default else args[0]
        with unset_fake_temporarily():
            made = torch.linspace(0.1, 0.9, source.numel()).to(dtype).view(source.shape)
            return made if func is _aten._to_copy.default else args[0].copy_(made)

    def _wait(self) -> None:
        frame = sys._getframe(2)
        while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
            frame = frame.f_back
        if frame is None:
            self.waits["outside the package"] += 1
        else:
            self.waits[f"{frame.f_code.co_filename[len(PACKAGE) + 1 :]}:{frame.f_lineno}"] += 1


def _by_mask(index: Any) -> bool:
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in index)


def _made_up(func: Any, tensor: torch.Tensor) -> Any:
    if func is not _aten._local_scalar_dense.default or tensor.dtype is torch.bool:
        return True
    return 0.5 if tensor.is_floating_point() else 1


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention` by the fused kernel that CUDA chooses: torch asks the card, and there is none."""
    if q.device.type != "cuda":
        return _sdpa(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    if not q.dtype is k.dtype is v.dtype:
        raise RuntimeError(f"attention of mixed dtypes: {q.dtype}, {k.dtype}, {v.dtype}")
    if max(len(q), len(k)) > 65_535:
        raise RuntimeError(f"attention over {len(q)} sequences: more than a CUDA grid has")
    if attn_mask is None and q.dtype is not torch.float32:
        return _aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
    mask = None if attn_mask is None else attn_mask.expand(*q.shape[:-1], k.shape[-2]).to(q.dtype)
    keeps = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    fused = _aten._scaled_dot_product_efficient_attention
    return fused(q, k, v, mask, keeps, dropout_p, is_causal, scale=scale)[0]


@torch.no_grad()
def run_backward(root: torch.Tensor, *_: Any, **__: Any) -> None:
    """`root.backward()`, node by node: torch's engine asks the card for its streams, and there is none.

    Nodes are freed, with what they keep, as soon as they are done.
    """
    start: Any = root.grad_fn
    awaited: dict[Any, int] = defaultdict(int)
    seen, queue = {start}, [start]
    while queue:
        for following, _place in queue.pop().next_functions:
            if following is not None:
                awaited[following] += 1
                if following not in seen:
                    seen.add(following)
                    queue.append(following)
    last, ends = {start}, [start]  # of the loss: the nodes before its graph first forks
    while len(ends) == 1:
        ends = [following for following, _place in ends[0].next_functions if following is not None]
        last |= set(ends) if len(ends) == 1 else set()
    for held in gc.get_objects():  # a caller's loss, which would keep the whole graph
        if type(held) is FakeTensor and held.numel() <= FEW and held.grad_fn in last and not held._is_view():
            held.detach_()
    arrived: dict[Any, list[Any]] = {start: [torch.ones_like(root)]}
    ready = [start]
    del seen, last, ends, start, held
    while ready:
        node = ready.pop()
        given = arrived.pop(node, None)
        if type(node).__name__ == "AccumulateGrad":
            _accumulate(node.variable, given)
            continue
        following = grad = None
        made: Any = (None,) * len(node.next_functions)
        if given is not None:
            made = node.apply(*given) if hasattr(node, "apply") else node(*given)
            made = made if isinstance(made, tuple) else (made,)
        del given
        for (following, place), grad in zip(node.next_functions, made, strict=False):
            if following is None:
                continue
            if grad is not None:
                inputs = following._input_metadata
                slots = arrived.setdefault(following, [None] * len(inputs))
                grad = grad.sum_to_size(inputs[place].shape).to(inputs[place].dtype)
                slots[place] = grad if slots[place] is None else slots[place] + grad
                del slots
            awaited[following] -= 1
            if not awaited[following]:
                del awaited[following]
                ready.append(following)
        del node, made, grad, following


def _accumulate(leaf: torch.Tensor, given: list[Any] | None) -> None:
    if given is None:
        return
    if leaf.grad is None:
        leaf.grad = given[0]
    else:
        leaf.grad.add_(given[0])


def _swap(one: torch.Tensor, other: torch.Tensor) -> None:
    """`swap_tensors` for a parameter that `Module.to` converts: without numbers it is the same one already."""
    if (one.device, one.dtype, one.shape) != (other.device, other.dtype, other.shape):
        _swap_tensors(one, other)


def _real(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs outside of all modes."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


@contextmanager
def cuda_trace() -> Iterator[CudaTrace]:
    """Trace the block."""
    trace = CudaTrace()
    with (
        mock.patch("torch.load", _real(torch.load)),  # under a fake mode it reads shapes alone
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),  # or autocast is off
        mock.patch("torch.cuda.is_bf16_supported", lambda: True),
        mock.patch.object(FakeTensor, "tolist", lambda tensor: tensor.cpu().tolist()),  # its own reads one by one
        mock.patch("torch.utils.swap_tensors", _swap),
        mock.patch("torch.autograd.backward", run_backward),
        mock.patch("torch._C._current_graph_task_id", lambda: 0),  # checkpoints recompute once, not per use
        mock.patch("torch.nn.functional.scaled_dot_product_attention", _attention),
        trace.fake,
        trace,
    ):
        yield trace


def without_weights(settings: ModelSettings, world: WorldSettings, **how: Any) -> WorldModel:
    """As `load_world_model`, with no numbers in the weights."""
    with torch.device("meta"):
        model = build_world_model(settings, world).to(how.get("dtype", torch.float32))
    model.drop_passthrough()
    return model.to_empty(device=CUDA).eval().requires_grad_(False)


def require_no_wait_in_a_loop(trace: CudaTrace) -> None:
    """Raise AssertionError if the host waited more than once at one place."""
    repeated = {place: count for place, count in trace.waits.items() if count > 1}
    assert not repeated, f"the host waits for the device in a loop: {repeated}"
