"""Tiles of attention's operands, forward and backward: their sizes on each device, how they are loaded and stored.

A tile is some rows of one head of a tensor (B, length, heads, size). Either lanes read it by address, or the tensor
memory accelerator by a descriptor; a kernel takes both, and with a descriptor its strides are None.

Head sizes are compiled in; lengths, strides and the band are not, or each new length would compile anew. Strides arrive
in units of UNIT elements, because a multiplication by a constant is what tells the compiler that 16 bytes can move at
once. Tensors whose rows do not begin at multiples of 16 bytes are copied first.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# What the kernels are not compiled anew for.
SIZES = [
    *("heads", "group", "queries", "keys", "offset", "left", "right", "threshold", "slope_batch", "slope_head"),
    *(f"{tensor}_{axis}" for tensor in "qkvo" for axis in ("batch", "row", "head")),
    *("query_rows", "key_rows", "pages", "columns"),
]


@dataclass(frozen=True)
class Config:
    """How many queries and keys a tile has, and how deep the tiles of a loop are prefetched."""

    queries: int
    keys: int
    warps: int
    stages: int
    descriptors: bool = False  # whether the tensor memory accelerator loads the tiles
    apart: bool = False  # whether dK and dV have a launch each, because they do not fit into registers together


@triton.jit
def of_head(tensor, batch, head, batch_stride, head_stride, UNIT: tl.constexpr):
    """The pointer to what a tensor has of one head; a descriptor, with strides of None, stays as it is."""
    start = tensor
    if tensor is not None and batch_stride is not None:
        start = tensor + (batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride) * UNIT
    return start


@triton.jit
def in_elements(stride, UNIT: tl.constexpr):
    """A stride counted in elements, where rows may be more than 2³¹ of them apart; None stays None."""
    elements = None
    if stride is not None:
        elements = tl.cast(stride, tl.int64) * UNIT
    return elements


@triton.jit
def load_tile(
    source,
    batch,
    head,
    first,
    rows,
    row_stride,
    part,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    origin=None,
):
    """(ROWS, COLUMNS) of a head from row `first` and column `part` on, zeros beyond `rows` and SIZE.

    source: a pointer to row 0 of the head, or where row_stride is None a descriptor of (B, H, length, size).
    rows: None if all of the tile's exist.
    row_stride: int64, as `in_elements` gives it.
    origin: None, or the tensor's row that counts as row 0. A descriptor then reads on beyond `rows`: see `own_rows`.
    """
    start = first if origin is None else origin + first
    if row_stride is None:
        tile = source.load([batch if origin is None else 0, head, start, part]).reshape(ROWS, COLUMNS)
    else:
        row = tl.arange(0, ROWS)[:, None]
        column = part + tl.arange(0, COLUMNS)[None, :]
        inside = True
        if rows is not None:
            inside &= first + row < rows
        if SIZE < COLUMNS or SIZE % COLUMNS != 0:
            inside &= column < SIZE
        tile = tl.load(source + (start + row).to(tl.int64) * row_stride + column, mask=inside, other=0.0)
    return tile


@triton.jit
def own_rows(tile, first, rows, row_stride, origin):
    """A tile of `load_tile` with those arguments, zeros in the place of what follows a packed sequence.

    It may be NaN, which no weight of zero hides. Only needed where rows are summed up.
    """
    if row_stride is None and rows is not None and origin is not None:
        tile = tl.where(first + tl.arange(0, tile.shape[0])[:, None] < rows, tile, 0.0)
    return tile


@triton.jit
def own_columns(products, column, rows, row_stride, origin):
    """The same for products with the rows of such a tile, which are in these columns."""
    if row_stride is None and rows is not None and origin is not None:
        products = tl.where(column < rows, products, 0.0)
    return products


@triton.jit
def store_rows(
    tensor,
    values,
    batch,
    head,
    first,
    length,
    heads,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    origin=None,
):
    """(ROWS, COLUMNS) into one head of a contiguous (B, length, heads, SIZE), from row `first` on.

    origin: None, or the row that counts as row 0 of `length` in a packed (rows, heads, SIZE).
    """
    row = first + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    start = batch.to(tl.int64) * length if origin is None else tl.cast(origin, tl.int64)
    tensor += ((start + row) * heads + head) * SIZE + column
    tl.store(tensor, values.to(tensor.dtype.element_ty), mask=(row < length) & (column < SIZE))


def fold(x: Tensor) -> Tensor:
    """(…, L, H, E) as (B, L, H, E) with elements side by side: in place where strides allow, else a copy."""
    if x.dim() != 4:
        x = x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
    # clone and not contiguous(), which leaves a wrong stride where the size is one.
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def aligned(x: Tensor) -> Tensor:
    """A folded tensor whose rows begin at multiples of 16 bytes and have whole ones; zeros fill up a copy.

    Accesses of fewer bytes take more addresses than there are registers; a copy is the cheaper.
    """
    unit = 16 // x.element_size()
    steps = [step for n, step in zip(x.shape[:3], x.stride()[:3], strict=True) if n > 1]
    if x.data_ptr() % 16 == 0 and all(n % unit == 0 for n in (x.shape[-1], *steps)):
        return x
    copy = x.new_zeros(*x.shape[:-1], triton.cdiv(x.shape[-1], unit) * unit)
    copy[..., : x.shape[-1]] = x
    return copy


def strides_in_units(*tensors: Tensor | None) -> tuple[int, list[int]]:
    """The most elements, up to 16 bytes, that divide all strides of folded tensors; and the strides counted in them.

    Three strides a tensor: batch, length, head; 0 where there is one index alone, or no tensor.
    """
    strides = []
    for x in tensors:
        sizes, steps = ((1, 1, 1), (0, 0, 0)) if x is None else (x.shape, x.stride())
        strides += [step if n > 1 else 0 for n, step in zip(sizes[:3], steps[:3], strict=True)]
    unit = math.gcd(16 // tensors[0].element_size(), *strides)
    return unit, [stride // unit for stride in strides]


def block_size(elements: int) -> int:
    """Along the head size a tile is a power of two, of at least the 16 that a tensor core takes."""
    return max(triton.next_power_of_2(elements), 16)


def dot_precision(dtype: torch.dtype) -> str:
    """For `tl.dot`, whose own default would be tf32."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _describe(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A folded (B, length, H, size) as (B, H, length, size): tiles are rows of one head, with zeros beyond its end."""
    batch, length, heads, size = x.shape
    anything = 16 // x.element_size()  # is right for the stride of a dimension with one index
    steps = [step if n > 1 else anything for n, step in zip(x.shape[:3], x.stride()[:3], strict=True)]
    return TensorDescriptor(x, [batch, heads, length, size], [steps[0], steps[2], steps[1], 1], [1, 1, rows, columns])


