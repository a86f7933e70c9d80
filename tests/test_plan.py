"""What a run would take: the memory formula against measured peaks, time and compute against runs that were run."""

import json
import math
import re
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from conftest import TINY_ARGS, run_script
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from configurator import UserError, configure
from extras import plan
from extras.memory import activation_bytes, checkpoint_bytes, memory_of, state_bytes
from model import GPT, GPTConfig
from muon import build_optimizers

# n_layer, n_head, n_embd, block_size, sequences, vocab_size, bias: vocabularies that are small and large beside the
# width. The fourth has its peak at the embeddings; the last so many logits that float32 does not hold them at once.
SHAPES = [
    (2, 2, 64, 128, 8, 65, True),
    (6, 4, 128, 64, 4, 96, False),
    (3, 8, 256, 128, 2, 300, True),
    (2, 4, 256, 32, 1, 10000, True),
    (4, 4, 192, 32, 16, 5000, False),
    (1, 2, 64, 512, 2, 17000, True),
]


def figures(*argv: str) -> dict:
    """What --json prints after this command line."""
    done = plan.figures_for(configure(vars(plan), argv=argv))[0]
    return json.loads(json.dumps(done))


def lines(*argv: str) -> list[str]:
    return plan.figures_for(configure(vars(plan), argv=argv))[1]


def measured(config: GPTConfig, sequences: int, checkpointing: bool, autocast: bool) -> int:
    """Bytes that a forward and backward pass allocates at its peak, its gradients being there; every allocation and
    release of PyTorch's on the CPU is counted."""
    model = GPT(config)
    if checkpointing:
        for block in model.transformer.h:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    x = torch.randint(config.vocab_size, (sequences, config.block_size))

    def micro_step() -> None:
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = model(x, x, loss_only=True)[1]
        loss.backward()

    micro_step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        micro_step()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert abs(now) < 1000, "what was allocated was not all released, or not all was seen"
    return peak


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_activations_as_measured(shape, autocast, checkpointing):
    n_layer, n_head, n_embd, block_size, sequences, vocab_size, bias = shape
    config = GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, bias=bias)
    formula = activation_bytes(config, sequences, checkpointing, autocast)
    found = measured(config, sequences, checkpointing, autocast)
    print(f"{formula / 1e6:.2f} MB by the formula, {found / 1e6:.2f} measured")
    # In bfloat16 a CPU rearranges matrices in memory of its own, which a GPU does not.
    assert formula == pytest.approx(found, rel=0.1 if autocast else 0.03)


