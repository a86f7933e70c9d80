"""The newer fields of GPTConfig: a whole GPT in NumPy, float64, one row at a time, is what each is held against."""

import functools
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import run_script

import checkpoint
import ops
from decoder import Decoder
from model import ACTIVATIONS, GPT, GPTConfig, derive_seed
from tokenizer import CharTokenizer

SHAPE = dict(n_layer=2, n_head=2, n_embd=24, vocab_size=41, block_size=16)
NEW = {
    "act": {"act": "relu2"},
    "pos": {"pos": "rope"},
    "norm": {"norm": "rmsnorm"},
    "qk_norm": {"qk_norm": True},
    "tied": {"tied": False},
    "zero_init": {"zero_init": True},
    "smear": {"smear": 4},
    "attn_pattern": {"attn_pattern": "banded,dense", "attn_window": 5},
}
ALL = {key: value for one in NEW.values() for key, value in one.items()}
MANY = [{}, *NEW.values(), ALL, ALL | {"bias": False}, ALL | {"tied": True, "norm": "layernorm"}]
each_field = pytest.mark.parametrize("fields", MANY, ids=lambda f: "+".join(f) or "none")
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here")


def a_model(fields=(), seed=0, **more) -> GPT:
    """Every parameter random, also those that begin at zero or one, so that each matters."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SHAPE | dict(fields) | more)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            gain = p.dim() == 1 and name.endswith("weight")
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() == 2 else 0.2) + gain)
    return model


def ids_of(batch, time, seed=1):
    return torch.randint(SHAPE["vocab_size"], (batch, time), generator=torch.Generator().manual_seed(seed))


# ------- the same in NumPy


def np_norm(x, fields, weights, name):
    if fields.get("norm") == "rmsnorm":
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0)


def np_linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)


def np_act(x, fields):
    if fields.get("act") == "relu2":
        return np.where(x > 0, x, 0) ** 2
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def np_smear(x, weights, name):
    y = x.copy()
    for t in range(len(x)):
        for n, weight in enumerate(weights.get(f"{name}.weight", []), 1):
            if t >= n:
                y[t] += weight * x[t - n]
    return y


def np_turned(x, position):
    """The rotation of Su et al. 2021, equations 14 and 15: R x, with R in blocks of two by two."""
    d = len(x)
    rotation = np.zeros((d, d))
    for i in range(1, d // 2 + 1):
        angle = position * 10000 ** (-2 * (i - 1) / d)
        at = 2 * (i - 1)
        rotation[at : at + 2, at : at + 2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    return rotation @ x


def np_attention(x, fields, weights, name, n_head, layer):
    time, width = x.shape
    kinds = fields.get("attn_pattern", "dense").split(",")
    window = fields["attn_window"] if kinds[layer % len(kinds)] == "banded" else time
    d = width // n_head
    q, k, v = np_linear(x, weights, f"{name}.c_attn").reshape(time, 3, n_head, d).transpose(1, 2, 0, 3)
    y = np.zeros((time, n_head, d))
    for head in range(n_head):
        for t in range(time):
            scores, first = [], max(0, t - window + 1)
            for u in range(first, t + 1):
                a, b = q[head, t], k[head, u]
                if fields.get("qk_norm"):
                    a, b = (z / np.sqrt((z**2).mean() + 1e-5) for z in (a, b))
                if fields.get("pos") == "rope":
                    a, b = np_turned(a, t), np_turned(b, u)
                scores.append(a @ b / math.sqrt(d))
            p = np.exp(np.array(scores) - max(scores))
            y[t, head] = (p / p.sum()) @ v[head, first : t + 1]
    return np_linear(y.reshape(time, width), weights, f"{name}.c_proj")


def np_logits(model: GPT, ids, fields) -> np.ndarray:
    """A row's logits [time, vocab_size], from the weights alone; `fields` says what is not GPT-2's."""
    weights = {k.removeprefix("transformer."): v.double().numpy() for k, v in model.state_dict().items()}
    x = weights["wte.weight"][ids]
    if fields.get("pos") != "rope":
        x = x + weights["wpe.weight"][: len(ids)]
    for layer in range(SHAPE["n_layer"]):
        h = f"h.{layer}"
        x = np_smear(x, weights, f"{h}.smear_1")
        y = np_norm(x, fields, weights, f"{h}.ln_1")
        x = x + np_attention(y, fields, weights, f"{h}.attn", SHAPE["n_head"], layer)
        y = np_smear(np_norm(x, fields, weights, f"{h}.ln_2"), weights, f"{h}.smear_2")
        x = x + np_linear(np_act(np_linear(y, weights, f"{h}.mlp.c_fc"), fields), weights, f"{h}.mlp.c_proj")
    return np_norm(x, fields, weights, "ln_f") @ weights["lm_head.weight" if "tied" in fields else "wte.weight"].T


@each_field
def test_logits_and_loss_are_the_formulas(fields):
    model, ids = a_model(fields), ids_of(2, 11)
    logits, loss = model(ids[:, :-1], ids[:, 1:])
    fields = {key: value for key, value in fields.items() if (key, value) != ("tied", True)}
    expected = np.stack([np_logits(model, row[:-1].numpy(), fields) for row in ids])
    np.testing.assert_allclose(logits.detach().numpy(), expected, atol=2e-3, rtol=1e-4)
    shifted = expected - expected.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    wanted = -np.take_along_axis(log_p, ids[:, 1:, None].numpy(), -1).mean()
    assert abs(loss.item() - wanted) < 1e-3
    np.testing.assert_allclose(model(ids[:, :-1])[0][:, 0].detach().numpy(), expected[:, -1], atol=2e-3, rtol=1e-4)


# ------- each by itself


def test_relu2_is_the_square_of_relu():
    x = torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0])
    assert ACTIVATIONS["relu2"](x).tolist() == [0, 0, 0, 0.25, 9]


class Listening:
    """A cache as a layer sees the decoder's, which keeps what it is given."""

    def remember(self, k, v, window):
        self.keys, self.values = k.detach(), v.detach()  # [batch, n_head, time, head_dim]
        return k, v, None

    def before(self, x, half):
        return None


