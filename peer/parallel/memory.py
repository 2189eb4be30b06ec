"""What a layout needs in memory, row by row. Pure; checked against torch's MemTracker and against
peaks of real processes, ranks of layouts among them, in tests/peer/parallel/test_memory.py and
ops/bench/memory.

Counted is what autograd keeps of this very model (peer/model/), in elements per token: of a layer
the residual stream, normed and scaled copies of it, queries, keys, values, attention ratios
(explicit attention on CPU only), and four vectors of the MLP; of the head three vectors of the
vocabulary at the beginning of the backward pass, or two of a piece (peer/model/loss.py).
Recomputation keeps the residual stream of each
layer and one whole layer.

Letters: B sequences, T positions, D model width, H query heads, G key/value heads, K head width, F
MLP width, V vocabulary.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

from peer.model.loss import MAX_WHOLE_LOGITS, PIECE_LOGITS
from peer.parallel.layout import Layout, Schedule, has_replicated_kv, stage_layers, stages_of_rank
from peer.parallel.machine_memory import RUNTIME_BYTES, SWARM_RUNTIME_BYTES
from protos.contract.model_shape import FP32_BYTES, ModelShape

DEVICE_RUNTIME_BYTES = 900 * 2**20
"""Context and libraries on an accelerator."""
_SWARM_VECTORS = 4
"""Own contribution as it travels, parts of others, the average encoded and decoded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTable:
    """Bytes of the rank that needs most, and of the node's own memory beside the ranks."""

    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    """Inner moments and summed gradients (diloco)."""
    activations_bytes: int
    head_bytes: int
    """Logits, or pieces of them, and their gradients."""
    temporaries_bytes: int
    """Largest gradient before it is added, one layer's backward pass, gathered copies."""
    runtime_bytes: int
    host_bytes: int
    """Daemon, swarm process, shared vectors, the leader's canonical buffer."""

    @property
    def tensors_bytes(self) -> int:
        """What tensors of the rank take at its peak."""
        return (
            self.parameters_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.activations_bytes
            + self.head_bytes
            + self.temporaries_bytes
        )

    @property
    def device_bytes(self) -> int:
        """Everything on the rank's device."""
        return self.tensors_bytes + self.runtime_bytes

    def rows(self) -> list[tuple[str, int]]:
        """(what, bytes), as shown to people."""
        return [
            ("parameters", self.parameters_bytes),
            ("gradients", self.gradients_bytes),
            ("inner optimizer", self.optimizer_bytes),
            ("activations", self.activations_bytes),
            ("logits", self.head_bytes),
            ("temporaries", self.temporaries_bytes),
            ("process", self.runtime_bytes),
            ("each device in all", self.device_bytes),
            ("swarm and shared vectors", self.host_bytes),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is the same for all layouts of a run on a machine."""

    shape: ModelShape
    num_state_vectors: int = 3
    """Of the strategy (protos/contract/digest.py)."""
    has_inner_optimizer: bool = False
    """True for diloco."""
    moments_bytes: float = 2 * FP32_BYTES
    """Of the inner optimizer's moments, per value."""
    is_cpu: bool = True
    activation_bytes: int = FP32_BYTES
    """Of one element of a matrix product's result: 2 under bf16 autocast."""


def layer_elements(
    shape: ModelShape, *, tp: int, is_cpu: bool, activation_bytes: int = FP32_BYTES
) -> float:
    """fp32-sized elements that one layer keeps per token for its backward pass."""
    stream = shape.d_model / tp
    is_kv_whole = has_replicated_kv(shape, tp=tp)
    kv_heads = shape.num_heads / tp if is_kv_whole else shape.num_kv_heads / tp
    products = 2 * shape.d_model + 2 * shape.d_attention / tp + 2 * kv_heads * shape.head_dim
    if is_kv_whole:
        products += 2 * shape.num_kv_heads * shape.head_dim
    products += 4 * shape.d_ff / tp
    if is_cpu:
        products += shape.num_heads / tp * shape.seq_len
    if activation_bytes < FP32_BYTES:  # normed and scaled vectors exist in both widths
        products = products * activation_bytes / FP32_BYTES + 2 * stream
    return 4 * stream + products


def _layer_backward_elements(shape: ModelShape, *, tp: int, is_cpu: bool) -> float:
    """Elements per token that come and go within one layer's backward pass."""
    scores = 2 * shape.num_heads / tp * shape.seq_len if is_cpu else 0
    return max(scores + 2 * shape.d_attention / tp, 2 * shape.d_ff / tp + 2 * shape.d_model)


@lru_cache(maxsize=4096)
def _rank_parameters(layout: Layout, shape: ModelShape, pp_rank: int) -> int:
    """Parameters that a rank of this stage holds; of the layout only the axes matter."""
    bounds = stage_layers(shape.num_layers, layout.num_stages)
    stages = stages_of_rank(layout, pp_rank)
    layers = {index for stage in stages for index in range(*bounds[stage])}
    has_first, has_last = 0 in stages, layout.num_stages - 1 in stages
    is_kv_whole = has_replicated_kv(shape, tp=layout.tp)
    total = 0
    for name, dimensions in shape.parameter_table():
        parts = name.split(".")
        if parts[0] == "layers":
            copies = 1 if int(parts[1]) in layers else 0
        elif parts[0] == "tok_embeddings":
            needs_last = shape.has_tied_embeddings and has_last and layout.num_stages > 1
            copies = int(has_first) + int(needs_last)
        else:
            copies = 1 if has_last else 0
        size = 1
        for length in dimensions:
            size *= length
        is_whole = len(dimensions) < 2 or (is_kv_whole and parts[-2] in ("wk", "wv"))
        total += copies * (size if is_whole else ceil(dimensions[0] / layout.tp) * size
                           // dimensions[0])  # fmt: skip
    return ceil(total / layout.dp) if layout.is_sharded else total


def _micro_batches_in_flight(layout: Layout, pp_rank: int) -> int:
    """Micro-batches whose activations a rank holds at once, stages of one rank counted apart."""
    if layout.pp == 1:
        return 1
    most = layout.num_micro_batches
    match layout.schedule:
        case Schedule.GPIPE:
            return most
        case Schedule.ONE_F_ONE_B:
            return min(most, layout.pp - pp_rank)
        case _:
            return min(2 * most, 2 * layout.pp - pp_rank + 1)


def estimate(layout: Layout, setting: Setting) -> MemoryTable:
    """The table of the rank that needs most."""
    tables = [_estimate_rank(layout, setting, pp_rank) for pp_rank in range(layout.pp)]
    return max(tables, key=lambda table: table.device_bytes)


def _estimate_rank(layout: Layout, setting: Setting, pp_rank: int) -> MemoryTable:
    shape, tp = setting.shape, layout.tp
    tokens = layout.micro_batch_sequences * shape.seq_len
    axes = replace(layout, has_checkpointing=False, micro_batch_sequences=1, num_micro_batches=1)
    num_values = _rank_parameters(axes, shape, pp_rank)
    kept = layer_elements(
        shape, tp=tp, is_cpu=setting.is_cpu, activation_bytes=setting.activation_bytes
    )
    bounds = stage_layers(shape.num_layers, layout.num_stages)
    stages = stages_of_rank(layout, pp_rank)
    layers_per_stage = max(bounds[stage][1] - bounds[stage][0] for stage in stages)
    in_flight = _micro_batches_in_flight(layout, pp_rank)
    backward = _layer_backward_elements(shape, tp=tp, is_cpu=setting.is_cpu)
    if layout.has_checkpointing:
        activations = in_flight * layers_per_stage * shape.d_model / tp
        one_layer = kept + backward
    else:
        activations = in_flight * layers_per_stage * kept
        one_layer = backward
    has_last = layout.num_stages - 1 in stages
    head = _head_elements(layout, setting) / tokens if has_last else 0
    stream = 3 * shape.d_model if has_last else 0
    widest = max(shape.vocab_size, shape.d_ff, shape.d_attention)
    largest = ceil(widest / tp) * shape.d_model
    # The head's backward pass and a layer's do not overlap; whichever is larger is the peak.
    peak = max(head + stream, one_layer)
    temporaries = (peak - head) * tokens + largest
    if layout.pp > 1:
        temporaries += 2 * (layout.num_micro_batches + 1) * tokens * shape.d_model / tp
    if tp > 1:
        temporaries += 4 * tokens * shape.d_model
    if layout.is_sharded:
        per_layer = shape.num_parameters / (shape.num_layers + 1)
        temporaries += 2 * max(per_layer, 2 * largest)
        if setting.is_cpu:  # measured: gathered copies are freed, and stay with the process
            temporaries += 2 * shape.num_parameters
    if setting.activation_bytes < FP32_BYTES:
        temporaries += num_values / 2
    # Moments; on one device the sum of an inner step's gradients, which ranks add up in place.
    inner_bytes = setting.moments_bytes if setting.has_inner_optimizer else 0
    if setting.has_inner_optimizer and layout.num_ranks == 1:
        inner_bytes += FP32_BYTES
    host = _host_bytes(layout, setting)
    return MemoryTable(
        parameters_bytes=FP32_BYTES * num_values,
        gradients_bytes=FP32_BYTES * num_values,
        optimizer_bytes=ceil(inner_bytes * num_values),
        activations_bytes=round(FP32_BYTES * activations * tokens),
        head_bytes=round(FP32_BYTES * head * tokens),
        temporaries_bytes=round(FP32_BYTES * temporaries),
        runtime_bytes=_runtime_bytes(setting, head_bytes=FP32_BYTES * head * tokens)
        + (_kept_logits_bytes(layout, setting) if has_last else 0),
        host_bytes=host,
    )


def _head_elements(layout: Layout, setting: Setting) -> float:
    """fp32-sized elements of the logits of the last stage, and of what is made of them."""
    shape = setting.shape
    tokens = layout.micro_batch_sequences * shape.seq_len
    words = ceil(shape.vocab_size / layout.tp)
    is_whole = layout.tp == 1 and tokens * words <= MAX_WHOLE_LOGITS
    # While GPipe fills the pipeline, each micro-batch keeps its logits, or the head's gradient.
    is_gpipe = layout.pp > 1 and layout.schedule is Schedule.GPIPE
    num_waiting = layout.num_micro_batches - 1 if is_gpipe else 0
    if is_whole:
        size, copies, kept = tokens * words, 3, tokens * words
    else:
        size = min(max(PIECE_LOGITS, words), tokens * words)
        copies, kept = 2, words * shape.d_model
    if setting.activation_bytes < FP32_BYTES:
        copies += 1
    return copies * size + num_waiting * kept


def _runtime_bytes(setting: Setting, *, head_bytes: float) -> int:
    """Of the process itself. On a CPU with what its allocator cannot use again: forward and
    backward passes run in two threads with an arena each, and up to two blocks as large as the
    logits, freed by one, were measured to stay beside what the other asks for.
    """
    if not setting.is_cpu:
        return DEVICE_RUNTIME_BYTES
    return RUNTIME_BYTES + round(head_bytes / 2)


def _kept_logits_bytes(layout: Layout, setting: Setting) -> int:
    """Logits that are freed and stay with the process: on a CPU up to a block of each micro-batch
    of a pipeline was measured, between the activations of others. GPipe's are needed anyway.
    """
    tokens = layout.micro_batch_sequences * setting.shape.seq_len
    words = ceil(setting.shape.vocab_size / layout.tp)
    is_kept = setting.is_cpu and layout.pp > 1 and layout.schedule is not Schedule.GPIPE
    if not is_kept or tokens * words > MAX_WHOLE_LOGITS:
        return 0
    return FP32_BYTES * layout.num_micro_batches * tokens * words


def _host_bytes(layout: Layout, setting: Setting) -> int:
    """Memory of the machine that the ranks' devices do not hold."""
    vectors = setting.num_state_vectors + 1 + _SWARM_VECTORS
    if setting.has_inner_optimizer:
        vectors += 1  # anchors
    if layout.num_ranks > 1:
        vectors += 1  # canonical buffer
    host = SWARM_RUNTIME_BYTES + vectors * setting.shape.vector_bytes
    if not setting.is_cpu:
        host += layout.num_ranks * 2 * RUNTIME_BYTES
    return host
