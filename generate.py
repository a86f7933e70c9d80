"""Sampling: from a prompt to its continuation. Knows ids and text, not files."""

import torch

from configurator import UserError
from model import GPT, derive_seed
from tokenizer import Tokenizer


def check_sampling(max_new_tokens: int, temperature: float, top_k: int) -> None:
    """UserError where the numbers make no sense."""
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens={max_new_tokens}: expected 0 or more")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature={temperature}: expected 0 (always the likeliest) or more")
    if top_k < 0:
        raise UserError(f"top_k={top_k}: expected 0 (every token may come) or more")


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt's ids; an empty prompt becomes the end-of-text token, after which a text begins."""
    ids = tokenizer.encode_prompt(prompt).tolist()
    if ids:
        return ids
    if tokenizer.end_of_text is None:
        raise UserError("an empty prompt needs a vocabulary with <|endoftext|>, which this one lacks; give --start")
    return [tokenizer.end_of_text]


def generate_text(
    model: GPT, tokenizer: Tokenizer, prompt: str, *, max_new_tokens: int, temperature: float, top_k: int, seed: int
) -> str:
    """The prompt and its continuation of at most max_new_tokens tokens, ended by <|endoftext|>, which is not shown.

    The same seed gives the same text; temperature 0 takes the likeliest token each time, top_k 0 admits every token.
    """
    device = model.lm_head.weight.device
    ids = prompt_ids(tokenizer, prompt)
    idx = model.generate(
        torch.tensor([ids], device=device),
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        n_vocab=tokenizer.vocab_size,
        stop=tokenizer.end_of_text,
        generator=torch.Generator(device).manual_seed(derive_seed(seed)),
    )[0].tolist()
    new = idx[len(ids) :]
    if new and new[-1] == tokenizer.end_of_text:
        idx.pop()
    return tokenizer.decode(idx if prompt else idx[1:])