def keys_of(model, x, rotation) -> torch.Tensor:
    """The first layer's keys of its input x [batch, time, n_embd]: [batch, n_head, time, head_dim]."""
    cache = Listening()
    model.transformer.h[0].attn(x, rotation, cache)
    return cache.keys


@pytest.mark.parametrize("n_head", [12, 6, 4, 2, 1])
def test_rope_is_the_papers_rotation(n_head):
    """Of keys here, and in test_logits_and_loss_are_the_formulas of queries too."""
    model, plain = a_model({"pos": "rope"}, n_head=n_head), a_model(n_head=n_head)
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0))
    own = torch.stack([model.rotation[start : start + 9] for start in (0, 5)])  # rows at places of their own
    plain.load_state_dict(model.state_dict(), strict=False)
    unturned = keys_of(plain, x, None)
    for rotation, begins in ((model.rotation[:9], (0, 0)), (own, (0, 5))):
        found = keys_of(model, x, rotation)
        assert found.shape == (2, n_head, 9, 24 // n_head)
        for row, head, t in np.ndindex(2, n_head, 9):
            expected = np_turned(unturned[row, head, t].double().numpy(), begins[row] + t)
            np.testing.assert_allclose(found[row, head, t].numpy(), expected, atol=1e-5)
        torch.testing.assert_close(found.norm(dim=-1), unturned.norm(dim=-1))


def test_scores_under_rope_depend_on_the_distance_alone():
    """Of one head's keys with another's, all of the same input."""
    model = a_model({"pos": "rope"}, block_size=1024)
    keys = keys_of(model, torch.randn(1, 1, 24).expand(1, 1024, -1), model.rotation)
    a, b = keys[0].double()
    for distance in (0, 1, 7, 300):
        scores = (a[distance:] * b[: 1024 - distance]).sum(-1)
        torch.testing.assert_close(scores, scores[:1].expand_as(scores), atol=2e-3, rtol=0)
    assert abs((a[1] * b[0]).sum() - (a[300] * b[0]).sum()) > 0.01


def test_a_model_with_rope_does_not_know_where_a_row_begins():
    """A layer's result depends on the distances alone, and there is no position table."""
    model = a_model({"pos": "rope"})
    block, x = model.transformer.h[0], torch.randn(1, 9, 24)
    shifted = block(x, model.rotation[5:14])
    torch.testing.assert_close(block(x, model.rotation[:9]), shifted, atol=1e-4, rtol=1e-4)
    assert not any("wpe" in name for name in model.state_dict()) and "rotation" not in model.state_dict()


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_rmsnorm_has_no_gains_and_keeps_the_mean(norm):
    model = GPT(GPTConfig(**SHAPE, norm=norm))
    assert any(".ln_" in name for name, _ in model.named_parameters()) == (norm == "layernorm")
    x = torch.randn(5, 24) * 7 + 3
    for module in (model.transformer.h[1].ln_1, model.transformer.h[0].ln_2, model.transformer.ln_f):
        y = module(x)
        torch.testing.assert_close(y.square().mean(-1), torch.ones(5), atol=1e-3, rtol=0)
        assert (y.mean(-1).abs() < 1e-5).all() == (norm == "layernorm")


@pytest.mark.parametrize("pos", ["learned", "rope"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_queries_and_keys_have_the_length_of_the_root_of_their_size(qk_norm, pos):
    model, cache = a_model(qk_norm=qk_norm, pos=pos), Listening()
    attn, rotation = model.transformer.h[0].attn, model.rotation[:9] if pos == "rope" else None
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(3))
    y = attn(x, rotation, cache)
    assert torch.allclose(cache.keys.norm(dim=-1), torch.tensor(math.sqrt(12)), atol=1e-2) == qk_norm
    values = (x @ attn.c_attn.weight.T + attn.c_attn.bias)[..., 48:].view(2, 9, 2, 12).transpose(1, 2)
    torch.testing.assert_close(cache.values, values.detach(), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        attn.c_attn.weight[:48] *= 30
        attn.c_attn.bias[:48] *= 30
    louder = attn(x, rotation)  # 30 times the queries and keys are the same where they are normalised
    assert torch.allclose(y, louder, atol=1e-2) == qk_norm


def test_tied_is_one_matrix_and_untied_two_with_values_of_their_own():
    tied, untied = (GPT(GPTConfig(**SHAPE, tied=tied)) for tied in (True, False))
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert untied.lm_head.weight is not untied.transformer.wte.weight
    assert not torch.equal(untied.lm_head.weight, untied.transformer.wte.weight)
    assert untied.lm_head.weight.data_ptr() != untied.transformer.wte.weight.data_ptr()
    for w in (untied.lm_head.weight, untied.transformer.wte.weight):
        assert abs(w.std() - 0.02) < 2e-3
    x = ids_of(2, 8)
    untied(x, x)[1].backward()
    assert not torch.equal(untied.lm_head.weight.grad, untied.transformer.wte.weight.grad)


@pytest.mark.parametrize("tied", [False, True])
def test_zero_init_begins_with_no_opinion(tied):
    torch.manual_seed(3)
    model = GPT(GPTConfig(**SHAPE, zero_init=True, tied=tied, bias=False))
    x = ids_of(3, 12)
    logits, loss = model(x[:, :-1], x[:, 1:])
    zero = {name for name, p in model.named_parameters() if (p == 0).all()}
    c_proj = {f"transformer.h.{n}.{part}.c_proj.weight" for n in range(2) for part in ("attn", "mlp")}
    std = 0.02 if tied else 0.5  # the embeddings are all that the residual stream holds at first
    assert abs(model.transformer.wte.weight.std() / std - 1) < 0.1
    assert zero == c_proj | (set() if tied else {"lm_head.weight"})
    if not tied:
        assert (logits == 0).all() and loss.item() == pytest.approx(math.log(41), abs=1e-6)
    model(x[:, :-1], x[:, 1:], loss_only=True)[1].backward()
    assert (model.lm_head.weight.grad != 0).any()  # and it can begin to learn


def test_smear_begins_as_nothing_and_then_is_a_loop():
    torch.manual_seed(3)
    model = GPT(GPTConfig(**SHAPE, smear=3))
    torch.manual_seed(3)
    plain, x = GPT(GPTConfig(**SHAPE)), ids_of(2, 9)
    smears = {name: p for name, p in model.named_parameters() if "smear" in name}
    assert set(smears) == {f"transformer.h.{n}.smear_{half}.weight" for n in range(2) for half in (1, 2)}
    assert all(p.shape == (3, 24) and (p == 0).all() for p in smears.values())
    assert torch.equal(model(x, x)[0], plain(x, x)[0])
    model(x, x)[1].backward()
    assert all((p.grad != 0).any(-1).all() for p in smears.values())
    block = a_model(smear=3).transformer.h[0]
    y = torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(1))
    weights = {name: p.detach().double().numpy() for name, p in block.named_parameters()}
    s = np_smear(y[0].double().numpy(), weights, "smear_1")
    s = s + np_attention(np_norm(s, {}, weights, "ln_1"), {}, weights, "attn", 2, 0)
    z = np_smear(np_norm(s, {}, weights, "ln_2"), weights, "smear_2")
    s = s + np_linear(np_act(np_linear(z, weights, "mlp.c_fc"), {}), weights, "mlp.c_proj")
    np.testing.assert_allclose(block(y)[0].detach().numpy(), s, atol=1e-4, rtol=1e-4)


# ------- banded attention


def explicit(q, k, v, window):
    """Softmax over an explicit mask, as whole matrices: a query sees its own key and window - 1 before it."""
    t = q.size(2)
    back = torch.arange(t)[:, None] - torch.arange(t)
    scores = (q @ k.mT / math.sqrt(q.size(-1))).masked_fill((back < 0) | (back >= window), -math.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("time, window", [(1, 1), (9, 1), (9, 3), (12, 4), (13, 4), (9, 8), (9, 9), (9, 20), (300, 70)])
def test_banded_attention_and_its_gradients_are_those_of_an_explicit_mask(time, window, rounding, monkeypatch):
    """In blocks, as PyTorch's own, and in pieces, where products on a CPU are rounded (here, but not really)."""
    monkeypatch.setattr(ops, "rounds_products", lambda: rounding)
    generator = torch.Generator().manual_seed(time)
    q, k, v, weights = (torch.randn(2, 3, time, 8, generator=generator).requires_grad_() for _ in range(4))
    y, expected = ops.attention(q, k, v, None, 0.0, True, window), explicit(q, k, v, window)
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-5)
    ours = torch.autograd.grad((y * weights).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("p", [0.2, 0.5])
@pytest.mark.parametrize("time, window", [(7, 3), (300, 70), (129, 128)])
def test_banded_attention_drops_only_what_is_in_the_band(time, window, p):
    """Where all keys are alike, the probabilities are 1 / min(row + 1, window), each dropped or scaled."""
    alike, units = torch.zeros(2, 3, time, time), torch.eye(time).expand(2, 3, -1, -1)
    torch.manual_seed(3)
    y = ops.attention(alike, alike, units, None, p, True, window)
    back = torch.arange(time)[:, None] - torch.arange(time)
    assert not y[..., (back < 0) | (back >= window)].any()
    inside = (y * torch.arange(1, time + 1).clamp(max=window)[:, None])[..., (back >= 0) & (back < window)]
    kept = 1 - round(p * 256) / 256
    assert ((inside == 0) | torch.isclose(inside, torch.tensor(1 / kept))).all()
    assert (inside != 0).float().mean() == pytest.approx(kept, abs=5 * math.sqrt(p * (1 - p) / inside.numel()))


def test_a_banded_model_is_the_dense_one_with_an_explicit_mask(monkeypatch):
    """The same weights, in a model whose every attention is computed from whole matrices."""
    fields = {"attn_pattern": "dense,banded,banded", "attn_window": 3, "n_layer": 5}
    banded, dense = a_model(fields), a_model({"n_layer": 5})
    x = ids_of(3, 16)
    logits, windows = banded(x, x)[0], iter([16, 3, 3, 16, 3])
    monkeypatch.setattr("model.attention", lambda q, k, v, mask, p, is_causal, window: explicit(q, k, v, next(windows)))
    torch.testing.assert_close(logits, dense(x, x)[0], atol=1e-5, rtol=1e-5)
    monkeypatch.undo()
    assert not torch.allclose(logits, dense(x, x)[0], atol=1e-2)


def test_examples_in_a_row_are_banded_each_for_itself():
    """Packed as they are alone."""
    model = a_model({"attn_pattern": "banded,dense", "attn_window": 3, "pos": "rope"})
    one, other = ids_of(1, 7), ids_of(1, 9, seed=2)
    positions = torch.cat((torch.arange(7), torch.arange(9)))[None]
    row = torch.cat((one, other), 1)
    together = model(row, row, positions=positions)[0]
    alone = torch.cat((model(one, one)[0], model(other, other)[0]), 1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_where_nothing_is_banded_a_window_leaves_no_trace():
    """A dense model's model_args are nanoGPT's."""
    for pattern in ("dense", "dense,dense"):
        model = a_model({"attn_pattern": pattern, "attn_window": 3})
        assert model.config.model_args() == a_model().config.model_args()
        assert torch.equal(model(ids_of(2, 9))[0], a_model()(ids_of(2, 9))[0])
        model.to_hf()


def test_the_work_of_a_banded_layer_is_counted_by_its_window():
    shape = dict(n_layer=4, n_head=2, n_embd=8, vocab_size=11, block_size=100)
    with torch.device("meta"):
        dense, banded, wide = (
            GPT(GPTConfig(**shape, attn_pattern=pattern, attn_window=window))
            for pattern, window in (("dense", 10), ("dense,banded", 10), ("dense,banded", 1000))
        )
    assert dense.estimate_flops() == wide.estimate_flops() == 6 * dense.get_num_params() + 12 * 8 * 400
    assert banded.estimate_flops() == 6 * dense.get_num_params() + 12 * 8 * (100 + 10 + 100 + 10)


# ------- what stays as it was


def test_by_default_all_of_them_are_off():
    """The parameters, their names, order and values, and the model_args are nanoGPT's."""
    torch.manual_seed(11)
    model = GPT(GPTConfig(**SHAPE))
    layers = [f"transformer.h.{n}.{part}.{kind}" for n in range(2)
              for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
              for kind in ("weight", "bias")]  # fmt: skip
    names = ["transformer.wte.weight", "transformer.wpe.weight", *layers, "transformer.ln_f.weight"]
    assert list(model.state_dict()) == [*names, "transformer.ln_f.bias", "lm_head.weight"]
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == float(name.endswith("weight"))).all()
            continue
        std = 0.02 / math.sqrt(4) if "c_proj" in name else 0.02
        generator = torch.Generator().manual_seed(derive_seed(11, name))
        assert torch.equal(p, torch.empty(p.shape).normal_(0.0, std, generator=generator))
    off = {"act": "gelu", "pos": "learned", "norm": "layernorm", "qk_norm": False, "tied": True, "zero_init": False}
    torch.manual_seed(11)
    spelled = GPT(GPTConfig(**SHAPE, **off, smear=0))
    x = ids_of(2, 9)
    assert torch.equal(model(x, x)[0], spelled(x, x)[0])
    nanogpt = ["n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"]
    assert list(spelled.config.model_args()) == list(GPTConfig().model_args()) == nanogpt


@pytest.mark.parametrize("fields", [*NEW.values(), ALL], ids="+".join)
def test_a_field_leaves_the_initial_values_of_other_parameters_alone(fields):
    torch.manual_seed(5)
    plain = GPT(GPTConfig(**SHAPE)).state_dict()
    torch.manual_seed(5)
    state = GPT(GPTConfig(**SHAPE | fields)).state_dict()
    zeroed = ("c_proj.weight", "lm_head.weight") if "zero_init" in fields else ()
    own = ("lm_head.weight", "wte.weight") if fields == ALL else ("lm_head.weight",) if "tied" in fields else ()
    same = [name for name in state if name in plain and not name.endswith(zeroed + own)]
    assert len(same) >= 10 and all(torch.equal(state[name], plain[name]) for name in same)


@pytest.mark.parametrize("fields", [*NEW.values(), ALL, {"act": "gelu_tanh"}], ids="+".join)
def test_model_args_name_what_is_new_and_make_the_same_model_again(fields):
    model = a_model(fields)
    args = model.config.model_args()
    nanogpt = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
    assert {k: v for k, v in args.items() if k not in nanogpt} == fields
    again = GPT(GPTConfig(**args)).eval()
    again.load_state_dict(model.state_dict())
    assert again.config == model.config
    assert torch.equal(again(ids_of(2, 9), ids_of(2, 9))[0], model(ids_of(2, 9), ids_of(2, 9))[0])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"act": "relu"}, r"act = 'relu'.*gelu, gelu_tanh, relu2"),
        ({"pos": "alibi"}, r"pos = 'alibi'.*learned, rope"),
        ({"norm": ""}, r"norm = ''.*layernorm, rmsnorm"),
        ({"pos": "rope", "n_head": 8}, r"'rope' needs heads of even size.* 3"),
        ({"smear": -1}, r"smear = -1.*at least 0"),
        ({"smear": 16}, r"smear = 16.*below block_size = 16"),
        ({"attn_pattern": "dense,sparse"}, r"attn_pattern = 'dense,sparse'.*dense and banded"),
        ({"attn_pattern": ""}, r"attn_pattern = ''.*dense and banded"),
        ({"attn_pattern": 5}, r"attn_pattern = 5.*dense and banded"),
        ({"attn_window": 2.5}, r"attn_window = 2.5.*whole"),
        ({"attn_pattern": "banded", "attn_window": 0}, r"attn_window = 0.*at least 1"),
    ],
)
def test_values_that_make_no_sense_are_a_sentence(change, words):
    with pytest.raises(ValueError, match=words) as error:
        GPTConfig(**SHAPE | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields, difference",
    [
        ({}, 0),
        ({"act": "relu2"}, 0),
        ({"qk_norm": True}, 0),
        ({"zero_init": True}, 0),
        ({"pos": "rope"}, -16 * 24),
        ({"norm": "rmsnorm"}, -5 * 2 * 24),
        ({"tied": False}, 41 * 24),
        ({"smear": 4}, 2 * 2 * 4 * 24),
        (NEW["attn_pattern"], 0),
        (ALL, -16 * 24 - 5 * 2 * 24 + 41 * 24 + 2 * 2 * 4 * 24),
    ],
)
def test_parameters_are_counted(fields, difference):
    # embeddings and positions; in each block two norms, c_attn, c_proj, c_fc and c_proj with biases; the last norm
    block = 2 * 48 + 24 * 72 + 72 + 24 * 24 + 24 + 24 * 96 + 96 + 96 * 24 + 24
    plain = 41 * 24 + 16 * 24 + 2 * block + 48
    model = GPT(GPTConfig(**SHAPE | fields))
    assert model.get_num_params(non_embedding=False) == plain + difference
    positions = 0 if "pos" in fields else 16 * 24
    assert model.get_num_params() == plain + difference - positions
    seen = 16 + 5 if "attn_pattern" in fields else 2 * 16
    assert model.estimate_flops() == 6 * (plain + difference - positions) + 12 * 24 * seen
    hidden = model.hidden_matrices()
    assert [(tuple(p.shape), parts) for p, parts in hidden] == 2 * [
        ((72, 24), 3), ((24, 24), 1), ((96, 24), 1), ((24, 96), 1)
    ]  # fmt: skip


