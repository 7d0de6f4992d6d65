"""Train an LSTM or a Transformer on English subject-verb agreement, alone or on soft labels.

    python train_sva.py --student transformer-seq                                # no distillation
    python train_sva.py --teacher lstm --student transformer-seq --kd            # distillation
    python train_sva.py --teacher lstm --student transformer-seq --kd --every-word --out runs-words
    python train_sva.py --teacher lstm --student transformer-seq --kd --objective lm

"The keys near the cabinet ..." is or are? The number of the subject decides, not that of the nouns
in between (the attractors). Training sentences are mostly simple, the test has up to four
attractors and more: it asks for the inductive bias. Every run leaves run.json, outputs.npz and
model.pt in runs/sva-<data>/<run name>/seed<k>/ (runs/sva-lm-<data> for language models). After
Abnar, Dehghani & Zuidema 2020 (arXiv 2006.00555).
"""

import gzip
import itertools
import random
import socket
import statistics
import sys
import tarfile
import tempfile
import time
import zlib
from array import array
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common

TABLE = "agr_50_mostcommon_10K.tsv"
SOURCES = [  # where --data linzen fetches them, in this order: (address, file)
    ("https://www.dropbox.com/s/5axdu3q9jkxzjy8/agr_50_mostcommon_10K.tsv.gz?dl=1", f"{TABLE}.gz"),
    ("http://tallinzen.net/media/rnn_agreement/rnn_agr_simple.tar.gz", "rnn_agr_simple.tar.gz"),
]
TIMEOUT = 30  # seconds without an answer

# One recipe for all setups of a model. Chosen on sentences of another seed of the grammar.
RECIPES = {
    "classification": {
        "lstm": {"epochs": 12, "batch_size": 128, "lr": 3e-3, "weight_decay": 0.01},
        "transformer": {"epochs": 12, "batch_size": 128, "lr": 1e-3, "weight_decay": 0.01},
    },
    "lm": {
        "lstm": {"epochs": 12, "batch_size": 32, "lr": 6e-3, "weight_decay": 0.01},
        "transformer": {"epochs": 12, "batch_size": 64, "lr": 2e-3, "weight_decay": 0.01},
    },
}
TEMPERATURE = {"classification": 2.0, "lm": 1.0}
VOCABULARY_SIZE = 10_000  # as in the paper
PAD, UNKNOWN, START, END = range(4)  # token numbers; the words' numbers follow
MOST_ATTRACTORS, LONGEST_DISTANCE = 4, 16  # the groups of A-accuracy (4: and more) and D-accuracy
LONGEST_SENTENCE = 254  # words; with START and END the 256 positions of a Transformer
PROBE_SIZE = 1000  # test sentences whose representations are kept
SYNTHETIC_EXAMPLES = 10_000


# ---- Models: tokens (n, length), PAD on the right, and lengths (n,) -> states (n, length, width).
# `represent` picks the state that the answer is read from, `head` is the last linear layer.


class LSTM(nn.Module):
    """Embedding, two LSTM layers, linear head. It reads from left to right: padding is harmless."""

    def __init__(self, vocabulary, outputs, width, dropout=0.25):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=PAD)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True, dropout=dropout)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, outputs)

    def states(self, tokens, lengths):
        embedded = self.drop(self.embedding(tokens))
        # Under bfloat16 autocast cuDNN's LSTM would run in float16, whose range is too small for
        # its gradients without loss scaling: on CUDA it stays in float32.
        with torch.autocast("cuda", enabled=False):
            return self.drop(self.lstm(embedded)[0])

    def represent(self, tokens, lengths):
        return state_at(self.states(tokens, lengths), lengths - 1)


class Block(nn.Module):
    """A pre-norm Transformer layer (Vaswani et al. 2017; Xiong et al. 2020, arXiv 2002.04745)."""

    def __init__(self, width, heads=4, dropout=0.1):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x, mask):
        n, length, width = x.shape
        qkv = self.queries_keys_values(self.norm_attention(x))
        qkv = qkv.view(n, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (n, heads, length, width / heads) each
        # Without a mask: causal. Then no word looks at the padding, which comes after it.
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None,
            dropout_p=self.dropout if self.training else 0.0)
        attended = attended.transpose(1, 2).reshape(n, length, width)
        x = x + self.drop(self.project(attended))
        return x + self.drop(self.mlp(self.norm_mlp(x)))


class Transformer(nn.Module):
    """Pre-norm Transformer with learned positions.

    causal: a word sees the words before it, the answer is read at the last word (Transformer-seq);
    else words see both sides and the answer is read at a class token in front. shared: one layer
    serves at every depth, told apart by a learned embedding of the depth (Universal Transformer,
    Dehghani et al. 2019, arXiv 1807.03819, sec. 2.1).
    """

    def __init__(self, vocabulary, outputs, width, layers=3, causal=True, shared=False):
        super().__init__()
        self.causal, self.layers = causal, layers
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=PAD)
        self.position = nn.Embedding(LONGEST_SENTENCE + 2, width)
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
            mask = torch.arange(x.shape[1], device=x.device) <= lengths[:, None]
            mask = mask[:, None, None]  # (n, heads, queries, keys): the class token and the words
        x = x + self.position.weight[:x.shape[1]]
        for layer in range(self.layers):
            if self.depth is not None:
                x = x + self.depth.weight[layer]
            x = self.blocks[layer % len(self.blocks)](x, mask)
        return self.norm(x)

    def represent(self, tokens, lengths):
        last = lengths - 1 if self.causal else torch.zeros_like(lengths)
        return state_at(self.states(tokens, lengths), last)


