"""Every baseline on small tensors: shapes, bytes, and what each must or must not change."""

from dataclasses import replace

import pytest
import torch

from accuracy.outcomes import Label
from baselines import (
    METHODS,
    AuthorsRestoration,
    ChannelStatistics,
    Fp8,
    Integers,
    Mustafar,
    SnapKV,
    Spark,
    StreamingLLM,
    ThinK,
    ValuePruning,
    ZeroFill,
    decision_variants,
)
from baselines.base import Chunk, Method
from baselines.stress import KEY_MODELS, errors
from spark_kernels import reference
from spark_kernels.formats import KeyFormat, LayerRows, ValueFormat

HEAD_DIM = 128
NUM_KV_HEADS = 2


def make_chunk(num_tokens=50, seed=0, decoded=False, position=0):
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(num_tokens, NUM_KV_HEADS, HEAD_DIM, generator=generator).bfloat16().float() for _ in range(2))
    q = torch.randn(num_tokens, 2 * NUM_KV_HEADS, HEAD_DIM, generator=generator)
    return Chunk(q, k, v, decoded=decoded, position=position)


def variants():
    return decision_variants(ChannelStatistics.of([make_chunk(seed=seed).k for seed in range(4)]))


ALL = [*METHODS, *variants()]


@pytest.mark.parametrize("method", ALL, ids=lambda method: str(method.label))
def test_every_method_stores_less_and_reads_finite_numbers(method):
    for chunk in (make_chunk(), make_chunk(3, decoded=True)):
        keys, values = method.keys(chunk), method.values(chunk)
        assert keys.shape == chunk.k.shape and values.shape == chunk.v.shape
        assert keys.isfinite().all() and values.isfinite().all()
    assert 0 < method.bytes_per_token_head(HEAD_DIM) <= 4 * HEAD_DIM


def test_labels_are_unique():
    labels = [str(method.label) for method in ALL]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    "method",
    [
        Method(),
        ZeroFill(ratio=0),
        AuthorsRestoration(ratio=0),
        ThinK(ratio=0),
        Mustafar(ratio=0, prune_values=True),
        StreamingLLM(share=1),
        SnapKV(share=1),
        ValuePruning(ratio=0),
        Integers(bits=4, group=32, of_keys=False),
        Fp8(of_keys=False, of_values=False),
    ],
    ids=lambda method: type(method).__name__,
)
def test_nothing_asked_for_changes_nothing(method):
    chunk = make_chunk()
    torch.testing.assert_close(method.keys(chunk), chunk.k, rtol=0, atol=0)
    torch.testing.assert_close(method.values(chunk), chunk.v, rtol=0, atol=0)
    assert method.kept_tokens(chunk, chunk.k.transpose(0, 1)) is None


@pytest.mark.parametrize("decoded", [False, True], ids=["prefill", "decode"])
@pytest.mark.parametrize("restore_bits", [0, 1, 2])
@pytest.mark.parametrize("ratio", [0.5, 0.8, 0.9])
def test_spark_is_what_the_reference_writes_and_reads(ratio, restore_bits, decoded):
    chunk = make_chunk(decoded=decoded)
    method = Spark(ratio=ratio, restore_bits=restore_bits)
    key_format = KeyFormat.from_ratio(HEAD_DIM, ratio, restore_bits)
    rows = LayerRows.allocate(50, NUM_KV_HEADS, key_format, ValueFormat(HEAD_DIM, torch.bfloat16))
    slots = torch.arange(50)
    bounds = None if decoded else torch.tensor([0, 50])
    reference.write_rows(chunk.q, chunk.k, chunk.v, slots, rows, qo_indptr=bounds)
    torch.testing.assert_close(method.keys(chunk), reference.restore_keys(rows, slots), rtol=0, atol=0)
    assert method.key_bytes(HEAD_DIM) == key_format.row_bytes


@pytest.mark.parametrize(("method", "kept"), [(ZeroFill(ratio=0.8), 26), (Mustafar(ratio=0.8), 26)], ids=["q", "k"])
def test_unstructured_pruning_keeps_as_many_channels_in_every_token(method, kept):
    assert (method.keys(make_chunk()) != 0).sum(-1).unique().tolist() == [kept]


