"""Compare finished runs: tables in Markdown, the paper's claims with a verdict, figures.

    python analyze.py runs                                        # tables on the terminal
    python analyze.py runs --json analysis.json --plots figures   # and all numbers, and figures (needs matplotlib)

Accuracies, calibration and all comparisons are computed anew from each run's outputs.npz, barriers from its model.pt;
only timing and perplexity come from run.json. What is missing is named at the end, and the rest is done without it.
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import train_mnist
import train_sva

# Whose inductive bias suits the task better than one's own.
STRONGER = {"mlp": "cnn", "transformer": "lstm", "transformer-seq": "lstm", "ut-seq": "lstm",
            "transformer-seq-small": "lstm-small"}
MODEL_ORDER = ["mlp", "cnn", "transformer", "transformer-seq", "transformer-seq-small", "ut-seq", "lstm-small", "lstm"]
TESTS = {"mnist": ("test", "scaled", "translated"), "sva": ("test",)}
OUT_OF_DISTRIBUTION = {"mnist": ("scaled", "translated"), "sva": ("test",)}
MARGIN = 0.05  # a change of CKA below this counts as little
BARRIER_POINTS, BARRIER_EXAMPLES = 21, {"mnist": 500, "sva": 250}  # from training and test each; a compromise with time

# Abnar et al. 2020, MNIST: accuracy, then ECE, on the test digits, scaled, translated.
PAPER_MNIST = {"cnn": (.992, .962, .981, .011, .060, .028), "mlp": (.985, .794, .373, .015, .175, .564),
               "cnn-to-mlp": (.988, .904, .510, .013, .109, .432), "mlp-to-mlp": (.985, .839, .395, .015, .155, .555),
               "cnn-to-cnn": (.991, .951, .978, .014, .068, .033), "mlp-to-cnn": (.990, .955, .976, .013, .054, .030)}


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


def t_quantile(degrees):
    """The two-sided 95 % point of Student's t with `degrees` (1, 2, ...) degrees of freedom, such as 12.706 for 1.

    Bisection on P(|T| < t), which is a finite sum for whole degrees: Abramowitz & Stegun 1964, eq. 26.7.3 and 26.7.4.
    """
    def inside(t):
        angle = math.atan(t / math.sqrt(degrees))
        odd = degrees % 2
        term = total = math.cos(angle) if odd else 1.0
        for k in range(2 + odd, degrees - 1, 2):
            term *= math.cos(angle) ** 2 * (k - 1) / k
            total += term
        total *= math.sin(angle)
        return 2 / math.pi * (angle + (total if degrees > 1 else 0)) if odd else total

    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return high


def t_interval(values):
    """(mean, low, high): the 95 % t-interval of the mean; NaN for low and high where there are fewer than two."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def verdict(values, margin=None):
    """supported: the interval is above 0 (with `margin`: inside -margin..margin); contradicted: below 0 (outside).

    inconclusive: neither; untested: fewer than 3 values.
    """
    if len(values) < 3:
        return "untested"
    _, low, high = t_interval(values)
    if margin is not None:
        inside, outside = -margin < low and high < margin, high < -margin or low > margin
        return "supported" if inside else "contradicted" if outside else "inconclusive"
    return "supported" if low > 0 else "contradicted" if high < 0 else "inconclusive"


def classical_mds(distances, dimensions=2):
    """Points (n, dimensions) whose distances come closest to `distances` (n, n). Torgerson 1952: classical scaling."""
    n = len(distances)
    centre = torch.eye(n, dtype=torch.double) - 1 / n
    values, vectors = torch.linalg.eigh(-0.5 * centre @ distances.double().square() @ centre)  # ascending
    return (vectors * values.clamp(min=0).sqrt())[:, -dimensions:].flip(1)


# ----------------------------------------------------------------------------------------------------------------------
# Runs


class Run(NamedTuple):
    """One finished run. outputs: {name: tensor} from outputs.npz. metrics: {test set: metrics}, from the outputs.

    timing: {what: seconds, or examples or tokens a second}.
    """

    folder: Path
    name: str
    seed: int
    config: dict
    record: dict
    outputs: dict
    metrics: dict
    timing: dict


class Group(NamedTuple):
    """Runs of one task on the same data, sorted by kind and seed; at[name, seed] is a run's place among them."""

    title: str
    task: str
    runs: list
    at: dict

    def kinds(self):
        """{run name: [its runs]}, in order."""
        kinds = {}
        for run in self.runs:
            kinds.setdefault(run.name, []).append(run)
        return kinds


def read_run(folder):
    """The Run in `folder`; UserError, KeyError, ValueError ... where it is damaged or lacks what is needed."""
    record = common.load_run(folder)
    outputs = {name: torch.from_numpy(array) for name, array in common.load_outputs(folder).items()}
    config, metrics = record["config"], {}
    for test in TESTS[config["task"]]:
        logits, labels = outputs[f"{test}_logits"].float(), outputs[f"{test}_labels"]
        if config["task"] == "mnist":
            metrics[test] = common.classification_metrics(logits, labels)
        else:
            metrics[test] = train_sva.agreement_metrics(logits, labels, outputs["test_attractors"],
                                                        outputs["test_distance"])
            if config["objective"] == "lm":
                perplexity = record["metrics"][test]["perplexity"]
                metrics[test]["perplexity"] = math.nan if perplexity is None else float(perplexity)
    # Errors here and not later.
    if len([int(epoch) for epoch in outputs["probe_epochs"]]) != len(outputs["probe_representations"]):
        raise ValueError("not as many epochs as snapshots")
    for key in ("data", "student", *(("teacher", "teacher_seed") if config["kd"] else ())):
        if not isinstance(config[key], int if key == "teacher_seed" else str):
            raise TypeError(f"{key} {config[key]!r}")
    timing = {key: float(value) for key, value in record.get("timing", {}).items()}
    return Run(folder, common.run_name(config), int(config["seed"]), config, record, outputs, metrics, timing)


