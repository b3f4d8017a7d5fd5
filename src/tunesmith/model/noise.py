"""NEFTune: noise on the embeddings while training (arXiv 2310.05914)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tunesmith.data.batches import MicroBatch


def conversation_lengths(batch: MicroBatch) -> torch.Tensor:
    """How long the conversation is that each token belongs to, padding left out, int64 [tokens].

    A beginning that several share counts as part of the longest of them. Conversations are computed up to the token that
    predicts their last target, which so tells where each ends.
    """
    stops = torch.tensor([segment.stop for segment in batch.segments])
    ends = torch.searchsorted(batch.predicting, stops).tolist()  # of each segment: how many predicting tokens lie before its stop
    longest: dict[tuple[int, int], int] = {}
    for segment, end in zip(batch.segments, ends, strict=True):
        last = int(batch.predicting[end - 1]) if end else -1
        length = int(batch.positions[last]) + 1 if last >= segment.start else 1
        for span in (*segment.context, (segment.start, segment.stop)):
            longest[span] = max(longest.get(span, 1), length)
    lengths = torch.tensor([longest[segment.start, segment.stop] for segment in batch.segments])
    return lengths.repeat_interleave(torch.tensor(batch.lengths))


def with_noise(embedded: torch.Tensor, batch: MicroBatch, alpha: float) -> torch.Tensor:
    """Embeddings [tokens, d] plus uniform noise of at most alpha / sqrt(L d), L the length of the token's conversation.

    A shared beginning is computed once, so that its conversations share its noise too, as they share its dropout. It comes
    from torch's generator, whose state is part of a checkpoint.
    """
    scale = alpha / (conversation_lengths(batch).to(embedded.device) * embedded.shape[-1]).sqrt()
    noise = torch.empty_like(embedded, dtype=torch.float32).uniform_(-1, 1) * scale[:, None]
    return embedded + noise.to(embedded.dtype)
