"""Shakespeare's plays in GPT-2's tokens, for finetuning, byte for byte nanoGPT's train.bin and val.bin.

    $ python data/shakespeare/prepare.py                                # downloads 1.1 MB, once
    $ python data/shakespeare/prepare.py --input=tinyshakespeare.txt    # the same text, or another, from a file

301,966 tokens to train on, 36,059 to validate with. Needs tiktoken.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(p) for p in Path(__file__).resolve().parents[1:3]]
from configurator import Config, configure, run

input = []  # a text file (several: --input=a.txt --input=b.txt) or a folder; default: input.txt here, else a download
encoding = "auto"  # of the input: told from the file, or its name, such as gb18030
val_fraction = 0.1  # the last part of the text, kept for validation
tokenizer = "gpt2"  # "char", "gpt2", or a dataset folder, out_dir, .pt file or Hugging Face folder: its vocabulary
byte_fallback = False  # with "char": 256 byte tokens, so that any text has tokens; False gives nanoGPT's ids alone
min_count = 1  # with byte_fallback: characters rarer than this take the byte tokens
dest = ""  # the folder for the dataset; default: this folder
config = configure(globals())

import corpus


def main(config: Config) -> None:
    here = Path(__file__).resolve().parent
    source = corpus.open_source(config.input or [corpus.tiny_shakespeare(here)], config)
    corpus.prepare(source, config, here)


if __name__ == "__main__":
    run(main, config)
