"""Train an LSTM or a Transformer on English subject-verb agreement, alone or on soft labels.

    python train_sva.py --student transformer-seq                             # no distillation
    python train_sva.py --student transformer-seq --kd                        # self-distillation
    python train_sva.py --teacher lstm --student transformer-seq --kd         # distillation
    python train_sva.py --teacher lstm --student transformer-seq --kd --objective lm

"The keys near the cabinet ..." is or are? The subject decides, not the nouns in between. Such
attractors are rare in training and frequent in the test: it asks for the inductive bias. A run is
run.json, outputs.npz and model.pt in runs/sva-<data>/<run name>/seed<k>/ (sva-lm-<data>: language
models). After Abnar, Dehghani & Zuidema 2020 (arXiv 2006.00555).
"""

import argparse
import gzip
import math
import os
import random
import sys
import time
import zlib
from collections import Counter
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import common

# One recipe for all setups of a model, chosen on another grammar.
RECIPES = {
    ("classification", "lstm"): {"batch_size": 128, "lr": 3e-3},
    ("classification", "transformer"): {"batch_size": 128, "lr": 1e-3},
    ("lm", "lstm"): {"batch_size": 32, "lr": 6e-3},
    ("lm", "transformer"): {"batch_size": 64, "lr": 2e-3},
}
DROPOUT = {
    ("classification", "lstm"): 0.25,  # LSTMs learn two answers by heart
    ("classification", "transformer"): 0.1,
    ("lm", "lstm"): 0.1,
    ("lm", "transformer"): 0.1,
}
TEMPERATURE = {"classification": 2.0, "lm": 1.0}

# As many epochs as read so many sentences, but not more than this.
SENTENCES_READ = 560_000
MOST_EPOCHS = {"classification": 24, "lm": 30}

SYNTHETIC_EXAMPLES = 750
TABLE = "agr_50_mostcommon_10K.tsv.gz"
URL = f"https://www.dropbox.com/s/5axdu3q9jkxzjy8/{TABLE}?dl=1"
COLUMNS = ("sentence", "verb_index", "verb_pos", "n_intervening", "n_diff_intervening", "distance")

VOCABULARY_SIZE = 10_000
PAD, UNKNOWN, START, END = range(4)  # token numbers; the words' numbers follow
LONGEST_SENTENCE = 254  # words
LOGITS_AT_ONCE = 2_500_000  # more take more time and memory


# ---- Models: tokens (n, length), PAD on the right -> states (n, length, width); head -> logits ---


class LSTM(nn.Module):
    """Two LSTM layers. Padding stands on the right: it comes too late to matter."""

    def __init__(self, vocabulary, outputs, width, dropout):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=PAD)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True, dropout=dropout)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, outputs)

    def states(self, tokens):
        x = self.drop(self.embedding(tokens))
        x, _ = self.lstm(x)
        return self.drop(x)

    def forward(self, tokens):
        return self.head(self.states(tokens))


class Block(nn.Module):
    """A pre-norm Transformer layer (Vaswani et al. 2017; Xiong et al. 2020, arXiv 2002.04745)."""

    def __init__(self, width, heads=4, dropout=0.1):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm_attention = nn.LayerNorm(width)
        self.norm_mlp = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )
        self.drop = nn.Dropout(dropout)

    def forward(self, x, mask=None, causal=False):
        """x: (n, length, width). mask: True where a word may be seen, broadcast to (n, heads,
        length, length). causal: a word sees only itself and those before it."""
        qkv = self.queries_keys_values(self.norm_attention(x))
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(  # (n, heads, length, width / heads)
            q, k, v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
        )
        attended = attended.transpose(1, 2).flatten(2)

        x = x + self.drop(self.project(attended))
        x = x + self.drop(self.mlp(self.norm_mlp(x)))
        return x


class Transformer(nn.Module):
    """causal: a word sees the words before it; else it sees all, and every state is that of a class
    token in front. shared: one layer serves at every depth, told apart by an embedding (Universal
    Transformer, Dehghani et al. 2019, arXiv 1807.03819)."""

    def __init__(self, vocabulary, outputs, width, dropout, layers=3, causal=True, shared=False):
        super().__init__()
        self.causal = causal
        self.layers = layers
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=PAD)
        self.position = nn.Embedding(LONGEST_SENTENCE + 2, width)
        self.depth = nn.Embedding(layers, width) if shared else None
        self.class_token = None if causal else nn.Parameter(torch.zeros(width))
        blocks = 1 if shared else layers
        self.blocks = nn.ModuleList([Block(width, dropout=dropout) for _ in range(blocks)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)
        for embedding in (self.embedding, self.position, self.depth):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.1)

    def states(self, tokens):
        x = self.embedding(tokens)
        mask = None
        if not self.causal:  # the class token sees all words, but no padding
            class_token = self.class_token.expand(len(x), 1, -1)
            x = torch.cat([class_token, x], dim=1)
            mask = F.pad(tokens != PAD, (1, 0), value=True)[:, None, None]

        x = x + self.position.weight[:x.shape[1]]
        for layer in range(self.layers):
            if self.depth is None:
                block = self.blocks[layer]
            else:
                block = self.blocks[0]
                x = x + self.depth.weight[layer]
            x = block(x, mask, self.causal)

        if self.causal:
            return self.norm(x)
        class_state = self.norm(x[:, :1])
        return class_state.expand(-1, tokens.shape[1], -1)  # the same wherever it is asked

    def forward(self, tokens):
        return self.head(self.states(tokens))


