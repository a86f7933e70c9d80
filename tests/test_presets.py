"""The papers' models by name, and what a name sets among the settings that are given before and after it."""

import pytest
import torch

from configurator import UserError, configure
from model import GPT, GPTConfig
from presets import ALIASES, SIZES, apply_size, size_of

# Brown et al. 2020, table 2.1: layers, width, heads, batch size in tokens, learning rate; with XL's and 13B's corrected
GPT3 = {
    "gpt3-125m": (12, 768, 12, 0.5e6, 6.0e-4),
    "gpt3-350m": (24, 1024, 16, 0.5e6, 3.0e-4),
    "gpt3-760m": (24, 1536, 16, 0.5e6, 2.5e-4),
    "gpt3-1.3b": (24, 2048, 16, 1e6, 2.0e-4),
    "gpt3-2.7b": (32, 2560, 32, 1e6, 1.6e-4),
    "gpt3-6.7b": (32, 4096, 32, 2e6, 1.2e-4),
    "gpt3-13b": (40, 5120, 40, 2e6, 1.0e-4),
    "gpt3-175b": (96, 12288, 96, 3.2e6, 0.6e-4),
}
# OpenAI's weights as transformers counts them
GPT2 = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
DEFAULTS = {
    "model_size": "", "n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32, "bias": False, "batch_tokens": 0,
    "gradient_accumulation_steps": 40, "learning_rate": 1e-3, "min_lr": 1e-4,
}  # fmt: skip


def applied(*argv: str, without: tuple[str, ...] = ()):
    """The settings of a script with DEFAULTS after this command line."""
    c = configure({key: value for key, value in DEFAULTS.items() if key not in without}, argv=argv)
    apply_size(c)
    return c


def parameters(name: str) -> int:
    size = size_of(name)
    with torch.device("meta"):
        model = GPT(GPTConfig(size.block_size, 50257, size.n_layer, size.n_head, size.n_embd))
    return model.get_num_params(False)


def test_gpt3s_table():
    assert GPT3.keys() | GPT2.keys() == SIZES.keys()
    for name, row in GPT3.items():
        size = SIZES[name]
        assert (size.n_layer, size.n_embd, size.n_head, size.batch_tokens, size.learning_rate) == row, name
        assert size.block_size == 2048 and size.n_embd % size.n_head == 0, name


def test_gpt2s_parameters_exactly():
    assert {name: parameters(name) for name in GPT2} == GPT2
    assert all(SIZES[name].block_size == 1024 for name in GPT2)


@pytest.mark.parametrize("name", GPT3)
def test_gpt3s_parameters_are_those_of_the_name(name):
    number, unit = name.removeprefix("gpt3-")[:-1], name[-1]
    assert parameters(name) == pytest.approx(float(number) * {"m": 1e6, "b": 1e9}[unit], rel=0.03)


def test_other_names():
    assert all(size_of(alias) is SIZES[name] for alias, name in ALIASES.items())
    assert size_of(" GPT3-XL ") is SIZES["gpt3-1.3b"] and size_of("gpt3") is SIZES["gpt3-175b"]
    assert not ALIASES.keys() & SIZES.keys()


@pytest.mark.parametrize(("name", "nearest"), [("gpt3-7b", "gpt3-6.7b"), ("gpt-2", "gpt2"), ("gpt2xl", "gpt2-xl")])
def test_an_unknown_name_is_told_the_nearest(name, nearest):
    with pytest.raises(UserError) as told:
        applied(f"--model_size={name}")
    sentence = str(told.value)
    assert sentence.startswith(f"model_size={name}: there are gpt2, ") and "\n" not in sentence
    assert sentence.endswith(f"did you mean {nearest}?")


def test_without_a_name_nothing_changes():
    assert {key: getattr(applied("--n_layer=3"), key) for key in DEFAULTS} == DEFAULTS | {"n_layer": 3}
    assert applied().given == []


def test_a_name_sets_all_that_its_row_has():
    c = applied("--model_size=gpt3-1.3b")
    assert (c.n_layer, c.n_head, c.n_embd, c.block_size, c.bias) == (24, 16, 2048, 2048, True)
    assert (c.batch_tokens, c.learning_rate) == (1_000_000, 2e-4) and c.min_lr == pytest.approx(2e-5)
    assert {"n_layer", "n_embd", "learning_rate", "min_lr", "batch_tokens"} < set(c.given)


def test_gpt2s_rates_were_not_published_so_they_stay():
    c = applied("--model_size=gpt2-xl")
    assert (c.n_layer, c.learning_rate, c.min_lr) == (48, 1e-3, 1e-4) and "learning_rate" not in c.given


def test_what_is_given_later_stays_and_what_is_given_before_is_replaced():
    c = applied("--n_embd=128", "--n_layer=3", "--model_size=gpt3-350m", "--n_layer=6", "--bias=False")
    assert (c.n_embd, c.n_layer, c.bias) == (1024, 6, False)
    place = c.given.index
    assert c.given.count("n_embd") == 1 and place("n_embd") > place("model_size") < place("n_layer")
    again = applied("--model_size=gpt3-350m", "--n_layer=6", "--model_size=gpt3-760m")
    assert (again.n_layer, again.n_embd) == (24, 1536)


def test_micro_steps_given_later_keep_the_papers_batch_away():
    later = applied("--model_size=gpt3-350m", "--gradient_accumulation_steps=16")
    assert (later.batch_tokens, later.gradient_accumulation_steps) == (0, 16)
    assert applied("--gradient_accumulation_steps=16", "--model_size=gpt3-350m").batch_tokens == 500_000
    assert applied("--model_size=gpt3-350m", "--batch_tokens=4096").batch_tokens == 4096


def test_the_rate_falls_to_a_tenth_of_what_it_is():
    assert applied("--model_size=gpt3-350m", "--learning_rate=1e-5").min_lr == pytest.approx(1e-6)
    assert applied("--model_size=gpt3-350m", "--learning_rate=1e-5", "--min_lr=0").min_lr == 0
    assert applied("--learning_rate=1e-5", "--model_size=gpt3-350m").min_lr == pytest.approx(3e-5)


def test_a_script_without_a_key_does_not_get_it():
    c = applied("--model_size=gpt3-350m", without=("learning_rate", "batch_tokens"))
    assert not hasattr(c, "learning_rate") and not hasattr(c, "batch_tokens") and c.n_layer == 24
    assert "learning_rate" not in c.given and c.min_lr == pytest.approx(3e-5)


def test_a_size_in_a_config_file_gives_way_to_what_follows(tmp_path):
    (tmp_path / "big.py").write_text('n_layer = 4\nmodel_size = "gpt3-125m"\nn_head = 6\n', encoding="utf-8")
    c = applied(str(tmp_path / "big.py"), "--block_size=128")
    assert (c.n_layer, c.n_head, c.n_embd, c.block_size) == (12, 6, 768, 128)
