"""The token-to-KV pool: SGLang's own, holding rows of bytes."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.mem_cache.memory_pool import KvBufferDesc, KVCache, MHATokenToKVPool

from sglang_spark.calibration import Calibration
from sglang_spark.layout import PoolLayout
from spark_kernels.formats import Pruned
from spark_kernels.rows import LayerRows


class SparkTokenToKVPool(MHATokenToKVPool):
    """A pool whose key of a token and KV head is one SparK row, and whose value is one value row.

    To SGLang it is an ``MHATokenToKVPool`` of dtype uint8 whose head_dim is the size of a row, so slot moves, CPU
    copies, transfer descriptors and size reports work on rows as they are. A row depends on nothing but its own
    bytes, which is what lets requests share it through the radix tree.

    Parameters
    ----------
    size
        Token slots, besides the padding page.
    layout
        Row formats of the layers.
    dtype, head_num, head_dim, layer_num, v_head_dim
        As SGLang passes them for a dense pool; the layout replaces them.
    kwargs
        Everything else goes to ``MHATokenToKVPool``.
    """

    def __init__(
        self, size: int, *, layout: PoolLayout, dtype, head_num, head_dim, layer_num, v_head_dim=None, **kwargs
    ):
        self.layout = layout
        # A hybrid model's layers with rows are not one after the other.
        self._places = {layer_id: place for place, layer_id in enumerate(layout.layers)}
        # Of this process's layers and heads; set once, before the first row is written.
        self.calibration: Calibration | None = None
        # By global layer id; made once, because attention asks for them in every layer of every step.
        self._layer_rows: dict[int, LayerRows] = {}
        super().__init__(
            size,
            dtype=torch.uint8,
            head_num=layout.num_kv_heads,
            # Rows of dense layers are longer; everything that copies rows asks the buffers themselves.
            head_dim=min(key_format.row_bytes for key_format in layout.key_formats),
            v_head_dim=layout.value_format.row_bytes,
            layer_num=len(layout.key_formats),
            **kwargs,
        )

    def place(self, layer_id: int) -> int | None:
        """Where a layer (global id) stands among those with rows; None if it has none."""
        return self._places.get(layer_id)

    def layer_rows(self, layer_id: int) -> LayerRows:
        """The rows of a layer (global id), once any pending transfer of them has arrived."""
        place = self._places[layer_id]
        sglang_id = self.start_layer + place
        keys, values = self.get_key_buffer(sglang_id), self.get_value_buffer(sglang_id)
        rows = self._layer_rows.get(layer_id)
        if rows is None or rows.keys is not keys or rows.values is not values:
            key_format = self.layout.key_formats[place]
            calibration = self.calibration.layer(place, keys.device) if isinstance(key_format, Pruned) else None
            rows = LayerRows(keys, values, key_format, self.layout.value_format, calibration)
            self._layer_rows[layer_id] = rows
        return rows

    def set_kv_buffer(self, *args, **kwargs):
        """Dense keys cannot be stored without the queries that choose their channels."""
        raise NotImplementedError(
            "SparkTokenToKVPool is written by the spark attention backend only; a model or feature that stores keys "
            "by itself is not supported with --kv-compress spark"
        )

    def buffer_shapes(self) -> list[tuple[int, int, int]]:
        """Slots, KV heads and bytes of a row per buffer, in the order k0 .. k(L-1), v0 .. v(L-1)."""
        keys = [key_format.row_bytes for key_format in self.layout.key_formats]
        values = [self.layout.value_format.row_bytes] * len(keys)
        return [(self.size + self.page_size, self.head_num, row_bytes) for row_bytes in keys + values]

    def _create_buffers_normal(self):
        pool = torch.cuda.use_mem_pool(self.custom_mem_pool) if self.enable_custom_mem_pool else nullcontext()
        with self.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE), pool:
            buffers = [torch.zeros(shape, dtype=torch.uint8, device=self.device) for shape in self.buffer_shapes()]
        self.k_buffer, self.v_buffer = buffers[: self.layer_num], buffers[self.layer_num :]

    def _build_kv_buffer_descs(self):
        names = [f"{kind}{layer}" for kind in "kv" for layer in range(self.layer_num)]
        return [
            KvBufferDesc(name, shape, row_bytes=math.prod(shape[1:]), tokens_per_row=1)
            for name, shape in zip(names, self.buffer_shapes(), strict=True)
        ]

    def _init_kv_copy_and_warmup(self):
        super()._init_kv_copy_and_warmup()
        # SGLang takes the first buffer's rows for the longest. Without kernels for copies it has no configuration.
        if (config := self._kv_copy_config) is not None:
            config["byte_tiles"] = -(-int(self.data_strides.max()) // config["bytes_per_tile"])


def rows_of(pool: KVCache) -> KVCache:
    """The pool that holds rows: of a hybrid model's composed one, the part of the layers that attend to everything."""
    return getattr(pool, "full_kv_pool", pool)
