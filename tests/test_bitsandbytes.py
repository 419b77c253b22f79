"""4-bit weights against bitsandbytes itself, on a CPU, and a checkpoint that transformers wrote with it.

Decoding follows its portable path. Its AVX512 path differs where a row is no multiple of the block size but one of 16
(wrong scales) and at FP4 code 8 (+0 for -0).
"""

import logging
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pykern
from pykern.nn import Linear4bit
from pykern.ops import Weight4bit, dequantize_4bit, quantize_4bit
from pykern.ops._weight4bit import BLOCK_SIZES

logging.disable(logging.WARNING)  # it warns of a package for its own kernels
from bitsandbytes import functional as bnb  # noqa: E402
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute  # noqa: E402
from bitsandbytes.nn import Params4bit  # noqa: E402

logging.disable(logging.NOTSET)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1,), (3,), (64,), (7, 48), (33, 64), (5, 130), (3, 17), (130, 258), (4, 64, 48)]
KEY = "up_proj.weight"


def values(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> Tensor:
    """Normal; or on a grid, so that many lie halfway between codes; or over 50 powers of two; or zeros."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    drawn = torch.randn(shape, generator=generator)
    spread = torch.exp(torch.randn(shape, generator=generator) * 6).clamp(max=1e4)
    chosen = {"normal": drawn, "grid": (drawn * 8).round() / 16, "wide": drawn * spread, "zeros": drawn * 0}[kind]
    return chosen.to(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def portable(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    code = state.code.clone()
    if state.quant_type == "fp4":
        code[8] = -0.0  # as in the tables of its kernels; that of its Python code has +0
    plain = _dequantize_4bit_compute.__wrapped__  # not compiled
    return plain(packed.view(-1).view(torch.uint8), absmax, code, state.blocksize, state.shape, dtype)


def entries_of(packed: Tensor, state: Any) -> dict[str, Tensor]:
    """As its Linear4bit saves them."""
    return {KEY: packed} | {f"{KEY}.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}


def state_of(entries: dict[str, Tensor]) -> Any:
    named = {name.removeprefix(f"{KEY}."): tensor for name, tensor in entries.items() if name != KEY}
    return bnb.QuantState.from_dict(named, device=torch.device("cpu"))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_scales_and_decoded_values_are_the_same_bits(
    shape: tuple[int, ...], quant_type: str, double_quant: bool
) -> None:
    for blocksize in BLOCK_SIZES:
        for kind, dtype in (("normal", FLOATS[0]), ("grid", FLOATS[1]), ("wide", FLOATS[2]), ("zeros", FLOATS[1])):
            weight = values(shape, kind, dtype)
            packed, state = bnb.quantize_4bit(weight, None, None, blocksize, double_quant, quant_type)
            theirs = entries_of(packed, state)
            quantized = quantize_4bit(weight, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant)
            ours = quantized.to_bitsandbytes(KEY)
            assert ours.keys() == theirs.keys()
            for name, tensor in theirs.items():
                assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape, name
                assert torch.equal(bits(ours[name]), bits(tensor)), (name, blocksize, kind)
            read = Weight4bit.from_bitsandbytes(theirs, KEY)
            for out in FLOATS:
                expected = portable(packed, state, out)
                assert torch.equal(bits(dequantize_4bit(read, out)), bits(expected)), (blocksize, kind, out)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_its_public_decoder_agrees_where_it_is_right(quant_type: str, double_quant: bool) -> None:
    for shape in SHAPES:
        for blocksize in BLOCK_SIZES:
            if len(shape) > 1 and shape[-1] % 16 == 0 and shape[-1] % blocksize:
                continue
            if blocksize >= 2048 or shape[-1] % 2:  # the portable path again, which it compiles first
                continue
            for dtype in FLOATS:
                weight = values(shape, "normal", dtype)
                packed, state = bnb.quantize_4bit(weight, None, None, blocksize, double_quant, quant_type)
                decoded = dequantize_4bit(Weight4bit.from_bitsandbytes(entries_of(packed, state), KEY))
                # + 0 makes -0 to +0, which differ by code 8 alone.
                assert torch.equal(bits(decoded + 0), bits(bnb.dequantize_4bit(packed, state) + 0))
                transposed = bnb.dequantize_4bit(packed.t(), state)
                legacy = Weight4bit.from_bitsandbytes(entries_of(packed.t(), state), KEY)
                assert torch.equal(dequantize_4bit(legacy), decoded)
                # Its own reader hands a weight of that layout back transposed.
                assert len(shape) != 2 or torch.equal(transposed.t() + 0, decoded + 0)


@pytest.mark.parametrize("storage", [torch.uint8, *FLOATS])
@pytest.mark.parametrize("double_quant", [False, True])
def test_it_loads_what_we_write_from_a_file(double_quant: bool, storage: torch.dtype, tmp_path: Path) -> None:
    weight = values((48, 64), "normal", torch.bfloat16)
    packed, state = bnb.quantize_4bit(weight, None, None, 64, double_quant, "nf4", storage)
    assert packed.dtype == storage
    read = Weight4bit.from_bitsandbytes(entries_of(packed, state), KEY)
    save_file(read.to_bitsandbytes(KEY, quant_storage=storage), tmp_path / "weight.safetensors")
    entries = load_file(tmp_path / "weight.safetensors")
    stats = {name.removeprefix(f"{KEY}."): tensor for name, tensor in entries.items() if name != KEY}
    loaded = Params4bit.from_prequantized(entries[KEY], stats, device="cpu")
    assert loaded.dtype == storage and torch.equal(bits(loaded.data), bits(packed))
    assert torch.equal(bnb.dequantize_4bit(loaded.data, loaded.quant_state), bnb.dequantize_4bit(packed, state))
    assert state_of(entries).as_dict().keys() == state.as_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_of_transformers_gives_the_same_logits(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    import accelerate
    import transformers

    transformers.logging.disable_progress_bar()
    config = transformers.MistralConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    floats, packed = tmp_path / "floats", tmp_path / "nf4"
    original = transformers.MistralForCausalLM(config).to(dtype)
    original.save_pretrained(floats)
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    quantization = transformers.BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=dtype)
    load = transformers.AutoModelForCausalLM.from_pretrained
    load(floats, dtype=dtype, quantization_config=quantization, device_map="cpu").save_pretrained(packed)

    theirs = load(packed, dtype=dtype, device_map="cpu")
    with accelerate.init_empty_weights():
        ours = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    assert pykern.load_quantized(ours, packed) is ours
    layers = [module for module in ours.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14 and all(layer.nested_absmax is not None for layer in layers)
    assert type(ours.lm_head) is torch.nn.Linear and ours.lm_head.weight.dtype == dtype

    ids = torch.randint(0, 96, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # In training mode it decodes and multiplies; in eval mode it repacks the weight and multiplies in bf16.
        logits, expected, rough = ours.eval()(ids).logits, theirs.train()(ids).logits, theirs.eval()(ids).logits
        unquantized = original.eval()(ids).logits
    assert logits.dtype == expected.dtype == dtype

    def distance(one: Tensor, other: Tensor) -> float:
        return float((one - other).double().norm() / other.double().norm())

    assert distance(logits, expected) <= 4 * torch.finfo(dtype).eps
    assert distance(logits, rough) <= 4 * torch.finfo(torch.bfloat16).eps
    assert distance(logits, unquantized) > 0.02, "the weights are those of the checkpoint, not the original ones"
