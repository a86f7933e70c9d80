"""GPT-2 in NumPy alone: the forward pass and greedy generation, a lesson to be read from top to bottom.

    $ python extras/pico.py "Alan Turing theorized that computers would one day become" --max_new_tokens=8
    $ python extras/pico.py 从前 --model=out-chinese/hf
    $ python extras/pico.py "" --trace

`params` holds the weights by their names in the Hugging Face checkpoint, such as "h.0.attn.c_attn.weight"; matrices
are stored as [in, out]. n_seq is the number of tokens, n_embd = n_head * head_dim, n_inner = 4 * n_embd. There is no
batch, no cache and no haste. The lesson ends with `generate`; below it come files, tokens and the command line.

References: Vaswani et al. 2017 (attention), Radford et al. 2019 (GPT-2), https://github.com/openai/gpt-2.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray
Arrays = dict[str, Array]
Activation = Callable[[Array], Array]


def linear(x: Array, params: Arrays, name: str) -> Array:
    """Each output is a weighted sum of all inputs."""
    return x @ params[f"{name}.weight"] + params[f"{name}.bias"]  # [n_seq, in] @ [in, out] + [out] -> [n_seq, out]


def layer_norm(x: Array, params: Arrays, name: str, eps: float) -> Array:
    """Brings each token's vector to mean 0 and variance 1, then gives every place in it a gain and a bias."""
    x = x - x.mean(-1, keepdims=True)  # [n_seq, n_embd] - [n_seq, 1] -> [n_seq, n_embd]
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)  # [n_seq, n_embd] / [n_seq, 1] -> [n_seq, n_embd]
    return x * params[f"{name}.weight"] + params[f"{name}.bias"]  # [n_seq, n_embd] * [n_embd] + [n_embd] -> the same


def gelu(x: Array) -> Array:
    """x times the probability that a standard normal number is below x (Hendrycks and Gimpel 2016)."""
    erf = np.vectorize(math.erf, otypes=[x.dtype])  # NumPy has none: a call for each number, slow but exact
    return x * (1 + erf(x / math.sqrt(2))) / 2  # [n_seq, n_inner] -> [n_seq, n_inner]


def gelu_new(x: Array) -> Array:
    """Nearly the same by tanh, at most 0.0005 off: the form with which OpenAI trained GPT-2."""
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))) / 2  # [n_seq, n_inner] -> the same


def softmax(x: Array) -> Array:
    """Positive numbers that sum to 1 along the last axis; without its maximum first, exp would overflow."""
    x = np.exp(x - x.max(-1, keepdims=True))  # [..., n] - [..., 1] -> [..., n]
    return x / x.sum(-1, keepdims=True)  # [..., n] / [..., 1] -> [..., n]


