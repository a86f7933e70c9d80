"""The papers' models, by name: what `--model_size=gpt3-6.7b` stands for.

Radford et al. 2019 (GPT-2), table 2, and Brown et al. 2020 (GPT-3), table 2.1. Two rows of the latter do not multiply
out: XL has 24 heads of 128 at a width of 2048, and 13B has 40 heads of 128 at 5140. Here XL has 16 heads, and 13B a
width of 5120. GPT-2's learning rates were not published, and its sizes are those of the weights that were.
"""

import difflib
from dataclasses import dataclass

from configurator import Config, UserError, note


@dataclass(frozen=True)
class Size:
    """A row of a paper's table."""

    n_layer: int
    n_embd: int
    n_head: int
    block_size: int
    batch_tokens: int  # tokens in an iteration
    learning_rate: float  # the highest; 0 where it was not published


SIZES = {
    "gpt2": Size(12, 768, 12, 1024, 524_288, 0.0),
    "gpt2-medium": Size(24, 1024, 16, 1024, 524_288, 0.0),
    "gpt2-large": Size(36, 1280, 20, 1024, 524_288, 0.0),
    "gpt2-xl": Size(48, 1600, 25, 1024, 524_288, 0.0),
    "gpt3-125m": Size(12, 768, 12, 2048, 500_000, 6.0e-4),
    "gpt3-350m": Size(24, 1024, 16, 2048, 500_000, 3.0e-4),
    "gpt3-760m": Size(24, 1536, 16, 2048, 500_000, 2.5e-4),
    "gpt3-1.3b": Size(24, 2048, 16, 2048, 1_000_000, 2.0e-4),
    "gpt3-2.7b": Size(32, 2560, 32, 2048, 1_000_000, 1.6e-4),
    "gpt3-6.7b": Size(32, 4096, 32, 2048, 2_000_000, 1.2e-4),
    "gpt3-13b": Size(40, 5120, 40, 2048, 2_000_000, 1.0e-4),
    "gpt3-175b": Size(96, 12288, 96, 2048, 3_200_000, 0.6e-4),
}
ALIASES = {"gpt3-small": "gpt3-125m", "gpt3-medium": "gpt3-350m", "gpt3-large": "gpt3-760m", "gpt3-xl": "gpt3-1.3b"}
ALIASES |= {"gpt2-small": "gpt2", "gpt2-124m": "gpt2", "gpt2-355m": "gpt2-medium", "gpt2-774m": "gpt2-large"}
ALIASES |= {"gpt2-1.5b": "gpt2-xl", "gpt2-1558m": "gpt2-xl", "gpt3": "gpt3-175b"}


def size_of(name: str) -> Size:
    """The row of this name, whatever its case. UserError where there is none."""
    known = name.strip().lower()
    known = ALIASES.get(known, known)
    if known not in SIZES:
        nearest = difflib.get_close_matches(known, SIZES, n=1, cutoff=0.0)[0]
        raise UserError(f"model_size={name}: there are {', '.join(SIZES)}; did you mean {nearest}?")
    return SIZES[known]


def apply_size(c: Config) -> None:
    """Puts the model that c.model_size names into the settings, as a config file in its place would: what was given
    after it stays. Of a row's keys those are set that the script has; GPT-2 and GPT-3 have biases, and GPT-3's rate
    falls to a tenth."""
    if not c.model_size:
        return
    size, settings = size_of(c.model_size), vars(c)
    place = c.given.index("model_size") + 1 if "model_size" in c.given else 0
    later = c.given[place:]
    row = {"n_layer": size.n_layer, "n_head": size.n_head, "n_embd": size.n_embd, "block_size": size.block_size}
    row |= {"bias": True}
    if "gradient_accumulation_steps" not in later:
        row |= {"batch_tokens": size.batch_tokens}
    if size.learning_rate:
        rate = settings["learning_rate"] if "learning_rate" in later else size.learning_rate
        row |= {"learning_rate": size.learning_rate, "min_lr": rate / 10}
    row = {key: value for key, value in row.items() if key in settings and key not in later}
    note(
        f"model_size={c.model_size}: "
        + ", ".join(f"{k} = {v:g}" if type(v) is float else f"{k} = {v}" for k, v in row.items())
    )
    for key, value in row.items():
        setattr(c, key, value)
    c.given = [key for key in c.given[:place] if key not in row] + list(row) + later
