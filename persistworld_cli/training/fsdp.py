"""Sharded training (FSDP2): a rank holds its share of the trained parameters, gradients, moments and averages.

torch's `fully_shard`, in the process group that accelerate starts. accelerate's own FSDP plugin does not fit: it is
ignored on CPUs, where every rank would silently hold everything; it hooks the forward pass of one whole model, and a
`WorldModel` has none, since its parts are called one by one; and in bf16 it casts whole blocks, norms included, where
autocast casts products. Here autocast stays, and weights are gathered in float32.

A unit (a ResNet block, a transformer, a resampling convolution) is gathered before its forward and its backward pass
and freed after them, which every rank must therefore run equally often: anything else runs within `gathered`.

`torch.distributed.tensor` takes a second to import: only what shards imports it, and shards are known by their methods.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from persistworld_cli.models.world_model import WorldModel


def units(part: nn.Module) -> list[nn.Module]:
    """What is gathered together: each member of a UNet's blocks, and last the part itself, for all the rest."""
    blocks = [block for name in ("down_blocks", "up_blocks") for block in getattr(part, name, ())]
    blocks += [part.mid_block] if blocks else []
    return [*(unit for block in blocks for members in block.children() for unit in members.children()), part]


def shard(model: WorldModel, parts: Iterable[str], world: int) -> None:
    """Shard the parameters of some parts over all ``world`` ranks, in place; the process group must exist.

    Optimisers and lists of parameters are to be made afterwards: the model has other parameters then.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Nothing here writes to a unit's result in place, of which this warns wherever the result is a view
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = init_device_mesh(model.device.type, (world,))
    for part in parts:
        for unit in units(getattr(model, part)):
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)  # the part's too: nothing else stays gathered


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor as one, on every rank, all of which must call this; any other as it is."""
    found: Any = tensor
    return found.full_tensor() if _sharded(tensor) else tensor


def whole_state(state: Any, *, keep: bool) -> Any:
    """A nested state with its sharded tensors `whole`, on the CPU; without ``keep``, this rank only takes part.

    They are gathered one by one: beside what it holds, a rank's device needs memory for the largest tensor.
    """

    def gather(value: Any) -> Any:
        if not _sharded(value):
            return value
        gathered = value.full_tensor()
        return gathered.cpu() if keep else None

    with torch.no_grad():
        return tree_map(gather, state)


def shared_as(own: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, equal on all ranks, on the device of ``own`` and sharded as ``own`` is."""
    if not _sharded(own):
        return value.to(own.device)
    from torch.distributed.tensor import distribute_tensor

    as_own: Any = own
    return distribute_tensor(value.to(own.device), as_own.device_mesh, as_own.placements, src_data_rank=None)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within a block every rank has all weights, and may call the model as often as it likes, or not at all.

    Rollouts need this, since ranks have different numbers of them; 700 calls with one gathering are faster, too. Every
    rank enters and leaves; nothing is trained, and the parameters' lists still hold the shards, not to be changed.
    """
    sharded: list[Any] = [module for module in model.modules() if hasattr(module, "unshard")]
    for module in sharded:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    # FSDP writes gathered weights without a new version, by which the CPU kernels know that theirs are out of date
    torch.autograd.graph.increment_version([p for module in sharded for p in module.parameters()])
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
            module.set_reshard_after_forward(True, recurse=False)


def _sharded(value: Any) -> bool:
    return hasattr(value, "full_tensor")
