"""Muon against the singular values of its matrices, against torch.optim.Muon and against arithmetic."""

import pytest
import torch

from model import GPT, GPTConfig
from muon import Muon, build_optimizers, orthogonalized

ALL_NEW = dict(act="relu2", pos="rope", norm="rmsnorm", qk_norm=True, tied=False, zero_init=True, smear=2)
SHAPE = dict(n_layer=3, n_head=2, n_embd=32, vocab_size=50, block_size=16)
SHAPES = [(24, 24), (20, 60), (60, 20), (1, 9), (9, 1), (128, 32)]


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quintic(s: torch.Tensor) -> torch.Tensor:
    """Five steps of the polynomial on singular values that are divided by the root of the sum of their squares."""
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


@pytest.mark.parametrize("rows, cols", SHAPES)
def test_orthogonalized_is_the_quintic_of_the_singular_values(rows, cols):
    """And the singular vectors are what they were: so every entry is known, from a decomposition in float64."""
    x = gaussian(4, rows, cols, seed=rows) * torch.tensor([1.0, 1e-3, 50.0, 7.0])[:, None, None]
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    expected = u @ torch.diag_embed(quintic(s)) @ vh
    found = orthogonalized(x)
    assert found.dtype == x.dtype and found.shape == x.shape
    torch.testing.assert_close(found.double(), expected, atol=3e-4, rtol=0)
    for one, whole in zip(x, found, strict=True):
        torch.testing.assert_close(orthogonalized(one[None])[0], whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows, cols", SHAPES)
def test_singular_values_come_near_to_one_and_the_vectors_stay(rows, cols):
    x = gaussian(3, rows, cols, seed=cols).double()
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    turned = u.mT @ orthogonalized(x.float()).double() @ vh.mT  # diagonal where the singular vectors are the same
    values = turned.diagonal(dim1=-2, dim2=-1)
    assert (turned - torch.diag_embed(values)).abs().max() < 1e-3
    near_zero = s < s.square().sum(-1, keepdim=True).sqrt() / 400  # of a square one, too near for five steps
    assert near_zero.sum() <= 3 * (rows == cols)
    assert (values[~near_zero] > 0.65).all() and (values < 1.25).all()


@pytest.mark.parametrize("rows, cols", SHAPES)
def test_rounded_products_keep_it_near(rows, cols):
    torch.set_float32_matmul_precision("medium")  # bfloat16, on a CPU that has it
    x = gaussian(3, rows, cols, seed=cols)
    found = orthogonalized(x)
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    expected = u @ torch.diag_embed(quintic(s)) @ vh
    assert found.dtype == torch.float32 and (found - expected).norm() < 0.06 * expected.norm()


def test_a_matrix_of_zeros_stays_zero():
    assert (orthogonalized(torch.zeros(2, 4, 6)) == 0).all()


def steps(optimizers, params, seeds):
    """A step for each seed, which decides the gradients with a parameter's place; the parameters after each step."""
    after = []
    for seed in seeds:
        for i, p in enumerate(params):
            p.grad = gaussian(*p.shape, seed=seed + 100 * i)
        for optimizer in optimizers:
            optimizer.step()
        after.append([p.detach().clone() for p in params])
    return after


@pytest.mark.parametrize("rows, cols", [(24, 24), (20, 60), (60, 20)])
@pytest.mark.parametrize("momentum, weight_decay", [(0.95, 0.1), (0.0, 0.0), (0.6, 0.5)])
def test_five_steps_are_those_of_pytorchs_muon(rows, cols, momentum, weight_decay):
    theirs = getattr(torch.optim, "Muon", None) or pytest.skip("this PyTorch has no Muon")
    start = gaussian(rows, cols, seed=9)
    ours, other = (torch.nn.Parameter(start.clone()) for _ in range(2))
    one = Muon([{"params": [ours]}], 0.05, momentum, weight_decay)
    reference = theirs([other], 0.05, weight_decay, momentum, nesterov=True, adjust_lr_fn="original")
    found, wanted = (steps([o], [p], range(5)) for o, p in ((one, ours), (reference, other)))
    before = start
    for [a], [b] in zip(found, wanted, strict=True):
        assert (a - b).norm() < 2e-2 * (b - before).norm() * 5**0.5  # bfloat16's rounding adds up
        before = b
    first = (found[0][0] - start * (1 - 0.05 * weight_decay), wanted[0][0] - start * (1 - 0.05 * weight_decay))
    assert (first[0] - first[1]).norm() < 2e-2 * first[1].norm()


@pytest.mark.parametrize("rows, cols", [(16, 16), (12, 48), (48, 12)])
def test_two_steps_by_hand(rows, cols):
    """Nesterov: what is orthogonalised is g + momentum * (m - g), with m += (1 - momentum) * (g - m)."""
    lr, decay, momentum = 0.03, 0.2, 0.9
    p = torch.nn.Parameter(gaussian(rows, cols, seed=1))
    expected, m = p.detach().double().clone(), torch.zeros(rows, cols, dtype=torch.float64)
    optimizer = Muon([{"params": [p]}], lr, momentum, decay)
    for seed in (2, 3):
        p.grad = gaussian(rows, cols, seed=seed)
        g = p.grad.double()
        m += (1 - momentum) * (g - m)
        u, s, vh = torch.linalg.svd(g + momentum * (m - g), full_matrices=False)
        expected *= 1 - lr * decay
        expected -= lr * max(1, rows / cols) ** 0.5 * (u * quintic(s)) @ vh
        optimizer.step()
        torch.testing.assert_close(p.detach().double(), expected, atol=2e-5, rtol=0)


def test_without_a_rate_nothing_moves_and_without_a_gradient_neither():
    p, q = (torch.nn.Parameter(gaussian(4, 6, seed=s)) for s in (0, 1))
    optimizer = Muon([{"params": [p, q]}], 0.0, 0.9, 0.5)
    p.grad = gaussian(4, 6, seed=2)
    before = p.detach().clone(), q.detach().clone()
    optimizer.step()
    assert torch.equal(p, before[0]) and torch.equal(q, before[1])
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    assert not torch.equal(p, before[0]) and torch.equal(q, before[1])


def test_the_parts_of_a_tensor_are_matrices_of_their_own():
    """Query, key and value in one tensor move as three tensors do; as one matrix, they would not."""
    start = gaussian(96, 32, seed=3)
    whole, single = (torch.nn.Parameter(start.clone()) for _ in range(2))
    parts = [torch.nn.Parameter(part.clone()) for part in start.chunk(3)]
    others = [torch.nn.Parameter(gaussian(32, 32, seed=s)) for s in (4, 5)]  # of the parts' shape, among them
    optimizers = [
        Muon([{"params": [whole], "parts": 3}, {"params": [others[0]]}], 0.05, 0.9, 0.1),
        Muon([{"params": [*parts, others[1]]}], 0.05, 0.9, 0.1),
        Muon([{"params": [single]}], 0.05, 0.9, 0.1),
    ]
    for step in range(3):
        gradient = gaussian(96, 32, seed=10 + step)
        gradient[:32] *= 100  # would drown the others in one matrix
        whole.grad, single.grad = gradient.clone(), gradient.clone()
        for part, g in zip(parts, gradient.chunk(3), strict=True):
            part.grad = g.clone()
        for other in others:
            other.grad = gaussian(32, 32, seed=20 + step)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(whole.detach(), torch.cat([p.detach() for p in parts]), atol=1e-6, rtol=0)
    assert (whole - single).abs().max() > 1e-2


def test_matrices_of_one_shape_do_not_mix():
    starts = [gaussian(10, 14, seed=s) for s in range(3)]
    together = [torch.nn.Parameter(s.clone()) for s in starts]
    alone = [torch.nn.Parameter(s.clone()) for s in starts]
    after = steps([Muon([{"params": together}], 0.05, 0.9, 0.1)], together, range(3))[-1]
    separate = steps([Muon([{"params": [p]}], 0.05, 0.9, 0.1) for p in alone], alone, range(3))[-1]
    for one, other in zip(after, separate, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_saved_and_loaded_it_goes_on_bit_for_bit(tmp_path):
    def fresh():
        params = [torch.nn.Parameter(gaussian(*shape)) for shape in ((24, 8), (8, 8), (16, 8))]
        groups = [{"params": params[:1], "parts": 3}, {"params": params[1:]}]
        return params, Muon(groups, 0.05, 0.9, 0.1)

    params, optimizer = fresh()
    steps([optimizer], params, range(3))
    torch.save((params, optimizer.state_dict()), tmp_path / "state.pt")
    wanted = steps([optimizer], params, range(3, 6))
    values, state = torch.load(tmp_path / "state.pt", weights_only=True)
    params, optimizer = fresh()
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(value)
    optimizer.load_state_dict(state)
    assert [group["parts"] for group in optimizer.param_groups] == [3, 1]
    for after, expected in zip(steps([optimizer], params, range(3, 6)), wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(after, expected, strict=True))


def built(model, optim):
    return build_optimizers(model, optim, 0.1, 1e-3, (0.9, 0.95), 1e-8, 0.02, 0.95, "cpu")


@pytest.mark.parametrize("fields", [{}, {"bias": False}, ALL_NEW, {"tied": False}], ids=str)
@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_every_parameter_is_in_exactly_one_optimizer(fields, optim):
    model = GPT(GPTConfig(**SHAPE | fields))
    names = {p: name for name, p in model.named_parameters()}
    optimizers = built(model, optim)
    of = [[names[p] for group in o.param_groups for p in group["params"]] for o in optimizers]
    everywhere = [name for one in of for name in one]
    assert len(everywhere) == len(set(everywhere)) == len(names) and set(everywhere) == set(names.values())
    assert isinstance(optimizers[0], torch.optim.AdamW) and len(optimizers) == (2 if optim == "muon" else 1)
    if optim == "muon":
        assert set(of[1]) == {
            f"transformer.h.{n}.{name}.weight"
            for n in range(3)
            for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        }
        for group in optimizers[1].param_groups:
            assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.02, 0.95, 0.1)
            assert {"c_attn" in names[p] for p in group["params"]} == {group["parts"] == 3}
        assert {group["parts"] for group in optimizers[1].param_groups} == {1, 3}
    for group in optimizers[0].param_groups:
        assert all((p.dim() >= 2) == (group["weight_decay"] == 0.1) for p in group["params"])


def test_a_model_moves_by_orthogonal_matrices():
    """One step of a whole model: the update of each block's matrix has singular values near one, its heads' too."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE | ALL_NEW | {"zero_init": False, "bias": False}))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adamw, muon = build_optimizers(model, "muon", 0.0, 1e-3, (0.9, 0.95), 1e-8, 0.02, 0.95, "cpu")
    x = torch.randint(50, (8, 17))
    model(x[:, :-1], x[:, 1:], loss_only=True)[1].backward()
    adamw.step()
    names = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert not any(".c_" in name for name in names) and len(names) == 2 + 2 * 3
    muon.step()
    for name, p in model.named_parameters():
        if ".c_" in name:
            update = ((before[name] - p) / 0.02).detach().double()
            for part in update.chunk(3) if "c_attn" in name else [update]:
                values = torch.linalg.svdvals(part / max(1, part.size(0) / part.size(1)) ** 0.5)
                assert values.max() < 1.25 and values.median() > 0.65, name
