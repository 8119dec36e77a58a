"""Off-policy AlignDistil as one writes it down: padded rows, whole logits, autograd, torch's AdamW, and no metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from heads import plain_aligndistil
from parity_sides import Case
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from aligndistil.objectives.aligndistil import AlignDistil
from aligndistil.objectives.base import Role


class Text(NamedTuple):
    ids: list[int]
    prompt: int
    """Tokens of it that are the prompt."""


class PlainAlignDistil:
    """Trains the model of a case on the rows in its folder."""

    def __init__(self, case: Case, folder: Path) -> None:
        self._case, self._objective = case, AlignDistil.model_validate(case.objective)
        self._models: dict[str, Any] = {
            role: AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
            for role, name in {Role.POLICY: case.start, **case.frozen}.items()
        }
        self._tokenizer = AutoTokenizer.from_pretrained(folder / case.start)
        self._rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
        self._weights = list(self._models[Role.POLICY].parameters())
        rate = {"lr": case.learning_rate, "betas": (0.9, 0.95), "weight_decay": 0.0}
        self._optimizer = torch.optim.AdamW(self._weights, **rate)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: (1 + math.cos(math.pi * step / case.steps)) / 2
        )

    def texts(self, step: Sequence[int]) -> list[Text]:
        rows = [(self._rows[i]["prompt"], self._rows[i]["chosen"]) for i in step]
        return [Text(self._ids(prompt + chosen), len(self._ids(prompt))) for prompt, chosen in rows]

    def gradient(self, texts: Sequence[Text]) -> float:
        """The gradient of the mean loss, and the loss."""
        self._optimizer.zero_grad()
        total, size = 0.0, self._case.micro_batch_size
        for start in range(0, len(texts), size):
            loss = self._losses(texts[start : start + size]).sum() / len(texts)
            loss.backward()
            total += float(loss.detach())
        return total

    def step(self) -> float:
        """Clip, move the weights and the learning rate; the norm before."""
        norm = torch.nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._optimizer.step()
        self._schedule.step()
        return float(norm)

    def _losses(self, texts: Sequence[Text]) -> Tensor:
        """(B,) mean over the response tokens of each row."""
        ids_BT = pad_sequence([torch.tensor(text.ids) for text in texts], batch_first=True)
        position = torch.arange(ids_BT.shape[1])
        attention_BT = position < torch.tensor([[len(text.ids)] for text in texts])
        response_BT = (attention_BT & (position >= torch.tensor([[text.prompt] for text in texts])))[:, 1:]

        def logps_of(role: str) -> Tensor:
            logits = self._models[role](input_ids=ids_BT, attention_mask=attention_BT.long(), use_cache=False).logits
            return torch.log_softmax(logits[:, :-1][response_BT], dim=-1)

        with torch.no_grad():
            logps = {role: logps_of(role) for role in self._case.frozen}
        logps[Role.POLICY] = logps_of(Role.POLICY)
        weighted = plain_aligndistil(self._objective, logps)["weighted_kl"]
        spread_BT = torch.zeros(response_BT.shape).masked_scatter(response_BT, weighted)
        return spread_BT.sum(-1) / response_BT.sum(-1)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids
