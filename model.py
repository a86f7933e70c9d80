"""GPT-2, whole, in the order in which data meets it.

Notable choices:
- The defaults are nanoGPT's model: pre-norm, learned positions, exact GELU, tied input and output embeddings.
- Attention is F.scaled_dot_product_attention, which picks flash attention where the device has it.
- Every parameter's initial values depend on (seed, its name) alone, so that neither the order in which modules are
  built nor the number of processes changes them.
- Generation reads one token at a time over a key-value cache, through the blocks that training uses.
- Weights come and go in the Hugging Face layout: OpenAI's by name, anyone's from a folder.

References: Radford et al. 2019 (GPT-2), https://github.com/openai/gpt-2, and the Hugging Face layout of its weights.
"""

import hashlib
import json
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

# Dense bf16/fp16 matrix peak in FLOP/s by a part of the device's name, longest match first; vendors' data sheets.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "A6000": 154.8e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 4080": 97.5e12,
    "RTX 3090": 71e12,
    "RTX 3080": 59.5e12,
    "MI300X": 1307e12,
    "MI250X": 383e12,
}

ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh"}  # the `approximate` argument of F.gelu


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all the parts: the same on every machine, unrelated for different parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


@dataclass
class GPTConfig:
    """The shape of a GPT: nanoGPT's fields, then what is off by default. ValueError where it is impossible."""

    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, rounded up to a multiple of 64, which is faster
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linears and LayerNorms, as in GPT-2; False is a bit better and faster
    act: str = "gelu"  # or 'gelu_tanh', the form that OpenAI's weights were trained with

    def __post_init__(self):
        for key in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} = {getattr(self, key)}: it must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} is not divisible by n_head = {self.n_head}: the heads share it")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout}: it must be at least 0 and below 1")
        if self.act not in ACTIVATIONS:
            raise ValueError(f"act = {self.act!r}: there are {', '.join(ACTIVATIONS)}")

    def model_args(self) -> dict:
        """nanoGPT's `model_args`, with the newer fields only where they differ from their default."""
        args = asdict(self)
        nanogpt = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
        newer = {f.name: args[f.name] for f in fields(self) if f.name not in nanogpt and args[f.name] != f.default}
        return {key: args[key] for key in nanogpt} | newer


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key, value side by side
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor, cache: tuple | None = None) -> torch.Tensor:  # [batch, time, n_embd] -> the same
        """`cache` is this layer's keys and values and what to do with new ones: see Decoder."""
        b, t, c = x.shape
        q, k, v = self.c_attn(x).view(b, t, 3, self.n_head, c // self.n_head).permute(2, 0, 3, 1, 4)
        # each [batch, n_head, time, head_dim]
        mask = None
        if cache is not None:
            keys, values, remember = cache
            k, v, mask = remember(keys, values, k, v)  # now all that the new tokens may look at
        p, is_causal = self.dropout if self.training else 0.0, k.size(2) == t and mask is None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, is_causal=is_causal)
        y = self.c_proj(y.transpose(1, 2).reshape(b, t, c))
        return dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout, self.approximate = config.dropout, ACTIVATIONS[config.act]
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [batch, time, n_embd] -> the same
        y = self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))
        return dropout(y, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cache: tuple | None = None) -> torch.Tensor:  # [batch, time, n_embd] -> the same
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


