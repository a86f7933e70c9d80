import sys

import pytest
from conftest import ROOT, run_script

from configurator import Config, UserError, coerce, configure

SOURCE = '''"""A script with a docstring."""
from configurator import configure
# a heading
out_dir = "out"  # where files go, 文件
learning_rate = 6e-4  # a number
max_iters = 100  # a whole number
compile = True  # a flag
start = "\\n"  # text
input = []  # a list
config = configure(globals(), positionals=("start",))
print(repr(dict(vars(config))))
'''


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SOURCE, encoding="utf-8")
    return path


def parse(*argv, positionals=(), tmp=None) -> Config:
    defaults = {
        "__file__": "script.py",
        "out_dir": "out",
        "learning_rate": 6e-4,
        "max_iters": 100,
        "compile": True,
        "dropout": 0.1,
        "start": "\n",
        "input": [],
        "CONSTANT": 3,
        "_hidden": 4,
    }
    return configure(defaults, positionals, list(argv))


def test_keys_are_the_plain_lower_case_assignments():
    assert set(vars(parse())) == {
        "out_dir", "learning_rate", "max_iters", "compile", "dropout", "start", "input"
    }  # fmt: skip


@pytest.mark.parametrize(
    "word, key, value",
    [
        ("--learning_rate=1", "learning_rate", 1.0),
        ("--learning_rate=1e-3", "learning_rate", 1e-3),
        ("--max_iters=1e4", "max_iters", 10000),
        ("--max_iters=1_000", "max_iters", 1000),
        ("--max-iters=7", "max_iters", 7),
        ("--compile=false", "compile", False),
        ("--compile=0", "compile", False),
        ("--compile=Yes", "compile", True),
        ("--dropout=0", "dropout", 0.0),
        ("--out_dir=a=b", "out_dir", "a=b"),
        ("--out_dir=", "out_dir", ""),
        ("--start=123", "start", "123"),
        ("--start=《你好》", "start", "《你好》"),
        ("--input=x", "input", ["x"]),
    ],
)
def test_values_take_the_type_of_the_default(word, key, value):
    config = parse(word)
    assert getattr(config, key) == value and type(getattr(config, key)) is type(value)
    assert config.given == [key]


def test_a_value_may_be_the_next_word():
    config = parse("--start", "-1", "--max_iters", "5")
    assert (config.start, config.max_iters) == ("-1", 5)


def test_a_bare_flag_means_true_and_takes_no_word():
    config = parse("--compile=False", "--compile", "hello", positionals=("start",))
    assert config.compile is True and config.start == "hello"


def test_repeated_list_keys_add_and_a_list_positional_takes_all():
    assert parse("--input=a", "--input", "b").input == ["a", "b"]
    assert parse("a", "b", "--max_iters=3", "c", positionals=("input",)).input == ["a", "b", "c"]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--max_iter=3"], ["--max_iter;", "--max_iters"]),
        (["--zzz=3"], ["unknown key --zzz"]),
        (["--max_iters=1.5"], ["whole number", "1.5"]),
        (["--max_iters=inf"], ["whole number"]),
        (["--max_iters=many"], ["whole number", "many"]),
        (["--learning_rate=fast"], ["expected a number"]),
        (["--learning_rate=nan"], ["expected a number"]),
        (["--compile=perhaps"], ["True or False"]),
        (["--max_iters"], ["needs a value"]),
        (["--out_dir", "--compile"], ["needs a value"]),
        (["max_iters=3"], ["--max_iters=3"]),
        (["--compile", "False"], ["--key=False"]),
        (["-x"], ["-x"]),
        (["config/missing.py"], ["config/missing.py", "config/train_gpt2.py"]),
    ],
)
def test_mistakes_are_sentences(argv, words):
    with pytest.raises(UserError) as error:
        parse(*argv)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_config_files_run_in_order_with_the_command_line(tmp_path, capsys):
    path = tmp_path / "c.py"
    path.write_text(
        "# 中文\nimport time\nfrom math import pi\nmax_iters = 50\nlearning_rate = max_iters * 2 # refers to a key\n"
        "out_dir = 'run-' + str(time.time())\nbatch = 3\n_private = 4\nitems = [max_iters for _ in range(2)]\n",
        encoding="utf-8",
    )
    config = parse("--max_iters=3", str(path), "--learning_rate=0.5")
    assert (config.max_iters, config.learning_rate) == (50, 0.5) and config.out_dir.startswith("run-1")
    note = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
    assert len(note) == 1 and "batch" in note[0] and "time" not in note[0] and "_private" not in note[0]
    assert parse(str(path), "--max_iters=3").max_iters == 3
    assert "max_iters" in parse(str(path)).given