MODELS = {
    "lstm": partial(LSTM, width=128),
    "transformer": partial(Transformer, width=96, causal=False),
    "transformer-seq": partial(Transformer, width=96),
    "ut-seq": partial(Transformer, width=160, shared=True),
}
BIDIRECTIONAL = {"transformer"}  # they see all words at once, so they can only be asked once


def family(name):
    return "lstm" if name.startswith("lstm") else "transformer"


def build_model(name, seed, args):
    """A new model on args.device, for args.tokens and args.objective; its initial weights depend on
    (name, seed) alone."""
    outputs = args.tokens if args.objective == "lm" else 2
    dropout = DROPOUT[args.objective, family(name)]
    torch.manual_seed(seed)
    return MODELS[name](args.tokens, outputs, dropout=dropout).to(args.device)


# ---- Sentences -----------------------------------------------------------------------------------


class Sentence(NamedTuple):
    text: str  # words separated by single blanks
    verb: int  # its place among them, from 0
    plural: bool
    attractors: int  # nouns between subject and verb, if all are of the other number; else -1
    distance: int  # words from the subject to the verb; -1 if unknown


def words_before_verb(sentence):
    return tuple(sentence.text.split(" ")[:sentence.verb])


# ---- Synthetic sentences: "near the dogs , the king behind the boys sleeps ."

# What a symbol becomes, one of the list. [n]: of its own number; [m]: singular or plural by chance,
# the same wherever [m] stands in a production.
GRAMMAR = {
    "OPENING": ["", *2 * ["PREP NP[m] ,"], *2 * ["NP[m] SAY[m] that"]],
    "NP": [*5 * ["the N[n]"], *3 * ["the N[n] PREP NP[m]"],
           "the N[n] that SEE[n] NP[m]", "the N[n] that NP[m] SEE[m]"],
    "VP": [*2 * ["SLEEP[n] ."], "SEE[n] the N[m] ."],
}
WORDS = {  # -s makes a noun plural and a verb singular; nothing else shows number
    "N": "dog cat boy girl king queen doctor teacher farmer lawyer".split(),
    "SEE": "see like know help".split(),
    "SLEEP": "sleep run work wait".split(),
    "SAY": "say think".split(),
    "PREP": "near behind with above".split(),
}
NATURAL = (80, 13, 5, 1, 1)  # % with 0, 1, 2, 3, 4+ attractors
BALANCED = (20, 20, 20, 20, 20)


def expand(symbol, plural, rng, others=None):
    """The words of `symbol`. plural: its number, None if it has none; others: that of every [m]."""
    if symbol in WORDS:
        word = rng.choice(WORDS[symbol])
        adds_s = plural is True if symbol == "N" else plural is False  # dogs; sleeps
        return [word + "s"] if adds_s else [word]
    if symbol not in GRAMMAR:
        return [symbol]

    number_of_m = others
    if number_of_m is None:
        number_of_m = rng.random() < 0.5
    words = []
    for part in rng.choice(GRAMMAR[symbol]).split():
        name, _, mark = part.partition("[")
        number = {"n]": plural, "m]": number_of_m}.get(mark)  # else None: it has no number
        words += expand(name, number, rng, others)
    return words


def draw_sentence(rng, hard):
    """hard: all nouns between subject and verb are attractors."""
    plural = rng.random() < 0.5
    opening = expand("OPENING", None, rng)
    rest = expand("VP", plural, rng)
    subject = expand("NP", plural, rng, others=not plural if hard else None)

    nouns = [word for word in subject if word.removesuffix("s") in WORDS["N"]]
    return Sentence(
        text=" ".join(opening + subject + rest),
        verb=len(opening + subject),
        plural=plural,
        attractors=sum(noun.endswith("s") != plural for noun in nouns),
        distance=len(subject) - 1,  # the head follows "the"
    )


