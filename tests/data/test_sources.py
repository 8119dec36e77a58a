"""Files, folders, the embedded default and the Hub, and what is said when there is nothing."""

import bz2
import csv
import errno
import functools
import gzip
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, concatenate_datasets
from datasets.exceptions import DatasetNotFoundError

from aligndistil.data.sources import FileRead, content_hash, load_rows, open_source
from aligndistil.errors import ServiceError, UserError
from aligndistil.files import cache_root
from aligndistil.recipe import Source

gzipped = functools.partial(gzip.compress, mtime=0)
"""Names of tests hold these bytes: every process must make the same."""

ROWS = [{"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(5)]
CONFIG = b"---\nconfigs:\n- config_name: a\n  data_files: [{split: mine, path: sub/*.jsonl}]\n---\n"
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def rows_of(path: object, **fields: Any) -> list[dict[str, Any]]:
    return list(load_rows(Source(path=str(path), **fields)))


def files_in(path: object, **fields: Any) -> list[tuple[str, int]]:
    return [(file.name, file.rows) for file in open_source(Source(path=str(path), **fields)).files]


def refusal(path: object, **fields: Any) -> str:
    with pytest.raises(UserError) as raised:
        load_rows(Source(path=str(path), **fields))
    assert raised.value.exit_code == 2
    assert "\n" not in str(raised.value)
    return str(raised.value)


def table(separator: str) -> bytes:
    lines = [separator.join(ROWS[0]), *(separator.join(row.values()) for row in ROWS)]
    return ("\n".join(lines) + "\n").encode()


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    Dataset.from_list(ROWS).to_parquet(sink)
    return bytes(sink.getvalue())


def folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# One file


@pytest.mark.parametrize(
    ("name", "content"),
    {
        "a.jsonl": LINES,
        "a.ndjson": LINES,
        "A.JSONL": LINES,
        "a.json": json.dumps(ROWS).encode(),
        "indented.json": json.dumps(ROWS, indent=2).encode(),
        "lines.json": LINES,
        "array.jsonl": json.dumps(ROWS).encode(),
        "objects.json": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
        "blank lines.jsonl": b"\n" + LINES.replace(b"\n", b"\n\n \t\n"),
        "crlf.jsonl": LINES.replace(b"\n", b"\r\n"),
        "no last line break.jsonl": LINES.rstrip(),
        "bom.jsonl": b"\xef\xbb\xbf" + LINES,
        "bom.csv": b"\xef\xbb\xbf" + table(","),
        "a.csv": table(","),
        "crlf.csv": table(",").replace(b"\n", b"\r\n"),
        "cr.csv": table(",").replace(b"\n", b"\r"),
        "a.tsv": table("\t"),
        "a.TSV.gz": gzipped(table("\t")),
        "a.parquet": parquet(),
        "a.parquet.gz": gzipped(parquet()),
        "a.jsonl.gz": gzipped(LINES),
        "two members.jsonl.gz": gzipped(LINES[:100]) + gzipped(LINES[100:]),
        "a.json.gz": gzipped(json.dumps(ROWS).encode()),
        "a.jsonl.bz2": bz2.compress(LINES),
        "a.jsonl.xz": lzma.compress(LINES),
        "a.jsonl.zst": pa.compress(LINES, "zstd", asbytes=True),
        "A.Jsonl.ZST": pa.compress(LINES, "zstd", asbytes=True),
        "set[1].jsonl": LINES,
        "really?*.jsonl": LINES,
        "with space.jsonl": LINES,
        "ümlaut.jsonl": LINES,
    }.items(),
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert rows_of(path) == ROWS
    assert files_in(path) == [(name, 5)]


def test_a_value_is_what_the_file_says(tmp_path: Path) -> None:
    """No key is added or lost, no number rounded, no date made of text, in whatever row or file."""
    written = [
        {"a": {"x": 1, "y": None}, "b": "2024-01-01", "c": 1, "d": [], "e": 12345678901234567890123, "f": True},
        {"a": {"z": 0.6394267984578837}, "b": "007", "c": 1.5, "d": [1, "one", {"k": []}], "e": 1, "f": None},
        {"a": None, "b": "", "c": None, "d": None, "e": None, "f": False},
        {"a": "text", "b": None, "c": "1", "d": [{"role": "user", "content": "hi"}, {"tool_calls": [{"n": 1}]}]},
    ]
    (tmp_path / "a.jsonl").write_bytes(lines(*written))
    read = rows_of(tmp_path / "a.jsonl")
    assert json.dumps(read) == json.dumps([{name: row.get(name) for name in "abcdef"} for row in written])


def test_a_type_that_changes_late_changes_no_value(tmp_path: Path) -> None:
    """The types of the first batch of rows do not decide."""
    written: list[dict[str, Any]] = [{"n": i, "only_null": None, "text": "x"} for i in range(2500)]
    written[1700] = {"n": "many", "only_null": "now", "text": "y", "new": [1]}
    (tmp_path / "a.jsonl").write_bytes(lines(*written))
    read = rows_of(tmp_path / "a.jsonl")
    assert read[1700] == {"n": "many", "only_null": "now", "text": "y", "new": [1]}
    assert [row["n"] for row in read] == [row["n"] for row in written]
    assert read[0] == {"n": 0, "only_null": None, "text": "x", "new": None}


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_longer_than_what_is_held_is_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None
) -> None:
    monkeypatch.setattr("aligndistil.data.row_files.BLOCK", 7)
    written = [{"a": f'{"é" * (i % 9)}\\ " ]}}', "n": -i / 8, "b": [True, None, {"k": "\u2028"}]} for i in range(40)]
    (tmp_path / "a.json").write_text(json.dumps(written, indent=indent), encoding="utf-8")
    assert rows_of(tmp_path / "a.json") == written


def test_cells_are_text_as_they_stand(tmp_path: Path) -> None:
    cells = [
        "None",
        "NA",
        "null",
        "nan",
        "N/A",
        "007",
        "1",
        "-1",
        "true",
        "1e5",
        " padded ",
        'a "quote"',
        "two\nlines,",
    ]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["", "cell"], *enumerate(cells), [99, ""]])
    read = rows_of(tmp_path / "a.csv")
    assert [row["cell"] for row in read] == [*cells, None]
    assert [row["Unnamed: 0"] for row in read] == [str(i) for i in [*range(len(cells)), 99]]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": oops}\n', "a.jsonl, line 2: row 2 is not JSON: Expecting value, near 'oops}"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": "x\n{"a": 2}\n', "a.jsonl, line 3: row 2 is not JSON: Invalid control"),
        ("a.jsonl", b'{"a": 1}\n{"a": "cut o', "a.jsonl, line 2: row 2 is not JSON: Unterminated string"),
        ("a.jsonl", b'{"a": 1}\n[1, 2]\n', "a.jsonl, line 2: row 2 is not an object with columns: [1, 2]"),
        ("a.jsonl", b'"just text"\n', "a.jsonl, line 1: row 1 is not an object with columns"),
        ("a.jsonl", b"{}\n{}\n", "a.jsonl: its rows are empty"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: row 1 is nested too deeply"),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000, "a.jsonl, line 1: row 1 is nested too deeply"),
        ("a.json", b'[{"a": 1},\n {"a": 2}', "a.json, line 2: row 3 is missing: the array does not end"),
        ("a.json", b'[{"a": 1},\n {"a": 2},\n]', "a.json, line 3: row 3 is not JSON"),
        ("a.json", b'[{"a": 1}\n {"a": 2}]', "a.json, line 2: row 2 is not separated"),
        ("a.json", b'[{"a": 1}]\n{"a": 2}', "a.json, line 2: row 2 follows the end of the array"),
        ("a.json", b'["a", "b"]', "a.json, line 1: row 1 is not an object"),
        ("a.jsonl", b'{"a": "x"}\n{"a": "\\ud83d."}\n', "a.jsonl, rows 1 to 2, column a: half of a surrogate pair"),
        ("a.jsonl", b'{"a": ["\\ud83d."]}\n', "a.jsonl, rows 1 to 1, column a: half of a surrogate pair"),
        ("a.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', "a.jsonl, line 2: byte 19 is not UTF-8; save the file as UTF-8"),
        ("a.csv", b"a,b\nx,\xff\n", "a.csv, line 2: byte 6 is not UTF-8"),
        ("a.json", json.dumps(ROWS).encode("utf-16"), "a.json, line 1: byte 0 is not UTF-8"),
        ("a.jsonl.gz", gzipped(b'{"a": "\xe9"}\n'), "a.jsonl.gz, line 1: byte 7 is not UTF-8"),
        ("a.jsonl.gz", gzipped(LINES)[:-20], "a.jsonl.gz: cannot be read: Compressed file ended"),
        ("a.jsonl.gz", LINES, "a.jsonl.gz: cannot be read: Not a gzipped file"),
        ("a.jsonl.zst", pa.compress(LINES, "zstd", asbytes=True)[:-9], "a.jsonl.zst: cannot be read: "),
        ("a.jsonl.zst", LINES, "a.jsonl.zst: cannot be read: "),
        ("a.jsonl.xz", LINES, "a.jsonl.xz: cannot be read: "),
        ("a.parquet", LINES, "a.parquet: cannot be read: "),
        ("a.csv", b"a,b\n1,2\n3\n", "a.csv, line 3: 1 cells, but the header has 2"),
        ("a.csv", b'a,b\n1,"2\n3', "a.csv, line 3: it cannot be parsed: unexpected end of data"),
        ("a.csv", b"a,b,a\n1,2,3\n", "a.csv, line 1: the column a is there twice"),
        ("a.jsonl", b"", "a.jsonl, split train: there is no row in it"),
        ("a.jsonl", b"\n \n", "a.jsonl, split train: there is no row in it"),
        ("a.json", b"[]", "a.json, split train: there is no row in it"),
        ("a.csv", b"", "a.csv, split train: there is no row in it"),
        ("a.csv", b"a,b\n", "a.csv, split train: there is no row in it"),
        ("a.jsonl.gz", gzipped(b""), "a.jsonl.gz, split train: there is no row in it"),
        ("a.xlsx", b"", "its ending is not that of a file of rows; files of rows end in .json, .jsonl, "),
        ("a.gz", gzipped(LINES), "its ending is not that of a file of rows"),
        ("jsonl", LINES, "its ending is not that of a file of rows"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_place(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert said in refusal(tmp_path / name)
    assert not list((cache_root() / "rows").glob("*/about.json")) or "no row" in said


def test_an_error_far_into_a_file_is_counted_to_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aligndistil.data.row_files.BLOCK", 100)
    (tmp_path / "a.jsonl").write_bytes(lines(*ROWS * 20) + b"{\n")
    assert "a.jsonl, line 101: row 101 is not JSON" in refusal(tmp_path / "a.jsonl")


# What is stored


@pytest.mark.parametrize("where", ["file", "folder", "pattern", "link"])
def test_a_file_rewritten_with_the_same_time_and_size_gives_its_new_rows(tmp_path: Path, where: str) -> None:
    file = folder(tmp_path, {"d/a.jsonl": lines({"a": "ALPHA"}), "v2.jsonl": lines({"a": "BETA!"})}) / "d" / "a.jsonl"
    os.utime(file, ns=(1, 1))
    os.utime(tmp_path / "v2.jsonl", ns=(1, 1))
    if where == "link":
        (tmp_path / "link.jsonl").symlink_to(file)
    path = {"file": file, "folder": file.parent, "pattern": tmp_path / "d/*.jsonl", "link": tmp_path / "link.jsonl"}[
        where
    ]
    before = content_hash(Source(path=str(path)))
    assert rows_of(path) == [{"a": "ALPHA"}]
    if where == "link":
        path.unlink()
        path.symlink_to(tmp_path / "v2.jsonl")
    else:
        with file.open("r+b") as opened:  # the same inode
            opened.write(lines({"a": "BETA!"}))
        os.utime(file, ns=(1, 1))
    assert rows_of(path) == [{"a": "BETA!"}]
    assert content_hash(Source(path=str(path))) != before


def test_another_process_reads_the_new_rows_too(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    script = f"from aligndistil.data.sources import *; print(list(load_rows(Source(path={str(file)!r}))))"
    said = []
    for text in ("ALPHA", "BETA!"):
        file.write_bytes(lines({"a": text}))
        os.utime(file, ns=(1, 1))
        said.append(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert [text.strip() for text in said] == ["[{'a': 'ALPHA'}]", "[{'a': 'BETA!'}]"]


def test_the_same_content_is_read_once_whatever_its_name(tmp_path: Path) -> None:
    folder(tmp_path, {"a.jsonl": LINES, "b/c.jsonl": LINES})
    assert rows_of(tmp_path / "a.jsonl") == rows_of(tmp_path / "b/c.jsonl") == rows_of(tmp_path / "b")
    (stored,) = (cache_root() / "rows").glob("*/rows.arrow")
    assert load_rows(Source(path=str(tmp_path / "a.jsonl"))).cache_files == [{"filename": str(stored)}]
    stored.write_bytes(stored.read_bytes()[:-8])  # as after a power cut
    assert rows_of(tmp_path / "a.jsonl") == ROWS


def test_a_file_that_changes_while_it_is_read_is_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder(tmp_path, {"a.jsonl": LINES}) / "a.jsonl"
    from aligndistil.data import row_store

    def grows(path: Path) -> Any:
        yield from read(path)
        file.write_bytes(LINES + LINES)

    read = row_store.read_batches
    monkeypatch.setattr(row_store, "read_batches", grows)
    assert "a.jsonl: it changed while it was read" in refusal(file)
    monkeypatch.undo()
    assert rows_of(file) == ROWS + ROWS


def test_a_cache_that_cannot_be_made_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    assert "cannot be made" in refusal(folder(tmp_path, {"a.jsonl": LINES}) / "a.jsonl")


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """As one array on one line: the reader holds none but the rows it is at."""
    script = (
        "import resource, sys; from aligndistil.data.sources import *\n"
        "def load(path):\n"
        "    rows = load_rows(Source(path=path))\n"
        "    return len(rows), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "(_, before), (count, after) = map(load, sys.argv[1:]); print(count, after - before)"
    )
    row = json.dumps({"prompt": "p" * 200, "messages": [{"role": "user", "content": "c" * 200}]})
    paths = [tmp_path / "small.json", tmp_path / "large.json"]
    for path, count in zip(paths, (3_000, 150_000), strict=True):  # 1.4 and 70 MB
        path.write_text(f"[{','.join([row] * count)}]")
    shown = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True, check=True)
    count, grown = map(int, shown.stdout.split())
    assert count == 150_000
    assert grown < 40  # MB


# Folders and patterns


@pytest.mark.parametrize(
    ("files", "fields", "read", "skipped"),
    [
        pytest.param(
            {"a.jsonl": LINES, "b.json": lines(*ROWS[:2]), "extra.csv": table(","), "z.parquet": parquet()},
            {},
            [("a.jsonl", 5), ("b.json", 2), ("extra.csv", 5), ("z.parquet", 5)],
            [],
            id="formats beside each other are all read",
        ),
        pytest.param(
            {"a.jsonl": LINES, "B.JSONL.GZ": gzipped(LINES), "sub/c.jsonl": LINES, "empty.jsonl": b""},
            {},
            [("B.JSONL.GZ", 5), ("a.jsonl", 5), ("empty.jsonl", 0), ("sub/c.jsonl", 5)],
            [],
            id="by name; a file without rows is named",
        ),
        pytest.param(
            {"a.jsonl": LINES, ".b.jsonl": LINES, ".git/c.jsonl": LINES, "__MACOSX/a.jsonl": LINES, "README.md": b"#"},
            {},
            [("a.jsonl", 5)],
            [
                ".b.jsonl (hidden)",
                ".git/ (hidden)",
                "README.md (its ending is not that of a file of rows)",
                "__MACOSX/ (hidden)",
            ],
            id="what is not read is named",
        ),
        pytest.param(
            {"a.jsonl": LINES, "dataset_infos.json": b"{}", "notes.txt": b"", "cache-1.arrow": b""},
            {},
            [("a.jsonl", 5)],
            [
                "cache-1.arrow (its ending is not that of a file of rows)",
                "dataset_infos.json (a description)",
                "notes.txt (its ending is not that of a file of rows)",
            ],
            id="descriptions and caches are not rows",
        ),
        *(
            pytest.param(
                {"train-0.jsonl": LINES, "train-1.csv": table(","), "test.jsonl": lines(ROWS[0]), "dev.json": LINES},
                {"split": split},
                read,
                [],
                id=f"split {split} by file names",
            )
            for split, read in {
                "train": [("train-0.jsonl", 5), ("train-1.csv", 5)],
                "test": [("test.jsonl", 1)],
                "validation": [("dev.json", 5)],
                "test+train[3:7]": [("test.jsonl", 1), ("train-0.jsonl", 2), ("train-1.csv", 2)],
                "train[:3]": [("train-0.jsonl", 3)],
                "train[-1:]": [("train-1.csv", 1)],
                "all": [("dev.json", 5), ("test.jsonl", 1), ("train-0.jsonl", 5), ("train-1.csv", 5)],
            }.items()
        ),
        pytest.param(
            {"train/a.jsonl": LINES, "train/test_cases.jsonl": LINES, "eval/a.jsonl": lines(ROWS[0])},
            {},
            [("train/a.jsonl", 5), ("train/test_cases.jsonl", 5)],
            [],
            id="a folder says more than a file",
        ),
        pytest.param(
            {"Train.jsonl": LINES, "TEST.JSONL": lines(ROWS[0]), "val/x.jsonl": LINES},
            {},
            [("Train.jsonl", 5)],
            [],
            id="names of splits in any case, of folders and files",
        ),
        pytest.param(
            {"data/train_prefs-00000-of-00002.jsonl": LINES, "data/train_prefs-00001-of-00002.jsonl": LINES}
            | {"data/test_prefs-00000-of-00001.jsonl": LINES, "old.jsonl": LINES},
            {"split": "train_prefs"},
            [("data/train_prefs-00000-of-00002.jsonl", 5), ("data/train_prefs-00001-of-00002.jsonl", 5)],
            ["old.jsonl (of no split: others have names that say train, validation or test)"],
            id="shards as the Hub has them",
        ),
        pytest.param(
            {"contest.jsonl": LINES, "restrained.jsonl": LINES, "latest.jsonl": LINES},
            {},
            [("contest.jsonl", 5), ("latest.jsonl", 5), ("restrained.jsonl", 5)],
            [],
            id="parts of words say nothing",
        ),
        pytest.param(
            {"README.md": CONFIG, "sub/x.jsonl": LINES, "y.jsonl": LINES},
            {"split": "mine", "name": "a"},
            [("sub/x.jsonl", 5)],
            [
                "README.md (its ending is not that of a file of rows)",
                "y.jsonl (of no split: others have names that say train, validation or test)",
            ],
            id="a README that lists the files",
        ),
    ],
)
def test_a_folder_says_what_of_it_is_read(
    tmp_path: Path, files: dict[str, bytes], fields: dict[str, str], read: list[tuple[str, int]], skipped: list[str]
) -> None:
    path = folder(tmp_path / "d[1]" if "README.md" not in files else tmp_path / "d", files)
    for written in (path, f"{path}/"):
        assert files_in(written, **fields) == read
        assert open_source(Source(path=str(written), **fields)).skipped == skipped
        assert len(rows_of(written, **fields)) == sum(rows for _, rows in read)


@pytest.mark.parametrize(
    ("files", "fields", "said"),
    [
        ({"a.jsonl": LINES, "a.jsonl.gz": gzipped(LINES)}, {}, "a.jsonl and a.jsonl.gz look like the same rows"),
        ({"s/a.jsonl": LINES, "s/a.parquet": parquet()}, {}, "s/a.jsonl and s/a.parquet look like the same rows"),
        ({"a.json": LINES, "a.JSONL": LINES}, {}, "a.JSONL and a.json look like the same rows"),
        ({"README.md": b"# mine", "notes.txt": b""}, {}, "no file of rows in it, it has README.md (its ending"),
        ({}, {}, "there is no file of rows in it, it is empty; files of rows end in .json"),
        ({"train.jsonl": LINES, "test.jsonl": LINES}, {"split": "dev"}, "no split dev; it has test, train"),
        ({"a.jsonl": LINES, "test.jsonl": LINES}, {}, "there is no split train; it has test (of no split: a.jsonl)"),
        ({"train_test.jsonl": LINES}, {}, "the name train_test.jsonl says the splits train and test"),
        ({"a.jsonl": LINES, "b.jsonl": b'{"a": 1}\n{'}, {}, "b.jsonl, line 2: row 2 is not JSON"),
        ({"a.jsonl": LINES}, {"split": "train[5"}, "split train[5: "),
        ({"a.jsonl": LINES}, {"split": "train[3:3]"}, "there is no row in it"),
        ({"README.md": b"---\n{: [\n---\n", "a.jsonl": LINES}, {}, "README.md: while parsing"),
        ({"README.md": CONFIG, "sub/a.jsonl": LINES}, {"name": "b"}, "README.md: BuilderConfig 'b' not found"),
        ({"state.json": b"{}", "a.jsonl": LINES}, {}, "state.json: not as `save_to_disk` writes it"),
        ({"dataset_dict.json": b"[", "a.jsonl": LINES}, {}, "dataset_dict.json: not as `save_to_disk` writes it"),
    ],
)
def test_a_folder_that_is_not_clear_is_refused(
    tmp_path: Path, files: dict[str, bytes], fields: dict[str, str], said: str
) -> None:
    (tmp_path / "d").mkdir()
    assert said in refusal(folder(tmp_path / "d", files), **fields)


def test_links_are_followed_and_no_file_is_read_twice(tmp_path: Path) -> None:
    folder(tmp_path, {"d/v2.jsonl": LINES, "d/sub/x.jsonl": lines(ROWS[0]), "away/y.jsonl": lines(ROWS[1])})
    (tmp_path / "d/latest.jsonl").symlink_to("v2.jsonl")
    (tmp_path / "d/linked").symlink_to(tmp_path / "away")
    (tmp_path / "d/same").symlink_to("sub")
    (tmp_path / "d/sub/back").symlink_to(tmp_path / "d")
    source = Source(path=str(tmp_path / "d"))
    assert open_source(source).files == [
        FileRead("latest.jsonl", 5),
        FileRead("linked/y.jsonl", 1),
        FileRead("same/x.jsonl", 1),
    ]
    assert open_source(source).skipped == ["v2.jsonl (the same file as latest.jsonl)"]
    (tmp_path / "d/gone.jsonl").symlink_to("nowhere.jsonl")
    assert "gone.jsonl is a link to nothing" in refusal(tmp_path / "d")
    assert "gone.jsonl is a link to nothing" in refusal(tmp_path / "d/*.jsonl")


@pytest.mark.parametrize(
    ("pattern", "read"),
    [
        ("d/part-*.jsonl", [("part-0.jsonl", 5), ("part-1.jsonl", 1)]),
        ("./d/part-?.jsonl", [("part-0.jsonl", 5), ("part-1.jsonl", 1)]),
        ("d/part-[1-9].jsonl", [("part-1.jsonl", 1)]),
        ("*/o*.jsonl", [("d/old.jsonl", 2)]),
        ("d/**/*.jsonl", [("old.jsonl", 2), ("part-0.jsonl", 5), ("part-1.jsonl", 1), ("sub/x.jsonl", 1)]),
        ("d/*", [("old.jsonl", 2), ("part-0.jsonl", 5), ("part-1.jsonl", 1)]),
        ("~/d/part-1*", [("part-1.jsonl", 1)]),
        ("~/d/old.jsonl", [("old.jsonl", 2)]),
        ("d/../d/old.jsonl", [("old.jsonl", 2)]),
        ("d/old.jsonl/", [("old.jsonl", 2)]),
    ],
)
def test_a_pattern_names_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, read: list[tuple[str, int]]
) -> None:
    shards = {"part-0.jsonl": LINES, "part-1.jsonl": lines(ROWS[0]), "old.jsonl": lines(*ROWS[:2])}
    folder(tmp_path / "d", {**shards, "notes.txt": b"", "sub/x.jsonl": lines(ROWS[1])})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files_in(pattern) == read
    assert open_source(Source(path=pattern)).skipped == (
        ["notes.txt (its ending is not that of a file of rows)", "sub/ (a folder)"] if pattern == "d/*" else []
    )
    assert content_hash(Source(path=pattern)) == content_hash(Source(path=str(tmp_path / os.path.expanduser(pattern))))


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    folder(tmp_path, {"part-0.jsonl": LINES, "notes.txt": b""})
    assert "no file matches this pattern; near it: " in refusal(tmp_path / "prt-*.jsonl")
    assert "there is no file of rows in it, it has notes.txt" in refusal(tmp_path / "n*")


# Files of several shapes


@pytest.mark.parametrize(
    ("first", "second", "read"),
    [
        ({"a": "x"}, {"a": "y", "score": 4}, [{"a": "x", "score": None}, {"a": "y", "score": 4}]),
        ({"a": "x", "b": "z"}, {"b": "y"}, [{"a": "x", "b": "z"}, {"a": None, "b": "y"}]),
        ({"a": "x"}, {"b": "y"}, [{"a": "x", "b": None}, {"a": None, "b": "y"}]),
        ({"a": 1}, {"a": 2.5}, [{"a": 1}, {"a": 2.5}]),
        ({"a": 1}, {"a": "one"}, [{"a": 1}, {"a": "one"}]),
        ({"a": True}, {"a": 1}, [{"a": True}, {"a": 1}]),
        ({"a": None}, {"a": "x"}, [{"a": None}, {"a": "x"}]),
        ({"a": "x"}, {"a": [{"role": "user"}]}, [{"a": "x"}, {"a": [{"role": "user"}]}]),
        ({"a": {"x": 1}}, {"a": {"y": "1"}}, [{"a": {"x": 1}}, {"a": {"y": "1"}}]),
    ],
)
@pytest.mark.parametrize("kinds", ["jsonl jsonl", "parquet parquet", "jsonl parquet", "parquet jsonl"])
def test_shards_may_differ_in_columns_and_types(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], read: list[dict[str, Any]], kinds: str
) -> None:
    for name, kind, row in zip("ab", kinds.split(), (first, second), strict=True):
        if kind == "jsonl":
            (tmp_path / f"{name}.jsonl").write_bytes(lines(row))
        else:
            Dataset.from_list([row]).to_parquet(tmp_path / f"{name}.parquet")
    loaded = rows_of(tmp_path)
    assert loaded == read
    assert [type(row["a"]) for row in loaded if "a" in row] == [type(row.get("a")) for row in read if "a" in row]


def test_what_json_cannot_hold_is_refused_with_file_and_column(tmp_path: Path) -> None:
    Dataset.from_dict({"a": [b"\x00"]}).to_parquet(tmp_path / "a.parquet")
    assert rows_of(tmp_path) == [{"a": b"\x00"}]
    (tmp_path / "b.jsonl").write_bytes(lines({"a": "text"}))
    assert f"{tmp_path}/a.parquet, rows 1 to 1, column a: its type, Value('binary')" in refusal(tmp_path)


def test_rows_of_every_kind_can_be_selected_joined_and_decoded(tmp_path: Path) -> None:
    """What others do with them: workers are sent Arrow and the features."""
    folder(tmp_path, {"a.jsonl": lines({"a": {"x": 1}, "b": "t"}), "b.jsonl": lines({"a": [2.5], "c": 1})})
    rows = load_rows(Source(path=str(tmp_path)))
    assert rows.column_names == ["a", "b", "c"]
    assert concatenate_datasets([rows, rows]).select([3, 0]).select_columns(["a"])[:] == {"a": [[2.5], {"x": 1}]}
    held = rows.with_format("arrow")[:]
    assert rows.features.decode_batch(held.to_pydict())["a"] == [{"x": 1}, [2.5]]


# What save_to_disk wrote


def saved(path: Path) -> Path:
    data = Dataset.from_list(ROWS)
    data.save_to_disk(path, num_shards=2)
    edited = data.map(lambda row: {"chosen": f"EDITED {row['chosen']}"}, cache_file_name=str(path / "cache-0a1b.arrow"))
    assert edited[0]["chosen"].startswith("EDITED")
    return path


def test_a_saved_data_set_is_read_without_its_caches(tmp_path: Path) -> None:
    path = saved(tmp_path / "s")
    source = Source(path=str(path))
    assert rows_of(path) == ROWS
    assert files_in(path) == [("data-00000-of-00002.arrow", 3), ("data-00001-of-00002.arrow", 2)]
    assert open_source(source).skipped == ["cache-0a1b.arrow (not named in state.json)"]
    before = content_hash(source)
    (path / "cache-0a1b.arrow").unlink()
    assert content_hash(source) == before
    assert rows_of(path, split="train[3:]", limit=1) == ROWS[3:4]
    assert files_in(path, limit=4) == [("data-00000-of-00002.arrow", 3), ("data-00001-of-00002.arrow", 1)]
    assert "there is no split test; it has train" in refusal(path, split="test")


def test_a_saved_data_set_that_is_saved_again_gives_the_new_rows(tmp_path: Path) -> None:
    first = rows_of(saved(tmp_path / "s"))
    before = content_hash(Source(path=str(tmp_path / "s")))
    Dataset.from_list(ROWS[::-1]).save_to_disk(tmp_path / "s", num_shards=2)
    assert rows_of(tmp_path / "s") == first[::-1]
    assert content_hash(Source(path=str(tmp_path / "s"))) != before


def test_the_format_a_data_set_was_saved_with_changes_no_row(tmp_path: Path) -> None:
    Dataset.from_dict({"a": ["x"], "n": [1]}).with_format("numpy", columns=["n"]).save_to_disk(tmp_path / "s")
    assert rows_of(tmp_path / "s") == [{"a": "x", "n": 1}]


def test_the_splits_of_a_saved_data_set_are_its_own(tmp_path: Path) -> None:
    both = DatasetDict(train_prefs=Dataset.from_list(ROWS), dev=Dataset.from_list(ROWS[:1]))
    both.save_to_disk(tmp_path / "s")
    assert rows_of(tmp_path / "s", split="train_prefs") == ROWS
    assert files_in(tmp_path / "s", split="dev+train_prefs") == [
        ("dev/data-00000-of-00001.arrow", 1),
        ("train_prefs/data-00000-of-00001.arrow", 5),
    ]
    assert "there is no split train; it has train_prefs, dev" in refusal(tmp_path / "s")
    (tmp_path / "s/dev/data-00000-of-00001.arrow").write_bytes(b"not arrow")
    assert "split dev: cannot be read: " in refusal(tmp_path / "s", split="dev")


# Splits, limits and hashes


def test_limit_takes_the_first_rows_in_file_order(tmp_path: Path, write: Callable[..., str]) -> None:
    assert rows_of(write(ROWS), limit=2) == ROWS[:2]
    assert len(rows_of(write(ROWS), limit=99)) == 5
    folder(tmp_path / "d", {"a.jsonl": lines(*ROWS[:2]), "b.jsonl": lines(*ROWS[2:]), "c.jsonl": LINES})
    assert rows_of(tmp_path / "d", limit=4) == ROWS[:4]
    assert files_in(tmp_path / "d", limit=4) == [("a.jsonl", 2), ("b.jsonl", 2)]


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ("train[1:3]", ROWS[1:3]),
        ("train[:99]", ROWS),
        ("train[:40%]", ROWS[:2]),
        ("train[3:]+train[:1]", ROWS[3:] + ROWS[:1]),
    ],
)
def test_a_slice_of_a_file_is_a_split_like_any_other(
    write: Callable[..., str], split: str, rows: list[dict[str, str]]
) -> None:
    assert rows_of(write(ROWS), split=split) == rows


def test_a_file_has_one_split(write: Callable[..., str]) -> None:
    assert "split dev: there is no split dev; it has train" in refusal(write(ROWS, "dev.jsonl"), split="dev")


def test_a_missing_file_is_named_with_its_neighbours(tmp_path: Path, write: Callable[..., str]) -> None:
    write(ROWS, "preferences.jsonl")
    with pytest.raises(UserError, match=r"preference\.jsonl: there is no such file .*near it: .*preferences\.jsonl"):
        load_rows(Source(path=str(tmp_path / "preference.jsonl")))
    for path in ("./no/such/folder/rows.jsonl", "~nobody-here/rows.jsonl"):
        assert "nor a folder" in refusal(path)


@pytest.mark.parametrize("name", ["data/rows.jsonl", "rows.CSV", "rows.tsv.zst", "a/b/c"])
def test_a_relative_file_name_that_is_missing_is_not_looked_for_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "there is no such file" in refusal(name)


def test_the_hash_follows_the_content_and_not_the_place_or_time(write: Callable[..., str]) -> None:
    first = content_hash(Source(path=write(ROWS, "one/rows.jsonl")))
    assert content_hash(Source(path=write(ROWS, "two/rows.jsonl"))) == first
    assert content_hash(Source(path=write(ROWS, "two/rows.jsonl"), limit=3)) == first
    assert content_hash(Source(path=write(ROWS[1:], "two/rows.jsonl"))) != first


def test_the_hash_of_a_folder_covers_every_file_of_rows_and_its_name(tmp_path: Path) -> None:
    path = folder(tmp_path / "d", {"x/train.jsonl": LINES, "y/train.jsonl": lines(ROWS[0])})
    hashes = [content_hash(Source(path=str(path)))]
    folder(path, {"x/train.jsonl": lines(ROWS[0]), "y/train.jsonl": LINES})  # they change places
    hashes.append(content_hash(Source(path=str(path))))
    folder(path, {"test.jsonl": LINES})
    hashes.append(content_hash(Source(path=str(path))))
    (path / "test.jsonl").rename(path / "dev.jsonl")
    hashes.append(content_hash(Source(path=str(path))))
    assert len({*hashes}) == 4
    folder(path, {"README.md": b"# mine", ".DS_Store": b""})
    assert content_hash(Source(path=str(path))) == hashes[-1]


# The embedded default and the Hub


def test_the_embedded_reviews_have_two_splits_of_string_pairs() -> None:
    for split in ("train", "test"):
        source = Source(path="builtin:reviews", split=split)
        rows = load_rows(source)
        assert set(rows.column_names) >= {"prompt", "chosen", "rejected"}
        assert all(isinstance(value, str) for value in (rows[0]["prompt"], rows[0]["chosen"], rows[0]["rejected"]))
        assert open_source(source).files == [FileRead(f"builtin:reviews, {split}", len(rows))]
        assert open_source(source).skipped == []
    with pytest.raises(UserError, match=r"no split dev; it has .*train"):
        load_rows(Source(path="builtin:reviews", split="dev"))
    with pytest.raises(UserError, match=r"builtin:nothing.*builtin:reviews"):
        load_rows(Source(path="builtin:nothing"))


def test_offline_a_hub_id_that_is_not_cached_is_a_service_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ServiceError, match=r"nobody/nothing.*HF_HUB_OFFLINE is set") as raised:
        load_rows(Source(path="nobody/nothing"))
    assert raised.value.exit_code == 4


