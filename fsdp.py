"""One model shared out among the processes of a run: FSDP2, torch.distributed.fsdp.fully_shard.

Notable choices:
- Each process keeps some rows of every parameter, of its gradient and of its moments. A block is put together for as
  long as it computes, forwards and again backwards, and its gradients are added up and shared out at once.
- With a narrow dtype the blocks' matrices travel in it; norms and what is outside the blocks stay in float32, as under
  autocast alone, and gradients are added up in float32.
- A model that begins is built on the meta device, which has shapes and no values: each process draws one parameter at
  a time and keeps its own rows, so none ever has the whole model.

References: Zhao et al. 2023 (PyTorch FSDP); Rajbhandari et al. 2020 (ZeRO).
"""

from typing import Any

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh

from adapt import saved_weights
from device import is_memory_error
from model import GPT, rotations


def share_out(model: GPT, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Leaves each process of the mesh its rows of every parameter, in place; `dtype` is that of autocast. What was on
    the meta device has no values yet: see `draw`."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # half a second, only where it is needed

    wide = {"mesh": mesh, "reshard_after_forward": True, "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        for part in block.children() if dtype != torch.float32 else ():
            if part not in (block.attn, block.mlp) and any(True for _ in part.parameters()):
                fully_shard(part, **wide)
        fully_shard(block, **wide | ({"mp_policy": policy} if dtype != torch.float32 else {}))
    fully_shard(model, **wide)


def on_meta(model: nn.Module) -> bool:
    return any(p.is_meta for p in model.parameters())


@torch.no_grad()
def settle_on(model: GPT, device: str) -> None:
    """Gives a shared out model that is on the meta device memory, without values but for what is no parameter."""
    tied, config = model.config.tied, model.config
    model.to_empty(device=device)
    if tied:
        model.transformer.wte.weight = model.lm_head.weight
    if config.pos == "rope":
        model.rotation = rotations(config.block_size, config.n_embd // config.n_head).to(device)


@torch.no_grad()
def draw(model: GPT, seed: int) -> None:
    """Initial values for a shared out model: the same as for a whole one, whatever the number of processes."""
    for name, p in model.named_parameters():
        own_part(p).copy_(own_part(like(model.initial(name, p.shape, seed), p)))


def is_shared_out(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor, of which each process has a part."""
    return hasattr(tensor, "full_tensor")


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """The rows that this process has, in the same memory; of what is not shared out the tensor itself."""
    return tensor.to_local() if is_shared_out(tensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, which every process of its mesh has to ask for."""
    return tensor.full_tensor() if is_shared_out(tensor) else tensor


def like(tensor: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """A whole tensor, which each process has, shared out as p is, on p's device; itself, where p is not shared out."""
    if is_shared_out(tensor) or not is_shared_out(p):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


def heights(rows: int, processes: int) -> list[int]:
    """How many of a tensor's rows each of the processes has."""
    each = -(-rows // processes)
    return [max(0, min(each, rows - n * each)) for n in range(processes)]


def saved_parameters(model: GPT) -> dict[str, nn.Parameter]:
    """The parameters that a checkpoint holds, by name; tied ones once, which `with_tied` makes up for."""
    names = saved_weights(model).keys()
    return {name: p for name, p in model.named_parameters() if name in names}


def with_tied(weights: dict[str, torch.Tensor], model_args: dict[str, Any]) -> dict[str, torch.Tensor]:
    """All the weights of a model that begins with an embedding, with the head that is the same tensor."""
    if "transformer.wte.weight" in weights and model_args.get("tied", True):
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return weights


@torch.no_grad()
def gathered(model: GPT, wanted: bool) -> dict[str, torch.Tensor] | None:
    """The weights that a checkpoint holds, as a whole, in CPU memory, where they are `wanted`, which is to be in one
    process. Every process has to ask. None where they are not wanted, or there is no memory for them."""
    found: dict[str, torch.Tensor] | None = {} if wanted else None
    for name, p in saved_parameters(model).items():
        all_of_it = whole(p)
        try:
            if found is not None:
                found[name] = all_of_it.detach().to("cpu", copy=True)
        except RuntimeError as error:
            if not is_memory_error(error):
                raise
            found = None  # the others wait for this process at the next parameter
    return None if found is None else with_tied(found, model.config.model_args())