def test_setting_a_key_to_its_default_counts_as_given(tmp_path):
    path = tmp_path / "c.py"
    path.write_text("max_iters = 100\n", encoding="utf-8")
    assert parse(str(path)).given == ["max_iters"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("x = = 3\n", "line 1"),
        ("y = 1\nx = 1 / 0\n", "line 2: ZeroDivisionError"),
        ("max_iters = 'a lot'\n", "expected a whole number"),
        ("compile = 3\n", "expected True or False"),
        ("out_dir = 3\n", "expected text"),
    ],
)
def test_mistakes_in_config_files_are_sentences(tmp_path, text, words):
    path = tmp_path / "c.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        parse(str(path))


def test_a_config_file_in_another_encoding_is_a_sentence(tmp_path):
    path = tmp_path / "c.py"
    path.write_bytes("out_dir = '中文'".encode("gbk"))
    with pytest.raises(UserError, match="UTF-8"):
        parse(str(path))


def test_a_text_is_never_executed_as_a_config_file(tmp_path):
    (tmp_path / "novel.txt").write_text("max_iters = 7", encoding="utf-8")
    with pytest.raises(UserError, match="no config file"):
        parse(str(tmp_path / "novel.txt"))


def test_coerce_from_a_checkpoint_config():
    assert coerce(3, 0.5, "x") == 3.0 and coerce(4.0, 1, "x") == 4 and coerce(("a",), [], "x") == ["a"]
    with pytest.raises(UserError):
        coerce(True, 1, "x")


def run_it(script, *argv, cwd, **env):
    return run_script(script, *argv, cwd=cwd, env={"PYTHONPATH": str(ROOT)} | env)


def test_a_script_from_another_folder_finds_our_configs(script, tmp_path):
    done = run_it(script, "config/train_shakespeare_char.py", "--start=x", cwd=tmp_path)
    assert done.returncode == 0 and "'max_iters': 5000" in done.stdout and "'start': 'x'" in done.stdout


def test_a_mistake_ends_a_script_with_status_2_and_no_traceback(script, tmp_path):
    done = run_it(script, "--max_iter=3", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "script.py: unknown key --max_iter; did you mean --max_iters? (--help lists every key)\n"


def test_help_shows_every_key_with_default_and_comment(script, tmp_path):
    done = run_it(script, "--help", cwd=tmp_path)
    assert done.returncode == 0
    for words in ("A script with a docstring.", "a heading", "--out_dir=out", "where files go, 文件", r"--start='\n'"):
        assert words in done.stdout


@pytest.mark.parametrize("name", ["train.py", "sample.py", "bench.py", "data/chinese/prepare.py"])
def test_help_does_not_wait_for_torch(name, tmp_path):
    done = run_script(name, "--help", cwd=tmp_path, env={"PYTHONPATH": str(forbid_torch(tmp_path))})
    assert done.returncode == 0, done.stderr
    assert "--seed=1337" in done.stdout or "--val_fraction=0.1" in done.stdout


def forbid_torch(folder):
    (folder / "torch.py").write_text("raise RuntimeError('torch was imported')", encoding="utf-8")
    return folder


def test_help_in_a_gbk_console_and_in_the_c_locale(script, tmp_path):
    for env in ({"PYTHONIOENCODING": "gbk"}, {"PYTHONIOENCODING": "ascii"}, {"LANG": "C", "LC_ALL": "C"}):
        done = run_it(script, "--help", cwd=tmp_path, **env)
        assert done.returncode == 0 and "--out_dir=out" in done.stdout, (env, done.stderr, sys.version)
