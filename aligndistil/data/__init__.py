"""Data: sources (`sources`) -> raw rows in known columns (`formats`) -> records (`records`) -> token ids (`encoding`,
made by `workers`, kept by `cache`) -> examples (`dataset`, with its `report`, and what is odd about the `whole_set`) ->
the examples of a step (`sampler`). `preview` shows rows.
"""

from aligndistil.data.conversations import PromptReader
from aligndistil.data.dataset import Examples, eval_prompts, load_examples, prompts_of
from aligndistil.data.encoded_source import check_source, gives, sources_of
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
    "PromptReader",
    "Record",
    "Sampler",
    "check_source",
    "content_hash",
    "eval_prompts",
    "gives",
    "load_examples",
    "load_rows",
    "preview",
    "prompts_of",
    "read_prompts",
    "sources_of",
    "to_records",
]
