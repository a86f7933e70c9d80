"""A checkpoint as a Hugging Face folder, for transformers, vLLM, lm-evaluation-harness and whatever else reads those.

    $ python extras/export.py --out_dir=out-chinese              # writes out-chinese/hf/
    $ python extras/export.py --out_dir=out --dest=my-model
    $ python sample.py --init_from=out-chinese/hf                # and the way back

Notable choices:
- Nothing of transformers is needed to write it: config.json, model.safetensors and tokenizer.json are formats.
- A char tokenizer becomes a BPE without merges, its bytes the <0x00> to <0xFF> of Llama's; it keeps its ids.
- A layout of conversations becomes a chat template, so that apply_chat_template gives the ids that were trained on;
  but not of a message that spells out a mark, which transformers takes for the token.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import Config, UserError, configure, run, user_errors

out_dir = "out"  # the checkpoint to export: a folder with ckpt.pt, or a .pt file
dest = ""  # the folder to write; default: hf/ in out_dir. An earlier export there is replaced
config = configure(globals())

import json
import os
import tempfile

import checkpoint
from adapt import is_adapted
from chat import ChatTokenizer
from tokenizer import (
    BYTE_OF,
    END_OF_TEXT,
    BPETokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    byte_level_json,
    tokenizer_json,
)

WRITTEN = ["config.json", "generation_config.json", "model.safetensors"]
WRITTEN += ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"]


def check_dest(dest: Path) -> None:
    """UserError where something is there already that is no earlier export, untouched since."""
    if not dest.exists() or dest.is_dir() and not any(dest.iterdir()):
        return
    about = f"{dest} is there and no earlier export; choose another --dest"
    with user_errors(OSError, ValueError, TypeError, about=about):
        found = json.loads((dest / "config.json").read_text(encoding="utf-8"))
        others = sorted(path.name for path in dest.iterdir() if path.name not in WRITTEN)
        if "weigpt_bias" not in found or "transformers_version" in found or others:
            raise ValueError(f"it holds {others[0]}" if others else "its config.json is not from here")


def tokenizer_files(tokenizer: Tokenizer, block_size: int) -> dict[str, str]:
    """The tokenizer's files, by name, with their text."""
    if isinstance(tokenizer, ChatTokenizer):
        return chat_files(tokenizer, block_size)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size}
    settings["clean_up_tokenization_spaces"] = False
    special, files = {}, {}
    if tokenizer.end_of_text is not None:
        token = tokenizer.decode([tokenizer.end_of_text])
        special[token] = tokenizer.end_of_text
        settings |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), token)
    if isinstance(tokenizer, BPETokenizer):
        files["tokenizer.json"] = tokenizer.json
        if tokenizer.unknown_id is not None:
            settings["unk_token"] = tokenizer.decode([tokenizer.unknown_id])
    elif isinstance(tokenizer, GPT2Tokenizer):
        vocab, merges = gpt2_vocabulary(tokenizer)
        files["tokenizer.json"] = byte_level_json(vocab, merges, special)
        files["vocab.json"] = json.dumps(vocab, ensure_ascii=False)
        files["merges.txt"] = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)])
    elif isinstance(tokenizer, CharTokenizer):
        tokens = [*tokenizer.chars, *(f"<0x{b:02X}>" for b in range(256 * tokenizer.byte_fallback)), *special]
        model = {"type": "BPE", "byte_fallback": True, "merges": []}
        model["vocab"] = {token: id for id, token in enumerate(tokens)}
        decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
        files["tokenizer.json"] = tokenizer_json(model, special, decoder=decoder)
        settings["weigpt_tokenizer"] = tokenizer.meta()
    return files | {"tokenizer_config.json": json.dumps(settings, ensure_ascii=False, indent=2)}


