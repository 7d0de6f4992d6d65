"""Train an LSTM or a Transformer on English subject-verb agreement, alone or on soft labels.

    python train_sva.py --student transformer-seq                             # no distillation
    python train_sva.py --student transformer-seq --kd                        # self-distillation
    python train_sva.py --teacher lstm --student transformer-seq --kd         # distillation
    python train_sva.py --teacher lstm --student transformer-seq --kd --objective lm

"The keys near the cabinet ..." is or are? The subject decides, not the nouns in between. Such
attractors are rare in training and frequent in the test: it asks for the inductive bias. A run is
run.json, outputs.npz and model.pt in runs/sva-<data>/<run name>/seed<k>/ (sva-lm-<data>: language
models). After Abnar et al. 2020 (arXiv 2006.00555).
"""

import argparse
import gzip
import math
import os
import random
import sys
import zlib
from collections import Counter
from functools import cache, partial
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import common

# One recipe for all setups of a model, chosen on another grammar.
RECIPES = {("classification", "lstm"): {"batch_size": 128, "lr": 3e-3},
           ("classification", "transformer"): {"batch_size": 128, "lr": 1e-3},
           ("lm", "lstm"): {"batch_size": 32, "lr": 6e-3},
           ("lm", "transformer"): {"batch_size": 64, "lr": 2e-3}}
TEMPERATURE = {"classification": 2.0, "lm": 1.0}
SENTENCES_READ, MOST_EPOCHS = 560_000, {"classification": 24, "lm": 30}
SYNTHETIC_EXAMPLES = 750
TABLE = "agr_50_mostcommon_10K.tsv.gz"
URL = f"https://www.dropbox.com/s/5axdu3q9jkxzjy8/{TABLE}?dl=1"
COLUMNS = ("sentence", "verb_index", "verb_pos", "n_intervening", "n_diff_intervening", "distance")
VOCABULARY_SIZE = 10_000
PAD, UNKNOWN, START, END = range(4)  # token numbers; the words' numbers follow
LONGEST_SENTENCE = 254  # words
LOGITS_AT_ONCE = 2_500_000  # more take more time and memory


# ---- Models: tokens (n, length), PAD on the right -> states (n, length, width); head -> answers --


class LSTM(nn.Module):
    """Two LSTM layers; padding comes too late to matter."""
    causal = True

    def __init__(self, vocabulary, outputs, width, dropout=None):
        super().__init__()
        if dropout is None:  # classifiers learn by heart
            dropout = 0.25 if outputs == 2 else 0.1
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=PAD)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True, dropout=dropout)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, outputs)

    def states(self, tokens):
        return self.drop(self.lstm(self.drop(self.embedding(tokens)))[0])


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
        qkv = self.queries_keys_values(self.norm_attention(x))
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(  # (n, heads, length, width / heads)
            q, k, v, mask, self.dropout if self.training else 0.0, is_causal=mask is None)
        x = x + self.drop(self.project(attended.transpose(1, 2).flatten(2)))
        return x + self.drop(self.mlp(self.norm_mlp(x)))


class Transformer(nn.Module):
    """causal: a word sees the words before it; else it sees all, and every state is that of a class
    token in front. shared: one layer serves at every depth, told apart by an embedding (Universal
    Transformer, Dehghani et al. 2019, arXiv 1807.03819)."""

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

    def states(self, tokens):
        x, mask = self.embedding(tokens), None  # None: causal
        if not self.causal:
            x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)
            mask = F.pad(tokens != PAD, (1, 0), value=True)[:, None, None]
        x = x + self.position.weight[:x.shape[1]]
        for layer in range(self.layers):
            if self.depth is not None:
                x = x + self.depth.weight[layer]
            x = self.blocks[layer % len(self.blocks)](x, mask)
        return self.norm(x) if self.causal else self.norm(x[:, :1]).expand(-1, x.shape[1] - 1, -1)


MODELS = {
    "lstm": partial(LSTM, width=128),
    "transformer": partial(Transformer, width=96, causal=False),
    "transformer-seq": partial(Transformer, width=96),
    "ut-seq": partial(Transformer, width=160, shared=True),
}


def build_model(name, seed, tokens, objective, device):
    """A new model; its weights depend on name and seed alone."""
    torch.manual_seed(seed)
    return MODELS[name](tokens, tokens if objective == "lm" else 2).to(device)


