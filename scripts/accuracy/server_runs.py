"""Asks a server the questions of a task, greedily, and compares its log-probabilities with the dense server's.

A fresh prompt is one prefill chunk, which attends to itself exactly; follow-up questions and every generated token
read compressed rows. The distributions along the expected answer are the server's own: it decodes, and where it
takes another token it is put back on the expected answer, whose rows are in the radix tree, and decodes on.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from accuracy.endpoint import Endpoint
from accuracy.metrics import NextToken, kl_divergence
from accuracy.outcomes import Outcome
from accuracy.tasks import Item, Question

CONCURRENT_REQUESTS = 8
TOP_LOGPROBS = 256


@dataclass
class Reference:
    """What the dense cache said about one question: the tokens that are scored and its distributions along them."""

    ids: list[int]
    steps: list[NextToken] = field(repr=False)


@dataclass(frozen=True)
class Followed:
    """The greedy tokens of an undisturbed reply, the distributions along the expected one, and how many tokens of
    the prompt came from the cache."""

    reply: list[int]
    steps: list[NextToken]
    cached_tokens: int


class Interview:
    """One server asked by one tokenizer's prompts.

    Parameters
    ----------
    endpoint
        The server.
    tokenizer
        Makes token ids of prompts and text of replies; None to ask the OpenAI endpoints, for replies alone.
    exact
        Whether a reply is right only if it is the expected answer token by token, as a model trained on these tasks
        gives it; otherwise it has to contain the values.
    """

    def __init__(self, endpoint: Endpoint, tokenizer: PreTrainedTokenizerBase | None, exact: bool):
        self.endpoint = endpoint
        self.tokenizer = tokenizer
        self.exact = exact

    def ask(
        self, items: list[Item], references: dict[tuple[int, int], Reference], on_item: Callable[[], None]
    ) -> list[Outcome]:
        """Outcomes of all questions; `references` by item and turn are made here if there are none yet."""
        make_references = not references

        def conversation(number: int) -> list[Outcome]:
            outcomes = []
            for turn, question in enumerate(items[number].questions):
                if self.tokenizer is None:
                    outcomes.append(self._reply(number, question))
                    continue
                outcome, reference = self._answer(number, question, references.get((number, turn)))
                outcomes.append(outcome)
                if make_references:
                    references[number, turn] = reference
            on_item()
            return outcomes

        if self.tokenizer is not None:
            self.endpoint.flush_cache()
        return _side_by_side(conversation, len(items))

    def _reply(self, number: int, question: Question) -> Outcome:
        if question.complete is not None:
            raise ValueError("continuations are compared token by token, which needs SGLang's /generate")
        *before, last = question.messages
        # No endpoint but SGLang's own takes the beginning of a reply.
        asked = [*before, {**last, "content": f"{last['content']} {question.prefix}".rstrip()}]
        reply = self.endpoint.chat(asked, question.max_new_tokens)
        return Outcome(number, question.score(reply), f1=question.f1(reply))

    def _answer(self, number: int, question: Question, reference: Reference | None) -> tuple[Outcome, Reference]:
        prompt = prompt_ids(self.tokenizer, question)
        if reference is not None:
            expected = reference.ids
        else:
            expected = expected_ids(self.tokenizer, question) if self._is_exact(question) else None
        if expected is None:
            free = self.endpoint.generate(
                prompt,
                max_new_tokens=question.max_new_tokens,
                top_logprobs=TOP_LOGPROBS,
                ignore_eos=question.complete is not None,
            )
            followed, expected = Followed(free.ids, free.steps, free.cached_tokens), free.ids
        else:
            reply_tokens = 0 if self._is_exact(question) else question.max_new_tokens
            followed = follow(self.endpoint, prompt, expected, reply_tokens)
        reference = reference or Reference(expected, followed.steps)
        return self.judge(number, question, followed, reference), reference

    def converse(self, items: list[Item], on_item: Callable[[], None]) -> list[Outcome]:
        """Outcomes of conversations that go on from the server's own replies, through the OpenAI endpoint."""

        def conversation(number: int) -> list[Outcome]:
            history: list[dict[str, str]] = []
            outcomes = []
            for turn, question in enumerate(items[number].questions):
                # The first question brings the system prompt with it.
                history += question.messages if turn == 0 else question.messages[-1:]
                reply = self.endpoint.chat(history, question.max_new_tokens)
                history.append({"role": "assistant", "content": reply})
                outcomes.append(Outcome(number, question.score(reply)))
            on_item()
            return outcomes

        return _side_by_side(conversation, len(items))

    def _is_exact(self, question: Question) -> bool:
        return self.exact and question.answer is not None

    def judge(self, number: int, question: Question, followed: Followed, reference: Reference) -> Outcome:
        """Scores the distributions along the reference, and the reply."""
        tops = [step.top for step in followed.steps]
        f1 = None
        if self._is_exact(question) or question.complete is not None:
            right = float(followed.reply[: len(reference.ids)] == reference.ids)
        else:
            text = question.prefix + self._text(followed.reply)
            right, f1 = question.score(text), question.f1(text)
        return Outcome(
            item=number,
            right=right,
            token_hits=tuple(top == token for top, token in zip(tops, reference.ids, strict=True)),
            agrees=tuple(top == dense.top for top, dense in zip(tops, reference.steps, strict=True)),
            kl=tuple(
                round(kl_divergence(dense, step), 7)
                for dense, step in zip(reference.steps, followed.steps, strict=True)
            ),
            f1=f1,
        )

    def _text(self, reply: list[int]) -> str:
        """The reply up to its end, which a server told to ignore ends goes beyond."""
        ends = [index for index, token in enumerate(reply) if token == self.tokenizer.eos_token_id]
        return self.tokenizer.decode(reply[: ends[0]] if ends else reply, skip_special_tokens=True)


def _side_by_side(conversation: Callable[[int], list[Outcome]], count: int) -> list[Outcome]:
    with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
        return [outcome for outcomes in pool.map(conversation, range(count)) for outcome in outcomes]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, question: Question) -> list[int]:
    """The prompt as the chat endpoint would build it, and the given beginning of the reply."""
    if question.complete is not None:
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return bos + tokenizer.encode(question.complete, add_special_tokens=False)
    ids = tokenizer.apply_chat_template(
        list(question.messages), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return ids + tokenizer.encode(question.prefix, add_special_tokens=False)


def expected_ids(tokenizer: PreTrainedTokenizerBase, question: Question) -> list[int] | None:
    """The answer that is scored token by token; None where there is none but the dense cache's own reply."""
    if question.answer is None:
        return None
    return tokenizer.encode(question.answer, add_special_tokens=False)


def follow(endpoint: Endpoint, prompt: list[int], expected: list[int], reply_tokens: int = 0) -> Followed:
    """Next-token distributions before each token of `expected`, all made by the server's own decoding.

    The reply has at least `reply_tokens` tokens.
    """
    first = generated = endpoint.generate(
        prompt, max_new_tokens=max(len(expected), reply_tokens), top_logprobs=TOP_LOGPROBS
    )
    steps: list[NextToken] = []
    while True:
        for token, step in zip(generated.ids, generated.steps, strict=True):
            steps.append(step)
            if len(steps) == len(expected):
                return Followed(first.ids, steps, first.cached_tokens)
            if token != expected[len(steps) - 1]:
                break
        done = len(steps)
        generated = endpoint.generate(
            prompt + expected[:done], max_new_tokens=len(expected) - done, top_logprobs=TOP_LOGPROBS
        )
