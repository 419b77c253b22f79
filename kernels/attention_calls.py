"""What the kernels of packed attention and its declaration are called with. Imports no Triton."""

from typing import NamedTuple

from torch import Tensor


class VarlenCall(NamedTuple):
    """The arguments of the packed op, in its order; query (total, H, E)."""

    query: Tensor
    key: Tensor
    value: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    seqused_k: Tensor | None
    block_table: Tensor | None
    rng: Tensor | None
    dropout_p: float
    scale: float
    window_left: int | None
    window_right: int | None
    softcap: float | None
