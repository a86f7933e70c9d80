"""Fine-tuning a few parameters of a trained model: LoRA, bottleneck adapters, freezing.

    LoRA       W x + (alpha / rank) B A x in place of W x: two thin matrices are trained, W is not (Hu et al. 2021)
    adapters   y + up(gelu(down(y))) for what attention and the MLP give, y: a small network each (Houlsby et al. 2019)
    freezing   some of the model's own parameters are trained, the others stay as they are

Notable choices:
- All of it is placed on a GPT from outside, Linears in place of its Linears; model.py knows nothing of it.
- What is added begins as nothing at all: `lora_b` and `up` are zero, so the first step starts from the base's loss.
- The base's weights keep their names and are shared, not copied. Saved is what was added, with the base's hash.
- Where the vocabulary has grown, the rows of its new tokens are trained beside LoRA or adapters, and no other row.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT, derive_seed
from ops import dropout

TARGETS = ("c_attn", "c_proj", "c_fc")
FREEZES = ("all_but_head", "all_but_last_N", "every_other", "all_but_attention")
ADDED = ("lora_a", "lora_b", "down", "down_bias", "up", "up_bias")  # names of parameters that no GPT has of its own


@dataclass(frozen=True)
class Adaptation:
    """What is trained of a model, by train.py's keys of these names: all of it by default. ValueError where they make
    no sense."""

    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    lora_targets: str = "c_attn"
    adapter_dim: int = 0
    freeze: str = ""

    def __post_init__(self):
        for key in ("lora_rank", "adapter_dim"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}={getattr(self, key)}: expected 0 or more")
        if self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha={self.lora_alpha}: expected more than 0")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout}: expected at least 0 and below 1")
        if not self.targets or not set(self.targets) <= set(TARGETS):
            raise ValueError(f"lora_targets={self.lora_targets}: expected some of {','.join(TARGETS)}, with commas")
        if self.freeze and self.freeze not in FREEZES and not self.last_blocks:
            raise ValueError(f"freeze={self.freeze}: expected {', '.join(FREEZES)} (such as all_but_last_4)")
        if self.freeze == "all_but_last_N":
            raise ValueError("freeze=all_but_last_N: expected a number for N, such as all_but_last_4")
        asked = [f"{key}={value}" for key in ("lora_rank", "adapter_dim", "freeze") if (value := getattr(self, key))]
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)} do not go together: choose one of LoRA, adapters and freezing")

    def __bool__(self) -> bool:
        return bool(self.adds or self.freeze)

    @property
    def adds(self) -> bool:
        """Whether parameters are added, LoRA's or adapters', and the model's own stay as they are."""
        return bool(self.lora_rank or self.adapter_dim)

    @property
    def targets(self) -> list[str]:
        return [name.strip() for name in self.lora_targets.split(",") if name.strip()]

    @property
    def last_blocks(self) -> int:
        """The N of all_but_last_N; 0 where freeze is something else."""
        found = re.fullmatch(r"all_but_last_(\d+)", self.freeze)
        return int(found[1]) if found else 0


def drawn(seed: int, name: str, rows: int, columns: int) -> nn.Parameter:
    """[rows, columns], uniform up to 1 / sqrt(columns), as in LoRA's own code."""
    generator = torch.Generator("cpu").manual_seed(derive_seed(seed, name))
    return nn.Parameter((torch.rand(rows, columns, generator=generator) * 2 - 1) * columns**-0.5)


class _OnLinear(nn.Linear):
    """A Linear in the place of another, whose weight and bias it shares."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias


class LoRALinear(_OnLinear):
    """x W' + bias + (alpha / rank) dropout(x) A' B': `lora_a` is [rank, in], `lora_b` [out, rank]."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, p: float, seed: int, name: str):
        super().__init__(linear)
        self.scale, self.p = alpha / rank, p
        self.lora_a = drawn(seed, f"{name}.lora_a", rank, linear.in_features)
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., in] -> [..., out]
        thin = F.linear(dropout(x, self.p, self.training), self.lora_a)  # [..., rank]
        return super().forward(x) + F.linear(thin, self.lora_b) * self.scale

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain Linear that gives the same: W + (alpha / rank) B A, added in float64."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        product = self.lora_b.double() @ self.lora_a.double() * self.scale
        linear.weight, linear.bias = nn.Parameter((self.weight + product).to(self.weight.dtype)), self.bias
        return linear