def test_a_hub_id_that_does_not_exist_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed.")

    monkeypatch.setattr("aligndistil.data.sources.load_dataset", refuse)
    with pytest.raises(UserError, match=r"a/b: neither a local path nor on the Hub.*doesn't exist") as raised:
        load_rows(Source(path="a/b"))
    assert raised.value.exit_code == 2


def test_the_hub_is_asked_for_configuration_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def answer(path: str, **options: Any) -> Dataset:
        asked.update(options, path=path)
        return Dataset.from_list(ROWS)

    monkeypatch.setattr("aligndistil.data.sources.load_dataset", answer)
    source = Source(path="a/b", name="config", split="train_prefs", revision="abc", limit=3)
    assert open_source(source).files == [FileRead("a/b, train_prefs", 3)]
    assert asked == {
        "path": "a/b",
        "name": "config",
        "split": "train_prefs",
        "revision": "abc",
        "keep_in_memory": False,
    }


def test_the_embedded_reviews_and_hub_data_have_a_hash(
    monkeypatch: pytest.MonkeyPatch, write: Callable[..., str]
) -> None:
    train, test = (content_hash(Source(path="builtin:reviews", split=split)) for split in ("train", "test"))
    assert train != test
    loaded = load_rows(Source(path=write(ROWS)))
    monkeypatch.setattr("aligndistil.data.sources.load_dataset", lambda *_, **__: loaded)
    assert len(content_hash(Source(path="a/b"))) == 64


