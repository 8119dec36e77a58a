"""The language-model head: hidden states to float32 logits, with what some architectures do after the product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from aligndistil.errors import UserError


@dataclass(frozen=True, slots=True)
class Head:
    """How one model turns hidden states into logits."""

    linear: nn.Linear
    """The output embeddings; read at each call, since ZeRO-3 gathers the weight just before."""
    scale: float
    """Factor on the logits (Cohere's `logit_scale`, one over Granite's `logits_scaling`)."""
    softcap: float | None
    """Gemma's `final_logit_softcapping`."""
    vocab: int
    """Rows that are tokens of the tokenizer: the rest is padding of the matrix and is cut before any softmax."""

    @classmethod
    def of(cls, model: PreTrainedModel, vocab: int) -> Head:
        config = model.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        return cls(model.get_output_embeddings(), float(scale), getattr(config, "final_logit_softcapping", None), vocab)

    def project(self, hidden: Tensor) -> Tensor:
        """(n, H) to the raw float32 product (n, all rows), never rounded to bfloat16 on the way."""
        logits = matmul_float32(hidden, self.linear.weight.t())
        return logits if self.linear.bias is None else logits + self.linear.bias.float()

    def finish(self, raw: Tensor) -> Tensor:
        """Raw products to logits (n, V): scale, cap, cut; differentiable."""
        logits = raw[:, : self.vocab]
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    @property
    def is_plain(self) -> bool:
        """Whether logits are the product itself, so that work may be done in its memory."""
        return self.scale == 1.0 and self.softcap is None


def matmul_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with a float32 result: operands stay bfloat16 on CUDA (torch >= 2.8), and are widened elsewhere."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b.to(a.dtype)
    if a.is_cuda and _MM_TAKES_OUT_DTYPE:
        return torch.mm(a, b.to(a.dtype), out_dtype=torch.float32)
    return a.float() @ b.float()


_MM_TAKES_OUT_DTYPE = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 8)


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model without its head: what returns `last_hidden_state`."""
    body: nn.Module | None = getattr(model, model.base_model_prefix, None)
    if body is None or body is model:
        raise UserError(
            f"model {model.config.name_or_path!r} ({type(model).__name__}) has no separate body and language-model "
            "head; use a causal language model of a standard architecture (Llama, Qwen2, Gemma, GPT-2 ...)"
        )
    return body


@torch.no_grad()
def check_head(model: PreTrainedModel, head: Head) -> None:
    """Compare the head with the model's own logits on a few tokens, so that an unusual architecture cannot pass."""
    ids = torch.arange(1, 5, device=model.device).unsqueeze(0)
    hidden = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
    ours = head.finish(head.project(hidden))
    theirs = model(input_ids=ids, use_cache=False).logits[0, :, : head.vocab].float()
    tolerance = 1e-3 if hidden.dtype == torch.float32 else 0.05
    error = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1.0)
    if not error < tolerance:
        raise UserError(
            f"model {model.config.name_or_path!r} ({type(model).__name__}) computes its logits in a way that is not "
            f"supported: they differ from head(hidden) by {float(error):.1e} (relative)"
        )
