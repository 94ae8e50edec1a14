"""Adapters of releases that the tests do not run with, as far as they need nothing of those releases."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from types import ModuleType, SimpleNamespace
from typing import Literal

import pytest
import torch

from sglang_spark.adapters import eager_backend, handwritten_arguments, older_stats, runner_pools

A, Arg = handwritten_arguments.annotation()


@dataclasses.dataclass
class ServerArgs:
    model_path: str = "some/model"
    kv_cache_dtype: str = "auto"

    def __post_init__(self):
        self.kv_cache_dtype = "resolved"

    @staticmethod
    def add_cli_args(parser):
        parser.add_argument("--model-path", default=ServerArgs.model_path)
        parser.add_argument("--kv-cache-dtype", default=ServerArgs.kv_cache_dtype)


@handwritten_arguments.complete
class MoreServerArgs(ServerArgs):
    ratio: A[float, Arg(help="up to 95 %")] = 0.8
    restore_bits: A[Literal[0, 1, 2], Arg(help="per channel")] = 2


def _parse(*arguments: str) -> MoreServerArgs:
    parser = argparse.ArgumentParser()
    MoreServerArgs.add_cli_args(parser)
    parser.format_help()
    return MoreServerArgs(**vars(parser.parse_args(arguments)))


def test_fields_become_flags_of_their_types_beside_the_inherited_ones():
    assert _parse() == MoreServerArgs()
    parsed = _parse("--model-path", "other", "--ratio", "0", "--restore-bits", "1")
    assert (parsed.model_path, parsed.ratio, parsed.restore_bits) == ("other", 0.0, 1)


@pytest.mark.parametrize("arguments", [("--restore-bits", "3"), ("--ratio", "much")], ids=" ".join)
def test_values_that_a_field_does_not_have_are_refused_by_the_parser(arguments):
    with pytest.raises(SystemExit):
        _parse(*arguments)


def test_what_the_user_gave_is_kept_through_the_resolution():
    arguments = MoreServerArgs(kv_cache_dtype="fp8_e4m3")
    assert handwritten_arguments.requested(arguments)["kv_cache_dtype"] == "fp8_e4m3"
    assert handwritten_arguments.resolved(arguments).kv_cache_dtype == "resolved"


def test_a_runner_s_pool_lists_addresses_and_row_sizes_of_keys_then_values():
    class Pool(runner_pools.RowBuffers):
        device = "cpu"

        def buffer_shapes(self):
            return [(17, 2, row_bytes) for row_bytes in (88, 256, 72, 72)]

        def make_buffers(self):
            buffers = [torch.zeros(shape, dtype=torch.uint8) for shape in self.buffer_shapes()]
            return buffers[:2], buffers[2:]

    pool = Pool()
    pool._create_buffers()
    assert pool.data_ptrs.tolist() == [buffer.data_ptr() for buffer in pool.k_buffer + pool.v_buffer]
    assert pool.data_strides.tolist() == [buffer[0].nbytes for buffer in pool.k_buffer + pool.v_buffer]


@pytest.mark.parametrize("fails", [False, True], ids=["builds", "fails"])
def test_a_runner_calls_the_other_pool_class_only_while_it_builds(fails, monkeypatch):
    mixin = ModuleType(runner_pools._MIXIN)
    mixin.MHATokenToKVPool = dense = object()
    monkeypatch.setitem(sys.modules, runner_pools._MIXIN, mixin)

    def init_pools(runner):
        runner.pool = mixin.MHATokenToKVPool
        if fails:
            raise RuntimeError("no memory")

    runner, ours = SimpleNamespace(), object()
    if fails:
        with pytest.raises(RuntimeError, match="no memory"):
            runner_pools.build(init_pools, runner, {}, ours)
    else:
        runner_pools.build(init_pools, runner, {}, ours)
    assert runner.pool is ours
    assert mixin.MHATokenToKVPool is dense


def test_capturing_without_the_one_method_for_it_stops_and_names_the_flag():
    with pytest.raises(NotImplementedError, match="--disable-cuda-graph"):
        eager_backend.CaptureContract().init_forward_metadata_capture_cuda_graph(1, 1, None)


def test_tokens_held_are_those_in_use_where_nothing_else_is_counted():
    assert older_stats.held_tokens(SimpleNamespace(num_used_tokens=5)) == 5