def test_activations_of_korthikantis_form():
    """Their 34 bytes a token, layer and channel without the attention matrix are 11 of attention, 19 of the MLP and 4
    of LayerNorms. Without dropout's masks (1 + 1) they are 32; float32 makes the LayerNorms' inputs 8 in place of 4."""
    at = partial(GPTConfig, block_size=1024, vocab_size=1, n_head=8, n_embd=512)
    token = (
        activation_bytes(at(n_layer=9), 4) - activation_bytes(at(n_layer=8), 4) - 2 * (12 * 512**2 + 9 * 512)
    ) / 4096
    assert token == 36 * 512 + 4 * 8 + 16


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_states_and_checkpoints_as_they_are(stories, tmp_path, optim):
    done = run_script(
        "train.py", f"--dataset={stories}", f"--optim={optim}", "--out_dir=out", "--max_iters=1", "--eval_interval=1",
        *TINY_ARGS, "--n_embd=128", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    state = torch.load(tmp_path / "out" / "last.pt", weights_only=True)
    model = GPT(GPTConfig(**state["model_args"]))
    weights, gradients, moments = state_bytes(model, optim)
    ckpt, last = checkpoint_bytes(model, optim)
    for name, expected in (("ckpt.pt", ckpt), ("last.pt", last)):
        assert (tmp_path / "out" / name).stat().st_size == pytest.approx(expected, rel=0.03), name
    optimizers = build_optimizers(model, optim, 0.1, 1e-3, (0.9, 0.95), 1e-8, 0.02, 0.95, "cpu")
    x = torch.zeros(1, 8, dtype=torch.long)
    model(x, x)[1].backward()
    assert weights == sum(p.nbytes for p in model.parameters())
    assert gradients == sum(p.grad.nbytes for p in model.parameters())
    for optimizer in optimizers:
        optimizer.step()
    kept = [v for each in optimizers for state in each.state.values() for v in state.values() if v.dim()]
    assert moments == sum(v.nbytes for v in kept)


def test_gpt3s_compute_is_the_papers():
    """Brown et al. 2020, table D.1: 3.14e23 FLOPs for 175B parameters on 300B tokens, attention's not counted."""
    f = figures("--model_size=gpt3-175b", "--tokens=300e9", "--gpus=1024", "--parallel=fsdp")
    assert f["flops_total"] == pytest.approx(3.14e23, rel=0.15)
    assert f["flops_total"] == f["flops_per_token"] * 300e9
    n = f["parameters"] - 2048 * 12288
    assert f["flops_per_token"] == 6 * n + 12 * 96 * 12288 * 2048


def mfu_of(tokens_per_second: float, n: float, n_layer: int, n_embd: int) -> float:
    """Of an A100, whose bf16 peak is 312 TFLOP/s, for this many tokens a second and GPU at a context of 1024."""
    return tokens_per_second * (6 * n + 12 * n_layer * n_embd * 1024) / 312e12


def test_nanogpts_run_took_four_days():
    """nanoGPT's README: 600,000 iterations of 491,520 tokens on 8 A100s of 40 GB take about 4 days. The MFU is another
    user's, on a like machine: github.com/karpathy/nanoGPT, issue 110: five micro-steps of 12 sequences of 1024 on each
    GPU in 562 ms, so 61,440 tokens in 0.562 s, 109,324 tokens/s, 0.855 GFLOP a token: 93.4 TFLOP/s of 312."""
    mfu = mfu_of(5 * 12 * 1024 / 0.562, 123.6e6, 12, 768)
    assert mfu == pytest.approx(0.30, abs=0.005)
    f = figures(
        "--model_size=gpt2", "--bias=False", "--vocab_size=50304", "--batch_tokens=491520",
        f"--tokens={600_000 * 491_520}", "--gpu=a100-40g", f"--mfu={mfu}",
    )  # fmt: skip
    assert f["iterations"] == 600_000
    assert f["days"] == pytest.approx(4, rel=0.15)
    assert f["gpu_hours"] == pytest.approx(f["days"] * 24 * 8)


def test_llm_cs_run_took_94_minutes():
    """llm.c's scripts/run_gpt2_124M.sh: 18,865 steps of 524,288 tokens on 8 A100s of 80 GB in about 94 minutes. The
    MFU is that of its other run, scripts/run_gpt2_350M.sh: a step of 524,288 tokens in about 820 ms on a like machine:
    79,922 tokens/s on each GPU, 2.425 GFLOP a token: 194 TFLOP/s of 312."""
    mfu = mfu_of(524_288 / 0.820 / 8, 353.8e6, 24, 1024)
    assert mfu == pytest.approx(0.62, abs=0.005)
    f = figures("--model_size=gpt2", f"--tokens={18_865 * 524_288}", "--gpu=a100-80g", f"--mfu={mfu}")
    assert f["iterations"] == 18_865
    assert f["days"] * 24 * 60 == pytest.approx(94, rel=0.15)


def test_a_flat_object_with_all_figures_as_a_user_gets_it(tmp_path):
    done = run_script("extras/plan.py", "--model_size=gpt2", "--gpus=1", "--json", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("\n") == 1
    f = json.loads(done.stdout)
    assert {type(value) for value in f.values()} <= {str, int, float, bool}
    names = "parameters flops_per_token flops_total days gpu_hours iterations tokens tokens_per_parameter fits "
    names += (
        "memory_per_gpu_gb weights_gb gradients_gb optimizer_gb activations_gb activations_checkpointed_gb micro_batch "
    )
    names += "micro_batch_checkpointed ckpt_gb last_gb gradient_accumulation_steps"
    assert set(names.split()) <= f.keys()
    assert f["parameters"] == 124_439_808 and f["tokens"] == 20 * f["parameters"] and f["fits"] is True
    assert f["weights_gb"] == f["gradients_gb"] == f["optimizer_gb"] / 2 == 4 * 124_439_808 / 2**30
    assert f["memory_per_gpu_gb"] == sum(f[f"{x}_gb"] for x in ("weights", "gradients", "optimizer", "activations"))
    assert f["ckpt_gb"] == f["last_gb"] == 12 * 124_439_808 / 2**30
    assert f["memory_per_gpu_gb"] <= 0.92 * 80


@pytest.mark.parametrize("extra", [[], ["--activation_checkpointing"]], ids=["plain", "checkpointing"])
def test_the_largest_micro_batch_fits_and_one_more_does_not(extra):
    f = figures("--model_size=gpt2-xl", "--gpu=a100-80g", "--batch_tokens=100_000_000", *extra)
    most = f["largest_micro_batch_checkpointed" if extra else "largest_micro_batch"]
    shape = [f"--batch_tokens={10**8}", "--model_size=gpt2-xl", "--batch_tokens=100000000", *extra]
    assert figures(*shape, f"--micro_batch={most}")["fits"]
    beyond = figures(*shape, f"--micro_batch={most + 1}")
    assert not beyond["fits"] and beyond["memory_per_gpu_gb"] > 0.92 * 80 > f["memory_per_gpu_gb"]
    assert f"micro_batch={most + 1} does not fit: the most that fit are {most}." in lines(
        *shape, f"--micro_batch={most + 1}"
    )
    assert f["largest_micro_batch_checkpointed"] > f["largest_micro_batch"] > 1


def test_micro_steps_share_the_batch_out_evenly():
    f = figures("--model_size=gpt2", "--gpu=a100-40g")  # 64 sequences are a GPU's share, of which about 35 fit
    assert 32 <= f["largest_micro_batch"] < 64
    assert (f["micro_batch"], f["gradient_accumulation_steps"]) == (32, 2 * 8)
    assert f["micro_batch"] * f["gradient_accumulation_steps"] * 1024 == f["batch_tokens"] == 524_288
    few = figures("--model_size=gpt2", "--gpus=1024")  # half a sequence for each
    assert (few["micro_batch"], few["gradient_accumulation_steps"]) == (1, 1024)
    told = " ".join(lines("--model_size=gpt2", "--gpus=1024"))
    assert f"{few['iterations']:,} of 1,048,576 tokens (524,288 asked)" in told
    assert few["tokens_per_iteration"] == 1_048_576 and few["iterations"] == math.ceil(few["tokens"] / 1_048_576)
    odd = figures("--model_size=gpt3-760m", "--gpu=rtx3090", "--activation_checkpointing")
    assert abs(odd["tokens_per_iteration"] / 500_000 - 1) < 0.02 < 2048 * 8 * 7 / 500_000  # not 7 x 40 sequences


def test_fsdp_shares_states_out_and_gathers_two_blocks():
    run = ["--model_size=gpt3-6.7b", "--gpu=a100-80g", "--gpus=64", "--tokens=300e9", "--mfu=0.45"]
    whole, shared = figures(*run), figures(*run, "--parallel=fsdp")
    for part in ("weights_gb", "gradients_gb", "optimizer_gb"):
        assert shared[part] == pytest.approx(whole[part] / 64, rel=1e-6)
    assert whole["gathered_gb"] == 0 and shared["last_gb"] == whole["last_gb"] == whole["ckpt_gb"]
    assert shared["ckpt_gb"] == whole["ckpt_gb"] / 3  # without moments
    block, root = 12 * 4096**2 + 13 * 4096, (50257 + 2048) * 4096 + 2 * 4096
    assert shared["gathered_gb"] * 2**30 == 2 * 2 * block + 4 * root + 6 * block
    assert (whole["fits"], whole["micro_batch"]) == (False, 0) and shared["fits"] and shared["days"] == whole["days"]
    assert whole["days"] == pytest.approx(300e9 * whole["flops_per_token"] / (64 * 312e12 * 0.45) / 86400)


def test_muons_step_counts_where_it_is_more_than_activations():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=512))
    adamw, muon = (memory_of(model, 1, True, optim) for optim in ("adamw", "muon"))
    matrices = 12 * 12 * 768**2
    assert adamw.optimizer - muon.optimizer == 4 * matrices and adamw.step == 0
    assert muon.step > muon.activations
    assert muon.whole == muon.weights + muon.gradients + muon.optimizer + muon.step
    assert muon.step == pytest.approx((4 + 16 / 3) * matrices)


