"""Measures training (tokens/s, time of an iteration, MFU, peak memory, time of the first step), generation,
serving, or preparing a text.

    $ python bench.py
    $ python bench.py train --against=FOLDER                      # nanoGPT's model beside ours, step by step in turns
    $ python bench.py train --batch_sizes=4,8,16 --block_sizes=256,1024 --json
    $ python bench.py train config/speedrun_cpu_char.py --profile
    $ python bench.py --save
    $ python bench.py generate
    $ python bench.py generate --quantize=int8 --init_from=out-demo
    $ python bench.py serve --init_from=out-demo --clients=1,16,64 --max_seconds=30 --hang_ups=200
    $ python bench.py prepare --input=novel.txt --copies=50

Needs no dataset: without data/openwebtext it takes random tokens. A CPU gets a smaller batch, unless one is set.
"""

from configurator import Config, UserError, configure, run

what = "train"  # 'train', 'generate', 'serve' or 'prepare', a word without dashes
batch_size = 12  # sequences in an iteration; on a CPU 1, unless set; of generation 1 and this, or else 1, 8 and 32
block_size = 1024  # tokens in a sequence
batch_sizes = ""  # of training, several in place of batch_size, such as 4,8,16
block_sizes = ""  # and so in place of block_size: each with each
model_size = ""  # a paper's shape: 'gpt2' to 'gpt2-xl', 'gpt3-125m' to 'gpt3-175b'
n_layer = 12  # the model's shape: GPT-2 124M
n_head = 12  # heads in a block
n_embd = 768  # width
dropout = 0.0  # 0 measures what pre-training does
vocab_size = 50304  # GPT-2's, padded
bias = False  # biases in Linears and LayerNorms
act = "gelu"  # 'gelu', 'gelu_tanh' or 'relu2'
pos = "learned"  # 'learned' or 'rope'
norm = "layernorm"  # 'layernorm' or 'rmsnorm'
qk_norm = False  # queries and keys normalised
tied = True  # the head is the token embedding
zero_init = False  # matrices that end on the residual begin at zero
attn_pattern = "dense"  # the layers' attention in turn, such as 'dense,banded'
attn_window = 256  # of banded layers: how many tokens a token sees
smear = 0  # so many tokens before each are mixed in
optim = "adamw"  # 'adamw' or 'muon'
real_data = True  # tokens of data/openwebtext, where it has been prepared; else random ones
num_steps = 20  # measured iterations, after half as many for warming up
max_seconds = 60.0  # ends warming up and measuring after this long each, with at least one iteration
seed = 1337  # of the weights and the random tokens
device = "auto"  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = "auto"  # 'auto', 'float32', 'bfloat16', 'float16'
matmul = "auto"  # of training: 'auto', 'float32' or 'bfloat16' products of float32 matrices on a CPU
compile = True  # torch.compile, where there is a compiler; on a CPU False, unless set
profile = False  # print the ten hottest operations, and write a trace for a viewer into bench_log/
max_new_tokens = 256  # of generation and of serving, after a short prompt
num_rounds = 3  # how often all that is compared is measured, in turns
clients = "1,16,64"  # of serving, how many ask at once: each for max_seconds, in turns
hang_ups = 0  # of serving, so many clients leave in the midst of a stream: what is left of them?
serve_options = ""  # of serving, more keys of serve.py, such as '--max_batch=32 --max_waiting=100'
quantize = ""  # generate and serve with 'int8' or 'bf16' weights, as sample.py does
init_from = ""  # generate and serve with an out_dir, a .pt file or a Hugging Face folder instead of random weights
transformers = False  # also measure generation by transformers
against = ""  # a folder with nanoGPT, to measure its training, generation or preparing as well, in turns
input = ""  # a text in UTF-8 to prepare; default: the stories that come with weiGPT
copies = 1  # how often that text is repeated
save = False  # measure what a checkpoint costs the training that goes on, beside torch.save in place
json = False  # print one JSON object and nothing else
config = configure(globals(), positionals=("what",))

import sys
from collections.abc import Callable
from json import dumps

import torch

import bench_generate
import bench_prepare
import bench_serve
import bench_train
import checkpoint
from bench_train import circumstances, random_model
from device import autocast, can_compile, choose_device, choose_dtype, memory_error_told
from model import derive_seed
from presets import apply_size
from quantize import check_quantize


@memory_error_told()
def main(c: Config) -> None:
    apply_size(c)
    if c.what not in ("train", "generate", "serve", "prepare"):
        raise UserError(f"what={c.what}: there are train, generate, serve and prepare")
    for key in ("num_steps", "num_rounds", "max_new_tokens"):
        if getattr(c, key) < 1:
            raise UserError(f"{key}={getattr(c, key)}: expected at least 1")

    def say(text: str) -> None:
        print(text, file=sys.stderr if c.json else sys.stdout)

    if c.what == "prepare":
        figures = bench_prepare.measure(c, say)
        if c.json:
            print(dumps(figures))
        return
    c.device = choose_device(c.device)
    c.dtype = choose_dtype(c.dtype, c.device)
    if c.device == "cpu":
        c.batch_size = c.batch_size if "batch_size" in c.given else 1
        c.compile = c.compile and "compile" in c.given
    if c.batch_size < 1:
        raise UserError(f"batch_size={c.batch_size}: expected at least 1")
    torch.manual_seed(derive_seed(c.seed))
    if c.what == "generate":
        bench_generation(c, say)
        return
    if c.what == "serve":
        check_quantize(c.quantize, c.device)
        c.compile = False
        figures = bench_serve.measure(c, say) | circumstances(c)
    else:
        figures = bench_train.measure(c, say)
    if c.json:
        print(dumps(figures))


def bench_generation(c: Config, say: Callable[[str], None]) -> None:
    """Prints the figures of bench_generate."""
    check_quantize(c.quantize, c.device)
    c.dtype = "float32" if c.quantize else c.dtype
    c.batch_sizes = sorted({1, c.batch_size} if "batch_size" in c.given else {1, 8, 32})
    c.compile = c.compile and can_compile(c.device)
    model = checkpoint.pretrained(c.init_from)[0].to(c.device) if c.init_from else random_model(c)
    ctx = autocast(c.device, c.dtype)
    say(f"{model.get_num_params() / 1e6:.2f}M parameters, {c.device}, {c.quantize or c.dtype}")
    figures = bench_generate.measure(c, model, ctx, say) | circumstances(c)
    tokens = bench_generate.validation_split(c, model.config.block_size) if c.quantize and c.init_from else None
    if tokens:
        figures |= (found := bench_generate.perplexity(c, model, tokens, ctx))
        say(", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in found.items()))
    if c.json:
        print(dumps(figures))


if __name__ == "__main__":
    run(main, config)
