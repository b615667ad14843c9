"""Chooses tokens from logits: the most probable one, or one that is drawn. Knows no network.

Shape suffixes: V vocabulary, K the tokens that are drawn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sensebatch.jobs import Sampling


@dataclass(slots=True, kw_only=True)
class Drawer:
    """Chooses the tokens of one answer.

    All chance comes from the job's own generator on the CPU, one number a token, so that an answer
    does not depend on the others that are written beside it.

    Source: the logits processors of transformers 4.57 in the order of its `generate`.
    """

    sampling: Sampling
    generator: torch.Generator = field(repr=False)
    said: list[int] = field(default_factory=list)
    """The answer so far: the tokens that the penalty is about."""

    def choose(self, logits_V: Tensor) -> int:
        """Returns the next token, and counts it as said."""
        logits_V = self._penalised(logits_V)
        token = self._drawn(logits_V) if self.sampling.do_sample else int(logits_V.argmax())
        self.said.append(token)
        return token

    def _penalised(self, logits_V: Tensor) -> Tensor:
        penalty = self.sampling.repetition_penalty
        if penalty == 1 or not self.said:
            return logits_V
        said = torch.tensor(sorted(set(self.said)), device=logits_V.device)
        logits_V = logits_V.float()
        found = logits_V[said]
        return logits_V.index_copy(
            0, said, torch.where(found < 0, found * penalty, found / penalty)
        )

    def _drawn(self, logits_V: Tensor) -> int:
        sampling = self.sampling
        count = min(sampling.top_k or len(logits_V), len(logits_V))
        # The most probable ones first; the rest is done where the generator is.
        found = torch.topk(logits_V.float(), count)
        logits_K, ids_K = found.values.cpu() / sampling.temperature, found.indices.cpu()
        probabilities_K = logits_K.softmax(0)
        # A token stays while those before it have not reached the probability.
        before_K = probabilities_K.cumsum(0) - probabilities_K
        kept = probabilities_K.where(before_K < sampling.top_p, probabilities_K.new_zeros(()))
        return int(ids_K[torch.multinomial(kept, 1, generator=self.generator)])


def chooses_greedily(sampling: Sampling) -> bool:
    """Returns whether the most probable token is always taken."""
    return not sampling.do_sample and sampling.repetition_penalty == 1


def log_probabilities(logits_V: Tensor, tokens: Sequence[int]) -> list[float]:
    """Returns the log-probabilities of some tokens, by the softmax of all."""
    ids = torch.tensor(tokens, device=logits_V.device)
    return logits_V.float().log_softmax(-1)[ids].tolist()
