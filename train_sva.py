"""Train an LSTM or a Transformer on English subject-verb agreement, alone or on a teacher's soft labels.

    python train_sva.py --student transformer-seq                                   # no distillation
    python train_sva.py --teacher lstm --student transformer-seq --kd               # distillation
    python train_sva.py --teacher lstm --student transformer-seq --kd --objective lm  # as language models

"The keys near the cabinet ..." is or are? The number of the subject decides, not that of the nouns in between (the
attractors). Training sentences are mostly simple; the test has up to four attractors and more, so it asks for the
inductive bias. Every run leaves run.json, outputs.npz and model.pt in runs/sva-<data>/<run name>/seed<k>/
(runs/sva-lm-<data> for language models). After Abnar, Dehghani & Zuidema 2020 (arXiv 2006.00555).
"""

import argparse
import gzip
import io
import itertools
import json
import random
import sys
import time
import zlib
from array import array
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import common

# The same recipe for every setup of a model, distilled or not. Chosen on sentences of another seed of the grammar.
RECIPES = {"classification": {"lstm": {"epochs": 12, "batch_size": 128, "lr": 3e-3, "weight_decay": 0.01},
                              "transformer": {"epochs": 12, "batch_size": 128, "lr": 1e-3, "weight_decay": 0.01}},
           "lm": {"lstm": {"epochs": 12, "batch_size": 32, "lr": 6e-3, "weight_decay": 0.01},
                  "transformer": {"epochs": 12, "batch_size": 64, "lr": 2e-3, "weight_decay": 0.01}}}
TEMPERATURE = {"classification": 2.0, "lm": 1.0}
VOCABULARY_SIZE = 10_000
PAD, UNKNOWN, START, END = range(4)  # token numbers; the words' numbers follow
MOST_ATTRACTORS, LONGEST_DISTANCE = 4, 16  # the groups of A-accuracy (4 means 4 and more) and D-accuracy
LONGEST_SENTENCE = 254  # words; longer ones are left out
PIECE = 1024  # answers whose logits are computed at a time
PROBE_SIZE = 1000  # test sentences whose representations are kept


# ----------------------------------------------------------------------------------------------------------------------
# Models: tokens (n, length), 0 is padding on the right, and lengths (n,) -> states (n, length, width);
# `represent` picks the state the answer is read from, `head` is the last linear layer.


class LSTM(nn.Module):
    """Embedding, two LSTM layers, linear head. Reads from left to right, so padding on the right changes nothing."""

    def __init__(self, vocabulary, outputs, width, dropout=0.25):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=PAD)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True, dropout=dropout)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, outputs)

    def states(self, tokens, lengths):
        return self.drop(self.lstm(self.drop(self.embedding(tokens)))[0])

    def represent(self, tokens, lengths):
        return state_at(self.states(tokens, lengths), lengths - 1)


class Block(nn.Module):
    """One pre-norm Transformer layer (Vaswani et al. 2017; Xiong et al. 2020, arXiv 2002.04745, for the order)."""

    def __init__(self, width, heads=4, dropout=0.1):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x, mask):
        n, length, width = x.shape
        qkv = self.queries_keys_values(self.norm_attention(x)).view(n, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (n, heads, length, width / heads) each
        # No mask: causal, and then padding on the right is never looked at by the words before it.
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                                  dropout_p=self.dropout if self.training else 0.0)
        x = x + self.drop(self.project(attended.transpose(1, 2).reshape(n, length, width)))
        return x + self.drop(self.mlp(self.norm_mlp(x)))


class Transformer(nn.Module):
    """Pre-norm Transformer with learned positions.

    causal: words see what comes before them, the answer is read at the last word (Transformer-seq); else words see
    both sides and the answer is read at a class token put in front. shared: one layer's weights at every depth, told
    apart by a learned embedding of the depth (Universal Transformer, Dehghani et al. 2019, arXiv 1807.03819, sec. 2.1).
    """

    def __init__(self, vocabulary, outputs, width, layers=3, causal=True, shared=False,
                 longest=LONGEST_SENTENCE + 2):
        super().__init__()
        self.causal, self.layers = causal, layers
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=PAD)
        self.position = nn.Embedding(longest, width)
        self.depth = nn.Embedding(layers, width) if shared else None
        self.class_token = None if causal else nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList([Block(width) for _ in range(1 if shared else layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)
        for embedding in (self.embedding, self.position, self.depth):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.1)

    def states(self, tokens, lengths):
        x = self.embedding(tokens)
        mask = None
        if not self.causal:
            x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)
            mask = torch.arange(x.shape[1], device=x.device) <= lengths[:, None]  # the class token and the words
            mask = mask[:, None, None]  # (n, heads, queries, keys)
        x = x + self.position.weight[:x.shape[1]]
        for layer in range(self.layers):
            if self.depth is not None:
                x = x + self.depth.weight[layer]
            x = self.blocks[layer % len(self.blocks)](x, mask)
        return self.norm(x)

    def represent(self, tokens, lengths):
        return state_at(self.states(tokens, lengths), lengths - 1 if self.causal else torch.zeros_like(lengths))


