"""What one rank holds of the model for one pipeline stage: the embedding (first stage), some layers, the head (last).

Activations between stages are (s, B, D). S is the tokens that this cp rank holds of a sequence (all, where cp is 1), and s
its local share of them under sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from raytron.config import ModelConfig
from raytron.model.block import Block
from raytron.model.build import Builder
from raytron.model.context import Context, Documents
from raytron.model.norm import Norm
from raytron.model.rope import rotary_table
from raytron.parallel.chunked_loss import chunked_loss
from raytron.parallel.offload import Offload, Parked
from raytron.parallel.parameter import Param
from raytron.parallel.random import key_of
from raytron.parallel.recompute import Keep
from raytron.parallel.tensor import column_linear, vocab_cross_entropy, vocab_embedding
from raytron.plan.recompute import WHOLE, Treatment

EMBEDDING = "embed.weight"


class Stage(nn.Module):
    """One pipeline stage of one rank.

    treatments: what each layer keeps for its backward. loss_chunks: pieces in which the loss is computed.
    embedding: the first stage's table, where this rank holds it too (tied, pp = 1).
    """

    def __init__(
        self,
        build: Builder,
        model: ModelConfig,
        layers: range,
        *,
        first: bool,
        last: bool,
        treatments: Sequence[Treatment] | None = None,
        loss_chunks: int = 1,
        offload: Offload | None = None,
        embedding: Param | None = None,
    ):
        super().__init__()
        self.treatments = treatments or [Treatment()] * len(layers)
        self.loss_chunks, self.offload = loss_chunks, offload
        self.model, self.parallel, self.first, self.last = model, build.parallel, first, last
        self.context_parallel = build.context_parallel
        cut = self.parallel.sequence_parallel
        self.table = embedding
        if self.table is None and (first or (last and model.tied_embeddings)):
            self.table = build.normal(EMBEDDING, (model.vocab, model.hidden), model.init_std, dim=0, decay=False)
        self.position = None
        if first and model.positions == "learned":
            shape = (model.max_positions, model.hidden)
            self.position = build.table("position.weight", shape, model.init_std, partial=cut)
        self.embedding_key = key_of(build.seed, "embed", "dropout")
        self.layers = nn.ModuleList(Block(build, index, model) for index in layers)
        self.norm = self.head = None
        if last:
            self.norm = Norm(build, "norm", model.hidden, model.norm, model.norm_eps, partial=cut)
            self.head = self.table
            if not model.tied_embeddings:
                self.head = build.normal("head.weight", (model.vocab, model.hidden), model.init_std, dim=0)
        self._held: tuple[Tensor, tuple[Tensor, Tensor] | None] | None = None

    def context(self, samples: Tensor, length: int, training: bool, documents: Documents | None = None) -> Context:
        """The context of a micro-batch with these sample ids (B,) and whole sequences of `length` tokens."""
        if self._held is None or len(self._held[0]) * self.context_parallel.size != length:
            held = self.context_parallel.positions(length).to(samples.device)
            self._held = held, self._rotary(held)
        positions, rotary = self._held
        places = positions
        if documents is not None:
            places = documents.positions.t()
            rotary = self._rotary(places)
        starts = None if documents is None else documents.starts
        seen = self.context_parallel.seen(length, len(samples), self.model.window, starts)
        return Context(samples, rotary, self._share(positions), self._share(places), seen, training)

    def _rotary(self, places: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of places (S,) or (S,B), where the model turns by them."""
        if self.model.positions != "rope":
            return None
        return rotary_table(places, self.model.dim_per_head, self.model.rope_theta)

    def _share(self, x: Tensor) -> Tensor:
        """(S,...) -> this rank's (s,...) of it."""
        parallel = self.parallel
        return x.chunk(parallel.size)[parallel.rank] if parallel.sequence_parallel else x

    def embed(self, tokens: Tensor, context: Context) -> Tensor:
        """tokens (B,S) -> (s,B,D); first stage only."""
        assert self.table is not None
        x = vocab_embedding(tokens.t(), self.table, self.parallel)
        if self.position is not None:
            x = x + self.position[context.places.view(len(context.places), -1)]
        return context.dropout(x, self.model.dropout, self.embedding_key)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Through this stage's layers: (s,B,D) -> (s,B,D), normed after the last."""
        parked: Parked | None = None
        for layer, treatment in zip(self.layers, self.treatments, strict=True):
            if not torch.is_grad_enabled():
                treatment = Treatment()
            if treatment.offload and self.offload is not None:
                parked = self.offload.block(parked, context.rotary or ())
            with Keep(treatment.parts, parked if treatment.offload else None) as keep:
                x = keep.region(WHOLE, partial(layer, context=context._replace(keep=keep)), x)
        return x if self.norm is None else self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """x (s,B,D) -> this rank's columns (S,B,V_l); last stage only."""
        assert self.head is not None
        return column_linear(x, self.parallel, (self.head, None))[0]

    def loss(self, x: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Σ weights · cross-entropy, float32 scalar: x (s,B,D); labels and weights (B,S). Last stage only."""
        labels, weights, vocab = labels.t(), weights.t(), self.model.vocab
        if self.loss_chunks > 1:
            assert self.head is not None
            return chunked_loss(x, self.head, labels, weights, vocab, self.parallel, self.loss_chunks)
        return vocab_cross_entropy(self.logits(x), labels, weights, vocab, self.parallel.group)