def kind_order(name):
    """Sorts by student, the plain runs first, then by teacher."""
    teacher, _, student = name.removesuffix("-online").rpartition("-to-")
    rank = {model: place for place, model in enumerate(MODEL_ORDER)}
    return rank.get(student, 99), teacher != "", rank.get(teacher, 99), name


def load_groups(root, problems):
    """Yield one Group at a time, to spare memory; `problems` gets a line for each thing missing or left out."""
    folders = {}
    for folder in common.find_runs(root):
        folders.setdefault(folder.parent.parent, []).append(folder)
    problems += [f"unfinished: {path.parent}" for path in sorted(Path(root).glob("**/outputs.npz"))
                 if not (path.parent / "run.json").exists()]
    for parent in sorted(folders):
        runs = []
        for folder in folders[parent]:
            try:
                runs.append(read_run(folder))
            except common.UserError as error:
                problems.append(f"left out: {error}")
            except Exception as error:  # a run of another version can differ in any way
                problems.append(f"left out: {folder} is not a run this version reads ({type(error).__name__}: {error})")
        if not runs:
            continue

        def data_of(run):
            keys = ("task", "data", "objective", "examples", "bytes")
            return json.dumps([run.config.get(key) for key in keys] + run.outputs["test_labels"].tolist())

        data = [data_of(run) for run in runs]
        usual, seen, kept = statistics.mode(data), set(), []
        for run, its in zip(runs, data):
            if its != usual:
                problems.append(f"left out: {run.folder} has other data than most runs beside it")
            elif (run.name, run.seed) in seen:
                problems.append(f"left out: {run.folder} is a second {run.name} of seed {run.seed}")
            else:
                kept.append(run)
                seen.add((run.name, run.seed))
        runs = sorted(kept, key=lambda run: (kind_order(run.name), run.seed))
        task, source = runs[0].config["task"], runs[0].config["data"]
        title = {"mnist": "MNIST", "sva": "Subject-verb agreement"}[task]
        title += {"mnist": "", "synthetic": " (synthetic data)"}.get(source, f" ({source})")
        title += ", language models" * (runs[0].config.get("objective") == "lm") + f": {parent}"
        group = Group(title, task, runs, {(run.name, run.seed): place for place, run in enumerate(runs)})
        seeds = {run.seed for run in runs}
        for name, kind in group.kinds().items():
            missing = sorted(seeds - {run.seed for run in kind})
            if missing:
                problems.append(f"{parent}: no {name} with seed {', '.join(map(str, missing))}")
            unequal = {key for run in kind for key, value in run.config.items()
                       if key not in ("seed", "teacher_seed") and value != kind[0].config.get(key)}
            if unequal:
                problems.append(f"{parent}: the runs of {name} differ in {', '.join(sorted(unequal))}")
        yield group


# ----------------------------------------------------------------------------------------------------------------------
# Comparisons: matrices (runs, runs), a value for every pair


def behaviour(logits, labels):
    """Per-sample behaviour of all pairs: {"agreement", "error consistency", "divergence": (models, models) double}.

    logits: (models, examples, classes). labels: (examples,). For each pair what common.py's error_consistency and
    js_divergence give; agreement is the share of examples with the same top answer.
    """
    predictions = logits.argmax(dim=2)
    probabilities = logits.double().softmax(dim=2)
    correct = (predictions == labels).double()
    accuracy = correct.mean(dim=1)
    observed = (correct @ correct.T + (1 - correct) @ (1 - correct).T) / len(labels)
    expected = accuracy[:, None] * accuracy + (1 - accuracy)[:, None] * (1 - accuracy)
    kappa = torch.where(observed >= 1 - 1e-12, 1.0, (observed - expected) / (1 - expected))

    def entropy(p):  # (..., examples, classes) -> (...), bits, mean over examples
        return -torch.special.xlogy(p, p).sum(dim=-1).mean(dim=-1) / math.log(2)

    own = entropy(probabilities)
    agreement, divergence = torch.empty_like(kappa), torch.empty_like(kappa)
    for place, (prediction, p) in enumerate(zip(predictions, probabilities)):
        agreement[place] = (predictions == prediction).double().mean(dim=1)
        divergence[place] = (entropy((probabilities + p) / 2) - (own + own[place]) / 2).clamp(0, 1)
    return {"agreement": agreement, "error consistency": kappa, "divergence": divergence}


def similarities(representations, rows=50):
    """{"RSA", "CKA": (models, models) double}, what common.py's rsa and linear_cka give for each pair.

    representations: list of (examples, features). Both measures are inner products of the models' (examples,
    examples) similarity matrices; these are made once, `rows` rows at a time, for all models together.
    """
    prepare = {"RSA": lambda x: F.normalize(x.float(), dim=1),
               "CKA": lambda x: F.normalize((x - x.mean(dim=0)).float().flatten(), dim=0).view_as(x)}
    examples, result = len(representations[0]), {}
    for measure in prepare:
        features = [prepare[measure](x) for x in representations]
        total = torch.zeros(len(features), len(features), dtype=torch.double)
        for first in range(0, examples, rows):
            block = torch.stack([x[first:first + rows] @ x.T for x in features])  # (models, rows, examples)
            block = F.normalize(block, dim=2) if measure == "RSA" else block * examples
            block = block.flatten(1)
            total += (block @ block.T).double()
        norms = total.diagonal().sqrt()
        result[measure] = total / examples if measure == "RSA" else total / (norms[:, None] * norms)
    return result