def synthetic_sentences(examples, seed=0):
    """{"train": `examples`, "validation": a fourth, "test": twice as many [Sentence]}; the last two
    never have the words before the verb of a training sentence."""
    rng = random.Random(seed)
    sizes = {"train": examples, "validation": examples // 4, "test": min(2 * examples, 2000)}
    parts = {}
    in_training = set()
    for name, size in sizes.items():
        shares = BALANCED if name == "test" else NATURAL
        wanted = [size * share // 100 for share in shares]
        wanted[0] += size - sum(wanted)  # what rounding down has left
        parts[name] = []
        while any(wanted):
            sentence = draw_sentence(rng, hard=name == "test")
            group = min(sentence.attractors, 4)
            if wanted[group] and words_before_verb(sentence) not in in_training:
                wanted[group] -= 1
                parts[name].append(sentence)
        if name == "train":
            in_training = {words_before_verb(sentence) for sentence in parts["train"]}
    return parts


# ---- Real sentences: Linzen, Dupoux & Goldberg 2016 (arXiv 1611.01368) ---------------------------


def whole_number(text):
    """3 of "3", or of "3.0" as pandas writes it beside gaps; -1, unknown, of a gap."""
    if text in ("", "nan"):
        return -1
    number = float(text)
    if not number.is_integer():
        raise ValueError(f"{text} is no whole number")
    return int(number)


def read_sentence(fields):
    """Sentence of the six columns' fields; ValueError where they make none."""
    text, verb, tag, nouns, others, distance = fields
    quoted = text.startswith('"') and text.endswith('"') and '""' in text[1:-1]
    if quoted and '"' not in text[1:-1].replace('""', ""):
        raise ValueError("a quoted field: write the table with quoting=csv.QUOTE_NONE")
    words = [word for word in text.split(" ") if word]  # a no-break space is no blank
    verb = whole_number(verb) - 1
    if not 0 < verb < len(words):
        raise ValueError(f"verb_index {verb + 1} of {len(words)} words")
    if tag not in ("VBZ", "VBP"):
        raise ValueError(f"verb_pos {tag} is neither VBZ nor VBP")

    nouns = whole_number(nouns)
    others = whole_number(others)
    return Sentence(
        text=" ".join(words),
        verb=verb,
        plural=tag == "VBP",
        attractors=others if nouns == others else -1,
        distance=whole_number(distance),
    )


def read_table(path):
    """[Sentence] of a tab-separated table; its first line names the columns."""
    opener = gzip.open if path.suffix == ".gz" else open
    number = 1
    sentences = []
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:  # with or without a byte order mark
            names = file.readline().rstrip("\n").split("\t")
            missing = [column for column in COLUMNS if column not in names]
            if missing:
                raise ValueError(f"there is no column {missing[0]} (names are not quoted)")
            places = [names.index(column) for column in COLUMNS]

            for number, line in enumerate(file, 2):
                fields = line.rstrip("\n").split("\t")
                if fields == [""]:
                    continue
                if len(fields) <= max(places):
                    raise ValueError(f"{len(fields)} fields")
                sentences.append(read_sentence([fields[place] for place in places]))
    except (OSError, EOFError, zlib.error, ValueError, OverflowError) as error:
        sys.exit(f"error: {path}, line {number}: {error}; the columns are {', '.join(COLUMNS)}")
    return sentences


def load_sentences(args):
    """{"train", "validation", "test": [Sentence]}; sets args.data, args.files, args.available."""
    names = ("train", "validation", "test")
    files = [args.data_dir / f"{name}.tsv" for name in names]
    if not files[0].exists():
        files = [args.data_dir / TABLE]

    if args.data == "linzen" and not files[0].exists():
        try:
            args.data_dir.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, files[0])  # beside its place, then renamed
        except OSError as error:
            sys.exit(f"error: {URL}: {error}: put it into {args.data_dir}")
    if args.data == "auto" and not files[0].exists():
        args.data = "synthetic"
        print(f"*** WARNING: no train.tsv or {TABLE} in {args.data_dir}.\n*** SYNTHETIC "
              "sentences: no figure of this run is about English.", file=sys.stderr)
    if args.data == "synthetic":
        args.files = {}
        args.available = SYNTHETIC_EXAMPLES
        return synthetic_sentences(args.examples or SYNTHETIC_EXAMPLES)

    args.data = "linzen"
    args.files = {path.name: path.stat().st_size for path in files if path.exists()}
    tables = [read_table(path) for path in files]
    if len(files) == 1:
        table = tables[0]
        random.Random(0).shuffle(table)
        first = len(table) // 10  # 10 % and 1 %, as in the paper
        second = len(table) * 11 // 100
        tables = [table[:first], table[first:second], table[second:]]

    args.available = len(tables[0])
    if args.examples and args.examples > args.available:
        sys.exit(f"error: --examples: there are {args.available:,} training sentences")
    if args.examples and args.examples < args.available:
        tables[0] = random.Random(0).sample(tables[0], args.examples)
    return dict(zip(names, tables))


SINGULAR_TO_PLURAL = {"is": "are", "has": "have", "was": "were", "does": "do", "VBZ": "VBP"}
PLURAL_TO_SINGULAR = {plural: singular for singular, plural in SINGULAR_TO_PLURAL.items()}


def other_form(verb, plural, vocabulary):
    """The other number's form of `verb` (or of a tag) in the vocabulary; else None."""
    if plural:
        known = PLURAL_TO_SINGULAR
        guesses = [verb + "s", verb + "es", verb[:-1] + "ies"]
    else:
        known = SINGULAR_TO_PLURAL
        guesses = [verb[:-1], verb[:-2], verb[:-3] + "y"]
    if verb in known:
        guesses = [known[verb]]
    for form in guesses:
        if form in vocabulary and form.isalpha():  # not the "'" of "'s"
            return form
    return None


# ---- A split: a dictionary of tensors, a row for each sentence, on the CPU -----------------------


def encode(sentences, vocabulary, objective):
    """A split; None where no sentence can be used. A classifier reads the words before the verb; a
    language model START, all words and END, if it knows both forms. answer_at: the last token
    before the verb."""
    @cache  # the verbs are few
    def tokens_of_forms(verb, plural):  # (singular, plural)
        other = other_form(verb, plural, vocabulary)
        if verb not in vocabulary or other is None:
            return UNKNOWN, UNKNOWN
        if plural:
            return vocabulary[other], vocabulary[verb]
        return vocabulary[verb], vocabulary[other]

    tokens = []
    rows = []
    for sentence in sentences:
        words = sentence.text.split(" ")
        if len(words) > LONGEST_SENTENCE:
            continue
        forms = tokens_of_forms(words[sentence.verb], sentence.plural)
        if objective == "lm":
            if forms == (UNKNOWN, UNKNOWN):
                continue
            row = [START, *(vocabulary.get(word, UNKNOWN) for word in words), END]
            answer_at = sentence.verb  # START comes first
        else:
            row = [vocabulary.get(word, UNKNOWN) for word in words[:sentence.verb]]
            answer_at = sentence.verb - 1
        tokens.append(torch.tensor(row, dtype=torch.int16))
        rows.append({
            "lengths": len(row),
            "answer_at": answer_at,
            "labels": int(sentence.plural),
            "attractors": sentence.attractors,
            "distance": sentence.distance,
            "forms": forms,
        })
    if not rows:
        return None

    split = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    split["tokens"] = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=PAD)
    return split


