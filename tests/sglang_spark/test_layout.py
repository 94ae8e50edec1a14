"""What a server would store, computed without starting it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_spark.hooks import share_of
from sglang_spark.layout import PoolLayout, planned_layouts
from spark_kernels import Numbers

HEAD_BYTES = 2 * 2 * 128  # of a dense bfloat16 key and value


@pytest.fixture
def plan(model_folder):
    """A function from a model and flags to the layouts of its pipeline stages."""
    from sglang.srt.arg_groups.overrides import model_config_of, resolving_view
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import prepare_server_args

    def planned(*flags: str, model: str = "llama") -> list[PoolLayout]:
        arguments = prepare_server_args(
            ["--model-path", str(model_folder(model)), "--device", "cpu", "--kv-compress", "spark", *flags]
        )
        arguments.resolve_once()
        publish(arguments, role="scheduler")
        return planned_layouts(resolving_view(arguments), model_config_of(arguments))

    return planned


def test_every_stage_of_a_pipeline_holds_its_layers(plan):
    stages = plan("--pp-size", "3", "--spark-dense-layers", "0")
    assert [len(stage.key_formats) for stage in stages] == [1, 1, 2]
    assert [isinstance(stage.key_formats[0], Numbers) for stage in stages] == [True, False, False]


def test_layers_of_a_stage_follow_sglang_s_partition(plan, monkeypatch):
    monkeypatch.setenv("SGLANG_PP_LAYER_PARTITION", "3,1")
    assert [len(stage.key_formats) for stage in plan("--pp-size", "2")] == [3, 1]


def test_heads_are_padded_under_uneven_tensor_parallelism(plan):
    (layout,) = plan("--tp-size", "2", model="llama-3-kv-heads")
    assert layout.num_kv_heads == 2
    assert layout.dense_bytes_per_token == 4 * 2 * HEAD_BYTES
    (layout,) = plan(model="llama-3-kv-heads")
    assert layout.num_kv_heads == 3


def test_the_model_s_config_is_left_as_it_is(plan, model_folder):
    from sglang.srt.configs.model_config import ModelConfig

    model_config = ModelConfig(str(model_folder("llama-3-kv-heads")))
    arguments = SimpleNamespace(
        device="cpu", tp_size=2, pp_size=1, dp_size=1, enable_dp_attention=False, kv_cache_dtype="auto"
    )
    plan()
    planned_layouts(arguments, model_config)
    assert model_config.get_total_num_kv_heads() == 3


@pytest.mark.parametrize(
    ("model", "flags", "dtype"),
    [
        ("llama-fp8-cache", ("--spark-value-dtype", "auto"), "float8_e4m3fn"),
        ("llama-fp8-cache", ("--spark-value-dtype", "int4"), "int4"),
        ("llama", ("--spark-value-dtype", "auto", "--kv-cache-dtype", "fp8_e4m3"), "float8_e4m3fn"),
        ("llama", ("--spark-value-dtype", "auto"), "bfloat16"),
        ("llama", (), "int4"),
    ],
)
def test_a_checkpoint_chooses_the_dtype_of_values_as_for_dense(model, flags, dtype, plan):
    (layout,) = plan(*flags, model=model)
    assert layout.value_format.name == dtype


@pytest.mark.parametrize(("end_layer", "counted"), [(4, 8), (8, 16)], ids=["layers", "layers and loops"])
def test_a_looped_model_caches_each_layer_once_per_loop(end_layer, counted, plan, model_folder):
    """SGLang multiplies by the loops whether or not ``end_layer`` has them."""
    from sglang.srt.configs.model_config import ModelConfig

    (layout,) = plan("--spark-dense-layers", "7", model="nanbeige-looped")
    assert [isinstance(key_format, Numbers) for key_format in layout.key_formats] == [False] * 7 + [True]
    info = SimpleNamespace(start_layer=0, end_layer=end_layer, num_effective_layers=counted)
    builder = SimpleNamespace(
        layer_info=info, model_config=ModelConfig(str(model_folder("nanbeige-looped"))), model_dtype=layout.model_dtype
    )
    assert PoolLayout.of(share_of(builder), "auto", 1).layers == tuple(range(8))
