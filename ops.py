"""What the model is made of where PyTorch's own is slow on a CPU or large in memory: dropout, attention with dropout,
RMSNorm, squared ReLU, the convolution of smear, and the loss from hidden states.

Notable choices:
- On a CPU, PyTorch's attention falls back to whole matrices in memory once it has dropout, and is ten times as slow
  where products are rounded to bfloat16. Here it is computed in pieces that stay in the cache, forwards, and again
  backwards, as flash attention is (Dao et al. 2022); kept between the two are queries, keys, values, and with dropout
  a byte for each probability.
- A mask on a CPU is random bytes, eight to a draw, so that p is taken to the nearest 1/256; what is kept is scaled by
  the share that is really kept.
- The loss from hidden states never holds all logits where torch.nn.functional.linear_cross_entropy can do without: not
  under autocast, whose loss it would round to bfloat16, nor compiled, where the compiler has its own way.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F

PIECE = 1 << 18  # attention probabilities that are worked on at a time: a megabyte
FEW = 1 << 20  # probabilities that are kept for the way back, rather than computed again: four megabytes a layer
ROWS = 128  # queries in a piece, at most: later keys than theirs are not even computed
EPS = 1e-5  # of RMSNorm, as of LayerNorm
LARGE = 1 << 24  # logits from which on they are not held all at once


def on_cpu(x: torch.Tensor) -> bool:
    """Whether x is computed by plain PyTorch on a CPU; what torch.compile makes is its own affair."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def rounds_products() -> bool:
    """Whether matrices of float32 are multiplied in bfloat16 on this CPU, as device.choose_matmul has it."""
    return torch.get_float32_matmul_precision() == "medium"


def dropout(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """F.dropout, without its mask and copy where nothing is dropped."""
    if not training or p == 0:
        return x
    return _Dropout.apply(x, p) if on_cpu(x) else F.dropout(x, p)


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    """x / sqrt(mean(x^2) + 1e-5) over the last dimension (Zhang and Sennrich 2019), without gains."""
    own = on_cpu(x) and x.dtype.itemsize >= 4  # PyTorch adds squares of 16 bits up in 32
    return _RMSNorm.apply(x) if own else F.rms_norm(x, x.shape[-1:], eps=EPS)


def relu2(x: torch.Tensor) -> torch.Tensor:
    """ReLU squared (So et al. 2021)."""
    return _ReLU2.apply(x) if on_cpu(x) else F.relu(x).square()


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, p: float, is_causal: bool,
    window: int = 0,
) -> torch.Tensor:  # fmt: skip
    """F.scaled_dot_product_attention with dropout p, of [batch, n_head, time, head_dim] each, result alike. A `mask`
    [batch, 1, time, time] of as many queries as keys, True where one may look, is to be causal, too. With a `window`
    and without a mask, causal attention is banded: a query sees its own key and the window - 1 before it; a mask says
    so itself."""
    window = window if window < k.size(2) else 0
    whole = is_causal if mask is None else mask.size(2) == k.size(2) > 1
    if whole and on_cpu(q) and q.dtype == torch.float32 and (p or rounds_products()):
        return _Attention.apply(q, k, v, p, mask, window)
    if window and is_causal:
        return _banded(q, k, v, p, window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, is_causal=is_causal)


def smear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x[t] + weight[0] * x[t-1] + weight[1] * x[t-2] + ... for x [batch, time, n_embd], weight [n, n_embd]; what is
    before the first token is zero."""
    return _Smear.apply(x, weight)


def cross_entropy(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy in nats of logits x @ weight.T against `targets` [n], x [n, n_embd], weight [vocab_size,
    n_embd]; targets of -1 do not count. Its gradients are computed at once, so it can be backpropagated once."""
    many = targets.numel() * weight.size(0) >= LARGE and torch.is_grad_enabled()
    if many and not torch.compiler.is_compiling() and not torch.is_autocast_enabled(x.device.type):
        if options := getattr(torch.nn, "LinearCrossEntropyOptions", None):  # PyTorch 2.13 and newer
            return F.linear_cross_entropy(x, weight, targets, ignore_index=-1, options=options())
    return F.cross_entropy(F.linear(x, weight), targets, ignore_index=-1)


