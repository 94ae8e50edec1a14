"""Models of other shapes than the bundled one, and that the doctor counts what a server stores."""

from __future__ import annotations

import traffic
from servers import COMMON_FLAGS, TWO_RANKS, bytes_by_the_doctor, running
from variants import write_looped_model, write_unevenly_sharded_model

from local_server import LocalServer

FLAGS = (*COMMON_FLAGS, "--max-total-tokens", "2048", "--chunked-prefill-size", "256")
SPARK = ("--kv-compress", "spark")


def test_a_looped_model_says_what_the_dense_server_says(tmp_path):
    model = write_looped_model(tmp_path / "looped")
    dense = LocalServer(*FLAGS, model=model)
    spark = LocalServer(*FLAGS, *SPARK, "--spark-key-ratio", "0", "--spark-value-dtype", "auto", model=model)
    with running(dense, spark):
        for send in (traffic.shared_prefix, traffic.more_than_the_pool):
            assert send(spark) == send(dense), send.__name__
        # Two loops over four layers.
        assert spark.capacity().bytes_per_token == bytes_by_the_doctor(spark) == 8 * 2 * 2 * 128 * 4


def test_the_doctor_counts_what_a_server_stores(tmp_path):
    """Heads padded for two ranks, and a checkpoint that says how its cache is stored."""
    model = write_unevenly_sharded_model(tmp_path / "uneven")
    flags = ("--load-format", "dummy", "--tp-size", "2", "--max-total-tokens", "512", *SPARK)
    flags = (*flags, "--spark-value-dtype", "auto")
    with LocalServer(*flags, model=model, env=TWO_RANKS) as server:
        capacity = server.capacity()
        assert capacity.value_dtype == "float8_e4m3fn"
        assert capacity.bytes_per_token == bytes_by_the_doctor(server)