def attention(x: Array, params: Arrays, name: str, n_head: int) -> Array:
    """Every token gathers values from itself and those before it, mostly where its query fits the key."""
    n_seq, n_embd = x.shape
    qkv = linear(x, params, f"{name}.c_attn")  # [n_seq, n_embd] -> [n_seq, 3*n_embd]
    qkv = qkv.reshape(n_seq, 3, n_head, n_embd // n_head)  # [n_seq, 3*n_embd] -> [n_seq, 3, n_head, head_dim]
    q, k, v = qkv.transpose(1, 2, 0, 3)  # [n_seq, 3, n_head, head_dim] -> three of [n_head, n_seq, head_dim]
    scores = q @ k.transpose(0, 2, 1)  # [n_head, n_seq, head_dim] @ [n_head, head_dim, n_seq] -> [n_head, n_seq, n_seq]
    scores = scores / math.sqrt(n_embd // n_head)  # [n_head, n_seq, n_seq] -> the same, of about unit variance
    is_later = np.triu(np.ones((n_seq, n_seq), bool), k=1)  # [n_seq, n_seq], True where column > row: the future
    weights = softmax(np.where(is_later, -np.inf, scores))  # [n_head, n_seq, n_seq] -> the same, each row sums to 1
    heads = weights @ v  # [n_head, n_seq, n_seq] @ [n_head, n_seq, head_dim] -> [n_head, n_seq, head_dim]
    x = heads.transpose(1, 0, 2).reshape(n_seq, n_embd)  # [n_head, n_seq, head_dim] -> [n_seq, n_embd]
    return linear(x, params, f"{name}.c_proj")  # [n_seq, n_embd] -> [n_seq, n_embd]


def mlp(x: Array, params: Arrays, name: str, act: Activation) -> Array:
    """Works on every token by itself, in a space that is wider."""
    x = act(linear(x, params, f"{name}.c_fc"))  # [n_seq, n_embd] -> [n_seq, n_inner]
    return linear(x, params, f"{name}.c_proj")  # [n_seq, n_inner] -> [n_seq, n_embd]


def gpt2(
    inputs: Sequence[int], params: Arrays, n_head: int, act: Activation, eps: float = 1e-5, trace: Arrays | None = None
) -> Array:
    """Logits [n_seq, n_vocab] for the token after each of `inputs`; puts every stage into `trace` by its name."""
    trace = {} if trace is None else trace
    wte, wpe = params["wte.weight"], params["wpe.weight"]  # [n_vocab, n_embd] and [n_ctx, n_embd]
    n_layer = sum(name.endswith(".c_attn.weight") for name in params)
    trace["wte + wpe"] = x = wte[list(inputs)] + wpe[: len(inputs)]  # [n_seq] -> [n_seq, n_embd]
    for i in range(n_layer):
        y = layer_norm(x, params, f"h.{i}.ln_1", eps)  # [n_seq, n_embd] -> [n_seq, n_embd]
        trace[f"h.{i} + attn"] = x = x + attention(y, params, f"h.{i}.attn", n_head)  # [n_seq, n_embd] -> the same
        y = layer_norm(x, params, f"h.{i}.ln_2", eps)  # [n_seq, n_embd] -> [n_seq, n_embd]
        trace[f"h.{i} + mlp"] = x = x + mlp(y, params, f"h.{i}.mlp", act)  # [n_seq, n_embd] -> the same
    trace["ln_f"] = x = layer_norm(x, params, "ln_f", eps)  # [n_seq, n_embd] -> [n_seq, n_embd]
    trace["logits"] = x = x @ wte.T  # [n_seq, n_embd] @ [n_embd, n_vocab] -> [n_seq, n_vocab]
    return x


def generate(
    ids: Sequence[int], params: Arrays, max_new_tokens: int, stop: int | None, n_vocab: int | None, **settings: Any
) -> list[int]:
    """`ids` continued by the likeliest token again and again, until it is `stop`; `settings` are those of gpt2().

    Ids from `n_vocab` on, which a padded vocabulary has beyond its tokenizer's, are never taken.
    """
    ids, n_ctx = list(ids), len(params["wpe.weight"])
    for _ in range(max_new_tokens):
        logits = gpt2(ids[-n_ctx:], params, **settings)  # [at most n_ctx] -> [at most n_ctx, n_vocab]
        likeliest = int(logits[-1, :n_vocab].argmax())  # [n_vocab] -> one id
        if likeliest == stop:
            break
        ids.append(likeliest)  # [n_seq] -> [n_seq + 1]
    return ids


import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import Config, UserError, configure, note, run, user_errors

prompt = ""  # what is to be continued (--prompt=... if it ends in .py); <|endoftext|> is the token; empty is a new text
model = "gpt2"  # GPT-2's weights from the hub or its cache ('gpt2*'), or a folder in the Hugging Face layout
max_new_tokens = 40  # tokens at most; an end-of-text token ends the text before
trace = False  # print the shape and the norm of every stage in the first forward pass
config = configure(globals(), positionals=("prompt",))

from tokenizer import END_OF_TEXT, GPT2Tokenizer, Tokenizer, check_text, hf_tokenizer

GPT2_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
ACTIVATIONS = {"gelu_new": gelu_new, "gelu_pytorch_tanh": gelu_new, "gelu": gelu}
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def find_folder(model: str) -> Path:
    """The folder with the model's config.json and model.safetensors: `model` itself, or a snapshot in the hub's cache,
    downloaded where it has none. UserError where there is no such model."""
    if Path(model).is_dir():
        return Path(model)
    if model not in GPT2_MODELS:
        raise UserError(f"no folder {model}, and no such GPT-2: there are {', '.join(GPT2_MODELS)}, or a local folder")
    by_hand = f"put {model}'s config.json and model.safetensors into a folder and give --model=FOLDER"
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
    except ImportError as error:
        raise UserError(f"the hub and its cache need a package: pip install huggingface_hub; or {by_hand}") from error
    paths = []
    for name in ("config.json", "model.safetensors"):
        path = try_to_load_from_cache(model, name)
        try:
            paths.append(path if isinstance(path, str) else hf_hub_download(model, name))
        except Exception as error:  # the hub's client raises many kinds, for no network, a block, a mirror's fault
            raise UserError(
                f"{model} is neither in the local hub cache nor to be had from the hub ({type(error).__name__}): "
                f"set HF_ENDPOINT to a mirror, or {by_hand}"
            ) from error
    return Path(paths[0]).parent


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. UserError where it describes something else than GPT-2's architecture."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder} has no config.json: give a folder in the Hugging Face layout, with config.json and "
            "model.safetensors (an out_dir becomes one by extras/export.py)"
        )
    with user_errors(OSError, ValueError, RecursionError, about=f"{path} cannot be read"):
        c = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(c, dict):
        c = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5} | c
    fits = (
        isinstance(c, dict)
        and c.get("model_type") == "gpt2"
        and c["activation_function"] in list(ACTIVATIONS)
        and type(c["layer_norm_epsilon"]) is float
        and c.get("n_inner") in (None, 4 * c.get("n_embd", 0))
        and c.get("scale_attn_weights", True)
        and not c.get("scale_attn_by_inverse_layer_idx", False)
        and c.get("tie_word_embeddings", True)
    )
    if not fits:
        raise UserError(f"{path} does not describe GPT-2's architecture, the only one that is read here")
    for key in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"):
        if type(c.get(key)) is not int or c[key] < 1:
            raise UserError(f"{path}: {key} is {c.get(key, 'missing')!r}, expected a whole number of at least 1")
    if c["n_embd"] % c["n_head"]:
        raise UserError(f"{path}: n_embd = {c['n_embd']} is not divisible by n_head = {c['n_head']}")
    return c