@pytest.mark.parametrize(
    ("argv", "ways"),
    [
        (["--model_size=gpt3-1.3b", "--gpu=a10"], ["--parallel=fsdp", "--gpu="]),
        (["--model_size=gpt3-6.7b", "--gpu=a100-80g", "--gpus=4"], ["--parallel=fsdp"]),
        (
            ["--model_size=gpt3-175b", "--gpus=64", "--parallel=fsdp"],
            ["--activation_checkpointing", "--gpu="],
        ),
        (["--model_size=gpt3-1.3b", "--gpu=t4", "--gpus=1"], ["--parallel=fsdp --gpus=4", "--gpu="]),
    ],
    ids=lambda value: value[0],
)
def test_what_would_fit_is_told_and_does_fit(argv, ways):
    f, told = figures(*argv), " ".join(lines(*argv))
    assert not f["fits"] and f["micro_batch"] == 0 and f["days"] > 0 and "none fits" in told
    told = told.partition("What would: ")[2]
    proposals = re.split(r"\.(?: |$)", told)[0].split("; ")
    assert all(any(p.startswith(way) for p in proposals) for way in ways), proposals
    for proposal in proposals:
        assert figures(*argv, *proposal.split())["fits"], proposal


def test_nothing_fits_at_all():
    told = lines(
        "--model_size=gpt3-175b", "--gpu=rtx3080", "--activation_checkpointing", "--gpus=4096", "--parallel=fsdp"
    )
    assert any(line.startswith("Not one sequence fits on a GPU") for line in told)


