"""Encode media on all pipeline stages (model.encoder_placement=all_stages).

During a step, each stage encodes its share of the coming step's media (data/stage_shares.py): some of it before its
first forward pass, the rest after its last backward pass, while the stages before it compute. Then the features go to
the first stage in one exchange between two steps, so that no message is under way while the schedule has its own. The
first stage encodes its own share in its forward passes, as it does without the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Optional, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from transformers import LlamaConfig

from megatron_anymal.config import ModelConfig
from megatron_anymal.data.micro_batch import MediaBatch, MicroBatch
from megatron_anymal.data.stage_shares import StageShares
from megatron_anymal.data.step_plan import StepPlan
from megatron_anymal.model.encoders import Encoder
from megatron_anymal.model.frozen_features import StoreFeatures, Timer, frozen_features, store_nowhere
from megatron_anymal.parallel import ParallelLayout
from megatron_anymal.resilience import heartbeat
from megatron_anymal.resilience.stragglers import OwnTime

_T = TypeVar("_T")


class StageEncoding:
    """This rank's part in the encoding by all stages.

    Its partners are the ranks of other stages with the same position in all other groups: they read the same samples,
    and have the same share of the pieces.

    Attributes:
        encoders: frozen encoders by modality; on the first stage those of the model.
        operations: their floating-point operations for one piece.
        store: called with the features of pieces that a cache lacks.
    """

    def __init__(
        self,
        layout: ParallelLayout,
        model: ModelConfig,
        hf: LlamaConfig,
        encoders: Mapping[str, Encoder],
        own_time: OwnTime,
        timer: Timer,
        tokens: int,
    ):
        """Prepare to encode.

        Args:
            hf: the Llama's HuggingFace configuration.
            encoders: on this rank's device.
            own_time: counts the time of encoding.
            timer: likewise, for the run's log.
            tokens: longest micro-batch.
        """
        self.encoders = encoders
        self.operations = {name: encoder.flops_per_piece() for name, encoder in encoders.items()}
        self.store: StoreFeatures = store_nowhere
        self._layout, self._own_time, self._timer = layout, own_time, timer
        self._per_call = {name: model.modalities[name].encoder.max_pieces_per_call for name in encoders}
        self._slot = slot_operations(model, hf, tokens)
        # Share of a micro-batch's time that is its forward pass.
        self._early = 1 / _passes(model)
        self._group = parallel_state.get_pipeline_model_parallel_group()
        self._ranks = dist.get_process_group_ranks(self._group)
        self._has_weights = False
        # Micro-batches that are being encoded ahead, what is left of them, and features that are ready to be sent.
        self._coming: Sequence[MicroBatch] = ()
        self._left: deque[tuple[str, MediaBatch]] = deque()
        self._features: dict[str, list[Tensor]] = {}
        # Micro-batches whose features the first stage has.
        self._delivered: Optional[Sequence[MicroBatch]] = None

    def shares(self, costs: Mapping[str, float], *, ahead: bool) -> StageShares:
        """Return how stages share the encoding.

        Args:
            costs: encoder cost of a piece by modality, in any unit; the same on every rank.
            ahead: steps are encoded during the step before, when stages wait.
        """
        per_operation = [costs[name] / number for name, number in self.operations.items() if number]
        slot = self._slot * sum(per_operation) / len(per_operation) if ahead and per_operation else 0.0
        return StageShares(self._layout.pipeline_size, dict(costs), slot)

    def take_weights(self) -> None:
        """Copy the first stage's encoders to the other stages, once: it may have restored them from another run.

        Collective over the stages. This also sets up their communication for `deliver`.
        """
        if self._has_weights:
            return
        self._has_weights = True
        with torch.no_grad():
            for name in sorted(self.encoders):
                for tensor in self.encoders[name].state_dict().values():
                    dist.broadcast(tensor, src=self._ranks[0], group=self._group)

    def prepare(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Let the first stage have the features of a step that is about to run: if it was not encoded ahead (a first
        step, or a validation), all stages encode now.

        Collective over the stages.
        """
        self.take_weights()
        if micro_batches is self._delivered:
            self._delivered = None
            return
        self._begin(micro_batches, 1.0)
        self._send()

    def begin(self, coming: Sequence[MicroBatch]) -> None:
        """Encode what fits into the wait before this stage's first forward pass.

        Args:
            coming: the next step's micro-batches. `finish` and `deliver` must follow.
        """
        self._begin(coming, self._early)

    def finish(self) -> None:
        """Encode the rest. To be called after the stage's last backward pass."""
        if not self._left:
            return
        with self._own_time.counted():
            while self._left:
                self._encode_one()

    def deliver(self, done: Sequence[MicroBatch]) -> None:
        """Send the features to the first stage. Collective over the stages, between two steps.

        Args:
            done: micro-batches whose features are no longer needed.
        """
        for _, media in _media_of(done):
            media.encoded = None
        self.finish()
        self._send()
        self._delivered = self._coming

    def _begin(self, micro_batches: Sequence[MicroBatch], part: float) -> None:
        """Encode a part of this stage's share; the first stage's is encoded by its model."""
        self._coming, own = micro_batches, not self._layout.is_first_stage
        self._left.extend((name, media) for name, media in _media_of(micro_batches) if own)
        work = [len(media.pieces) * self.operations[name] for name, media in self._left]
        before = 0.0
        with self._own_time.counted():
            for amount in work:
                if before + amount / 2 > part * sum(work):
                    break
                before += amount
                self._encode_one()

    def _encode_one(self) -> None:
        heartbeat.beat()
        name, media = self._left.popleft()
        device = self._layout.device
        copy = media.with_tensors(lambda tensor: tensor.to(device, non_blocking=True))
        features = frozen_features(name, self.encoders[name], copy, self._per_call[name], self.store, self._timer)
        self._features.setdefault(name, []).append(features)

    def _send(self) -> None:
        """Exchange the features of the coming micro-batches; on the first stage attach them to their media."""
        operations, received = [], {}
        if self._layout.is_first_stage:
            for (stage, name), rows in sorted(self._expected().items()):
                encoder = self.encoders[name]
                shape = (rows, encoder.feature_tokens, encoder.width)
                received[stage, name] = torch.empty(shape, dtype=encoder.dtype, device=self._layout.device)
                source = self._ranks[stage]
                operations.append(dist.P2POp(dist.irecv, received[stage, name], source, self._group))
        else:
            for name in sorted(self._features):
                features = torch.cat(self._features[name])
                if len(features):
                    operations.append(dist.P2POp(dist.isend, features, self._ranks[0], self._group))
            self._features.clear()
        for request in dist.batch_isend_irecv(operations) if operations else ():
            request.wait()
        self._attach(received)

    def _expected(self) -> dict[tuple[int, str], int]:
        """Rows of features from each stage and of each modality."""
        rows: dict[tuple[int, str], int] = {}
        for stage, name, media in self._remote():
            rows[stage, name] = rows.get((stage, name), 0) + self._share(media)
        return {key: count for key, count in rows.items() if count}

    def _attach(self, received: Mapping[tuple[int, str], Tensor]) -> None:
        """Hand out each stage's features in the order in which it has encoded them."""
        taken = dict.fromkeys(received, 0)
        for stage, name, media in self._remote() if received else ():
            share = self._share(media)
            if share:
                start = taken[stage, name]
                media.encoded = received[stage, name][start : start + share]
                taken[stage, name] = start + share

    def _remote(self) -> Iterator[tuple[int, str, MediaBatch]]:
        """The coming media that other stages encode: stage, modality and media."""
        for micro_batch in self._coming:
            for name, media in micro_batch.media.items():
                stage = micro_batch.plan.encoder_stage(name)
                if stage:
                    yield stage, name, media

    def _share(self, media: MediaBatch) -> int:
        """Number of pieces of this rank's and its partners' share."""
        of_context = media.shares[self._layout.context_rank if len(media.shares) > 1 else 0]
        return of_context[self._layout.tensor_rank if len(of_context) > 1 else 0]


