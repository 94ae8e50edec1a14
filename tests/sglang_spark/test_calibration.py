"""Calibrations: the file and what does not fit a model, the text, and the statistics of a model's forward."""

from __future__ import annotations

import json
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from sglang.srt.layers.radix_attention import RadixAttention

from sglang_spark import calibration_forward
from sglang_spark.calibration import METADATA, STATISTICS, Calibration, Model
from sglang_spark.calibration_forward import STRETCH_TOKENS, StatisticsBackend, held_heads, offsets, token_ids
from sglang_spark.calibration_text import STRETCHES
from sglang_spark.doctor import examine_model

MODEL = Model("LlamaForCausalLM", 256, 4, 4, 2, 128, 1024)


def _calibration(model: Model = MODEL, seed: int = 0) -> Calibration:
    generator = torch.Generator().manual_seed(seed)
    return Calibration.of(model, *(torch.rand(model.shape, generator=generator) for _ in STATISTICS))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "llama.safetensors"
    _calibration().save(path, MODEL, made_from="llama")
    return path


def test_file_gives_back_what_was_saved(saved):
    loaded, original = Calibration.load(saved, MODEL), _calibration()
    assert all(torch.equal(getattr(loaded, name), getattr(original, name)) for name in STATISTICS)
    assert loaded.fingerprint == original.fingerprint
    assert loaded.source == str(saved)
    assert [file.name for file in saved.parent.iterdir()] == [saved.name]
    assert saved.stat().st_mode & 0o777 == 0o644


def test_file_of_the_same_statistics_has_the_same_bytes(saved, tmp_path):
    again = tmp_path / "again.safetensors"
    _calibration().save(again, MODEL, made_from="llama")
    assert again.read_bytes() == saved.read_bytes()


@pytest.mark.parametrize("changed", STATISTICS)
def test_fingerprint_is_of_every_statistic(changed):
    statistics = {name: torch.ones(MODEL.shape) for name in STATISTICS}
    before = Calibration.of(MODEL, *statistics.values()).fingerprint
    statistics[changed][-1, -1, -1] += 1e-6
    assert Calibration.of(MODEL, *statistics.values()).fingerprint != before


def test_share_of_a_process():
    whole = _calibration()
    part = whole.share(range(1, 3), range(1, 2))
    assert torch.equal(part.deviation, whole.deviation[1:3, 1:2])
    assert part.fingerprint == whole.fingerprint


def test_share_with_heads_that_sglang_adds():
    part = _calibration().share(range(4), range(1, 3))
    assert part.centre.shape == (4, 2, 128)
    assert not part.centre[:, 1].any()


def test_layer_of_a_share_is_what_rows_are_made_with():
    whole = _calibration()
    layer = whole.share(range(1, 3), range(1, 2)).layer(1, "cpu")
    assert torch.equal(layer.centre, whole.centre[2, 1:])
    assert torch.equal(layer.step, whole.deviation[2, 1:])
    importance = (whole.query_rms * whole.deviation)[2, 1].gather(-1, layer.order[0].long())
    assert (importance.diff() <= 0).all()


def test_heads_that_sglang_added_are_not_the_models(monkeypatch):
    monkeypatch.setattr("sglang_spark.hybrid.mambaish_config", lambda _: None)
    config = SimpleNamespace(architectures=["LlamaForCausalLM"])
    model_config = SimpleNamespace(
        hf_config=config,
        hidden_size=256,
        is_hybrid_swa=False,
        num_attention_layers=4,
        num_attention_heads=4,
        get_total_num_kv_heads=lambda: 2,
        head_dim=128,
        vocab_size=1024,
    )
    before = Model.of(model_config)
    config.original_num_attention_heads, config.original_total_num_kv_heads = 4, 2
    model_config.num_attention_heads, model_config.get_total_num_kv_heads = 6, lambda: 3
    assert Model.of(model_config) == before


def _missing(path):
    path.unlink()


def _truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def _text(path):
    path.write_text("not safetensors")


def _rewrite(path, change):
    """Write the file again, changed but with a fingerprint that fits."""
    calibration = Calibration.load(path, MODEL)
    tensors, metadata = load_file(path), {"version": 1, "made_from": "llama", **MODEL._asdict()}
    change(tensors, metadata)
    statistics = [tensors.get(name, getattr(calibration, name)) for name in STATISTICS]
    metadata.setdefault("fingerprint", Calibration.of(MODEL, *statistics).fingerprint)
    save_file(tensors, path, {METADATA: json.dumps(metadata)})


def _changed(change):
    return lambda path: _rewrite(path, change)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        pytest.param(_missing, "cannot be read .*No such file", id="missing"),
        pytest.param(_truncated, "cannot be read", id="truncated"),
        pytest.param(_text, "cannot be read", id="text"),
        pytest.param(lambda p: save_file({"x": torch.zeros(1)}, p), "is not a calibration", id="other-safetensors"),
        pytest.param(_changed(lambda t, m: t.pop("centre")), "is not a calibration", id="without-a-statistic"),
        pytest.param(
            _changed(lambda t, m: m.update(version=2)), "format version 2, this release reads 1", id="version"
        ),
        pytest.param(_changed(lambda t, m: t["centre"].view(-1)[:1].fill_(torch.nan)), "centre.*NaN", id="nan"),
        pytest.param(_changed(lambda t, m: t["query_rms"].fill_(torch.inf)), "query_rms.*infinite", id="infinite"),
        pytest.param(_changed(lambda t, m: t["deviation"].neg_()), "deviation.*negative", id="negative"),
        pytest.param(
            _changed(lambda t, m: t.update(centre=t["centre"][:1].clone())),
            r"centre as torch.float32 \[1, 2, 128\] instead of torch.float32 \[4, 2, 128\]",
            id="shape",
        ),
        pytest.param(
            _changed(lambda t, m: t.update(centre=t["centre"].half())), "centre as torch.float16", id="float16"
        ),
        pytest.param(_changed(lambda t, m: m.update(fingerprint="0" * 16)), "is damaged", id="fingerprint"),
    ],
)
def test_file_that_does_not_fit_is_refused(saved, damage, complaint):
    damage(saved)
    with pytest.raises(ValueError, match=f"--spark-calibration={saved}: .*{complaint}"):
        Calibration.load(saved, MODEL)