class Paths(NamedTuple):
    """Training paths of all runs. final: {"RSA", "CKA"} between the finished models. distance: between paths, the mean
    of 1 - RSA over equal epochs. length, straightness: per run. snapshots: 1 - RSA between all snapshots, which belong
    to the runs `run_of` and the `epochs`."""

    final: dict
    distance: torch.Tensor
    length: list
    straightness: list
    snapshots: torch.Tensor
    run_of: list
    epochs: list


def training_paths(runs):
    """-> Paths of `runs`, from their probe representations."""
    run_of = [place for place, run in enumerate(runs) for _ in run.outputs["probe_epochs"]]
    epochs = [int(epoch) for run in runs for epoch in run.outputs["probe_epochs"]]
    pairs = similarities([x for run in runs for x in run.outputs["probe_representations"]])
    snapshots = (1 - pairs["RSA"]).clamp(min=0)
    steps = [[i for i, owner in enumerate(run_of) if owner == place] for place in range(len(runs))]
    last = torch.tensor([places[-1] for places in steps])
    length = [sum(snapshots[i, j].item() for i, j in zip(places, places[1:])) for places in steps]
    straightness = [snapshots[places[0], places[-1]].item() / total if total else math.nan
                    for places, total in zip(steps, length)]
    same_epoch = torch.tensor(epochs)[:, None] == torch.tensor(epochs)
    owner = F.one_hot(torch.tensor(run_of)).double()  # (snapshots, runs)
    distance = owner.T @ (snapshots * same_epoch) @ owner / (owner.T @ same_epoch.double() @ owner)
    final = {measure: matrix[last][:, last] for measure, matrix in pairs.items()}
    return Paths(final, distance, length, straightness, snapshots, run_of, epochs)


# ----------------------------------------------------------------------------------------------------------------------
# Basins: are two solutions of one architecture connected by low loss?


def barrier(losses):
    """How far the loss on the straight way rises above the line between its ends; 0 where it never does.

    losses: at equally spaced points of the way. Frankle et al. 2020 (arXiv 1912.05671), sec. 2, in the form of
    Entezari et al. 2022 (arXiv 2110.06296), eq. 1. For accuracies give their negatives.
    """
    line = torch.linspace(0, 1, len(losses), dtype=torch.double)
    losses = torch.as_tensor(losses, dtype=torch.double)
    return (losses - (losses[0] * (1 - line) + losses[-1] * line)).max().item()


def interpolate(model, state_a, state_b, measure, points=BARRIER_POINTS):
    """[measure(model)] with the weights (1-a) state_a + a state_b, for `points` equally spaced a in 0..1.

    measure: called with the model in eval mode; re-estimating batch-norm statistics is left to it.
    """
    results = []
    for a in torch.linspace(0, 1, points).tolist():
        model.load_state_dict({name: torch.lerp(state_a[name], state_b[name], a) if state_a[name].is_floating_point()
                               else state_a[name] for name in state_a})
        results.append(measure(model.eval()))
    return results


