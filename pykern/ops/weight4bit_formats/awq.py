"""AWQ's int4 weights in the GEMM layout of AutoAWQ: Lin et al., arXiv:2306.00978."""

import torch
from torch import Tensor

from pykern.ops._weight4bit import Weight4bit
from pykern.ops.weight4bit_formats.words import check_words, even_groups, int4, matrix, pack, unpack

_INTERLEAVED = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word the outputs of it are, in their order


def read(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Weight4bit:
    for name, tensor in (("qweight", qweight), ("qzeros", qzeros), ("scales", scales)):
        matrix(name, tensor)
    features, out = qweight.shape[0], scales.shape[1]
    groups = check_words(qweight, qzeros, scales, (features, out), (features, out // 8))
    blocksize = even_groups(features, groups)
    if features % 2:
        raise ValueError(f"qweight: expected an even number of input features, got {features}")
    return int4(pack(_outputs(qweight).t()), scales, _outputs(qzeros), features, blocksize)


def _outputs(words: Tensor) -> Tensor:
    """int32 (rows, out / 8) to uint8 (rows, out)."""
    within = torch.tensor(_INTERLEAVED, device=words.device)
    return unpack(words).unflatten(-1, (-1, 8)).index_select(-1, within).flatten(-2)