class Sentence(NamedTuple):
    text: str  # words separated by blanks
    verb: int  # its place among them
    plural: bool
    attractors: int  # nouns between subject and verb, if all are of the other number; else -1
    distance: int  # words from the subject to the verb; -1 if unknown


# ---- Synthetic sentences: "near the dogs , the king behind the boys sleeps ."

# What a symbol becomes, one of the list. [n]: of its own number; [m]: singular or plural by chance,
# the same wherever [m] stands in a production.
GRAMMAR = {
    "OPENING": ["", *2 * ["PREP NP[m] ,"], *2 * ["NP[m] SAY[m] that"]],
    "NP": [*5 * ["the N[n]"], *3 * ["the N[n] PREP NP[m]"],
           "the N[n] that SEE[n] NP[m]", "the N[n] that NP[m] SEE[m]"],
    "VP": [*2 * ["SLEEP[n] ."], "SEE[n] the N[m] ."]}
WORDS = {  # -s makes a noun plural and a verb singular; nothing else shows number
    "N": "dog cat boy girl king queen doctor teacher farmer lawyer".split(),
    "SEE": "see like know help".split(),
    "SLEEP": "sleep run work wait".split(),
    "SAY": "say think".split(),
    "PREP": "near behind with above".split()}
NATURAL, BALANCED = (80, 13, 5, 1, 1), (20, 20, 20, 20, 20)  # % with 0, 1, 2, 3, 4+ attractors


def expand(symbol, plural, rng, others=None):
    """The words of `symbol`. plural: its number, if any; others: that of every [m]."""
    if symbol in WORDS:
        word = rng.choice(WORDS[symbol])
        return [word + "s" if plural is (symbol == "N") else word]
    if symbol not in GRAMMAR:
        return [symbol]
    chance = rng.random() < 0.5 if others is None else others
    numbers, words = {"n]": plural, "m]": chance, "": None}, []
    for part in rng.choice(GRAMMAR[symbol]).split():
        name, _, number = part.partition("[")
        words += expand(name, numbers[number], rng, others)
    return words


def draw_sentence(rng, hard):
    """hard: all nouns between subject and verb are attractors."""
    plural = rng.random() < 0.5
    opening, rest = expand("OPENING", None, rng), expand("VP", plural, rng)
    subject = expand("NP", plural, rng, others=not plural if hard else None)
    nouns = [word for word in subject if word.removesuffix("s") in WORDS["N"]]
    attractors = sum(noun.endswith("s") != plural for noun in nouns)
    return Sentence(" ".join(opening + subject + rest), len(opening + subject), plural, attractors,
                    len(subject) - 1)  # the head follows "the"


