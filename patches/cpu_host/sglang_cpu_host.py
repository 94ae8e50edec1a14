"""SGLang plugin: serve on a host without an accelerator.

SGLang's CPU engine asks for Intel AMX and CPU builds of its kernels. On any other host without an accelerator this
plugin makes the same server start, slowly, on PyTorch operators, so that sglang-spark can be developed and tested
there against the dense server. With an accelerator present it does nothing.

What it changes (SGLang 0.5.20 to 0.5.23):

===================================  ==================================================================
``--device`` unset                   becomes ``cpu`` (SGLang raises)
``--attention-backend`` unset        becomes ``torch_native`` (SGLang picks ``intel_amx``)
CUDA graphs                          off, unless asked for
``support_triton()``                 False: index bookkeeping uses SGLang's PyTorch fallbacks
paged allocation kernels (Triton)    SGLang's ``alloc_extend_naive``
``torch_native`` on window pools     reads the slots it has written (SGLang reads those of the other pool)
NGRAM speculation                    kernels of SGLang's engine for Intel AMX as PyTorch (``sglang_cpu_kernels``)
rotary embedding                     SGLang's PyTorch implementation (it would import vLLM's kernel)
pinned memory in LoRA                ordinary memory (``--lora-backend torch_native``; there is no device to copy to)
``OMP_WAIT_POLICY`` unset            becomes ``passive`` in the processes that SGLang starts
===================================  ==================================================================

``TRITON_INTERPRET=1`` leaves the Triton kernels in place: they then run under Triton's interpreter. Those of linear
attention that it cannot run are PyTorch, too, and models with a pool of windows take SGLang's Triton backend.
"""

import contextlib
import copy
import functools
import logging
import os
import sys
import types

logger = logging.getLogger(__name__)

SOURCE = "sglang_cpu_host"


def has_accelerator() -> bool:
    """Whether SGLang finds a device, or its own CPU engine (Intel AMX), to run on."""
    from sglang.srt.utils.common import get_device

    try:
        get_device()
    except RuntimeError:
        return False
    return True


class _TorchLaunch:
    """Stands where SGLang holds a Triton kernel: ``kernel[grid](*args)`` calls a Python function."""

    def __init__(self, function):
        self._function = function

    def __getitem__(self, grid):
        return self._function


