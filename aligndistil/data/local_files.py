"""Which files a local path names, and which split each belongs to."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import yaml
from datasets import load_dataset_builder
from datasets.exceptions import DatasetsError
from huggingface_hub import metadata_load

from aligndistil.errors import UserError, nearest
from aligndistil.recipe import Source

FORMATS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "tsv"}
"""The ending of a file of rows and what it holds, in any case."""
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
"""Endings that may follow."""
DESCRIPTIONS = frozenset({"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
"""JSON that describes a data set of `datasets`, and holds no row of it."""
NOT_ROWS = "its ending is not that of a file of rows"
NO_SPLIT = "of no split: others have names that say train, validation or test"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
SPLIT_WORDS = {
    split: re.compile(rf"(?:^|[-._ 0-9])(?:{words})(?:[-._ 0-9]|$)", re.IGNORECASE)
    for split, words in {
        "train": "train|training",
        "validation": "validation|valid|dev|val",
        "test": "test|testing|eval|evaluation",
    }.items()
}
"""The words in names of folders and files by which `datasets` knows a split."""
SHARD = re.compile(r"data/(.+)-\d{5}-of-\d{5}[^/]*")
"""`data/train_prefs-00000-of-00004.parquet`: a data set as it lies on the Hub."""


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """The files that a path names, in the order in which they are read."""

    root: Path
    """What their names are relative to."""
    splits: dict[str, list[Path]]
    skipped: list[str] = field(default_factory=list)
    """Names of what lies there and is not read, each with the reason in brackets."""
    saved: dict[str, Path] = field(default_factory=dict)
    """Split -> its folder, when `save_to_disk` wrote it."""

    def name(self, file: Path) -> str:
        return Path(os.path.relpath(file, self.root)).as_posix()


def find_local(source: Source) -> LocalFiles | None:
    """What the path of a source names on this machine, or None when it names a data set of the Hub.

    A file that is there is taken literally, whatever characters its name has; else the path may be a pattern.

    Raises UserError: the path can only be local and nothing is there, or there is no file of rows in it.
    """
    path = Path(os.path.expanduser(source.path))  # Path.expanduser raises for an unknown user
    if os.path.isdir(path):
        found = _find_in_folder(source, path)
    elif os.path.exists(path):
        if not path.is_file() or format_of(path) is None:
            raise UserError(f"data source {source.path}: {NOT_ROWS}; {_known()}")
        found = LocalFiles(path.parent, {"train": [path]})
    elif glob.has_magic(source.path):
        found = _find_by_pattern(source, path)
    elif source.path.startswith((".", "/", "~")) or format_of(path) or not HUB_ID.fullmatch(source.path):
        raise UserError(f"data source {source.path}: there is no such file or folder{near(path)}")
    else:
        return None
    if not any(found.splits.values()):
        there = f"it has {_some(found.skipped)}" if found.skipped else "it is empty"
        raise UserError(f"data source {source.path}: there is no file of rows in it, {there}; {_known()}")
    return found


def format_of(path: Path) -> str | None:
    """json, parquet, csv or tsv, by the ending; None for anything else."""
    return FORMATS.get(_endings(path.name)[1])


def compression_of(path: Path) -> str:
    """One of COMPRESSIONS, or an empty string."""
    return _endings(path.name)[2]


def refuse_twins(source: Source, local: LocalFiles, files: Sequence[Path]) -> None:
    """Raises UserError when two files differ only in their endings: they are one file twice, unpacked or converted."""
    known: dict[str, str] = {}
    for name in map(local.name, files):
        stem = _endings(name)[0]
        if stem in known:
            raise UserError(
                f"data source {source.path}: {known[stem]} and {name} look like the same rows twice; move one away, "
                "rename it, or name the files to read by a pattern such as ./folder/*.jsonl"
            )
        known[stem] = name


def near(path: Path) -> str:
    """`; near it: ...`: what has a name like this one, or nothing."""
    folder = path.parent
    if not folder.is_dir():
        return f" (nor a folder {folder})"
    names = nearest(path.name, sorted(entry.name for entry in folder.iterdir()), count=3, cutoff=0.5)
    return f"; near it: {', '.join(str(folder / name) for name in names)}" if names else ""


def _endings(name: str) -> tuple[str, str, str]:
    """A name without the endings that are known, then those endings, in lower case; `a.JSONL.gz`: a, .jsonl, .gz."""
    stem, packed = os.path.splitext(name)  # a stem keeps its folder
    if packed.lower() not in COMPRESSIONS:
        stem, packed = name, ""
    stem, ending = os.path.splitext(stem)
    return stem, ending.lower(), packed.lower()


def _find_by_pattern(source: Source, path: Path) -> LocalFiles:
    # As a file that is there is taken literally, so are the folders that the pattern begins with.
    parts = iter(path.parts)
    literal = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
    root = Path()
    for part in parts:
        if glob.has_magic(part) and not (root / part).is_dir():
            break
        root /= part
    rest = path.relative_to(root)
    pattern = os.path.join(glob.escape(str(root)), str(rest)) if root != Path() else str(rest)
    matched = sorted(glob.glob(pattern, recursive=True))
    files = [os.path.relpath(file, root) for file in matched if not os.path.isdir(file)]
    if not files:
        raise UserError(f"data source {source.path}: no file matches this pattern{near(literal / rest.name)}")
    rows, skipped = _choose(source, root, files)
    own, linked = _once(root, rows)
    if "**" not in rest.parts:  # which asks for the files below
        linked += [f"{os.path.relpath(file, root)}/ (a folder)" for file in matched if os.path.isdir(file)]
    return LocalFiles(root, {"train": [root / name for name in own]}, skipped + linked)


def _find_in_folder(source: Source, folder: Path) -> LocalFiles:
    if (folder / "dataset_dict.json").is_file():
        return _find_saved(folder, {split: folder / split for split in _saved(folder / "dataset_dict.json", "splits")})
    if (folder / "state.json").is_file():
        return _find_saved(folder, {"train": folder})
    files, skipped = _choose(source, folder, _names_in(folder))
    if (splits := _configured(source, folder)) is None:
        splits = {}
        for split, named in _by_split(source, files).items():
            own, linked = _once(folder, named)
            splits[split] = [folder / name for name in own]
            skipped += linked
    used = {os.path.relpath(file, folder) for named in splits.values() for file in named}
    named_already = {line.split(" (")[0] for line in skipped}
    skipped += [f"{name} ({NO_SPLIT})" for name in files if name not in used | named_already]
    return LocalFiles(folder, splits, skipped)


def _find_saved(folder: Path, folders: dict[str, Path]) -> LocalFiles:
    """What `state.json` names: `datasets` leaves its caches, edited copies of the rows, beside them."""
    splits = {
        split: [of_split / file["filename"] for file in _saved(of_split / "state.json", "_data_files")]
        for split, of_split in folders.items()
    }
    used = {file for files in splits.values() for file in files}
    rest = [file for file in sorted(folder.rglob("*")) if file.suffix == ".arrow" and file not in used]
    skipped = [f"{file.relative_to(folder).as_posix()} (not named in state.json)" for file in rest]
    return LocalFiles(folder, splits, skipped, folders)


def _saved(file: Path, key: str) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"data source {file}: not as `save_to_disk` writes it ({error!r}); save the data set again, or move this "
            "file away if the folder holds other files of rows"
        ) from error


def _names_in(folder: Path) -> list[str]:
    """The files below a folder, relative to it and in order, and hidden folders, which are not entered."""
    found, entered = [], set()
    for base, folders, names in os.walk(folder, followlinks=True, onerror=_refuse_unreadable):
        here = os.path.realpath(base)
        if here in entered:  # through a link
            folders.clear()
            continue
        entered.add(here)
        hidden = [name for name in folders if name.startswith((".", "__"))]
        folders[:] = sorted({*folders} - {*hidden})
        below = os.path.relpath(base, folder)
        found += [os.path.normpath(f"{below}/{name}") for name in names]
        found += [f"{os.path.normpath(f'{below}/{name}')}/" for name in hidden]
    return sorted(found)


def _refuse_unreadable(error: OSError) -> NoReturn:
    raise UserError(f"data source {error.filename}: cannot be read: {error.strerror}") from error


def _choose(source: Source, root: Path, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The files of rows, and the others with the reason."""
    rows, others = [], []
    for name in names:
        path, real = PurePosixPath(name), os.path.realpath(root / name)
        if path.name.startswith((".", "__")):
            others.append(f"{name} (hidden)")
        elif path.name in DESCRIPTIONS:
            others.append(f"{name} (a description)")
        elif format_of(Path(name)) is None:
            others.append(f"{name} ({NOT_ROWS})")
        elif not os.path.exists(real):
            raise UserError(f"data source {source.path}: {name} is a link to nothing; mend or remove it")
        elif not os.path.isfile(real):
            others.append(f"{name} (no regular file)")
        else:
            rows.append(name)
    return rows, others


