"""NF4 and FP4 weights as bitsandbytes (0.50) and transformers store them in a state_dict.

The codes are this library's own. What is no tensor (type, block sizes, dtype, shape, the offset of quantised scales) is
JSON in a uint8 tensor. The maps are read from the file too, though bitsandbytes decodes by its own. FP4's has +0 for
code 8, which its kernels decode to -0.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pykern.ops._weight4bit import BLOCK_SIZES, NESTED_BLOCK, TABLES, Weight4bit
from pykern.ops.norm import check_like

_STATE = "quant_state.bitsandbytes__"
_STORAGE = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64)
_WIDTHS = (torch.float32, torch.float16, torch.bfloat16)  # of scales and maps; a cast model has narrow ones


def read(state_dict: Mapping[str, Tensor], key: str) -> Weight4bit:
    packed, (quant_type, state) = _entry(state_dict, key), _state(state_dict, key)
    shape, blocksize = state["shape"], state["blocksize"]
    if packed.dtype not in _STORAGE:
        raise TypeError(f"{key}: expected dtype torch.uint8 or one of quant_storage's, got {packed.dtype}")
    codes = packed.contiguous().view(-1).view(torch.uint8)
    count = math.prod(shape)
    check_like(f"{key}, as bytes of a weight of shape {shape},", codes, codes, ((count + 1) // 2,), (torch.uint8,))

    def floats(name: str, size: int) -> Tensor:
        tensor = _entry(state_dict, f"{key}.{name}")
        check_like(f"{key}.{name}", tensor, codes, (size,), _WIDTHS)
        return tensor.float()

    blocks = -(-count // blocksize)
    described = {"shape": shape, "dtype": state["dtype"], "quant_type": quant_type, "blocksize": blocksize}
    code = floats("quant_map", 16)
    table = torch.tensor(TABLES[quant_type], device=codes.device)
    code = torch.where(code == 0, code.copysign(table), code)
    if "nested_offset" not in state:
        return Weight4bit(codes, floats("absmax", blocks), code=code, **described)
    absmax = _entry(state_dict, f"{key}.absmax")
    check_like(f"{key}.absmax", absmax, codes, (blocks,), (torch.uint8,))
    return Weight4bit(
        codes,
        absmax,
        code=code,
        nested_absmax=floats("nested_absmax", -(-blocks // NESTED_BLOCK)),
        nested_code=floats("nested_quant_map", 256),
        # In fp32 whatever the default dtype: rounded to bf16 it would shift every scale.
        nested_offset=torch.tensor(state["nested_offset"], dtype=torch.float32, device=codes.device),
        **described,
    )


def write(weight: Weight4bit, key: str, quant_storage: torch.dtype) -> dict[str, Tensor]:
    if weight.quant_type not in TABLES:
        raise ValueError(f"quant_type: bitsandbytes has {' and '.join(TABLES)}, got {weight.quant_type!r}")
    if quant_storage not in _STORAGE:
        raise ValueError(f"quant_storage: expected one of {', '.join(map(str, _STORAGE))}, got {quant_storage}")
    if weight.codes.numel() % quant_storage.itemsize:
        raise ValueError(f"quant_storage: {weight.codes.numel()} bytes of codes are no whole number of {quant_storage}")
    state: dict[str, Any] = {
        "quant_type": weight.quant_type,
        "blocksize": weight.blocksize,
        "dtype": _name(weight.dtype),
        "shape": [int(size) for size in weight.shape],
    }
    entries = {
        key: weight.codes.view(quant_storage).unsqueeze(1),
        f"{key}.absmax": weight.absmax,
        f"{key}.quant_map": weight.code + 0,
    }
    if weight.nested_absmax is not None:
        state |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": _name(weight.nested_absmax.dtype),
            "nested_offset": weight.nested_offset.item(),
        }
        entries |= {f"{key}.nested_absmax": weight.nested_absmax, f"{key}.nested_quant_map": weight.nested_code}
    text = torch.frombuffer(bytearray(json.dumps(state), "utf-8"), dtype=torch.uint8)
    return entries | {f"{key}.{_STATE}{weight.quant_type}": text}


def _entry(state_dict: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state_dict:
        raise KeyError(f"{key}: missing, of a 4-bit weight that bitsandbytes saved")
    tensor = state_dict[key]  # once: a lazy mapping reads it from a file
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{key}: expected a Tensor, got {type(tensor).__name__}")
    return tensor


def _state(state_dict: Mapping[str, Tensor], key: str) -> tuple[str, dict[str, Any]]:
    """The quant type and the fields of the JSON, each of them valid."""
    found = [quant_type for quant_type in TABLES if f"{key}.{_STATE}{quant_type}" in state_dict]
    if len(found) != 1:
        names = " or ".join(f"{key}.{_STATE}{quant_type}" for quant_type in TABLES)
        if found:
            raise ValueError(f"{names}: expected one of the two, got both")
        raise KeyError(f"{names}: missing, of a 4-bit weight that bitsandbytes saved")
    name = f"{key}.{_STATE}{found[0]}"
    text = _entry(state_dict, name)
    check_like(name, text, text, (text.numel(),), (torch.uint8,))
    try:
        state = json.loads(bytes(text.tolist()))
    except ValueError as error:
        raise ValueError(f"{name}: expected JSON, got bytes that are none ({error})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{name}: expected a JSON object, got {type(state).__name__}")

    def field(field: str, valid: bool, wanted: str) -> None:
        if not valid:
            given = f"got {state[field]!r}" if field in state else "it is missing"
            raise ValueError(f"{name}: expected {field} to be {wanted}, {given}")

    shape, dtype = state.get("shape"), state.get("dtype")
    sizes = isinstance(shape, list) and len(shape) > 0 and all(type(size) is int and size >= 0 for size in shape)
    field("quant_type", state.get("quant_type") == found[0], repr(found[0]))
    field("shape", sizes, "a list of sizes")
    whole = type(state.get("blocksize")) is int
    field("blocksize", whole and state["blocksize"] in BLOCK_SIZES, f"one of {', '.join(map(str, BLOCK_SIZES))}")
    field("dtype", dtype in map(_name, (*_WIDTHS, torch.float64)), "a floating dtype")
    if f"{key}.nested_absmax" in state_dict or any(entry.startswith("nested_") for entry in state):
        field("nested_blocksize", state.get("nested_blocksize") == NESTED_BLOCK, str(NESTED_BLOCK))
        field("nested_dtype", state.get("nested_dtype") == "float32", "'float32'")
        field("nested_offset", type(state.get("nested_offset")) in (int, float), "a number")
    return found[0], state | {"shape": tuple(shape), "dtype": getattr(torch, dtype)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