def chat_files(tokenizer: ChatTokenizer, block_size: int) -> dict[str, str]:
    """Those of its base with the marks of the layout, and the layout as a template."""
    files = tokenizer_files(tokenizer.base, block_size)
    definition, settings = (json.loads(files[name]) for name in ("tokenizer.json", "tokenizer_config.json"))
    definition["added_tokens"] += json.loads(tokenizer_json({}, tokenizer.special))["added_tokens"]
    end = tokenizer.decode([tokenizer.end_of_text])
    settings |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), end)
    settings |= {"chat_template": chat_template(tokenizer, end), "weigpt_tokenizer": tokenizer.meta()}
    return {
        "tokenizer.json": json.dumps(definition, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(settings, ensure_ascii=False, indent=2),
    }


def chat_template(tokenizer: ChatTokenizer, end: str) -> str:
    """The layout in Jinja, `end` in the place of <|endoftext|>."""
    parts = {role: text.replace(END_OF_TEXT, end).split("{content}") for role, text in tokenizer.layout.items()}
    quoted = {role: [json.dumps(part, ensure_ascii=False) for part in pair] for role, pair in parts.items()}
    cases = "{% el".join(
        f"if message['role'] == '{role}' %}}{{{{ {before} + message['content'] + {after} }}}}"
        for role, (before, after) in quoted.items()
    )
    opening = f"{{% if add_generation_prompt %}}{{{{ {quoted['assistant'][0]} }}}}{{% endif %}}"
    return f"{{% for message in messages %}}{{% {cases}{{% endif %}}{{% endfor %}}{opening}"


def gpt2_vocabulary(tokenizer: GPT2Tokenizer) -> tuple[dict[str, int], list[list[str]]]:
    """GPT-2's tokens with their ids, and its merges in their order, as its first files had them.

    tiktoken keeps the tokens alone. The two parts that were merged into one are what is left of its bytes when all
    earlier merges are done.
    """
    ranks = tokenizer._encoding._mergeable_ranks
    letter = {byte: c for c, byte in BYTE_OF.items()}
    spelled = {token: "".join(letter[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:], strict=False)]
            i = pairs.index(min(pairs))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append([spelled[part] for part in parts])
    return {spelled[token]: rank for token, rank in ranks.items()} | {END_OF_TEXT: tokenizer.end_of_text}, merges


def main(c: Config) -> None:
    path, state = checkpoint.best(c.out_dir)
    dest = Path(c.dest or path.parent / "hf")
    check_dest(dest)
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise UserError("the weights need a package: pip install safetensors") from None
    model = checkpoint.model_of(state, path, state["model_args"].get("dropout", 0.0))
    if is_adapted(model):
        raise UserError(f"{path} has adapters, and GPT-2's layout has no place for those (LoRA is merged)")
    tokenizer = checkpoint.tokenizer_of(state, path)
    with user_errors(ValueError, about=str(path)):
        settings, tensors = model.to_hf()
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.end_of_text)
    files = {"config.json": json.dumps(settings | ends, indent=2), "generation_config.json": json.dumps(ends, indent=2)}
    files |= tokenizer_files(tokenizer, model.config.block_size)
    with user_errors(OSError, SafetensorError, about=f"{dest} cannot be written"):
        dest.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{dest.name}.", dir=dest.parent) as beside:
            new, old = Path(beside) / "new", Path(beside) / "old"
            new.mkdir()
            save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
            for name, text in files.items():
                (new / name).write_text(text + "\n", encoding="utf-8", newline="\n")
            (new / "model.safetensors").chmod((new / "config.json").stat().st_mode)  # it is made for its owner alone
            for written in new.iterdir():
                with written.open("rb+") as file:
                    os.fsync(file.fileno())
            try:
                if dest.exists():
                    dest.rename(old)
                new.rename(dest)
            except BaseException:  # Ctrl-C, too
                if old.exists() and not dest.exists():
                    old.rename(dest)
                raise
    parameters = model.get_num_params(non_embedding=False)
    print(f"{path} -> {dest}: {parameters:,} parameters, {', '.join(sorted(['model.safetensors', *files]))}")


if __name__ == "__main__":
    run(main, config)