def dropout(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """F.dropout, without its mask and copy where nothing is dropped."""
    return F.dropout(x, p) if training and p > 0 else x


class GPT(nn.Module):
    """A GPT language model. Its initial weights depend on torch.initial_seed() and each parameter's name."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        self.init_weights(torch.initial_seed())

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """GPT-2's initialisation.

        | parameter                        | values                             |
        | matrices, embeddings             | normal, 0.02                       |
        | c_proj, which ends on a residual | normal, 0.02 / sqrt(2 * n_layer)   |
        | LayerNorm gains                  | 1                                  |
        | biases                           | 0                                  |
        """
        for name, p in self.named_parameters():
            if p.dim() < 2:
                p.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 0.02
            generator = torch.Generator("cpu").manual_seed(derive_seed(seed, name))
            p.copy_(torch.empty(p.shape, device="cpu").normal_(0.0, std, generator=generator))

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None):
        """(logits, loss) for ids `idx` [batch, time] and, one position ahead, `targets` of the same shape.

        With targets: logits [batch, time, vocab_size] and the mean cross-entropy in nats; targets of -1 do not count.
        Without: the last position's logits [batch, 1, vocab_size] and None. ValueError where time exceeds block_size.
        """
        b, t = idx.shape
        if t > self.config.block_size:
            raise ValueError(f"{t} tokens do not fit into a context of block_size = {self.config.block_size}")
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[:t]  # [batch, time, n_embd]
        x = dropout(x, self.config.dropout, self.training)
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(
        self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None
    ) -> torch.Tensor:
        """`idx` [batch, time], continued by max_new_tokens sampled ids: [batch, time + new].

        temperature 0 takes the likeliest id; top_k keeps the k likeliest. Up to block_size tokens in all, the same
        torch.manual_seed draws what nanoGPT draws; beyond, see Decoder. Prompts, text and more ways to choose are in
        generate.py.
        """
        decoder = Decoder(self, idx.size(0), idx.size(1) + max_new_tokens)
        for n in range(max_new_tokens):
            logits = decoder.decode(idx[:, -1].tolist()) if n else decoder.prefill(idx.tolist())
            if temperature == 0:
                drawn = logits.argmax(-1, keepdim=True)
            else:
                logits = logits.float() / temperature
                if top_k:
                    least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < least, -torch.inf)
                drawn = torch.multinomial(logits.softmax(-1), 1)
            idx = torch.cat((idx, drawn), dim=1)
        return idx

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Parameters, tied ones once; without the position embeddings unless non_embedding is False."""
        n = sum(p.numel() for p in self.parameters())
        return n - self.transformer.wpe.weight.numel() if non_embedding else n

    def estimate_flops(self) -> int:
        """FLOPs of training on one token of a full context: 6N + 12 n_layer n_embd block_size (PaLM, appendix B)."""
        c = self.config
        return 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float) -> float | None:
        """Model FLOPs utilisation, a fraction of the device's bf16 peak, for this many sequences of block_size in dt
        seconds; None where the device's peak is unknown (a CPU, or a card that is not in PEAK_FLOPS)."""
        device = self.lm_head.weight.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        known = [k for k in PEAK_FLOPS if re.search(rf"\b{k}\b", name)]  # "A100", but not inside "RTX A1000"
        peak = PEAK_FLOPS[max(known, key=len)] if known else None
        return peak and self.estimate_flops() * self.config.block_size * fwdbwd_per_iter / dt / peak

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, eps=1e-8) -> torch.optim.AdamW:
        """AdamW, decaying matrices and embeddings only; in nanoGPT's parameter order; fused where torch has it."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        fused = device_type in ("cpu", "cuda", "mps")
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=fused)

    def crop_block_size(self, block_size: int) -> None:
        """Shortens the context to block_size by dropping the later position embeddings. ValueError if it is longer."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"block_size = {block_size}: the model's context is {self.config.block_size}, at most")
        self.config.block_size = block_size
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].detach().clone())

    @classmethod
    def from_pretrained(cls, model_type: str, override_args: dict | None = None) -> "GPT":
        """GPT-2's weights: 'gpt2', 'gpt2-medium', 'gpt2-large' or 'gpt2-xl' from the hub or its cache, or a local
        folder in the Hugging Face layout (config.json and model.safetensors, else pytorch_model.bin). Only dropout can
        be overridden.

        ValueError, in a sentence, where the files cannot be had or hold another architecture.
        """
        folder = Path(model_type)
        if not folder.is_dir():
            folder = _download(model_type)
        try:
            hf = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{folder} has no readable config.json, so it is no Hugging Face model: {error}") from None
        args = _config_from_hf(hf, folder)
        theirs = _tensors_of(folder)
        for key, rows in (("wte.weight", args["vocab_size"]), ("wpe.weight", args["block_size"])):
            shape = [rows, args["n_embd"]]  # before a model of that size is made
            if key not in theirs or list(theirs[key].shape) != shape:
                raise ValueError(f"{folder} lacks the tensor {key} of shape {shape}, expected by config.json")
        if (last := f"h.{args['n_layer'] - 1}.ln_1.weight") not in theirs:
            raise ValueError(f"{folder} lacks the tensor {last}, expected by config.json")
        if not args["bias"]:  # to_hf wrote zeros, which someone may have trained since
            args["bias"] = any(bool(v.any()) for k, v in theirs.items() if k.endswith(".bias") and v.dim() == 1)
        model = cls(GPTConfig(**(args | {"dropout": 0.0} | (override_args or {}))))
        model.load_state_dict(_weights_from_hf(theirs, model.state_dict(), folder))
        return model

    def to_hf(self) -> tuple[dict, dict[str, torch.Tensor]]:
        """This model in the Hugging Face layout of GPT-2: config.json's content and the float32 tensors of
        model.safetensors, on the CPU, from which from_pretrained makes the same model again.

        That layout has biases always: where this model has none they are zeros, and "weigpt_bias" remembers it.
        ValueError where the architecture is not GPT-2's.
        """
        c = self.config
        sizes = {"vocab_size": c.vocab_size, "n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head}
        if newer := c.model_args().keys() - sizes.keys() - {"block_size", "bias", "dropout", "act"}:
            raise ValueError(f"GPT-2's layout has no place for this model's {', '.join(sorted(newer))}")
        config = {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            **sizes,
            "n_positions": c.block_size,
            "n_ctx": c.block_size,
            "n_inner": None,
            "activation_function": HF_ACTIVATIONS[c.act],
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), c.dropout),
            "layer_norm_epsilon": 1e-5,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
            "weigpt_bias": c.bias,
        }
        tensors = {}
        for name, value in self.state_dict().items():
            if name == "lm_head.weight":
                continue
            value = value.detach().float().cpu()
            tensors[name] = (value.t() if name.endswith(CONV1D) else value).contiguous()
            if not c.bias and (value.dim() == 1 or name.endswith(CONV1D)):
                tensors[name.removesuffix("weight") + "bias"] = torch.zeros(value.size(0))
        return config, tensors


