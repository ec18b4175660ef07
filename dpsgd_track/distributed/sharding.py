"""FSDP2 sharding by transformer block, and which rank holds which elements.

FSDP2 shards every parameter along dimension 0 in chunks of ceil(rows / W); the last ranks may
hold fewer rows, or none. With replicas (HSDP), W is the number of ranks that share one copy of
the model, and every copy is sharded alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from dpsgd_track.config import require

REPLICATE, SHARD = "replicate", "shard"
"""Dimensions of a mesh: each column of `shard` holds the model once."""


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of `model`: members of its outermost `ModuleList`s of one type."""
    blocks: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, ParametrizationList):
                continue  # not blocks: its modules compute one parameter from others
            members = list(child.children()) if isinstance(child, nn.ModuleList) else []
            if len({type(m) for m in members}) == 1 and any(True for _ in child.parameters()):
                blocks.extend(members)
            else:
                visit(child)

    visit(model)
    return blocks


def mixed_precision(param_dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Compute in `param_dtype`, reduce in float32; master weights stay float32."""
    return MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)


def build_mesh(device: torch.device, num_replicas: int = 1) -> DeviceMesh:
    """Mesh of all ranks: one row, or `num_replicas` rows that each hold the model.

    Raises:
        ValueError: the number of ranks is not a multiple of `num_replicas`.
    """
    world_size = dist.get_world_size()
    require(
        num_replicas >= 1 and world_size % num_replicas == 0,
        "replicas",
        num_replicas,
        f"a divisor of the {world_size} ranks",
    )
    if num_replicas == 1:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=(SHARD,))
    shape = (num_replicas, world_size // num_replicas)
    return init_device_mesh(device.type, shape, mesh_dim_names=(REPLICATE, SHARD))


def shard_fsdp2(model: nn.Module, mesh: DeviceMesh, param_dtype: torch.dtype) -> None:
    """Shard each transformer block and the root, in place; gradients are summed over ranks.

    Raises:
        ValueError: a parameter has no dimension to be sharded along.
    """
    scalars = [name for name, parameter in model.named_parameters() if parameter.dim() == 0]
    if scalars:
        raise ValueError(
            f"{', '.join(scalars)}: expected parameters with a dimension, which FSDP2 shards, got "
            "scalars. Make each a tensor of one element, or use a mode on one device."
        )
    policy = mixed_precision(param_dtype)
    for block in transformer_blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    sum_gradients(model)


def sum_gradients(model: nn.Module) -> None:
    """Make the units of a sharded model add gradients over ranks, rather than average them."""
    for unit in fsdp_units(model):
        # A clipped sum is a sum: FSDP2's default divides by the number of ranks.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def fsdp_units(model: nn.Module) -> list[FSDPModule]:
    """Modules that `fully_shard` was applied to, the root first; none of an unsharded model."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Give a sharded model its sharded parameters back.

    A forward without a backward, as in an evaluation, leaves the root's gathered.
    """
    for unit in fsdp_units(model):
        unit.reshard()


@dataclass(frozen=True)
class LocalPart:
    """This rank's elements of one parameter-shaped tensor."""

    name: str
    local: Tensor
    """This rank's rows."""
    start: int
    """Flat index, in the whole tensor, of the first element held."""
    num_elements: int
    """Elements of the whole tensor."""
    is_counted: bool = True
    """False on all replicas but the first, so that every element is counted once."""

    @property
    def stop(self) -> int:
        """Flat index after the last element held."""
        return self.start + self.local.numel()


def row_range(num_rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """Rows [start, stop) of dimension 0 that FSDP2 gives to `rank`."""
    chunk = -(-num_rows // world_size)
    return min(rank * chunk, num_rows), min((rank + 1) * chunk, num_rows)


@dataclass(frozen=True)
class Layout:
    """Position of this rank's elements in one parameter."""

    name: str
    start: int
    """Flat index of the first element held."""
    num_elements: int
    """Elements of the whole parameter."""
    is_counted: bool

    def part(self, tensor: Tensor) -> LocalPart:
        """This rank's part of a tensor that is sharded as the parameter is."""
        return LocalPart(
            self.name, as_local(tensor), self.start, self.num_elements, self.is_counted
        )


def layout_of(name: str, parameter: Tensor) -> Layout:
    """Layout of `parameter` on this rank.

    Raises:
        ValueError: the parameter is a DTensor with another placement than FSDP2's default.
    """
    if not isinstance(parameter, DTensor):
        return Layout(name, 0, parameter.numel(), is_counted=True)
    mesh = parameter.device_mesh
    *replicated, sharded = parameter.placements
    if mesh.ndim > 2 or not sharded.is_shard(0) or not all(p.is_replicate() for p in replicated):
        raise ValueError(
            f"{name}: expected rows sharded over the last mesh dimension and at most one other, "
            f"got {parameter.placements}."
        )
    first_row, _ = row_range(parameter.shape[0], mesh.get_local_rank(mesh.ndim - 1), mesh.shape[-1])
    row_elements = parameter.numel() // max(parameter.shape[0], 1)
    is_counted = mesh.ndim == 1 or mesh.get_local_rank(0) == 0
    return Layout(name, first_row * row_elements, parameter.numel(), is_counted)


def local_part(name: str, parameter: Tensor, tensor: Tensor) -> LocalPart:
    """This rank's part of `tensor`, a value for each element of `parameter`.

    Raises:
        ValueError: the parameter is a DTensor with another placement than FSDP2's default.
    """
    return layout_of(name, parameter).part(placed_as(tensor, parameter))


def placed_as(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` with the placements of `like`, as an optimizer would take it.

    A gradient may be a DTensor that every rank holds whole, while its parameter is sharded. Where
    placements differ, ranks may have to communicate.
    """
    if not (isinstance(tensor, DTensor) and isinstance(like, DTensor)):
        return tensor
    if tensor.placements == like.placements:
        return tensor
    with torch.no_grad():
        placed: Tensor = tensor.redistribute(placements=like.placements)
    return placed


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by fully qualified name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def as_local(tensor: Tensor) -> Tensor:
    """This rank's elements of a tensor, sharded or not, detached from the graph."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    with torch.no_grad():
        # Faster than to detach the DTensor first.
        return tensor.to_local()


def as_sharded(local: Tensor, like: Tensor) -> Tensor:
    """`local` as a DTensor sharded like `like`; `local` itself if `like` is unsharded."""
    if not isinstance(like, DTensor):
        return local
    # As FSDP2 makes its own gradients: from_local would check and infer a spec that is known.
    return DTensor(local, like._spec, requires_grad=False)


def whole(tree: Any, *, is_kept: bool) -> Any:
    """The same with whole tensors on the CPU in place of shards; every rank calls it together.

    Args:
        tree: dicts, lists and tensors, such as a state dict. What it holds twice, such as a tied
            weight, is one tensor in the result too.
        is_kept: False drops every gathered tensor on this rank, which gets empty ones.
    """
    results: dict[int, Tensor] = {}

    def gathered(tensor: Any) -> Any:
        if not isinstance(tensor, DTensor):
            return tensor
        if id(tensor) not in results:
            with torch.no_grad():
                full = tensor.full_tensor()
            results[id(tensor)] = full.cpu() if is_kept else full.new_empty(0)
        return results[id(tensor)]

    return tree_map(gathered, tree)


def shard_state(
    model: nn.Module, state: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
) -> None:
    """Put shards in place of whole tensors in a model's state; a hook before it is loaded."""
    # A parameter with several names may be in the state by any of them.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if prefix + name in state:
            state[prefix + name] = placed_whole(state[prefix + name], parameter)


def sharded_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with shards in place of whole tensors, where its parameters have them.

    Args:
        optimizer: in each group with as many parameters as when the state was taken.
        state: of `Optimizer.state_dict`, by the parameters' numbers.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    by_number = {
        number: {name: placed_whole(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return state | {"state": by_number}


def placed_whole(value: Any, like: Tensor) -> Any:
    """A whole tensor as shards, where a parameter of its shape has them; anything else as it is."""
    is_whole = isinstance(value, Tensor) and not isinstance(value, DTensor)
    if not (is_whole and isinstance(like, DTensor) and value.shape == like.shape):
        return value
    # Each rank has read the whole: nothing is sent.
    mesh = like.device_mesh
    return distribute_tensor(value.to(mesh.device_type), mesh, like.placements, src_data_rank=None)