def settings_of(c: dict[str, Any]) -> dict[str, Any]:
    """What gpt2() takes besides weights, from config.json."""
    return {"n_head": c["n_head"], "act": ACTIVATIONS[c["activation_function"]], "eps": c["layer_norm_epsilon"]}


def shapes_of(c: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The name and the shape of every tensor that a GPT-2 of this config.json has."""
    n = c["n_embd"]
    yield "wte.weight", (c["vocab_size"], n)
    yield "wpe.weight", (c["n_positions"], n)
    linears = {"attn.c_attn": (n, 3 * n), "attn.c_proj": (n, n), "mlp.c_fc": (n, 4 * n), "mlp.c_proj": (4 * n, n)}
    for i in range(c["n_layer"]):
        for name, shape in linears.items():
            yield f"h.{i}.{name}.weight", shape
            yield f"h.{i}.{name}.bias", shape[1:]
    for name in [f"h.{i}.{ln}" for i in range(c["n_layer"]) for ln in ("ln_1", "ln_2")] + ["ln_f"]:
        yield f"{name}.weight", (n,)
        yield f"{name}.bias", (n,)


def read_params(folder: Path, c: dict[str, Any], dtype: type[np.floating] = np.float32) -> Arrays:
    """The folder's weights as `dtype`, those in it already left on the disk until they are used. UserError where a
    tensor is missing or has another shape than config.json says."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no model.safetensors")
    found = {}
    for file in files:
        found |= {name.removeprefix("transformer."): tensor for name, tensor in read_safetensors(file).items()}
    params = {}
    for name, shape in shapes_of(c):
        if name not in found:
            raise UserError(f"{folder} lacks the tensor {name}, in float32, float16 or bfloat16")
        if found[name].shape != shape:
            raise UserError(f"{folder}: {name} is {list(found[name].shape)}, expected {list(shape)} by config.json")
        params[name] = found[name].astype(dtype, copy=False)
    return params


