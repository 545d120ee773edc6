"""Fields of the tables that describe a model to the compiled decoder.

Everything the decoder needs is in five tables of numbers (shapes, strides, addresses), so that
one compiled function serves every model.
"""

from __future__ import annotations

from edgeq.footprint import CHUNK as CHUNK
from edgeq.footprint import PART_HEAD as PART_HEAD
from edgeq.footprint import SYNC_BYTES as SYNC_BYTES
from edgeq.runtime.kernels.tile import NO_SHIFT
from edgeq.schemes import BITS, K_BLOCK, QuantScheme

# Fields of the plan: an int64 vector that says shapes and buffer addresses.
(
    P_LAYERS,
    P_HIDDEN,
    P_FFN,
    P_HEADS,
    P_KV_HEADS,
    P_DIM,
    P_ROPE_HALF,
    P_ACT_KIND,
    P_QK_NORM,
    P_POST_NORMS,
    P_HIDDEN_STRIDE,
    P_FFN_STRIDE,
    P_Q_STRIDE,
    P_KV_STRIDE,
    P_ACTS_STRIDE,
    P_X,
    P_X_OWN,
    P_NORMED,
    P_BRANCH,
    P_Q,
    P_K,
    P_V,
    P_ATT,
    P_GATE,
    P_UP,
    P_ACTS,
    P_PART,
    P_PART_STRIDE,
    P_MAX_CHUNKS,
    P_SCRATCH,
    P_SCRATCH_STRIDE,
    P_ONES,
    P_FINAL_NORM,
    P_SYNC,
    P_QUERY_BLOCK,
    P_ATTN_SCALE,
    P_TIMES,
    P_FIELDS,
) = range(38)
# Fields of a layer's record.
(
    Y_NORM_IN,
    Y_NORM_POST_ATT,
    Y_NORM_PRE_FFN,
    Y_NORM_POST_FFN,
    Y_NORM_Q,
    Y_NORM_K,
    Y_COS,
    Y_SIN,
    Y_WINDOW,
    Y_FIELDS,
) = range(10)
# A layer's linears, in the order of the table of records; the embedding and head come last.
Q_PROJ, K_PROJ, V_PROJ, O_PROJ, GATE_PROJ, UP_PROJ, DOWN_PROJ, PER_LAYER = range(8)
# Fields of the float32 vector.
F_EPS, F_ATTN_SCALE, F_EMBED_SCALE, F_FIELDS = range(4)
# Fields of a linear's record: one row of an int64 table.
L_KIND, L_N, L_K, L_TILES, L_BLOCKS, L_SHIFT, L_CODES, L_CODE_STEP = range(8)
L_SCALES, L_SCALE_STEP, L_ZEROS, L_ZERO_STEP, L_BIAS, L_KERNEL, L_FIELDS = range(8, 15)
# Fields of a layer's cache record.
C_BITS, C_K, C_K_SCALES, C_V, C_V_SCALES, C_LENGTH, C_DIM, C_DIM_K, C_DIM_V = range(9)
C_K_KERNEL, C_V_KERNEL, C_K_ZEROS, C_CENTERS, C_FIELDS = range(9, 14)

# A layer's steps, in order, as the times at `P_TIMES` tell them apart; then those of no layer.
S_NORM_IN, S_QKV, S_ATTENTION, S_O_PROJ, S_NORM_FFN, S_GATE_UP, S_DOWN_PROJ, S_PER_LAYER = range(8)
S_EMBED, S_FINAL_NORM, S_HEAD, S_ARGMAX, S_OTHERS = range(5)
T_LAST, T_CLOCK, T_STEPS = 0, 1, 3
"""Places of the times: when the last step ended, room for the clock, and where the sums begin."""

SYNC_ARRIVED, SYNC_GENERATION, SYNC_WORK = 0, 128, 256
"""Byte offsets in the synchronization area of `SYNC_BYTES`, a cache line pair apart."""
J_FUNCTION, J_ARGS, J_LEFT, J_FAILED, J_DESKS, J_DESK = 0, 8, 16, 24, 128, 256
"""Byte offsets in a team's job: the compiled function, its arguments, members still at work and
whether any failed; then a desk for each thread, so many bytes each."""
D_POSTED, D_AWAKE, D_CLOCK, D_ROOM, D_MUTEX, D_CONDITION = 0, 8, 16, 32, 64, 128
"""Byte offsets on a desk: jobs posted, whether its owner looks at it, room for the clock and for
what a compiled function returns, and what a sleeping owner waits at."""
FIRST_QUANT = 16
"""Kinds below are float types."""
PALETTE = 64
"""Added to the kind of a scheme whose codes are places in a table."""


def quant_kind(scheme: QuantScheme) -> int:
    """The kind code of a quantized linear."""
    half = scheme.group_size == 16
    kind = FIRST_QUANT + 4 * BITS.index(scheme.bits) + 2 * (not scheme.symmetric) + half
    return kind + PALETTE if scheme.codebook else kind


def group_shift(scheme: QuantScheme) -> int:
    """Blocks per group as a power of two; `NO_SHIFT` where a row has one scale."""
    if not scheme.group_size:
        return NO_SHIFT
    return max(0, (scheme.group_size // K_BLOCK).bit_length() - 1)