@pytest.mark.parametrize(
    ("tokens", "says"), [(1e9, "fewer than"), (124_439_808 * 20, "Chinchilla's, for"), (1e11, "more than")]
)
def test_tokens_a_parameter_are_judged(tokens, says):
    assert says in next(line for line in lines(f"--tokens={tokens}") if "tokens a parameter:" in line)


def test_the_screen_is_a_screenful(tmp_path):
    done = run_script(
        "extras/plan.py", "--model_size=gpt3-6.7b", "--tokens=300e9", "--gpu=a100-80g", "--gpus=64", "--parallel=fsdp",
        "--mfu=0.45", cwd=tmp_path,
    )  # fmt: skip
    out = done.stdout.splitlines()
    assert done.returncode == 0 and len(out) <= 24 and max(map(len, out)) <= 81
    assert out[0] == "gpt3-6.7b on 300B tokens with 64 x a100-80g (fsdp, adamw)"
    assert "  iterations          152,588 of 1,966,080 tokens (2,000,000 asked)" in out


def test_the_other_way_round():
    f = figures("--gpu_hours=1000", "--gpu=h100", "--mfu=0.4")
    compute = 1000 * 3600 * 989e12 * 0.4
    assert f["flops_total"] == pytest.approx(compute) and f["days"] == pytest.approx(1000 / 24 / 8)
    assert f["ideal_parameters"] == pytest.approx(math.sqrt(compute / 120))
    assert 6 * f["ideal_parameters"] * f["ideal_tokens"] == pytest.approx(compute)
    # the best preset's own plan takes those hours
    back = figures(f"--model_size={f['model_size']}", f"--tokens={f['tokens']}", "--gpu=h100", "--mfu=0.4")
    assert back["gpu_hours"] == pytest.approx(1000) and back["tokens_per_parameter"] == pytest.approx(
        f["tokens_per_parameter"]
    )
    ratios = {key: value for key, value in f.items() if key.endswith("_tokens_per_parameter")}
    assert len(ratios) == 12 and f["model_size"] == "gpt3-2.7b"
    nearest = min(ratios, key=lambda key: abs(math.log(ratios[key] / 20)))
    assert figures("--gpu_hours=4000")["model_size"] == "gpt3-2.7b"  # 37.9 a parameter is nearer than 6.7B's 6.3
    assert nearest == "gpt3_2_7b_tokens_per_parameter" and ratios[nearest] == f["tokens_per_parameter"]
    told = lines("--gpu_hours=1000", "--gpu=h100", "--mfu=0.4")
    assert sum("<- nearest to 20" in line for line in told) == 1 and len(told) <= 24
    assert told[-1].endswith("python extras/plan.py --model_size=gpt3-2.7b --tokens=7.96e+10 --gpu=h100 --mfu=0.4")


