"""Rows written by the kernels are the reference's, byte for byte."""

import math

import pytest
import torch
from kernel_cases import KEYS, PRUNED, VALUES, Layer, make_awkward

from spark_kernels import LayerRows, reference, restore_keys, restore_values, write_rows


def _written(layer: Layer, **arguments) -> tuple[LayerRows, LayerRows]:
    """The layer's tokens written by the kernels and by the reference."""
    written = []
    for write in (write_rows, reference.write_rows):
        rows = layer.empty_rows()
        write(layer.q, layer.k, layer.v, layer.slots, rows, **arguments)
        written.append(rows)
    return tuple(written)


def _assert_equal(actual: LayerRows, expected: LayerRows) -> None:
    different = (actual.keys != expected.keys).any(-1).sum()
    assert not different, f"{different} of {expected.keys.shape[0] * expected.keys.shape[1]} key rows differ"
    assert torch.equal(actual.values, expected.values)


@pytest.mark.parametrize("mode", ["extend", "decode"])
@pytest.mark.parametrize("group", [1, 4, 8], ids="group {}".format)
@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 128, 256], ids="head_dim {}".format)
@pytest.mark.parametrize("keys", KEYS)
def test_equals_reference(keys, head_dim, group, mode):
    layer = Layer.random(keys, head_dim=head_dim, group=group, lengths=(0, 1, 40, 0, 33, 5))
    _assert_equal(*_written(layer, qo_indptr=layer.indptr if mode == "extend" else None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("v_scale", [1.0, 0.37], ids="v_scale {}".format)
def test_values_equal_reference(values, dtype, v_scale):
    layer = Layer.random(values=values, v_head_dim=64, lengths=(50,), dtype=dtype)
    _assert_equal(*_written(layer, v_scale=v_scale))


@pytest.mark.parametrize("values", ["int4", "int3"])
@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 128, 256], ids="head_dim {}".format)
@pytest.mark.parametrize("size", [1e-30, 1e-7, 1.0, 1e4, 1e30], ids="size {}".format)
def test_integer_values_equal_reference(values, head_dim, size):
    layer = Layer.random(values=values, v_head_dim=head_dim, lengths=(60,))
    make_awkward(layer.v)
    layer.v *= size
    _assert_equal(*_written(layer))


@pytest.mark.parametrize("keys", PRUNED)
@pytest.mark.parametrize("size", [1e-30, 1e-7, 1e-4, 1e4, 1e7, 1e30], ids="size {}".format)
def test_keys_of_any_size_equal_reference(keys, size):
    layer = Layer.random(keys, lengths=(50,))
    layer.k *= size
    layer.k[::3, :, :7] *= 100
    _assert_equal(*_written(layer))


@pytest.mark.parametrize("keys", PRUNED)
def test_ties_zeros_and_bad_numbers_equal_reference(keys):
    layer = Layer.random(keys, lengths=(60,))
    layer.k = layer.k.round()
    layer.k[:10] = 0.0
    layer.k[10:15] = -0.0
    layer.q[15:20] = 0.0
    layer.q[20:25, :, :64] = math.inf
    layer.q[25:30, :, 5] = math.nan
    layer.k[30:35, :, 3] = math.nan
    layer.k[35:40, :, 100] = -math.inf
    layer.k[40:45] = torch.finfo(torch.float32).max
    _assert_equal(*_written(layer))


@pytest.mark.parametrize("window", [1, 8, 100])
def test_windows_equal_reference(window):
    layer = Layer.random(lengths=(40, 3, 0, 70))
    _assert_equal(*_written(layer, qo_indptr=layer.indptr, window=window))


@pytest.mark.parametrize("keys", ["3 bits", "bfloat16"])
def test_strided_inputs_and_int32_slots(keys):
    layer = Layer.random(keys, values="float8_e4m3fn", lengths=(30,), dtype=torch.bfloat16)
    fused = torch.cat([x.flatten(1) for x in (layer.q, layer.k, layer.v)], dim=1)
    q, k, v = fused.split([1024, 256, 256], dim=1)
    rows = layer.empty_rows()
    write_rows(
        q.view(30, 8, 128),
        k.view(30, 2, 128),
        v.view(30, 2, 128),
        layer.slots.int(),
        rows,
        qo_indptr=layer.indptr.int(),
    )
    _assert_equal(rows, layer.rows)


def test_other_slots_are_left_alone():
    layer = Layer.random(lengths=(30,))
    before = layer.rows.keys.clone(), layer.rows.values.clone()
    write_rows(-layer.q[:10], -layer.k[:10], -layer.v[:10], layer.slots[:10], layer.rows)
    others = torch.ones(layer.rows.num_slots, dtype=torch.bool).index_fill(0, layer.slots[:10], False)
    for now, then in zip((layer.rows.keys, layer.rows.values), before, strict=True):
        assert torch.equal(now[others], then[others])
        assert not torch.equal(now[layer.slots[:10]], then[layer.slots[:10]])


def test_no_tokens():
    layer = Layer.random(lengths=(0, 0))
    write_rows(layer.q, layer.k, layer.v, layer.slots, layer.rows, qo_indptr=layer.indptr)


@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 128, 256], ids="head_dim {}".format)
@pytest.mark.parametrize("keys", KEYS)
def test_keys_restore_as_in_reference(keys, head_dim):
    layer = Layer.random(keys, head_dim=head_dim, lengths=(90,))
    slots = layer.slots[torch.randperm(90)]
    assert torch.equal(restore_keys(layer.rows, slots), reference.restore_keys(layer.rows, slots))
    assert restore_keys(layer.rows, slots[:0]).shape == (0, 2, head_dim)


@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 128, 256], ids="head_dim {}".format)
@pytest.mark.parametrize("values", VALUES)
def test_values_restore_as_in_reference(values, head_dim):
    layer = Layer.random(values=values, v_head_dim=head_dim, lengths=(90,), v_scale=0.3)
    restored = restore_values(layer.rows, layer.slots.int(), v_scale=0.3)
    assert torch.equal(restored, reference.restore_values(layer.rows, layer.slots, 0.3))
