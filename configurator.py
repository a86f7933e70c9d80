"""Overrides a script's own defaults with config files and --key=value, in the order in which they are given.

A script writes its defaults as plain assignments, each with a comment, and calls one function before its heavy imports:

    out_dir = "out"  # where checkpoints go
    config = configure(globals())

    $ python train.py config/train_chinese.py --batch_size=32 --compile=False

The default's type is the key's type; `--help` is made from the script's own source. Config files are Python and are
executed: they are the user's own, as in nanoGPT.
"""

import ast
import difflib
import io
import math
import os
import sys
import textwrap
import tokenize
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent
TRUE, FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
SCOPES += (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
EXPECTED = {bool: "True or False", int: "a whole number", float: "a number", str: "text", list: "a list"}


class UserError(ValueError):
    """A mistake that the user can mend, told in one sentence: what is wrong, what was expected, what to do."""


class Config(SimpleNamespace):
    """A script's settings as attributes. `given` names those that the user set, the latest last."""

    __slots__ = ("given",)


def configure(namespace: dict[str, Any], positionals: Sequence[str] = (), argv: Sequence[str] | None = None) -> Config:
    """The defaults found in `namespace`, overridden by the command line.

    `positionals` names the keys that words without `--` fill, in order; a list key takes all that are left. Every
    other word is a config file. Without `argv`, a script that is being run reads its command line, and a user's mistake
    ends it with one sentence and exit status 2; a script that is only imported gets its defaults. With `argv`, a
    mistake raises UserError.
    """
    values = {k: v for k, v in namespace.items() if not k.startswith("_") and k.islower() and type(v) in EXPECTED}
    if argv is not None:
        return _override(values, namespace, positionals, argv)
    if namespace.get("__name__") != "__main__":
        return _override(values, namespace, positionals, [])
    for stream in (sys.stdout, sys.stderr):
        # a console that lacks a character (GBK, ASCII) shows "?" instead of raising
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace", line_buffering=True)
    sys.excepthook = _excepthook
    if {"-h", "--help"} & set(sys.argv[1:]):
        run(print, help_text(values, namespace))
        sys.exit(0)
    return run(lambda: _override(values, namespace, positionals, sys.argv[1:]))


def run(main: Callable[..., Any], *args: Any) -> Any:
    """Calls main(*args); a UserError becomes one sentence on stderr and exit status 2, Ctrl-C exit status 130."""
    try:
        return main(*args)
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        tell(f"{Path(sys.argv[0]).name}: {f'process {rank}: ' if rank != '0' else ''}{error}")
        sys.exit(2)
    except KeyboardInterrupt:
        tell("interrupted")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        sys.exit(141)
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # it left, or its disk is full: what is still in the buffer has nowhere to go
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Ctrl-C while a script is still importing, outside run(), shows no traceback either."""
    if issubclass(kind, KeyboardInterrupt):
        tell("interrupted")
    else:
        sys.__excepthook__(kind, error, trace)


@contextmanager
def user_errors(*kinds: type[Exception], about: str = "") -> Iterator[None]:
    """Inside, exceptions of these kinds become a UserError with the same sentence, after the words `about`."""
    try:
        yield
    except kinds as error:
        is_about_file = isinstance(error, OSError) and error.strerror and error.filename is not None
        reason = (
            f"{error.strerror}: {error.filename}" if is_about_file else getattr(error, "strerror", "") or str(error)
        )
        raise UserError(f"{about}: {reason}" if about else reason) from error


def _override(values: dict[str, Any], namespace: dict[str, Any], positionals: Sequence[str], argv) -> Config:
    config = Config(**values)
    config.given = []
    script = Path(namespace.get("__file__", "this script")).name
    words, unfilled, from_command_line = list(argv), list(positionals), set()

    def give(key: str, value: Any, where: str) -> None:
        value = coerce(value, values[key], where)
        if isinstance(value, list) and key in from_command_line:
            value = getattr(config, key) + value
        setattr(config, key, value)
        config.given = [k for k in config.given if k != key] + [key]

    while words:
        word = words.pop(0)
        if word.startswith("--"):
            key, equals, text = word[2:].partition("=")
            key = key.replace("-", "_")
            if key not in values:
                nearest = difflib.get_close_matches(key, values, n=1, cutoff=0.0)
                meant = f"; did you mean --{nearest[0]}?" if nearest else ";"
                raise UserError(f"unknown key --{key}{meant} (--help lists every key)")
            if not equals and isinstance(values[key], bool):
                text = "True"
            elif not equals:
                if not words or words[0].startswith("--"):
                    raise UserError(f"--{key} needs a value, {EXPECTED[type(values[key])]}: write --{key}=...")
                text = words.pop(0)
            give(key, text, f"--{key}={text}")
            from_command_line.add(key)
        elif unfilled and not word.endswith(".py"):
            key = unfilled[0]
            give(key, word, f"{key}={word}")
            from_command_line.add(key)
            if not isinstance(values[key], list):
                unfilled.pop(0)
        else:
            found, unused = read_config_file(_config_path(word, values), vars(config))
            for key, value in found.items():
                give(key, value, f"{word}: {key} = {value!r}")
                from_command_line.discard(key)
            if unused:
                note(f"note: {word} also sets {', '.join(unused)}, which {script} does not use")
    if config.given:
        shown = {k: "..." if k.endswith("api_key") else repr(getattr(config, k)) for k in config.given}
        note("overriding: " + ", ".join(f"{k} = {value}" for k, value in shown.items()))
    return config


def coerce(value: Any, default: Any, where: str) -> Any:
    """`value`, text from the command line or an object from a config file, as the type of `default`; else UserError."""
    kind = type(default)
    if kind is bool:
        word = str(value).strip().lower()
        if word in TRUE | FALSE:
            return word in TRUE
    elif kind is list:
        return [str(item) for item in (value if isinstance(value, list | tuple) else [value])]
    elif kind is str and isinstance(value, str | os.PathLike):
        return str(value)
    elif kind in (int, float) and not isinstance(value, bool):
        try:
            number = int(value) if isinstance(value, int | str) else float(value)
        except (ValueError, TypeError):
            try:
                number = float(value)
            except (ValueError, TypeError):
                number = math.nan
        if kind is float and not math.isnan(number):
            return float(number)
        if kind is int and math.isfinite(number) and number == int(number):
            return int(number)
    raise UserError(f"{where}: expected {EXPECTED[kind]}, such as {default!r}")


def _config_path(word: str, values: dict[str, Any]) -> Path:
    for path in (Path(word), ROOT / word):
        if path.is_file() and path.suffix == ".py":
            return path
        if path.is_file():
            raise UserError(f"{word} is no config file, whose name ends in .py; a key is written --key={word}")
    if word.partition("=")[0].lstrip("-") in values:
        raise UserError(f"{word}: a key begins with two dashes: --{word.lstrip('-')}")
    if word.lower() in TRUE | FALSE:
        raise UserError(f"{word} stands alone; to set a flag, write --key={word}")
    if word.startswith("-"):
        raise UserError(f"{word}: unknown option; keys are written --key=value (--help lists them)")
    known = ", ".join(sorted(f"config/{p.name}" for p in (ROOT / "config").glob("*.py")))
    raise UserError(f"no config file {word}; there are {known}")


def read_config_file(path: Path, values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Executes a config file over `values`; gives the keys it sets and the other names it assigns (no modules)."""
    names = dict(values, __file__=str(path), __name__="config")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8-sig"), str(path))
        exec(compile(tree, str(path), "exec"), names)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from error
    except Exception as error:  # whatever the user's Python raises, told as a sentence with its line
        trace, line = error.__traceback__, 0
        while trace:
            line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == str(path) else line
            trace = trace.tb_next
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    assigned = [name for name in dict.fromkeys(_stored(tree)) if name in names]
    unused = [n for n in assigned if n not in values and not n.startswith("_") and not callable(names[n])]
    return {name: names[name] for name in assigned if name in values}, unused


def _stored(node: ast.AST) -> Iterator[str]:
    """The names that a module's own code assigns, not those inside its functions and comprehensions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id
        elif not isinstance(child, SCOPES):
            yield from _stored(child)


def help_text(values: dict[str, Any], namespace: dict[str, Any]) -> str:
    """The script's docstring and every key with its default and its comment, read from the script's source."""
    source = Path(namespace["__file__"]).read_text(encoding="utf-8")
    comments = {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    lines = [(namespace.get("__doc__") or "").strip(), "", "Keys, as --key=value, and config files; a later one wins:"]
    shown = set()
    for node in ast.parse(source).body:
        name = node.targets[0].id if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) else ""
        if name not in values or name in shown:
            continue
        shown.add(name)
        heading, alone = comments.get(node.lineno - 1, ("", False))
        if alone and heading.strip("-"):
            lines += ["", f"  {heading}"]
        value = values[name]
        default = value if isinstance(value, str) and value and value == value.strip() else repr(value)
        comment = comments.get(node.end_lineno, ("", False))[0]
        indent = " " * 34
        text = textwrap.wrap(comment, 84, initial_indent=indent, subsequent_indent=indent) or [""]
        key = f"    --{name}={default}"
        lines += [f"{key:<33} {text[0].strip()}", *text[1:]] if len(key) < 34 else [key, *text]
    return "\n".join(lines)


def note(text: str) -> None:
    """A line on stderr, under torchrun from the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        tell(text)


def tell(text: str) -> None:
    """A line on stderr, if it takes one: it may be a file on a full disk, and nothing is to fail for that."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)
