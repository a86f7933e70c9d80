"""GPT-2, whole, in the order in which data meets it.

Notable choices:
- The defaults are nanoGPT's model: pre-norm, learned positions, exact GELU, tied input and output embeddings.
- Attention is F.scaled_dot_product_attention, which picks flash attention where the device has it.
- Every parameter's initial values depend on (seed, its name) alone, so that neither the order in which modules are
  built nor the number of processes changes them.
- Newer architectures are fields of GPTConfig that default to off, each one line where it acts.
- Weights come and go in the Hugging Face layout: OpenAI's by name, anyone's from a folder.

References: Radford et al. 2019 (GPT-2), https://github.com/openai/gpt-2, and the Hugging Face layout of its weights.
"""

import hashlib
import json
import math
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from ops import attention, cross_entropy, dropout, on_cpu, relu2, rms_norm, smear

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
    "MI250X": 191.5e12,  # of each of its two halves, which are a device each
}

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": relu2,
}


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s; None where it is unknown (a CPU, or a card not in PEAK_FLOPS)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = [k for k in PEAK_FLOPS if re.search(rf"\b{k}\b", name)]  # "A100", but not inside "RTX A1000"
    return PEAK_FLOPS[max(known, key=len)] if known else None


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
    act: str = "gelu"  # or 'gelu_tanh', the form that OpenAI's weights were trained with; or 'relu2', ReLU squared
    pos: str = "learned"  # or 'rope': no position embeddings, but queries and keys turned (Su et al. 2021)
    norm: str = "layernorm"  # or 'rmsnorm', without a mean and without gains (Zhang and Sennrich 2019)
    qk_norm: bool = False  # queries and keys of length sqrt(head_dim) each (Henry et al. 2020, as an RMSNorm)
    tied: bool = True  # lm_head is wte
    zero_init: bool = False  # c_proj, and lm_head where it is not tied, begin at zero
    attn_pattern: str = "dense"  # the layers' attention in turn, such as 'dense,banded': every second one is banded
    attn_window: int = 256  # tokens that a token of a banded layer sees, itself among them (Child et al. 2019)
    smear: int = 0  # mix so many tokens before each into what a block and its MLP read, by learned weights: see Smear

    def __post_init__(self):
        for key in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} = {getattr(self, key)}: it must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} is not divisible by n_head = {self.n_head}: the heads share it")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout}: it must be at least 0 and below 1")
        for key, known in (("act", ACTIVATIONS), ("pos", ("learned", "rope")), ("norm", ("layernorm", "rmsnorm"))):
            if getattr(self, key) not in known:
                raise ValueError(f"{key} = {getattr(self, key)!r}: there are {', '.join(known)}")
        if self.pos == "rope" and self.n_embd // self.n_head % 2:
            raise ValueError(
                f"pos = 'rope' needs heads of even size, not n_embd / n_head = {self.n_embd // self.n_head}"
            )
        if not set(str(self.attn_pattern).split(",")) <= {"dense", "banded"}:
            raise ValueError(f"attn_pattern = {self.attn_pattern!r}: expected dense and banded between commas")
        if type(self.attn_window) is not int or self.attn_window < 1:
            raise ValueError(f"attn_window = {self.attn_window}: it must be whole and at least 1, a token itself")
        if not 0 <= self.smear < self.block_size:
            raise ValueError(f"smear = {self.smear}: it must be at least 0 and below block_size = {self.block_size}")

    def window(self, layer: int) -> int:
        """How many tokens a token of this layer sees, where it is banded; 0 for all before it."""
        kinds = self.attn_pattern.split(",")
        return self.attn_window if kinds[layer % len(kinds)] == "banded" else 0

    def model_args(self) -> dict:
        """nanoGPT's `model_args`, with the newer fields only where they differ from their default."""
        args = asdict(self)
        nanogpt = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
        newer = {f.name: args[f.name] for f in fields(self) if f.name not in nanogpt and args[f.name] != f.default}
        if "banded" not in self.attn_pattern:
            newer = {key: value for key, value in newer.items() if key not in ("attn_pattern", "attn_window")}
        return {key: args[key] for key in nanogpt} | newer