def synthetic_sentences(examples, seed=0):
    """{"train": `examples`, "validation": a fourth, "test": twice as many [Sentence]}; the last two
    never have the words before the verb of a training sentence."""
    rng, parts, seen = random.Random(seed), {}, set()
    for name, size, shares in (("train", examples, NATURAL),
                               ("validation", examples // 4, NATURAL),
                               ("test", min(2 * examples, 2000), BALANCED)):
        parts[name], wanted = [], [size * share // 100 for share in shares]
        wanted[0] += size - sum(wanted)
        while any(wanted):
            sentence = draw_sentence(rng, hard=name == "test")
            group = min(sentence.attractors, 4)
            if wanted[group] and before_verb(sentence) not in seen:
                wanted[group] -= 1
                parts[name].append(sentence)
        seen = {before_verb(sentence) for sentence in parts["train"]}
    return parts


def before_verb(sentence):
    return tuple(sentence.text.split()[:sentence.verb])


# ---- Real sentences: Linzen, Dupoux & Goldberg 2016 (arXiv 1611.01368) ---------------------------


def read_table(path):
    """[Sentence] of a tab-separated table; its first line names the columns."""
    number, sentences = 1, []
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            names = file.readline().rstrip("\n").split("\t")
            pick = itemgetter(*(names.index(name) for name in COLUMNS))
            for number, line in enumerate(file, 2):
                text, verb, tag, nouns, others, distance = pick(line.rstrip("\n").split("\t"))
                verb, plural = int(verb) - 1, ("VBZ", "VBP").index(tag) == 1
                if not 0 < verb < len(text.split()):
                    raise ValueError(f"verb_index {verb + 1}")
                attractors = int(others) if nouns == others else -1
                sentences.append(Sentence(text, verb, plural, attractors, int(distance or -1)))
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        sys.exit(f"error: {path}, line {number}: {error}; the columns are {', '.join(COLUMNS)}")
    return sentences


def load_sentences(args):
    """{"train", "validation", "test": [Sentence]}; sets args.data, args.files, args.available."""
    names = "train", "validation", "test"
    files = [args.data_dir / f"{name}.tsv" for name in names]
    if not files[0].exists():
        files = [args.data_dir / TABLE]
    if args.data == "linzen" and not files[0].exists():
        try:
            args.data_dir.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, files[0])
        except OSError as error:
            sys.exit(f"error: {URL}: {error}: put it into {args.data_dir}")
    if args.data == "auto" and not files[0].exists():
        args.data = "synthetic"
        print(f"*** WARNING: no train.tsv or {TABLE} in {args.data_dir}.\n*** SYNTHETIC "
              "sentences: no figure of this run is about English.", file=sys.stderr)
    args.files, args.available = {}, SYNTHETIC_EXAMPLES
    if args.data == "synthetic":
        return synthetic_sentences(args.examples or SYNTHETIC_EXAMPLES)
    args.data, args.files = "linzen", {path.name: path.stat().st_size for path in files}
    tables = [read_table(path) for path in files]
    if len(files) == 1:
        random.Random(0).shuffle(tables[0])  # 10 % and 1 %, as in the paper
        first, second = len(tables[0]) // 10, len(tables[0]) * 11 // 100
        tables = [tables[0][:first], tables[0][first:second], tables[0][second:]]
    args.available = len(tables[0])
    if args.examples and args.examples > args.available:
        sys.exit(f"error: --examples: there are {args.available:,} training sentences")
    if args.examples and args.examples < args.available:
        tables[0] = random.Random(0).sample(tables[0], args.examples)
    return dict(zip(names, tables))


def other_form(verb, plural, vocabulary):
    """The other number's form of `verb` (or of a tag) in the vocabulary; else None."""
    irregular = {"is": "are", "has": "have", "was": "were", "does": "do", "VBZ": "VBP"}
    regular = verb[:-1], verb[:-2], verb[:-3] + "y"
    if plural:
        irregular = {plural: singular for singular, plural in irregular.items()}
        regular = verb + "s", verb + "es", verb[:-1] + "ies"
    for form in (irregular[verb],) if verb in irregular else regular:
        if form in vocabulary and form.isalpha():  # not the "'" of "'s"
            return form
    return None


# ---- A split: a dictionary of tensors, a row for each sentence, on the CPU -----------------------


def encode(sentences, vocabulary, objective):
    """A split. A classifier reads the words before the verb; a language model START, all words and
    END, if it knows both forms. answer_at: the last token before the verb."""
    @cache  # the verbs are few
    def tokens_of_forms(verb, plural):
        forms = [vocabulary.get(verb), vocabulary.get(other_form(verb, plural, vocabulary))]
        return (forms[::-1] if plural else forms) if None not in forms else [UNKNOWN, UNKNOWN]

    rows, columns, lm = [], [], objective == "lm"
    for text, verb, plural, attractors, distance in sentences:
        words = text.split()
        forms = tokens_of_forms(words[verb], plural)
        if len(words) > LONGEST_SENTENCE or (lm and UNKNOWN in forms):
            continue
        row = [vocabulary.get(word, UNKNOWN) for word in (words if lm else words[:verb])]
        rows.append(torch.tensor([START, *row, END] if lm else row, dtype=torch.int16))
        columns.append((len(rows[-1]), verb if lm else verb - 1, plural, attractors, distance,
                        *forms))
    if not rows:
        sys.exit("error: no sentence is left: use more --examples")
    names = "lengths", "answer_at", "labels", "attractors", "distance"
    split = dict(zip(names, torch.tensor(columns).T), forms=torch.tensor(columns)[:, -2:])
    return split | {"tokens": nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)}


def take(split, chosen):
    return {name: column[chosen] for name, column in split.items()}