def _once(root: Path, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The files of a split, each once although links to it have other names; and these links."""
    files: dict[str, str] = {}
    links = []
    for name in names:
        if (own := files.setdefault(os.path.realpath(root / name), name)) != name:
            links.append(f"{name} (the same file as {own})")
    return list(files.values()), links


def _configured(source: Source, folder: Path) -> dict[str, list[Path]] | None:
    """The files of the splits that a README.md in the way of the Hub lists, or None when there is none."""
    readme = folder / "README.md"
    try:
        if not readme.is_file() or not (metadata_load(readme) or {}).get("configs"):
            return None
        listed = load_dataset_builder(str(folder), name=source.name).config.data_files
    except (DatasetsError, yaml.YAMLError, ValueError, OSError) as error:
        raise UserError(f"data source {source.path}: README.md: {str(error).splitlines()[0]}") from error
    return {str(split): [Path(file) for file in files] for split, files in (listed or {}).items()}


def _by_split(source: Source, names: Sequence[str]) -> dict[str, list[str]]:
    """The files of each split; all are "train" when no name says a split."""
    shards = [(SHARD.fullmatch(name), name) for name in names]
    said = [(shard[1], name) for shard, name in shards if shard] or [
        (split, name) for name in names if (split := _split_said(source, name)) is not None
    ]
    splits: dict[str, list[str]] = {}
    for split, name in said or [("train", name) for name in names]:
        splits.setdefault(split, []).append(name)
    return splits


def _split_said(source: Source, name: str) -> str | None:
    """The split that a path says: its innermost folder that says one, or else the file's own name."""
    *folders, own = PurePosixPath(name).parts
    for part in (*reversed(folders), own):
        said = [split for split, word in SPLIT_WORDS.items() if word.search(part)]
        if len(said) > 1:
            raise UserError(
                f"data source {source.path}: the name {name} says the splits {' and '.join(said)}; rename it, or name "
                "the file itself"
            )
        if said:
            return said[0]
    return None


def _known() -> str:
    return f"files of rows end in {', '.join(FORMATS)} ({', '.join(COMPRESSIONS)} may follow)"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
