"""Trains the bundled recall model from nothing, on one CPU core, and writes `examples/recall-model`.

python scripts/train_recall_model.py                    # the committed weights
python scripts/train_recall_model.py --resume           # go on after an interruption
python scripts/train_recall_model.py --evaluate-only    # the table of the model card
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from recall_training.batches import batch_loss, make_batch
from recall_training.build_tokenizer import build_tokenizer
from recall_training.evaluate import evaluate, markdown_table
from recall_training.export import export_model, load_exported
from recall_training.schedule import CURRICULUM, Optimisers, rate_at, scaled, stage_at, total_steps
from recall_training.structured_init import recall_config, structured_model

MODEL_DIRECTORY = Path(__file__).resolve().parents[1] / "examples" / "recall-model"
CHECKPOINT = Path(tempfile.gettempdir()) / "recall-model.pt"
MAX_LENGTH = 4096
"""Twice the longest training sequences: recall was measured to hold that far."""
VOCAB_MULTIPLE = 64
GRADIENT_NORM = 1.0
LOG_EVERY = 20
SAVE_EVERY = 100

log = logging.getLogger("train_recall_model")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=MODEL_DIRECTORY, help="model directory")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="state to resume from")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the data")
    parser.add_argument(
        "--steps", type=int, default=total_steps(CURRICULUM), help="total; stages are shortened in proportion"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    parser.add_argument("--evaluate-only", action="store_true", help="score the model in --out and stop")
    parser.add_argument("--items", type=int, default=50, help="evaluation items per task, form and length")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1000, 2000], help="evaluated lengths")
    return parser.parse_args()


def train(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Runs the curriculum, from the checkpoint if asked to, and saves one every `SAVE_EVERY` steps."""
    seed, curriculum = arguments.seed, scaled(CURRICULUM, arguments.steps)
    vocab_size = -(-len(tokenizer) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    model = structured_model(recall_config(tokenizer, vocab_size, MAX_LENGTH), seed)
    optimisers = Optimisers(model)
    first_step = 0
    if arguments.resume:
        state = torch.load(arguments.checkpoint)
        model.load_state_dict(state["model"])
        optimisers.load_state_dict(state["optimisers"])
        first_step = state["step"]

    started = time.monotonic()
    for step in range(first_step, arguments.steps):
        stage = stage_at(curriculum, step)
        loss, accuracy = batch_loss(model, make_batch(tokenizer, stage, seed, step), seed, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        optimisers.step(rate_at(curriculum, step))
        done = step + 1
        if done % LOG_EVERY == 0:
            log.info(
                "step %4d/%d  length %4d  loss %.3f  answer tokens %.3f  %4.0f s",
                done, arguments.steps, stage.length, loss.item(), accuracy, time.monotonic() - started,
            )  # fmt: skip
        if done % SAVE_EVERY == 0 or done == arguments.steps:
            state = {"model": model.state_dict(), "optimisers": optimisers.state_dict(), "step": done}
            torch.save(state, arguments.checkpoint)
    return model


def main() -> None:
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(1)
    tokenizer = build_tokenizer(MAX_LENGTH)
    if not arguments.evaluate_only:
        export_model(train(arguments, tokenizer), tokenizer, arguments.out)
    model = load_exported(arguments.out)
    scores = []
    for score in evaluate(model, tokenizer, arguments.lengths, arguments.items):
        log.info("%s %s %d: exact match %.3f", score.task.name, score.form, score.length, score.exact_match)
        scores.append(score)
    print(markdown_table(scores))


if __name__ == "__main__":
    main()