def load_data(args):
    """{"train", "validation", "test", "probe" (1,000 of the test): split}; sets args.tokens. The
    vocabulary is that of the training sentences."""
    sentences = load_sentences(args)
    counts = Counter(word for sentence in sentences["train"] for word in sentence.text.split())
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[:VOCABULARY_SIZE]
    vocabulary = {word: number for number, word in enumerate(ranked, END + 1)}
    args.tokens = len(vocabulary) + END + 1
    data = {name: encode(part, vocabulary, args.objective) for name, part in sentences.items()}
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
    by_window_and_length = window * (int(lengths.max()) + 1) + lengths[order]
    batches = order[torch.argsort(by_window_and_length, stable=True)].view(-1, batch_size)
    return batches[torch.randperm(len(batches), generator=generator)]


def questions(batch, answers):
    """(tokens to read, where to answer in the flattened tokens, right answers). answers: after the
    "last" or "every" word, or the "next" words. On the CPU."""
    tokens = batch["tokens"][:, :batch["lengths"].max()].long()
    right, asked = batch["labels"][:, None].expand_as(tokens), tokens != PAD
    if answers == "next":
        tokens, right, asked = tokens[:, :-1], tokens[:, 1:], asked[:, 1:]
    elif answers == "last":
        asked = torch.arange(tokens.shape[1]) == batch["answer_at"][:, None]
    return tokens, asked.flatten().nonzero().squeeze(1), right[asked]


# ---- Training ------------------------------------------------------------------------------------


def read(model, tokens, where):
    """States (len(where), width) at these of the flattened tokens; model.head gives answers."""
    return model.states(tokens).flatten(0, 1).index_select(0, where)


@torch.no_grad()
def evaluate(model, split, objective, amp, device):
    """(logits (sentences, 2) of singular and plural, mean loss), in eval mode, on the CPU; language
    models: log-probabilities of the verb's two forms, and the loss of all words."""
    model.eval()
    logits, losses = [], []
    order = split["lengths"].argsort(stable=True)
    for part in order.split(64):
        batch = take(split, part)
        tokens, where, right = questions(batch, "next" if objective == "lm" else "last")
        verb = torch.arange(len(part)) * tokens.shape[1] + batch["answer_at"]
        at_once = LOGITS_AT_ONCE // model.head.out_features
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            states = read(model, tokens.to(device), torch.cat([where, verb]).to(device))
            parts = states[:len(where)].split(at_once)
            for said, word in zip(parts, right.to(device).split(at_once)):
                losses.append(F.cross_entropy(model.head(said).float(), word, reduction="none"))
            verbs = model.head(states[len(where):]).float()
        if objective == "lm":
            verbs = verbs.log_softmax(dim=1).gather(1, batch["forms"].to(device))
        logits.append(verbs.cpu())
    return torch.cat(logits)[order.argsort()], torch.cat(losses).mean().item()


@torch.no_grad()
def represent(model, split, amp, device):
    """States (sentences, width) before the verb, in eval mode, on the CPU."""
    model.eval()
    states, order = [], split["lengths"].argsort(stable=True)
    for part in order.split(64):
        tokens, where, _ = questions(take(split, part), "last")
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            states.append(read(model, tokens.to(device), where.to(device)))
    return torch.cat(states).float().cpu()[order.argsort()]


@torch.no_grad()
def answer_every_word(model, split, amp, device):
    """Logits after every word (sentences, longest, 2), in eval mode, on the CPU."""
    model.eval()
    logits = torch.zeros(*split["tokens"].shape, 2)
    for part in split["lengths"].argsort(stable=True).split(64):
        tokens = split["tokens"][part, :split["lengths"][part].max()].long().to(device)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            logits[part, :tokens.shape[1]] = model.head(model.states(tokens)).float().cpu()
    return logits