def state_at(states, positions):
    """states (n, length, width), positions (n,) -> (n, width)."""
    return states[torch.arange(len(states), device=states.device), positions]


MODELS = {"lstm": lambda *sizes: LSTM(*sizes, width=128),
          "transformer": lambda *sizes: Transformer(*sizes, width=96, causal=False),
          "transformer-seq": lambda *sizes: Transformer(*sizes, width=96),
          "ut-seq": lambda *sizes: Transformer(*sizes, width=160, shared=True),
          "lstm-small": lambda *sizes: LSTM(*sizes, width=64),
          "transformer-seq-small": lambda *sizes: Transformer(*sizes, width=48)}


def build_model(name, seed, words, objective):
    """A new model for a vocabulary of `words`, whose initial weights depend on (name, seed) and the sizes alone."""
    common.seed_everything(seed)
    tokens = words + END + 1
    return MODELS[name](tokens, tokens if objective == "lm" else 2)


# ----------------------------------------------------------------------------------------------------------------------
# Sentences


class Sentence(NamedTuple):
    """text: the words, separated by spaces. verb: its index. forms: the verb's singular and plural, None if unknown.

    attractors: nouns of the other number between subject and verb. distance: words from the subject to the verb.
    Both are -1 where unknown.
    """

    text: str
    verb: int
    plural: bool
    attractors: int
    distance: int
    forms: tuple


def before_verb(sentence):
    return tuple(sentence.text.split()[:sentence.verb])


# ----------------------------------------------------------------------------------------------------------------------
# Synthetic sentences. Number shows in the word alone: a noun with -s is plural, a verb with -s is singular.

NOUNS = ("dog cat boy girl teacher student doctor nurse farmer pilot author singer painter driver guard king queen "
         "actor lawyer banker baker hunter sailor soldier tourist visitor worker player coach judge key cup car house "
         "table book picture letter tree river road bridge garden window door ship train machine engine lamp song "
         "report plan idea law rule answer question building school").split()
INTRANSITIVE = "run sleep laugh work wait arrive smile fall sing stay move return".split()
TRANSITIVE = "see like know help follow visit admire avoid call want need remember chase praise".split()
THINKING = "think say know believe hope claim".split()
ADJECTIVES = "old young big small red tall famous quiet new strange kind happy".split()
PREPOSITIONS = "near behind with beside under above from around for against".split()
ADVERBS = "today often here there again now slowly quickly outside inside".split()


class Grammar:
    """Sentences with a hierarchical subject, from a small probabilistic grammar (DESIGN.md, section 5).

        sentence -> [preposition nouns ,] [nouns think that] SUBJECT VERB [nouns] [adverb] .
        nouns    -> the [adjective] noun [preposition nouns | that verb nouns | that nouns verb] [and the noun]

    front, embed: how often a phrase or an embedding comes first. modify: how often a noun is modified; that falls by
    the factor `decay` with each level of depth. alike: how often a noun has the number of the noun it depends on, as
    nouns of one text often do: deep sentences without an attractor. slip: how often a verb disagrees with its own
    subject, as in real text, where writers and parsers err; it is 0 in the test.
    """

    def __init__(self, seed, front, embed, modify, decay, alike, slip):
        self.random, self.front, self.embed, self.modify, self.decay = random.Random(seed), front, embed, modify, decay
        self.alike, self.slip = alike, slip

    def pick(self, words):
        return self.random.choices(words, weights=ZIPF[:len(words)])[0]

    def coin(self, probability=0.5):
        return self.random.random() < probability

    def noun(self, plural):
        return self.pick(NOUNS) + ("s" if plural else "")

    def verb(self, words, plural):
        return self.pick(words) + ("" if plural != self.coin(self.slip) else "s")

    def nouns(self, plural, modify):
        """-> (words of a noun phrase whose head has that number, index of the head)."""
        words = ["the"] + ([self.pick(ADJECTIVES)] if self.coin(0.2) else []) + [self.noun(plural)]
        head = len(words) - 1
        if self.coin(modify):
            kind, deeper = self.random.random(), modify * self.decay
            if kind < 0.5:
                words += [self.pick(PREPOSITIONS), *self.distractor(plural, deeper)]
            elif kind < 0.75:
                words += ["that", self.verb(TRANSITIVE, plural), *self.distractor(plural, deeper)]
            else:
                other = plural == self.coin(self.alike)
                words += ["that", *self.nouns(other, 0.6 * deeper)[0], self.verb(TRANSITIVE, other)]
        return words, head

    def distractor(self, plural, modify):
        """-> words of a noun phrase below a noun of that number, now and then with a second noun joined by "and"."""
        other = plural == self.coin(self.alike)
        words, _ = self.nouns(other, modify)
        return words + (["and", "the", self.noun(other == self.coin(self.alike))] if self.coin(0.1) else [])

    def sentence(self):
        """-> (words, index of the subject's head, index of the verb, whether the head is plural)."""
        words, plural = [], self.coin()
        if self.coin(self.front):
            words += [self.pick(PREPOSITIONS), *self.distractor(plural, 0.4 * self.modify), ","]
        if self.coin(self.embed):
            other = plural == self.coin(self.alike)
            words += [*self.nouns(other, 0.3 * self.modify)[0], self.verb(THINKING, other), "that"]
        subject, head = self.nouns(plural, self.modify)
        head += len(words)
        words += subject
        verb = len(words)
        if self.coin(0.4):
            words += [self.verb(TRANSITIVE, plural), *self.distractor(plural, 0.15)]
        else:
            words += [self.verb(INTRANSITIVE, plural)]
        return words + ([self.pick(ADVERBS)] if self.coin(0.4) else []) + ["."], head, verb, plural