@torch.no_grad()
def reestimate_batch_norm(model, inputs, amp=False):
    """Replace running means and variances by those of `inputs`; without it a barrier is an artefact of old ones."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over batches; here there is one
        norm.train()
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=amp):
        model(inputs)
    model.eval()


def mnist_measure(group, data_dir, device):
    """-> (build, measure): an untrained model for a run; (train loss, accuracy, test loss, accuracy) of a model."""
    config = group.runs[0].config
    mnist = train_mnist.load_mnist(data_dir, quiet=True) if config["data"] == "mnist" else None
    data = train_mnist.make_data(config["data"], config["examples"], mnist, device)
    parts = [[tensor[:BARRIER_EXAMPLES["mnist"]] for tensor in data[name]] for name in ("train", "test")]
    amp = common.has_bfloat16(device)

    def measure(model):
        reestimate_batch_norm(model, train_mnist.to_input(parts[0][0]), amp)
        values = []
        for images, labels in parts:
            scores = common.classification_metrics(train_mnist.evaluate(model, images, amp)[0], labels)
            values += [scores["nll"], scores["accuracy"]]
        return values

    return lambda run: train_mnist.place(train_mnist.build_model(run.config["student"], 0), device), measure


def sva_measure(group, data_dir, device):
    """As mnist_measure; the loss of a language model is that of all words, its accuracy that of the verb."""
    config = group.runs[0].config
    source, objective = config["data"], config["objective"]
    args = train_sva.parse_arguments(["--objective", objective, "--data", source,
                                      "--out", str(group.runs[0].folder.parents[2]),
                                      *(["--data-dir", str(data_dir)] if source == "linzen" else
                                        ["--examples", str(config["examples"])])])
    args.device = device
    data, described, _ = train_sva.make_data(*train_sva.find_data(args), args)
    if described != group.runs[0].record.get("data"):
        raise common.UserError(f"the sentences in {data_dir} are not those of the runs")
    n, words, amp = BARRIER_EXAMPLES["sva"], described["vocabulary"], common.has_bfloat16(device)
    chosen = torch.randperm(len(data["train"].lengths), generator=torch.Generator().manual_seed(0))[:n]
    train = train_sva.Split(data["train"].tokens, *(column[chosen] for column in data["train"][1:]))
    probe = train_sva.Split(data["probe"].tokens, *(column[:n] for column in data["probe"][1:]))

    def measure(model):
        values = []
        for split in (train, probe):
            logits, _, perplexity = train_sva.evaluate(model, split, objective, amp)
            scores = common.classification_metrics(logits, split.labels.cpu())
            values += [scores["nll"] if perplexity is None else math.log(perplexity), scores["accuracy"]]
        return values

    return lambda run: train_sva.build_model(run.config["student"], 0, words, objective).to(device), measure


def barrier_pairs(group):
    """[(what the pair is, place, place)]: twins from one initialisation, students of one teacher, plain seeds."""
    pairs = []
    for name, runs in group.kinds().items():
        config = runs[0].config
        model, teacher = config["student"], config.get("teacher")
        if teacher is None:
            pairs += [(f"{model}: two plain seeds", group.at[name, a.seed], group.at[name, b.seed])
                      for a, b in zip(runs, runs[1:])]
        elif config["kd"] == "offline" and (teacher == model or STRONGER.get(model) == teacher
                                            or STRONGER.get(teacher) == model):
            pairs += [(f"{model}: plain, taught by {teacher}", group.at[model, run.seed], group.at[name, run.seed])
                      for run in runs if (model, run.seed) in group.at]
            pairs += [(f"{model}: two taught by one {teacher}", group.at[name, a.seed], group.at[name, b.seed])
                      for i, a in enumerate(runs) for b in runs[i + 1:]
                      if a.config["teacher_seed"] == b.config["teacher_seed"]]
    return pairs


def measure_barriers(group, data_dir, device, problems):
    """[{"pair", "runs", "train_loss", "train_accuracy", "test_loss", "test_accuracy": 21 values each}]."""
    pairs = barrier_pairs(group)
    if not pairs:
        return []
    try:
        build, measure = (mnist_measure if group.task == "mnist" else sva_measure)(group, data_dir, device)
    except (common.UserError, FileNotFoundError, KeyError) as error:
        problems.append(f"no barriers for {group.title}: {error} (--data-dir says where the data are)")
        return []
    results, states, start = [], {}, time.perf_counter()
    for done, (what, *places) in enumerate(pairs):
        live(f"{group.title}: barrier {done + 1}/{len(pairs)}, "
             f"{(time.perf_counter() - start) / max(done, 1) * (len(pairs) - done):.0f} s left")
        try:
            for place in places:
                if place not in states:
                    states[place] = common.load_weights(build(group.runs[place]), group.runs[place].folder).state_dict()
            values = interpolate(build(group.runs[places[0]]), *(states[place] for place in places), measure)
        except (common.UserError, KeyError) as error:
            unknown = "this version has no model " * isinstance(error, KeyError)
            problems.append(f"no barrier for {what}: {unknown}{error}")
            continue
        curves = zip(("train_loss", "train_accuracy", "test_loss", "test_accuracy"), zip(*values))
        results.append({"pair": what, "runs": [f"{group.runs[place].name}/seed{group.runs[place].seed}"
                                               for place in places],
                        **{name: list(curve) for name, curve in curves}})
    live("")
    return results


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def live(text):
    """A line on the terminal that the next one overwrites; nothing where stderr is not a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def mean_and_spread(values, digits=3):
    """0.912±0.005 (standard deviation over seeds), 0.912 for one value, - for none."""
    values = [value for value in values if value is not None and math.isfinite(value)]
    if not values:
        return "-"
    spread = f"±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


class Table:
    """A Markdown table of means over seeds. columns: {title: (+1 higher is better, -1 lower, 0 neither; digits)}."""

    def __init__(self, caption, first, columns):
        self.caption, self.first, self.columns, self.rows, self.notes = caption, first, columns, {}, {}

    def add(self, label, values, notes=()):
        """values: one list of numbers a column. notes: what is put in brackets behind the first cells."""
        self.rows[label], self.notes[label] = dict(zip(self.columns, values)), notes

    def text(self):
        header = [self.first, *self.columns]
        lines = []
        for label, row in self.rows.items():
            cells = [mean_and_spread(row[title], digits) for title, (_, digits) in self.columns.items()]
            for place, (title, (better, digits)) in enumerate(self.columns.items()):
                means = {other: statistics.fmean(finite) for other, values in self.rows.items()
                         if (finite := [v for v in values[title] if v is not None and math.isfinite(v)])}
                if better and len(means) > 1 and label in means:
                    best = max(means.values(), key=lambda mean: mean * better)
                    if round(means[label], digits) == round(best, digits):
                        cells[place] = f"**{cells[place]}**"
            for place, note in enumerate(self.notes[label]):
                cells[place] += f" ({note})"
            lines.append([label, *cells])
        return markdown(self.caption, header, lines)