def take(split, chosen):
    return {name: column[chosen] for name, column in split.items()}


def load_data(args):
    """{"train", "validation", "test", "probe" (1,000 of the test): split}; sets args.tokens. The
    vocabulary is that of the training sentences."""
    sentences = load_sentences(args)
    counts = Counter(word for sentence in sentences["train"] for word in sentence.text.split(" "))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[:VOCABULARY_SIZE]
    vocabulary = {word: number for number, word in enumerate(ranked, END + 1)}
    args.tokens = len(vocabulary) + END + 1

    data = {}
    for name, part in sentences.items():
        data[name] = encode(part, vocabulary, args.objective)
        if data[name] is None:
            sys.exit(f"error: no {name} sentence in {args.data_dir} can be used: of at most "
                     f"{LONGEST_SENTENCE} words, for --objective lm with both forms of the verb")

    chosen = torch.randperm(len(data["test"]["labels"]), generator=torch.Generator().manual_seed(0))
    data["probe"] = take(data["test"], chosen[:1000])
    return data


def batches_by_length(lengths, batch_size, generator):
    """One epoch: (batches, batch_size) sentence numbers. Shuffled sentences are sorted by length in
    windows of 50 batches: little padding, much chance. What fills no batch is left out before:
    after, it would be the longest."""
    order = torch.randperm(len(lengths), generator=generator)
    order = order[:len(order) // batch_size * batch_size]

    window = torch.arange(len(order)) // (50 * batch_size)
    by_window_then_length = window * (int(lengths.max()) + 1) + lengths[order]
    order = order[by_window_then_length.argsort(stable=True)]

    batches = order.view(-1, batch_size)
    return batches[torch.randperm(len(batches), generator=generator)]


def inputs_and_targets(batch, answers):
    """(tokens to read, positions of the answers in the flattened tokens, targets), on the CPU.
    answers: after the "last" word before the verb, after "every" word, or the "next" words."""
    tokens = batch["tokens"][:, :batch["lengths"].max()].long()
    if answers == "next":
        targets = tokens[:, 1:]
        tokens = tokens[:, :-1]
        is_asked = targets != PAD
    else:
        targets = batch["labels"][:, None].expand_as(tokens)
        is_asked = tokens != PAD
    if answers == "last":
        is_asked = torch.arange(tokens.shape[1]) == batch["answer_at"][:, None]
    positions = is_asked.flatten().nonzero().squeeze(1)
    return tokens, positions, targets[is_asked]


# ---- Evaluation ----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, split, args):
    """(logits (sentences, 2) of singular and plural, states (sentences, width) before the verb,
    mean loss), in eval mode, on the CPU. Language models: log-probabilities of the verb's two
    forms, and the loss of all words."""
    model.eval()
    answers = "next" if args.objective == "lm" else "last"
    at_once = LOGITS_AT_ONCE // model.head.out_features
    logits = []
    representations = []
    losses = []

    order = split["lengths"].argsort(stable=True)
    for part in order.split(64):
        batch = take(split, part)
        tokens, positions, targets = inputs_and_targets(batch, answers)
        before_verb = torch.arange(len(part)) * tokens.shape[1] + batch["answer_at"]

        with torch.autocast("cpu", torch.bfloat16, enabled=args.amp):
            states = model.states(tokens.to(args.device)).flatten(0, 1)
            for at, target in zip(positions.split(at_once), targets.split(at_once)):
                said = model.head(states[at.to(args.device)]).float()
                losses.append(F.cross_entropy(said, target.to(args.device), reduction="none"))
            verb_states = states[before_verb.to(args.device)]
            verb_logits = model.head(verb_states).float()

        if args.objective == "lm":
            forms = batch["forms"].to(args.device)
            verb_logits = verb_logits.log_softmax(dim=1).gather(1, forms)
        logits.append(verb_logits.cpu())
        representations.append(verb_states.float().cpu())

    as_before = order.argsort()
    mean_loss = torch.cat(losses).mean().item()
    return torch.cat(logits)[as_before], torch.cat(representations)[as_before], mean_loss


def test_all(model, data, args):
    """({"test": metrics}, {"test_logits", "test_labels": tensor}). A-accuracy: mean over 0, 1, 2,
    3, 4+ attractors, D-accuracy: over distances 1..16 (Abnar et al. 2020, sec. 3.1). Balanced: for
    each number of attractors, the mean of the accuracies on singular and on plural subjects. Where
    most subjects are plural, who always says "plural" has a high accuracy, but a balanced one of
    0.5."""
    split = data["test"]
    logits, _, loss = evaluate(model, split, args)
    correct = (logits.argmax(dim=1) == split["labels"]).double()
    correct[logits.isnan().any(dim=1)] = math.nan  # argmax takes NaN for an answer

    def accuracy(inside):
        return correct[inside].mean().item()

    def balanced_accuracy(inside):
        of_numbers = [inside & (split["labels"] == label) for label in (0, 1)]
        return fmean(accuracy(of_number) for of_number in of_numbers if of_number.any())

    def by_group(groups, values, score):  # without those that no sentence is in
        return {str(value): score(groups == value) for value in values if (groups == value).any()}

    def mean(scores):
        return fmean(scores.values()) if scores else None

    attractors = split["attractors"].clamp(max=4)
    by_attractors = by_group(attractors, range(5), accuracy)
    balanced = by_group(attractors, range(5), balanced_accuracy)
    metrics = {
        **common.classification_metrics(logits, split["labels"]),
        "a_accuracy": mean(by_attractors),
        "balanced_a_accuracy": mean(balanced),
        "d_accuracy": mean(by_group(split["distance"], range(1, 17), accuracy)),
        "accuracy_by_attractors": by_attractors,
        "balanced_accuracy_by_attractors": balanced,
    }
    if args.objective == "lm":
        metrics["perplexity"] = torch.tensor(loss).exp().item()  # infinite where it diverged
    return {"test": metrics}, {"test_logits": logits, "test_labels": split["labels"]}


def training_loss(model, data, args, examples):
    """Mean loss on the first training sentences, for analyze.py."""
    _, _, loss = evaluate(model, take(data["train"], slice(examples)), args)
    return loss


# ---- Which run it is: its configuration, its folder, its relatives -------------------------------

# Flags that enter a run's name where they change its configuration.
FLAGS = ("examples", "epochs", "batch_size", "lr", "temperature", "alpha", "teacher_seed",
         "answers")


def given(value, default):
    return default if value is None else value


def recipe(args, model):
    """The recipe of `model`, with the flags that were given."""
    epochs = SENTENCES_READ // given(args.examples, args.available)
    epochs = max(2, min(epochs, MOST_EPOCHS[args.objective]))
    found = {"epochs": epochs, **RECIPES[args.objective, family(model)]}
    for flag in found:
        found[flag] = given(getattr(args, flag), found[flag])
    return found


def default_answers(args):
    """After which word a model answers where --answers doesn't say so."""
    if args.objective == "lm":
        return "next"
    if args.kd and not BIDIRECTIONAL & {args.student, args.teacher}:
        return "every"
    return "last"


def configure(args):
    """All that the results depend on; device and precision are no part of it."""
    config = {
        "task": "sva",
        "objective": args.objective,
        "data": args.data,
        "files": args.files,
        "examples": given(args.examples, args.available),
        "student": args.student,
        "seed": args.seed,
        "kd": args.kd,
        "answers": given(args.answers, default_answers(args)),
        **recipe(args, args.student),
    }
    if args.kd:
        teacher = recipe(args, args.teacher)
        if args.kd == "online":  # the teacher learns in the student's batches
            teacher = {"lr": teacher["lr"]}
        config |= {f"teacher_{key}": value for key, value in teacher.items()}
        config["teacher"] = args.teacher
        config["teacher_seed"] = given(args.teacher_seed, args.seed + 1)
        temperature = 1.0 if args.kd == "hard" else TEMPERATURE[args.objective]
        config["temperature"] = given(args.temperature, temperature)
        config["alpha"] = given(args.alpha, 1.0)
    return config


def run_folder(args):
    """<out>/<task>/<run name>/seed<k>"""
    task = f"sva-lm-{args.data}" if args.objective == "lm" else f"sva-{args.data}"
    return args.out / task / common.run_name(args, configure, FLAGS) / f"seed{args.seed}"


def changed(args, **changes):
    return argparse.Namespace(**vars(args) | changes)


def plain(args, model, seed):
    """The flags of the run of `model` without distillation."""
    return changed(args, student=model, seed=seed, kd=None, answers=None)


def relatives(args):
    """The runs to compare with, as "<run name>/seed<k>"; plain: one of each kind of model."""
    def path(relative):
        return "/".join(run_folder(relative).parts[-2:])

    found = {"plain": {model: path(plain(args, model, args.seed)) for model in MODELS}}
    if args.kd:
        found["self_taught"] = path(changed(args, teacher=args.student))
        found["permuted"] = path(changed(args, kd="permuted"))
    if args.kd and args.kd != "online":
        teacher_seed = configure(args)["teacher_seed"]
        found["teacher"] = path(plain(args, args.teacher, teacher_seed))
    return found


# ---- Training ------------------------------------------------------------------------------------


def load_teacher(args, data):
    """(model, test metrics) of the teacher that was trained before: a plain run, loaded, or trained
    now. It is in eval mode and learns no more."""
    plain_args = plain(args, args.teacher, configure(args)["teacher_seed"])
    record = train(plain_args, data)
    teacher = build_model(args.teacher, plain_args.seed, args)
    common.load_weights(teacher, run_folder(plain_args))
    return teacher.eval().requires_grad_(False), record["metrics"]


@torch.no_grad()
def answer_every_word(model, split, args):
    """Logits after every word (sentences, longest, 2), in eval mode, on the CPU."""
    model.eval()
    logits = torch.zeros(*split["tokens"].shape, 2)
    for part in split["lengths"].argsort(stable=True).split(64):
        longest = split["lengths"][part].max()
        tokens = split["tokens"][part, :longest].long().to(args.device)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.amp):
            logits[part, :longest] = model(tokens).float().cpu()
    return logits


