"""Reading on, one token at a time, over a key-value cache.

Notable choices:
- The blocks of model.py are what computes, the same that training uses; here is where their cache lies.
- Rows are independent of each other: each may be at a position of its own, begin anew or rest.
- Only the first rows of the cache are computed, as many as there are ids; where one ends, the last takes its place.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT, MLP, Block, CausalSelfAttention, RMSNorm, embedded
from ops import rms_norm

LEAST = 32  # tokens for which a cache has room at first


class Decoder:
    """A model that reads on from what it has read: each row's ids, and every layer's keys and values of them.

    The cache is two tensors [batch, n_head, time, head_dim] a layer, and with smear two [batch, 1, time, n_embd] of
    what it has mixed. It grows with what is read, twofold each time, up to `batch` rows of `time` tokens. Rows are
    independent of each other and may have different lengths. A position does not slide: a row whose context is full
    goes on from its newer half, which is read again from position 0. So half a context is read once for each half that
    is written, and up to `time` tokens nothing differs from reading the whole row each time.
    """

    def __init__(self, model: GPT, batch: int, time: int, compiled: bool = False):
        """Room for `batch` rows of `time` tokens, at most block_size. Computes in the autocast that is on now.

        `compiled`: torch.compile of the one-token pass, always over all rows and block_size, so that nothing is
        compiled again as rows come, go and grow; on CUDA as a CUDA graph.
        """
        c, weight = model.config, model.transformer.wte.weight
        self.model, self.device, self.time = model, weight.device, min(time, c.block_size)
        self.time = c.block_size if compiled else self.time
        kind = self.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else weight.dtype
        kinds = [(c.n_head, c.n_embd // c.n_head, dtype)] * 2 + [(1, c.n_embd, weight.dtype)] * 2 * bool(c.smear)
        # tensors of each layer's own: slices of a stacked one are copied, whole, by compiled code
        self.layers = [
            [torch.zeros(0, heads, 0, width, dtype=own, device=self.device) for heads, width, own in kinds]
            for _ in range(c.n_layer)
        ]
        self.computed = self.layers  # the first rows of each
        self.read: list[list[int]] = [[] for _ in range(batch)]  # each row's ids, from where it was last read afresh
        self.lengths = [0] * batch  # tokens of each row that are in the cache
        on_cpu = kind == "cpu" and dtype == torch.float32
        net = model.transformer
        self.net = SimpleNamespace(
            wte=net.wte,
            wpe=net.wpe,
            rotation=model.rotation,
            h=[bare(block, on_cpu) for block in net.h],
            ln_f=bare(net.ln_f),
            lm_head=bare(model.lm_head, on_cpu),
        )
        # at one token, oneDNN's exact GELU takes 60 us a layer on a CPU, PyTorch's own 15
        self.without_onednn = on_cpu and c.act == "gelu"
        self.compiled = _compiled("reduce-overhead" if kind == "cuda" else None) if compiled else None
        if compiled:
            self._grow(batch, self.time)
            for tensor in itertools.chain(*self.layers):
                torch._dynamo.mark_static_address(tensor)  # or CUDA graphs would copy the cache at each token

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], rows: list[int] | None = None) -> torch.Tensor:
        """Reads one prompt into each of `rows` (default: all) in place of what was there; of one longer than `time`,
        its newest part. The next token's logits, [rows, vocab_size]. Equal prompts are computed once."""
        rows = list(range(len(prompts))) if rows is None else rows
        for row, prompt in zip(rows, prompts, strict=True):
            self.read[row] = list(prompt[-self.time :])
            self.lengths[row] = min(len(prompt), self.time)
        distinct = {tuple(prompt[-self.time :]): None for prompt in prompts}
        number = {prompt: n for n, prompt in enumerate(distinct)}
        which = self._tensor([number[tuple(prompt[-self.time :])] for prompt in prompts])
        t = max(map(len, distinct))
        if self.device.type == "cpu":  # few numbers of rows: for each oneDNN compiles, and keeps, some megabytes
            t = min(-(-t // 8) * 8, self.time)
        # what is padded sees, unseen; of its own tokens, lest a number that is not finite come in from others
        idx = self._tensor([[*prompt, *prompt[-1:] * (t - len(prompt))] for prompt in distinct])
        self._grow(max(rows) + 1, t)
        into = slice(rows[0], rows[-1] + 1) if rows == list(range(rows[0], rows[-1] + 1)) else self._tensor(rows)

        alike = len(distinct) == 1  # then one row is written to all
        x = _read(self.net, self.layers, idx, slice(t), _Whole(into, None if alike else which))
        x = x[
            self._tensor(list(range(len(x)))), self._tensor([len(prompt) - 1 for prompt in distinct])
        ]  # [distinct, n_embd]
        return self.net.lm_head(self.net.ln_f(x))[which]

    @torch.inference_mode()
    def decode(self, ids: Sequence[int | None]) -> torch.Tensor:
        """Reads one more token in each of the first len(ids) rows, but those with None, which rest: the next token's
        logits, [len(ids), vocab_size], where those of resting rows mean nothing."""
        full = [row for row, id in enumerate(ids) if id is not None and self.lengths[row] == self.time]
        going = [row for row, id in enumerate(ids) if id is not None and self.lengths[row] < self.time]
        for row in full + going:
            self.read[row].append(ids[row])
        logits = None
        if going:
            logits = self._decode(ids, going)
            for row in going:
                self.lengths[row] += 1
        if full:
            kept = max(1, self.time // 2)
            again = self.prefill([self.read[row][-kept:] for row in full], full)
            if len(full) == len(ids):
                return again
            logits = again.new_zeros(len(ids), again.size(-1)) if logits is None else logits.clone()
            logits[self._tensor(full)] = again
        return logits

    @torch.inference_mode()
    def move(self, row: int, to: int) -> None:
        """Puts a row, what it has read and where it is, in place of another, which is forgotten."""
        n = self.lengths[to] = self.lengths[row]
        self.read[to], self.read[row], self.lengths[row] = self.read[row], [], 0
        for tensor in itertools.chain(*self.layers):
            tensor[to, :, :n] = tensor[row, :, :n]

    @torch.inference_mode()
    def wipe(self, row: int) -> None:
        """Forgets a row that holds numbers that are not finite: a mask would not keep them from who comes there."""
        self.read[row], self.lengths[row] = [], 0
        for tensor in itertools.chain(*self.layers):
            tensor[row] = 0

    def _grow(self, rows: int, time: int) -> None:
        """Makes room for so many rows of so many tokens, where there is less."""
        have, long = self.layers[0][0].size(0), self.layers[0][0].size(2)
        if rows <= have and time <= long:
            return
        rows = have if rows <= have else min(max(rows, 2 * have), len(self.lengths))
        time = long if time <= long else min(max(time, 2 * long, LEAST), self.time)
        for layer in self.layers:  # one after the other: of one tensor alone are there two at a time
            for n, old in enumerate(layer):
                layer[n] = old.new_zeros(rows, old.size(1), time, old.size(3))
                layer[n][:have, :, :long] = old
        self.computed = self.layers

    def _decode(self, ids: Sequence[int | None], going: list[int]) -> torch.Tensor:
        if self.compiled:
            more = len(self.lengths) - len(ids)
            idx = self._tensor([[id or 0] for id in (*ids, *[0] * more)])
            positions = self._tensor([min(length, self.time - 1) for length in self.lengths])
            if self.device.type == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            return self.compiled(self.model, self.layers, idx, positions)[: len(ids)].clone()
        idx = self._tensor([[id or 0] for id in ids])  # [rows, 1]
        lengths = self.lengths[: len(ids)]
        at = max(lengths)
        if at == min(lengths) < self.time:
            self._grow(len(ids), at + 1)
            where, place = slice(at, at + 1), _Same(at)
        else:
            positions = [min(length, self.time - 1) for length in lengths]  # resting rows write behind their end
            self._grow(len(ids), max(positions) + 1)
            where = self._tensor(positions)[:, None]
            place = _Each(where[:, 0], max(positions) + 1, self.layers[0][0].dtype, self.model.config.smear)
        if self.computed[0][0].size(0) != len(ids):
            self.computed = [[tensor[: len(ids)] for tensor in layer] for layer in self.layers]
        onednn = torch.backends.mkldnn.enabled
        try:
            torch.backends.mkldnn.enabled = onednn and not self.without_onednn
            x = _read(self.net, self.computed, idx, where, place)
            return self.net.lm_head(self.net.ln_f(x))[:, 0]
        finally:
            torch.backends.mkldnn.enabled = onednn

    def _tensor(self, ids: list) -> torch.Tensor:
        return torch.tensor(ids, device=self.device)


@dataclass(frozen=True)
class Cache:
    """A layer's tensors [batch, heads, time, width] and the place of the new tokens in them, as a block sees it."""

    tensors: list[torch.Tensor]
    place: "_Whole | _Same | _Each"

    def remember(
        self, k: torch.Tensor, v: torch.Tensor, window: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Takes the keys and values [batch, n_head, new, head_dim] of new tokens; gives those of all that these may
        look at, the newest `window` where it is not 0, and a mask where they may not look at all of it."""
        keys, values, *_ = self.tensors
        return self.place.write(keys, k, window), self.place.write(values, v, window), self.place.mask(window)

    def before(self, x: torch.Tensor, half: int) -> Callable[[int], torch.Tensor] | None:
        """Takes what a half of the block reads at the new tokens, x [batch, new, n_embd]; gives a function of n that
        gives what it read n tokens before, None where x is all that it has read."""
        read = self.tensors[2 + half]
        self.place.write(read, x[:, None])
        return self.place.before(read)


class _Whole:
    """Prompts from position 0 on. `rows` are theirs, `which` [rows] the prompt of each, None where there is but one."""

    def __init__(self, rows: slice | torch.Tensor, which: torch.Tensor | None):
        self.rows, self.which = rows, which

    def write(self, tensor: torch.Tensor, new: torch.Tensor, window: int = 0) -> torch.Tensor:
        tensor[self.rows, :, : new.size(2)] = new if self.which is None else new[self.which]
        return new

    def mask(self, window: int) -> None:
        return None  # attention to a whole row knows its window

    def before(self, read: torch.Tensor) -> None:
        return None


class _Same:
    """One token in each row, all at the same position."""

    def __init__(self, position: int):
        self.position = position

    def write(self, tensor: torch.Tensor, new: torch.Tensor, window: int = 0) -> torch.Tensor:
        tensor.narrow(2, self.position, 1).copy_(new)  # narrow() is sooner done than the same with brackets
        first = max(0, self.position + 1 - window) if window else 0
        return tensor.narrow(2, first, self.position + 1 - first)

    def mask(self, window: int) -> None:
        return None

    def before(self, read: torch.Tensor) -> Callable[[int], torch.Tensor]:
        nothing = torch.zeros((), dtype=read.dtype, device=read.device)
        return lambda n: read[:, 0, self.position - n, None] if n <= self.position else nothing


class _Each:
    """One token in each row, at positions of their own, `positions` [batch], all below `seen`; keys are of `dtype`, and
    `smear` is the model's."""

    def __init__(self, positions: torch.Tensor, seen: int, dtype: torch.dtype, smear: int):
        self.positions, self.seen, self.dtype = positions, seen, dtype
        self.rows = torch.arange(len(positions), device=positions.device)
        self.distance = (positions[:, None] - torch.arange(seen, device=positions.device))[:, None, None]
        self.masks: dict[int, torch.Tensor] = {}  # [batch, 1, 1, seen] for each window
        if smear:
            earlier = positions[:, None] - torch.arange(1, smear + 1, device=positions.device)  # [batch, smear]
            self.earlier, self.there = earlier.clamp(min=0), (earlier >= 0)[:, :, None]

    def write(self, tensor: torch.Tensor, new: torch.Tensor, window: int = 0) -> torch.Tensor:
        tensor[self.rows, :, self.positions] = new[:, :, 0]
        return tensor[:, :, : self.seen]

    def mask(self, window: int) -> torch.Tensor:
        if window not in self.masks:
            seen = (self.distance >= 0) & (self.distance < window) if window else self.distance >= 0
            # as numbers to add, which attention makes of it anyway, once for all layers
            self.masks[window] = torch.zeros_like(seen, dtype=self.dtype).masked_fill_(~seen, -torch.inf)
        return self.masks[window]

    def before(self, read: torch.Tensor) -> Callable[[int], torch.Tensor]:
        before = read[self.rows[:, None], 0, self.earlier] * self.there  # [batch, smear, n_embd]
        return lambda n: before[:, n - 1, None]


def _read(net, layers: list[list[torch.Tensor]], idx: torch.Tensor, where: slice | torch.Tensor, place):
    """The blocks of `net` over the new tokens `idx` [batch, new] at the positions `where`: [batch, new, n_embd]."""
    x, rotation = embedded(F.embedding(idx, net.wte.weight), net.wpe, net.rotation, where)
    for block, tensors in zip(net.h, layers, strict=True):
        x = block(x, rotation, Cache(tensors, place))
    return x


@cache
def _compiled(mode: str | None) -> Callable:
    return torch.compile(_decode_whole, mode=mode, dynamic=False)


def _decode_whole(model: GPT, layers: list, idx: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One token in each row, in static shapes: logits [batch, vocab_size]. The model's own modules, whose parameters
    CUDA graphs know to stay where they are."""
    own = model.transformer
    net = SimpleNamespace(wte=own.wte, wpe=own.wpe, rotation=model.rotation, h=own.h)
    x = _read(
        net,
        layers,
        idx,
        positions[:, None],
        _Each(positions, layers[0][0].size(2), layers[0][0].dtype, model.config.smear),
    )
    return model.lm_head(own.ln_f(x))[:, 0]


def bare(module: nn.Module, on_cpu: bool = False) -> Callable:
    """The module's own forward as a function of plain attributes, for inference: for one token on a CPU, nn.Module's
    bookkeeping takes as long as attention. What stands in a layer's place, such as an adapter, stays as it is.

    `on_cpu`: computes in float32 on a CPU, where oneDNN's product of 4 to 50 rows takes 0.6 of F.linear's time.
    """
    if type(module) is nn.Linear:
        weight, bias, width, linear = module.weight, module.bias, module.in_features, F.linear
        if not (on_cpu and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
            return lambda x: linear(x, weight, bias)
        product = torch.ops.mkldnn._linear_pointwise
        few = range(4 * width, 51 * width)
        return lambda x: product(x, weight, bias, "none", [], "") if x.numel() in few else linear(x, weight, bias)
    if type(module) is nn.LayerNorm:
        shape, weight, bias, eps = module.normalized_shape, module.weight, module.bias, module.eps
        return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
    if type(module) is RMSNorm:
        return rms_norm
    if type(module) in (Block, CausalSelfAttention, MLP):
        own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        parts = {name: bare(child, on_cpu) for name, child in module.named_children()}
        return partial(type(module).forward, SimpleNamespace(**own | parts | {"training": False}))
    return module