@pytest.mark.parametrize("hours", ["0.001", "1e9"])
def test_hours_beyond_all_sizes_still_name_the_nearest(hours):
    f = figures(f"--gpu_hours={hours}")
    assert f["model_size"] == ("gpt2" if hours == "0.001" else "gpt3-175b")
    assert any("<- nearest to 20" in line for line in lines(f"--gpu_hours={hours}"))


def test_a_shape_of_ones_own_and_a_card_of_ones_own():
    shape = ["--n_layer=6", "--n_head=6", "--n_embd=384", "--block_size=256", "--vocab_size=65", "--bias=False"]
    f = figures(*shape, "--gpu=mine", "--peak_tflops=100", "--memory_gb=16", "--gpus=1", "--batch_tokens=16384")
    assert f["parameters"] == 6 * (12 * 384**2 + 2 * 384) + (65 + 256) * 384 + 384  # by hand
    assert (f["gpu_memory_gb"], f["peak_tflops"]) == (16, 100)
    assert lines(*shape, "--model_size=gpt2")[0].startswith("gpt2 on")  # it was given after the shape
    assert lines("--model_size=gpt2", *shape)[0].startswith("gpt2, changed, on")


def test_names_of_cards_are_read_kindly():
    assert {figures(f"--gpu={name}")["gpu"] for name in ("A100-80GB", "a100_80g", "A100 80GB")} == {"a100-80g"}
    assert figures("--gpu=H100-80GB")["gpu"] == "h100" and figures("--gpu=RTX 4090")["gpu"] == "rtx4090"
    assert figures("--gpu=h100", "--memory_gb=40")["gpu_memory_gb"] == 40
    assert all(key in plan.PEAKS for key, _ in plan.GPUS.values())


MISTAKES = {
    ("--gpu=a100",): "gpu=a100: did you mean a100-40g? ",
    ("--gpu=rtx409",): "gpu=rtx409: did you mean rtx4090? There are a100-40g, ",
    ("--gpu=mine", "--memory_gb=24"): "gpu=mine: did you mean ",
    ("--gpus=0",): "gpus=0: expected at least 1",
    ("--mfu=0",): "mfu=0.0: expected a share of the peak, above 0 and at most 1, such as 0.4",
    ("--mfu=40",): "mfu=40.0: expected a share of the peak",
    ("--tokens=-1",): "tokens=-1.0: expected 0 to 1e18",
    ("--tokens=inf",): "tokens=inf: expected 0 to 1e18",
    ("--batch_tokens=0",): "batch_tokens=0: expected at least 1",
    ("--micro_batch=-1",): "micro_batch=-1: expected 0 to 1e18",
    ("--parallel=tp",): "parallel=tp: expected ddp or fsdp",
    ("--parallel=fsdp", "--gpus=1"): "parallel=fsdp shares a model out among GPUs, and gpus=1",
    ("--optim=sgd",): "optim=sgd: expected adamw or muon",
    ("--model_size=gpt4",): "model_size=gpt4: there are gpt2, ",
    ("--n_embd=100",): "n_embd = 100 is not divisible by n_head = 12",
    ("--n_layer=0",): "n_layer = 0: it must be at least 1",
    ("--gpu_hours=1e-320",): "gpu_hours=9.99989e-321: expected hours, such as 1000",
    ("--gpu_hours=1e300",): "gpu_hours=1e+300: expected 0 to 1e18",
    ("--gpu_hours=0",): "gpu_hours=0: expected hours, such as 1000",
    ("--gpu_hours=-1",): "gpu_hours=-1.0: expected 0 to 1e18",
    ("--gpu_hours=100", "--tokens=1e9"): "gpu_hours=100 asks which size and how many tokens are best, so tokens cannot",
    (
        "--gpu_hours=100",
        "--model_size=gpt2",
    ): "gpu_hours=100 asks which size and how many tokens are best, so model_size",
}


@pytest.mark.parametrize("argv", MISTAKES, ids=" ".join)
def test_mistakes(argv):
    with pytest.raises(UserError) as told:
        figures(*argv)
    assert str(told.value).startswith(MISTAKES[argv]) and "\n" not in str(told.value)


def test_a_mistake_ends_with_status_2(tmp_path):
    done = run_script("extras/plan.py", "--gpus=0", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1] == "plan.py: gpus=0: expected at least 1"


def test_help_says_the_units(tmp_path):
    done = run_script("extras/plan.py", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "GiB are 2^30 bytes" in done.stdout and "--activation_checkpointing=" in done.stdout
