"""What a run would take, before a GPU is rented: compute, time, memory, checkpoints. Nothing is run, no GPU is needed.

    $ python extras/plan.py --model_size=gpt3-6.7b --tokens=300e9 --gpu=a100-80g --gpus=64 --parallel=fsdp --mfu=0.45
    $ python extras/plan.py --gpu_hours=1000 --gpu=h100 --mfu=0.4          # the other way round: what they are good for
    $ python extras/plan.py --model_size=gpt2 --json

GiB are 2^30 bytes, as in nvidia-smi and `ls -h`; so are the keys of --json that end in _gb. Time is that of training
alone, without evaluations, failures and the wait for a machine.

Notable choices:
- FLOPs are 6N + 12 n_layer n_embd block_size a token, N without position embeddings (Chowdhery et al. 2022, PaLM,
  appendix B), as in bench.py and nanoGPT, of whose MFU `mfu` is one: measure it, or take a measured one of a like run.
- Memory is that of plain PyTorch under autocast, formula by formula in extras/memory.py; a compiled run takes less.
- 8 % of a GPU's memory are left alone: for CUDA's context, NCCL's and cuBLAS' buffers, 1 to 3 GiB together, and for
  holes between what is allocated.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import Config, UserError, configure, run, user_errors

# the run
model_size = "gpt2"  # the model: gpt2 to gpt2-xl, gpt3-125m to gpt3-175b; its shape can be changed after it
n_layer = 12  # blocks
n_head = 12  # attention heads in a block
n_embd = 768  # width, divisible by n_head
block_size = 1024  # tokens in a sequence
bias = True  # biases in Linears and LayerNorms
vocab_size = 50257  # tokens known, GPT-2's; train.py pads them to 50304
optim = "adamw"  # 'adamw', or 'muon'
tokens = 0.0  # tokens to train on, such as 300e9; 0 for 20 a parameter (Hoffmann et al. 2022, Chinchilla)
batch_tokens = 524288  # tokens in an iteration; model_size sets the paper's
# the machine
gpu = "a100-80g"  # the kind of GPU; a wrong name lists them
gpus = 8  # how many
parallel = "ddp"  # 'ddp': each GPU has the whole model; 'fsdp': weights, gradients and moments are shared out
mfu = 0.4  # share of the peak that training reaches, by `python bench.py train` on such a GPU; 0.3 to 0.6 is usual
micro_batch = 0  # sequences on a GPU at a time; 0 for the most that fit and share the batch out evenly
activation_checkpointing = False  # keep blocks' inputs only and compute the rest again: a third more compute, lower mfu
peak_tflops = 0.0  # dense bf16 TFLOP/s of a GPU; 0 for what is known of `gpu`
memory_gb = 0.0  # its memory in GiB; 0 for what is known of `gpu`
# the other way round
gpu_hours = 0.0  # hours of one GPU, of all GPUs together: which size and how many tokens are best for them
# what is printed
json = False  # one flat JSON object and nothing else
config = configure(globals())

import difflib
import math
import textwrap
from dataclasses import dataclass
from json import dumps

import torch

from extras.memory import GIB, Memory, activation_bytes, checkpoint_bytes, memory_of, most_sequences
from model import GPT, GPTConfig
from model import PEAK_FLOPS as PEAKS
from muon import OPTIMS
from presets import SIZES, apply_size, size_of

CHINCHILLA = 20  # tokens a parameter
RESERVED = 0.08  # of a GPU's memory
MOST_GPUS = 4096  # that are proposed
KINDS = ("ddp", "fsdp")
SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "bias")

# name -> (key of model.PEAK_FLOPS, GiB of memory as nvidia-smi shows it)
GPUS = {
    "a100-40g": ("A100", 40.0),
    "a100-80g": ("A100", 80.0),
    "a800-80g": ("A800", 80.0),
    "h100": ("H100", 79.6),
    "h100-pcie": ("H100 PCIe", 79.6),
    "h100-nvl": ("H100 NVL", 93.6),
    "h800": ("H800", 79.6),
    "h20": ("H20", 95.6),
    "h200": ("H200", 140.4),
    "gh200": ("GH200", 95.6),
    "b200": ("B200", 179.1),
    "v100-16g": ("V100", 16.0),
    "v100-32g": ("V100", 32.0),
    "a10": ("A10", 22.5),
    "a10g": ("A10G", 22.5),
    "a30": ("A30", 24.0),
    "a40": ("A40", 45.0),
    "a6000": ("A6000", 48.0),
    "l4": ("L4", 22.5),
    "l40": ("L40", 45.0),
    "l40s": ("L40S", 45.0),
    "t4": ("T4", 15.0),
    "rtx3080": ("RTX 3080", 10.0),
    "rtx3090": ("RTX 3090", 24.0),
    "rtx4080": ("RTX 4080", 16.0),
    "rtx4090": ("RTX 4090", 24.0),
    "rtx5090": ("RTX 5090", 31.8),
    "mi250x": ("MI250X", 64.0),  # of each of its two halves, which PyTorch sees as a GPU
    "mi300x": ("MI300X", 192.0),
}
OTHER_NAMES = {"h100-80g": "h100", "h100-sxm": "h100", "h800-80g": "h800", "h20-96g": "h20", "h200-141g": "h200"}


def check(c: Config) -> None:
    """UserError for settings that make no sense."""
    for key in ("gpus", "batch_tokens", "vocab_size"):
        if getattr(c, key) < 1:
            raise UserError(f"{key}={getattr(c, key)}: expected at least 1")
    for key in ("tokens", "micro_batch", "gpu_hours", "peak_tflops", "memory_gb"):
        if not 0 <= getattr(c, key) <= 1e18:
            raise UserError(f"{key}={getattr(c, key)}: expected 0 to 1e18")
    if not 0 < c.mfu <= 1:
        raise UserError(f"mfu={c.mfu}: expected a share of the peak, above 0 and at most 1, such as 0.4")
    for key, known in (("parallel", KINDS), ("optim", OPTIMS)):
        if getattr(c, key) not in known:
            raise UserError(f"{key}={getattr(c, key)}: expected {' or '.join(known)}")
    if c.parallel == "fsdp" and c.gpus == 1:
        raise UserError("parallel=fsdp shares a model out among GPUs, and gpus=1: expected --gpus=2 or more, or ddp")
    if "gpu_hours" in c.given and c.gpu_hours < 1e-6:
        raise UserError(f"gpu_hours={c.gpu_hours:g}: expected hours, such as 1000")
    taken = ("gpu_hours", "gpu", "gpus", "mfu", "vocab_size", "peak_tflops", "memory_gb", "json")
    if c.gpu_hours and (others := [key for key in c.given if key not in taken]):
        raise UserError(
            f"gpu_hours={c.gpu_hours:g} asks which size and how many tokens are best, so {others[0]} cannot be given, "
            f"too: leave one of them out"
        )


def machine(c: Config) -> tuple[str, float, float]:
    """(name, peak in FLOP/s, memory in bytes) of one GPU. UserError where it is unknown and not given."""
    name = c.gpu.strip().lower().replace(" ", "-").replace("_", "-").replace("rtx-", "rtx")
    name = name[:-1] if name.endswith("gb") else name
    name = OTHER_NAMES.get(name, name)
    if name not in GPUS and not (c.peak_tflops and c.memory_gb):
        longer = [known for known in GPUS if known.startswith(name)]
        nearest = (longer or difflib.get_close_matches(name, GPUS, n=1, cutoff=0.0))[0]
        raise UserError(
            f"gpu={c.gpu}: did you mean {nearest}? There are {', '.join(GPUS)}; any other goes with --peak_tflops and "
            f"--memory_gb"
        )
    key, memory = GPUS.get(name, ("", 0.0))
    return name, c.peak_tflops * 1e12 or PEAKS[key], (c.memory_gb or memory) * GIB


def model_of(shape: dict) -> GPT:
    """The model without values, which takes no memory. UserError where its shape is impossible."""
    with user_errors(ValueError), torch.device("meta"):
        return GPT(GPTConfig(**shape))


@dataclass(frozen=True)
class Layout:
    """How an iteration is cut up: `sequences` on a GPU at a time, 0 where not one fits, in so many micro-steps, over
    all GPUs together as in train.py; the most sequences that fit; and the memory, of one sequence where none fits."""

    sequences: int
    micro_steps: int
    most: int
    memory: Memory


def layout(model: GPT, c: Config, room: float, checkpointing: bool) -> Layout:
    """An iteration on c.gpus of `room` bytes: as near batch_tokens as can be, to 1 %; then in as few micro-steps."""
    share = c.batch_tokens / (c.block_size * c.gpus)  # sequences of a GPU in an iteration
    shards = c.gpus if c.parallel == "fsdp" else 1
    most = most_sequences(model, room, checkpointing, c.optim, shards)
    able = range(max(1, min(most, round(share)) // 2), max(1, min(most, round(share))) + 1) if most else []
    cuts = [(n, max(1, round(share / n))) for n in ([c.micro_batch] if c.micro_batch else able)]
    least = min((abs(n * steps - share) for n, steps in cuts), default=0)
    near = [(n, steps) for n, steps in cuts if abs(n * steps - share) <= least + share / 100]
    sequences, steps = max(near, default=(0, 0))
    memory = memory_of(model, sequences or 1, checkpointing, c.optim, shards)
    return Layout(sequences, steps * c.gpus, most, memory)


def figures_of(c: Config, model: GPT, plain: Layout, checkpointed: Layout) -> dict[str, str | float | bool]:
    """The figures of a run, flat, by the names of --json; both kinds of activations are those of `micro_batch`."""
    name, peak, memory = machine(c)
    n, per_token = model.get_num_params(False), model.estimate_flops()
    total = c.tokens or float(CHINCHILLA * n)
    seconds = per_token * total / (c.gpus * peak * c.mfu)
    chosen = checkpointed if c.activation_checkpointing else plain
    ckpt, last = checkpoint_bytes(model, c.optim)
    ckpt = model.get_num_params(False) * 4 if c.parallel == "fsdp" else ckpt  # weights alone
    taken = chosen.sequences * chosen.micro_steps * c.block_size or c.batch_tokens
    kept, recomputed = (
        activation_bytes(model.config, chosen.sequences or 1, how, copies=c.parallel == "ddp") for how in (False, True)
    )
    settings = ("model_size", *SHAPE, "vocab_size", "optim", "batch_tokens", "gpus", "parallel", "mfu")
    return {
        **{key: getattr(c, key) for key in settings},
        "activation_checkpointing": c.activation_checkpointing,
        "gpu": name,
        "peak_tflops": peak / 1e12,
        "parameters": n,
        "tokens": total,
        "tokens_per_parameter": total / n,
        "flops_per_token": per_token,
        "flops_total": per_token * total,
        "tokens_per_iteration": taken,
        "iterations": math.ceil(total / taken),
        "tokens_per_second": total / seconds,
        "days": seconds / 86400,
        "gpu_hours": seconds / 3600 * c.gpus,
        "gpu_memory_gb": memory / GIB,
        "usable_memory_gb": memory * (1 - RESERVED) / GIB,
        "memory_per_gpu_gb": chosen.memory.whole / GIB,
        "weights_gb": chosen.memory.weights / GIB,
        "gradients_gb": chosen.memory.gradients / GIB,
        "optimizer_gb": chosen.memory.optimizer / GIB,
        "gathered_gb": chosen.memory.gathered / GIB,
        "optimizer_step_gb": chosen.memory.step / GIB,
        "activations_gb": kept / GIB,
        "activations_checkpointed_gb": recomputed / GIB,
        "micro_batch": chosen.sequences,
        "micro_batch_checkpointed": checkpointed.sequences,
        "largest_micro_batch": plain.most,
        "largest_micro_batch_checkpointed": checkpointed.most,
        "gradient_accumulation_steps": chosen.micro_steps,
        "ckpt_gb": ckpt / GIB,
        "last_gb": last / GIB,
        "fits": 0 < chosen.sequences <= chosen.most,
    }


def report(c: Config, model: GPT, f: dict, plain: Layout, checkpointed: Layout) -> list[str]:
    """A screenful: what is planned, compute and time, memory, advice."""
    preset = size_of(c.model_size) if c.model_size else None
    same = preset and (preset.n_layer, preset.n_head, preset.n_embd, preset.block_size) == (
        c.n_layer, c.n_head, c.n_embd, c.block_size,
    )  # fmt: skip
    asked = f" ({c.batch_tokens:,} asked)" if f["tokens_per_iteration"] != c.batch_tokens else ""
    name = c.model_size if same or not preset else f"{c.model_size}, changed,"
    of_each = f"of {f['peak_tflops']:g} TFLOP/s at {c.mfu:.0%} MFU"
    columns = (plain, checkpointed)

    def row(label: str, values: list[str], note: str = "") -> str:
        return f"  {label:<29}{values[0]:>10}{values[1]:>15}  {note}".rstrip()

    def gib(label: str, part: str, note: str = "") -> str:
        return row(label, [f"{getattr(each.memory, part) / GIB:,.2f}" for each in columns], note)

    shared = f"1/{c.gpus} of it" if c.parallel == "fsdp" else ""
    moments = "two moments" if c.optim == "adamw" else "a momentum; AdamW's two for the rest"
    lines = [
        f"{name or 'a model'} on {amount(f['tokens'])} tokens with {c.gpus} x {f['gpu'] or 'a GPU'} "
        f"({c.parallel}, {c.optim})",
        "",
        f"  parameters          {f['parameters']:,} ({c.n_layer} layers of {c.n_embd}, {c.n_head} heads, "
        f"context {c.block_size:,})",
        f"  tokens              {amount(f['tokens'])}, {f['tokens_per_parameter']:,.1f} a parameter",
        f"  compute             {f['flops_total']:.3g} FLOPs, {f['flops_per_token']:.3g} a token",
        f"  iterations          {f['iterations']:,} of {f['tokens_per_iteration']:,} tokens{asked}",
        f"  time                {duration(f['days'])}, {f['gpu_hours']:,.1f} GPU hours, "
        f"{f['tokens_per_second']:,.0f} tokens/s",
        f"                      {c.gpus} GPU{'s' * (c.gpus > 1)} {of_each}",
        f"  checkpoints         ckpt.pt {f['ckpt_gb']:,.2f} GiB, {'last.pt' if not shared else 'last-1000/'} "
        f"{f['last_gb']:,.2f} GiB (kept twice)",
        "",
        row("GiB on a GPU", ["plain", "checkpointing"]),
        gib("weights, float32", "weights", shared),
        gib("gradients, float32", "gradients", shared),
        gib(f"optimizer, {c.optim}", "optimizer", f"{moments}, 1/{c.gpus}" if shared else moments),
    ]
    if c.parallel == "fsdp":
        lines.append(gib("gathered", "gathered", "2 blocks, embeddings"))
    lines.append(gib("activations", "activations", "at this micro-batch"))
    if c.optim == "muon":
        lines.append(gib("or, in Muon's step", "step", "if more than the line above"))
    lines += [
        gib("at the peak", "whole", f"of {f['usable_memory_gb']:.1f}: {f['gpu_memory_gb']:.1f} less {RESERVED:.0%}"),
        row("micro-batch", [f"{each.sequences or 'none fits'}" for each in columns], f"sequences of {c.block_size:,}"),
        row("gradient_accumulation_steps", [f"{each.micro_steps or '-'}" for each in columns], "over all GPUs"),
        "",
    ]
    return lines + advice(c, model, f, checkpointed if c.activation_checkpointing else plain)


def advice(c: Config, model: GPT, f: dict, chosen: Layout) -> list[str]:
    """What to know before going ahead, a sentence a line."""
    ratio, lines = f["tokens_per_parameter"], []
    if abs(ratio / CHINCHILLA - 1) < 0.01:
        lines.append(f"{ratio:.0f} tokens a parameter: Chinchilla's, for the lowest loss that this compute gives.")
    elif ratio < CHINCHILLA:
        lines.append(
            f"{ratio:.3g} tokens a parameter: fewer than Chinchilla's 20; a smaller model would get as low for less."
        )
    else:
        lines.append(f"{ratio:.3g} tokens a parameter: more than Chinchilla's 20, for a model that is cheaper to use.")
    if not f["fits"]:
        if chosen.most:
            lines.append(f"micro_batch={c.micro_batch} does not fit: the most that fit are {chosen.most}.")
        elif found := ways(model, c):
            lines.append(f"Not one sequence fits on a GPU. What would: {'; '.join(found)}.")
        else:
            lines.append(f"Not one sequence fits on a GPU, nor with FSDP on {MOST_GPUS}: take a smaller model.")
    if c.activation_checkpointing:
        lines.append("Checkpointing computes a third more, which MFU does not count: take a lower --mfu for it.")
    if "mfu" not in c.given:
        lines.append(f"An MFU of {c.mfu:.0%} is a guess: python bench.py train measures it on such a GPU.")
    return [part for line in lines for part in textwrap.wrap(line, 80, break_on_hyphens=False)]


def ways(model: GPT, c: Config) -> list[str]:
    """What would make one sequence fit, the cheapest first, as options."""
    _, _, memory = machine(c)
    asked, own = c.activation_checkpointing, c.gpus if c.parallel == "fsdp" else 1

    def fits(room: float, checkpointing: bool, shards: int) -> bool:
        return memory_of(model, 1, checkpointing, c.optim, shards).whole <= room * (1 - RESERVED)

    found = [] if asked or not fits(memory, True, own) else ["--activation_checkpointing"]
    for checkpointing in dict.fromkeys((asked, True)) if not found else [asked]:
        enough = (
            n for n in (c.gpus << k for k in range(13)) if own < n <= MOST_GPUS and fits(memory, checkpointing, n)
        )
        if n := next(enough, 0):
            options = ["--parallel=fsdp"] * (c.parallel == "ddp") + [f"--gpus={n}"] * (n != c.gpus)
            found.append(" ".join(options + ["--activation_checkpointing"] * (checkpointing and not asked)))
            break
    larger = sorted((gib, name) for name, (_, gib) in GPUS.items() if gib * GIB > memory)
    return found + [f"--gpu={name}" for gib, name in larger if fits(gib * GIB, asked, own)][:1]


def best_for(c: Config) -> tuple[dict[str, str | float], list[tuple[str, int, float, float]]]:
    """What c.gpu_hours are good for: figures, flat, by the names of --json; and (name, parameters, tokens, tokens a
    parameter) of the presets that they train on 2 to 200 tokens a parameter, or of the nearest one.

    Hoffmann et al. 2022: parameters N and tokens D grow alike, with D = 20 N and 6 N D FLOPs, so N = sqrt(C / 120).
    """
    name, peak, _ = machine(c)
    compute = c.gpu_hours * 3600 * peak * c.mfu
    ideal = math.sqrt(compute / (6 * CHINCHILLA))
    rows = []
    for preset, size in SIZES.items():
        model = model_of({key: getattr(size, key) for key in SHAPE[:-1]} | {"bias": True, "vocab_size": c.vocab_size})
        n, paid_for = model.get_num_params(False), compute / model.estimate_flops()
        rows.append((preset, n, paid_for, paid_for / n))
    best = min(rows, key=lambda row: abs(math.log(row[3] / CHINCHILLA)))
    figures = {
        **{key: getattr(c, key) for key in ("gpu_hours", "gpus", "mfu", "vocab_size")},
        "gpu": name,
        "peak_tflops": peak / 1e12,
        "days": c.gpu_hours / c.gpus / 24,
        "flops_total": compute,
        "ideal_parameters": ideal,
        "ideal_tokens": CHINCHILLA * ideal,
        **dict(zip(("model_size", "parameters", "tokens", "tokens_per_parameter"), best, strict=True)),
    }
    for preset, _, paid_for, ratio in rows:
        key = preset.replace("-", "_").replace(".", "_")
        figures |= {f"{key}_tokens": paid_for, f"{key}_tokens_per_parameter": ratio}
    rows.sort(key=lambda row: row[1])
    within = [row for row in rows if CHINCHILLA / 10 <= row[3] <= CHINCHILLA * 10]
    return figures, within or [best]


def report_best(c: Config, f: dict, rows: list[tuple[str, int, float, float]]) -> list[str]:
    """The other way round, a screenful."""
    lines = [
        f"{c.gpu_hours:,g} GPU hours of {f['gpu'] or 'a GPU'} ({duration(f['days'])} of {c.gpus})",
        "",
        f"  compute             {f['flops_total']:.3g} FLOPs ({f['peak_tflops']:g} TFLOP/s at {c.mfu:.0%} MFU)",
        f"  best size           {amount(f['ideal_parameters'])} parameters on {amount(f['ideal_tokens'])} tokens "
        f"(Chinchilla: 20 a parameter)",
        f"  the nearest         {f['model_size']} on {amount(f['tokens'])} tokens",
        "",
        f"  {'model_size':<16}{'parameters':>12}{'tokens':>12}{'a parameter':>14}",
    ]
    for name, n, paid_for, ratio in rows:
        mark = "  <- nearest to 20" if name == f["model_size"] else ""
        lines.append(f"  {name:<16}{amount(n):>12}{amount(paid_for):>12}{ratio:>14,.1f}{mark}")
    given = {key: getattr(c, key) for key in c.given if key not in ("gpu_hours", "json")}
    flags = "".join(f" --{key}={f['gpu'] if key == 'gpu' else value}" for key, value in given.items())
    lines += [
        "",
        f"Whether it fits: python extras/plan.py --model_size={f['model_size']} --tokens={f['tokens']:.3g}{flags}",
    ]
    return lines


def amount(x: float) -> str:
    """Three digits and a unit: 124M, 2.49B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if x >= 0.9995 * size:
            return f"{x / size:,.{max(0, 2 - int(math.log10(x / size * 1.0005)))}f}{unit}"
    return f"{x:.0f}"


def duration(days: float) -> str:
    """Days, or hours or minutes where they are few."""
    for unit, size in (("days", 1.0), ("hours", 1 / 24)):
        if days >= 2 * size:
            return f"{days / size:,.1f} {unit}"
    return f"{days * 1440:,.1f} minutes"


def figures_for(c: Config) -> tuple[dict[str, str | float | bool], list[str]]:
    """The figures of --json, and the lines that tell them. UserError for settings that make no sense."""
    check(c)
    if c.gpu_hours:
        figures, rows = best_for(c)
        return figures, report_best(c, figures, rows)
    room = machine(c)[2] * (1 - RESERVED)
    apply_size(c)
    model = model_of({key: getattr(c, key) for key in (*SHAPE, "vocab_size")})
    plain, checkpointed = (layout(model, c, room, checkpointing) for checkpointing in (False, True))
    figures = figures_of(c, model, plain, checkpointed)
    return figures, report(c, model, figures, plain, checkpointed)


def main(c: Config) -> None:
    figures, lines = figures_for(c)
    print(dumps(figures) if c.json else "\n".join(lines))


if __name__ == "__main__":
    run(main, config)