def test_all(model, data, objective, amp, device):
    """({"test": metrics}, {"test_logits", "test_labels": tensor}). A-accuracy: mean over 0, 1, 2,
    3, 4+ attractors, D-accuracy: over distances 1..16 (Abnar et al. 2020, sec. 3.1)."""
    split = data["test"]
    logits, loss = evaluate(model, split, objective, amp, device)
    correct = (logits.argmax(dim=1) == split["labels"]).double()

    def by_group(groups, values):  # without those that no sentence is in
        return {str(k): correct[groups == k].mean().item() for k in values if (groups == k).any()}

    by_attractors = by_group(split["attractors"].clamp(max=4), range(5))
    by_distance = by_group(split["distance"], range(1, 17))
    metrics = {**common.classification_metrics(logits, split["labels"]),
               "a_accuracy": fmean(by_attractors.values()) if by_attractors else None,
               "d_accuracy": fmean(by_distance.values()) if by_distance else None,
               "accuracy_by_attractors": by_attractors}
    if objective == "lm":
        metrics["perplexity"] = torch.tensor(loss).exp().item()  # infinite where it diverged
    return {"test": metrics}, {"test_logits": logits, "test_labels": split["labels"]}


def reads_both_ways(*names):
    return not all(MODELS[name](END + 1, 2).causal for name in names)


def configure(args, **changes):
    """(folder, configuration) of the run that `args`, with changes, describe."""
    args = argparse.Namespace(**vars(args) | changes)
    config = {"task": "sva", "objective": args.objective, "data": args.data, "files": args.files,
              "examples": args.available, "student": args.student, "seed": args.seed,
              "kd": args.kd, "answers": "last"}
    models = {"": args.student}
    if args.kd:
        models["teacher_"] = args.teacher
        config |= {"teacher": args.teacher, "teacher_seed": args.seed + 1,
                   "temperature": TEMPERATURE[args.objective], "alpha": 1.0}
    if args.objective == "lm":
        config["answers"] = "next"
    elif args.kd and not reads_both_ways(*models.values()):
        config["answers"] = "every"
    epochs = SENTENCES_READ // (args.examples or args.available)
    epochs = max(2, min(epochs, MOST_EPOCHS[args.objective]))
    for role, model in models.items():
        recipe = RECIPES[args.objective, "lstm" if model.startswith("lstm") else "transformer"]
        config |= {role + key: value for key, value in {"epochs": epochs, **recipe}.items()}
    if args.kd == "online":  # the teacher learns in the student's batches
        del config["teacher_epochs"], config["teacher_batch_size"]
    name, config = common.apply_flags(args, config)
    task = f"sva-lm-{args.data}" if args.objective == "lm" else f"sva-{args.data}"
    return args.out / task / name / f"seed{args.seed}", config


def relatives(args):
    """The runs to compare with, as "<run name>/seed<k>"; plain: one of each kind of model."""
    def path(**changes):
        return "/".join(configure(args, **changes)[0].parts[-2:])

    plain = {"kd": None, "answers": None}
    found = {"plain": {model: path(student=model, **plain) for model in MODELS}}
    if args.kd:
        found |= {"untaught": path(**plain), "self_taught": path(teacher=args.student),
                  "permuted": path(kd="permuted")}
    if args.kd in ("offline", "permuted"):
        found["teacher"] = path(student=args.teacher, seed=args.teacher_seed, **plain)
    return found


