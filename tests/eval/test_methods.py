import pytest
import torch

from eval.methods import RIVALS, recipes
from eval.methods.authors import Authors
from eval.methods.base import Chunk
from eval.methods.fp8 import Fp8
from eval.methods.integers import Integers
from eval.methods.snapkv import SnapKV
from eval.methods.think import ThinK
from sglang_spark.calibration import Calibration, Model

TOKENS, GROUP = 64, 2


@pytest.fixture(params=[64, 128], ids="head_dim {}".format)
def chunk(request):
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(TOKENS, 2, request.param, generator=generator).bfloat16().float() for _ in range(2))
    return Chunk(torch.randn(TOKENS, 2 * GROUP, request.param, generator=generator), k, v)


def calibration_of(chunk):
    queries = chunk.q.unflatten(1, (2, GROUP)).square().mean((0, 2)).sqrt()
    statistics = (chunk.k.mean(0), chunk.k.std(0), queries)
    model = Model("llama", 64, 1, 4, 2, chunk.k.shape[-1], 97)
    return Calibration.of(model, *(statistic[None] for statistic in statistics))


def error(stored, exact):
    return ((stored - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("method", RIVALS, ids=lambda method: method.name)
def test_rivals_keep_shapes_and_store_less_than_dense(chunk, method):
    head_dim = chunk.k.shape[-1]
    assert method.keys(chunk).shape == method.values(chunk).shape == chunk.k.shape
    assert method.key_bytes(head_dim) + method.value_bytes(head_dim) < 4 * head_dim


def test_bytes_of_the_recipes(chunk):
    head_dim = chunk.k.shape[-1]
    sizes = {
        method.recipe: (method.key_bytes(head_dim), method.value_bytes(head_dim))
        for method in recipes(head_dim, calibration_of(chunk))
    }
    expected = {64: {"default": (48, 40), "small": (32, 32)}}
    expected[128] = {"accurate": (80, 72), "default": (64, 72), "small": (48, 56)}
    assert {recipe: sizes[recipe] for recipe in expected[head_dim]} == expected[head_dim]


def test_wider_rows_are_closer(chunk):
    methods = {method.recipe: method for method in recipes(chunk.k.shape[-1], calibration_of(chunk))}
    of_keys = [error(methods[f"keys of {bits} bits"].keys(chunk), chunk.k) for bits in (4, 3, 2)]
    of_values = [error(methods[f"int{bits} values"].values(chunk), chunk.v) for bits in (4, 3)]
    assert 0 < of_keys[0] < of_keys[1] < of_keys[2] < 0.5
    assert 0 < of_values[0] < of_values[1] < 0.25
    assert torch.equal(methods["int4 values"].keys(chunk), chunk.k)
    assert torch.equal(methods["keys of 4 bits"].values(chunk), chunk.v)


@pytest.mark.parametrize("rotated", [False, True])
def test_integers_err_by_half_a_step_at_most(chunk, rotated):
    method = Integers(8, 256, rotated)
    step = (chunk.k.amax(-1) - chunk.k.amin(-1)).max() / 255
    assert (method.keys(chunk) - chunk.k).square().mean().sqrt() < step
    assert error(Integers(4, 32).keys(chunk), chunk.k) < error(Integers(4, 128).keys(chunk), chunk.k) + 1e-6


def test_a_rotation_spreads_one_large_channel(chunk):
    large = Chunk(chunk.q, chunk.k.index_fill(2, torch.tensor([3]), 100.0), chunk.v)
    others = torch.arange(chunk.k.shape[-1]) != 3
    stored = Integers(4, 256).keys(large)[..., others]
    assert error(stored, large.k[..., others]) > 0.9


def test_fp8_saturates(chunk):
    assert Fp8().keys(Chunk(chunk.q, chunk.k * 1e4, chunk.v)).abs().max() == 448


def test_authors_keep_the_best_channels_and_all_signs(chunk):
    stored = Authors(0.8).keys(chunk)
    head_dim = chunk.k.shape[-1]
    assert ((stored == chunk.k).sum(-1) >= head_dim - int(0.8 * head_dim)).all()
    assert torch.equal(stored.sign(), chunk.k.sign())


def test_think_drops_the_same_channels_of_all_but_the_last_tokens(chunk):
    stored = ThinK(0.5).keys(chunk)
    assert torch.equal(stored[-32:], chunk.k[-32:])
    dropped = (stored[:-32] == 0).all(0)
    assert (dropped.sum(-1) == chunk.k.shape[-1] // 2).all()


def test_snapkv_keeps_the_window_and_what_it_attends_to(chunk):
    chunk = Chunk(chunk.q, chunk.k * 0.1, chunk.v)
    # One token that all queries of the first KV head look for.
    chunk.k[10, 0] = 50 * chunk.q[-32:, :GROUP].mean((0, 1))
    kept = SnapKV(0.75).kept_tokens(chunk, chunk.k.transpose(0, 1))
    assert kept.shape == (2, 48)
    assert kept[:, -32:].tolist() == [list(range(32, 64))] * 2
    assert 10 in kept[0]
    assert (kept.diff(dim=-1) > 0).all()