HF_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new"}
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored as [in, out], a Linear's as [out, in]


class Decoder:
    """A model that reads on from what it has read: each row's ids, and every layer's keys and values of them.

    The cache is two tensors [batch, n_head, time, head_dim] a layer, allocated once. Rows are independent of each other
    and may have different lengths. A learned position cannot slide: a row whose context is full goes on from its newer
    half, which is read again from position 0. So half a context is read once for each half that is written, and up to
    `time` tokens nothing differs from reading the whole row each time.
    """

    def __init__(self, model: GPT, batch: int, time: int, compiled: bool = False):
        """Room for `batch` rows of `time` tokens, at most block_size. Computes in the autocast that is on now.

        `compiled`: torch.compile of the one-token pass, always over block_size, so that nothing is compiled again as
        rows grow; on CUDA as a CUDA graph.
        """
        c, weight = model.config, model.transformer.wte.weight
        self.model, self.device, self.time = model, weight.device, min(time, c.block_size)
        self.time = c.block_size if compiled else self.time
        kind = self.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else weight.dtype
        shape = (batch, c.n_head, self.time, c.n_embd // c.n_head)
        # one tensor a layer: slices of a stacked one are copied, whole, by compiled code
        self.keys = [torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(c.n_layer)]
        self.values = [torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(c.n_layer)]
        self.read: list[list[int]] = [[] for _ in range(batch)]  # each row's ids, from where it was last read afresh
        self.lengths = [0] * batch  # tokens of each row that are in the cache
        on_cpu = kind == "cpu" and dtype == torch.float32
        net = model.transformer
        self.net = SimpleNamespace(
            wte=net.wte,
            wpe=net.wpe,
            h=[bare(block, on_cpu) for block in net.h],
            ln_f=bare(net.ln_f),
            lm_head=bare(model.lm_head, on_cpu),
        )
        # at one token, oneDNN's exact GELU takes 60 us a layer on a CPU, PyTorch's own 15
        self.without_onednn = on_cpu and c.act == "gelu"
        self.compiled = _compiled("reduce-overhead" if kind == "cuda" else None) if compiled else None
        if compiled:
            for tensor in (*self.keys, *self.values):
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
        idx = self._tensor([[*prompt, *[0] * (t - len(prompt))] for prompt in distinct])  # what is padded sees, unseen
        into = slice(None) if rows == list(range(len(self.lengths))) else self._tensor(rows)

        def remember(keys, values, k, v):
            alike = len(distinct) == 1  # then one row is written to all
            keys[into, :, :t], values[into, :, :t] = (k, v) if alike else (k[which], v[which])
            return k, v, None

        x = _read(self.net, self.keys, self.values, idx, slice(t), remember)
        x = x[
            self._tensor(list(range(len(x)))), self._tensor([len(prompt) - 1 for prompt in distinct])
        ]  # [distinct, n_embd]
        return self.net.lm_head(self.net.ln_f(x))[which]

    @torch.inference_mode()
    def decode(self, ids: Sequence[int | None]) -> torch.Tensor:
        """Reads one more token in each row, but those with None, which rest: the next token's logits, [batch,
        vocab_size], where those of resting rows mean nothing."""
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

    def _decode(self, ids: Sequence[int | None], going: list[int]) -> torch.Tensor:
        idx = self._tensor([[id or 0] for id in ids])  # [batch, 1]
        positions = [min(length, self.time - 1) for length in self.lengths]  # resting rows write behind their end
        if self.compiled:
            if self.device.type == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            return self.compiled(self.model, self.keys, self.values, idx, self._tensor(positions)).clone()
        at = self.lengths[going[0]]
        if max(self.lengths) == at and all(self.lengths[row] == at for row in going):
            where, remember = slice(at, at + 1), _remember_at(at)
        else:
            where = self._tensor(positions)[:, None]
            remember = _remember_each(where[:, 0], max(positions) + 1)
        onednn = torch.backends.mkldnn.enabled
        try:
            torch.backends.mkldnn.enabled = onednn and not self.without_onednn
            x = _read(self.net, self.keys, self.values, idx, where, remember)
            return self.net.lm_head(self.net.ln_f(x))[:, 0]
        finally:
            torch.backends.mkldnn.enabled = onednn

    def _tensor(self, ids: list) -> torch.Tensor:
        return torch.tensor(ids, device=self.device)


def _read(net, keys: list, values: list, idx: torch.Tensor, where: slice | torch.Tensor, remember: Callable):
    """The blocks of `net` over the new tokens `idx` [batch, new] at the positions `where`: [batch, new, n_embd]."""
    x = F.embedding(idx, net.wte.weight) + net.wpe.weight[where]
    for block, k, v in zip(net.h, keys, values, strict=True):
        x = block(x, (k, v, remember))
    return x


@cache
def _compiled(mode: str | None) -> Callable:
    return torch.compile(_decode_whole, mode=mode, dynamic=False)


def _decode_whole(model: GPT, keys: list, values: list, idx: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One token in each row, in static shapes: logits [batch, vocab_size]. The model's own modules, whose parameters
    CUDA graphs know to stay where they are."""
    net, remember = model.transformer, _remember_each(positions, keys[0].size(2))
    x = _read(net, keys, values, idx, positions[:, None], remember)
    return model.lm_head(net.ln_f(x))[:, 0]


def _remember_at(position: int) -> Callable:
    """Writes one new token's keys and values [batch, n_head, 1, head_dim] into a layer's, for all rows at the same
    position, and gives those up to there."""

    def remember(keys, values, k, v):
        keys.narrow(2, position, 1).copy_(k)  # narrow() is sooner done than the same with brackets
        values.narrow(2, position, 1).copy_(v)
        return keys.narrow(2, 0, position + 1), values.narrow(2, 0, position + 1), None

    return remember


def _remember_each(positions: torch.Tensor, seen: int) -> Callable:
    """The same for rows that are each at a position of their own, `positions` [batch], all below `seen`."""
    rows = torch.arange(len(positions), device=positions.device)
    mask = (torch.arange(seen, device=positions.device) <= positions[:, None])[:, None, None]  # [batch, 1, 1, seen]

    def remember(keys, values, k, v):
        keys[rows, :, positions], values[rows, :, positions] = k[:, :, 0], v[:, :, 0]
        return keys[:, :, :seen], values[:, :, :seen], mask

    return remember


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
    if type(module) in (Block, CausalSelfAttention, MLP):
        own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        parts = {name: bare(child, on_cpu) for name, child in module.named_children()}
        return partial(type(module).forward, SimpleNamespace(**own | parts | {"training": False}))
    return module


def _download(name: str) -> Path:
    names = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    if name not in names:
        raise ValueError(f"no folder {name}, and no such GPT-2: there are {', '.join(names)}, or a local folder")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ValueError("GPT-2's weights need two packages: pip install huggingface_hub safetensors") from None
    try:
        hf_hub_download(name, "model.safetensors")
        return Path(hf_hub_download(name, "config.json")).parent
    except Exception as error:  # the hub's client raises many kinds, for no network, a block, a mirror's fault
        raise ValueError(
            f"{name} is neither in the local hub cache nor to be had from the hub ({type(error).__name__}). Set "
            f"HF_ENDPOINT to a mirror, or put its config.json and model.safetensors into a folder and give that folder"
        ) from error


def _config_from_hf(hf: dict, folder: Path) -> dict:
    activations = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
    hf = hf if isinstance(hf, dict) else {}
    sizes = ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions")
    fits = (
        hf.get("model_type") == "gpt2"
        and str(hf.get("activation_function", "gelu_new")) in activations
        and hf.get("layer_norm_epsilon", 1e-5) == 1e-5
        and all(type(hf.get(size, 1)) is int for size in sizes)
        and hf.get("n_inner") in (None, 4 * hf.get("n_embd", 0))
        and hf.get("scale_attn_weights", True)
        and not hf.get("scale_attn_by_inverse_layer_idx", False)
        and hf.get("tie_word_embeddings", True)
    )
    if not fits:
        raise ValueError(f"{folder}/config.json does not describe GPT-2's architecture, the only one that is read here")
    if missing := [size for size in sizes if size not in hf]:
        raise ValueError(f"{folder}/config.json lacks {', '.join(map(repr, missing))}")
    act = activations[str(hf.get("activation_function", "gelu_new"))]
    own = {"block_size" if size == "n_positions" else size: hf[size] for size in sizes}
    return own | {"act": act, "bias": hf.get("weigpt_bias") is not False}


def _tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """The folder's tensors, without the prefix that some files have: safetensors where there are any, else PyTorch's
    own files, mapped instead of read where they can be, and never unpickled code."""
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"{folder} has no model.safetensors and no pytorch_model.bin")
    theirs = {}
    for file in files:
        try:
            if file.suffix == ".bin":
                tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
            else:
                from safetensors.torch import load_file

                tensors = load_file(file)
            tensors = {k: v for k, v in tensors.items() if isinstance(v, torch.Tensor)}
            if any(v.layout != torch.strided or v.is_quantized or v.is_meta for v in tensors.values()):
                raise ValueError("it holds tensors without plain numbers")
            theirs |= {k.removeprefix("transformer."): v for k, v in tensors.items()}
        except ImportError:
            raise ValueError(f"{file} needs a package: pip install safetensors") from None
        except Exception as error:  # the libraries raise many kinds, one of them private, for a damaged file
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if isinstance(error, pickle.UnpicklingError):  # torch's own words advise to switch the guard off
                reason = "it holds more than tensors and plain values, or is damaged; no code in it is run"
            raise ValueError(f"{file} cannot be read: {reason}") from None
    return theirs


def _weights_from_hf(
    theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor], folder: Path
) -> dict[str, torch.Tensor]:
    """Their tensors under our names, each of our shape."""
    weights = {}
    for name, own in ours.items():
        key = "wte.weight" if name == "lm_head.weight" else name.removeprefix("transformer.")
        if key not in theirs:
            raise ValueError(f"{folder} lacks the tensor {key}")
        value = theirs[key].t() if key.endswith(CONV1D) else theirs[key]
        if value.shape != own.shape:
            raise ValueError(f"{folder}: {key} is {list(value.shape)}, expected {list(own.shape)} by config.json")
        weights[name] = value
    return weights