def _describable(x: Tensor) -> bool:
    """Whether the accelerator reads this aligned tensor: nothing empty or expanded."""
    return x.numel() > 0 and all(step > 0 or n == 1 for n, step in zip(x.shape, x.stride(), strict=True))


class Operands:
    """The tensors whose tiles the kernels multiply, folded and aligned: (B, length, heads, size).

    A backward names a fourth, dout, which may be None.
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, **more: Tensor | None) -> None:
        given = {"query": query, "key": key, "value": value, **more}
        self.tensors = {name: x if x is None else aligned(fold(x)) for name, x in given.items()}
        self.dtype, self.device, self.whole_size = query.dtype, query.device, query.shape[-1]
        self.size, self.value_size = (self.tensors[name].shape[-1] for name in ("key", "value"))
        self.columns, self.value_columns = block_size(self.size), block_size(self.value_size)
        self.packed = False  # whether sequences begin at any row, which takes a few registers
        self.paged = False  # whether keys are found row by row
        self.describable = all(x is None or _describable(x) for x in self.tensors.values())

    def arguments(self, config: Config) -> dict[str, Any]:
        """For a kernel with that configuration: the tensors, as descriptors where there can be, strides and blocks."""
        tensors = self.tensors
        unit, strides = strides_in_units(*tensors.values())
        if config.descriptors and self.describable:
            rows = {"query": config.queries, "key": config.keys, "value": config.keys, "dout": config.queries}
            columns = {"query": self.columns, "key": self.columns}
            tensors = {
                name: x if x is None else _describe(x, rows[name], columns.get(name, self.value_columns))
                for name, x in tensors.items()
            }
            strides = [None] * len(strides)
        names = [f"{tensor}_{axis}" for tensor in "qkvo"[: len(tensors)] for axis in ("batch", "row", "head")]
        return {
            **tensors,
            **dict(zip(names, strides, strict=True)),
            "UNIT": unit,
            "E": self.size,
            "EV": self.value_size,
            "BLOCK_M": config.queries,
            "BLOCK_N": config.keys,
            "BLOCK_E": self.columns,
            "BLOCK_EV": self.value_columns,
            "PRECISION": dot_precision(self.dtype),
            "num_warps": config.warps,
            "num_stages": config.stages,
        }


def choose(
    tables: dict[str, dict[int, Config]], interpreted: Config, operands: Operands, features: bool, dropout: bool = False
) -> Config:
    """The configuration for these operands: the largest tiles that leave no register to spill.

    Args:
        tables: configurations up to a size of heads, by what they are for: "fp32", or else "plain" or "features", each
            also with descriptors, or "small" shared memory. Without "small" the "features" serve, and then "plain".
            "pages" are for those where no accelerator relieves the registers. For packed sequences a table "packed, …"
            comes before the others.
        interpreted: for the interpreter: small, so that short tests cross several blocks.
        features: whether a score is more than a product, and its tile takes more registers.
        dropout: whether that is among them and the largest heads leave it no tiles as wide as a warp group's.
    """
    device = operands.device
    wide = operands.dtype == torch.float32
    if device.type == "cpu":
        return interpreted if wide else replace(interpreted, descriptors=True)
    size = max(operands.size, operands.value_size)
    accelerated = _has_accelerator(device)
    if wide:
        names = ["fp32"]
    elif accelerated and operands.describable and not (dropout and size > 128):
        names = ["features, descriptors" if features else "plain, descriptors"]
    else:
        # Without descriptors an accelerated device's products take more registers than those of older ones.
        small = not _roomy(device) or (accelerated and features)
        names = [*["small"] * small, *["features"] * (small or features), "plain"]
        names = ["pages", *names] if operands.paged and not accelerated else names
    if operands.packed:
        names = [*(f"packed, {name}" for name in names), *names]
    table = next(tables[name] for name in names if name in tables)
    return next(config for limit, config in table.items() if size <= limit)


@lru_cache
def _has_accelerator(device: torch.device) -> bool:
    properties = torch.cuda.get_device_properties(device)
    return properties.major >= 9 and _roomy(device)


@lru_cache
def _roomy(device: torch.device) -> bool:
    """sm_86, sm_89 and sm_120 have 99 KiB of shared memory a block."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 160 * 1024
