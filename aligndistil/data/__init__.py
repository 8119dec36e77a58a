"""Data: sources (`sources`) -> raw rows in known columns (`formats`) -> records (`records`) -> token ids (`encoding`,
kept by `cache`) -> examples (`dataset`, with its `report`) -> the examples of a step (`sampler`). `preview` shows rows.
"""

from aligndistil.data.dataset import Examples, load_examples
from aligndistil.data.encoded_source import gives
from aligndistil.data.encoding import Encoder
from aligndistil.data.formats import read_prompts
from aligndistil.data.preview import preview
from aligndistil.data.records import Record, to_records
from aligndistil.data.report import Dropped, DropReport
from aligndistil.data.sampler import Sampler
from aligndistil.data.sources import content_hash, load_rows

__all__ = [
    "DropReport",
    "Dropped",
    "Encoder",
    "Examples",
    "Record",
    "Sampler",
    "content_hash",
    "gives",
    "load_examples",
    "load_rows",
    "preview",
    "read_prompts",
    "to_records",
]