def _alloc_extend(prefix_lens, seq_lens, last_loc, free_pages, out_indices, bs_upper, page_size):
    # The caller counts pages after the launch and discards the result when the pool was short, which the Triton
    # kernel survives and alloc_extend_naive asserts against.
    pages_needed = ((seq_lens + page_size - 1) // page_size - (prefix_lens + page_size - 1) // page_size).sum()
    if pages_needed > free_pages.numel():
        return
    from sglang.srt.mem_cache.allocator import paged

    paged.alloc_extend_naive(prefix_lens, seq_lens, last_loc, free_pages, out_indices, page_size, out_indices.device)


def _alloc_decode(seq_lens, last_loc, free_pages, out_indices, bs_upper, page_size):
    _alloc_extend(seq_lens - 1, seq_lens, last_loc, free_pages, out_indices, bs_upper, page_size)


def _decided(server_args):
    from sglang.srt.arg_groups.overrides import resolving_view

    return resolving_view(server_args)


def _decide(server_args, **fields) -> None:
    from sglang.srt.arg_groups.overrides import declare_resolution

    declare_resolution(server_args, SOURCE, **fields)


def _default_to_cpu(server_args, previous) -> None:
    if _decided(server_args).device is None:
        _decide(server_args, device="cpu")
    previous(server_args)


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _default_to_torch_native(server_args, previous) -> None:
    from sglang.srt.arg_groups.overrides import model_config_of

    if _decided(server_args).device == "cpu" and _decided(server_args).attention_backend is None:
        # SGLang refuses it for most models with a pool of windows. Triton's interpreter runs the backend that it takes.
        takes_triton = _is_interpreted() and model_config_of(server_args).is_hybrid_swa
        _decide(server_args, attention_backend="triton" if takes_triton else "torch_native")
    previous(server_args)


def _no_cuda_graphs(server_args, previous) -> None:
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase

    previous(server_args)
    config = copy.deepcopy(_decided(server_args).cuda_graph_config)
    for phase in Phase.ALL:
        if (phase, "backend") not in server_args._cuda_graph_config_locked:
            config[phase].backend = Backend.DISABLED
    _decide(server_args, cuda_graph_config=config)


def _reads_its_window_pool(attend):
    """Around an attention of ``TorchNativeAttnBackend``: of a layer with a window, slots are looked up in its pool."""

    @functools.wraps(attend)
    def wrapped(backend, q, out, keys, values, req_to_token, req_pool_indices, seq_lens, *rest, **options):
        if backend.use_sliding_window_kv_pool and options["sliding_window_size"] is not None:
            slots = req_to_token[req_pool_indices, : int(seq_lens.max())]
            req_to_token = backend.token_to_kv_pool.translate_loc_from_full_to_swa(slots)
            req_pool_indices = range(len(slots))
        return attend(backend, q, out, keys, values, req_to_token, req_pool_indices, seq_lens, *rest, **options)

    return wrapped


def _run_first_config(tuner, *args, **kwargs):
    """In the place of ``Autotuner.run``: without a GPU no configuration is faster than another."""
    config = tuner.configs[0]
    tuner.best_config = config
    return tuner.fn.run(*args, **kwargs, **config.all_kwargs())


class _TorchWithoutPinning:
    """Stands where a module of SGLang holds ``torch``: tensors that should be pinned are ordinary ones."""

    def __getattr__(self, name):
        import torch

        attribute = getattr(torch, name)
        if name not in ("arange", "empty", "tensor", "zeros"):
            return attribute
        return lambda *args, pin_memory=False, **kwargs: attribute(*args, **kwargs)


def _prepare_speculation(*_) -> None:
    """Before a speculation worker is imported: what SGLang has kernels for on GPUs and in its own CPU engine only."""
    from sglang.kernels.ops.speculative import cache_locs
    from sglang.srt.mem_cache import allocation
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.speculative import eagle_utils, spec_utils

    import sglang_cpu_kernels as kernels

    package, speculative = (types.ModuleType(name) for name in ("sgl_kernel", "sgl_kernel.speculative"))
    speculative.reconstruct_indices_from_tree_mask = kernels.reconstruct_indices_from_tree_mask
    sys.modules.update({"sgl_kernel": package, "sgl_kernel.speculative": speculative})
    from sglang.srt.speculative import ngram_worker

    # Others must not take it for the real one.
    del sys.modules["sgl_kernel"], sys.modules["sgl_kernel.speculative"]
    allocation.assign_req_to_token_pool_func = kernels.assign_req_to_token_pool
    for module in (cache_locs, ngram_worker):
        module.assign_extend_cache_locs_func = kernels.assign_extend_cache_locs
    for module in (spec_utils, ngram_worker):
        module.move_accept_tokens_to_target_kvcache = kernels.move_accepted_tokens
        module.record_stream_for_v2_verify = lambda *_: None
    eagle_utils.verify_tree_greedy_func = kernels.verify_tree_greedy
    # The pool is made after the worker.
    MHATokenToKVPool._init_kv_copy_and_warmup = lambda pool: setattr(pool, "_kv_copy_config", None)
    os.environ.setdefault("SGLANG_NATIVE_MOVE_KV_CACHE", "1")


def register() -> None:
    """Entry point of the group ``sglang.srt.plugins``."""
    if has_accelerator():
        return

    import torch
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.layers.rotary_embedding import base as rotary_embedding
    from sglang.srt.lora import layers as lora_layers
    from sglang.srt.lora.backend import torch_backend as lora_backend
    from sglang.srt.mem_cache import allocation
    from sglang.srt.mem_cache.allocator import paged
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.speculative import spec_info
    from triton.runtime.autotuner import Autotuner

    import sglang_cpu_kernels as kernels

    # OpenMP threads spin while they wait for each other. Where other processes compete for the cores (a second server,
    # a test runner) that costs whole scheduler ticks: calls of 0.2 ms then take 10 to 100 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    register_resolution_hook("handle_missing_default_values")(_default_to_cpu)
    register_resolution_hook("handle_cpu_backends")(_default_to_torch_native)
    register_resolution_hook("handle_cuda_graph_config")(_no_cuda_graphs)
    for attend in ("_run_sdpa_forward_extend", "_run_sdpa_forward_decode"):
        setattr(TorchNativeAttnBackend, attend, _reads_its_window_pool(getattr(TorchNativeAttnBackend, attend)))
    rotary_embedding._is_cpu = True
    lora_layers.torch = lora_backend.torch = _TorchWithoutPinning()
    torch.Tensor.pin_memory = lambda tensor, device=None: tensor
    if _is_interpreted():
        from sglang.kernels.ops.attention.fla import layernorm_gated
        from sglang.srt.layers.attention.linear.kernels import gdn_triton

        torch.cpu.device = contextlib.nullcontext
        layernorm_gated._get_sm_count = lambda device: 1
        gdn_triton.chunk_gated_delta_rule = kernels.gated_delta_rule
        gdn_triton.fused_sigmoid_gating_delta_rule_update = kernels.gated_delta_update
        gdn_triton.TritonGDNKernel.supports_packed_decode = False
        Autotuner.run = _run_first_config
        return
    HookRegistry.register(
        f"{spec_info.__name__}.SpeculativeAlgorithm.create_worker", _prepare_speculation, HookType.BEFORE
    )
    HookRegistry.register("sglang.srt.utils.common.support_triton", lambda backend: False, HookType.REPLACE)
    HookRegistry.register(f"{allocation.__name__}.get_last_loc", allocation.get_last_loc_torch, HookType.REPLACE)
    paged.alloc_extend_kernel = _TorchLaunch(_alloc_extend)
    paged.alloc_decode_kernel = _TorchLaunch(_alloc_decode)
