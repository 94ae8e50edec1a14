"""Training batches and the loss: recall items rendered in both forms, with their answers marked."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from recall_tasks import KINDS, RecallItem, make_item

from .build_tokenizer import ASSISTANT, END
from .schedule import Stage

CHAT_SHARE = 0.7
UNFAMILIAR_SHARE = 0.1
UNFAMILIAR_SHRINK = 0.75
"""Some items are about made-up words; these take several tokens each, so the document is asked for smaller."""
TOKENS_PER_TURN = 32
TEXT_WEIGHT = 0.1
TEXT_SHARE = 0.25
"""Answers decide the loss; of all other tokens a quarter is sampled, which keeps the large softmax cheap."""


@dataclass(frozen=True)
class Batch:
    """`tokens` [sequences, length] and `answers`, which marks the tokens that belong to an answer or end it."""

    tokens: Tensor
    answers: Tensor


def make_batch(tokenizer: PreTrainedTokenizerFast, stage: Stage, seed: int, step: int) -> Batch:
    """The batch of `step`: a function of its arguments, so that a resumed run sees the same data."""
    rng = random.Random(f"{seed}/{step}")
    rows = [_make_row(tokenizer, stage.length, rng) for _ in range(stage.sequences)]
    tokens = torch.full((len(rows), stage.length), tokenizer.pad_token_id)
    answers = torch.zeros(tokens.shape, dtype=torch.bool)
    for index, (row, marks) in enumerate(rows):
        size = min(len(row), stage.length)
        tokens[index, :size] = torch.tensor(row[:size])
        answers[index, :size] = torch.tensor(marks[:size])
    return Batch(tokens, answers)


def batch_loss(model: LlamaForCausalLM, batch: Batch, seed: int, step: int) -> tuple[Tensor, float]:
    """Weighted next-token loss, and the share of answer tokens that are predicted right.

    Matrix products run in bf16, which is faster on a CPU with AMX; weights, residual stream and loss stay float32.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    targets, is_answer = batch.tokens[:, 1:], batch.answers[:, 1:]
    sampled = torch.rand(targets.shape, generator=generator) < TEXT_SHARE
    used = is_answer | (sampled & (targets != model.config.pad_token_id))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(batch.tokens, use_cache=False).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden[used])
    losses = F.cross_entropy(logits.float(), targets[used], reduction="none")
    answer = is_answer[used]
    loss = losses[answer].mean() + TEXT_WEIGHT * losses[~answer].mean()
    accuracy = (logits[answer].argmax(-1) == targets[used][answer]).float().mean()
    return loss, accuracy.item()


def encode_item(tokenizer: PreTrainedTokenizerFast, item: RecallItem, chat: bool) -> tuple[list[int], list[bool]]:
    """Token ids of an item with all its answers, and which of them the model has to produce.

    Those are, in chat, everything after an assistant marker up to and including the turn's end. In the plain form
    an answer is followed by the next question, and only the last one by the end-of-text token.
    """
    last = len(item.turns) - 1
    if not chat:
        segments = [*item.plain_segments(last), (f" {item.turns[last].answer}{END}", True)]
        ids, marks = [tokenizer.bos_token_id], [False]
        for text, is_answer in segments:
            piece = tokenizer.encode(text, add_special_tokens=False)
            ids += piece
            marks += [is_answer] * len(piece)
        return ids, marks
    messages = [*item.messages(last), {"role": "assistant", "content": item.turns[last].answer}]
    ids = tokenizer.encode(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)
    assistant, end = tokenizer.convert_tokens_to_ids([ASSISTANT, END])
    marks, inside = [], False
    for token in ids:
        marks.append(inside)
        inside = token == assistant or (inside and token != end)
    return ids, marks


def _make_row(tokenizer: PreTrainedTokenizerFast, length: int, rng: random.Random) -> tuple[list[int], list[bool]]:
    """One item that fills about `length` tokens, with several questions since only answers teach recall."""
    kind = rng.choice(KINDS)
    questions = 1 if kind == "single_needle" else rng.randint(2, 3 if length < 512 else 6)
    document_tokens = length - TOKENS_PER_TURN * (questions + 1)
    unfamiliar = rng.random() < UNFAMILIAR_SHARE
    if unfamiliar:
        document_tokens = int(document_tokens * UNFAMILIAR_SHRINK)
    item = make_item(kind, rng, document_tokens, questions=questions, unfamiliar=unfamiliar)
    return encode_item(tokenizer, item, chat=rng.random() < CHAT_SHARE)
