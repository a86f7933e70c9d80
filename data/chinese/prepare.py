"""A Chinese text, or a folder of them, as a character-level dataset: train.bin, val.bin and meta.json.

    $ python data/chinese/prepare.py                                        # 723 short stories that come with weiGPT
    $ python data/chinese/prepare.py --input=novel.txt --encoding=gb18030   # a text of your own
    $ python data/chinese/prepare.py --input=essays/ --dest=data/essays     # each .txt file is a document

Any text has tokens, whatever its characters: those outside the vocabulary become the bytes of their UTF-8.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(p) for p in Path(__file__).resolve().parents[1:3]]
from configurator import Config, configure, run

input = []  # a text file (several: --input=a.txt --input=b.txt) or a folder; default: input.txt here, else the stories
encoding = "utf-8"  # of the input; older Chinese texts are often gb18030 or big5
val_fraction = 0.1  # the last part of the text, kept for validation
tokenizer = "char"  # "char", "gpt2", or a dataset folder, out_dir, .pt file or Hugging Face folder: its vocabulary
byte_fallback = True  # 256 byte tokens, so that any text has tokens
min_count = 1  # characters rarer than this take the byte tokens instead of one of their own
dest = ""  # the folder for the dataset; default: this folder
config = configure(globals())

import corpus


def main(config: Config) -> None:
    here = Path(__file__).resolve().parent
    if config.input:
        source = corpus.open_inputs(config.input, config.encoding)
    elif (here / "input.txt").is_file():
        source = corpus.open_inputs([str(here / "input.txt")], config.encoding)
    else:
        source = corpus.Source((here / "stories_zh.txt",), mode="blank", template="《{title}》\n{content}")
    corpus.prepare(source, config, here)


if __name__ == "__main__":
    run(main, config)