def permute(soft_labels, split, answers, seed):
    """Permutes soft labels (sentences, longest, 2), in place, among all answers of one label: no
    function of the sentence is left."""
    _, positions, targets = inputs_and_targets(split, answers)
    flat = soft_labels.view(-1, 2)
    torch.manual_seed(seed)
    for label in (0, 1):
        own = positions[targets == label]
        flat[own] = flat[own[torch.randperm(len(own))]]


def backward_in_parts(loss_of, targets, *inputs, at_once):
    """Backward pass of the mean of loss_of(targets, *inputs), `at_once` answers at a time. Returns
    that mean.

    A language model has 10,000 logits a word, and those of a batch fill gigabytes. So each part
    goes from states to loss and back at once, which frees its logits. `leaves` are the inputs, cut
    off from the models: there the parts' gradients gather, and go through the models in one piece.
    """
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
    parts = [x.split(at_once) for x in (targets, *leaves)]
    total = 0.0
    for part_targets, *part_inputs in zip(*parts):
        # The parts add up to the mean over all.
        loss = loss_of(part_targets, *part_inputs) * len(part_targets) / len(targets)
        loss.backward()
        total += loss.detach()  # no .item(): a GPU would wait for it in every step

    for x, leaf in zip(inputs, leaves):
        if x.requires_grad:
            x.backward(leaf.grad)
    return total


