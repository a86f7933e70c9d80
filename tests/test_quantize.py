import json

import pytest
import torch
from conftest import TINY, run_script

from configurator import UserError
from decoder import Decoder
from model import GPT, GPTConfig
from quantize import Int8Linear, check_quantize, quantize

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch is without oneDNN")
KINDS = [pytest.param("int8", marks=needs_onednn), "bf16"]


def random_model(bias=True) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=301, bias=bias, **TINY)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_quantized_matrix_is_close_to_the_products_of_its_rounded_numbers(kind, bias):
    model = random_model(bias)
    linear, x = model.transformer.h[0].mlp.c_fc, torch.randn(3, 5, 32)
    weight, b = linear.weight.double(), linear.bias.double() if bias else 0.0
    if kind == "int8":
        row, token = weight.abs().amax(1, keepdim=True) / 127, x.double().abs().amax(-1, keepdim=True) / 127
        expected = ((x / token).round() @ (weight / row).round().T) * token * row.T + b
    else:
        expected = x.bfloat16().double() @ weight.bfloat16().double().T + b
    got = quantize(model, kind).transformer.h[0].mlp.c_fc(x)
    assert got.shape == expected.shape and got.dtype == torch.float32
    tolerance = 1e-4 if kind == "int8" else 2e-2  # bfloat16 results have 8 bits
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


@needs_onednn
@torch.no_grad()
def test_int8_rows_of_small_matrices_are_padded_and_of_any_number_the_same():
    """Few rows of a small matrix would find only a reference kernel: they take the way of sixteen."""
    torch.manual_seed(1)
    for n_in, n_out in ((32, 96), (512, 512), (128, 700)):
        linear = torch.nn.Linear(n_in, n_out)
        x, small = torch.randn(40, n_in), Int8Linear(linear)
        assert (small.rows == 1) == (min(n_in, n_out) >= 512)
        whole = small(x)
        for rows in (1, 3, 15, 16, 17):
            assert torch.equal(small(x[:rows, None])[:, 0], whole[:rows])
        assert small(x[:6].view(2, 3, -1)).shape == (2, 3, n_out)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_matrix_is_quantized_and_the_logits_stay_close(kind):
    model, x = random_model(), torch.randint(301, (2, 20), generator=torch.Generator().manual_seed(1))
    logits = model(x, x)[0]
    small = quantize(model, kind)
    assert not [m for m in small.modules() if type(m) is torch.nn.Linear]
    error = (small(x, x)[0] - logits).norm() / logits.norm()
    assert 1e-5 < error < 0.05
    assert small.transformer.wte.weight.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_uses_it_and_rows_do_not_depend_on_each_other(kind):
    model = quantize(random_model(), kind)
    alone, together = Decoder(model, 1, 32), Decoder(model, 6, 32)
    prompts = [[7, 8, 9], [1], [2, 3], [300] * 5, [4], [5, 6]]
    one, six = alone.prefill(prompts[:1]), together.prefill(prompts)
    for id in range(20):
        torch.testing.assert_close(one[0], six[0], atol=1e-5 if kind == "int8" else 3e-2, rtol=0)
        one, six = alone.decode([id]), together.decode([id, *range(5)])
    with torch.no_grad():
        torch.testing.assert_close(one[0], model(torch.tensor([prompts[0] + list(range(20))]))[0][0, -1],
                                   atol=1e-4 if kind == "int8" else 3e-2, rtol=0)  # fmt: skip


def test_what_cannot_be_is_a_sentence():
    with pytest.raises(UserError, match="int8, bf16"):
        check_quantize("int4", "cpu")
    with pytest.raises(UserError, match="for CPUs"):
        check_quantize("int8", "cuda:0")
    check_quantize("bf16", "cuda:0")
    check_quantize("", "cpu")


@needs_onednn
def test_the_perplexity_of_a_trained_model_hardly_changes(tmp_path):
    """The bench prints both: a model that has learnt something loses less than 2% by int8, and by bf16."""
    assert run_script("data/chinese/prepare.py", "--dest=d", cwd=tmp_path).returncode == 0
    small = [*(f"--{k}={v}" for k, v in TINY.items()), "--max_iters=60", "--batch_size=16", "--eval_interval=60"]
    done = run_script("train.py", "config/demo_chinese.py", "--dataset=d", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for kind in ("int8", "bf16"):
        quick = [f"--quantize={kind}", "--init_from=out-demo", "--num_rounds=1", "--batch_size=1", "--json"]
        done = run_script("bench.py", "generate", *quick, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        figures = json.loads(done.stdout)
        assert 1.0 < figures["perplexity"] < 1000
        assert 0 < abs(figures[f"{kind}_perplexity"] / figures["perplexity"] - 1) < 0.02