def markdown(caption, header, lines):
    """The caption and the table, its columns padded so that it can be read in a terminal too."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    rows = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
            for line in [header, *lines]]
    rows.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return f"{caption}\n\n" + "\n".join(rows) + "\n"


def mean_of(values):
    values = list(values)
    return statistics.fmean(values) if values else None


def references(group, run):
    """Places of the plain runs to compare `run` with: its own teacher; the others of the stronger kind; of its kind.

    "Others": neither its own teacher nor a twin that started from the same weights.
    """
    student, teacher, teacher_seed = (run.config.get(key) for key in ("student", "teacher", "teacher_seed"))

    def others(kind):
        return [group.at[other.name, other.seed] for other in group.runs if other.name == kind
                and not (kind == teacher and other.seed == teacher_seed)
                and not (kind == student and other.seed == run.seed)]

    taught = run.config["kd"] == "offline" and (teacher, teacher_seed) in group.at
    return {"own teacher": [group.at[teacher, teacher_seed]] if taught else [],
            "other strong": others(STRONGER.get(student, student)), "other plain": others(student)}


def compared_with_references(group, matrices, caption, extra_columns=(), extra=None):
    """A table with a column for each matrix and reference; matrices: {name: (matrix, +1 or -1 or 0)}."""
    columns = {title: (0, 3) for title in extra_columns}
    columns |= {f"{name}, {reference}": (0, 3) for name in matrices
                for reference in ("own teacher", "other strong", "other plain")}
    table = Table(caption, "run", columns)
    for name, runs in group.kinds().items():
        values = [[] for _ in columns]
        for run in runs:
            place = group.at[name, run.seed]
            cells = list(extra[place]) if extra else []
            for matrix in matrices.values():
                cells += [mean_of(matrix[place, other].item() for other in places)
                          for places in references(group, run).values()]
            for column, cell in zip(values, cells):
                column.append(cell)
        table.add(name, values)
    return table


def accuracy_table(group):
    """Table (a) for MNIST, (b) for agreement."""
    if group.task == "mnist":
        columns = {f"{measure}, {test}": (better, 3) for measure, better in (("accuracy", 1), ("ECE", -1))
                   for test in TESTS["mnist"]}
        paper = group.runs[0].config["data"] == "mnist"
        table = Table("**(a) Accuracy and calibration** (mean ± standard deviation over n seeds; best in bold"
                      + "; in brackets the paper's)." * paper + ")." * (not paper)
                      + " Look at the scaled and translated digits, which no model saw in training.", "run",
                      columns | {"n": (0, 0)})
        for name, runs in group.kinds().items():
            values = [[run.metrics[test][measure] for run in runs] for measure in ("accuracy", "ece")
                      for test in TESTS["mnist"]]
            notes = [f"{value:.3f}" for value in PAPER_MNIST.get(name, ())] if paper else []
            table.add(name, [*values, [len(runs)]], notes)
        return table
    lm = group.runs[0].config["objective"] == "lm"
    columns = {"accuracy": (1, 3), "A-accuracy": (1, 3), "D-accuracy": (1, 3),
               **{f"{k}{'+' * (k == 4)} attr.": (1, 3) for k in range(5)}, "ECE": (-1, 3), "NLL": (-1, 3)}
    columns |= {"perplexity": (-1, 2)} if lm else {}
    table = Table("**(b) Agreement** (mean ± standard deviation over n seeds; best in bold). Look at the sentences "
                  "with many attractors, which are rare in training.", "run", columns | {"n": (0, 0)})
    for name, runs in group.kinds().items():
        tests = [run.metrics["test"] for run in runs]
        values = [[m[key] for m in tests] for key in ("accuracy", "a_accuracy", "d_accuracy")]
        values += [[(m["accuracy_by_attractors"] or {}).get(str(k)) for m in tests] for k in range(5)]
        values += [[m[key] for m in tests] for key in ("ece", "nll", *["perplexity"] * lm)]
        table.add(name, [*values, [len(runs)]])
    return table


def spread_within(group, matrix, name, seed):
    """Mean of `matrix` between the run (name, seed) and the other seeds of its kind, None where there is none."""
    place = group.at[name, seed]
    return mean_of(matrix[place, other].item() for (kind, _), other in group.at.items()
                   if kind == name and other != place)


def similarity_table(group, paths):
    extra = [[spread_within(group, matrix, run.name, run.seed) for matrix in paths.final.values()]
             for run in group.runs]
    return compared_with_references(
        group, paths.final, "**(d) Representations** of 1,000 test examples: similarity (1: the same up to rotation "
        "and scale). Look whether a taught student is closer than a plain one to strong models that did not teach it.",
        [f"{measure}, own kind" for measure in paths.final], extra)


def path_table(group, paths):
    return compared_with_references(
        group, {"distance": paths.distance}, "**(e) Training paths** in the space of 1 - RSA: length, straightness "
        "(end to end over length; it can exceed 1, as 1 - RSA is no metric) and mean distance to other runs' paths at "
        "equal epochs. Look whether a taught student walks nearer to the strong models.",
        ["length", "straightness"], list(zip(paths.length, paths.straightness)))


def barrier_table(group, barriers):
    table = Table(f"**(f) Basins**: barrier on the straight way between two runs, {BARRIER_POINTS} points, "
                  f"{BARRIER_EXAMPLES[group.task]} examples each. Near 0: one basin. Look whether a taught student "
                  "has left the basin of its plain twin, and a self-distilled one has not.", "pair",
                  {"loss, training": (0, 3), "loss, test": (0, 3), "accuracy, training": (0, 3),
                   "accuracy, test": (0, 3), "pairs": (0, 0)})
    for what in dict.fromkeys(entry["pair"] for entry in barriers):
        entries = [entry for entry in barriers if entry["pair"] == what]
        values = [[barrier(entry[f"{part}_loss"]) for entry in entries] for part in ("train", "test")]
        values += [[barrier([-value for value in entry[f"{part}_accuracy"]]) for entry in entries]
                   for part in ("train", "test")]
        table.add(what, [*values, [len(entries)]])
    return table


def cost_table(group):
    table = Table("**(g) Cost**. Overhead: a taught run's training and teacher outputs over the training of its plain "
                  "twin; only fair where both had the machine to the same extent.", "run",
                  {"training, s": (0, 1), "examples per s": (0, 0), "overhead of KD": (0, 2)})
    for name, runs in group.kinds().items():
        seconds = [run.timing.get("training") for run in runs]
        overhead = []
        for run in runs:
            twin = group.at.get((run.config["student"], run.seed))
            plain = None if twin is None else group.runs[twin].timing.get("training")
            if run.config["kd"] and plain and "training" in run.timing:
                overhead.append((run.timing["training"] + run.timing.get("teacher_logits", 0)) / plain)
        table.add(name, [seconds, [run.timing.get("examples_per_second") for run in runs], overhead])
    return table


# ----------------------------------------------------------------------------------------------------------------------
# Claims


def test_claims(group, behaviours, paths, barriers):
    """[{"claim", "student", "differences": {seed: positive if the claim holds}, "mean", "low", "high", "verdict"}].

    After the abstract of Abnar et al. 2020. Differences are paired by seed: a student and its plain twin, compared
    with the same strong models: the student's own teacher, or those (the mean over them) that did not teach it.
    """
    task, claims = group.task, []
    names = {run.name for run in group.runs}
    # Of the training loss: a basin is one of it, and on tests unlike the training data no two runs are apart.
    heights = {tuple(entry["runs"]): barrier(entry["train_loss"]) for entry in barriers}

    def run_at(name, seed):
        return group.runs[group.at[name, seed]]  # KeyError: not there

    def score(name, seed, measure):
        tests = [run_at(name, seed).metrics[test] for test in OUT_OF_DISTRIBUTION[task]]
        return statistics.fmean(test[measure] for test in tests)

    def similarity(matrix, name, pupil, seed, own):
        """From the run (name, seed) to the teacher of the run (pupil, seed), or to the others of the teacher's kind."""
        place, where = group.at[name, seed], references(group, run_at(pupil, seed))
        kind = "own teacher" if own else "other plain" if pupil == f"{weak}-to-{weak}" else "other strong"
        if not where[kind]:
            raise KeyError("no such model")
        return statistics.fmean(matrix[place, other].item() for other in where[kind])

    accuracy = "accuracy" if task == "mnist" else "a_accuracy"
    for weak, strong in STRONGER.items():
        taught, self_taught = f"{strong}-to-{weak}", f"{weak}-to-{weak}"
        if not {weak, taught} & names:
            continue

        def claim(text, difference, margin=None):
            differences = {}
            for seed in sorted({run.seed for run in group.runs}):
                try:
                    differences[seed] = difference(seed)
                except (KeyError, TypeError):  # a run, or a value of it, that isn't there
                    continue
            values = [value for value in differences.values() if math.isfinite(value)]
            mean, low, high = t_interval(values) if values else (math.nan,) * 3
            claims.append({"claim": text, "student": weak, "differences": differences, "mean": mean, "low": low,
                           "high": high, "verdict": verdict(values, margin)})

        def nearer(text, matrix, sign=1):
            for own in (False, True):
                claim(f"{text} {'its teacher' if own else 'strong models that did not teach it'}",
                      lambda seed: sign * (similarity(matrix, taught, taught, seed, own)
                                           - similarity(matrix, weak, taught, seed, own)))

        metric = "out-of-distribution accuracy" if task == "mnist" else "A-accuracy"
        claim(f"the stronger bias generalises better: {metric}, {strong} - {weak}",
              lambda seed: score(strong, seed, accuracy) - score(weak, seed, accuracy))
        claim(f"its teaching improves the student: {metric}, {taught} - {weak}",
              lambda seed: score(taught, seed, accuracy) - score(weak, seed, accuracy))
        claim(f"more than self-distillation does: {metric}, {taught} - {self_taught}",
              lambda seed: score(taught, seed, accuracy) - score(self_taught, seed, accuracy))
        claim(f"and the student's calibration: ECE, {weak} - {taught}",
              lambda seed: score(weak, seed, "ece") - score(taught, seed, "ece"))
        nearer("errors become more like those of", behaviours["error consistency"])
        nearer("representations (CKA) become more like those of", paths.final["CKA"])
        nearer("representations (RSA) become more like those of", paths.final["RSA"])
        nearer("the training path comes nearer to that of", paths.distance, sign=-1)
        claim(f"self-distillation changes little: CKA to other plain models, {self_taught} - {weak}, within ±{MARGIN}",
              lambda seed: (similarity(paths.final["CKA"], self_taught, self_taught, seed, False)
                            - similarity(paths.final["CKA"], weak, self_taught, seed, False)), MARGIN)
        claim(f"a stronger bias means less variance: divergence of predictions between seeds, {weak} - {strong}",
              lambda seed: (spread_within(group, behaviours["divergence"], weak, seed)
                            - spread_within(group, behaviours["divergence"], strong, seed)))
        claim(f"and of representations: 1 - CKA between seeds, {weak} - {strong}",
              lambda seed: (spread_within(group, paths.final["CKA"], strong, seed)
                            - spread_within(group, paths.final["CKA"], weak, seed)))
        claim("a strong teacher moves the student out of its basin, itself doesn't: barrier (training loss) from the "
              f"plain twin, {taught} - {self_taught}",
              lambda seed: (heights[f"{weak}/seed{seed}", f"{taught}/seed{seed}"]
                            - heights[f"{weak}/seed{seed}", f"{self_taught}/seed{seed}"]))
    return claims


