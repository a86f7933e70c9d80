"""OpenWebText, or documents of your own, in GPT-2's tokens, by Hugging Face datasets. Needs datasets and tiktoken.

    $ python data/openwebtext/prepare.py                  # 8 million documents: 54 GB of cache, 17 GB written
    $ python data/openwebtext/prepare.py --input=docs.jsonl --text_column=content --dest=data/docs
    $ python data/openwebtext/prepare.py --input=parquet_folder/ --val_fraction=0.01 --dest=data/docs

Each document is followed by <|endoftext|>; a shuffled part of them, the same every time, is for validation.
HF_ENDPOINT names a mirror of the Hub, HF_HOME the folder for the cache.
"""

import os
import sys
from pathlib import Path

sys.path[:0] = [str(p) for p in Path(__file__).resolve().parents[1:3]]
from configurator import Config, UserError, configure, run, user_errors

dataset = "Skylion007/openwebtext"  # the dataset on the Hub, used where there is no input
input = []  # .jsonl, .json, .parquet or .txt files (each .txt is a document), or a folder of such, all of one kind
text_column = "text"  # where a document's text is, in jsonl and parquet
encoding = "utf-8"  # of .txt and .jsonl input
val_fraction = 0.0005  # of the documents, kept for validation
tokenizer = "gpt2"  # "gpt2", "char", or a dataset folder, out_dir, .pt file or Hugging Face folder: its vocabulary
byte_fallback = True  # with "char": 256 byte tokens, so that any text has tokens
min_count = 1  # with byte_fallback: characters rarer than this take the byte tokens
num_proc = max(1, (os.cpu_count() or 2) // 2)  # processes that load and encode
dest = ""  # the folder for the dataset; default: this folder
config = configure(globals())

import numpy as np

import corpus
from reading import files_in
from writing import DatasetWriter, end_text, progress_bar

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


def load(config: Config):  # -> datasets.Dataset
    """The documents as a dataset with the one column "text". UserError where they cannot be had."""
    try:
        import datasets
    except ImportError as error:
        raise UserError("this needs Hugging Face datasets: pip install datasets") from error
    name, options, processes = config.dataset, {}, config.num_proc
    remedy = "check the network, set HF_ENDPOINT to a mirror of the Hub, or give local files with --input"
    if config.input:
        files = [file.path for file in files_in(config.input)]
        kinds = {BUILDERS.get(file.suffix.lower(), file.name) for file in files}
        name, remedy = kinds.pop(), "check the files and their --encoding"
        if kinds or name not in BUILDERS.values():
            raise UserError(
                f"--input: expected files of one kind out of {', '.join(BUILDERS)}, not a mixture or others"
            )
        options, processes = {"data_files": [str(file) for file in files]}, min(processes, len(files))
        if name == "text":
            options |= {
                "sample_by": "document",
                "encoding": "utf-8-sig" if config.encoding == "utf-8" else config.encoding,
            }
        elif name == "json":
            options |= {"encoding": config.encoding}
    try:
        documents = datasets.load_dataset(name, split="train", num_proc=processes if processes > 1 else None, **options)
    except Exception as error:  # those of the Hub's client, of the network library, of pyarrow
        cause = error.__cause__ or error
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
        raise UserError(f"cannot load {', '.join(config.input) or name} ({reason}): {remedy}") from error
    column = "text" if name == "text" else config.text_column
    if column not in documents.column_names or getattr(documents.features[column], "dtype", "") not in (
        "string",
        "large_string",
    ):
        columns = ", ".join(documents.column_names)
        raise UserError(f"--text_column={column}: there is no such column of text; the columns are {columns}")
    documents = documents.select_columns([column])
    return documents if column == "text" else documents.rename_column(column, "text")


def main(config: Config) -> None:
    tokenizer = corpus.check_options(config)
    documents = load(config)
    if len(documents) < 2:
        raise UserError("there are fewer than two documents, too few to split into train.bin and val.bin")
    distinct, unknown = None, 0
    if tokenizer is None or tokenizer.kind == "char":
        counts = corpus.CharacterCounts()
        with progress_bar(len(documents), "counting", "documents") as progress:
            for batch in documents.iter(1000):
                counts.add("".join(text or "" for text in batch["text"]))
                progress(len(batch["text"]))
        tokenizer = tokenizer or corpus.char_tokenizer(counts, config.min_count, config.byte_fallback, end_of_text=True)
        distinct, unknown = len(counts.characters()), sum(counts.unknown(tokenizer).values())
    if tokenizer.end_of_text is None:
        raise UserError(f"--tokenizer={config.tokenizer}: this vocabulary has no token to end documents with")

    def encode(batch: dict) -> dict:
        texts = [text or "" for text in batch["text"]]
        ids = [np.append(tokenizer.encode(text), tokenizer.dtype(tokenizer.end_of_text)) for text in texts]
        return {"ids": ids, "characters": [len(text) for text in texts]}

    with user_errors(ValueError, about=f"--val_fraction={config.val_fraction}"):
        parts = documents.train_test_split(test_size=config.val_fraction, seed=2357, shuffle=True)
    characters = {"train": 0, "val": 0}
    with DatasetWriter(config.dest or Path(__file__).resolve().parent, tokenizer) as writer:
        for split, part in (("train", parts["train"]), ("val", parts["test"])):
            options = {"num_proc": config.num_proc} if config.num_proc > 1 else {}
            encoded = part.map(encode, batched=True, remove_columns="text", desc=f"encoding {split}", **options)
            with progress_bar(len(encoded), f"writing {split}", "documents") as progress:
                for number, batch in enumerate(encoded.with_format("numpy").iter(1000)):
                    texts = [text or "" for text in part[:1000]["text"]] if number == 0 else []
                    expected = "".join(text + end_text(tokenizer) for text in texts) if texts else None
                    writer.write(split, np.concatenate(batch["ids"]), expected)
                    characters[split] += int(batch["characters"].sum())
                    progress(len(batch["ids"]))
        counts = {"documents": [len(parts["train"]), len(parts["test"])], "characters": list(characters.values())}
        writer.finish(**counts, distinct=distinct, unknown=unknown)


if __name__ == "__main__":
    run(main, config)
