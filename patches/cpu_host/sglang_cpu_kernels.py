"""PyTorch in the place of SGLang's kernels that run neither on a CPU without its engine nor under the interpreter."""

from __future__ import annotations

import torch


def gated_delta_rule(
    q, k, v, g, beta, initial_state, initial_state_indices, cu_seqlens, use_qk_l2norm_in_kernel, **options
):
    """In the place of SGLang's kernel of this name, which Triton's interpreter cannot run: token by token.

    ``q`` and ``k`` are ``[1, tokens, num_k_heads, k_dim]``, ``v`` is ``[1, tokens, num_v_heads, v_dim]``, ``g`` and
    ``beta`` are ``[1, tokens, num_v_heads]``; states ``[slots, num_v_heads, v_dim, k_dim]`` are updated in place.
    """
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


def gated_delta_update(A_log, dt_bias, q, k, v, a, b, initial_state_source, **options):
    """In the place of ``fused_sigmoid_gating_delta_rule_update``, for the same reason."""
    num_v_heads = v.shape[2]
    g = -A_log.float().exp() * torch.nn.functional.softplus(a.float() + dt_bias.float())
    g, beta = g.view(1, -1, num_v_heads), b.float().sigmoid().view(1, -1, num_v_heads)
    return gated_delta_rule(q, k, v, g, beta, initial_state_source, **options)[0]


def reconstruct_indices_from_tree_mask(
    tree_mask,
    verified_seq_len,
    positions,
    retrieve_index,
    retrieve_next_token,
    retrieve_next_sibling,
    batch_size,
    width,
):
    """Where drafts stand and what follows them, from which drafts lead to which (``[batch_size, width, width]``)."""
    from sglang.srt.speculative.ngram_worker import _derive_tree_links

    tree = tree_mask.view(batch_size, width, width)
    positions.copy_((verified_seq_len[:, None] + tree.sum(2) - 1).flatten())
    retrieve_index.copy_(torch.arange(batch_size * width).view(batch_size, width))
    next_token, next_sibling = _derive_tree_links(tree.numpy(), batch_size, width)
    retrieve_next_token.copy_(next_token)
    retrieve_next_sibling.copy_(next_sibling)


def verify_tree_greedy(
    predicts,
    accept_index,
    accept_token_num,
    candidates,
    retrieve_index,
    retrieve_next_token,
    retrieve_next_sibling,
    target_predict,
    topk=-1,
):
    """The longest path of drafts that are what the model says, per request; results are written and returned."""
    said = target_predict.flatten()
    for request, drafts in enumerate(candidates.tolist()):
        index, child = retrieve_index[request].tolist(), retrieve_next_token[request].tolist()
        sibling = retrieve_next_sibling[request].tolist()
        at, accepted = 0, [index[0]]
        while True:
            following = child[at]
            while following != -1 and drafts[following] != int(said[accepted[-1]]):
                following = sibling[following]
            if following == -1 or len(accepted) == accept_index.shape[1]:
                break
            at = following
            accepted.append(index[at])
        predicts[accepted] = said[accepted].to(predicts.dtype)
        accept_index[request, : len(accepted)] = torch.tensor(accepted)
        accept_token_num[request] = len(accepted) - 1
    return predicts, accept_index, accept_token_num


def assign_extend_cache_locs(
    *, req_pool_indices, req_to_token, start_offset, end_offset, batch_size, draft_token_num, device
):
    """Slots of the tokens from ``start_offset`` to ``end_offset`` of every request, end to end."""
    return torch.cat(_slots(req_to_token, req_pool_indices, start_offset, end_offset)).long()


def move_accepted_tokens(batch, accept_index, num_correct_drafts, allocator):
    """Rows of the drafts that were accepted go where the next tokens of their requests belong."""
    ends = batch.seq_lens + num_correct_drafts + 1
    into = torch.cat(_slots(batch.req_to_token_pool.req_to_token, batch.req_pool_indices, batch.seq_lens, ends)).long()
    allocator.get_kvcache().move_kv_cache(into, batch.out_cache_loc[accept_index[accept_index >= 0].long()])


def assign_req_to_token_pool(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, batch_size):
    """The slots that every request has got, into its row of ``req_to_token``."""
    taken = 0
    for span in _slots(req_to_token, req_pool_indices, start_offset, end_offset):
        span.copy_(out_cache_loc[taken : taken + len(span)])
        taken += len(span)


def _slots(req_to_token, req_pool_indices, starts, ends):
    spans = zip(req_pool_indices.tolist(), starts.tolist(), ends.tolist(), strict=True)
    return [req_to_token[request, start:end] for request, start, end in spans]
