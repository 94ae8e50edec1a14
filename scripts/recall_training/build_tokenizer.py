"""The recall model's tokenizer: byte-level BPE with every word of the task generator as one token."""

from __future__ import annotations

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import recall_tasks

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
ASSISTANT = ROLES[2]
MERGES = 128

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Nothing is trimmed or reordered, so a conversation's rendering is a prefix of every continuation of it."""


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Builds the tokenizer from the generator's vocabulary.

    Its entries are the special tokens, the 256 bytes, a few merges for words that the generator does not know,
    and the generator's words whole. `ignore_merges` looks a whole pre-token up before merging, so those words
    need no chain of intermediate merges, which would double the vocabulary and never be trained.
    """
    words = recall_tasks.vocabulary()
    merges = _train_merges([word for word in words if not word.strip().isdigit()])
    entries = [PAD, BOS, END, *ROLES, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    entries += [left + right for left, right in merges]
    entries += [_as_bytes(word) for word in words]
    vocabulary = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (PAD, BOS, END, *ROLES)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )


def _as_bytes(text: str) -> str:
    """`text` in the printable alphabet in which byte-level BPE spells its vocabulary."""
    return "".join(piece for piece, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text))


def _train_merges(words: list[str]) -> list[tuple[str, str]]:
    """The first `MERGES` merges of a BPE trained on `words`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + MERGES, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(words, trainer)
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