@each_field
def test_cropping_keeps_the_logits_of_short_rows(fields):
    model, x = a_model(fields), ids_of(2, 8)
    before = model(x, x)[0]
    model.crop_block_size(8)
    assert torch.equal(model(x, x)[0], before) and model.config.block_size == 8
    with pytest.raises(ValueError, match="block_size = 8"):
        model(ids_of(1, 9))
    again = GPT(GPTConfig(**model.config.model_args())).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x, x)[0], before)
    check_decoding(again, [5, 1, 8], 14)
    with pytest.raises(ValueError, match="at most"):
        model.crop_block_size(9)


def test_a_context_cropped_below_the_smear_still_makes_a_model_again():
    model = a_model(smear=4)
    try:
        model.crop_block_size(4)
    except ValueError as error:  # a sentence is as good
        assert "smear" in str(error)
        return
    again = GPT(GPTConfig(**model.config.model_args())).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(ids_of(2, 4))[0], model(ids_of(2, 4))[0])


@each_field
def test_no_position_sees_a_later_one(fields):
    model, x = a_model(fields), ids_of(2, 16)
    for at in (1, 6, 15):
        changed = x.clone()
        changed[:, at:] = (changed[:, at:] + 1) % 41
        before, after = model(x, x)[0], model(changed, x)[0]
        torch.testing.assert_close(before[:, :at], after[:, :at], atol=0, rtol=0)
        assert (before[:, at:] != after[:, at:]).any(-1).all()