def with_coming(batches: Iterable[tuple[StepPlan, _T]], *, ahead: bool) -> Iterator[tuple[StepPlan, _T, Optional[_T]]]:
    """Yield steps with the next step's micro-batches.

    Args:
        ahead: read one step ahead; otherwise, and for the last step, there are none.
    """
    before: Optional[tuple[StepPlan, _T]] = None
    for plan, micro_batches in batches:
        if not ahead:
            yield plan, micro_batches, None
            continue
        if before is not None:
            yield (*before, micro_batches)
        before = plan, micro_batches
    if before is not None:
        yield (*before, None)


def slot_operations(model: ModelConfig, hf: LlamaConfig, tokens: int) -> float:
    """Estimate the operations of a stage's passes of a micro-batch, over its tensor- and context-parallel ranks.

    Under a virtual pipeline, those of one chunk: stages then wait for a chunk of each stage before them. Only matrices
    of layers count, so that the estimate is rather too low, and work is then shared more evenly.

    Args:
        hf: the Llama's HuggingFace configuration.
        tokens: longest micro-batch.
    """
    heads = (2 * hf.num_attention_heads + 2 * hf.num_key_value_heads) * hf.head_dim
    matrices = hf.hidden_size * (heads + 3 * hf.intermediate_size)
    chunks = model.pipeline_model_parallel_size * model.virtual_pipeline_model_parallel_size
    return 2.0 * tokens * matrices * hf.num_hidden_layers / chunks * _passes(model)


def _passes(model: ModelConfig) -> int:
    """Operations of a micro-batch's passes relative to those of its forward pass.

    A product's backward pass computes the gradient of its input, and that of its weight if it trains.
    """
    return 2 + (not model.language_model.freeze) + (model.recompute_granularity == "full")


def _media_of(micro_batches: Sequence[MicroBatch]) -> Iterator[tuple[str, MediaBatch]]:
    for micro_batch in micro_batches:
        yield from micro_batch.media.items()