class RMSNorm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x)


def norm(config: GPTConfig) -> nn.Module:
    """The normalisation over n_embd that the config asks for."""
    if config.norm == "rmsnorm":
        return RMSNorm()
    return nn.LayerNorm(config.n_embd, bias=config.bias)


def rotations(time: int, head_dim: int) -> torch.Tensor:
    """RoPE's angles as unit complex numbers, float32 [time, head_dim / 2, 2]: the n-th pair of channels turns by
    10000^(-2n / head_dim) a position."""
    angles = torch.outer(torch.arange(time), 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim))
    return torch.stack((angles.cos(), angles.sin()), -1)


def rotated(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Queries or keys [batch, time, n_head, head_dim], their neighbouring channels taken as complex numbers and turned
    by `rotation` [time, head_dim / 2, 2], or [batch, time, ...] where rows are at positions of their own."""
    pairs, turn = x.float().unflatten(-1, (-1, 2)), rotation.unsqueeze(-3)
    if on_cpu(x):  # a third of the time of the form below
        y = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turn))
    else:
        (a, b), (cos, sin) = pairs.unbind(-1), turn.unbind(-1)
        y = torch.stack((a * cos - b * sin, a * sin + b * cos), -1)
    return y.flatten(-2).to(x.dtype)


class Smear(nn.Module):
    """x[t] + weight[0] * x[t-1] + weight[1] * x[t-2] + ...: a causal convolution of each channel with itself.

    What a token's neighbours are need not be found out by attention then, which a small model is slow to learn. Of the
    kind of Primer's depthwise convolutions (So et al. 2021) and Canon layers (Allen-Zhu 2025).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.smear, config.n_embd))

    def forward(self, x: torch.Tensor, before: Callable | None = None) -> torch.Tensor:
        """x [batch, time, n_embd] -> the same; `before(n)` gives what stood n places before x, from a cache."""
        if before is None:
            return smear(x, self.weight)
        for n, weight in enumerate(self.weight, 1):
            x = torch.addcmul(x, before(n), weight)
        return x


class Packed:
    """Examples one after the other in a row, as a block sees them: a token looks back as far as its own example goes.
    In the place of a cache."""

    def __init__(self, positions: torch.Tensor):
        """`positions` [batch, time]: how many tokens of its example stand before each."""
        place = torch.arange(positions.size(1), device=positions.device)
        first = place - positions  # the place of its example's first token
        self.positions = positions
        self.mask = ((first[:, :, None] <= place) & (place <= place[:, None]))[:, None]  # [batch, 1, time, time]
        self.distance = place[:, None] - place  # from a token back to another, [time, time]

    def remember(
        self, k: torch.Tensor, v: torch.Tensor, window: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return k, v, self.mask & (self.distance < window) if window else self.mask

    def before(self, x: torch.Tensor, half: int) -> Callable[[int], torch.Tensor]:
        """Gives a function of n that gives what stood n places before x [batch, time, n_embd] in the same example, and
        nothing, 0, where that is before its beginning."""
        return lambda n: F.pad(x, (0, 0, n, 0))[:, : x.size(1)] * (self.positions >= n)[:, :, None]


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, window: int = 0):
        """`window`: how many tokens a token sees, itself among them; 0 for all before it."""
        super().__init__()
        self.n_head, self.dropout, self.qk_norm, self.window = config.n_head, config.dropout, config.qk_norm, window
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key, value side by side
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(
        self, x: torch.Tensor, rotation: torch.Tensor | None = None, cache: Any = None
    ) -> torch.Tensor:  # [batch, time, n_embd] -> the same
        """`rotation` is RoPE's, of these positions; `cache` is this layer's, see decoder.py, or Packed."""
        b, t, c = x.shape
        q, k, v = self.c_attn(x).view(b, t, 3, self.n_head, c // self.n_head).unbind(2)
        if self.qk_norm:
            q, k = rms_norm(q), rms_norm(k)
        if rotation is not None:
            q, k = rotated(q, rotation), rotated(k, rotation)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # each [batch, n_head, time, head_dim]
        mask = None
        if cache is not None:
            k, v, mask = cache.remember(k, v, self.window)  # now all that the new tokens may look at
        p, is_causal = self.dropout if self.training else 0.0, k.size(2) == t and mask is None
        y = attention(q, k, v, mask, p, is_causal, self.window)
        y = self.c_proj(y.transpose(1, 2).reshape(b, t, c))
        return dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout, self.act = config.dropout, ACTIVATIONS[config.act]
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [batch, time, n_embd] -> the same
        y = self.c_proj(self.act(self.c_fc(x)))
        return dropout(y, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.smear_1 = Smear(config) if config.smear else None
        self.ln_1 = norm(config)
        self.attn = CausalSelfAttention(config, config.window(layer))
        self.ln_2 = norm(config)
        self.smear_2 = Smear(config) if config.smear else None
        self.mlp = MLP(config)

    def forward(
        self, x: torch.Tensor, rotation: torch.Tensor | None = None, cache: Any = None
    ) -> torch.Tensor:  # [batch, time, n_embd] -> the same
        if self.smear_1 is not None:
            x = self.smear_1(x, cache and cache.before(x, 0))
        x = x + self.attn(self.ln_1(x), rotation, cache)
        y = self.ln_2(x)
        if self.smear_2 is not None:
            y = self.smear_2(y, cache and cache.before(y, 1))
        return x + self.mlp(y)


class GPT(nn.Module):
    """A GPT language model. Its initial weights depend on torch.initial_seed() and each parameter's name."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd) if config.pos == "learned" else nn.Identity(),
                h=nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
                ln_f=norm(config),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.transformer.wte.weight = self.lm_head.weight
        rotation = rotations(config.block_size, config.n_embd // config.n_head) if config.pos == "rope" else None
        self.register_buffer("rotation", rotation, persistent=False)
        self.init_weights(torch.initial_seed())

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """GPT-2's initialisation, see `initial`. Parameters on the meta device, which has shapes and no values, stay as
        they are."""
        for name, p in self.named_parameters():  # a tied lm_head goes by its other name, wte
            if not p.is_meta:
                p.copy_(self.initial(name, p.shape, seed))

    def initial(self, name: str, shape: torch.Size, seed: int) -> torch.Tensor:
        """A parameter's initial values, on the CPU: a function of the seed and its name.

        | parameter                        | values                            | with zero_init |
        | matrices, embeddings             | normal, 0.02                      | the same       |
        | c_proj, which ends on a residual | normal, 0.02 / sqrt(2 * n_layer)  | 0              |
        | lm_head, where it is not tied    | normal, 0.02                      | 0              |
        | wte, where it is not tied        | normal, 0.02                      | normal, 0.5    |
        | LayerNorm gains                  | 1                                 | 1              |
        | biases, smear                    | 0                                 | 0              |
        """
        zero = ("smear_1.weight", "smear_2.weight", "bias")
        zero += ("c_proj.weight", "lm_head.weight") if self.config.zero_init else ()
        if len(shape) < 2 or name.endswith(zero):
            return torch.full(shape, 0.0 if name.endswith(zero) else 1.0, device="cpu")
        std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 0.02
        if name == "transformer.wte.weight" and self.config.zero_init and not self.config.tied:
            std = 0.5  # all that the residual stream holds at first
        generator = torch.Generator("cpu").manual_seed(derive_seed(seed, name))
        return torch.empty(shape, device="cpu").normal_(0.0, std, generator=generator)

    def hidden(self, idx: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """What lm_head reads, [batch, time, n_embd], for ids `idx` [batch, time], with `positions` as in forward().
        ValueError where time exceeds block_size."""
        t = idx.size(1)
        if t > self.config.block_size:
            raise ValueError(f"{t} tokens do not fit into a context of block_size = {self.config.block_size}")
        where, packed = (slice(t), None) if positions is None else (positions, Packed(positions))
        x, rotation = embedded(self.transformer.wte(idx), self.transformer.wpe, self.rotation, where)
        x = dropout(x, self.config.dropout, self.training)
        for block in self.transformer.h:
            x = block(x, rotation, packed)
        return self.transformer.ln_f(x)

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        loss_only: bool = False,
        positions: torch.Tensor | None = None,
    ):
        """(logits, loss) for ids `idx` [batch, time] and, one position ahead, `targets` of the same shape.

        With targets: logits [batch, time, vocab_size] and the mean cross-entropy in nats; targets of -1 do not count.
        With `loss_only`, for training: None and the loss, the logits in pieces where they are many. Without targets:
        the last position's logits [batch, 1, vocab_size] and None. `positions` [batch, time], where a row holds several
        examples that do not see each other: how many tokens of its own example stand before each. ValueError where
        time exceeds block_size.
        """
        x = self.hidden(idx, positions)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        if loss_only:
            return None, cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten())
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(
        self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None
    ) -> torch.Tensor:
        """`idx` [batch, time], continued by max_new_tokens sampled ids: [batch, time + new].

        temperature 0 takes the likeliest id; top_k keeps the k likeliest. Up to block_size tokens in all, the same
        torch.manual_seed draws what nanoGPT draws; beyond, see decoder.py. Prompts, text and more ways to choose are in
        generate.py.
        """
        from decoder import Decoder  # which imports this file

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
        positions = self.transformer.wpe.weight.numel() if self.rotation is None else 0
        return n - positions if non_embedding else n

    def estimate_flops(self) -> int:
        """FLOPs of training on one token of a full context: 6N + 12 n_layer n_embd block_size (PaLM, appendix B); of a
        banded layer its window, in place of block_size."""
        c = self.config
        seen = sum(min(c.window(layer) or c.block_size, c.block_size) for layer in range(c.n_layer))
        return 6 * self.get_num_params() + 12 * c.n_embd * seen

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float) -> float | None:
        """Model FLOPs utilisation, a fraction of the device's bf16 peak, for this many sequences of block_size in dt
        seconds; None where the device's peak is unknown (a CPU, or a card that is not in PEAK_FLOPS)."""
        peak = peak_flops(self.lm_head.weight.device)
        return peak and self.estimate_flops() * self.config.block_size * fwdbwd_per_iter / dt / peak

    def hidden_matrices(self) -> list[tuple[nn.Parameter, int]]:
        """The blocks' matrices, each with how many lie in it one below the other: query, key and value in c_attn."""
        linears = [(name, m) for name, m in self.transformer.h.named_modules() if isinstance(m, nn.Linear)]
        return [(m.weight, 3 if name.endswith("c_attn") else 1) for name, m in linears if m.weight.requires_grad]

    def configure_optimizers(
        self, weight_decay, learning_rate, betas, device_type, eps=1e-8, leave_out=frozenset()
    ) -> torch.optim.AdamW:
        """AdamW, decaying matrices and embeddings only; in nanoGPT's parameter order; fused where torch has it; for all
        parameters but those that another optimizer takes, `leave_out`."""
        params = [p for p in self.parameters() if p.requires_grad and p not in leave_out]
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
        self.config = replace(self.config, block_size=block_size)  # which checks it against the rest
        if self.rotation is None:
            self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].detach().clone())
        else:
            self.rotation = self.rotation[:block_size].clone()

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
        known = sizes.keys() | {"block_size", "bias", "dropout"} | ({"act"} if c.act in HF_ACTIVATIONS else set())
        if newer := c.model_args().keys() - known:
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


def embedded(x: torch.Tensor, wpe: nn.Module, rotation: torch.Tensor | None, where: slice | torch.Tensor):
    """What the first block reads, for token embeddings x [batch, time, n_embd] at the positions `where`: them, and with
    pos='learned' their positions'; and with pos='rope' the rotation for every block."""
    return (x + wpe.weight[where], None) if rotation is None else (x, rotation[where])


HF_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new"}
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored as [in, out], a Linear's as [out, in]


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