def state_at(states, positions):
    """states (n, length, width), positions (n,) -> (n, width)."""
    return states[torch.arange(len(states), device=states.device), positions]


MODELS = {
    "lstm": lambda *sizes: LSTM(*sizes, width=128),
    "transformer": lambda *sizes: Transformer(*sizes, width=96, causal=False),
    "transformer-seq": lambda *sizes: Transformer(*sizes, width=96),
    "ut-seq": lambda *sizes: Transformer(*sizes, width=160, shared=True),
    "lstm-small": lambda *sizes: LSTM(*sizes, width=64),
    "transformer-seq-small": lambda *sizes: Transformer(*sizes, width=48),
}


def build_model(name, seed, words, objective, device):
    """A new model for a vocabulary of `words` words; its weights depend on (name, seed) alone."""
    torch.manual_seed(seed)
    tokens = words + END + 1
    return MODELS[name](tokens, tokens if objective == "lm" else 2).to(device)


# ---- Sentences -----------------------------------------------------------------------------------


class Sentence(NamedTuple):
    """text: words separated by spaces. verb: its index. forms: singular and plural of the verb,
    None if unknown. attractors: nouns of the other number between subject and verb. distance:
    words from the subject to the verb. Both are -1 where unknown."""

    text: str
    verb: int
    plural: bool
    attractors: int
    distance: int
    forms: tuple


def before_verb(sentence):
    return tuple(sentence.text.split()[:sentence.verb])


# ---- Synthetic sentences: -s makes a noun plural and a verb singular; nothing else shows number --

NOUNS = """dog cat boy girl teacher student doctor nurse farmer pilot author singer painter driver
    guard king queen actor lawyer banker baker hunter sailor soldier tourist visitor worker player
    coach judge key cup car house table book picture letter tree river road bridge garden window
    door ship train machine engine lamp song report plan idea law rule answer question building
    school""".split()
INTRANSITIVE = "run sleep laugh work wait arrive smile fall sing stay move return".split()
TRANSITIVE = "see like know help follow visit admire avoid call want need remember chase praise"
TRANSITIVE = TRANSITIVE.split()
THINKING = "think say know believe hope claim".split()
ADJECTIVES = "old young big small red tall famous quiet new strange kind happy".split()
PREPOSITIONS = "near behind with beside under above from around for against".split()
ADVERBS = "today often here there again now slowly quickly outside inside".split()
ZIPF = [1 / (rank + 3) for rank in range(len(NOUNS))]  # word frequencies


class Grammar:
    """Sentences with a hierarchical subject, from a small probabilistic grammar.

        sentence -> [preposition nouns ,] [nouns think that] SUBJECT VERB [nouns] [adverb] .
        nouns    -> the [adjective] noun [preposition nouns | that verb nouns | that nouns verb]
                    [and the noun]

    front, embed: how often a phrase or an embedding comes first. modify: how often a noun is
    modified; it falls by the factor `decay` with each level of depth. alike: how often a noun has
    the number of the noun it depends on: deep sentences without an attractor. slip: how often a
    verb disagrees with its own subject, as in real text, where writers and parsers err.
    """

    def __init__(self, seed, front, embed, modify, decay, alike, slip):
        self.random = random.Random(seed)
        self.front, self.embed, self.modify = front, embed, modify
        self.decay, self.alike, self.slip = decay, alike, slip

    def pick(self, words):
        return self.random.choices(words, weights=ZIPF[:len(words)])[0]

    def coin(self, probability=0.5):
        return self.random.random() < probability

    def noun(self, plural):
        return self.pick(NOUNS) + ("s" if plural else "")

    def verb(self, words, plural):
        return self.pick(words) + ("" if plural != self.coin(self.slip) else "s")

    def nouns(self, plural, modify):
        """(words of a noun phrase whose head has that number, index of the head)."""
        words = ["the"]
        if self.coin(0.2):
            words.append(self.pick(ADJECTIVES))
        head = len(words)
        words.append(self.noun(plural))
        if self.coin(modify):
            kind, deeper = self.random.random(), modify * self.decay
            if kind < 0.5:
                words += [self.pick(PREPOSITIONS), *self.distractor(plural, deeper)]
            elif kind < 0.75:
                words += ["that", self.verb(TRANSITIVE, plural), *self.distractor(plural, deeper)]
            else:
                other = plural == self.coin(self.alike)
                words += ["that", *self.nouns(other, 0.6 * deeper)[0]]
                words += [self.verb(TRANSITIVE, other)]
        return words, head

    def distractor(self, plural, modify):
        """Words of a noun phrase below a noun of that number, now and then with a second noun."""
        other = plural == self.coin(self.alike)
        words, _ = self.nouns(other, modify)
        if self.coin(0.1):
            words += ["and", "the", self.noun(other == self.coin(self.alike))]
        return words

    def sentence(self):
        """(words, index of the subject's head, index of the verb)."""
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
        if self.coin(0.4):
            words.append(self.pick(ADVERBS))
        return words + ["."], head, verb