def train(args, data):
    """Train, test and save the run that `args` describe, unless it is done; returns its record."""
    folder = run_folder(args)
    config = configure(args)
    record = common.find_run(folder, config)
    if record:
        print(f"{folder} is finished: delete it to repeat it")
        return record
    split = data["train"]
    answers = config["answers"]

    # ---- The teacher. A trained classifier has answered once; a language model's 10,000 logits a
    # word fit nowhere, so it answers in the loop, as an online teacher does, which learns there.
    soft_labels = None
    live_teacher = None
    if args.kd == "online":
        live_teacher = build_model(args.teacher, config["teacher_seed"], args)
    elif args.kd:
        trained_teacher, teacher_metrics = load_teacher(args, data)
        if args.objective == "lm":
            live_teacher = trained_teacher
        else:
            soft_labels = answer_every_word(trained_teacher, split, args)
    if args.kd == "permuted":
        permute(soft_labels, split, answers, args.seed)
    elif args.kd == "hard":  # its decisions alone, as good as certain: infinity would make NaN
        soft_labels = 1000.0 * F.one_hot(soft_labels.argmax(dim=2), 2)

    # ---- The student, and what it learns with
    student = build_model(args.student, args.seed, args)
    groups = [{"params": list(student.parameters()), "lr": config["lr"]}]
    if args.kd == "online":
        groups.append({"params": list(live_teacher.parameters()), "lr": config["teacher_lr"]})

    lengths = split["lengths"]
    epochs = config["epochs"]
    batch_size = min(config["batch_size"], len(lengths))
    steps = len(lengths) // batch_size  # the incomplete last batch is left out
    at_once = LOGITS_AT_ONCE // student.head.out_features

    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in groups],
        pct_start=0.25,  # the part of the steps in which the rate rises
        total_steps=max(epochs * steps, 5),  # it divides by zero below 5
    )

    sizes = {name: len(part["labels"]) for name, part in data.items()}
    sizes["tokens"] = args.tokens
    sizes["parameters"] = sum(parameter.numel() for parameter in student.parameters())
    print(f"\n{folder}, on {args.device}: {sizes['train']:,} sentences, {sizes['parameters']:,} "
          f"parameters, {epochs} epochs of {steps} batches")

    def loss_of(targets, states, soft=None):
        """soft: the teacher's logits, or the states that its head has still to read."""
        with torch.autocast("cpu", torch.bfloat16, enabled=args.amp):
            logits = student.head(states).float()
            if live_teacher:
                soft = live_teacher.head(soft).float()

        if args.kd:
            loss = common.kd_loss(logits, soft, targets, config["temperature"], config["alpha"])
        else:
            loss = F.cross_entropy(logits, targets)
        if args.kd == "online":  # kd_loss detaches `soft`: this trains the teacher alone
            loss = loss + F.cross_entropy(soft, targets)
        return loss

    # ---- The loop. Dropout and order depend on the seed alone: twins see the same batches
    snapshots = {0: evaluate(student, data["probe"], args)[1]}  # {epoch: representations}
    torch.manual_seed(args.seed)
    order = torch.Generator().manual_seed(args.seed)
    history = []
    begin = time.perf_counter()

    for epoch in range(1, epochs + 1):
        epoch_begin = time.perf_counter()
        total_loss = 0.0
        student.train()

        for step, batch in enumerate(batches_by_length(lengths, batch_size, order), 1):
            tokens, positions, targets = inputs_and_targets(take(split, batch), answers)
            tokens = tokens.to(args.device)
            positions = positions.to(args.device)
            targets = targets.to(args.device)

            with torch.autocast("cpu", torch.bfloat16, enabled=args.amp):
                states = student.states(tokens).flatten(0, 1)
                inputs = [states.index_select(0, positions)]
                if live_teacher:
                    soft = live_teacher.states(tokens).flatten(0, 1)
                    inputs.append(soft.index_select(0, positions))
            if soft_labels is not None:
                soft = soft_labels[batch, :tokens.shape[1]].flatten(0, 1).to(args.device)
                inputs.append(soft.index_select(0, positions))

            optimizer.zero_grad()
            total_loss += backward_in_parts(loss_of, targets, *inputs, at_once=at_once)
            for group in groups:
                nn.utils.clip_grad_norm_(group["params"], 1.0)
            optimizer.step()
            schedule.step()

            if step % 20 == 0 and sys.stdout.isatty():
                print(f"epoch {epoch}/{epochs}  batch {step}/{steps}", end="\r", flush=True)

        mean_loss = float(total_loss) / steps
        seconds = time.perf_counter() - epoch_begin
        if not math.isfinite(mean_loss):
            sys.exit(f"error: the loss is {mean_loss} in epoch {epoch}: try a lower --lr")

        logits, _, _ = evaluate(student, data["validation"], args)
        correct = logits.argmax(dim=1) == data["validation"]["labels"]
        accuracy = correct.float().mean().item()
        history.append({"epoch": epoch, "loss": mean_loss, "seconds": seconds,
                        "validation_accuracy": accuracy})

        is_power_of_two = epoch & (epoch - 1) == 0
        if is_power_of_two or epoch == epochs:  # representations change most at the beginning
            snapshots[epoch] = evaluate(student, data["probe"], args)[1]

        left = (time.perf_counter() - begin) / epoch * (epochs - epoch)
        print(f"epoch {epoch}/{epochs}  loss {mean_loss:.4f}  validation accuracy "
              f"{accuracy:.4f}  {left:.0f} s left", flush=True)

    # ---- The tests, and the record of the run
    metrics, outputs = test_all(student, data, args)
    outputs["probe_epochs"] = list(snapshots)
    outputs["probe_representations"] = torch.stack(list(snapshots.values()))
    record = {
        "config": config,
        **relatives(args),
        "sizes": sizes,
        "history": history,
        "environment": common.environment(args, __file__),
        "metrics": metrics,
    }
    if args.kd == "online":
        teacher_metrics, _ = test_all(live_teacher, data, args)
    if args.kd:
        record["teacher_metrics"] = teacher_metrics
    common.save_run(folder, record, outputs, student)
    return record