def train(args, data):
    """Train, test and save the run that `args` describe, unless it is there; returns its record."""
    (folder, config), device, kd = configure(args), args.device, args.kd
    record = common.find_run(folder, config)
    if record:
        print(f"{folder} is finished: delete it to repeat it")
        return record
    objective, answers, split = args.objective, config["answers"], data["train"]
    if kd:
        teacher = build_model(args.teacher, args.teacher_seed, args.tokens, objective, device)
    if kd in ("offline", "permuted"):
        plain = {"student": args.teacher, "seed": args.teacher_seed, "kd": None, "answers": None}
        teacher_metrics = train(argparse.Namespace(**vars(args) | plain), data)["metrics"]
        common.load_weights(teacher, configure(args, **plain)[0]).eval().requires_grad_(False)
        if objective == "classification":  # asked once for each word
            split = split | {"soft": answer_every_word(teacher, split, args.amp, device)}
    if kd == "permuted":
        torch.manual_seed(args.seed)
        _, where, right = questions(split, answers)
        soft = split["soft"].view(-1, 2)
        for label in (0, 1):
            own = where[right == label]
            soft[own] = soft[own[torch.randperm(len(own))]]

    student = build_model(args.student, args.seed, args.tokens, objective, device)
    groups = [{"params": list(student.parameters()), "lr": config["lr"]}]
    if kd == "online":
        groups.append({"params": list(teacher.parameters()), "lr": config["teacher_lr"]})
    lengths, epochs = split["lengths"], config["epochs"]
    batch_size = min(config["batch_size"], len(lengths))
    steps, at_once = len(lengths) // batch_size, LOGITS_AT_ONCE // student.head.out_features
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=[group["lr"] for group in groups], pct_start=0.25,
        total_steps=max(epochs * steps, 5))  # it divides by zero below 5
    sizes = {name: len(part["labels"]) for name, part in data.items()} | {"tokens": args.tokens}
    sizes["parameters"] = sum(parameter.numel() for parameter in student.parameters())
    print(f"\n{folder}, on {device}: {sizes['train']:,} sentences, {sizes['parameters']:,} "
          f"parameters, {epochs} epochs of {steps} batches")
    history, begin = [], perf_counter()
    snapshots = {0: represent(student, data["probe"], args.amp, device)}
    # Dropout and order depend on the seed alone: twins see equal batches.
    torch.manual_seed(args.seed)
    order = torch.Generator().manual_seed(args.seed)
    for epoch in range(1, epochs + 1):
        start, total_loss = perf_counter(), 0.0
        student.train()
        for step, batch in enumerate(batches_by_length(lengths, batch_size, order), 1):
            sentences = take(split, batch)
            x, where, y = (tensor.to(device) for tensor in questions(sentences, answers))
            with torch.autocast("cpu", torch.bfloat16, enabled=args.amp):
                states = read(student, x, where)
                if "soft" in split:
                    soft = sentences["soft"][:, :x.shape[1]].flatten(0, 1).to(device)[where]
                elif kd:
                    soft = read(teacher, x, where)
            # Head and loss take a language model's words in parts, whose gradients meet at these
            # copies: faster and smaller.
            optimizer.zero_grad()
            copy = states.detach().requires_grad_()
            soft_copy = soft.detach().requires_grad_(kd == "online") if kd else copy
            for said, taught, right in zip(*(x.split(at_once) for x in (copy, soft_copy, y))):
                with torch.autocast("cpu", torch.bfloat16, enabled=args.amp):
                    logits = student.head(said).float()
                    if kd and "soft" not in split:
                        taught = teacher.head(taught).float()
                loss = F.cross_entropy(logits, right) if not kd else common.kd_loss(
                    logits, taught, right, config["temperature"], config["alpha"])
                if kd == "online":  # reaches the teacher alone
                    loss = loss + F.cross_entropy(taught, right)
                loss = loss * len(right) / len(y)
                loss.backward()
                total_loss += loss.detach()  # no .item(): a GPU would wait
            states.backward(copy.grad)
            if kd == "online":
                soft.backward(soft_copy.grad)
            for group in groups:
                nn.utils.clip_grad_norm_(group["params"], 1.0)
            optimizer.step()
            schedule.step()
            if step % 20 == 0 and sys.stdout.isatty():
                print(f"epoch {epoch}/{epochs}  batch {step}/{steps}", end="\r", flush=True)

        mean_loss, seconds = float(total_loss) / steps, perf_counter() - start
        if not math.isfinite(mean_loss):
            sys.exit(f"error: the loss is {mean_loss} in epoch {epoch}: try a lower --lr")
        logits, _ = evaluate(student, data["validation"], objective, args.amp, device)
        right = logits.argmax(dim=1) == data["validation"]["labels"]
        history.append({"epoch": epoch, "loss": mean_loss, "seconds": seconds,
                        "validation_accuracy": right.float().mean().item()})
        if epoch & (epoch - 1) == 0 or epoch == epochs:  # 1, 2, 4, 8 ... and the last
            snapshots[epoch] = represent(student, data["probe"], args.amp, device)
        left = (perf_counter() - begin) / epoch * (epochs - epoch)
        print(f"epoch {epoch}/{epochs}  loss {mean_loss:.4f}  validation accuracy "
              f"{history[-1]['validation_accuracy']:.4f}  {left:.0f} s left", flush=True)

    metrics, outputs = test_all(student, data, objective, args.amp, device)
    outputs["probe_epochs"] = list(snapshots)
    outputs["probe_representations"] = torch.stack(list(snapshots.values()))
    record = {"config": config, **relatives(args), "sizes": sizes, "history": history,
              "environment": common.environment(args, __file__), "metrics": metrics}
    if kd == "online":
        teacher_metrics, _ = test_all(teacher, data, objective, args.amp, device)
    if kd:
        record["teacher_metrics"] = teacher_metrics
    common.save_run(folder, record, outputs, student)
    return record