TRAIN_GRAMMAR = {"front": 0.3, "embed": 0.3, "modify": 0.7, "decay": 0.8, "alike": 0.85,
                 "slip": 0.1}
TEST_GRAMMAR = {"front": 0.4, "embed": 0.4, "modify": 0.9, "decay": 0.9, "alike": 0.5, "slip": 0}


def synthetic_sentences(examples, seed=0):
    """{"train", "validation", "test": [Sentence]}: easy training sentences, a harder test.

    The label is the number that the verb shows. `examples` training sentences, a tenth of that for
    validation, half of it in the test: 0, 1, 2, 3 and 4 or more attractors in equal parts, and
    never the words before the verb of a training sentence.
    """
    number_of = {noun: False for noun in NOUNS} | {noun + "s": True for noun in NOUNS}

    def draw(grammar):
        words, head, verb = grammar.sentence()
        between = [number_of[word] for word in words[head + 1:verb] if word in number_of]
        attractors = between.count(not number_of[words[head]])
        lemma = words[verb].removesuffix("s")
        return Sentence(" ".join(words), verb, words[verb] == lemma, attractors, verb - head,
                        (lemma + "s", lemma))

    easy, deep = Grammar(seed, **TRAIN_GRAMMAR), Grammar(seed + 1, **TEST_GRAMMAR)
    train = [draw(easy) for _ in range(examples)]
    seen = {before_verb(sentence) for sentence in train}
    validation = [draw(easy) for _ in range(examples // 10)]
    groups = [[] for _ in range(MOST_ATTRACTORS + 1)]
    wanted = max(1, examples // 10)
    while any(len(group) < wanted for group in groups):
        sentence = draw(deep)
        group = groups[min(sentence.attractors, MOST_ATTRACTORS)]
        if len(group) < wanted and before_verb(sentence) not in seen:
            group.append(sentence)
            seen.add(before_verb(sentence))
    return {"train": train, "validation": validation, "test": list(itertools.chain(*groups))}


# ---- Real sentences: Linzen, Dupoux & Goldberg 2016 (arXiv 1611.01368), in either layout ---------

NUMPRED_TESTS = [f"numpred.test.{attractors}" for attractors in range(6)]
COLUMNS = ("sentence", "verb_pos", "verb_index", "n_diff_intervening", "distance")
HELP = "see Data in the README"


def find_linzen(folder):
    """The files of the layout in `folder`, [] if there is none; UserError if numpred.* has gaps."""
    tables = [folder / name for name in (TABLE, f"{TABLE}.gz") if (folder / name).is_file()]
    files = [folder / name for name in ("numpred.train", "numpred.val", *NUMPRED_TESTS)]
    missing = [path.name for path in files if not path.is_file()]
    if tables or len(missing) == len(files):
        return tables[:1]
    if missing:
        raise common.UserError(f"{folder} has no {', '.join(missing)}; {HELP}")
    return files


def fetch_linzen(folder):
    """Download the sentences into `folder` from the first of SOURCES that gives them whole.

    They are read to the end in a temporary folder and then renamed. UserError if no source works.
    """
    socket.setdefaulttimeout(TIMEOUT)
    folder.mkdir(parents=True, exist_ok=True)
    failures = []
    for url, name in SOURCES:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as temporary:
            try:
                path = Path(temporary) / name
                print(f"fetching {url}", file=sys.stderr)
                torch.hub.download_url_to_file(url, path, progress=sys.stderr.isatty())
                if name.endswith(".tar.gz"):
                    unpack_numpred(path)
                files = find_linzen(path.parent)
                if not files:
                    raise ValueError("no sentences in it")
                read_linzen(files)
                # The training sentences last: without them nothing else is used.
                for file in sorted(files, key=lambda file: file.name == "numpred.train"):
                    file.rename(folder / file.name)
                return
            except Exception as error:  # of the network, gzip, tar, the file system, the reader
                reason = str(error).replace(temporary, "").splitlines() or [type(error).__name__]
                failures.append(f"{url}: {reason[0]}")
    raise common.UserError(f"can't fetch the sentences ({'; '.join(failures)}); {HELP}")


def unpack_numpred(archive):
    """Unpack the files numpred.* beside `archive`, whatever folder they name, and nothing else."""
    with tarfile.open(archive) as members:
        for member in members:
            name = Path(member.name).name
            if member.isfile() and name.startswith("numpred."):
                archive.with_name(name).write_bytes(members.extractfile(member).read())


def read_lines(path):
    """Numbered lines of a text or .gz file; UserError where it can't be read or decoded."""
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                yield number, line.rstrip("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise common.UserError(f"{path}, after line {number}: {error}; {HELP}") from None
    if number == 0:
        raise common.UserError(f"{path} is empty; {HELP}")


def read_before_verbs(path, attractors):
    """numpred.*: a line is the verb's tag, VBZ or VBP, a tab, the words before the verb."""
    sentences = []
    for number, line in read_lines(path):
        tag, _, words = line.partition("\t")
        if tag not in ("VBZ", "VBP") or not words.strip():
            raise common.UserError(f"{path}, line {number}: expected VBZ or VBP, a tab and words, "
                                   f"not {line[:40]!r}")
        sentences.append(Sentence(f"{words} {tag}", len(words.split()), tag == "VBP", attractors,
                                  -1, ("VBZ", "VBP")))
    return sentences


def read_table(path):
    """agr_50_mostcommon_10K.tsv(.gz): a line of column names, full sentences, indices from 1."""
    lines = read_lines(path)
    names = next(lines)[1].split("\t")
    if missing := [name for name in COLUMNS if name not in names]:
        raise common.UserError(f"{path}, line 1: no column {', '.join(missing)}; {HELP}")
    at = [names.index(name) for name in COLUMNS]
    sentences = []
    for number, line in lines:
        fields = line.split("\t")
        try:
            text, tag, verb, attractors, distance = (fields[column] for column in at)
            place, words = int(verb) - 1, text.split()
            if tag not in ("VBZ", "VBP") or not 0 < place < len(words):
                raise ValueError
            forms = (words[place], None) if tag == "VBZ" else (None, words[place])
            sentences.append(Sentence(text, place, tag == "VBP", int(attractors), int(distance),
                                      forms))
        except (ValueError, IndexError):
            raise common.UserError(f"{path}, line {number}: not a sentence of this table: "
                                   f"{line[:40]!r}") from None
    # Shuffled once, 10 % for training and 1 % for validation, as in the paper.
    random.Random(0).shuffle(sentences)
    train, validation = len(sentences) // 10, max(1, len(sentences) // 100)
    return {"train": sentences[:train], "validation": sentences[train:train + validation],
            "test": sentences[train + validation:]}


def read_linzen(files):
    """{"train", "validation", "test": [Sentence]} of the files that find_linzen found."""
    if files[0].name.startswith(TABLE):
        return read_table(files[0])
    train, validation, *tests = files
    test = [read_before_verbs(path, attractors) for attractors, path in enumerate(tests)]
    return {"train": read_before_verbs(train, -1), "validation": read_before_verbs(validation, -1),
            "test": list(itertools.chain(*test))}


def load_sentences(source, data_dir, examples=None):
    """(source, {file: bytes}, {"train", "validation", "test": [Sentence]}).

    source "linzen": fetched if they aren't in data_dir; "auto": those in data_dir, else synthetic
    ones, with a warning. Of more than `examples` real training sentences so many are drawn, the
    same for every run.
    """
    files = [] if source == "synthetic" else find_linzen(data_dir)
    if source == "linzen" and not files:
        fetch_linzen(data_dir)
        files = find_linzen(data_dir)
    if source == "auto" and not files:
        print(f"\n*** WARNING: neither {TABLE}(.gz) nor numpred.train is in {data_dir}; --data "
              "linzen fetches them.\n*** Using SYNTHETIC sentences of a grammar: "
              "no figure of this run is about English.\n", file=sys.stderr)
    if not files:
        return "synthetic", {}, synthetic_sentences(examples or SYNTHETIC_EXAMPLES)
    sentences = read_linzen(files)
    available = len(sentences["train"])
    if examples and examples > available:
        raise common.UserError(f"--examples {examples}: there are {available} in {data_dir}")
    if examples and examples < available:
        sentences["train"] = random.Random(0).sample(sentences["train"], examples)
    return "linzen", {path.name: path.stat().st_size for path in files}, sentences


def check_data(data_dir):
    """For run_all.sh: "linzen" where those can be had, else "synthetic"; damaged files end it."""
    data_dir = Path(data_dir)
    try:
        if not find_linzen(data_dir):
            fetch_linzen(data_dir)
    except common.UserError as error:
        print(error, file=sys.stderr)
    return load_sentences("auto", data_dir)[0]


def counterpart(verb, plural, vocabulary):
    """The other number's form of `verb`, if it is in the vocabulary; else None."""
    irregular = {"is": "are", "has": "have", "was": "were", "does": "do"}
    if plural:
        regular = [verb + "s", verb + "es", verb[:-1] + "ies"]
        candidates = [singular for singular, form in irregular.items() if form == verb] or regular
    else:
        candidates = [irregular.get(verb, verb[:-1]), verb[:-2], verb[:-3] + "y"]
    # A form of "'s" would be a quotation mark.
    return next((form for form in candidates if form in vocabulary and form.isalpha()), None)


def tokens_of_forms(singular, plural, vocabulary):
    """Tokens of a verb's two forms, of which one may be None; None where it isn't known."""
    singular = singular or counterpart(plural, True, vocabulary)
    plural = plural or counterpart(singular, False, vocabulary)
    return vocabulary.get(singular), vocabulary.get(plural)


# ---- Tensors: all sentences of a split end to end in one row of tokens ---------------------------


class Split(NamedTuple):
    """Sentences as tensors. All but `tokens` and `forms` are (sentences,) int64."""

    tokens: torch.Tensor  # (words of all sentences,) int32
    starts: torch.Tensor  # where a sentence begins in `tokens`
    lengths: torch.Tensor
    verb: torch.Tensor
    labels: torch.Tensor  # 0 singular, 1 plural
    attractors: torch.Tensor
    distance: torch.Tensor
    forms: torch.Tensor  # (sentences, 2): tokens of the verb's singular and plural

    def take(self, indices):
        """The sentences `indices` as a Split."""
        return Split(self.tokens, *(column[indices] for column in self[1:]))

    def to(self, device):
        return Split(*(column.to(device) for column in self))

    def padded(self, longest):
        """(sentences, longest) int64 tokens, PAD on the right."""
        position = torch.arange(longest, device=self.tokens.device)
        inside = position < self.lengths[:, None]
        return self.tokens[(self.starts[:, None] + position) * inside].long() * inside


def make_vocabulary(sentences):
    """{word: token number} of the most frequent words of the training sentences."""
    counts = Counter(itertools.chain.from_iterable(s.text.split() for s in sentences))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[:VOCABULARY_SIZE]
    return {word: number for number, word in enumerate(ranked, END + 1)}


def encode(sentences, vocabulary, objective):
    """(Split, how many were left out: too long, or, for a language model, no other form known).

    A classifier reads the words before the verb; a language model START, the whole sentence, END.
    """
    tokens, columns, left_out = array("i"), array("q"), 0
    both_forms = {forms: tokens_of_forms(*forms, vocabulary)
                  for forms in {sentence.forms for sentence in sentences}}  # few: once for each
    for text, verb, plural, attractors, distance, forms in sentences:
        words, forms, start = text.split(), both_forms[forms], len(tokens)
        if len(words) > LONGEST_SENTENCE or (objective == "lm" and None in forms):
            left_out += 1
            continue
        if objective == "lm":
            tokens.append(START)
            tokens.extend(vocabulary.get(word, UNKNOWN) for word in words)
            tokens.append(END)
        else:
            tokens.extend(vocabulary.get(word, UNKNOWN) for word in words[:verb])
        columns.extend((start, len(tokens) - start, verb, plural, attractors, distance,
                        *(form or UNKNOWN for form in forms)))
    columns = torch.from_numpy(np.array(columns, dtype=np.int64)).view(-1, 8)
    tokens = torch.from_numpy(np.array(tokens, dtype=np.int32))
    return Split(tokens, *columns[:, :6].T.contiguous(), columns[:, 6:].contiguous()), left_out


def make_data(sentences, objective, device):
    """({"train", "validation", "test", "probe": Split} on `device`, sizes).

    sentences: {"train", "validation", "test": [Sentence]}. probe: PROBE_SIZE test sentences.
    """
    vocabulary = make_vocabulary(sentences["train"])
    data, sizes = {}, {"vocabulary": len(vocabulary), "left_out": 0}
    for name, part in sentences.items():
        data[name], left_out = encode(part, vocabulary, objective)
        sizes["left_out"] += left_out
        if len(data[name].lengths) == 0:
            raise common.UserError(f"no sentence is left for {name}: use more --examples")
    test_size = len(data["test"].lengths)
    chosen = torch.randperm(test_size, generator=torch.Generator().manual_seed(0))[:PROBE_SIZE]
    data["probe"] = data["test"].take(chosen)
    sizes |= {name: len(split.lengths) for name, split in data.items()}
    return {name: split.to(device) for name, split in data.items()}, sizes


def batches_by_length(lengths, batch_size, generator):
    """One epoch: (batches, batch_size) sentence numbers; a batch holds similar lengths.

    The sentences are shuffled and cut into windows of 50 batches; within a window they are sorted
    by length, which leaves little padding and much chance. What doesn't fill a batch is left out
    before the sorting: after it, it would always be the longest sentences.
    """
    batch_size = min(batch_size, len(lengths))
    order = torch.randperm(len(lengths), generator=generator)
    order = order[:len(order) // batch_size * batch_size]
    window = torch.arange(len(order)) // (50 * batch_size)
    by_window_and_length = window * (int(lengths.max()) + 1) + lengths[order]
    batches = order[torch.argsort(by_window_and_length, stable=True)].view(-1, batch_size)
    return batches[torch.randperm(len(batches), generator=generator)]


# ---- Training ------------------------------------------------------------------------------------


def questions(batch, longest, words, objective, every_word=False):
    """What a batch asks: (tokens to read, their lengths, where to answer, right answers).

    A classifier answers once per sentence (where: None), or with every_word after each word that
    it reads. A language model answers at each of the batch's words but the first. `where` (words,)
    counts in the flattened tokens to read. longest, words: the longest length and the number of
    answers; asking the tensors would make a GPU wait.
    """
    tokens, lengths = batch.padded(longest), batch.lengths
    if objective == "classification" and not every_word:
        return tokens, lengths, None, batch.labels
    next_words = tokens[:, 1:].flatten()
    if objective == "lm":
        tokens, lengths = tokens[:, :-1], lengths - 1
    row = torch.repeat_interleave(lengths, output_size=words)  # the sentence of each answer
    column = torch.arange(words, device=row.device) - (lengths.cumsum(0) - lengths)[row]
    where = row * tokens.shape[1] + column
    if objective == "lm":
        return tokens, lengths, where, next_words.index_select(0, where)
    return tokens, lengths, where, batch.labels.index_select(0, row)


def answer(model, tokens, lengths, where):
    """Logits, float32: (sentences, 2), or for a language model (words, vocabulary)."""
    if where is None:
        return model.head(model.represent(tokens, lengths)).float()
    states = model.states(tokens, lengths).flatten(0, 1)
    return model.head(states.index_select(0, where)).float()


@torch.no_grad()
def evaluate(model, split, objective, amp, keep_states=False):
    """What `model` says of every sentence in eval mode, in the split's order, float32 on the CPU.

    Returns logits (sentences, 2) of singular and plural (for a language model log-probabilities
    of the verb's two forms), the states they were read from (sentences, width; None unless kept:
    those of the official test take a gigabyte) and the perplexity per word (None for a classifier).
    """
    model.eval()
    device = split.tokens.device
    logits, states, losses, words = [], [], [], 0
    order = split.lengths.cpu().argsort(stable=True)
    for part in order.split(64):  # small, so that few sentences need little padding
        batch = split.take(part.to(device))
        longest, answers = int(batch.lengths.max()), int(batch.lengths.sum()) - len(part)
        tokens, lengths, where, labels = questions(batch, longest, answers, objective)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            if objective == "lm":
                all_states = model.states(tokens, lengths)
                said = model.head(all_states.flatten(0, 1).index_select(0, where)).float()
                losses.append(F.cross_entropy(said, labels, reduction="sum"))
                words += len(labels)
                state = state_at(all_states, batch.verb)
                log_probabilities = model.head(state).float().log_softmax(dim=1)
                logits.append(log_probabilities.gather(1, batch.forms))
            else:
                state = model.represent(tokens, lengths)
                logits.append(model.head(state).float())
        if keep_states:
            states.append(state.float())
    back = order.argsort()
    states = torch.cat(states).cpu()[back] if keep_states else None
    perplexity = None
    if objective == "lm":
        mean_loss = torch.tensor(sum(torch.stack(losses).tolist()) / words)
        perplexity = mean_loss.exp().item()  # infinite, not an error, where training diverged
    return torch.cat(logits).cpu()[back], states, perplexity


def agreement_metrics(logits, labels, attractors, distance):
    """Accuracy (micro), A-accuracy, D-accuracy (0..1) and the groups behind them, ECE, NLL, n.

    Abnar et al. 2020, sec. 3.1: A-accuracy is the mean of the accuracies at 0, 1, 2, 3 and 4 or
    more attractors, D-accuracy that over distances 1..16. Groups without a sentence are left out;
    None where all are unknown.
    """
    correct = (logits.argmax(dim=1) == labels).double()

    def by_group(groups, first, last):
        return {str(group): correct[groups == group].mean().item()
                for group in range(first, last + 1) if (groups == group).any()}

    by_attractors = by_group(attractors.clamp(max=MOST_ATTRACTORS), 0, MOST_ATTRACTORS)
    by_distance = by_group(distance, 1, LONGEST_DISTANCE)
    return {
        **common.classification_metrics(logits, labels),
        "a_accuracy": statistics.fmean(by_attractors.values()) if by_attractors else None,
        "d_accuracy": statistics.fmean(by_distance.values()) if by_distance else None,
        "accuracy_by_attractors": by_attractors or None,
        "accuracy_by_distance": by_distance or None,
    }


def test_all(model, data, objective, amp):
    """({"test": metrics}, {"test_logits", "test_labels", ...: tensor})."""
    split = data["test"].to("cpu")
    logits, _, perplexity = evaluate(model, data["test"], objective, amp)
    metrics = agreement_metrics(logits, split.labels, split.attractors, split.distance)
    if objective == "lm":
        metrics["perplexity"] = perplexity
    outputs = {"test_logits": logits, "test_labels": split.labels,
               "test_attractors": split.attractors, "test_distance": split.distance}
    return {"test": metrics}, outputs


def run(config, data, sizes, args, force=False):
    """Train, test and save what `config` describes; return its record, as in run.json.

    A finished run of this configuration is not repeated, unless `force`. The teacher of offline
    distillation is such a run too: it is loaded, or trained first. sizes: as from make_data.
    """
    directory = run_directory(config, args)
    record = common.finished_run(directory, config, force)
    if record is not None:
        if not args.quiet:
            print(f"{directory} is finished already; --force repeats the student's run")
        return record
    device, online, offline = args.device, config["kd"] == "online", config["kd"] == "offline"
    objective, vocabulary = config["objective"], sizes["vocabulary"]
    every_word = objective == "lm" or config.get("every_word", False)

    if offline:
        teacher_config = plain_config(args.teacher, args.teacher_seed, config["data"], args)
        teacher_metrics = run(teacher_config, data, sizes, args)["metrics"]
        teacher = build_model(config["teacher"], 0, vocabulary, objective, device)
        common.load_weights(teacher, run_directory(teacher_config, args))
        teacher.eval().requires_grad_(False)
        if not every_word:
            # Neither the teacher nor the sentences change: it is asked once for each sentence.
            # For answers after every word it is asked in each batch: those of a language model
            # would not fit.
            teacher_logits = evaluate(teacher, data["train"], objective, args.amp)[0].to(device)

    # The student and, online, the teacher that learns beside it: a parameter group for each.
    student = build_model(config["student"], config["seed"], vocabulary, objective, device)
    groups = [{"params": list(student.parameters()), "lr": config["lr"],
               "weight_decay": config["weight_decay"]}]
    if online:
        seed = config["teacher_seed"]
        teacher = build_model(config["teacher"], seed, vocabulary, objective, device)
        groups.append({"params": list(teacher.parameters()), "lr": config["teacher_lr"],
                       "weight_decay": config["teacher_weight_decay"]})

    split, lengths = data["train"], data["train"].lengths.cpu()
    steps = max(1, len(lengths) // config["batch_size"])
    optimizer = torch.optim.AdamW(groups, fused=device.type != "mps")
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=[group["lr"] for group in groups], pct_start=0.25,
        total_steps=max(config["epochs"] * steps, 5))  # it divides by zero below 5

    if not args.quiet:
        print(f"\n{common.run_name(config)}, seed {config['seed']}: {count_parameters(student):,} "
              f"parameters, {config['epochs']} epochs of {len(lengths):,} sentences "
              f"in batches of {config['batch_size']}")
    progress = common.Progress(config["epochs"], args.quiet)
    history = []
    snapshots = {0: evaluate(student, data["probe"], objective, args.amp, keep_states=True)[1]}
    # Dropout and the order of the batches depend on the seed alone: twins see the same batches.
    torch.manual_seed(config["seed"])
    order = torch.Generator().manual_seed(config["seed"])

    for epoch in range(1, config["epochs"] + 1):
        start, total_loss = time.perf_counter(), 0.0
        student.train()
        batches = batches_by_length(lengths, config["batch_size"], order)
        longest = lengths[batches].amax(dim=1).tolist()
        words = (lengths[batches] - int(objective == "lm")).sum(dim=1).tolist()
        for step, batch in enumerate(batches.to(device), 1):
            tokens, read, where, labels = questions(
                split.take(batch), longest[step - 1], words[step - 1], objective, every_word)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                logits = answer(student, tokens, read, where)
                if online or (offline and every_word):
                    soft = answer(teacher, tokens, read, where)
            if offline and not every_word:
                soft = teacher_logits.index_select(0, batch)

            if config["kd"] is None:
                loss = F.cross_entropy(logits, labels)
            else:
                loss = common.kd_loss(logits, soft, labels, config["temperature"], config["alpha"])
            if online:  # reaches the teacher alone, as the KD loss reaches the student alone
                loss = loss + F.cross_entropy(soft, labels)

            optimizer.zero_grad()
            loss.backward()
            for group in groups:
                nn.utils.clip_grad_norm_(group["params"], 1.0)
            optimizer.step()
            schedule.step()
            total_loss += loss.detach()  # no .item(): a GPU would wait for it in every step
            progress.step(epoch, step, steps)

        mean_loss = float(total_loss) / steps
        seconds = time.perf_counter() - start
        if not mean_loss < float("inf"):
            raise common.UserError(f"the loss is {mean_loss} in epoch {epoch}: nothing is kept; "
                                   "try a lower --lr")
        predictions = evaluate(student, data["validation"], objective, args.amp)[0].argmax(dim=1)
        accuracy = (predictions == data["validation"].labels.cpu()).float().mean().item()
        history.append({"epoch": epoch, "loss": mean_loss, "validation_accuracy": accuracy,
                        "seconds": seconds})
        progress.epoch(epoch, mean_loss, accuracy, seconds)
        if epoch & (epoch - 1) == 0 or epoch == config["epochs"]:  # 1, 2, 4, 8 ... and the last
            snapshots[epoch] = evaluate(student, data["probe"], objective, args.amp,
                                        keep_states=True)[1]

    metrics, outputs = test_all(student, data, objective, args.amp)
    outputs |= {"probe_epochs": list(snapshots),
                "probe_representations": torch.stack(list(snapshots.values()))}
    seconds = sum(entry["seconds"] for entry in history)
    record = {
        "config": config,
        "data": {"source": config["data"], "files": list(args.bytes), **sizes},
        "environment": common.describe_environment(device, precision(config, args)),
        "parameters": {"student": count_parameters(student)},
        "history": history,
        "metrics": metrics,
        "timing": {"training": seconds,
                   "tokens_per_second": config["epochs"] * int(lengths.sum()) / seconds},
    }
    if online:
        teacher_metrics, _ = test_all(teacher, data, objective, args.amp)
    if config["kd"]:
        record["teacher_metrics"] = teacher_metrics
        record["parameters"]["teacher"] = count_parameters(teacher)
    common.save_run(directory, record, outputs, student.state_dict(), force)
    if not args.quiet:
        print(f"written to {directory}")
    return record


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


# ---- Command line --------------------------------------------------------------------------------


def parse_arguments(argv):
    parser = common.make_parser(__doc__)
    common.add_shared_arguments(parser, list(MODELS), "transformer-seq", "2, language models 1")
    parser.add_argument("--objective", choices=["classification", "lm"], default="classification",
                        help="the verb's number from the words before it, or the next word")
    parser.add_argument("--data", choices=["auto", "linzen", "synthetic"], default="auto",
                        help="linzen: real sentences, fetched if they aren't in --data-dir; "
                             "auto: those in --data-dir, else sentences of a grammar")
    parser.add_argument("--examples", type=common.number(int, 50, 1_000_000),
                        help="training sentences (default: all real ones, 10,000 synthetic ones); "
                             "above 20,000 the default epochs are 240,000 / examples, at least 2")
    parser.add_argument("--every-word", action="store_true",
                        help="classifiers: an answer after every word, not only after the last")
    args = parser.parse_args(argv)
    common.check_shared_arguments(parser, args, TEMPERATURE[args.objective])
    if args.objective == "lm" and "transformer" in (args.student, args.teacher):
        parser.error("transformer sees the words it would have to predict: "
                     "--objective lm needs transformer-seq, ut-seq or lstm")
    if args.every_word and "transformer" in (args.student, args.teacher):
        parser.error("transformer reads both ways: --every-word needs transformer-seq, ut-seq or "
                     "lstm")
    if args.every_word and args.objective == "lm":
        parser.error("--every-word is for classifiers: language models always do so")
    return args


def plain_config(model, seed, source, args):
    """The configuration of a run without distillation: all that its results depend on.

    Two runs with equal configurations are the same run. Device and precision are not part of it.
    Real sentences are told apart by the sizes of their files.
    """
    kind = "lstm" if model.startswith("lstm") else "transformer"
    recipe = dict(RECIPES[args.objective][kind])
    recipe["epochs"] = min(recipe["epochs"], max(2, 240_000 // args.examples))
    recipe = {key: getattr(args, key, None) or value for key, value in recipe.items()}
    config = {"task": "sva", "objective": args.objective, "data": source,
              "examples": args.examples}
    if source == "linzen":
        config["bytes"] = args.bytes
    return config | {"student": model, "seed": seed, "kd": None, **recipe}


def run_directory(config, args):
    root = "sva-lm" if config["objective"] == "lm" else "sva"
    name = f"{root}-{config['data']}"
    return args.out / name / common.run_name(config) / f"seed{config['seed']}"


def precision(config, args):
    if not args.amp:
        return "float32"
    lstm = any("lstm" in str(config.get(role)) for role in ("student", "teacher"))
    return "bfloat16, LSTM layers float32" if args.device.type == "cuda" and lstm else "bfloat16"


def main(argv=None):
    args = parse_arguments(argv)
    args.device = common.choose_device(args.device)
    args.amp = common.has_bfloat16(args.device) if args.amp is None else args.amp
    args.out.mkdir(parents=True, exist_ok=True)
    source, args.bytes, sentences = load_sentences(args.data, args.data_dir, args.examples)
    args.examples = len(sentences["train"])
    data, sizes = make_data(sentences, args.objective, args.device)
    del sentences  # those of the official table take a gigabyte
    if not args.quiet:
        print(f"device: {args.device}, {'bfloat16' if args.amp else 'float32'}\ndata: {source}, "
              + ", ".join(f"{size:,} {name}" for name, size in sizes.items()))

    config = plain_config(args.student, args.seed, source, args)
    if args.kd:
        teacher = plain_config(args.teacher, args.teacher_seed, source, args)
        config = common.taught_config(config, teacher, args)
    if args.every_word:  # of the student alone: its teacher is the plain run
        config["every_word"] = True
    record = run(config, data, sizes, args, args.force)
    if not args.quiet:
        common.print_table(record, run_directory(config, args), {
            "accuracy": "accuracy", "a_accuracy": "A-accuracy", "d_accuracy": "D-accuracy",
            "ece": "ECE", "nll": "NLL", "perplexity": "perplexity"})


if __name__ == "__main__":
    common.run_main(main)
