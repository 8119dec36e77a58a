"""Files, folders, the embedded default and the Hub, and what is said when there is nothing."""

import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset
from datasets.exceptions import DatasetNotFoundError

from aligndistil.data import content_hash, load_rows
from aligndistil.errors import ServiceError, UserError
from aligndistil.recipe import Source

ROWS = [{"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(5)]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz", "a.parquet", "a.csv"])
def test_every_local_format_gives_the_same_rows(tmp_path, write, name):
    data = Dataset.from_list(ROWS)
    path = tmp_path / name
    if name == "a.json":
        path.write_text(json.dumps(ROWS))
    elif name == "a.parquet":
        data.to_parquet(path)
    elif name == "a.csv":
        data.to_csv(path, index=False)
    else:
        write(ROWS, name)
    assert list(load_rows(Source(path=str(path)))) == ROWS


def test_a_gzipped_json_array_is_read(tmp_path):
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    assert list(load_rows(Source(path=str(path)))) == ROWS


def test_the_split_picks_the_file_of_a_folder(tmp_path, write):
    write(ROWS, "folder/train.jsonl.gz")
    write(ROWS[:2], "folder/test.jsonl.gz")
    assert len(load_rows(Source(path=str(tmp_path / "folder")))) == 5
    assert len(load_rows(Source(path=str(tmp_path / "folder"), split="test"))) == 2


def test_an_unknown_split_is_refused_with_those_that_exist(tmp_path, write):
    write(ROWS, "folder/train.jsonl")
    write(ROWS, "folder/test.jsonl")
    with pytest.raises(UserError, match=r"split dev: cannot be read: .*train.*test"):
        load_rows(Source(path=str(tmp_path / "folder"), split="dev"))


def test_limit_takes_the_first_rows_in_file_order(write):
    assert list(load_rows(Source(path=write(ROWS), limit=2))) == ROWS[:2]
    assert len(load_rows(Source(path=write(ROWS), limit=99))) == 5


def test_a_slice_of_a_file_is_a_split_like_any_other(write):
    assert list(load_rows(Source(path=write(ROWS), split="train[1:3]"))) == ROWS[1:3]


def test_the_embedded_reviews_have_two_splits_of_string_pairs():
    for split in ("train", "test"):
        rows = load_rows(Source(path="builtin:reviews", split=split))
        assert set(rows.column_names) >= {"prompt", "chosen", "rejected"}
        assert all(isinstance(value, str) for value in (rows[0]["prompt"], rows[0]["chosen"], rows[0]["rejected"]))
    with pytest.raises(UserError, match=r"no split dev; it has .*train"):
        load_rows(Source(path="builtin:reviews", split="dev"))
    with pytest.raises(UserError, match=r"builtin:nothing.*builtin:reviews"):
        load_rows(Source(path="builtin:nothing"))


def test_a_missing_file_is_named_with_its_neighbours(tmp_path, write):
    write(ROWS, "preferences.jsonl")
    with pytest.raises(UserError, match=r"preference\.jsonl: there is no such file .*near it: .*preferences\.jsonl"):
        load_rows(Source(path=str(tmp_path / "preference.jsonl")))
    with pytest.raises(UserError, match="nor a folder"):
        load_rows(Source(path="./no/such/folder/rows.jsonl"))


def test_a_relative_file_name_that_is_missing_is_not_looked_for_on_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no such file"):
        load_rows(Source(path="data/rows.jsonl"))


@pytest.mark.parametrize("content", ["", '{"a": 1}\n{"a": oops}\n'])
def test_a_file_that_cannot_be_parsed_is_named(tmp_path, content):
    path = tmp_path / "broken.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"broken\.jsonl, split train: cannot be read: \S"):
        load_rows(Source(path=str(path)))


def test_an_ending_that_is_not_data_is_refused_with_those_that_are(tmp_path):
    (tmp_path / "rows.xlsx").write_text("")
    with pytest.raises(UserError, match=r"its ending is none of \.json, \.jsonl, \.parquet, \.csv"):
        load_rows(Source(path=str(tmp_path / "rows.xlsx")))


def test_offline_a_hub_id_that_is_not_cached_is_a_service_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ServiceError, match=r"nobody/nothing.*HF_HUB_OFFLINE is set") as raised:
        load_rows(Source(path="nobody/nothing"))
    assert raised.value.exit_code == 4


def test_a_hub_id_that_does_not_exist_is_the_users_mistake(monkeypatch):
    def refuse(*_, **__):
        raise DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed.")

    monkeypatch.setattr("aligndistil.data.sources.load_dataset", refuse)
    with pytest.raises(UserError, match=r"a/b: neither a local path nor on the Hub.*doesn't exist") as raised:
        load_rows(Source(path="a/b"))
    assert raised.value.exit_code == 2


def test_the_hub_is_asked_for_configuration_split_and_revision(monkeypatch):
    asked = {}

    def answer(path, **options):
        asked.update(options, path=path)
        return Dataset.from_list(ROWS)

    monkeypatch.setattr("aligndistil.data.sources.load_dataset", answer)
    load_rows(Source(path="a/b", name="config", split="train_prefs", revision="abc"))
    assert asked == {
        "path": "a/b",
        "name": "config",
        "split": "train_prefs",
        "revision": "abc",
        "keep_in_memory": False,
    }


def test_the_hash_follows_the_content_and_not_the_place_or_time(tmp_path, write):
    first = content_hash(Source(path=write(ROWS, "one/rows.jsonl")))
    assert content_hash(Source(path=write(ROWS, "two/rows.jsonl"))) == first
    assert content_hash(Source(path=write(ROWS, "two/rows.jsonl"), limit=3)) == first
    assert content_hash(Source(path=write(ROWS[1:], "two/rows.jsonl"))) != first


def test_the_hash_of_a_folder_covers_every_file_and_its_name(tmp_path, write):
    write(ROWS, "folder/train.jsonl")
    source = Source(path=str(tmp_path / "folder"))
    first = content_hash(source)
    write(ROWS, "folder/test.jsonl")
    second = content_hash(source)
    Path(tmp_path / "folder/test.jsonl").rename(tmp_path / "folder/dev.jsonl")
    assert len({first, second, content_hash(source)}) == 3


def test_the_embedded_reviews_and_hub_data_have_a_hash(monkeypatch, write):
    train, test = (content_hash(Source(path="builtin:reviews", split=split)) for split in ("train", "test"))
    assert train != test
    loaded = load_rows(Source(path=write(ROWS)))
    monkeypatch.setattr("aligndistil.data.sources.load_dataset", lambda *_, **__: loaded)
    assert len(content_hash(Source(path="a/b"))) == 64