# ------- over the key-value cache


@torch.no_grad()
def check_decoding(model: GPT, lengths: list[int], new: int, compiled: bool = False, atol: float = 2e-4) -> None:
    """Rows of random tokens, their prompts of these lengths, past the end of the context: each step's logits are those
    of reading the row anew, of which the newer half stays once the context is full. A row rests for some steps."""
    n, generator = model.config.block_size, torch.Generator().manual_seed(7)
    rows = [torch.randint(model.config.vocab_size, (k,), generator=generator).tolist() for k in lengths]
    begins = [max(0, k - n) for k in lengths]
    decoder = Decoder(model, len(rows), n, compiled)
    logits, read = decoder.prefill(rows), range(len(rows))
    for step in range(new + 1):
        for row in read:
            if len(rows[row]) - begins[row] > n:
                begins[row] = len(rows[row]) - max(1, n // 2)
            expected = model(torch.tensor([rows[row][begins[row] :]]))[0][0, 0]
            message = functools.partial("{2}\nrow {0}, step {1}".format, row, step)
            torch.testing.assert_close(logits[row], expected, atol=atol, rtol=1e-4, msg=message)
        ids = torch.randint(model.config.vocab_size, (len(rows),), generator=generator).tolist()
        resting = {len(rows) - 1} if 2 <= step < 6 else {0} if step in (8, 9) else set()
        ids = [None if row in resting and len(rows) > 1 else id for row, id in enumerate(ids)]
        read = [row for row, id in enumerate(ids) if id is not None]
        for row in read:
            rows[row].append(ids[row])
        logits = decoder.decode(ids)


@each_field
def test_reading_on_is_reading_anew(fields):
    model = a_model(fields)
    check_decoding(model, [1, 5, 15, 16, 32, 5], 40)
    check_decoding(model, [3, 3], 40)
    check_decoding(model, [1], 40)


@pytest.mark.parametrize("smear", [1, 3, 15])
def test_a_smear_longer_than_the_prompt(smear):
    """And than what is left of a full context."""
    check_decoding(a_model(ALL, smear=smear), [2, 1, 16], 40)
    check_decoding(a_model(ALL, smear=min(smear, 2), block_size=3), [2, 1, 3], 12)


@pytest.mark.parametrize("smear", [2, 5])
def test_rows_begin_anew_among_others(smear):
    model = a_model(ALL, smear=smear)
    decoder = Decoder(model, 3, 16)
    decoder.prefill([[1, 2, 3], [4], [5, 6, 7, 8, 9]])
    decoder.decode([10, 11, 12])
    first = decoder.prefill([[20, 21]], [1])
    torch.testing.assert_close(first[0], model(torch.tensor([[20, 21]]))[0][0, 0], atol=2e-4, rtol=1e-4)
    logits = decoder.decode([13, 22, 14])
    for row, ids in enumerate(([1, 2, 3, 10, 13], [20, 21, 22], [5, 6, 7, 8, 9, 12, 14])):
        torch.testing.assert_close(logits[row], model(torch.tensor([ids]))[0][0, 0], atol=2e-4, rtol=1e-4)


@each_field
@torch.no_grad()
def test_greedy_generation_takes_the_likeliest_after_reading_anew(fields):
    model, new, n = a_model(fields), 40, 16
    for length in (1, 5, 16, 20):
        prompt = ids_of(2, length, seed=length)
        found = model.generate(prompt, new, temperature=0)
        assert found.shape == (2, length + new) and torch.equal(found[:, :length], prompt)
        begin = max(0, length - n)
        for at in range(length, length + new):
            if at - begin > n:
                begin = at - n // 2
            logits = model(found[:, begin:at])[0][:, 0]
            behind = logits.amax(-1) - logits.gather(1, found[:, at : at + 1])[:, 0]
            assert (behind < 1e-3).all(), (length, at)


# ------- in other precisions, compiled, and in training


@each_field
def test_bfloat16_runs_and_is_near(fields):
    torch.manual_seed(0)
    model, x = GPT(GPTConfig(**SHAPE | fields | {"dropout": 0.1})), ids_of(3, 13)
    model.eval()
    wanted = model(x[:, :-1], x[:, 1:])[1]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x[:, :-1], x[:, 1:], loss_only=True)[1]
        trained = model.train()(x[:, :-1], x[:, 1:], loss_only=True)[1]
    assert abs(loss.item() - wanted.item()) < 0.02
    trained.backward()
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32 and p.grad.isfinite().all(), name
    with torch.autocast("cpu", torch.bfloat16):
        check_decoding(model.eval(), [1, 5, 16], 20, atol=0.05)