ZIPF = [1 / (rank + 3) for rank in range(len(NOUNS))]
TRAIN_GRAMMAR = {"front": 0.3, "embed": 0.3, "modify": 0.7, "decay": 0.8, "alike": 0.85, "slip": 0.1}
TEST_GRAMMAR = {"front": 0.4, "embed": 0.4, "modify": 0.9, "decay": 0.9, "alike": 0.5, "slip": 0.0}


def synthetic_sentences(examples, seed=0):
    """{"train", "validation", "test": [Sentence]}: mostly easy training sentences, a test balanced over attractors.

    The label is the number the verb shows. `examples` training sentences, a tenth of that for validation and half of it
    in the test: 0, 1, 2, 3 and 4 or more attractors in equal parts, never a training sentence's words before the verb.
    """
    number_of = {noun: False for noun in NOUNS} | {noun + "s": True for noun in NOUNS}

    def draw(grammar):
        words, head, verb, plural = grammar.sentence()
        attractors = sum(number_of[word] != plural for word in words[head + 1:verb] if word in number_of)
        lemma = words[verb].removesuffix("s")
        return Sentence(" ".join(words), verb, words[verb] == lemma, attractors, verb - head, (lemma + "s", lemma))

    easy, deep = Grammar(seed, **TRAIN_GRAMMAR), Grammar(seed + 1, **TEST_GRAMMAR)
    train = [draw(easy) for _ in range(examples)]
    seen = {before_verb(sentence) for sentence in train}
    validation = [draw(easy) for _ in range(examples // 10)]
    groups = {attractors: [] for attractors in range(MOST_ATTRACTORS + 1)}
    wanted = max(1, examples // 10)
    while any(len(group) < wanted for group in groups.values()):
        sentence = draw(deep)
        group = groups[min(sentence.attractors, MOST_ATTRACTORS)]
        if len(group) < wanted and before_verb(sentence) not in seen:
            group.append(sentence)
            seen.add(before_verb(sentence))
    return {"train": train, "validation": validation, "test": list(itertools.chain(*groups.values()))}


# Real sentences: Linzen, Dupoux & Goldberg 2016 (arXiv 1611.01368), in either layout

WHERE = "see Data in the README for where to get it"


def read_lines(path):
    """The lines of a text or .gz file, UTF-8; UserError with the line number where it can't be decoded."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", errors="strict") as file:
            number = 0
            for number, line in enumerate(file, 1):
                yield number, line.rstrip("\n")
        if number == 0:
            raise common.UserError(f"{path} is empty; {WHERE}")
    except UnicodeDecodeError:
        raise common.UserError(f"{path}, after line {number}: not UTF-8; {WHERE}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise common.UserError(f"{path} can't be read ({error}); {WHERE}") from None


def read_before_verbs(path, attractors):
    """numpred.*: a line is VBZ or VBP, a tab, the words before the verb. The tag stands for the verb."""
    sentences = []
    for number, line in read_lines(path):
        tag, tab, words = line.partition("\t")
        if tag not in ("VBZ", "VBP") or not words.strip():
            raise common.UserError(f"{path}, line {number}: expected VBZ or VBP, a tab and words, not {line[:40]!r}")
        sentences.append(Sentence(f"{words} {tag}", len(words.split()), tag == "VBP", attractors, -1, ("VBZ", "VBP")))
    return sentences


def counterpart(verb, plural, vocabulary):
    """The other number's form of `verb`, if it is in the vocabulary; else None."""
    irregular = {"is": "are", "has": "have", "was": "were", "does": "do"}
    if plural:
        candidates = [singular for singular, form in irregular.items() if form == verb] or [
            verb + "s", verb + "es", verb[:-1] + "ies"]
    else:
        candidates = [irregular[verb]] if verb in irregular else [verb[:-1], verb[:-2], verb[:-3] + "y"]
    return next((form for form in candidates if form in vocabulary), None)


TABLE_COLUMNS = ("sentence", "verb_pos", "verb_index", "n_diff_intervening", "distance")


def read_table(path):
    """agr_50_mostcommon_10K.tsv(.gz): a head line naming the columns, full sentences, indices from 1."""
    lines = read_lines(path)
    columns = next(lines)[1].split("\t")
    if missing := [name for name in TABLE_COLUMNS if name not in columns]:
        raise common.UserError(f"{path}, line 1: no column {', '.join(missing)}; {WHERE}")
    at = [columns.index(name) for name in TABLE_COLUMNS]
    sentences = []
    for number, line in lines:
        fields = line.split("\t")
        try:
            text, tag, verb, attractors, distance = (fields[column] for column in at)
            words = text.split()
            verb = int(verb) - 1
            if tag not in ("VBZ", "VBP") or not 0 < verb < len(words):
                raise ValueError
            forms = (words[verb], None) if tag == "VBZ" else (None, words[verb])
            sentences.append(Sentence(text, verb, tag == "VBP", int(attractors), int(distance), forms))
        except (ValueError, IndexError):
            raise common.UserError(f"{path}, line {number}: not a sentence of this table: {line[:40]!r}") from None
    # Shuffled once, 10 % for training and 1 % for validation, as the paper had it.
    random.Random(0).shuffle(sentences)
    tenth, hundredth = len(sentences) // 10, max(1, len(sentences) // 100)
    return {"train": sentences[:tenth], "validation": sentences[tenth:tenth + hundredth],
            "test": sentences[tenth + hundredth:]}


def find_linzen(folder):
    """-> the files of the layout that is in `folder` (the table, or numpred.*), an empty list if there is none."""
    tables = [folder / f"agr_50_mostcommon_10K.tsv{suffix}" for suffix in ("", ".gz")]
    return [path for path in tables if path.is_file()][:1] or sorted(folder.glob("numpred.*"))


def read_linzen(files):
    """-> ({"train", "validation", "test": [Sentence]}, lines that say what was missing and what was done about it)."""
    if not files[0].name.startswith("numpred."):
        return read_table(files[0]), []
    found, notes = {path.name: path for path in files}, []
    if "numpred.train" not in found:
        raise common.UserError(f"{files[0].parent} has no numpred.train, so there is nothing to train on; {WHERE}")
    train = read_before_verbs(found["numpred.train"], -1)
    if "numpred.val" in found:
        validation = read_before_verbs(found["numpred.val"], -1)
    else:
        random.Random(0).shuffle(train)
        held_out = max(1, len(train) // 20)
        train, validation = train[held_out:], train[:held_out]
        notes.append("numpred.val is missing: a twentieth of numpred.train validates instead")
    tests = [f"numpred.test.{attractors}" for attractors in range(6)]
    if missing := [name for name in tests if name not in found]:
        notes.append(f"{', '.join(missing)} missing: no figures for that number of attractors")
    test = [sentence for name in tests if name in found for sentence in read_before_verbs(found[name], int(name[-1]))]
    if not test:
        raise common.UserError(f"{files[0].parent} has no numpred.test.0 .. .5, so there is nothing to test; {WHERE}")
    return {"train": train, "validation": validation, "test": test}, notes


# ----------------------------------------------------------------------------------------------------------------------
# Tensors: all sentences of a split end to end in one row of tokens


class Split(NamedTuple):
    """tokens: (all words,) int32. The rest is (sentences,) int64, `forms` (sentences, 2): the verb's token numbers.

    starts and lengths stay on the CPU, so that asking for a batch's longest sentence doesn't make a GPU wait.
    """

    tokens: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    verb: torch.Tensor
    labels: torch.Tensor  # 0 singular, 1 plural
    attractors: torch.Tensor
    distance: torch.Tensor
    forms: torch.Tensor

    def batch(self, sentences):
        """sentences: (n,) int64 on the CPU -> tokens (n, longest), 0 on the right, and lengths (n,), on the device."""
        device, lengths = self.tokens.device, self.lengths[sentences]
        position = torch.arange(int(lengths.max()), device=device)
        starts, lengths = self.starts[sentences].to(device), lengths.to(device)
        inside = position < lengths[:, None]
        return self.tokens[(starts[:, None] + position) * inside].long() * inside, lengths

    def to(self, device):
        return Split(*(t if name in ("starts", "lengths") else t.to(device) for name, t in self._asdict().items()))


def make_vocabulary(sentences):
    """{word: token number} of the most frequent words of the training sentences."""
    counts = Counter(itertools.chain.from_iterable(sentence.text.split() for sentence in sentences))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[:VOCABULARY_SIZE]
    return {word: number for number, word in enumerate(ranked, END + 1)}


def encode(sentences, vocabulary, objective):
    """-> (Split, number of sentences left out: too long, or for a language model without the verb's other form).

    For classification the words before the verb; for a language model START, the whole sentence, END.
    """
    tokens, rows, left_out = array("i"), [], 0
    for sentence in sentences:
        words, forms = sentence.text.split(), sentence.forms
        if len(words) > LONGEST_SENTENCE:
            left_out += 1
            continue
        if objective == "lm":
            verb = words[sentence.verb]
            if None in forms:
                forms = [form or counterpart(verb, sentence.plural, vocabulary) for form in forms]
            if not all(form in vocabulary for form in forms):
                left_out += 1
                continue
        start = len(tokens)
        if objective == "lm":
            tokens.append(START)
            tokens.extend(vocabulary.get(word, UNKNOWN) for word in words)
            tokens.append(END)
        else:
            tokens.extend(vocabulary.get(word, UNKNOWN) for word in words[:sentence.verb])
        rows.append((start, len(tokens) - start, sentence.verb, sentence.plural, sentence.attractors,
                     sentence.distance, *(vocabulary.get(form, UNKNOWN) for form in forms)))
    columns = torch.tensor(rows, dtype=torch.long).reshape(-1, 8)
    return Split(torch.tensor(tokens, dtype=torch.int32), *columns[:, :6].T.contiguous(), columns[:, 6:]), left_out


def batches_by_length(lengths, batch_size, generator):
    """One epoch as a list of batches (batch_size,) of sentence numbers, each of similar lengths, in random order.

    The sentences are shuffled and cut into windows of 50 batches; within a window they are sorted by length, which
    leaves little padding and much chance. What doesn't fill a batch is left out before the sorting, so that chance
    decides what that is: after it, it would always be the longest sentences.
    """
    order = torch.randperm(len(lengths), generator=generator)
    order = order[:max(1, len(order) // batch_size) * batch_size]
    window = torch.arange(len(order)) // (50 * batch_size)
    order = order[torch.argsort(window * (int(lengths.max()) + 1) + lengths[order], stable=True)]
    batches = order.split(batch_size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


def make_data(source, files, args):
    """-> ({"train", "validation", "test", "probe": Split}, what is in them, notes for the reader).

    Real sentences, once read, are kept as tensors below --out; the copy is made anew when a file or a flag changes.
    """
    cache = None
    if source == "linzen":
        key = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
        key = json.dumps([key, args.objective, VOCABULARY_SIZE])
        cache = args.out / "cache" / f"sva-{args.objective}-{zlib.crc32(key.encode()):08x}.pt"
        if cache.is_file():
            try:
                kept = torch.load(cache, weights_only=True)
                if kept["key"] == key:
                    splits = {name: Split(*tensors).to(args.device) for name, tensors in kept["splits"].items()}
                    return splits, kept["described"], kept["notes"]
            except Exception:  # a damaged cache is no cache
                pass
        sentences, notes = read_linzen(files)
    else:
        sentences, notes = synthetic_sentences(args.examples), []
    vocabulary = make_vocabulary(sentences["train"])
    splits, left_out = {}, 0
    for name, part in sentences.items():
        splits[name], out = encode(part, vocabulary, args.objective)
        left_out += out
    if any(len(split.lengths) == 0 for split in splits.values()):
        empty = ", ".join(name for name, split in splits.items() if len(split.lengths) == 0)
        raise common.UserError(f"no sentence is left for {empty}; use more --examples or other files")
    if left_out:
        notes.append(f"{left_out:,} sentences left out: longer than {LONGEST_SENTENCE} words"
                     + " or without the verb's other form in the vocabulary" * (args.objective == "lm"))
    chosen = torch.randperm(len(splits["test"].lengths), generator=torch.Generator().manual_seed(0))[:PROBE_SIZE]
    splits["probe"] = Split(splits["test"].tokens, *(column[chosen] for column in splits["test"][1:]))
    described = {"source": source, **{name: len(split.lengths) for name, split in splits.items()},
                 "vocabulary": len(vocabulary), "left_out": left_out, "files": [path.name for path in files]}
    if cache is not None:
        kept = io.BytesIO()
        torch.save({"key": key, "splits": {name: tuple(split) for name, split in splits.items()},
                    "described": described, "notes": notes}, kept)
        common.write_files(cache.parent, {cache.name: kept.getbuffer()})
    return {name: split.to(args.device) for name, split in splits.items()}, described, notes


# ----------------------------------------------------------------------------------------------------------------------
# Training


def answer_states(model, tokens, lengths, objective):
    """What the last layer reads its answers from, (answers, width): one a sentence, or one a word to predict."""
    if objective == "classification":
        return model.represent(tokens, lengths)
    states = model.states(tokens[:, :-1], lengths - 1)
    return states[tokens[:, 1:] != PAD]  # padding is left out before the big product


@torch.no_grad()
def evaluate(model, split, objective, amp):
    """What `model`, in eval mode, says of every sentence, in the split's order, float32 on the CPU.

    -> logits (sentences, 2) of singular and plural (for a language model the log-probabilities of the verb's two
    forms), the states they were read from (sentences, width), and perplexity per word (None for a classifier).
    """
    device, was_training = split.tokens.device, model.training
    model.eval()
    order = split.lengths.argsort(stable=True)
    logits, representations, loss, words = [], [], 0.0, 0
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        for part in order.split(64):  # small, for little padding where there are few sentences
            tokens, lengths = split.batch(part)
            if objective == "lm":
                on_device = part.to(device)
                states = model.states(tokens[:, :-1], lengths - 1)
                real = tokens[:, 1:] != PAD
                for piece, next_words in zip(states[real].split(PIECE), tokens[:, 1:][real].split(PIECE)):
                    loss += F.cross_entropy(model.head(piece).float(), next_words, reduction="sum").double()
                words += int(real.sum())
                state = state_at(states, split.verb[on_device])
                at_verb = model.head(state).float().log_softmax(dim=-1)
                logits.append(at_verb.gather(1, split.forms[on_device]))
            else:
                state = model.represent(tokens, lengths)
                logits.append(model.head(state).float())
            representations.append(state.float())
    model.train(was_training)
    back = order.argsort()
    perplexity = torch.exp(loss / words).item() if objective == "lm" else None
    return torch.cat(logits).cpu()[back], torch.cat(representations).cpu()[back], perplexity


def agreement_metrics(logits, labels, attractors, distance):
    """Accuracy (micro), A-accuracy and D-accuracy, 0..1, with the groups behind them, ECE, NLL in nats, n.

    Abnar et al. 2020, sec. 3.1: A-accuracy is the mean of the accuracies at 0, 1, 2, 3 and 4 or more attractors,
    D-accuracy that over distances 1..16; groups without a sentence are left out; None where all are unknown.
    """
    correct = (logits.argmax(dim=1) == labels).double()

    def by_group(groups, first, last):
        return {str(group): correct[groups == group].mean().item()
                for group in range(first, last + 1) if (groups == group).any()}

    by_attractors = by_group(attractors.clamp(max=MOST_ATTRACTORS), 0, MOST_ATTRACTORS)
    by_distance = by_group(distance, 1, LONGEST_DISTANCE)

    def mean(groups):
        return sum(groups.values()) / len(groups) if groups else None

    return {**common.classification_metrics(logits, labels), "a_accuracy": mean(by_attractors),
            "d_accuracy": mean(by_distance), "accuracy_by_attractors": by_attractors or None,
            "accuracy_by_distance": by_distance or None}


def make_optimizer(model, recipe, steps):
    """AdamW and its one-cycle schedule over `steps` steps."""
    fused = next(model.parameters()).device.type != "mps"
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe["lr"], weight_decay=recipe["weight_decay"], fused=fused)
    steps = max(steps, 5)  # OneCycleLR divides by 0 where the first quarter is one step
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["lr"], total_steps=steps, pct_start=0.25)


def train(config, data, words, args, teacher_logits=None, teacher=None):
    """Train what `config` describes; -> (models, history, snapshots, timing), as in train_mnist.py.

    The offline teacher: for a classifier `teacher_logits` (sentences, 2), by sentence; for a language model, whose
    logits over the vocabulary would not fit, the `teacher` itself, asked batch by batch.
    """
    objective, split, device = config["objective"], data["train"], args.device
    models = {"student": build_model(config["student"], config["seed"], words, objective)}
    recipes = {"student": config}
    if config["kd"] == "online":
        models["teacher"] = build_model(config["teacher"], config["teacher_seed"], words, objective)
        recipes["teacher"] = {key.removeprefix("teacher_"): value for key, value in config.items()}
    steps = max(1, len(split.lengths) // config["batch_size"])
    optimizers = []
    for name, model in models.items():
        model.to(device).train()
        if args.compile:
            model.states = torch.compile(model.states, dynamic=True)
        optimizers.append(make_optimizer(model, recipes[name], config["epochs"] * steps))
    common.seed_everything(config["seed"])  # dropout
    order = torch.Generator().manual_seed(config["seed"])
    readers = models if teacher is None else models | {"teacher": teacher}

    def backward(batch):
        """Give the models the gradients of a batch's loss; -> the loss.

        The last layer sees PIECE answers at a time and gives back its gradient before the next piece comes, so that
        of a language model's (words, vocabulary) logits no more than a piece of student's and teacher's ever exists.
        """
        tokens, lengths = split.batch(batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            states = {name: answer_states(model, tokens, lengths, objective) for name, model in readers.items()}
        if objective == "lm":
            labels, soft_labels = tokens[:, 1:][tokens[:, 1:] != PAD], None
        else:
            labels = split.labels[batch.to(device)]
            soft_labels = None if teacher_logits is None else teacher_logits[batch.to(device)]
        leaves = {name: state.detach().requires_grad_(name in models) for name, state in states.items()}
        total = 0.0
        for first in range(0, len(labels), PIECE):
            piece = slice(first, first + PIECE)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                logits = {name: readers[name].head(leaf[piece]).float() for name, leaf in leaves.items()}
            if config["kd"] is None:
                loss = F.cross_entropy(logits["student"], labels[piece])
            else:
                soft = logits["teacher"] if soft_labels is None else soft_labels[piece]
                loss = common.kd_loss(logits["student"], soft, labels[piece], config["temperature"], config["alpha"])
            if config["kd"] == "online":  # reaches the teacher alone
                loss = loss + F.cross_entropy(logits["teacher"], labels[piece])
            loss = loss * (len(labels[piece]) / len(labels))
            loss.backward()
            total += loss.detach()
        torch.autograd.backward([states[name] for name in models], [leaves[name].grad for name in models])
        return total

    progress = common.Progress(config["epochs"], args.quiet)
    history, snapshots, training_seconds = [], {}, 0.0
    for epoch in range(config["epochs"] + 1):
        if epoch > 0:
            start, total_loss = time.perf_counter(), 0.0
            batches = batches_by_length(split.lengths, config["batch_size"], order)
            for done, batch in enumerate(batches, 1):
                for optimizer, _ in optimizers:
                    optimizer.zero_grad()
                loss = backward(batch)
                for model in models.values():
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimizer, schedule in optimizers:
                    optimizer.step()
                    schedule.step()
                total_loss += loss  # no .item(): it would make the device wait in every step
                progress.step(epoch, done, steps)
            mean_loss = float(total_loss) / steps
            seconds = time.perf_counter() - start
            training_seconds += seconds
            logits, _, _ = evaluate(models["student"], data["validation"], objective, args.amp)
            accuracy = (logits.argmax(dim=1) == data["validation"].labels.cpu()).float().mean().item()
            history.append({"epoch": epoch, "loss": mean_loss, "validation_accuracy": accuracy, "seconds": seconds})
            progress.epoch(epoch, mean_loss, accuracy, seconds)
            if not mean_loss < float("inf"):
                raise common.UserError(f"the loss is {mean_loss} in epoch {epoch}: nothing is kept; try a lower --lr")
        if epoch & (epoch - 1) == 0 or epoch == config["epochs"]:  # 0, 1, 2, 4, 8 ... and the last
            snapshots[epoch] = evaluate(models["student"], data["probe"], objective, args.amp)[1]
    tokens_seen = config["epochs"] * int(split.lengths.sum())
    return models, history, snapshots, {"training": training_seconds,
                                        "examples_per_second": config["epochs"] * len(split.lengths) / training_seconds,
                                        "tokens_per_second": tokens_seen / training_seconds}


def test_all(model, data, config, args):
    """-> ({"test": metrics}, arrays for outputs.npz)."""
    split = data["test"]
    logits, _, perplexity = evaluate(model, split, config["objective"], args.amp)
    labels, attractors, distance = split.labels.cpu(), split.attractors.cpu(), split.distance.cpu()
    metrics = agreement_metrics(logits, labels, attractors, distance)
    if perplexity is not None:
        metrics["perplexity"] = perplexity
    return {"test": metrics}, {"test_logits": logits, "test_labels": labels, "test_attractors": attractors,
                               "test_distance": distance}


def run(config, data, described, directory, args, timing, teacher_record=None, teacher_logits=None, teacher=None):
    """Train, test and save one run; -> its record, as in run.json."""
    if not args.quiet:
        print(f"\n{common.run_name(config)}, seed {config['seed']}: {config['epochs']} epochs of "
              f"{len(data['train'].lengths):,} sentences in batches of {config['batch_size']}")
    models, history, snapshots, training_timing = train(config, data, described["vocabulary"], args, teacher_logits,
                                                          teacher)
    start = time.perf_counter()
    metrics, outputs = test_all(models["student"], data, config, args)
    outputs |= {"probe_epochs": list(snapshots), "probe_representations": torch.stack(list(snapshots.values()))}
    record = {"config": config, "data": described,
              "environment": common.describe_environment(args.device, args.amp, args.compile),
              "parameters": {role: count_parameters(model) for role, model in models.items()},
              "history": history, "metrics": metrics}
    if config["kd"] == "online":
        record["teacher_metrics"], teacher_outputs = test_all(models["teacher"], data, config, args)
        outputs["teacher_test_logits"] = teacher_outputs["test_logits"]
    elif config["kd"] == "offline":
        record["teacher_metrics"] = teacher_record["metrics"]
        record["parameters"]["teacher"] = teacher_record["parameters"]["student"]
    record["timing"] = {**timing, **training_timing, "evaluation": time.perf_counter() - start}
    common.save_run(directory, record, outputs, models["student"].state_dict(), args.force)
    if not args.quiet:
        print(f"written to {directory}")
    return record


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def parse_arguments(argv):
    description, commands = __doc__.split("\n\n")[:2]
    parser = common.OneLineParser(description=description, epilog=f"examples:\n{commands}", allow_abbrev=False,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_shared_arguments(parser, list(MODELS), default_student="transformer-seq",
                                default_temperature="2, with --objective lm 1")
    parser.add_argument("--objective", choices=["classification", "lm"], default="classification",
                        help="the verb's number from the words before it, or the next word (default: %(default)s)")
    parser.add_argument("--data", choices=["auto", "linzen", "synthetic"], default="auto",
                        help="auto: the real sentences if they are in --data-dir, else sentences of a grammar")
    parser.add_argument("--examples", type=common.number(int, 50, 1_000_000), default=10_000,
                        help="synthetic training sentences (default: %(default)s)")
    args = parser.parse_args(argv)
    common.check_shared_arguments(parser, args, TEMPERATURE[args.objective])
    if args.objective == "lm" and "transformer" in (args.student, args.teacher):
        parser.error("transformer sees the words it would have to predict: --objective lm needs transformer-seq, "
                     "ut-seq or lstm")
    return args


def find_data(args):
    """-> (source, [files]): what --data asks for, UserError where it can't be had."""
    if args.data_dir is not None and not args.data_dir.is_dir():
        raise common.UserError(f"--data-dir {args.data_dir}: no such folder; make it, or leave the flag out")
    if args.data == "synthetic":
        return "synthetic", []
    folder = args.data_dir or Path("data")
    if files := find_linzen(folder):
        return "linzen", files
    missing = f"neither agr_50_mostcommon_10K.tsv(.gz) nor numpred.train is in {folder}"
    if args.data == "linzen":
        raise common.UserError(f"{missing}; {WHERE}, or use --data synthetic")
    print(f"\n*** WARNING: {missing}.\n*** Using SYNTHETIC sentences of a grammar: "
          "no figure of this run is about English.\n", file=sys.stderr, flush=True)
    return "synthetic", []


def plain_config(model, seed, source, files, args):
    """The configuration of a run without distillation; a teacher's configuration is this too.

    Real sentences are told apart by their files' sizes: the official split and a new one never pass for each other.
    """
    recipe = RECIPES[args.objective]["lstm" if model.startswith("lstm") else "transformer"]
    recipe = {key: getattr(args, key, None) or value for key, value in recipe.items()}
    data = {"examples": args.examples} if source == "synthetic" else {
        "bytes": {path.name: path.stat().st_size for path in files}}
    return {"task": "sva", "objective": args.objective, "data": source, **data, "student": model, "seed": seed,
            "kd": None, **recipe}


def print_table(record):
    """Accuracy, A-accuracy, D-accuracy, ECE, NLL and perplexity of teacher and student."""
    config = record["config"]
    rows = [("student", config["student"], record["metrics"]["test"])]
    if config["kd"]:
        rows.insert(0, ("teacher", config["teacher"], record["teacher_metrics"]["test"]))
    columns = {"accuracy": "accuracy", "a_accuracy": "A-accuracy", "d_accuracy": "D-accuracy", "ece": "ECE",
               "nll": "NLL"}
    if config["objective"] == "lm":
        columns["perplexity"] = "perplexity"
    groups = rows[0][2]["accuracy_by_attractors"] or {}
    print(f"\n{'data: ' + config['data']:<32}" + "".join(f"{title:<12}" for title in columns.values())
          + "".join(f"{group + ' attr.':<9}" for group in groups))
    for role, model, metrics in rows:
        values = [metrics[name] for name in columns]
        print(f"{role + ' ' + model:<32}" + "".join(f"{'-' if v is None else f'{v:.4f}':<12}" for v in values)
              + "".join(f"{value:<9.4f}" for value in (metrics["accuracy_by_attractors"] or {}).values()))


def main(argv=None):
    args = parse_arguments(argv)
    args.device = common.choose_device(args.device)
    args.amp = common.has_bfloat16(args.device) if args.amp is None else args.amp
    start = time.perf_counter()
    source, files = find_data(args)
    root = args.out / f"sva-{'lm-' if args.objective == 'lm' else ''}{source}"

    config = plain_config(args.student, args.seed, source, files, args)
    if args.kd:
        teacher_config = plain_config(args.teacher, args.teacher_seed, source, files, args)
        teacher_directory = root / args.teacher / f"seed{args.teacher_seed}"
        config |= {key: getattr(args, key) for key in ("kd", "teacher", "teacher_seed", "temperature", "alpha")}
        config |= {f"teacher_{key}": teacher_config[key] for key in ("epochs", "batch_size", "lr", "weight_decay")}
    directory = root / common.run_name(config) / f"seed{args.seed}"
    record = common.finished_run(directory, config, args.force)
    if record is not None:
        if not args.quiet:
            environment = record["environment"]
            print(f"{directory} is finished already ({environment['finished']}, {environment['hardware']}, "
                  f"{environment['precision']}); --force repeats it")
            print_table(record)
        return

    teacher = teacher_record = teacher_logits = None
    if args.kd == "offline":
        remedy = "delete it to have the teacher trained again, or choose another --out"
        teacher_record = common.finished_run(teacher_directory, teacher_config, remedy=remedy)
    common.check_writable(directory.parent)
    data, described, notes = make_data(source, files, args)
    words = described["vocabulary"]
    timing = {"data": time.perf_counter() - start, "teacher": 0.0, "teacher_logits": 0.0}
    if not args.quiet:
        models = dict.fromkeys([args.student] + [args.teacher] * (args.kd is not None))
        sizes = (f"{name} {count_parameters(build_model(name, 0, words, args.objective)):,} parameters"
                 for name in models)
        print(f"models: {', '.join(sizes)}\ndevice: {args.device}, {'bfloat16' if args.amp else 'float32'}\n"
              f"data: {source}, " + ", ".join(f"{value:,} {name}" for name, value in described.items()
                                              if isinstance(value, int)))
        for note in notes:
            print(f"note: {note}")

    if args.kd == "offline":
        start = time.perf_counter()
        if teacher_record is None:
            teacher_record = run(teacher_config, data, described, teacher_directory, args, timing)
        teacher = build_model(args.teacher, args.teacher_seed, words, args.objective)
        teacher = common.load_weights(teacher, teacher_directory).to(args.device).eval().requires_grad_(False)
        timing["teacher"] = time.perf_counter() - start
        if args.objective == "classification":
            start = time.perf_counter()
            teacher_logits = evaluate(teacher, data["train"], args.objective, args.amp)[0].to(args.device)
            teacher = None  # never asked again
            timing["teacher_logits"] = time.perf_counter() - start
    record = run(config, data, described, directory, args, timing, teacher_record, teacher_logits, teacher)
    if not args.quiet:
        print_table(record)


if __name__ == "__main__":
    common.run_main(main)