class AdapterLinear(_OnLinear):
    """y + gelu(y D' + d) U' + u for the Linear's y: `down` is D [dim, out], `up` U [out, dim]."""

    def __init__(self, linear: nn.Linear, dim: int, seed: int, name: str):
        super().__init__(linear)
        self.down = drawn(seed, f"{name}.down", dim, linear.out_features)
        self.down_bias = nn.Parameter(torch.zeros(dim))
        self.up = nn.Parameter(torch.zeros(linear.out_features, dim))
        self.up_bias = nn.Parameter(torch.zeros(linear.out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., in] -> [..., out]
        y = super().forward(x)
        return y + F.linear(F.gelu(F.linear(y, self.down, self.down_bias)), self.up, self.up_bias)


class _Grown(nn.Module):
    """An embedding or a head whose first rows, `old`, stay as they are; those of new tokens, `new`, are trained."""

    def __init__(self, old: nn.Parameter, new: nn.Parameter):
        super().__init__()
        self.old, self.new = old, new

    @property
    def weight(self) -> torch.Tensor:  # [vocab_size, n_embd]
        return torch.cat((self.old, self.new))


class GrownEmbedding(_Grown):
    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return F.embedding(idx, self.weight)


class GrownHead(_Grown):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


def attach(model: GPT, adaptation: Adaptation, seed: int, known: int | None = None) -> None:
    """Places LoRA or adapters on the blocks' Linears, in place; what they are depends on (seed, name) alone at first.

    `known`: how many tokens the base knows, where the vocabulary has grown since; None where it has not.
    """
    targets = adaptation.targets if adaptation.lora_rank else ("c_proj",)
    for path, parent in list(model.transformer.h.named_modules()):
        for leaf in [name for name, child in parent.named_children() if type(child) is nn.Linear and name in targets]:
            name, linear = f"transformer.h.{path}.{leaf}", getattr(parent, leaf)
            if adaptation.lora_rank:
                own = (adaptation.lora_rank, adaptation.lora_alpha, adaptation.lora_dropout)
                setattr(parent, leaf, LoRALinear(linear, *own, seed, name))
            else:
                setattr(parent, leaf, AdapterLinear(linear, adaptation.adapter_dim, seed, name))
    if known is None:
        return
    parts = {
        weight: [nn.Parameter(weight[rows].detach().clone()) for rows in (slice(known), slice(known, None))]
        for weight in (model.transformer.wte.weight, model.lm_head.weight)
    }  # one pair where they are tied
    model.transformer.wte, model.lm_head = (
        GrownEmbedding(*parts[model.transformer.wte.weight]),
        GrownHead(*parts[model.lm_head.weight]),
    )


def train_only(model: GPT, adaptation: Adaptation) -> None:
    """Sets requires_grad to what the adaptation trains, and to nothing else.

    | freeze            | trained                                                                             |
    | all_but_head      | ln_f, lm_head; where it is tied, that is the token embedding too                    |
    | all_but_last_4    | the last 4 blocks, ln_f, lm_head where it is not tied; with any number for 4        |
    | every_other       | the last block, the last but two, ..., ln_f, lm_head where it is not tied           |
    | all_but_attention | the blocks' attention: c_attn and c_proj                                            |

    ValueError where the model has fewer blocks than are to be trained.
    """
    net, n = model.transformer, adaptation.last_blocks
    if n > len(net.h):
        raise ValueError(f"freeze={adaptation.freeze}: the model has {len(net.h)} blocks")
    top = [net.ln_f] if model.config.tied else [net.ln_f, model.lm_head]
    if adaptation.adds:
        trained = [p for name, p in model.named_parameters() if name.rpartition(".")[2] in (*ADDED, "new")]
    elif adaptation.freeze == "all_but_head":
        trained = [net.ln_f, model.lm_head]
    elif n:
        trained = [*net.h[-n:], *top]
    elif adaptation.freeze == "every_other":
        trained = [*net.h[::-2], *top]
    elif adaptation.freeze == "all_but_attention":
        trained = [block.attn for block in net.h]
    else:
        trained = [model]
    model.requires_grad_(False)
    for each in trained:
        each.requires_grad_(True)


def is_adapted(model: GPT) -> bool:
    """Whether LoRA or adapters are on the model, and not merged into it."""
    return any(isinstance(module, _OnLinear) for module in model.transformer.h.modules())


def merge(model: GPT) -> None:
    """Makes plain Linears and embeddings of all but adapters, in place: with LoRA, the GPT that gives the same. All of
    it can be trained again."""
    for parent in list(model.transformer.h.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                setattr(parent, name, child.merged())
    wte, head = model.transformer.wte, model.lm_head
    if isinstance(wte, _Grown):
        shape = model.config.vocab_size, model.config.n_embd
        model.transformer.wte = nn.Embedding(*shape, _weight=nn.Parameter(wte.weight.detach()))
        model.lm_head = nn.Linear(*reversed(shape), bias=False, device="meta")
        model.lm_head.weight = nn.Parameter(head.weight.detach())
        if model.config.tied:
            model.lm_head.weight = model.transformer.wte.weight
    model.requires_grad_(True)


def saved_weights(model: GPT) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a model: all of it, or of one with LoRA or adapters what was added, by name."""
    if not is_adapted(model):
        return dict(model.state_dict())
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def restore(model: GPT, adaptation: Adaptation, weights: Mapping[str, torch.Tensor], args: Mapping[str, Any]) -> None:
    """Makes of a base the model whose saved_weights these are and whose config is `args`, in place. ValueError or
    RuntimeError where they do not fit it."""
    if args["block_size"] < model.config.block_size:
        model.crop_block_size(args["block_size"])
    new = weights.get("transformer.wte.new")
    if new is None and args["vocab_size"] != model.config.vocab_size:
        raise ValueError(f"the base has {model.config.vocab_size} tokens, not {args['vocab_size']}")
    grow_vocabulary(model, args["vocab_size"], 0)
    if model.config.model_args() != {**args, "dropout": model.config.dropout}:
        raise ValueError(f"the base's model_args are {model.config.model_args()}, not {dict(args)}")
    attach(model, adaptation, 0, None if new is None else args["vocab_size"] - len(new))
    train_only(model, adaptation)
    own = {name for name, p in model.named_parameters() if p.requires_grad}
    if own != weights.keys():
        raise ValueError(f"it lacks or has besides: {', '.join(sorted(own ^ weights.keys())[:3])}")
    model.load_state_dict(weights, strict=False)


def weights_hash(model: GPT) -> str:
    """The sha256 of a model's parameters, tied ones once: names, shapes, types and bytes."""
    found = hashlib.sha256()
    for name, p in model.named_parameters():
        found.update(f"{name} {list(p.shape)} {p.dtype}\n".encode())
        found.update(p.detach().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def memory(model: GPT, optim: str, whole: bool = False) -> dict[str, int]:
    """Bytes of the weights, of the gradients and of the optimizer's state: for a trained parameter AdamW keeps two
    numbers of its size, Muon one. With `whole`, as if all of the model were trained, and nothing had been added."""
    muons = {m.weight for m in model.transformer.h.modules() if isinstance(m, nn.Linear)} if optim == "muon" else set()
    params = [(p, name.rpartition(".")[2] in ADDED) for name, p in model.named_parameters()]
    trained = [p for p, added in params if (not added if whole else p.requires_grad)]
    return {
        "weights": sum(_here(p) for p, added in params if not (added and whole)),
        "gradients": sum(_here(p) for p in trained),
        "optimizer": sum(_here(p) * (1 if p in muons else 2) for p in trained),
    }


def _here(p: torch.Tensor) -> int:
    """A parameter's bytes in this process; of one that is shared out, those of its rows."""
    return (p.to_local() if hasattr(p, "full_tensor") else p).nbytes


def summary(model: GPT, optim: str) -> str:
    """Two lines: how many parameters are trained, and the memory that this takes and would take for all of them."""
    own, full = memory(model, optim), memory(model, optim, whole=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())

    def told(sizes: dict[str, int], *keys: str) -> str:
        return ", ".join(f"{key} {sizes[key] / 1e6:,.2f} MB" for key in keys)

    return (
        f"trained parameters: {trained:,} of {total:,} ({trained / total:.2%})\n"
        f"memory: {told(own, 'weights', 'gradients', 'optimizer')}; "
        f"training all of it: {told(full, 'gradients', 'optimizer')}"
    )


@torch.no_grad()
def grow_vocabulary(model: GPT, vocab_size: int, seed: int) -> None:
    """Appends rows to the token embedding and to the head, in place, up to `vocab_size`; tied ones stay one Parameter.

    A new row is drawn around the mean of the old ones with their standard deviation, channel by channel: rows of a
    trained model are far from zero and from where 0.02 of noise would put a new one, which would then be the likeliest
    or the unlikeliest token everywhere. A head that begins at zero goes on with zeros. ValueError where the model has
    more tokens than that already.
    """
    old = model.config.vocab_size
    if vocab_size < old:
        raise ValueError(f"a vocabulary of {old:,} tokens cannot grow to {vocab_size:,}")
    if vocab_size == old:
        return
    for name, module in (("transformer.wte.weight", model.transformer.wte), ("lm_head.weight", model.lm_head)):
        weight = module.weight  # [vocab_size, n_embd]
        if len(weight) == vocab_size:  # tied: it has been done
            continue
        generator = torch.Generator("cpu").manual_seed(derive_seed(seed, name, old))
        noise = torch.randn(vocab_size - old, weight.size(1), generator=generator).to(weight)
        rows = weight.mean(0) + weight.std(0, correction=0) * noise
        grown = nn.Parameter(torch.cat((weight, rows)), requires_grad=weight.requires_grad)
        for each in (model.transformer.wte, model.lm_head):
            if each.weight is weight:
                each.weight = grown
    model.transformer.wte.num_embeddings = model.lm_head.out_features = vocab_size
    model.config = replace(model.config, vocab_size=vocab_size)