@each_field
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_loss_alone_is_the_plain_forwards(fields, dropout, monkeypatch):
    model, x = a_model(fields, dropout=dropout).train(), ids_of(3, 13)
    targets = x[:, 1:].clone()
    targets[0, 3:7] = -1
    for large in (1, 1 << 24):  # in pieces, and whole
        monkeypatch.setattr(ops, "LARGE", large)
        torch.manual_seed(2)
        logits, loss = model(x[:, :-1], targets)
        torch.manual_seed(2)
        none, alone = model(x[:, :-1], targets, loss_only=True)
        assert logits.shape == (3, 12, 41) and none is None
        torch.testing.assert_close(alone, loss, atol=1e-5, rtol=1e-5)
        one, other = (torch.autograd.grad(z, list(model.parameters())) for z in (alone, loss))
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


@needs_compiler
def test_compiled_it_is_the_same_model():
    model, x = a_model(ALL, n_layer=1), ids_of(3, 17)
    x, y = x[:, :-1].contiguous(), x[:, 1:].contiguous()
    wanted = model(x, y, loss_only=True)[1]
    gradients = torch.autograd.grad(wanted, list(model.parameters()))
    loss = torch.compile(model)(x, y, loss_only=True)[1]
    assert abs(loss.item() - wanted.item()) < 1e-4
    found = torch.autograd.grad(loss, list(model.parameters()))
    for (name, _), one, other in zip(model.named_parameters(), found, gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3, msg=lambda text, n=name: f"{n}: {text}")