def claims_text(claims):
    lines = []
    for entry in claims:
        n = len(entry["differences"])
        interval = "-" if n < 2 else f"{entry['low']:+.3f} .. {entry['high']:+.3f}"
        lines.append([entry["student"], entry["claim"], f"{entry['mean']:+.3f}" if n else "-", interval, str(n),
                      entry["verdict"]])
    return markdown("**(h) Claims**: differences paired by seed, positive where the claim holds, with the 95 % "
                    "t-interval over n seeds (on one data set, and seeds share models, so it is a little too narrow). "
                    "Look at the verdicts.",
                    ["student", "claim", "difference", "95 % interval", "n", "verdict"], lines)


# ----------------------------------------------------------------------------------------------------------------------
# Figures


def import_pyplot():
    """matplotlib.pyplot, UserError where it isn't installed."""
    try:
        import matplotlib
    except ImportError:
        raise common.UserError("--plots needs matplotlib: pip install matplotlib, or leave --plots out") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams |= {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
                     "figure.constrained_layout.use": True, "savefig.dpi": 150}
    return plt


# Told apart in grey by the line and the marker too.
STYLES = {"plain": ("#1b6ca8", "-", "o"), "self": ("#8c8c8c", "--", "s"), "taught": ("#d1495b", "-.", "^"),
          "strong": ("#222222", ":", "D")}


