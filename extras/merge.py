"""LoRA merged into its base: a checkpoint of its own, in nanoGPT's layout, that needs the base no more.

    $ python extras/merge.py --out_dir=out-lora                  # writes out-lora/merged/ckpt.pt
    $ python sample.py --out_dir=out-lora/merged
    $ python train.py --init_from=out-lora/merged --out_dir=out-more

An adapter that is not LoRA cannot be merged: its GELU stands between it and the matrices.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import Config, UserError, configure, run, user_errors

out_dir = "out"  # what a run with lora_rank left: a folder with ckpt.pt, or a .pt file
dest = ""  # the folder to write ckpt.pt to; default: merged/ in out_dir. An earlier merge there is replaced
config = configure(globals())

from dataclasses import fields

import checkpoint
from adapt import Adaptation, is_adapted


def check_dest(dest: Path) -> None:
    """UserError where there are checkpoints already that are no earlier merge."""
    if (dest / "ckpt.pt").is_file() and "merged" not in checkpoint.peek(dest / "ckpt.pt") or checkpoint.states(dest):
        raise UserError(f"{dest} holds a run's checkpoints, and no earlier merge; choose another --dest")


def main(c: Config) -> None:
    path, state = checkpoint.best(c.out_dir)
    if "adapter" not in state:
        raise UserError(f"{path} has no LoRA to merge: it holds a whole model, which opens as it is")
    dest = Path(c.dest or path.parent / "merged")
    check_dest(dest)
    model = checkpoint.model_of(state, path)
    if is_adapted(model):
        raise UserError(
            f"{path} has adapters, whose GELU stands between them and the matrices: they cannot be merged, and open "
            f"with their base alone"
        )
    own = {field.name for field in fields(Adaptation)}
    whole = {
        "model": dict(model.state_dict()),
        "optimizer": None,
        "model_args": state["model_args"],
        "iter_num": state["iter_num"],
        "best_val_loss": state["best_val_loss"],
        "config": {key: value for key, value in state["config"].items() if key not in own},
        "tokenizer": checkpoint.tokenizer_of(state, path).meta(),
        "template": checkpoint.template_of(state),
        "merged": {"adapter": state["adapter"], "base": state["base"]},
    }
    with user_errors(OSError, about=f"{dest} cannot be made"):
        dest.mkdir(parents=True, exist_ok=True)
    checkpoint.save(dest / "ckpt.pt", whole)
    print(f"{path} -> {dest / 'ckpt.pt'}: {model.get_num_params(non_embedding=False):,} parameters")


if __name__ == "__main__":
    run(main, config)
