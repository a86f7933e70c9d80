"""What `python bench.py generate` measures; everything that is compared is measured in turns, in one run.

Notable choices:
- The whole way is measured, generate.stream with its sampling and its text, not the model alone.
- Two limits are measured beside it. The products: the model's matrices times one vector a row and nothing else, by the
  kernels that decoding uses. The bandwidth: as many bytes as the matrices have, read and added up.
- The peers are of the same shape and sample alike: our model without a cache, transformers, nanoGPT.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from math import exp
from statistics import median
from typing import Any

import torch

import checkpoint
from bench_train import nanogpt_model
from configurator import Config, UserError, note
from decoder import Decoder, bare
from device import try_compiled
from generate import Sampling, stream
from loader import Tokens, dataset_folder, evaluation_batches, open_split
from model import GPT
from quantize import quantize
from tokenizer import CharTokenizer

SHORT, LAST = 16, 32  # tokens of a short prompt; new tokens that are left where the context is nearly full
LAYERS = ("c_attn", "c_proj", "c_fc", "lm_head")  # what each token passes through, but embeddings and norms
Figures = dict[str, Any]


def measure(c: Config, model: GPT, ctx, say: Callable[[str], None]) -> Figures:
    """Rates in tokens/s, medians of c.num_rounds, for each batch size and context; says a line for each."""
    plain, model = model.eval(), quantize(deepcopy(model), c.quantize) if c.quantize else model.eval()
    context = model.config.block_size
    if context < 2 or model.config.vocab_size > 10**6:
        raise UserError("to measure generation, block_size must be at least 2, vocab_size at most a million")
    if c.compile:
        for size in c.batch_sizes:
            try_compiled(partial(one_token, model, size, ctx))
    prompt = max(1, min(SHORT, context // 2))
    cases = [(size, prompt, min(c.max_new_tokens, context - prompt)) for size in c.batch_sizes]
    cases += [(size, context - LAST, LAST) for size in c.batch_sizes if context - LAST > prompt]
    results = []
    for batch_size, prompt, new in cases:
        others = peers(c, plain, prompt, new) if (batch_size, prompt) == cases[0][:2] else {}
        results.append(compared(c, plain, model, ctx, batch_size, prompt, new, others))
        say(line(results[-1]))
    return {"generation": results}


def one_token(model: GPT, batch_size: int, ctx) -> None:
    """Compiles the one-token pass for this many rows."""
    with ctx:
        decoder = Decoder(model, batch_size, model.config.block_size, compiled=True)
        decoder.prefill([[0]] * batch_size)
        decoder.decode([0] * batch_size)


def compared(c: Config, plain: GPT, model: GPT, ctx, batch_size: int, prompt: int, new: int, others: dict) -> Figures:
    """One line's figures: each contender once a round."""
    device, vocab_size = plain.lm_head.weight.device, model.config.vocab_size
    chars = CharTokenizer(
        "".join(map(chr, range(0x10000, 0x10000 + vocab_size))), byte_fallback=False, end_of_text=False
    )
    ids = torch.randint(vocab_size, (1, prompt), device=device)
    text = chars.decode(ids[0].tolist())
    sampling = Sampling(max_new_tokens=new, temperature=0.8, top_k=200, seed=c.seed)
    layers = [layer for name, layer in model.named_modules() if name.endswith(LAYERS)]
    widths = [layer.in_features for name, layer in plain.named_modules() if name.endswith(LAYERS)]
    vectors = {width: torch.randn(batch_size, 1, width, device=device) for width in widths}
    products = [bare(layer, on_cpu=device.type == "cpu" and c.dtype == "float32") for layer in layers]
    narrow = {"int8": 1, "bf16": 2}.get(c.quantize, 4 if c.dtype == "float32" else 2)  # bytes of a weight
    n = sum(layer.weight.numel() for name, layer in plain.named_modules() if name.endswith(LAYERS))
    buffer = torch.ones(n * narrow // 4, device=device)
    times = defaultdict(list)

    def timed(name: str, work: Callable[[], Any], repeats: int = 1) -> None:
        for _ in range(repeats):
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - started)

    def multiply() -> None:
        for product, width in zip(products, widths, strict=True):
            product(vectors[width])

    def ours() -> None:
        started = time.perf_counter()
        pieces = stream(model, chars, [text] * batch_size, sampling, compiled=c.compile)
        next(pieces)
        times["first"].append(time.perf_counter() - started)
        assert sum(len(piece.tokens) for piece in pieces) == batch_size * new - 1

    def uncached() -> None:  # nanoGPT's loop, at the middle of our lengths
        row = torch.randint(vocab_size, (1, prompt + new // 2), device=device)
        plain(row)[0][:, -1].argmax().item()

    with torch.inference_mode(), ctx:
        ours(), multiply(), uncached()  # warm
        times.clear()
        for _ in range(c.num_rounds):
            timed("ours", ours)
            timed("products", multiply, 10)
            timed("bandwidth", buffer.sum, 5)
            if batch_size == 1:
                timed("uncached", uncached, 2)
            for name, other in others.items():
                timed(name, lambda other=other: other(ids))
    figures = {
        "batch_size": batch_size,
        "prompt_tokens": prompt,
        "new_tokens": new,
        "tokens_per_second": batch_size * new / median(times["ours"]),
        "first_token_seconds": median(times["first"]),
        "products_tokens_per_second": batch_size / median(times["products"]),
        "bandwidth_tokens_per_second": batch_size / median(times["bandwidth"]),
        "bytes_per_second": n * narrow / median(times["bandwidth"]),
    }
    if new > 1:
        after_first = [total - first for total, first in zip(times["ours"], times["first"], strict=True)]
        figures["decoded_tokens_per_second"] = batch_size * (new - 1) / median(after_first)
        for limit in ("products", "bandwidth"):
            rate = figures["decoded_tokens_per_second"] / figures[f"{limit}_tokens_per_second"]
            figures[f"share_of_{limit}"] = rate
    if batch_size == 1:
        figures["uncached_tokens_per_second"] = 1 / median(times["uncached"])
    return figures | {f"{name}_tokens_per_second": new / median(times[name]) for name in others}


def line(f: Figures) -> str:
    """The figures of `compared` in words."""
    text = (
        f"batch {f['batch_size']}, {f['prompt_tokens']} + {f['new_tokens']} tokens: {f['tokens_per_second']:,.1f} "
        f"tokens/s, the first after {f['first_token_seconds']:.3f}s"
    )
    if "decoded_tokens_per_second" in f:
        text += (
            f", then {f['decoded_tokens_per_second']:,.1f} tokens/s: {f['share_of_products']:.0%} of its matrix "
            f"products alone ({f['products_tokens_per_second']:,.1f}), {f['share_of_bandwidth']:.0%} of the memory's "
            f"bandwidth ({f['bytes_per_second'] / 1e9:.1f} GB/s)"
        )
    for other in ("uncached", "transformers", "nanogpt"):
        if rate := f.get(f"{other}_tokens_per_second"):
            text += f"; {f['tokens_per_second'] / rate:.2f} times {other} ({rate:,.2f})"
    return text


def peers(c: Config, model: GPT, prompt: int, new: int) -> dict[str, Callable[[torch.Tensor], Any]]:
    """Those asked for, each a function of the prompt's ids [1, time] that samples `new` tokens."""
    shape, found = model.config, {}
    device, sizes = model.lm_head.weight.device, ("n_layer", "n_head", "n_embd", "vocab_size")
    if c.transformers:
        try:
            from transformers import GPT2Config, GPT2LMHeadModel
        except ImportError:
            raise UserError("--transformers needs a package: pip install transformers") from None
        config = GPT2Config(n_positions=shape.block_size, **{size: getattr(shape, size) for size in sizes})
        theirs = GPT2LMHeadModel(config).eval().to(device)
        how = dict(do_sample=True, temperature=0.8, top_k=200, eos_token_id=None, pad_token_id=0, use_cache=True)
        found["transformers"] = lambda ids: theirs.generate(ids, min_new_tokens=new, max_new_tokens=new, **how)
    if c.against:
        nano = nanogpt_model(c.against, shape).eval().to(device)
        found["nanogpt"] = lambda ids: nano.generate(ids, new, temperature=0.8, top_k=200)
    return found


def validation_split(c: Config, block_size: int) -> Tokens | None:
    """That of the dataset on which the checkpoint was trained; None, and a note, where there is none."""
    try:
        _, state = checkpoint.best(c.init_from)
        return open_split(dataset_folder(state["config"].get("dataset", "")), "val", block_size)
    except UserError as error:
        note(f"note: no perplexity without the checkpoint's dataset: {error}")
        return None


@torch.inference_mode()
def perplexity(c: Config, model: GPT, tokens: Tokens, ctx) -> Figures:
    """The model's perplexity on the whole split, as it is and quantized."""
    offsets = evaluation_batches(len(tokens.ids), model.config.block_size, 8, len(tokens.ids))
    figures = {}
    for name in ("", c.quantize):
        tried = quantize(deepcopy(model), name) if name else model.eval()
        losses = []
        for starts in offsets:
            x, y = tokens.windows(starts, model.config.block_size, model.config.vocab_size)
            with ctx:
                losses.append(tried(x.to(c.device), y.to(c.device))[1].item())
        figures[f"{name}_perplexity".strip("_")] = exp(sum(losses) / len(losses))
    return figures