@pytest.mark.parametrize("field", Model._fields)
def test_file_of_another_model_is_refused(saved, field):
    value = getattr(MODEL, field)
    other = MODEL._replace(**{field: f"Not{value}" if isinstance(value, str) else 2 * value})
    with pytest.raises(ValueError, match=f"for another model \\(llama\\), with {field} {value} instead of"):
        Calibration.load(saved, other)


def test_file_is_checked_before_weights_are_loaded(resolve, saved):
    assert resolve("--kv-compress", "spark", "--spark-calibration", str(saved))["spark_calibration"] == str(saved)
    with pytest.raises(ValueError, match=r"for another model .*head_dim 128 instead of 80"):
        resolve("--kv-compress", "spark", "--spark-calibration", str(saved), model="llama-head-dim-80")


def test_doctor_says_where_the_calibration_comes_from(model_folder, saved):
    llama = str(model_folder("llama"))
    assert examine_model(llama, [], None).calibration == "measured at start-up"
    assert examine_model(llama, ["--spark-calibration", str(saved)], None).calibration == (
        f"{saved} (fingerprint {_calibration().fingerprint})"
    )


def test_file_without_compression_is_refused(resolve, saved):
    with pytest.raises(ValueError, match="--spark-calibration: has no effect without --kv-compress spark"):
        resolve("--spark-calibration", str(saved))


def _characters(text: str) -> dict[str, list[int]]:
    return {"input_ids": [1, *map(ord, text)]}


def test_text_is_read_as_prompts_of_the_tokenizer():
    sequences = token_ids(_characters, 1 << 17)
    assert [len(ids) for ids in sequences] == [STRETCH_TOKENS] * len(STRETCHES)
    assert sequences[0] == _characters(STRETCHES[0])["input_ids"][:STRETCH_TOKENS]


@pytest.mark.parametrize("vocab_size", [1024, 151936])
def test_without_a_tokenizer_ids_cover_the_vocabulary(vocab_size):
    ids = sorted(chain.from_iterable(token_ids(None, vocab_size)))
    assert len(ids) == STRETCH_TOKENS * len(STRETCHES)
    gaps = [after - before for before, after in zip([0, *ids], [*ids, vocab_size], strict=True)]
    assert 0 <= ids[0] and ids[-1] < vocab_size and max(gaps) < 4 * vocab_size / len(ids)


@pytest.mark.parametrize(
    ("context_len", "expected"),
    [pytest.param(1064, [0, 500, 1000], id="spread"), pytest.param(32, [0, 0, 0], id="short-context")],
)
def test_positions_spread_over_the_context(context_len, expected):
    assert offsets([[0] * 64] * 3, context_len) == expected


@pytest.mark.parametrize(
    ("heads", "ranks", "expected"),
    [
        pytest.param(8, 2, [range(0, 4), range(4, 8)], id="heads-divided"),
        pytest.param(2, 4, [range(0, 1), range(0, 1), range(1, 2), range(1, 2)], id="heads-shared"),
    ],
)
def test_heads_of_tensor_parallel_ranks(monkeypatch, heads, ranks, expected):
    config = SimpleNamespace(
        get_total_num_kv_heads=lambda: heads, get_num_kv_heads=lambda ranks: max(1, heads // ranks)
    )
    for rank, held in enumerate(expected):
        parallel = SimpleNamespace(attn_tp_size=ranks, attn_tp_rank=rank)
        monkeypatch.setattr(calibration_forward, "get_parallel", lambda parallel=parallel: parallel)
        assert held_heads(config) == held


def test_backend_attends_within_sequences_and_counts_without_padding():
    layer = RadixAttention(4, 64, 0.1, 2, layer_id=3)
    pool = SimpleNamespace(layout=SimpleNamespace(layers=(3,)))
    backend = StatisticsBackend(SimpleNamespace(token_to_kv_pool=pool, req_to_token_pool=None))
    backend.init_forward_metadata(SimpleNamespace(extend_seq_lens_cpu=[17, 5]))
    tokens = [torch.randn(22, 64 * heads) for heads in (4, 2, 2)]
    for _ in range(2):
        padded = (torch.nn.functional.pad(x, (0, 0, 0, 3), value=torch.nan) for x in tokens)
        out = backend.forward_extend(*padded, layer, None)
    for own in (slice(0, 17), slice(17, 22)):
        q, k, v = (x[own].view(1, -1, x.shape[1] // 64, 64).transpose(1, 2) for x in tokens)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.1, enable_gqa=True)
        torch.testing.assert_close(out[own], expected[0].transpose(0, 1).flatten(1), atol=1e-5, rtol=1e-5)
    assert not out[22:].any()
    q, k, _ = (x.view(22, -1, 64).double() for x in tokens)
    once = torch.stack([k.sum(0), k.square().sum(0), q.square().unflatten(1, (2, 2)).mean(2).sum(0)])
    torch.testing.assert_close(backend.sums[3], 2 * once)
