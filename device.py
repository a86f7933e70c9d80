"""The device under a run: which one, its number format, autocast, torch.compile where it works, its memory's end."""

import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch

from configurator import UserError, note

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: str, local_rank: int | None = None) -> str:
    """'auto' becomes 'cuda', 'mps' or 'cpu', the first there is; under torchrun a process takes its own GPU.

    UserError where the device is not there.
    """
    if device == "auto":
        has_mps = torch.backends.mps.is_available() and local_rank is None  # gloo cannot add up what is on a Metal GPU
        device = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UserError(f"device={device}: expected auto, cpu, cuda, cuda:1 or mps") from None
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"device={device}: PyTorch {torch.__version__} finds no CUDA GPU here; use --device=cpu")
        index = local_rank if local_rank is not None else torch.device(device).index or 0
        if index >= torch.cuda.device_count():
            raise UserError(f"device=cuda:{index}: there are {torch.cuda.device_count()} CUDA GPUs, counted from 0")
        device = f"cuda:{index}"
        torch.cuda.set_device(device)
    elif kind == "mps" and local_rank is not None:
        raise UserError("device=mps: several processes cannot share their gradients there; use --device=cpu")
    elif kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps: PyTorch finds no Metal GPU here; use --device=cpu")
    elif kind not in ("cpu", "mps"):
        raise UserError(f"device={device}: expected auto, cpu, cuda, cuda:1 or mps")
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it
    if kind == "cpu":
        keep_memory()
    return device


def keep_memory(kept: bool = True) -> None:
    """Lets the C library keep what is freed. By default glibc gives large pieces back to the system, which maps and
    clears them anew for the next step. Or, not `kept`, has every piece of a megabyte given back at once: of a heap that
    large and small pieces share, what is free between the small ones serves no large one, and it grows."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library, such as Alpine's, has no mallopt
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            mallopt(-4, 0 if kept else 65536)  # M_MMAP_MAX: how many pieces may be mapped by themselves
            mallopt(-1, -1 if kept else 1 << 20)  # M_TRIM_THRESHOLD: what the heap may have to spare at its end
            if not kept:
                mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


def choose_matmul(matmul: str, device: str) -> str:
    """How a CPU multiplies matrices of float32: 'float32', or 'bfloat16', which rounds them and adds up in float32, as
    TF32 does on a GPU. 'auto' is bfloat16 on a CPU with AMX, where it takes a third of the time, and float32 on others,
    where it would take several times as long. UserError for anything else."""
    if matmul not in ("auto", "float32", "bfloat16"):
        raise UserError(f"matmul={matmul}: expected auto, float32 or bfloat16")
    if matmul == "auto":
        has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
        matmul = "bfloat16" if device == "cpu" and has_amx else "float32"
    torch.set_float32_matmul_precision("medium" if matmul == "bfloat16" and device == "cpu" else "high")
    return matmul


def choose_dtype(dtype: str, device: str) -> str:
    """'auto' becomes bfloat16 on GPUs of compute capability 8.0 and newer, float16 on 7.x, else float32."""
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"dtype={dtype}: expected auto, {', '.join(DTYPES)}")
    if dtype == "auto":
        major = torch.cuda.get_device_capability(device)[0] if device.startswith("cuda") else 0
        return "bfloat16" if major >= 8 else "float16" if major == 7 else "float32"
    # nanoGPT's configurations may ask for float16 and a CPU in one breath, where it then computes in float32
    return "float32" if dtype == "float16" and not device.startswith("cuda") else dtype


def autocast(device: str, dtype: str) -> AbstractContextManager:
    """The context for a forward pass in this dtype; it may be entered again and again."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(device_type=torch.device(device).type, dtype=DTYPES[dtype])


def can_compile(device: str) -> bool:
    """Whether torch.compile has what it needs; a line says what is missing."""
    if device.startswith("cuda") and torch.cuda.get_device_capability(device)[0] < 7:
        note("note: this GPU is too old for torch.compile (compute capability below 7.0); running without it")
        return False
    # inductor looks for a compiler only once it has traced everything, and then fails with pages of log
    if not device.startswith("cuda") and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
        note("note: torch.compile needs a C++ compiler, and there is none; running without it")
        return False
    return True


def try_compiled(probe: Callable[[], Any]) -> None:
    """Calls probe(), which calls what torch.compile made. Where that fails, a line says why, and from then on all that
    was compiled in this process runs as plain PyTorch."""
    try:
        probe()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the compiler stack raises many kinds; plain PyTorch needs none of it
        reason = (str(error).strip().splitlines() or [""])[0][:160]
        note(f"note: torch.compile failed ({type(error).__name__}: {reason}); running without it")
        torch.compiler.set_stance("force_eager")


def is_memory_error(error: Exception) -> bool:
    """Whether an error tells of a lack of memory."""
    signs = ("out of memory", "allocate memory", "not enough memory", "alloc_failed")  # CUDA, MPS, CPU, cuBLAS
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in signs)


@contextmanager
def memory_error_told(
    remedy: str = (
        "halve batch_size and double gradient_accumulation_steps: the same computation; or lower block_size, or share "
        "the model out among processes, by torchrun with --parallel=fsdp"
    ),
) -> Iterator[None]:
    """Running out of memory ends with a sentence; no batch is skipped or shrunk behind the user's back."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_memory_error(error):
            raise
        raise UserError(f"out of memory: {remedy}") from error