def _banded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: float, window: int) -> torch.Tensor:
    """Causal attention of each query to the `window` newest keys, all [batch, n_head, time, head_dim], time > window.

    In blocks of `window` queries, which see the keys of their own block and of the one before: products of time * 2
    window numbers, where a mask over all would cost time * time.
    """
    t = q.size(2)
    head = F.scaled_dot_product_attention(*(x[:, :, :window] for x in (q, k, v)), dropout_p=p, is_causal=True)
    # [batch, n_head, blocks, window, head_dim]; what it is filled up with is later than every query that counts
    q, k, v = (F.pad(x, (0, 0, 0, -t % window)).unflatten(2, (-1, window)) for x in (q, k, v))
    k, v = (torch.cat((x[:, :, :-1], x[:, :, 1:]), 3) for x in (k, v))
    place, seen = torch.arange(window, device=q.device)[:, None] + window, torch.arange(2 * window, device=q.device)
    mask = (seen <= place) & (seen > place - window)  # [window, 2 window]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q[:, :, 1:], k, v))  # [batch * blocks, n_head, ...]
    rest = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
    rest = rest.unflatten(0, (head.size(0), -1)).transpose(1, 2).flatten(2, 3)
    return torch.cat((head, rest[:, :, : t - window]), 2)


def _kept(shape: torch.Size, p: float) -> tuple[torch.Tensor, float]:
    """A random mask, uint8, 0 with probability p to the nearest 1/256 and else 1, by which a tensor is multiplied in a
    fifth of the time that torch.where takes; and what to multiply the rest with."""
    n, dropped = shape.numel(), min(255, round(p * 256))
    draws = torch.empty(-(-n // 8), dtype=torch.int64).random_(-(1 << 63), None)
    return draws.view(torch.uint8)[:n].view(shape).ge_(dropped), 256 / (256 - dropped)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        kept, ctx.scale = _kept(x.shape, p)
        ctx.save_for_backward(kept)
        return (x * kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, dy):
        (kept,) = ctx.saved_tensors
        return (dy * kept).mul_(ctx.scale), None


class _RMSNorm(torch.autograd.Function):
    """In place of a dozen operations in PyTorch 2.13."""

    @staticmethod
    def forward(ctx, x):
        rate = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(EPS).rsqrt_()
        y = x * rate
        ctx.save_for_backward(y, rate)
        return y

    @staticmethod
    def backward(ctx, dy):
        y, rate = ctx.saved_tensors
        return torch.addcmul(dy, y, (dy * y).mean(-1, keepdim=True), value=-1).mul_(rate)


class _ReLU2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = F.relu(x)
        ctx.save_for_backward(y)
        return y * y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return torch.mul(dy, y).mul_(2)


class _Smear(torch.autograd.Function):
    """In place of autograd's own, which would pad x and its gradient for each n."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        y = x.clone()
        for n, w in enumerate(weight.to(x.dtype).unbind()[: x.size(1) - 1], 1):
            y[:, n:].addcmul_(x[:, :-n], w)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx, dw = dy.clone(), torch.zeros_like(weight)
        for n, w in enumerate(weight.to(dy.dtype).unbind()[: x.size(1) - 1], 1):
            dx[:, :-n].addcmul_(dy[:, n:], w)
            dw[n - 1] = (dy[:, n:] * x[:, :-n]).sum((0, 1))
        return dx, dw


class _Attention(torch.autograd.Function):
    """Causal attention with dropout, in pieces of some heads of some sequences and of some queries each."""

    @staticmethod
    def forward(ctx, q, k, v, p, mask, window):
        shape, (t, d) = q.shape, q.shape[-2:]
        q, k, v = ((q * d**-0.5).reshape(-1, t, d), *(x.reshape(-1, t, d) for x in (k, v)))
        y, masks, scale = torch.empty_like(q), [], 1.0
        few = not p and len(q) * t * t <= FEW
        known = []  # probabilities of each piece, where they are few
        for heads, rows, seen in _pieces(len(q), t, window):
            allowed = _allowed(mask, shape[1], heads, rows, seen)
            probabilities = _probabilities(q[heads, rows], k[heads, seen], allowed, window)
            if p:
                kept, scale = _kept(probabilities.shape, p)
                probabilities.mul_(kept)
                masks.append(kept)
            known += [probabilities] * few
            y[heads, rows] = probabilities @ v[heads, seen]
        if scale != 1:
            y *= scale
        ctx.save_for_backward(q, k, v, mask, *masks, *known)
        ctx.scale, ctx.dropped, ctx.few, ctx.window = scale, p > 0, few, window
        return y.view(shape)

    @staticmethod
    def backward(ctx, dy):
        # the pieces are masks with dropout, and else, where they are few, probabilities
        q, k, v, mask, *pieces = ctx.saved_tensors
        shape, dy = dy.shape, dy.reshape(q.shape)
        dy = dy * ctx.scale if ctx.dropped else dy
        # of a band, no piece sees all keys
        dq, dk, dv = (torch.zeros_like(x) if ctx.window else torch.empty_like(x) for x in (q, k, v))
        for n, (heads, rows, seen) in enumerate(_pieces(*q.shape[:2], ctx.window)):
            if ctx.few:
                probabilities = kept = pieces[n]
            else:
                allowed = _allowed(mask, shape[1], heads, rows, seen)
                probabilities = kept = _probabilities(q[heads, rows], k[heads, seen], allowed, ctx.window)
            ds = dy[heads, rows] @ v[heads, seen].mT
            if ctx.dropped:
                kept, ds = probabilities * pieces[n], ds.mul_(pieces[n])
            ds = torch._softmax_backward_data(ds, probabilities, -1, ds.dtype)
            dq[heads, rows] = ds @ k[heads, seen]
            for grad, part in ((dv, kept.mT @ dy[heads, rows]), (dk, ds.mT @ q[heads, rows])):
                # the first piece of these heads is the one that sees all keys
                if rows.stop == q.size(1) and not ctx.window:
                    grad[heads] = part
                else:
                    grad[heads, seen] += part
        return (*(g.view(shape) for g in (dq.mul_(q.size(-1) ** -0.5), dk, dv)), None, None, None)


def _pieces(n: int, t: int, window: int) -> Iterator[tuple[slice, slice, slice]]:
    """The heads, the queries and the keys of each piece, of n heads and sequences together and t positions; the last
    queries first."""
    together = max(1, PIECE // (min(t, ROWS) * (min(t, window + ROWS) if window else t)))
    for first in range(0, n, together):
        for row in reversed(range(0, t, ROWS)):
            rows = slice(row, min(row + ROWS, t))
            yield slice(first, first + together), rows, slice(max(0, row + 1 - window) if window else 0, rows.stop)


def _probabilities(q: torch.Tensor, k: torch.Tensor, allowed: torch.Tensor | None, window: int) -> torch.Tensor:
    """Softmax of scaled queries [n, rows, head_dim] against keys [n, seen, head_dim]; the last ones are together.
    `allowed` [n, rows, seen]: where a query may look, in place of all that is before it, or in its window."""
    if allowed is not None:
        return (q @ k.mT).masked_fill_(~allowed, -torch.inf).softmax(-1)
    return (q @ k.mT).add_(_causal(q.size(1), k.size(1), window)).softmax(-1)


def _allowed(mask: torch.Tensor | None, n_head: int, heads: slice, rows: slice, seen: slice) -> torch.Tensor | None:
    """A piece's part of the mask [batch, 1, time, time]."""
    if mask is None:
        return None
    row = torch.arange(mask.size(0) * n_head, device=mask.device)[heads] // n_head
    return mask[row, 0, rows, seen]


@lru_cache(maxsize=64)
def _causal(rows: int, seen: int, window: int) -> torch.Tensor:
    """0 where a query may look, -inf where it may not: [rows, seen]."""
    forbidden = torch.full((rows, seen), -torch.inf)
    later = forbidden.triu(1 + seen - rows)
    return later + forbidden.tril(seen - rows - window) if window else later
