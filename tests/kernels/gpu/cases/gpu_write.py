"""Rows written and restored by the GPU kernels are the reference's; run by test_gpu_kernels.py."""

import math
from itertools import product

import pytest
import torch
from kernel_cases import KEYS, PRUNED, Layer, make_awkward

from spark_kernels import gpu, reference

LENGTHS = (0, 1, 5, 0, 4)


def _check(layer: Layer, qo_indptr=None, window: int = 32, v_scale: float = 1.0) -> None:
    written = []
    for write in (gpu.write_rows, reference.write_rows):
        rows = layer.empty_rows()
        arguments = {"qo_indptr": qo_indptr, "window": window, "v_scale": v_scale}
        write(layer.q, layer.k, layer.v, layer.slots, rows, **arguments)
        written.append(rows)
    assert torch.equal(written[0].keys, written[1].keys)
    assert torch.equal(written[0].values, written[1].values)


@pytest.mark.parametrize("mode", ["extend", "decode"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("keys", [*PRUNED, "float16", "float32"])
def test_equals_reference(keys, head_dim, mode):
    layer = Layer.random(keys, "float16", head_dim=head_dim, lengths=LENGTHS)
    _check(layer, qo_indptr=layer.indptr if mode == "extend" else None)


@pytest.mark.parametrize("group", [1, 7, 8])
def test_groups_equal_reference(group):
    layer = Layer.random("3 bits", "float16", group=group, lengths=LENGTHS)
    _check(layer, qo_indptr=layer.indptr)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("values", ["bfloat16", "float16", "float32", "float8_e4m3fn", "int4", "int3"])
@pytest.mark.parametrize("v_scale", [1.0, 0.37])
def test_values_equal_reference(values, dtype, v_scale):
    layer = Layer.random("3 bits", values, v_head_dim=64, lengths=(12,), dtype=dtype)
    layer.v[::3] *= 1000
    layer.v[1::3] *= 0.002
    _check(layer, v_scale=v_scale)


@pytest.mark.parametrize("values", ["int4", "int3"])
@pytest.mark.parametrize("v_head_dim", [64, 128, 256])
@pytest.mark.parametrize("size", [1e-7, 1.0, 1e30])
def test_integer_values_equal_reference(values, v_head_dim, size):
    layer = Layer.random("float16", values, num_kv_heads=1, group=1, v_head_dim=v_head_dim, lengths=(16,))
    make_awkward(layer.v)
    layer.v *= size
    _check(layer)


def test_every_float8_and_the_numbers_between_equal_reference():
    layer = Layer.random("float16", "float8_e4m3fn", lengths=(64,))
    numbers = torch.arange(0x7E, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2, -numbers])
    layer.v.view(-1)[: len(between)] = between
    _check(layer)


@pytest.mark.parametrize("keys", ["3 bits", "0 bits", "all widths"])
@pytest.mark.parametrize("size", [1e-30, 1e-7, 1e4, 1e30])
def test_keys_of_any_size_equal_reference(keys, size):
    layer = Layer.random(keys, "float16", group=2, lengths=(8,))
    layer.k *= size
    layer.k[::3, :, :7] *= 100
    _check(layer)


@pytest.mark.parametrize("keys", ["3 bits", "0 bits", "all widths"])
def test_ties_zeros_and_bad_numbers_equal_reference(keys):
    layer = Layer.random(keys, "float16", lengths=(18,))
    layer.k = layer.k.round()
    layer.k[:2] = 0.0
    layer.k[2:4] = -0.0
    layer.q[4:6] = 0.0
    layer.q[6:8, :, :64] = math.inf
    layer.q[8:10, :, 5] = math.nan
    layer.k[10:12, :, 3] = math.nan
    layer.k[12:14, :, 100] = -math.inf
    layer.k[14:16] = torch.finfo(torch.float32).max
    _check(layer)


@pytest.mark.parametrize("window", [1, 8, 100])
def test_windows_equal_reference(window):
    layer = Layer.random("3 bits", "float16", lengths=(12, 3, 0, 9))
    _check(layer, qo_indptr=layer.indptr.int(), window=window)


def test_strided_inputs_and_int32_slots():
    layer = Layer.random("3 bits", "bfloat16", lengths=(10,), dtype=torch.bfloat16)
    fused = torch.cat([x.flatten(1) for x in (layer.q, layer.k, layer.v)], dim=1)
    layer.q, layer.k, layer.v = (x.view(10, -1, 128) for x in fused.split([1024, 256, 256], dim=1))
    layer.slots = layer.slots.int()
    _check(layer)


def test_no_tokens():
    layer = Layer.random(lengths=(0, 0))
    _check(layer, qo_indptr=layer.indptr)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("keys", KEYS)
def test_keys_restore_as_in_reference(keys, head_dim):
    layer = Layer.random(keys, head_dim=head_dim, lengths=(45,))
    slots = layer.slots[torch.randperm(45)]
    assert torch.equal(gpu.restore_keys(layer.rows, slots), reference.restore_keys(layer.rows, slots))
    assert gpu.restore_keys(layer.rows, slots[:0]).shape == (0, 2, head_dim)
    half = gpu.restore_keys(layer.rows, slots.int(), torch.float16)
    assert torch.equal(half, reference.restore_keys(layer.rows, slots).half())


@pytest.mark.parametrize(
    ("values", "v_head_dim"),
    [
        *((x, 64) for x in ("bfloat16", "float16", "float32", "float8_e4m3fn")),
        *product(("int4", "int3"), (64, 128, 256)),
    ],
)
def test_values_restore_as_in_reference(values, v_head_dim):
    layer = Layer.random(values=values, v_head_dim=v_head_dim, lengths=(45,), v_scale=0.3)
    restored = gpu.restore_values(layer.rows, layer.slots.int(), 0.3)
    assert torch.equal(restored, reference.restore_values(layer.rows, layer.slots, 0.3))