def cast(group, weak):
    """{role: run name} of the four kinds of run that a figure about the student `weak` shows."""
    strong = STRONGER[weak]
    cast = {"plain": weak, "self": f"{weak}-to-{weak}", "taught": f"{strong}-to-{weak}", "strong": strong}
    names = {run.name for run in group.runs}
    return {role: name for role, name in cast.items() if name in names}


def with_legend(figure):
    """One legend above all panels, where it hides no curve."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2 if len(labels) > 3 else 3, fontsize=7)
    return figure


def plot_reliability(plt, group, weak):
    """Accuracy over confidence, 15 bins over all seeds; bins of fewer than 20 examples are left out."""
    tests = TESTS[group.task]
    width = max(4.8, 2.4 * len(tests) + 0.6)
    figure, axes = plt.subplots(1, len(tests), figsize=(width, 2.9), squeeze=False, sharey=True)
    for axis, test in zip(axes[0], tests):
        axis.plot([0, 1], [0, 1], color="#cccccc", linewidth=1)
        for role, name in cast(group, weak).items():
            colour, line, marker = STYLES[role]
            runs = group.kinds()[name]
            probabilities = torch.cat([run.outputs[f"{test}_logits"].double().softmax(dim=1) for run in runs])
            confidence, prediction = probabilities.max(dim=1)
            correct = (prediction == torch.cat([run.outputs[f"{test}_labels"] for run in runs])).double()
            bins = (confidence * 15).ceil().long().clamp(1, 15)
            points = [(confidence[bins == b].mean(), correct[bins == b].mean()) for b in range(1, 16)
                      if (bins == b).sum() >= 20]
            if points:
                axis.plot(*zip(*points), color=colour, linestyle=line, marker=marker, markersize=3, linewidth=1,
                          label=name, clip_on=False)
        axis.set(title=test, xlabel="confidence", xlim=(0 if group.task == "mnist" else 0.5, 1), ylim=(0, 1))
    axes[0][0].set_ylabel("accuracy")
    return with_legend(figure)


def plot_paths(plt, group, weak, paths):
    """Training paths of all seeds in two dimensions, classical MDS of 1 - RSA."""
    roles = cast(group, weak)
    chosen = [i for i, place in enumerate(paths.run_of) if group.runs[place].name in roles.values()]
    if len(chosen) < 3:
        return None
    points = classical_mds(paths.snapshots[chosen][:, chosen])
    figure, axis = plt.subplots(figsize=(4.2, 3.4))
    for role, name in roles.items():
        colour, line, marker = STYLES[role]
        for number, run in enumerate(group.kinds()[name]):
            own = [row for row, i in enumerate(chosen) if group.runs[paths.run_of[i]] is run]
            axis.plot(points[own, 0], points[own, 1], color=colour, linestyle=line, linewidth=0.9, marker=marker,
                      markersize=2, label=name if number == 0 else None)
            axis.plot(*points[own[-1]], color=colour, marker=marker, markersize=7, markeredgecolor="white",
                      markeredgewidth=0.5)
    axis.set(xlabel="first dimension of 1 - RSA", ylabel="second dimension (large markers: end of training)")
    axis.set_aspect("equal", adjustable="datalim")
    return with_legend(figure)


def plot_barriers(plt, group, weak, barriers):
    """Training loss and accuracy on the straight way between two runs, mean over pairs."""
    kinds = [entry for entry in dict.fromkeys(e["pair"] for e in barriers) if entry.startswith(f"{weak}:")]
    if not kinds:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(6, 2.9))
    styles = [*STYLES.values(), ("#2e8b57", "-", "v"), ("#b8860b", "--", "x")]
    for what, (colour, line, marker) in zip(kinds, styles):
        for axis, measure in zip(axes, ("train_loss", "train_accuracy")):
            mean = torch.tensor([entry[measure] for entry in barriers if entry["pair"] == what]).mean(dim=0)
            axis.plot(torch.linspace(0, 1, len(mean)), mean, color=colour, linestyle=line, marker=marker, markevery=4,
                      markersize=3, linewidth=1, label=what.removeprefix(f"{weak}: "))
    axes[0].set(xlabel="way from one run to the other", ylabel="training loss (nats)")
    axes[1].set(xlabel="way from one run to the other", ylabel="training accuracy")
    return with_legend(figure)


def plot_attractors(plt, group):
    """Accuracy over the number of attractors, mean and standard deviation over seeds, a panel for each student."""
    weak_ones = [weak for weak in STRONGER if weak in cast(group, weak).values()]
    figure, axes = plt.subplots(1, len(weak_ones), figsize=(2.2 * len(weak_ones) + 0.6, 2.8), squeeze=False,
                                sharey=True)
    for axis, weak in zip(axes[0], weak_ones):
        for role, name in cast(group, weak).items():
            colour, line, marker = STYLES[role]
            tests = [run.metrics["test"]["accuracy_by_attractors"] for run in group.kinds()[name]]
            values = torch.tensor([[test.get(str(k), math.nan) for k in range(5)] for test in tests])
            spread = values.std(dim=0) if len(values) > 1 else None
            axis.errorbar(range(5), values.mean(dim=0), spread, color=colour, linestyle=line, marker=marker,
                          markersize=3, linewidth=1, capsize=2, label=name)
        axis.set(title=weak, xlabel="attractors", xticks=range(5), xticklabels=["0", "1", "2", "3", "4+"])
        axis.legend(fontsize=6)
    axes[0][0].set_ylabel("accuracy")
    return figure


def save_plots(group, paths, barriers, folder, stem):
    """Write the group's figures to `folder`; -> their paths."""
    plt = import_pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    figures = {}
    for weak in STRONGER:
        if weak in cast(group, weak).values():
            figures |= {f"reliability-{weak}": plot_reliability(plt, group, weak),
                        f"paths-{weak}": plot_paths(plt, group, weak, paths),
                        f"barriers-{weak}": plot_barriers(plt, group, weak, barriers)}
    if group.task == "sva" and any(name.startswith("reliability") for name in figures) \
            and group.runs[0].metrics["test"]["accuracy_by_attractors"]:
        figures["attractors"] = plot_attractors(plt, group)
    written = []
    for name, figure in figures.items():
        if figure is not None:
            written.append(folder / f"{stem}-{name}.png")
            figure.savefig(written[-1])
            plt.close(figure)
    return written


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def analyze_group(group, args, problems):
    """Print the group's tables; -> what --json keeps of it."""
    start = time.perf_counter()
    print(f"\n## {group.title}\n", flush=True)
    tests = OUT_OF_DISTRIBUTION[group.task]
    per_test = [behaviour(torch.stack([run.outputs[f"{test}_logits"].float() for run in group.runs]),
                          group.runs[0].outputs[f"{test}_labels"]) for test in tests]
    behaviours = {name: torch.stack([matrices[name] for matrices in per_test]).mean(dim=0) for name in per_test[0]}
    paths = training_paths(group.runs)
    tables = {"a" if group.task == "mnist" else "b": accuracy_table(group),
              "c": compared_with_references(group, behaviours, "**(c) Per-sample behaviour**"
                                            + " on scaled and translated digits" * (group.task == "mnist")
                                            + ": share of equal answers, error consistency (Cohen's kappa of right and "
                                            "wrong), Jensen-Shannon divergence (bits). Look whether a taught student "
                                            "errs like strong models that did not teach it."),
              "d": similarity_table(group, paths), "e": path_table(group, paths)}
    for table in tables.values():
        print(table.text(), flush=True)
    barriers = measure_barriers(group, args.data_dir, common.choose_device(), problems)
    for key, table in (("f", barrier_table(group, barriers)), ("g", cost_table(group))):
        if table.rows:
            tables[key] = table
            print(table.text(), flush=True)
    claims = test_claims(group, behaviours, paths, barriers)
    print(claims_text(claims))
    if args.plots:
        stem = "-".join(group.runs[0].folder.parts[-3:-2])
        written = save_plots(group, paths, barriers, args.plots, stem)
        print(f"{len(written)} figures written to {args.plots}\n")
    return {"title": group.title, "seconds": time.perf_counter() - start, "claims": claims, "barriers": barriers,
            "tables": {key: {"caption": table.caption, "rows": table.rows} for key, table in tables.items()},
            "runs": [{"name": run.name, "seed": run.seed, "config": run.config, "metrics": run.metrics,
                      "timing": run.timing, "environment": run.record.get("environment")}
                     for run in group.runs]}


