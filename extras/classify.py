"""A classifier of texts out of a trained model, in GPT-1's way: a linear head on the last hidden state of one token.

    $ python extras/classify.py train --init_from=out-demo --train=titles.tsv --learning_rate=1e-3
    $ python extras/classify.py predict --input=new.tsv --dest=labels.jsonl
    $ python extras/classify.py train --init_from=gpt2 --task=pair --train=nli.jsonl --val=nli-dev.jsonl
    $ python extras/classify.py train --init_from=out-demo --multi_label --train=posts.jsonl --learning_rate=1e-3

Read are .jsonl, .json, .csv, .tsv and .txt (with tabs), in any Chinese encoding. A table without the names of its
columns has the texts first and then the label, as the lists of THUCNews' titles have.

| task       | fields               | what the model reads; extract is the token whose state the head sees |
| single     | text, label          | start text extract                                                   |
| pair       | text, text_2, label  | start text delimiter text_2 extract                                  |
| similarity | text, text_2, label  | that, and with the texts exchanged; the two states are added         |
| choice     | text, choices, label | start text delimiter choice extract, for each; the head has 1 output |

A label is text or a number, with --multi_label a list of them; of a choice it is the index, from 0. In a table a list
is one field, with | between: sport|health.

Notable choices:
- The loss is L2 + lm_weight * L1: of the classes, and of each next token up to extract (the paper's equation 5).
- start, delimiter and extract are new tokens behind the model's own. Rows are padded on the right, where a causal model
  does not look.
- Without a file of its own, what is held out is told by the hash of its texts: equal texts are on one side, and no seed
  changes it. Kept is the epoch with the best accuracy there, which flatters it a little.

Reference: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", sections 3.2 and 3.3.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / name) for name in ("", "data")]
from configurator import Config, UserError, configure, note, run, user_errors

action = ""  # the first word: 'train' or 'predict'
out_dir = "out-classify"  # where the classifier is: classify.pt, and of its training metrics.json and confusion.png
# Data
train = ""  # the file to train on
val = ""  # the file to measure on; default: val_fraction of the other
val_fraction = 0.1
input = ""  # what to predict; where it has labels, it is also said how many are met
dest = ""  # the .jsonl file for the predictions; default: they are printed
encoding = "auto"  # told from each file, or its name, such as gb18030
fields = ""  # the names that the task's fields have in the files, in the order above, such as "title,class"
task = "single"  # 'single', 'pair', 'similarity' or 'choice'
multi_label = False  # any number of labels may be right: a sigmoid for each
max_length = 0  # tokens in a row at most; longer texts lose their ends, first the longer of two. Default: block_size
# The model
init_from = "out"  # the model to begin with: an out_dir, a .pt file, a Hugging Face folder, 'gpt2*'
random_weights = False  # its architecture and vocabulary alone, for comparison
dropout = 0.1
# Training
learning_rate = 6.25e-5  # the paper's, for 117 million parameters; the demo's million needs about 1e-3
epochs = 3
batch_size = 32
lm_weight = 0.5  # the paper's lambda; 0 is without language modelling
warmup = 0.002  # the part of all steps in which the rate rises; then it falls, in a line, to 0
weight_decay = 0.01  # of matrices and embeddings
grad_clip = 1.0  # the largest norm of the gradient; 0 for any
seed = 1337
device = "auto"  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
config = configure(globals(), positionals=("action",))

import io
import json
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import checkpoint
import ops
from adapt import grow_vocabulary, is_adapted
from charset import check_encoding
from device import autocast, choose_device, choose_dtype, memory_error_told
from extras.labelled import FIELDS, Example, classes, read, split, truth_of
from extras.plot import FONTS, write
from model import GPT, derive_seed
from tokenizer import Tokenizer


def encode(examples: list[Example], tokenizer: Tokenizer, task: str, first_new: int, length: int) -> None:
    """Gives the examples their rows, of `length` tokens at most; a line says how many that has cut."""
    start, delimiter, extract = range(first_new, first_new + 3)
    ids = iter(tokenizer.encode_batch([text for each in examples for text in each.texts]))
    cut = total = 0
    for each in examples:
        a, *others = [next(ids).tolist() for _ in each.texts]
        pairs = [(a, b) for b in others] + [(b, a) for b in others if task == "similarity"]
        for x, y in pairs or [(a, [])]:
            room = length - (3 if y else 2)
            of_x = min(len(x), max(room - len(y), (room + 1) // 2))
            each.rows.append([start, *x[:of_x], *([delimiter] if y else []), *y[: room - of_x], extract])
            cut, total = cut + (len(x) + len(y) > room), total + 1
    if cut:
        note(f"note: {cut:,} of {total:,} rows are cut to {length} tokens")


@dataclass
class Batch:
    ids: torch.Tensor  # [rows, time]
    ends: torch.Tensor  # [rows], where extract is
    each: list[int]  # the number of rows of each example


def batch_of(examples: list[Example], device: str) -> Batch:
    rows = [torch.tensor(row) for each in examples for row in each.rows]
    ends = torch.tensor([len(row) - 1 for row in rows])
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return Batch(ids.to(device), ends.to(device), [len(each.rows) for each in examples])


def batches(examples: list[Example], batch_size: int, seed: int) -> list[torch.Tensor]:
    """Each example's index once, in a random order; those together are of similar length, which saves padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([len(each.rows[0]) for each in examples])
    pools = torch.randperm(len(examples), generator=generator).split(16 * batch_size)
    found = [batch for pool in pools for batch in pool[lengths[pool].argsort(stable=True)].split(batch_size)]
    return [found[i] for i in torch.randperm(len(found), generator=generator)]


