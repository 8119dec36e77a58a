"""A page that shows, token by token, what a stage taught: the objective's own terms and every model's likeliest tokens.

`trained` finds the stage, `responses` what is looked at, `values` computes, `texts` decodes tokens, `page` writes HTML.
"""

from aligndistil.token_view.page import inspect, page_data, write_page
from aligndistil.token_view.responses import Request, Response
from aligndistil.token_view.trained import TrainedStage, find_stage
from aligndistil.token_view.values import TARGET, TokenValues, Viewer

__all__ = [
    "TARGET",
    "Request",
    "Response",
    "TokenValues",
    "TrainedStage",
    "Viewer",
    "find_stage",
    "inspect",
    "page_data",
    "write_page",
]