def read_safetensors(path: Path) -> Arrays:
    """Every floating-point tensor of a file, by name; bfloat16 becomes float32. UserError where the file is broken.

    The file is the length of a header (8 bytes, little-endian), the header in JSON, then the tensors' bytes:
    https://huggingface.co/docs/safetensors
    """
    tensors = {}
    with user_errors(OSError, ValueError, LookupError, TypeError, RecursionError, about=f"{path} cannot be read"):
        data = np.asarray(np.memmap(path, np.uint8, "r"))  # [bytes]
        begin = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:begin].tobytes())
        header = {name: header[name] for name in header if name != "__metadata__"}
        size = begin + max(tensor["data_offsets"][1] for tensor in header.values())
        if size != len(data):
            raise UserError(f"it has {len(data):,} bytes where its header speaks of {size:,}, so fetch it again")
        for name, tensor in header.items():
            if tensor["dtype"] in DTYPES:
                first, last = tensor["data_offsets"]
                value = data[begin + first : begin + last].view(DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
                if tensor["dtype"] == "BF16":  # the upper half of a float32
                    value = (value.astype(np.uint32) << 16).view(np.float32)
                tensors[name] = value
    return tensors


def read_tokens(folder: Path, c: dict[str, Any]) -> Tokenizer:
    """The folder's tokenizer, else GPT-2's. UserError where it is broken or does not fit the model."""
    tokenizer = hf_tokenizer(folder)
    if tokenizer is None:
        tokenizer = GPT2Tokenizer()
        if c["vocab_size"] not in (tokenizer.vocab_size, 50304):  # or padded to a multiple of 64, as nanoGPT's are
            raise UserError(f"{folder} has no tokenizer.json, and its {c['vocab_size']} tokens are not GPT-2's")
    if tokenizer.vocab_size > c["vocab_size"]:
        known = f"by config.json the model knows {c['vocab_size']}"
        raise UserError(f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens, but {known}")
    return tokenizer


def main(c: Config) -> None:
    if c.max_new_tokens < 0:
        raise UserError(f"max_new_tokens={c.max_new_tokens}: expected 0 or more")
    check_text(c.prompt)
    folder = find_folder(c.model)
    hf = read_config(folder)
    tokens, params, settings = read_tokens(folder, hf), read_params(folder, hf), settings_of(hf)
    if not c.prompt and tokens.end_of_text is None:
        raise UserError(f"an empty prompt needs a vocabulary with {END_OF_TEXT}, which {folder} lacks: give a prompt")
    ids = tokens.encode_prompt(c.prompt).tolist() if c.prompt else [tokens.end_of_text]
    if not ids:
        raise UserError(f"the prompt {c.prompt!r} has no tokens in {folder}'s vocabulary: give another")
    if len(ids) > hf["n_positions"]:
        note(f"note: the prompt has {len(ids)} tokens and the context {hf['n_positions']}: only the newest count")
    if c.trace:
        stages = {}
        gpt2(ids[-hf["n_positions"] :], params, **settings, trace=stages)
        for name, x in stages.items():
            print(f"{name:<12} {str(list(x.shape)):<14} norm {np.linalg.norm(x.astype(np.float64)):.6g}")
    ids = generate(ids, params, c.max_new_tokens, stop=tokens.end_of_text, n_vocab=tokens.vocab_size, **settings)
    print(tokens.decode(ids if c.prompt else ids[1:]))


if __name__ == "__main__":
    run(main, config)
