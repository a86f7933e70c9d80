"""Runs of train.py, one after the other in the same processes, which saves what it takes to start them, and what can be
seen of a run from inside alone.

    $ torchrun --standalone --nproc_per_node=2 tests/gradients.py runs.json

runs.json holds a list of [name, arguments of train.py]. Of each run the first process writes name.pt beside it, see
`carry_out`.
"""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

import train
from configurator import configure, run
from fsdp import gathered, is_shared_out, own_part, whole
from startup import prepare


def carry_out(*argv: str) -> dict[str, Any]:
    """train.main; what comes back of it, in the first process:

    initial     the weights before the first step, by name
    gradients   of each step, before they are clipped, by name
    tied        whether head and embedding are one Parameter then
    devices     where the parameters were that the model was built of, but for those that are shared out
    bytes       of this process's parameters and moments
    said        the standard output
    files       what lay in out_dir afterwards
    """
    c = configure(dict(vars(train.config), __file__=train.__file__), argv=argv)
    torch.set_float32_matmul_precision("highest")  # as in a process that has run nothing before
    devices, gradients = set(), []
    clip = torch.nn.utils.clip_grad_norm_

    def clip_recorded(parameters, *more):
        own = {name: p.grad for name, p in r.model.named_parameters() if p.grad is not None}
        found = {name: whole(gradient).detach().clone() for name, gradient in own.items()}
        gradients.append(found if r.processes.master else {})
        return clip(parameters, *more)

    with contextlib.ExitStack() as held, contextlib.redirect_stdout(io.StringIO()) as said:
        hook = register_module_parameter_registration_hook(
            lambda module, name, p: None if is_shared_out(p) else devices.add(p.device.type)
        )
        r, *data = prepare(c, held)
        hook.remove()
        initial, tied = gathered(r.model, r.processes.master), r.model.lm_head.weight is r.model.transformer.wte.weight
        torch.nn.utils.clip_grad_norm_ = clip_recorded
        held.callback(setattr, torch.nn.utils, "clip_grad_norm_", clip)
        with train.work_kept(r):
            train.train_until_done(r, *data)
        if not c.eval_only:
            train.finish(r)
    out = Path(c.out_dir)
    files = sorted(path.name for path in out.iterdir()) if out.is_dir() and r.processes.master else []
    moments = [t for optimizer in r.optimizers for entry in optimizer.state.values() for t in entry.values()]
    sizes = [sum(own_part(t).nbytes for t in some if t.dim()) for some in (r.model.parameters(), moments)]
    r.processes.end()
    return {
        "initial": initial, "gradients": gradients, "tied": tied, "devices": sorted(devices), "bytes": sizes,
        "said": said.getvalue(), "files": files,
    }  # fmt: skip


def main(path: Path) -> None:
    for name, argv in json.loads(path.read_text(encoding="utf-8")):
        found = carry_out(*argv)
        if found["initial"] is not None:
            torch.save(found, path.with_name(f"{name}.pt"))


if __name__ == "__main__":
    run(main, Path(sys.argv[1]))
