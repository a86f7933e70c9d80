"""Muon, and the optimizers of a run: an update of a matrix is its momentum, orthogonalised.

Notable choices:
- Query, key and value are matrices of their own, although they lie in one tensor.
- Matrices of one shape are orthogonalised together, in batched products; of several processes each takes its share.
- Where FSDP has shared the matrices out, row by row, momenta are shared out like them, and a matrix is put together in
  one of the processes for as long as it is orthogonalised.
- On a CPU the iteration runs in float32 and on the small side: with A = X X', X goes through an odd polynomial as
  q(A) X, so all steps but the last need nothing but A, whose polynomials commute. On a GPU it runs in bfloat16, and so
  do products on a CPU with AMX: they have too few digits for that, so it runs on X itself.
- torch.optim.Muon takes one matrix after the other, in bfloat16 on every device, and would not split c_attn; with a
  single matrix the two agree.

References: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; torch.optim.Muon.
"""

from typing import Any

import torch
import torch.distributed as dist

from fsdp import heights, is_shared_out, own_part
from model import GPT
from ops import rounds_products

OPTIMS = ("adamw", "muon")
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, x^3 and x^5, for the fastest way up from zero
STEPS = 5


def orthogonalized(x: torch.Tensor) -> torch.Tensor:
    """Matrices [n, rows, cols], each with its singular values between 0.7 and 1.2 and its singular vectors as they
    were: five steps of a Newton-Schulz iteration. In float32, but on a GPU in bfloat16."""
    a, b, c = COEFFICIENTS
    tall = x.size(-2) > x.size(-1)
    y = (x.mT if tall else x).to(torch.bfloat16 if x.is_cuda else torch.float32)
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if x.is_cuda or rounds_products():
        for _ in range(STEPS):
            gram = y @ y.mT
            y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    else:
        gram, product = y @ y.mT, None
        for step in range(1, STEPS + 1):
            q = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            q.diagonal(dim1=-2, dim2=-1).add_(a)
            product = q if product is None else q @ product
            if step < STEPS:
                gram = q @ (gram @ q)
        y = product @ y
    return (y.mT if tall else y).to(x.dtype)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay. A group's `parts` is how many matrices lie in each of its
    parameters, one below the other. A matrix [rows, cols] moves by lr * max(1, rows / cols)^0.5 times an orthogonal
    one, as with torch.optim.Muon's adjust_lr_fn='original'.

    Every process keeps all the momenta and orthogonalises a share of the matrices, which all of them then gather. Of
    FSDP's parameters it keeps its part of each momentum.
    """

    def __init__(
        self, params: list[dict[str, Any]], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0,
        rank: int = 0, world_size: int = 1,
    ):  # fmt: skip
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": 1})
        self.rank, self.world_size = rank, world_size

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            of_each = (params, [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params])
            own, grads, buffers = ([own_part(t) for t in tensors] for tensors in of_each)
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, buffers, group["momentum"])
            torch._foreach_mul_(own, 1 - group["lr"] * group["weight_decay"])
            by_shape: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = {}
            in_rows = bool(params) and is_shared_out(params[0])
            for p, part, update in zip(params, own, updates, strict=True):
                parts = 1 if in_rows else group["parts"]  # rows that are not all here cannot be cut into matrices
                for pair in zip(part.chunk(parts), update.chunk(parts), strict=True):
                    by_shape.setdefault(p.shape if in_rows else pair[0].shape, []).append(pair)
            for shape, pairs in by_shape.items():
                targets, found, rows = [target for target, _ in pairs], [update for _, update in pairs], shape[0]
                if in_rows:
                    found, rows = self._put_together(found, shape, group["parts"]), rows // group["parts"]
                else:
                    found = list(self._shared_out(torch.stack(found)).unbind())
                torch._foreach_add_(targets, found, alpha=-group["lr"] * max(1.0, rows / shape[1]) ** 0.5)

    def _put_together(self, own: list[torch.Tensor], shape: torch.Size, parts: int) -> list[torch.Tensor]:
        """Of matrices of this shape, each of `parts` below each other, this process's rows, orthogonalised: each matrix
        goes to one of the processes as a whole, and back. As many at a time as there are processes."""
        rows, found = heights(shape[0], self.world_size), []
        for first in range(0, len(own), self.world_size):
            together = own[first : first + self.world_size]
            here = self.rank < len(together)
            sent = [rows[self.rank]] * len(together) + [0] * (self.world_size - len(together))
            got = rows if here else [0] * self.world_size
            whole = own[0].new_empty(sum(got), shape[1])
            dist.all_to_all_single(whole, torch.cat(together), got, sent)
            if here:
                whole = orthogonalized(whole.view(parts, -1, shape[1])).reshape(shape)
            back = own[0].new_empty(sum(sent), shape[1])
            dist.all_to_all_single(back, whole.contiguous(), sent, got)
            found += back.view(len(together), rows[self.rank], shape[1]).unbind()
        return found

    def _shared_out(self, x: torch.Tensor) -> torch.Tensor:
        """The matrices [n, rows, cols] orthogonalised, each by one of the processes."""
        if self.world_size == 1:
            return orthogonalized(x)
        share = -(-len(x) // self.world_size)
        own = x[self.rank * share : (self.rank + 1) * share]
        found = x.new_zeros(self.world_size, share, *x.shape[1:])
        if len(own):
            found[self.rank, : len(own)] = orthogonalized(own)
        dist.all_gather(list(found.unbind()), found[self.rank].clone())
        return found.flatten(0, 1)[: len(x)]


def build_optimizers(
    model: GPT, optim: str, weight_decay: float, learning_rate: float, betas: tuple[float, float], eps: float,
    muon_learning_rate: float, muon_momentum: float, device_type: str, rank: int = 0, world_size: int = 1,
) -> list[torch.optim.Optimizer]:  # fmt: skip
    """AdamW for everything that is trained; or with optim='muon' for all but the blocks' matrices, and Muon for those,
    where any is trained."""
    if optim == "adamw":
        return [model.configure_optimizers(weight_decay, learning_rate, betas, device_type, eps)]
    hidden = model.hidden_matrices()
    groups = [{"params": [p for p, n in hidden if n == parts], "parts": parts} for parts in (3, 1)]
    groups = [group for group in groups if group["params"]]
    if not groups:
        return build_optimizers(model, "adamw", weight_decay, learning_rate, betas, eps, 0.0, 0.0, device_type)
    muon = Muon(groups, muon_learning_rate, muon_momentum, weight_decay, rank, world_size)
    leave_out = {p for p, _ in hidden}
    return [model.configure_optimizers(weight_decay, learning_rate, betas, device_type, eps, leave_out), muon]