class Classifier(nn.Module):
    """A GPT and a linear head on the last hidden state of the extract token."""

    def __init__(self, gpt: GPT, task: str, multi_label: bool, n_classes: int, seed: int) -> None:
        super().__init__()
        self.gpt, self.task, self.multi_label = gpt, task, multi_label
        self.head = nn.Linear(gpt.config.n_embd, 1 if task == "choice" else n_classes)
        nn.init.normal_(self.head.weight, 0.0, 0.02, torch.Generator().manual_seed(derive_seed(seed, "head")))
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits [examples, classes], of choices -inf where others have more of them; and the hidden states."""
        x = self.gpt.hidden(batch.ids)  # [rows, time, n_embd], from which the GPT's own head reads the next token
        state = x[torch.arange(len(x), device=x.device), batch.ends]  # [rows, n_embd]
        if self.task == "similarity":
            state = state[::2] + state[1::2]
        logits = self.head(ops.dropout(state, self.gpt.config.dropout, self.training)).float()
        if self.task == "choice":
            scores = logits.squeeze(1).split(batch.each)
            logits = nn.utils.rnn.pad_sequence(list(scores), batch_first=True, padding_value=-torch.inf)
        return logits, x

    def class_loss(self, logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """The paper's L2, a mean in nats over the examples; with several labels also over these."""
        truth = truth.to(logits.device)
        if self.multi_label:
            return F.binary_cross_entropy_with_logits(logits, truth.float())
        return F.cross_entropy(logits, truth.int().argmax(1))

    def lm_loss(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The paper's L1, a mean in nats over the tokens behind start, extract being the last."""
        targets = batch.ids[:, 1:]
        real = torch.arange(targets.size(1), device=x.device) < batch.ends[:, None]
        return ops.cross_entropy(x[:, :-1][real], self.gpt.lm_head.weight, targets[real])

    def chosen(self, logits: torch.Tensor) -> torch.Tensor:
        """The predicted labels, bool [examples, classes]: those that are rather right than not, or the likeliest."""
        return logits > 0 if self.multi_label else F.one_hot(logits.argmax(1), logits.size(1)).bool()


def context(device: str) -> AbstractContextManager:
    """bfloat16 where the device has it; float16 would need its gradients scaled."""
    dtype = choose_dtype("auto", device)
    return autocast(device, dtype if dtype == "bfloat16" else "float32")


@torch.no_grad()
def logits_of(model: Classifier, examples: list[Example], n_classes: int, batch_size: int, device: str) -> torch.Tensor:
    """All logits, [examples, n_classes], on the CPU."""
    model.eval()
    logits = torch.full((len(examples), n_classes), -torch.inf)
    by_length = sorted(range(len(examples)), key=lambda i: len(examples[i].rows[0]))
    for first in range(0, len(examples), batch_size):
        here = by_length[first : first + batch_size]
        with context(device):
            found = model(batch_of([examples[i] for i in here], device))[0]
        logits[here, : found.size(1)] = found.cpu()
    return logits


def measured(truth: torch.Tensor, chosen: torch.Tensor, labels: list[str], multi_label: bool) -> dict[str, Any]:
    """Accuracy (an example's labels are right, all of them), macro-F1 (the mean over the labels that occur), each
    label's precision, recall and F1, and the counts of true labels (down) by predicted ones (across); with several
    labels, of each one the counts found, missed, wrongly given and rightly not given."""
    truth, chosen = truth.numpy(), chosen.numpy()
    hits, missed, wrong = (truth & chosen).sum(0), (truth & ~chosen).sum(0), (~truth & chosen).sum(0)
    confusion = truth.T.astype(int) @ chosen
    if multi_label:
        confusion = np.stack((hits, missed, wrong, len(truth) - hits - missed - wrong), 1)
    of = {"precision": hits + wrong, "recall": hits + missed, "f1": hits + (missed + wrong) / 2}
    rates = {name: hits / np.where(n, n, 1) for name, n in of.items()}
    each = {label: {name: float(rate[i]) for name, rate in rates.items()} for i, label in enumerate(labels)}
    accuracy, f1 = float((truth == chosen).all(1).mean()), float(rates["f1"].sum() / max(1, (of["f1"] > 0).sum()))
    return {"accuracy": accuracy, "macro_f1": f1, "classes": each, "confusion": confusion.tolist()}


def said(metrics: dict[str, Any]) -> str:
    return f"accuracy {metrics['accuracy']:.2%}, macro-F1 {metrics['macro_f1']:.4f}"


def report(metrics: dict[str, Any]) -> str:
    lines = [
        f"{m['precision']:9.3f} {m['recall']:9.3f} {m['f1']:9.3f}  {each}" for each, m in metrics["classes"].items()
    ]
    return "\n".join([f"{'precision':>9} {'recall':>9} {'F1':>9}  label", *lines])


def picture(metrics: dict[str, Any], multi_label: bool) -> bytes:
    """The confusion matrix as a PNG, a label's line shaded by its shares."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.font_manager import fontManager

    labels, counts = list(metrics["classes"]), np.array(metrics["confusion"])
    across = ["found", "missed", "wrongly given", "rightly not given"] if multi_label else labels
    share = counts / np.maximum(1, counts.sum(1, keepdims=True))
    matplotlib.rcdefaults()  # the same picture whatever the user's own style
    there = set(fontManager.get_font_names())  # to name another one is a warning for each text
    matplotlib.rcParams.update({"font.family": [name for name in FONTS if name in there], "text.parse_math": False})
    size = (3 + 0.55 * len(across), 2.5 + 0.55 * len(labels))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    ax = figure.subplots()
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if max(map(len, across)) > 3 else {}
    ax.set_xticks(range(len(across)), across, **turned)
    ax.set_yticks(range(len(labels)), labels)
    for (i, j), n in np.ndenumerate(counts):
        ax.text(j, i, f"{n:,}", ha="center", va="center", fontsize=9, color="white" if share[i, j] > 0.5 else "black")
    ax.set(ylabel="label", xlabel="" if multi_label else "predicted")
    ax.set_title(said(metrics).replace(", ", "\n"), fontsize=11)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def check(c: Config) -> None:
    """UserError for settings that make no sense."""
    check_encoding(c.encoding)
    if c.task not in FIELDS:
        raise UserError(f"--task={c.task}: expected {', '.join(FIELDS)}")
    if c.multi_label and c.task == "choice":
        raise UserError("--task=choice has one right choice, so it cannot go with --multi_label")
    at_least, parts = {"epochs": 1, "batch_size": 1}, ("val_fraction", "dropout", "warmup")
    at_least |= dict.fromkeys((*parts, "learning_rate", "lm_weight", "weight_decay", "grad_clip"), 0)
    for key, least in at_least.items():
        value, end = getattr(c, key), 1 if key in parts else float("inf")
        if not least <= value < end:
            raise UserError(
                f"--{key}={value}: expected {least} or more" + (", and less than 1" if key in parts else "")
            )


def fit(c: Config) -> None:
    """Trains a classifier and measures it after each epoch; the best one so far is in out_dir."""
    check(c)
    data = read(c, "train")
    data, held_out = (data, read(c, "val")) if c.val else split(data, c.val_fraction)
    labels = classes(c, data + held_out if c.task == "choice" else data)
    truth, truth_held_out = truth_of(data, labels), truth_of(held_out, labels)
    device, out = choose_device(c.device), Path(c.out_dir)
    gpt, tokenizer = checkpoint.pretrained(c.init_from, c.dropout)
    if tokenizer is None:
        raise UserError(f"--init_from={c.init_from} holds no tokenizer, so it cannot read texts")
    if is_adapted(gpt):
        raise UserError(f"--init_from={c.init_from} has adapters: start from the model that they are on, or from LoRA")
    first_new, block_size = gpt.config.vocab_size, gpt.config.block_size
    if not 8 <= (length := c.max_length or block_size) <= block_size:
        raise UserError(f"--max_length={length}: expected 8 or more, and at most the model's block_size, {block_size}")
    encode(data + held_out, tokenizer, c.task, first_new, length)
    if c.random_weights:
        gpt.init_weights(c.seed)
    grow_vocabulary(gpt, first_new + 3, c.seed)
    model = Classifier(gpt, c.task, c.multi_label, len(labels), c.seed).to(device)
    optimizer = gpt.configure_optimizers(c.weight_decay, c.learning_rate, (0.9, 0.999), torch.device(device).type)
    optimizer.add_param_group({"params": [model.head.weight], "weight_decay": c.weight_decay})
    optimizer.add_param_group({"params": [model.head.bias], "weight_decay": 0.0})
    print(f"{len(data):,} records to train on, {len(held_out):,} held out, {len(labels)} classes; {device}")

    with user_errors(OSError, about=f"out_dir={out} cannot be made"):
        out.mkdir(parents=True, exist_ok=True)
    best, step, steps = {"accuracy": -1.0, "loss": 0.0}, 0, c.epochs * -(-len(data) // c.batch_size)
    for epoch in range(1, c.epochs + 1):
        model.train()
        sums = torch.zeros(2)
        for here in batches(data, c.batch_size, derive_seed(c.seed, "order", epoch)):
            torch.manual_seed(derive_seed(c.seed, "dropout", step))
            for group in optimizer.param_groups:
                group["lr"] = c.learning_rate * min((step + 1) / max(1.0, c.warmup * steps), 1 - step / steps)
            batch = batch_of([data[i] for i in here], device)
            with context(device):
                logits, x = model(batch)
                class_loss = model.class_loss(logits, truth[here])
                lm_loss = model.lm_loss(x, batch) if c.lm_weight else torch.zeros((), device=device)
            (class_loss + c.lm_weight * lm_loss).backward()
            if c.grad_clip:
                nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            sums += len(here) / len(data) * torch.stack((class_loss, lm_loss)).detach().cpu()
            step += 1
        logits = logits_of(model, held_out, len(labels), c.batch_size, device)
        metrics = {"epoch": epoch, "loss": float(model.class_loss(logits, truth_held_out))}
        if not math.isfinite(sums.sum()) or not math.isfinite(metrics["loss"]):
            raise UserError(
                f"the loss of epoch {epoch} is no finite number: training has diverged; lower learning_rate"
            )
        metrics |= measured(truth_held_out, model.chosen(logits), labels, c.multi_label)
        losses = f"loss {sums[0]:.4f}" + (f" + {c.lm_weight:g} * {sums[1]:.4f}" if c.lm_weight else "")
        print(f"epoch {epoch} of {c.epochs}: {losses}, held out {metrics['loss']:.4f}, {said(metrics)}")
        if (metrics["accuracy"], -metrics["loss"]) > (best["accuracy"], -best["loss"]):
            best = metrics
            state = {"model": gpt.state_dict(), "model_args": gpt.config.model_args(), "tokenizer": tokenizer.meta()}
            state |= {"head": model.head.state_dict(), "labels": labels, "max_length": length}
            checkpoint.save(out / "classify.pt", state | {key: getattr(c, key) for key in KEPT})
            write(out / "metrics.json", json.dumps(metrics, ensure_ascii=False, indent=2).encode("utf-8"))
    print(f"{report(best)}\n{out / 'classify.pt'}: epoch {best['epoch']}, held out {said(best)}")
    try:
        write(out / "confusion.png", picture(best, c.multi_label))
    except ImportError:
        note("note: the confusion matrix is in metrics.json; a picture of it needs a package: pip install matplotlib")


KEPT = ("task", "multi_label", "fields")  # of the settings, for predict


def predict(c: Config) -> None:
    """The labels of a file's records, a line of JSON for each; and how right they are, where it has labels itself."""
    path = Path(c.out_dir) / "classify.pt"
    state = checkpoint.load(path)
    if "head" not in state:
        raise UserError(f"{path} is no classifier: expected what `python extras/classify.py train` wrote")
    c.task, c.multi_label, c.fields = state["task"], state["multi_label"], c.fields or state["fields"]
    check(c)
    device, data = choose_device(c.device), read(c, "input")
    labels = classes(c, data) if c.task == "choice" else state["labels"]
    gpt, tokenizer = checkpoint.model_of(state, path), checkpoint.tokenizer_of(state, path)
    model = Classifier(gpt, c.task, c.multi_label, len(labels), 0)
    model.head.load_state_dict(state["head"])
    encode(data, tokenizer, c.task, gpt.config.vocab_size - 3, state["max_length"])
    logits = logits_of(model.to(device), data, len(labels), c.batch_size, device)
    chosen, lines = model.chosen(logits), []
    for each, p, yes in zip(data, logits.sigmoid() if c.multi_label else logits.softmax(1), chosen, strict=True):
        texts = [each.texts[0], each.texts[1:]] if c.task == "choice" else each.texts
        right = [labels[i] for i in yes.nonzero().flatten()]
        likely = {
            label: float(f"{x:.6g}") for label, x in zip(labels, p.tolist(), strict=True) if x or c.task != "choice"
        }
        line = dict(zip(FIELDS[c.task], texts, strict=True)) | {"label": right if c.multi_label else right[0]}
        lines.append(json.dumps(line | {"probabilities": likely}, ensure_ascii=False))
    if c.dest:
        write(Path(c.dest), "".join(f"{line}\n" for line in lines).encode("utf-8"))
    print(f"{c.dest}: {len(data):,} predictions" if c.dest else "\n".join(lines))
    if any(each.labels is None for each in data):
        return
    if other := sorted({label for each in data for label in each.labels} - set(labels)):
        note(f"note: the labels of {c.input} are others ({', '.join(other)[:200]}), so they are not compared")
        return
    metrics = measured(truth_of(data, labels), chosen, labels, c.multi_label)
    note(f"{report(metrics)}\n{c.input}: {said(metrics)}")


@memory_error_told("lower batch_size or max_length, or take a smaller model")
def main(c: Config) -> None:
    if c.action not in ("train", "predict"):
        raise UserError(f"{c.action or 'nothing to do'}: expected train or predict as the first word")
    fit(c) if c.action == "train" else predict(c)


if __name__ == "__main__":
    run(main, config)
