"""Time of collectives and of pipeline messages: bytes over the slowest link of a group, plus the latency of its start.

Ranks of a group are numbered as megatron-core does: tensor-parallel ranks are neighbours, then context-parallel ranks,
then replicas; pipeline stages are furthest apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_anymal.planning.layouts.hardware import Hardware


@dataclass(frozen=True)
class Link:
    """The connection between the ranks of a process group."""

    # Number of ranks.
    ranks: int
    # Bytes per second that a rank sends while all send.
    rate: float
    # Seconds until the first byte arrives.
    latency: float

    def gather(self, size: float) -> float:
        """Seconds of an all-gather, or of a reduce-scatter.

        Args:
            size: bytes of the whole tensor.
        """
        if self.ranks == 1:
            return 0.0
        return size * (self.ranks - 1) / self.ranks / self.rate + self.latency * math.log2(self.ranks)

    def reduce(self, size: float) -> float:
        """Seconds of an all-reduce: a reduce-scatter and an all-gather.

        Args:
            size: bytes of the tensor.
        """
        return 2 * self.gather(size)

    def send(self, size: float) -> float:
        """Seconds of a message between two ranks.

        Args:
            size: its bytes.
        """
        return size / self.rate + self.latency


def link_of_group(gpu: Hardware, node: int, ranks: int, stride: int) -> Link:
    """Return the link of a group whose ranks are `stride` apart.

    If a group spans nodes, each of its ranks on a node has its own network adapter, and all share the traffic that
    leaves the node.

    Args:
        node: GPUs of a node.
    """
    together = max(1, min(ranks, node // stride))
    within = 1e9 * gpu.node_gb_per_s * gpu.link_share
    if ranks <= together:
        return Link(ranks, within, 1e-6 * gpu.node_latency_us)
    network = 1e9 * gpu.network_gb_per_s * gpu.link_share
    return Link(ranks, min(within, together * network), 1e-6 * gpu.network_latency_us)


@dataclass(frozen=True)
class Links:
    """The links of a layout's groups."""

    # Of the tensor-parallel ranks.
    tensor: Link
    # Of the context-parallel ranks.
    context: Link
    # Of the ranks that share gradients and optimizer state: replicas and context-parallel ranks.
    data: Link
    # Of two neighbouring pipeline stages.
    pipeline: Link


def links_of_layout(gpu: Hardware, node: int, tensor: int, context: int, data: int) -> Links:
    """Return the links of a layout.

    Args:
        node: GPUs of a node.
        data: number of replicas.
    """
    return Links(
        tensor=link_of_group(gpu, node, tensor, 1),
        context=link_of_group(gpu, node, context, tensor),
        data=link_of_group(gpu, node, context * data, tensor),
        pipeline=link_of_group(gpu, node, 2, tensor * context * data),
    )