def print_results(args, record):
    """Test metrics of the student and its teacher and untaught twin."""
    rows = {"student": record["metrics"]}
    if args.kd:
        twin = common.find_run(*configure(args, kd=None, answers=None)) or {"metrics": None}
        rows = {"teacher": record["teacher_metrics"], "untaught twin": twin["metrics"], **rows}
    names = [name for name, value in record["metrics"]["test"].items() if isinstance(value, float)]
    print(f"\n{'test':<16}" + "".join(f"{name:<12}" for name in names))
    for role, tests in rows.items():
        cells = ["not there yet: the same command without --kd and its flags"] if not tests else [
            f"{tests['test'][name] or math.nan:.4f}" for name in names]
        print(f"{role:<16}" + "".join(f"{cell:<12}" for cell in cells))


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [flags], see --help",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--student", choices=MODELS, default="transformer-seq", help="model to train")
    add("--teacher", choices=MODELS, help="model to learn from (default: the student's kind)")
    add("--kd", nargs="?", const="offline", choices=["offline", "online", "permuted"],
        help="distil from a trained teacher (plain --kd); online: train both; permuted: permute "
             "soft labels among answers of one label")
    add("--objective", choices=["classification", "lm"], default="classification",
        help="the verb's number from the words before it, or the next word")
    add("--answers", choices=["last", "every"],
        help="classifiers learn after that word (default: every with --kd, else last)")
    add("--temperature", type=float, help="softens both outputs (default: 2, language models 1)")
    add("--alpha", type=float, help="share of the KD loss, the rest: cross-entropy (default: 1)")
    for flag, kind in (("--epochs", int), ("--batch-size", int), ("--lr", float)):
        add(flag, type=kind, help="for student and teacher (default: each model's recipe)")
    add("--seed", type=int, default=0, help="initialisation, order of the batches, dropout")
    add("--teacher-seed", type=int, help="(default: seed + 1)")
    add("--data", choices=["auto", "linzen", "synthetic"], default="auto",
        help="linzen: fetched if not in --data-dir; auto: else those of a grammar")
    add("--examples", type=int, help="training sentences (default: all, or 750 synthetic)")
    add("--data-dir", type=Path, default="data", help="where they are or go")
    add("--out", type=Path, default="runs", help="folder for runs")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16, on CPUs",
        default=torch.cpu._is_avx512_bf16_supported())
    args = parser.parse_args(argv)
    for flag in ("teacher", "teacher_seed", "temperature", "alpha"):
        if getattr(args, flag) is not None and not args.kd:
            parser.error(f"--{flag.replace('_', '-')} has no effect without --kd")
    for flag, least in (("epochs", 1), ("batch_size", 1), ("examples", 50), ("temperature", 1e-3)):
        if getattr(args, flag) is not None and getattr(args, flag) < least:
            parser.error(f"--{flag.replace('_', '-')} must be at least {least}")
    args.teacher = args.teacher or args.student
    args.teacher_seed = args.seed + 1 if args.teacher_seed is None else args.teacher_seed
    if args.teacher_seed == args.seed:
        parser.error("--teacher-seed must not be the student's own")
    if args.objective == "lm" and (args.answers or args.kd == "permuted"):
        parser.error("--answers and --kd permuted are for classifiers")
    every = args.objective == "lm" or args.answers == "every"
    if every and reads_both_ways(args.student, args.teacher):
        parser.error("a model that reads both ways can't answer after every word")
    try:
        torch.empty(1, device=args.device)
        args.out.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, AssertionError, OSError) as error:
        parser.error(str(error).splitlines()[0])
    args.amp = args.amp and args.device.type == "cpu"  # GPUs have TF32
    return args


def main(argv=None):
    args = parse_arguments(argv)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs
    # oneDNN keeps programs for all shapes: 2 GB.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    print_results(args, train(args, load_data(args)))


if __name__ == "__main__":
    main()