@needs_compiler
def test_compiled_it_reads_on_as_it_does_anew():
    check_decoding(a_model(ALL, n_layer=1), [1, 5, 16], 30, compiled=True)


# ------- into other layouts


@pytest.mark.parametrize("fields", [*NEW.values(), ALL], ids="+".join)
def test_gpt2s_layout_has_no_place_for_it_and_the_sentence_says_for_what(fields):
    with pytest.raises(ValueError) as error:
        a_model(fields).to_hf()
    named = [key for key in fields if key != "act" or len(fields) == 1]
    assert all(key in str(error.value) for key in named) and "\n" not in str(error.value)


@pytest.mark.parametrize("fields", [{"act": "relu2"}, ALL], ids="+".join)
def test_exporting_it_is_a_sentence_and_status_2(tmp_path, fields):
    tokenizer = CharTokenizer("".join(map(chr, range(65, 65 + 40))), byte_fallback=False, end_of_text=True)
    model = a_model(fields)
    state = {"model": model.state_dict(), "model_args": model.config.model_args(), "tokenizer": tokenizer.meta()}
    checkpoint.save(tmp_path / "ckpt.pt", state)
    done = run_script("extras/export.py", f"--out_dir={tmp_path}", cwd=tmp_path)
    said = [line for line in done.stderr.splitlines() if not line.startswith("overriding:")]
    assert done.returncode == 2 and len(said) == 1 and "no place for" in said[0], done.stderr
    assert not (tmp_path / "hf").exists()
