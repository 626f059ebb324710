"""Kinds of damaged input, the commands that meet it, and the good files to damage."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from command import done, text_file, tiny
from safetensors.torch import load_file
from tiny_models import tiny_model

from fuzz.mutations import DONE, REFUSED, Damage, damage_text, mutate_json, replace_by_other_kind
from fuzz.settings import RECIPE, option, recipe
from fuzz.tensor_files import mutate_file, mutate_header, mutate_values

Words = tuple[str, ...]

TEXT: Words = ("--dataset", "text.txt", "--seq-len", "16")
SMALL: Words = (*TEXT, "--samples", "2")
SCHEME: Words = ("--scheme", "w4a16-g32", "--out", "out")
RTN: Words = ("quantize", "model", "--method", "rtn", *SCHEME)
GPTQ: Words = ("quantize", "model", "--method", "gptq", *SCHEME, *SMALL)
EVAL: Words = ("eval", "model", *TEXT, "--max-windows", "2")
GENERATE: Words = ("generate", "model", "--prompt", "12 is", "--max-new-tokens", "2", "--dtype", "float32")
FORMATS = ("native", "compressed-tensors", "gptq", "awq")
COMPARED = ("native", "awq")
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}


@dataclass(frozen=True)
class Kind:
    """One kind of damage.

    Attributes:
        commands: one of them is run, in the folder of the case; all succeed on undamaged files.
        damage: changes the files of a case, for a command, and says how it has to end; may change the command.
        certain: commands by their first word that look at everything: they must refuse what is known to be wrong.
    """

    commands: tuple[Words, ...]
    damage: Callable[[Path, random.Random, Words], tuple[Damage, Words]]
    certain: tuple[str, ...] = ("quantize", "export")

    def case(self, place: Path, rng: random.Random) -> tuple[Damage, Words, Words]:
        """Damage ``place``: what was done, the command, and the undamaged command."""
        chosen = rng.choice(self.commands)
        damage, words = self.damage(place, rng, chosen)
        if damage.known == REFUSED and words[0] not in self.certain:
            damage = Damage(damage.what)
        return damage, words, chosen


def make_bases(folder: Path) -> None:
    """Good files to damage: a model in one file and in several, quantized in every format, a sparse one."""
    text_file(folder / "text.txt")
    (folder / "rows.jsonl").write_text('{"text": "one two three"}\n' * 40)
    (folder / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "say 12 and 13"}]}\n' * 40)
    (folder / "recipe.toml").write_text(RECIPE)
    model = tiny(folder / "model", **SIZES)
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    )
    shutil.copytree(model, folder / "shards")
    (folder / "shards" / "model.safetensors").unlink()
    whole = tiny_model("llama", vocab_size=load_file(model / "model.safetensors")["lm_head.weight"].shape[0], **SIZES)
    whole.save_pretrained(folder / "shards", max_shard_size="40KB")
    for name in FORMATS:
        words = ["quantize", model, "--method", "rtn", "--scheme", "w4a16-g32", "--format", name]
        scored = ["--eval", folder / "text.txt", "--seq-len", "16", "--eval-windows", "2"]
        done(*words, *(scored if name in COMPARED else []), "--out", folder / name)
    done("quantize", model, "--method", "rtn", "--scheme", "q4_0", "--format", "gguf", "--out", folder / "model.gguf")
    sparse = ["sparsify", model, "--method", "teal", "--target", "0.5", "--out", folder / "sparse"]
    done(*sparse, "--samples", "64", "--seq-len", "16", "--dataset", folder / "text.txt")


def copy_bases(bases: Path, place: Path, words: Words, with_interrupted: bool) -> None:
    """Fresh files for a case: what its command names. An interrupted run lies only where it is damaged: elsewhere
    every run would be refused because of it, whatever else is wrong."""
    place.mkdir()
    names = {words[1], *words, *(["out.partial"] if with_interrupted else [])}
    for path in bases.iterdir():
        if path.name in names:
            shutil.copytree(path, place / path.name) if path.is_dir() else shutil.copy(path, place)


def in_model(
    name: str, mutate: Callable[[Path, random.Random], Damage]
) -> Callable[[Path, random.Random, Words], tuple[Damage, Words]]:
    """Damage to one file of the folder that the command names."""

    def damage(place: Path, rng: random.Random, words: Words) -> tuple[Damage, Words]:
        return mutate(place / words[1] / name, rng), words

    return damage


def small_file(place: Path, rng: random.Random, words: Words) -> tuple[Damage, Words]:
    """Any of the small files, of another kind, or with another content."""
    path = rng.choice(sorted(p for p in (place / words[1]).iterdir() if p.suffix == ".json"))
    if rng.random() < 0.5:
        return Damage(replace_by_other_kind(path, rng).what), words
    return Damage(mutate_json(path, rng).what), words


def config(path: Path, rng: random.Random) -> Damage:
    if rng.random() < 0.25:
        return replace_by_other_kind(path, rng)
    return mutate_json(path, rng)


def index(place: Path, rng: random.Random, words: Words) -> tuple[Damage, Words]:
    """The index of a sharded checkpoint, or one of its files."""
    folder = place / words[1]
    path = folder / "model.safetensors.index.json"
    shards = sorted(folder.glob("model-*.safetensors"))
    kind = rng.choice(("json", "json", "gone", "exchanged", "twice", "inside"))
    if kind == "json":
        return mutate_json(path, rng), words
    if kind == "gone":
        return replace_by_other_kind(rng.choice(shards), rng), words
    if kind == "exchanged":
        first, second = rng.sample(shards, 2)
        first.rename(folder / "other")
        second.rename(first)
        (folder / "other").rename(second)
        return Damage("two shards exchanged", DONE, same=True), words
    if kind == "twice":
        rng.choice(shards).write_bytes(rng.choice(shards).read_bytes())
        return Damage("one shard over another"), words
    return mutate_file(rng.choice(shards), rng), words


def quantized(place: Path, rng: random.Random, words: Words) -> tuple[Damage, Words]:
    """A quantized folder: its description, its headers, or its values."""
    folder = place / words[1]
    if rng.random() < 0.4:
        return mutate_json(folder / "config.json", rng, within=("quantization_config",)), words
    return mutate_file(folder / "model.safetensors", rng), words


def gguf(place: Path, rng: random.Random, words: Words) -> tuple[Damage, Words]:
    """A GGUF file: one byte of what describes it, one of its tensors, its end."""
    path = place / words[1]
    data = bytearray(path.read_bytes())
    kind = rng.choice(("byte", "byte", "byte", "cut", "tail", "number", "text"))
    if kind == "text":
        return damage_text(path, rng), words
    if kind == "cut":
        data = data[: rng.randrange(len(data))]
    elif kind == "tail":
        data[rng.randrange(len(data) // 2, len(data))] ^= 1 << rng.randrange(8)
    elif kind == "number":
        at = rng.randrange(0, 1000, 4)
        data[at : at + 8] = rng.choice((0, 1, 2**31, 2**63, 2**64 - 1)).to_bytes(8, "little")
    else:
        data[rng.randrange(rng.choice((64, 1000, 12000)))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))
    return Damage(f"model.gguf: {kind}"), words


def sparse(place: Path, rng: random.Random, words: Words) -> tuple[Damage, Words]:
    if rng.random() < 0.5:
        return mutate_json(place / "sparse" / "sparsity.json", rng), words
    return mutate_file(place / "sparse" / "sparsity.safetensors", rng), words


def record(place: Path, rng: random.Random, words: Words) -> tuple[Damage, Words]:
    """The record of a run, as pages and tables read it."""
    return mutate_json(place / words[1] / "report.json", rng), words


def data(place: Path, rng: random.Random, words: Words) -> tuple[Damage, Words]:
    """The calibration text: of another kind, damaged, or only a little different."""
    path = place / next(word for word in words if word.endswith((".txt", ".jsonl")))
    kind = rng.choice(("kind", "damage", "letter", "letter", "line", "value", "ends"))
    if kind == "kind":
        return replace_by_other_kind(path, rng), words
    if kind == "damage":
        return damage_text(path, rng), words
    text = path.read_text()
    if kind == "letter":
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(("é", "\U0001f600", "\x00", "\u2028", "", "\t", '"', "x")) + text[at + 1 :]
    elif kind == "ends":
        text = text.replace("\n", rng.choice(("\r\n", "\n\n", "\r")))
    else:
        lines = text.split("\n")
        at = rng.randrange(len(lines))
        lines[at] = rng.choice(("", "{}", "[]", '{"text": 5}', '{"text": ""}', '{"text": "\\ud800"}', "null", "é" * 99))
        text = "\n".join(lines)
        if path.suffix == ".txt":
            text += "\n"
    path.write_text(text, encoding="utf-8")
    known = None if path.suffix == ".jsonl" or kind in ("line", "value") else DONE
    return Damage(f"{path.name}: {kind}", known), words


def committed(place: Path, rng: random.Random, words: Words) -> tuple[Damage, Words]:
    """DIR.partial of an interrupted run: the resumed run makes damaged blocks again, or is refused because it would be
    another run; it never ends in other bytes."""
    partial = place / "out.partial"
    target = rng.choice([*sorted((partial / "blocks").iterdir()), partial / "plan.json"])
    kind = rng.choice(("inside", "inside", "inside", "kind", "stranger", "exchanged"))
    if kind == "kind" and target.name != "plan.json":
        what = replace_by_other_kind(target, rng).what
    elif kind == "stranger":
        path = rng.choice((partial, partial / "blocks")) / rng.choice(
            ("notes.txt", "model.safetensors", "block-00001.safetensors", "block-00009.json", "report.json", ".hidden")
        )
        if not path.exists():
            path.mkdir() if rng.random() < 0.3 else path.write_bytes(rng.randbytes(40))
        what = f"{path.name} beside it"
    elif kind == "exchanged" and target.suffix == ".safetensors":
        target.write_bytes((place / "model" / "model.safetensors").read_bytes())
        what = f"another file as {target.name}"
    elif target.suffix == ".json":
        before = target.read_bytes()
        damage = mutate_json(target, rng)
        if target.name == "plan.json":
            known = None if "plan.json: bytes" in damage.what else DONE if _same_json(before, target) else REFUSED
            return Damage(damage.what, known, same=True), words
        what = damage.what
    else:
        what = rng.choice((mutate_header, mutate_values))(target, rng).what
    return Damage(what, DONE, same=True), words


def _same_json(before: bytes, path: Path) -> bool:
    """Whether a file says what it said, however it is laid out."""
    try:
        return bool(json.loads(before) == json.loads(path.read_bytes()))
    except ValueError:
        return False


def nudged_tensors(path: Path, rng: random.Random) -> Damage:
    """For the config of a quantized folder: a value outside its quantization."""
    return mutate_json(path, rng)


def _on(name: str, *commands: Words) -> tuple[Words, ...]:
    """The same commands on another folder."""
    return tuple((words[0], name, *words[2:]) for words in commands)


def _exports(name: str) -> tuple[Words, ...]:
    return (("export", name, "--format", "native", "--out", "out"), *_on(name, EVAL), ("inspect", name))


NATIVE_FILE = "model.safetensors"
KINDS: dict[str, Kind] = {
    "header": Kind((RTN, RTN, EVAL), in_model(NATIVE_FILE, mutate_header)),
    "values": Kind((RTN, RTN, GPTQ, EVAL), in_model(NATIVE_FILE, mutate_file)),
    "config": Kind((RTN, RTN, EVAL, ("inspect", "model")), in_model("config.json", config)),
    "tokenizer": Kind((GPTQ, EVAL, GENERATE), in_model("tokenizer.json", mutate_json)),
    "small file": Kind((RTN, EVAL, GENERATE), small_file),
    "index": Kind(_on("shards", RTN, RTN, EVAL), index),
    "quantized": Kind(tuple(words for name in FORMATS for words in _exports(name)), quantized),
    "quantized config": Kind(tuple(w for n in FORMATS for w in _exports(n)), in_model("config.json", nudged_tensors)),
    "gguf": Kind(_on("model.gguf", RTN, ("inspect", "model.gguf")), gguf, certain=()),
    "sparse": Kind(_on("sparse", EVAL, GENERATE), sparse, certain=("eval", "generate")),
    "record": Kind((("compare", *COMPARED), ("inspect", "native")), record),
    "recipe": Kind((("quantize", "model", "--recipe", "recipe.toml", "--out", "out", *SMALL),), recipe),
    "option": Kind((RTN, GPTQ, EVAL, GENERATE), option, certain=("quantize", "eval", "generate")),
    "data": Kind(
        (
            GPTQ,
            EVAL,
            *(tuple(f"{kind}.jsonl" if w == "text.txt" else w for w in GPTQ) for kind in ("rows", "chats")),
        ),
        data,
        certain=("quantize", "eval"),
    ),
    "committed": Kind(((*GPTQ, "--resume"),), committed),
}