def test_think_keeps_the_same_channels_in_all_tokens_but_the_last_32():
    keys = ThinK(ratio=0.8).keys(make_chunk())
    kept = keys[:-32] != 0
    assert (kept == kept[0]).all() and kept[0].sum(-1).tolist() == [26, 26]
    torch.testing.assert_close(keys[-32:], make_chunk().k[-32:])


def test_streaming_llm_keeps_sinks_and_recent_tokens():
    chunk = make_chunk()
    kept = StreamingLLM(share=0.4).kept_tokens(chunk, chunk.k.transpose(0, 1))
    assert kept.tolist() == [[0, 1, 2, 3, *range(34, 50)]] * NUM_KV_HEADS


def test_snapkv_keeps_what_the_last_queries_look_at():
    chunk = make_chunk(100)
    k, q = chunk.k.clone(), chunk.q.clone()
    k[20, 0], k[40, 1] = 4.0, 4.0
    q[-32:] = 1.0
    chunk = replace(chunk, q=q, k=k)
    kept = SnapKV(share=0.4).kept_tokens(chunk, k.transpose(0, 1))
    assert kept.shape == (NUM_KV_HEADS, 40)
    assert 20 in kept[0] and 40 in kept[1] and set(range(68, 100)) <= set(kept[0].tolist())
    assert (kept.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("method", [StreamingLLM(share=0.4), SnapKV(share=0.4)], ids=["streaming", "snapkv"])
def test_decoded_tokens_are_not_evicted(method):
    chunk = make_chunk(2, decoded=True, position=100)
    assert method.kept_tokens(chunk, torch.zeros(NUM_KV_HEADS, 102, HEAD_DIM)) is None


def test_integers_round_to_half_a_step():
    chunk = make_chunk()
    for bits, group in ((8, 128), (4, 32), (2, 32)):
        groups = chunk.k.unflatten(-1, (-1, group))
        step = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
        error = (Integers(bits=bits, group=group).keys(chunk) - chunk.k).abs().unflatten(-1, (-1, group)).amax(-1)
        # Scale and offset are float16.
        assert (error <= 0.5 * step + 0.01).all() and (error > 0.2 * step).float().mean() > 0.9
    assert Integers(bits=4, group=32).bytes_per_token_head(HEAD_DIM) == 64 + 4 * 4 + 256


def test_more_bytes_mean_less_error():
    chunk = make_chunk()

    def error(method):
        return float((method.keys(chunk) - chunk.k).norm() / chunk.k.norm())

    ratios = [error(Spark(ratio=ratio)) for ratio in (0.5, 0.7, 0.9)]
    bits = [error(Spark(ratio=0.8, restore_bits=bits)) for bits in (2, 1, 0)]
    assert ratios == sorted(ratios) and bits == sorted(bits)
    assert error(Spark(ratio=0.8)) < error(AuthorsRestoration(ratio=0.8)) < error(ZeroFill(ratio=0.8))


def test_label_of_the_default():
    assert Spark(ratio=0.8).label == Label("spark", 0.8, 2, "bf16")


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("key_model", KEY_MODELS, ids=lambda key_model: key_model.name)
def test_synthetic_keys_have_the_statistics_they_are_named_after(key_model, head_dim):
    chunk, queries = key_model.draw(head_dim, seed=0)
    size = chunk.k.abs().mean(0)
    largest = (size.amax(-1) / size.median(-1).values).min()
    assert (largest > 20) == key_model.outliers
    exact = errors(Method(), chunk, queries)
    assert exact.logits == 0 and exact.output == 0
    assert errors(Spark(ratio=0.5), chunk, queries).output < errors(Spark(ratio=0.9), chunk, queries).output


def test_heavy_tails_reach_further():
    gaussian, heavy = (model.draw(128, seed=0)[0].k for model in KEY_MODELS[:2])
    assert (gaussian.abs().amax() / gaussian.std()) < 6 < 15 < (heavy.abs().amax() / heavy.std())


def test_exact_outliers_survive_what_plain_int4_does_not():
    chunk, queries = KEY_MODELS[-1].draw(128, seed=0)
    spark, int4 = (errors(method, chunk, queries).output for method in (Spark(ratio=0.8), Integers(bits=4, group=32)))
    assert spark < 0.5 * int4