def test_which_files_are_which_split_is_part_of_the_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name}) + "\n")
    files = "[{split: train, path: %s}, {split: test, path: %s}]"
    listed = f"---\nconfigs:\n- config_name: default\n  data_files: {files}\n---\n"
    seen = []
    for splits in (("a.jsonl", "b.jsonl"), ("b.jsonl", "a.jsonl"), ("[a.jsonl, b.jsonl]", "b.jsonl")):
        (tmp_path / "README.md").write_text(listed % splits)
        opened = open_source(Source(path=str(tmp_path)))
        assert opened.content == content_hash(Source(path=str(tmp_path)))
        seen.append((opened.rows[0]["prompt"], opened.content))
    assert [prompt for prompt, _ in seen] == ["a", "b", "a"]
    assert len({content for _, content in seen}) == 3


def test_a_disk_that_is_full_is_said_and_nothing_half_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("aligndistil.data.row_store._write_as", full)
    assert "cannot be written ([Errno 28] No space left on device); free space" in refusal(tmp_path / "a.jsonl")
    assert list((cache_root() / "rows").glob(".*")) == []


def test_rows_that_cannot_be_parsed_leave_nothing_half_written(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n')
    assert "line 2: row 2 is not JSON" in refusal(tmp_path / "a.jsonl")
    assert list((cache_root() / "rows").glob(".*")) == []


def test_stored_rows_without_their_file_are_made_again(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    rows_of(tmp_path / "a.jsonl")
    (stored,) = (cache_root() / "rows").glob("*/rows.arrow")
    stored.unlink()
    assert rows_of(tmp_path / "a.jsonl") == [{"prompt": "a"}]


def test_an_empty_line_in_a_file_of_one_column_is_a_row_without_a_value(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt\none\n\nthree\n")
    assert [row["prompt"] for row in rows_of(tmp_path / "a.csv")] == ["one", None, "three"]
    (tmp_path / "b.csv").write_text("prompt,id\none,1\n\nthree,3\n")
    assert [row["prompt"] for row in rows_of(tmp_path / "b.csv")] == ["one", "three"]


@pytest.mark.parametrize(("split", "read"), [("train[1:9]", 1), ("train[5:9]", 0), ("train[:9]", 2), ("train[-9:]", 2)])
def test_a_slice_may_ask_for_more_than_there_is(tmp_path: Path, split: str, read: int) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(*ROWS[:2]))
    if read:
        assert len(rows_of(tmp_path / "a.jsonl", split=split)) == read
    else:
        assert "there is no row in it" in refusal(tmp_path / "a.jsonl", split=split)


def test_folders_that_a_pattern_begins_with_are_taken_literally_and_matched_ones_are_named(tmp_path: Path) -> None:
    folder(tmp_path / "my[1]", {"a.jsonl": lines(ROWS[0])})
    folder(tmp_path / "my1", {"b.jsonl": lines(ROWS[1])})
    assert files_in(tmp_path / "my[1]/*.jsonl") == [("a.jsonl", 1)]
    (tmp_path / "mx.jsonl").write_bytes(lines(ROWS[0]))
    opened = open_source(Source(path=str(tmp_path / "m*")))
    assert [file.name for file in opened.files] == ["mx.jsonl"]
    assert opened.skipped == ["my1/ (a folder)", "my[1]/ (a folder)"]


def test_a_link_that_says_a_split_counts_as_that_split(tmp_path: Path) -> None:
    folder(tmp_path / "d", {"rows.jsonl": lines(ROWS[0])})
    for split in ("train", "test"):
        (tmp_path / f"d/{split}.jsonl").symlink_to("rows.jsonl")
        assert files_in(tmp_path / "d", split=split) == [(f"{split}.jsonl", 1)]


@pytest.mark.parametrize("about", ["", "{", "[]", '{"bytes": 3}'])
def test_rows_whose_description_is_damaged_are_made_again(tmp_path: Path, about: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    rows_of(tmp_path / "a.jsonl")
    (stored,) = (cache_root() / "rows").glob("*/about.json")
    stored.write_text(about)
    assert rows_of(tmp_path / "a.jsonl") == [{"prompt": "a"}]


def test_columns_that_cannot_be_read_are_refused_by_name(tmp_path: Path) -> None:
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(twice, tmp_path / "a.parquet")
    assert "the column prompt is there twice" in refusal(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"\\ud83d": 1}\n')
    assert "line 1: row 1 has a key with half of a surrogate pair" in refusal(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"n": ' + "7" * 5000 + "}\n")
    assert "holds a whole number of more than 4,300 digits" in refusal(tmp_path / "b.jsonl")
