"""A Chinese text, or a corpus, in tokens of a byte-level BPE that is trained on it. Needs Hugging Face tokenizers.

    $ python data/chinese_bpe/prepare.py                                       # the stories that come with weiGPT
    $ python data/chinese_bpe/prepare.py --input=novels/ --vocab_size=16384    # a folder of your own
    $ python data/chinese_bpe/prepare.py --input=more.txt --tokenizer=data/chinese_bpe --dest=data/more

A token is a word, a part of one, or a byte of a rare character: any text has tokens. The vocabulary is tokenizer.json
beside the .bin files, for any program that reads Hugging Face's, and is in every checkpoint.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(p) for p in Path(__file__).resolve().parents[1:3]]
from configurator import Config, configure, run

# what to read
input = []  # files, folders, patterns (repeat the key for several); default: input.txt here, else data/chinese's
val_input = []  # the corpus's own validation files, in place of val_fraction
encoding = "auto"  # of text: told from each file, or its name, such as gb18030
errors = "stop"  # at bytes that cannot be decoded: 'stop', or 'skip' the document
normalize = "none"  # 'nfkc', 't2s' (traditional to simplified), 'strip' (NUL, spaces around lines), or "nfkc,strip"
format = "auto"  # told from the fields, or 'text', or the corpus, such as 'wiki2019zh': data/README.md has them all
fields = ""  # of records in another format, such as "title,content"; of a table without names, such as "1"
template = ""  # how the fields make a document, such as "{title}: {content}"; default: 《title》, then a line each
min_star = 0.0  # of webtext2019zh, only answers with so many
max_bad = "0.1%"  # malformed records are left out; more than this of them stop it
document = "auto"  # in plain text: 'file', 'blank' (lines between), 'line', or 'text' (a lone file, without an end)
dedup = False  # leave out documents that are the same, character by character, as an earlier one
min_chars = 1  # leave out shorter documents
# what to write
val_fraction = 0.1  # for validation: of documents by their hash, of one text its last part
tokenizer = "bpe"  # 'bpe' (trained on it), 'gpt2', 'char', or a dataset folder, out_dir, .pt file, Hugging Face folder
vocab_size = 8192  # tokens of 'bpe', fewer where the text has no more; usually 8192 to 65536
byte_fallback = True  # with 'char': 256 byte tokens, so that any text has tokens
min_count = 1  # with 'char': rarer characters take the byte tokens instead of one of their own
num_proc = 1  # processes that encode, worth it for BPE on many cores
dest = ""  # the folder for the dataset; default: this folder
config = configure(globals())

import corpus
from documents import TEMPLATE


def main(config: Config) -> None:
    here = Path(__file__).resolve().parent
    own, stories = here / "input.txt", here.parent / "chinese" / "stories_zh.txt"
    inputs = config.input or [str(own if own.is_file() else stories)]
    if inputs == [str(stories)] and not config.input and config.document == "auto":
        config.document = "blank"
    source = corpus.open_source(inputs, config)
    corpus.prepare(source, config, here, layout=TEMPLATE if inputs == [str(stories)] else "")


if __name__ == "__main__":
    run(main, config)