def print_results(args, record):
    """Test metrics of the student and, after distillation, of its teacher and plain twin."""
    rows = {}
    if args.kd:
        twin_args = plain(args, args.student, args.seed)
        twin = common.find_run(run_folder(twin_args), configure(twin_args))
        rows["teacher"] = record["teacher_metrics"]
        rows["plain twin"] = twin["metrics"] if twin else None
    rows["student"] = record["metrics"]

    def shown(value):  # run.json has null for NaN
        return "-" if value is None else f"{value:.4f}"

    names = [name for name, value in record["metrics"]["test"].items() if isinstance(value, float)]
    print(f"\n{'test':<16}" + "  ".join(f"{name:<10}" for name in names))
    for role, tests in rows.items():
        if tests is None:
            print(f"{role:<16}not there yet: the same command without --kd and its flags")
            continue
        cells = [f"{shown(tests['test'][name]):<{max(len(name), 10)}}" for name in names]
        print(f"{role:<16}" + "  ".join(cells))


# ---- Flags ---------------------------------------------------------------------------------------


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="%(prog)s [flags], see --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    # Models and distillation
    add("--student", choices=MODELS, default="transformer-seq", help="model to train")
    add("--teacher", choices=MODELS, help="model to learn from (default: the student's kind)")
    add("--kd", nargs="?", const="offline", choices=["offline", "online", "permuted", "hard"],
        help="distil from a trained teacher (plain --kd); online: train both together; permuted: "
             "permute the soft labels among the answers of one label; hard: keep only which class "
             "is the more probable one")
    add("--temperature", type=float,
        help="softens both outputs (default: {classification:g}, language models {lm:g})".format(
            **TEMPERATURE))
    add("--alpha", type=float, help="share of the KD loss, the rest: cross-entropy (default: 1)")
    # What is learned
    add("--objective", choices=["classification", "lm"], default="classification",
        help="the verb's number from the words before it, or the next word")
    add("--answers", choices=["last", "every"],
        help="classifiers learn after that word (default: every with --kd, else last)")
    # Training, of student and teacher (default: each model's recipe)
    add("--epochs", type=int)
    add("--batch-size", type=int)
    add("--lr", type=float, help="the highest learning rate")
    add("--seed", dest="seeds", type=int, nargs="+", default=[0],
        help="initialisation, order of the batches, dropout; of many, one is run after the other")
    add("--teacher-seed", type=int, help="(default: seed + 1)")
    # Data
    add("--data", choices=["auto", "linzen", "synthetic"], default="auto",
        help="linzen: fetched if not in --data-dir; auto: else those of a grammar")
    add("--examples", type=int,
        help=f"training sentences (default: all, or {SYNTHETIC_EXAMPLES} synthetic)")
    add("--data-dir", type=Path, default="data", help="where they are or go")
    # Where and how
    add("--out", type=Path, default="runs", help="folder for runs")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16, on CPUs",
        default=torch.cpu._is_avx512_bf16_supported())
    args = parser.parse_args(argv)

    for flag in ("teacher", "teacher_seed", "temperature", "alpha"):
        if getattr(args, flag) is not None and not args.kd:
            parser.error(f"--{flag.replace('_', '-')} has no effect without --kd")
    for flag, least in (("epochs", 1), ("batch_size", 1), ("examples", 50), ("temperature", 1e-3)):
        value = getattr(args, flag)
        if value is not None and not value >= least:
            parser.error(f"--{flag.replace('_', '-')} must be at least {least}")
    if args.kd == "hard" and args.temperature:
        parser.error("--temperature has no effect on --kd hard")
    if args.teacher_seed in args.seeds:
        parser.error("--teacher-seed must not be the student's own")

    args.seed = args.seeds[0]  # the others follow in main
    args.teacher = args.teacher or args.student
    if args.objective == "lm" and (args.answers or args.kd in ("permuted", "hard")):
        parser.error("--answers, --kd permuted and --kd hard are for classifiers")
    every_word = args.objective == "lm" or args.answers == "every"
    if every_word and BIDIRECTIONAL & {args.student, args.teacher}:
        parser.error("a bidirectional model can't answer after every word")

    args.amp = args.amp and args.device.type == "cpu"  # GPUs have TF32
    try:
        torch.empty(1, device=args.device)
        args.out.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, AssertionError, OSError) as error:
        parser.error(str(error).splitlines()[0])
    return args


def main(argv=None):
    args = parse_arguments(argv)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs
    # oneDNN keeps a program for each shape of batch: 2 GB.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    data = load_data(args)
    for seed in args.seeds:
        args.seed = seed
        record = train(args, data)
        print_results(args, record)


if __name__ == "__main__":
    main()
