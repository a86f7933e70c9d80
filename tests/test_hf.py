"""data/hf/prepare.py, run as a user runs it, on the Hub's own builders with local files; the Hub is never asked."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import run_script

from writing import held

pytest.importorskip("datasets")
DOCUMENTS = [{"title": f"第{n}篇", "text": f"这是第{n}篇文章。\n它有两行。", "stars": n % 5} for n in range(60)]


def prepare(dest: Path, *words: str, cwd: Path):
    return run_script("data/hf/prepare.py", f"--dest={dest}", "--tokenizer=char", *words, cwd=cwd)


def documents(dest: Path, split: str) -> list[str]:
    """Decodes by hand: characters, then 256 bytes, then <|endoftext|>."""
    chars = json.loads((dest / "meta.json").read_text(encoding="utf-8"))["chars"]
    table = [*chars, *[None] * 256, "\0"]
    return "".join(table[id] for id in np.fromfile(dest / f"{split}.bin", "<u2")).split("\0")[:-1]


@pytest.fixture
def files(tmp_path) -> dict[str, list[str]]:
    """The same documents as Parquet, in two files, and as JSON lines."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for number, part in enumerate((DOCUMENTS[:40], DOCUMENTS[40:])):
        parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / f"{number}.parquet")
    lines = "\n".join(json.dumps(document, ensure_ascii=False) for document in DOCUMENTS)
    (tmp_path / "all.jsonl").write_text(lines, encoding="utf-8")
    return {
        "parquet": [f"--data_files={tmp_path / f'{n}.parquet'}" for n in range(2)],
        "json": [f"--data_files={tmp_path / 'all.jsonl'}"],
    }


@pytest.mark.parametrize("builder", ["parquet", "json"])
def test_local_builders(tmp_path, files, builder):
    dest = tmp_path / "out"
    done = prepare(dest, f"--path={builder}", *files[builder], "--val_fraction=0.1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    train, val = documents(dest, "train"), documents(dest, "val")
    assert sorted(train + val) == sorted(document["text"] for document in DOCUMENTS) and val
    assert sorted(path.name for path in dest.iterdir()) == [".lock", "meta.json", "train.bin", "val.bin"]


def test_fields_a_part_and_the_datasets_own_validation_split(tmp_path, files):
    dest = tmp_path / "out"
    words = "--fields=title,text", "--max_documents=30", "--val_split=train[:10]"
    done = prepare(dest, "--path=json", *files["json"], *words, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr  # slices cannot be streamed
    words = "--fields=title,text", "--max_documents=30", "--val_split=train", "--dedup"
    done = prepare(dest, "--path=json", *files["json"], *words, cwd=tmp_path)
    assert done.returncode == 2 and "val_input" in done.stderr.splitlines()[-1]  # the same documents: nothing is left
    done = prepare(dest, "--path=json", *files["json"], *words[:3], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = [f"《{document['title']}》\n{document['text']}" for document in DOCUMENTS[:30]]
    assert documents(dest, "train") == documents(dest, "val") == expected
    assert json.loads((dest / "meta.json").read_text(encoding="utf-8"))["template"] == "《{title}》\n{content}"


def test_two_at_once_and_what_a_killed_run_left(tmp_path, files):
    dest = tmp_path / "out"
    with held(dest):
        (dest / ".documents-train.jsonl").write_text("the other run's")
        done = prepare(dest, "--path=json", *files["json"], cwd=tmp_path)
        assert done.returncode == 2 and "another prepare.py is writing into" in done.stderr.splitlines()[-1]
        assert (dest / ".documents-train.jsonl").read_text() == "the other run's"
    with held(dest):
        assert [path.name for path in dest.iterdir()] == [".lock"]


def test_mistakes_are_sentences_and_leave_nothing(tmp_path, files):
    dest = tmp_path / "out"
    for words, said in (
        ([], "--path="),
        (["--path=json", *files["json"], "--text_column=body"], "--text_column=body"),
        (["--path=json", *files["json"], "--fields=title,body"], "--fields=body"),
        (["--path=json", *files["json"], "--val_fraction=2"], "--val_fraction=2"),
        (["--path=json", *files["json"], "--split=test"], "test"),
        (["--path=json", "--data_files=nowhere.jsonl"], "nowhere.jsonl"),
        (["--path=nobody/nothing"], "HF_ENDPOINT"),
    ):
        done = prepare(dest, *words, cwd=tmp_path)
        sentence = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 2 and "Traceback" not in done.stderr and said in sentence, done.stderr
        assert not dest.exists() or not list(dest.iterdir())
