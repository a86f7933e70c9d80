"""Speaks from a trained model.

    $ python sample.py --out_dir=out-shakespeare-char
    $ python sample.py --out_dir=out-demo --start=《小白兔》 --num_samples=3
    $ python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --num_samples=5 --max_new_tokens=100
    $ python sample.py --out_dir=out-chinese --start=FILE:prompt.txt

Opens a checkpoint of ours or of nanoGPT's, GPT-2's weights, or a folder in the Hugging Face layout.
"""

from configurator import Config, UserError, configure, run

init_from = "resume"  # 'resume' for out_dir, 'gpt2*', or a path: an out_dir, a .pt file, a Hugging Face folder
out_dir = "out"  # ckpt.pt is taken from here, where init_from is 'resume'
start = "\n"  # the prompt, or FILE:path; <|endoftext|> is the special token; empty is the start of a new text
num_samples = 10  # how many
max_new_tokens = 500  # tokens in each at most; an end-of-text token ends it before
temperature = 0.8  # below 1 less random, above 1 more; 0 takes the likeliest token each time
top_k = 200  # only the k likeliest tokens may come; 0 for all
seed = 1337  # the same seed, the same samples
device = "auto"  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = "auto"  # 'auto', 'float32', 'bfloat16', 'float16'
compile = False  # torch.compile, where there is a compiler
config = configure(globals())

from pathlib import Path

import torch

import checkpoint
from device import autocast, can_compile, choose_device, choose_dtype, memory_error_told, try_compiled
from generate import check_sampling, generate_text, prompt_ids
from model import derive_seed


def read_prompt(start: str) -> str:
    """The prompt itself, or the text of the file that FILE:path names."""
    if not start.startswith("FILE:"):
        return start
    path = Path(start.removeprefix("FILE:"))
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"start=FILE:{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"start=FILE:{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None


@memory_error_told()
def main(c: Config) -> None:
    check_sampling(c.max_new_tokens, c.temperature, c.top_k)
    if c.num_samples < 1:
        raise UserError(f"num_samples={c.num_samples}: expected at least 1")
    prompt = read_prompt(c.start)
    c.device = choose_device(c.device)
    c.dtype = choose_dtype(c.dtype, c.device)
    if c.init_from == "resume":
        path, state = checkpoint.best(c.out_dir)
        model, tokenizer = checkpoint.model_of(state, path), checkpoint.tokenizer_of(state, path)
    else:
        model, tokenizer = checkpoint.pretrained(c.init_from)
    if tokenizer is None:
        raise UserError(f"{c.init_from} has a vocabulary of its own ({model.config.vocab_size} tokens), not GPT-2's")
    prompt_ids(tokenizer, prompt)
    model.eval().to(c.device)
    ctx = autocast(c.device, c.dtype)
    if c.compile and can_compile(c.device):
        model.forward = torch.compile(model.forward)

        def probe() -> None:
            with torch.no_grad(), ctx:
                model(torch.zeros(1, min(8, model.config.block_size), dtype=torch.long, device=c.device))

        try_compiled(probe)
    for k in range(c.num_samples):
        with ctx:
            text = generate_text(
                model,
                tokenizer,
                prompt,
                max_new_tokens=c.max_new_tokens,
                temperature=c.temperature,
                top_k=c.top_k,
                seed=derive_seed(c.seed, k),
            )
        print(text)
        print("---------------")


if __name__ == "__main__":
    run(main, config)
