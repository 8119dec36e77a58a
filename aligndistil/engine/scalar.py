"""Models with one number a token instead of a distribution: reward models and critics."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from aligndistil.batch import Batch
from aligndistil.engine.head import backbone
from aligndistil.engine.rows import Body
from aligndistil.errors import UserError
from aligndistil.objectives.base import Need


class Scorer(Protocol):
    """Anything that scores responses."""

    def scores(self, batch: Batch) -> Tensor:
        """(B, T) float32 score of the text up to and including each token."""
        ...


class _Projection(nn.Module):
    """A module around the product, so that ZeRO-3 has a place to gather the head's weight at."""

    def forward(self, hidden: Tensor, head: nn.Linear) -> Tensor:
        # float32 even when the model is bfloat16: scores are compared with each other, and bfloat16 has three digits
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        bias = None if head.bias is None else head.bias.to(wide.dtype)
        return F.linear(wide, head.weight.to(wide.dtype), bias).squeeze(-1)


class ScalarNetwork(nn.Module):
    """A sequence-classification model read at every token; `forward` gives (B, T)."""

    def __init__(self, model: PreTrainedModel, *, share_prompts: bool = False) -> None:
        """Raises UserError when its own score of a text is not that of its linear head at the last token."""
        super().__init__()
        self.model = model
        self.projection = _Projection()
        self._head = _scalar_head(model)
        self._check_head()
        self._body = Body(model, share_prompts=share_prompts)

    @property
    def head(self) -> nn.Linear:
        """What makes one number of a hidden state; transformers calls it `score` in most families."""
        return getattr(self.model, self._head)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _check_head(self) -> None:
        """A head may be read at another token than the last, or after more than a product (BERT's pooled first one)."""
        training, pad = self.model.training, self.model.config.get_text_config().pad_token_id
        self.model.eval()
        ids = torch.tensor([[i for i in range(1, 8) if i != pad]], device=self.model.device)
        hidden = backbone(self.model)(input_ids=ids, use_cache=False).last_hidden_state
        ours = self.projection(hidden[:, -1], self.head)
        theirs = self.model(input_ids=ids).logits[:, 0].to(ours.dtype)
        self.model.train(training)
        tolerance = 0.05 if self.model.dtype in (torch.bfloat16, torch.float16) else 1e-4
        if not bool((ours - theirs).abs() <= tolerance * theirs.abs().clamp(min=1.0)):
            raise UserError(
                f"model {self.model.config.name_or_path!r} ({type(self.model).__name__}) scores a text otherwise than "
                f"with its linear head at the last token: {float(theirs):.4g} where that gives {float(ours):.4g}; use "
                "a causal model with a scalar head, or score with python:MODULE:FUNCTION"
            )

    def forward(self, batch: Batch) -> Tensor:
        states, places = self._body.states(batch)
        outputs: Tensor = self.projection(states, self.head)
        return (outputs if places is None else outputs[places]).view(batch.ids_BT.shape)


def _scalar_head(model: PreTrainedModel) -> str:
    """The name of the linear layer with one output that is all there is beside the body of the model."""
    body, own = backbone(model), dict(model.named_children())
    heads = [name for name, module in own.items() if isinstance(module, nn.Linear) and module.out_features == 1]
    others = [name for name, module in own.items() if module is not body and any(True for _ in module.parameters())]
    if len(heads) != 1 or others != heads:
        raise UserError(
            f"model {model.config.name_or_path!r} ({type(model).__name__}) has no linear head with one output on its "
            f"hidden states, but {', '.join(others) or 'none'}; use an architecture that transformers gives one "
            "(Llama, Qwen2, Mistral, Gemma, GPT-2 ...)"
        )
    return heads[0]


class ScalarModel:
    """A frozen model with a scalar head."""

    def __init__(self, model: PreTrainedModel, *, normalized: bool = False) -> None:
        self.network = ScalarNetwork(model.eval().requires_grad_(False))
        self.mean: float = model.config.score_mean if normalized else 0.0
        self.std: float = model.config.score_std if normalized else 1.0

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        """(B, T) float32 score of the text up to and including each token."""
        with gathered(list(self.network.head.parameters())):
            outputs_BT: Tensor = self.network(batch)
        return (outputs_BT - self.mean) / self.std


def scalar_output(outputs_BT: Tensor, batch: Batch, need: Need) -> Tensor:
    """(B, T) what `need` means at each response token, zero elsewhere.

    A score is of the text with the token, a value of the text before it.
    """
    if need is Need.VALUE:
        outputs_BT = F.pad(outputs_BT[:, :-1], (1, 0))
    return outputs_BT * batch.response_BT


def gathered(parameters: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """Makes parameters whole that ZeRO-3 has split; does nothing for others."""
    from deepspeed.runtime.zero import GatheredParameters

    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    context: AbstractContextManager[Any] = GatheredParameters(sharded, enabled=bool(sharded))
    return context
