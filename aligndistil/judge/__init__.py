"""Judges: a model behind an OpenAI-compatible endpoint, a reward model, or an exact reward."""

from aligndistil.judge.asks import Ask, Compared, Judge, Judged, Message, OnProgress, Reply, Unreadable, Usage, Verdict
from aligndistil.judge.cache import VerdictCache
from aligndistil.judge.client import EndpointJudge
from aligndistil.judge.config import JudgeConfig, Price, load_judge, shipped_judges

__all__ = [
    "Ask",
    "Compared",
    "EndpointJudge",
    "Judge",
    "JudgeConfig",
    "Judged",
    "Message",
    "OnProgress",
    "Price",
    "Reply",
    "Unreadable",
    "Usage",
    "Verdict",
    "VerdictCache",
    "load_judge",
    "shipped_judges",
]
