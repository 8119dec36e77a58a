"""Files of the benchmarks: each pinned by revision and SHA-256, fetched once into the cache, or read from a folder.

They are not part of this package: some are for research only, and none should get into training data by way of it.
"""

from __future__ import annotations

import gzip
import hashlib
import urllib.request
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's or httpx2's, whichever it uses

from aligndistil.errors import ServiceError, UserError
from aligndistil.files import cache_root, write_bytes

TIMEOUT = 120.0
"""Seconds without a byte."""


class BenchmarkFile(NamedTuple):
    """One file of a benchmark, and where it comes from."""

    name: str
    """What it is called in the cache and in `--data-dir`, where `.gz` may follow."""
    source: str
    """Its address, with a revision in it; or `hf:OWNER/NAME@REVISION:PATH`, of a data set of the Hub."""
    sha256: str = ""
    """Of its content; empty where only the revision is pinned."""
    also: tuple[str, ...] = ()
    """SHA-256 of other editions that have the same content in another layout."""

    @property
    def address(self) -> str:
        """Where a person finds it."""
        if (place := _of_hub(self.source)) is None:
            return self.source
        repository, revision, path = place
        return f"https://huggingface.co/datasets/{repository}/resolve/{revision}/{path}"


def _of_hub(source: str) -> tuple[str, str, str] | None:
    """Repository, revision and path of a file of the Hub; None where a source is an address."""
    if not source.startswith("hf:"):
        return None
    name, path = source.removeprefix("hf:").rsplit(":", 1)
    repository, revision = name.split("@")
    return repository, revision, path


class Files:
    """Where the files of benchmarks are: a folder that somebody filled, or the cache, which is filled from the net."""

    def __init__(self, data_dir: Path | None = None) -> None:
        self.data_dir = data_dir
        self.notes: list[str] = []
        """A sentence for each file that was read and is not the pinned one."""

    def get(self, file: BenchmarkFile) -> bytes:
        """What is in a file.

        Raises:
            UserError: it is not in the folder, or what was fetched is not what was pinned.
            ServiceError: it cannot be fetched.
        """
        return self._of_folder(file, self.data_dir) if self.data_dir is not None else self._of_cache(file)

    def _of_folder(self, file: BenchmarkFile, folder: Path) -> bytes:
        path = folder / file.name
        packed = path.with_name(f"{path.name}.gz")
        if path.is_file():
            content = path.read_bytes()
        elif packed.is_file():
            content = gzip.decompress(packed.read_bytes())
        else:
            raise UserError(
                f"--data-dir {folder} has no {file.name} (nor {packed.name}); it is to be had at {file.address}"
            )
        digest = hashlib.sha256(content).hexdigest()
        if file.sha256 and digest not in (file.sha256, *file.also):
            note = f"{path} is not the pinned edition (its SHA-256 is {digest[:12]}..., not {file.sha256[:12]}...)."
            self.notes = [*dict.fromkeys([*self.notes, note])]
        return content

    def _of_cache(self, file: BenchmarkFile) -> bytes:
        # The pin is in the name: an edition that is pinned later does not meet the older one.
        pin = hashlib.sha256(f"{file.source} {file.sha256}".encode()).hexdigest()[:16]
        path = cache_root() / "benchmarks" / pin / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # one process fetches, and the others wait for it
            return path.read_bytes() if path.is_file() else self._fetch(file, path)

    def _fetch(self, file: BenchmarkFile, path: Path) -> bytes:
        content = _fetched(file)
        digest = hashlib.sha256(content).hexdigest()
        if file.sha256 and digest != file.sha256:
            raise UserError(
                f"{file.address} is not what it was: its SHA-256 is {digest}, and {file.sha256} was expected; give the "
                f"right {file.name} in a folder with --data-dir"
            )
        write_bytes(path, content)
        return content


def _fetched(file: BenchmarkFile) -> bytes:
    try:
        if (place := _of_hub(file.source)) is not None:
            repository, revision, path = place
            return Path(hf_hub_download(repository, path, repo_type="dataset", revision=revision)).read_bytes()
        with urllib.request.urlopen(file.source, timeout=TIMEOUT) as answer:
            content: bytes = answer.read()
            return content
    except (OSError, ValueError, HTTPError) as error:  # urllib's, the Hub's, and those of the Hub's HTTP library
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ServiceError(
            f"{file.address} cannot be fetched ({reason}); check the network, or put {file.name} into a folder and "
            "give it with --data-dir"
        ) from None
