"""GPT-2, whole, in the order in which data meets it.

Notable choices:
- The defaults are nanoGPT's model: pre-norm, learned positions, exact GELU, tied input and output embeddings.
- Attention is F.scaled_dot_product_attention, which picks flash attention where the device has it.
- Every parameter's initial values depend on (seed, its name) alone, so that neither the order in which modules are
  built nor the number of processes changes them.
- OpenAI's weights are read from safetensors in the Hugging Face layout, by name or from a folder.

References: Radford et al. 2019 (GPT-2), https://github.com/openai/gpt-2, and the Hugging Face layout of its weights.
"""

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

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

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [batch, time, n_embd] -> the same
        b, t, c = x.shape
        q, k, v = self.c_attn(x).view(b, t, 3, self.n_head, c // self.n_head).permute(2, 0, 3, 1, 4)
        # each [batch, n_head, time, head_dim]
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [batch, time, n_embd] -> the same
        x = x + self.attn(self.ln_1(x))
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
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, n_vocab=None, stop=None, generator=None):
        """`idx` [batch, time], continued by up to max_new_tokens sampled ids: [batch, time + new].

        temperature 0 takes the likeliest id; top_k keeps the k likeliest. Ids from `n_vocab` on are never drawn (a
        model's vocabulary may be padded beyond its tokenizer's). Ends early once every row has drawn `stop`.
        """
        finished = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size :])[0][:, -1, :n_vocab].float()  # [batch, n_vocab]
            if temperature == 0:
                drawn = logits.argmax(-1, keepdim=True)
            else:
                logits = (logits - logits.amax(-1, keepdim=True)) / temperature
                if top_k:
                    least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < least, -torch.inf)
                drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            idx = torch.cat((idx, drawn), dim=1)
            finished |= drawn[:, 0] == (-1 if stop is None else stop)
            if stop is not None and finished.all():
                break
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
        folder in the Hugging Face layout (config.json and model.safetensors). Only dropout can be overridden.

        ValueError, in a sentence, where the files cannot be had or hold another architecture.
        """
        folder = Path(model_type)
        if not folder.is_dir():
            folder = _download(model_type)
        try:
            hf = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} has no readable config.json, so it is no Hugging Face model: {error}") from None
        config = GPTConfig(**(_config_from_hf(hf, folder) | {"dropout": 0.0} | (override_args or {})))
        model = cls(config)
        model.load_state_dict(_weights_from_hf(folder, model.state_dict()))
        return model


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
    act = activations.get(hf.get("activation_function", "gelu_new"))
    fits = (
        hf.get("model_type") == "gpt2"
        and act
        and hf.get("layer_norm_epsilon", 1e-5) == 1e-5
        and hf.get("n_inner") in (None, 4 * hf.get("n_embd", 0))
        and hf.get("scale_attn_weights", True)
        and not hf.get("scale_attn_by_inverse_layer_idx", False)
        and hf.get("tie_word_embeddings", True)
    )
    if not fits:
        raise ValueError(f"{folder}/config.json does not describe GPT-2's architecture, the only one that is read here")
    sizes = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "vocab_size": "vocab_size"}
    try:
        return {ours: hf[theirs] for ours, theirs in (sizes | {"block_size": "n_positions"}).items()} | {"act": act}
    except KeyError as missing:
        raise ValueError(f"{folder}/config.json lacks {missing}") from None


def _weights_from_hf(folder: Path, ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The folder's tensors under our names; its matrices are stored as [in, out], a Linear's as [out, in]."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError("GPT-2's weights need a package: pip install safetensors") from None
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no model.safetensors")
    theirs = {}
    for file in files:
        try:
            theirs |= {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
        except Exception as error:  # the library's own error type is private
            raise ValueError(f"{file} cannot be read: {error}") from None
    weights = {}
    for name, own in ours.items():
        key = "wte.weight" if name == "lm_head.weight" else name.removeprefix("transformer.")
        if key not in theirs:
            raise ValueError(f"{folder} lacks the tensor {key}")
        value = theirs[key]
        is_conv1d = key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        value = value.t() if is_conv1d else value
        if value.shape != own.shape:
            raise ValueError(f"{folder}: {key} is {list(value.shape)}, expected {list(own.shape)} by config.json")
        weights[name] = value
    return weights
