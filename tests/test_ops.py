"""The model's operations: against formulas written out here, and finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F

import ops


def same_draws(seed, function, *args):
    torch.manual_seed(seed)
    return function(*args)


def queries_keys_values(batch, heads, time, width, dtype=torch.float32):
    """As the model has them: each a slice of one tensor, transposed."""
    generator = torch.Generator().manual_seed(time)
    qkv = torch.randn(batch, time, 3, heads, width, generator=generator, dtype=dtype)
    return [x.transpose(1, 2).requires_grad_() for x in qkv.unbind(2)]


def multipliers(seed, batch, heads, time, p):
    """What attention multiplies each probability with, [batch, heads, time, time], told from outside: where all keys
    are alike and the values are unit vectors, the result is the probabilities themselves, 1 / (row + 1) times that."""
    alike, units = torch.zeros(batch, heads, time, time), torch.eye(time).expand(batch, heads, -1, -1)
    y = same_draws(seed, ops.attention, alike, alike, units, None, p, True)
    return y * torch.arange(1, time + 1)[:, None]


def really_kept(p):
    """A byte decides, so p is a multiple of 1/256."""
    return 1 - round(p * 256) / 256


@pytest.mark.parametrize("piece, rows", [(1 << 18, 128), (1000, 128), (1, 5)])
@pytest.mark.parametrize("p", [0.2, 0.5])
@pytest.mark.parametrize("time", [1, 7, 128, 129, 300])
def test_attention_with_dropout_is_the_formula_with_the_same_masks(time, p, piece, rows, monkeypatch):
    """And so are its gradients, in pieces of any size."""
    monkeypatch.setattr(ops, "PIECE", piece)
    monkeypatch.setattr(ops, "ROWS", rows)
    q, k, v = queries_keys_values(2, 3, time, 16)
    weights = torch.randn(2, 3, time, 16, generator=torch.Generator().manual_seed(1))
    y = same_draws(5, ops.attention, q, k, v, None, p, True)
    ours = torch.autograd.grad((y * weights).sum(), (q, k, v))

    mask = multipliers(5, 2, 3, time, p) > 0
    scores = (q @ k.mT / math.sqrt(16)).masked_fill(torch.ones(time, time).triu(1) > 0, -math.inf)
    expected = (scores.softmax(-1) * mask / really_kept(p)) @ v
    wanted = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    assert time == 1 or 0 < mask.sum() < 6 * time * (time + 1) / 2


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_the_share_that_attention_drops_is_p_and_the_mean_stays(p):
    batch, heads, time = 4, 5, 200
    m = multipliers(0, batch, heads, time, p)
    seen = torch.ones(time, time).tril() > 0
    assert (m[..., ~seen] == 0).all()
    n = batch * heads * int(seen.sum())
    sigma = math.sqrt(p * (1 - p) / n)
    dropped = m[..., seen] == 0
    assert abs(dropped.double().mean() - (1 - really_kept(p))) < 4 * sigma
    assert abs((1 - really_kept(p)) - p) <= 1 / 512
    torch.testing.assert_close(m[..., seen][~dropped], torch.tensor(1 / really_kept(p)).expand(int((~dropped).sum())))
    assert abs(m[..., seen].double().mean() - 1) < 4 * sigma / (1 - p)
    # each head of each sequence has a mask of its own, and each key of a query: chance alone makes two agree
    agreement, few = p * p + (1 - p) ** 2, seen.sum().item()
    for one, other in ((dropped[0, 0], dropped[0, 1]), (dropped[0, 0], dropped[1, 0]), (dropped[0, 0], dropped[3, 4])):
        assert abs((one == other).double().mean() - agreement) < 5 * math.sqrt(agreement * (1 - agreement) / few)
    last = m[:, :, -1] == 0  # [batch, heads, time]
    neighbours = (last[..., 1:] == last[..., :-1]).double().mean()
    assert abs(neighbours - agreement) < 5 * math.sqrt(agreement * (1 - agreement) / last.numel())


def test_the_seed_decides_what_attention_drops():
    q, k, v = queries_keys_values(2, 2, 40, 8)
    one, again, other = (same_draws(seed, ops.attention, q, k, v, None, 0.2, True) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert not torch.equal(one, ops.attention(q, k, v, None, 0.2, True).detach())


def test_without_dropout_attention_is_pytorchs():
    q, k, v = queries_keys_values(2, 3, 33, 8)
    mask = torch.rand(2, 1, 33, 33) < 0.7
    mask[..., 0] = True
    for given, is_causal in ((None, True), (None, False), (mask, False)):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=given, is_causal=is_causal)
        assert torch.equal(ops.attention(q, k, v, given, 0.0, is_causal), expected)


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("time", [7, 129])
def test_attention_with_rounded_products_is_near(time, p):
    torch.set_float32_matmul_precision("medium")  # bfloat16, on a CPU that has it
    q, k, v = queries_keys_values(2, 3, time, 16)
    weights = torch.randn(2, 3, time, 16, generator=torch.Generator().manual_seed(1))
    y = same_draws(5, ops.attention, q, k, v, None, p, True)
    ours = torch.autograd.grad((y * weights).sum(), (q, k, v))
    torch.set_float32_matmul_precision("highest")
    mask = multipliers(5, 2, 3, time, p) > 0 if p else torch.ones(time, time)
    scores = (q @ k.mT / math.sqrt(16)).masked_fill(torch.ones(time, time).triu(1) > 0, -math.inf)
    expected = (scores.softmax(-1) * mask / really_kept(p)) @ v
    wanted = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for one, other in zip((y, *ours), (expected, *wanted), strict=True):
        assert one.dtype == torch.float32 and (one - other).norm() < 0.02 * other.norm()


def test_attention_that_is_not_causal_drops_too():
    alike, units = torch.zeros(3, 4, 50, 50), torch.eye(50).expand(3, 4, -1, -1)
    share = (ops.attention(alike, alike, units, None, 0.2, False) == 0).double().mean()
    assert abs(share - 0.2) < 5 * math.sqrt(0.16 / 30_000)


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_gives_no_gradient_to_what_it_drops(p):
    x = torch.full((300, 500), 3.0, requires_grad=True)
    y = same_draws(4, ops.dropout, x, p, True)
    sigma = math.sqrt(p * (1 - p) / x.numel())
    kept, weights = y != 0, torch.randn(300, 500)
    assert abs((~kept).double().mean() - (1 - really_kept(p))) < 4 * sigma
    assert abs(y.double().mean() / 3 - 1) < 4 * sigma / (1 - p)
    torch.testing.assert_close(y[kept], torch.tensor(3 / really_kept(p)).expand(int(kept.sum())))
    (dx,) = torch.autograd.grad((y * weights).sum(), x)
    assert (dx[~kept] == 0).all()
    torch.testing.assert_close(dx[kept], weights[kept] / really_kept(p))
    assert torch.equal(same_draws(4, ops.dropout, x, p, True), y)
    assert not torch.equal(same_draws(5, ops.dropout, x, p, True), y)


def test_every_place_is_dropped_equally_often():
    """Eight places share a draw: none of its bytes may have fewer bits than the others."""
    p, n = 0.25, 80_000
    for remainder in range(2):  # a size that is no multiple of eight, too
        y = same_draws(remainder, ops.dropout, torch.ones(8 * n + 3 * remainder), p, True)
        dropped = (y[: 8 * n] == 0).view(n, 8).double()
        assert ((dropped.mean(0) - p).abs() < 5 * math.sqrt(p * (1 - p) / n)).all()
        agreement = (dropped[:, 1:] == dropped[:, :-1]).double().mean(0)
        assert ((agreement - (p * p + (1 - p) ** 2)).abs() < 5 * math.sqrt(0.25 / n)).all()


def test_dropout_is_nothing_where_nothing_is_dropped():
    x = torch.randn(3, 4)
    assert ops.dropout(x, 0.5, False) is x and ops.dropout(x, 0.0, True) is x


@pytest.mark.parametrize("shape", [(4, 7), (2, 3, 2, 6), (1, 1), (3, 0, 5)])
def test_rms_norm_and_relu2_are_their_formulas_and_so_are_their_gradients(shape):
    torch.manual_seed(0)
    x = (torch.randn(shape, dtype=torch.float64) * 3).requires_grad_()
    small = (torch.randn(shape, dtype=torch.float64) * 1e-3).requires_grad_()  # where the 1e-5 shows
    for one in (x, small):
        torch.testing.assert_close(ops.rms_norm(one), one / (one**2).mean(-1, keepdim=True).add(1e-5).sqrt())
        assert torch.autograd.gradcheck(ops.rms_norm, one, eps=1e-7)
    torch.testing.assert_close(ops.relu2(x), x.clamp(min=0) ** 2)
    assert torch.autograd.gradcheck(ops.relu2, x)
    nothing = torch.zeros(2, 5, requires_grad=True)
    for function in (ops.rms_norm, ops.relu2):
        y = function(nothing)
        assert (y == 0).all() and torch.autograd.grad(y.sum(), nothing)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_and_relu2_keep_the_dtype_and_their_input(dtype):
    torch.manual_seed(0)
    x = torch.randn(5, 2, 40).to(dtype).transpose(0, 1)
    precise, tolerance = x.double().requires_grad_(), 1e-5 if dtype == torch.float32 else 2e-2
    for function, formula in (
        (ops.rms_norm, lambda x: x / (x**2).mean(-1, keepdim=True).add(1e-5).sqrt()),
        (ops.relu2, lambda x: x.clamp(min=0) ** 2),
    ):
        given, weights = x.clone().requires_grad_(), torch.randn(2, 5, 40).to(dtype)
        y = function(given)
        (dx,) = torch.autograd.grad(y, given, weights)
        (wanted,) = torch.autograd.grad(formula(precise), precise, weights.double())
        assert y.dtype == dx.dtype == dtype and torch.equal(given, x)
        torch.testing.assert_close(y.double(), formula(precise), atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(dx.double(), wanted, atol=2 * tolerance, rtol=tolerance)


def smeared(x, weight):
    """The sum, token by token."""
    rows = []
    for t in range(x.size(1)):
        y = x[:, t]
        for n in range(1, len(weight) + 1):
            if t - n >= 0:
                y = y + weight[n - 1] * x[:, t - n]
        rows.append(y)
    return torch.stack(rows, 1)


@pytest.mark.parametrize("time, n", [(1, 1), (1, 4), (2, 4), (5, 4), (4, 4), (3, 1), (6, 2)])
def test_smear_is_an_explicit_loop_and_so_are_its_gradients(time, n):
    torch.manual_seed(0)
    x = torch.randn(3, time, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(n, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.smear, (x, weight))
    y, expected = ops.smear(x, weight), smeared(x, weight)
    torch.testing.assert_close(y, expected)
    dy = torch.randn(y.shape, dtype=torch.float64)
    ours = torch.autograd.grad(y, (x, weight), dy)
    wanted = torch.autograd.grad(expected, (x, weight), dy, materialize_grads=True)  # zeros where nothing was mixed
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_smear_of_half_precision_has_gradients_of_the_weights_own():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 4, requires_grad=True)
    weight = torch.randn(2, 4, requires_grad=True)
    wanted = torch.autograd.grad(smeared(x, weight).sum(), (x, weight))
    half = x.detach().bfloat16().requires_grad_()
    y = ops.smear(half, weight)
    dx, dw = torch.autograd.grad(y.sum(), (half, weight))
    assert y.dtype == dx.dtype == torch.bfloat16 and dw.dtype == torch.float32
    torch.testing.assert_close(dx.float(), wanted[0], atol=0.05, rtol=0.02)
    torch.testing.assert_close(dw, wanted[1], atol=0.05, rtol=0.02)


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("n, vocab_size", [(96, 1000), (37, 1531), (1, 2000)])
@pytest.mark.parametrize("large", [1, 1 << 24])
def test_the_loss_in_pieces_is_that_of_whole_logits(n, vocab_size, parts, large, monkeypatch):
    """And so are its gradients, scaled as in gradient accumulation."""
    monkeypatch.setattr(ops, "LARGE", large)
    torch.manual_seed(0)
    x = torch.randn(n, 24, requires_grad=True)
    weight = torch.randn(vocab_size, 24, requires_grad=True)
    targets = torch.randint(vocab_size, (n,))
    targets[1::5] = -1
    loss = ops.cross_entropy(x, weight, targets)
    ours = torch.autograd.grad(loss / parts, (x, weight))
    logits = x @ weight.T
    picked = targets >= 0
    expected = (logits.logsumexp(-1) - logits.gather(1, targets.clamp(min=0)[:, None])[:, 0])[picked].mean()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets, ignore_index=-1), atol=1e-5, rtol=1e-5)
    for one, other in zip(ours, torch.autograd.grad(expected / parts, (x, weight)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_loss_in_pieces_where_no_gradients_are_asked_for(monkeypatch):
    monkeypatch.setattr(ops, "LARGE", 1)
    x, weight, targets = torch.randn(60, 32), torch.randn(1000, 32) * 0.2, torch.arange(60)
    expected = F.cross_entropy(x @ weight.T, targets)
    with torch.no_grad():
        torch.testing.assert_close(ops.cross_entropy(x, weight, targets), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("large", [1, 1 << 40])
def test_under_autocast_products_are_rounded_but_not_the_loss(large, monkeypatch):
    """log.jsonl has it: in bfloat16 a loss near 10 would be known to 0.06 only."""
    monkeypatch.setattr(ops, "LARGE", large)
    torch.manual_seed(0)
    x, weight = torch.randn(768, 64, requires_grad=True), (torch.randn(5000, 64) * 0.2).requires_grad_()
    targets = torch.randint(5000, (768,))
    expected = F.cross_entropy(x @ weight.T, targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.cross_entropy(x, weight, targets)
    for one, other in zip(
        torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(expected, (x, weight)), strict=True
    ):
        assert one.dtype == torch.float32 and (one - other).norm() < 0.02 * other.norm()
    assert loss.dtype == torch.float32 and abs(loss.item() - expected.item()) < 1e-3
