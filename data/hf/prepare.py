"""Any dataset of the Hugging Face Hub, or parts of one, as it streams in. Needs Hugging Face datasets.

    $ python data/hf/prepare.py --path=wikimedia/wikipedia --name=20231101.zh --fields=title,text --dest=data/wiki_zh
    $ python data/hf/prepare.py --path=HuggingFaceFW/fineweb --name=sample-10BT --max_documents=100000 --dest=data/web
    $ python data/hf/prepare.py --path=parquet --data_files=part-0.parquet --data_files=part-1.parquet --dest=data/parts

The text is kept beside the dataset until that is written: as much disk as there is text, and nothing in a cache.
HF_ENDPOINT names a mirror of the Hub. Each document is followed by <|endoftext|>.
"""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(p) for p in Path(__file__).resolve().parents[1:3]]
from configurator import Config, UserError, configure, run

# what to read
path = ""  # the dataset on the Hub, a folder, or with data_files a format: 'parquet', 'json', 'csv', 'text'
name = ""  # which of the dataset's subsets
data_files = []  # local files, or some of the dataset's; repeat the key for several
split = "train"  # which of its splits
val_split = ""  # the one for validation, in place of val_fraction
text_column = "text"  # where a document's text is
fields = ""  # several columns instead, such as "title,text"
template = ""  # how they make a document, such as "{title}: {text}"; default: 《title》, then a line each
max_documents = 0  # no more than so many, 0 for all
normalize = "none"  # 'nfkc', 't2s' (traditional to simplified), 'strip' (NUL, spaces around lines), or "nfkc,strip"
dedup = False  # leave out documents that are the same, character by character, as an earlier one
min_chars = 1  # leave out shorter documents
# what to write
val_fraction = 0.01  # of the documents, by their hash, for validation
tokenizer = "gpt2"  # 'gpt2', 'char', 'bpe' (trained on it), or a dataset folder, out_dir, .pt file, Hugging Face folder
vocab_size = 8192  # of 'bpe'
byte_fallback = True  # with 'char': 256 byte tokens, so that any text has tokens
min_count = 1  # with 'char': rarer characters take the byte tokens instead of one of their own
num_proc = 1  # processes that encode, worth it for BPE on many cores
dest = ""  # the folder for the dataset; default: this folder
config = configure(globals())

import corpus
from documents import template_of
from writing import held, progress_bar


def stream(config: Config, split: str, file: Path) -> None:
    """Writes the columns of a split's documents to a file, as JSON lines. UserError where they cannot be had."""
    try:
        import datasets
    except ImportError as error:
        raise UserError("this needs Hugging Face datasets: pip install datasets") from error
    columns = list(template_of([name.strip() for name in config.fields.split(",")], config.template).fields)
    count, total = 0, config.max_documents or None
    try:
        options = {"data_files": config.data_files} if config.data_files else {}
        documents = datasets.load_dataset(config.path, config.name or None, split=split, streaming=True, **options)
        with (
            file.open("w", encoding="utf-8", newline="\n") as lines,
            progress_bar(total, split, "documents") as progress,
        ):
            for document in documents.take(total) if total else documents:
                if missing := [name for name in columns if name not in document]:
                    key = "fields" if "fields" in config.given else "text_column"
                    raise UserError(f"--{key}={missing[0]}: there is no such column among {', '.join(document)}")
                lines.write(json.dumps({name: document[name] for name in columns}, ensure_ascii=False) + "\n")
                count += 1
                progress(1)
    except UserError:
        raise
    except Exception as error:  # those of the Hub's client, of the network library, of pyarrow
        cause = error.__cause__ or error
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
        raise UserError(
            f"cannot stream {config.path}, after {count:,} documents ({reason}): check the names and the network, set "
            "HF_ENDPOINT to a mirror of the Hub, or give local files with --data_files"
        ) from error


def main(config: Config) -> None:
    if not config.path:
        raise UserError("--path= names the dataset, such as wikimedia/wikipedia (--help shows examples)")
    config.fields, here = config.fields or config.text_column, Path(__file__).resolve().parent
    corpus.check_options(config)
    with held(config.dest or here) as folder:
        splits = {folder / ".documents-train.jsonl": config.split, folder / ".documents-val.jsonl": config.val_split}
        files = [file for file, split in splits.items() if split]
        try:
            for file in files:
                stream(config, splits[file], file)
            config.val_input = list(map(str, files[1:]))
            corpus.prepare(corpus.open_source([str(files[0])], config), config, here)
        finally:
            for file in files:
                file.unlink(missing_ok=True)


if __name__ == "__main__":
    run(main, config)
