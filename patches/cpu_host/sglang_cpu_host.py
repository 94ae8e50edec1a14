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
rotary embedding                     SGLang's PyTorch implementation (it would import vLLM's kernel)
pinned memory in LoRA                ordinary memory (``--lora-backend torch_native``; there is no device to copy to)
``OMP_WAIT_POLICY`` unset            becomes ``passive`` in the processes that SGLang starts
===================================  ==================================================================

``TRITON_INTERPRET=1`` leaves the Triton kernels in place: they then run under Triton's interpreter.
"""

import contextlib
import copy
import functools
import logging
import os

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


def _default_to_torch_native(server_args, previous) -> None:
    if _decided(server_args).device == "cpu" and _decided(server_args).attention_backend is None:
        _decide(server_args, attention_backend="torch_native")
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


def _gated_delta_rule(
    q, k, v, g, beta, initial_state, initial_state_indices, cu_seqlens, use_qk_l2norm_in_kernel, **options
):
    """In the place of SGLang's kernel of this name, which Triton's interpreter cannot run: token by token.

    ``q`` and ``k`` are ``[1, tokens, num_k_heads, k_dim]``, ``v`` is ``[1, tokens, num_v_heads, v_dim]``, ``g`` and
    ``beta`` are ``[1, tokens, num_v_heads]``; states ``[slots, num_v_heads, v_dim, k_dim]`` are updated in place.
    """
    import torch

    group, out = v.shape[2] // k.shape[2], torch.empty_like(v)
    if use_qk_l2norm_in_kernel:
        q, k = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (q, k))
    q, k = (x[0].float().repeat_interleave(group, dim=1) for x in (q, k))
    bounds = cu_seqlens.tolist()
    for slot, first, last in zip(initial_state_indices.tolist(), bounds, bounds[1:], strict=False):
        state = initial_state[slot].float()
        for token in range(first, last):
            state = state * g[0, token].float().exp()[:, None, None]
            error = v[0, token].float() - (state * k[token, :, None]).sum(-1)
            state = state + (beta[0, token].float()[:, None] * error)[..., None] * k[token, :, None]
            out[0, token] = (state * q[token, :, None]).sum(-1) * k.shape[-1] ** -0.5
        initial_state[slot] = state
    return out, None, None


def _gated_delta_update(A_log, dt_bias, q, k, v, a, b, initial_state_source, **options):
    """In the place of ``fused_sigmoid_gating_delta_rule_update``, for the same reason."""
    import torch

    num_v_heads = v.shape[2]
    g = -A_log.float().exp() * torch.nn.functional.softplus(a.float() + dt_bias.float())
    g, beta = g.view(1, -1, num_v_heads), b.float().sigmoid().view(1, -1, num_v_heads)
    return _gated_delta_rule(q, k, v, g, beta, initial_state_source, **options)[0]


class _TorchWithoutPinning:
    """Stands where a module of SGLang holds ``torch``: tensors that should be pinned are ordinary ones."""

    def __getattr__(self, name):
        import torch

        attribute = getattr(torch, name)
        if name not in ("arange", "empty", "tensor", "zeros"):
            return attribute
        return lambda *args, pin_memory=False, **kwargs: attribute(*args, **kwargs)


def register() -> None:
    """Entry point of the group ``sglang.srt.plugins``."""
    if has_accelerator():
        return

    import torch
    from triton.runtime.autotuner import Autotuner
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.layers.rotary_embedding import base as rotary_embedding
    from sglang.srt.lora import layers as lora_layers
    from sglang.srt.lora.backend import torch_backend as lora_backend
    from sglang.srt.mem_cache import allocation
    from sglang.srt.mem_cache.allocator import paged
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

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
    if os.environ.get("TRITON_INTERPRET") == "1":
        from sglang.kernels.ops.attention.fla import utils as linear_attention
        from sglang.srt.layers.attention.linear.kernels import gdn_triton

        linear_attention.custom_device_ctx = contextlib.nullcontext
        gdn_triton.chunk_gated_delta_rule = _gated_delta_rule
        gdn_triton.fused_sigmoid_gating_delta_rule_update = _gated_delta_update
        gdn_triton.TritonGDNKernel.supports_packed_decode = False
        Autotuner.run = _run_first_config
        return
    HookRegistry.register("sglang.srt.utils.common.support_triton", lambda backend: False, HookType.REPLACE)
    HookRegistry.register(f"{allocation.__name__}.get_last_loc", allocation.get_last_loc_torch, HookType.REPLACE)
    paged.alloc_extend_kernel = _TorchLaunch(_alloc_extend)
    paged.alloc_decode_kernel = _TorchLaunch(_alloc_decode)