def parse_arguments(argv):
    description, commands = __doc__.split("\n\n")[:2]
    parser = common.OneLineParser(description=description, epilog=f"examples:\n{commands}", allow_abbrev=False,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder with the runs; every run below it is taken")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write figures there (needs matplotlib)")
    parser.add_argument("--data-dir", type=Path, default=Path("data"),
                        help="where the training scripts had their data, for the barriers (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    if not args.runs.is_dir():
        raise common.UserError(f"{args.runs}: no such folder; give the one the training scripts wrote to (--out)")
    if args.json and args.json.is_dir():
        raise common.UserError(f"--json {args.json} is a folder; give a file in it")
    if args.plots:
        import_pyplot()
    for flag, folder in (("--json", args.json and args.json.parent), ("--plots", args.plots)):
        if folder is not None:
            common.check_writable(folder, flag)
    problems = []
    results = [analyze_group(group, args, problems) for group in load_groups(args.runs, problems)]
    if not results:
        problems.append(f"{args.runs} has no finished run: train some, for example with ./run_all.sh --quick")
    if problems:
        print("\n## What is missing\n\n" + "\n".join(f"- {problem}" for problem in problems))
    if args.json:
        numbers = common.json_bytes({"groups": results, "missing": problems}, digits=5)
        common.write_files(args.json.parent, {args.json.name: numbers})
        print(f"numbers written to {args.json}")


if __name__ == "__main__":
    common.run_main(main)
