"""Compare finished runs: the answer, tables in Markdown, figures.

    python analyze.py runs                                        # tables on the terminal
    python analyze.py runs --json analysis.json --plots figures   # all numbers, and figures

Accuracy, calibration and perplexity are those in each run.json. Comparisons of models come from
outputs.npz, barriers from model.pt. What is missing is named at the end, the rest is done.
"""

import copy
import itertools
import math
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch.optim.swa_utils import update_bn

import common
import train_mnist
import train_sva

# Whose inductive bias suits the task better than the model's own.
STRONGER = {"mlp": "cnn", "transformer": "lstm", "transformer-seq": "lstm", "ut-seq": "lstm",
            "transformer-seq-small": "lstm-small"}
MODELS = ["mlp", "cnn", "transformer", "transformer-seq", "transformer-seq-small", "ut-seq",
          "lstm-small", "lstm"]
TESTS = {"mnist": ("test", "scaled", "translated"), "sva": ("test",)}
OUT_OF_DISTRIBUTION = {"mnist": ("scaled", "translated"), "sva": ("test",)}
ACCURACY = {"mnist": "accuracy", "sva": "a_accuracy"}  # the one that asks for the bias
DATA_FIELDS = ("task", "objective", "data", "examples", "bytes")  # equal within a group
COMPARED_EXAMPLES = 10_000  # of each test, for comparisons of two models
BARRIER_POINTS = 21
# Of training and test each, and at most a 48th of the training set; a compromise with time.
BARRIER_EXAMPLES = {"mnist": 500, "sva": 250}
MARGIN = 0.05  # a change of CKA below this counts as little
KEPT = ("config", "history", "metrics", "timing", "environment")  # of run.json, in --json

# Abnar et al. 2020: accuracy, then ECE, on the test digits, scaled, translated.
PAPER_MNIST = {
    "mlp": (.985, .794, .373, .015, .175, .564), "cnn": (.992, .962, .981, .011, .060, .028),
    "mlp-to-mlp": (.985, .839, .395, .015, .155, .555),
    "cnn-to-mlp": (.988, .904, .510, .013, .109, .432),
    "mlp-to-cnn": (.990, .955, .976, .013, .054, .030),
    "cnn-to-cnn": (.991, .951, .978, .014, .068, .033),
}


# ---- Statistics ----------------------------------------------------------------------------------


def t_distribution(degrees, largest):
    """(t, P(|T| < t)) for t in 0..largest, T having Student's t distribution; by integration."""
    t = torch.linspace(0, largest, 100_001, dtype=torch.double)
    density = torch.distributions.StudentT(torch.tensor(degrees, dtype=torch.double)).log_prob(t)
    return t[1:], 2 * torch.cumulative_trapezoid(density.exp(), t)


def t_test(values, margin=0.0):
    """(mean, low, high, verdict, p): the 95 % t-interval of the mean, and what follows from it.

    supported: the interval is above 0; contradicted: below 0; inconclusive: it holds 0. With a
    margin, for "hardly any difference": supported inside -margin..margin, contradicted outside,
    else inconclusive. p: the smallest level (two-sided) at which the verdict would still be that.
    untested: fewer than 3 values.
    """
    mean = statistics.fmean(values)
    if len(values) < 3:
        return mean, math.nan, math.nan, "untested", math.nan
    error = max(statistics.stdev(values) / math.sqrt(len(values)), 1e-12)
    t, probability = t_distribution(len(values) - 1, 5)  # the quantile is at most 4.303
    half = error * t[torch.searchsorted(probability, 0.95)].item()
    low, high = mean - half, mean + half
    distance = min(abs(abs(mean) - margin) / error, 1000)
    p = 1 - t_distribution(len(values) - 1, distance)[1][-1].item()
    verdict = "inconclusive"
    if low > margin or high < -margin:
        verdict = "supported" if low > margin and not margin else "contradicted"
    elif margin and -margin < low and high < margin:
        verdict = "supported"
    return mean, low, high, verdict, p


def holm(p_values, level=0.05):
    """For each p-value, whether its test survives Holm's correction over all of them.

    Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    survives = [False] * len(p_values)
    for rank, (p, index) in enumerate(sorted(zip(p_values, range(len(p_values))))):
        if p > level / (len(p_values) - rank):
            break
        survives[index] = True
    return survives


def jackknife(pairs):
    """One value per seed for the mean over all pairs of seeds: its jackknife pseudo-values.

    pairs: (n, n) symmetric, n > 2. The means over each seed's own pairs depend on each other, since
    every pair enters two of them; the pseudo-values theta + 2 (n-1)/(n-2) (s_i - theta) hardly do
    (Efron & Stein 1981, "The jackknife estimate of variance", for U-statistics of degree 2).
    """
    n = len(pairs)
    of_seed = (pairs.sum(dim=1) - pairs.diagonal()) / (n - 1)
    return of_seed.mean() + 2 * (n - 1) / (n - 2) * (of_seed - of_seed.mean())


def classical_mds(distances):
    """Points (n, 2) whose distances come closest to `distances` (n, n). Torgerson 1952."""
    n = len(distances)
    centre = torch.eye(n, dtype=torch.double) - 1 / n
    values, vectors = torch.linalg.eigh(-0.5 * centre @ distances.double().square() @ centre)
    return (vectors * values.clamp(min=0).sqrt())[:, -2:].flip(1)


# ---- Runs ----------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One finished run."""

    name: str
    seed: int
    folder: Path
    config: dict
    record: dict
    answers: dict  # {test: probabilities (compared examples, classes)}
    labels: dict  # {test: (compared examples,)}
    path: dict  # {epoch: representations of the probe examples}


class Group(NamedTuple):
    """All runs of one task on the same data."""

    title: str
    task: str
    config: dict  # of one of them
    runs: dict  # {(run name, seed): Run}
    known: dict  # comparisons already made, see compare

    def kinds(self):
        """{run name: [its runs]}."""
        names = dict.fromkeys(name for name, _ in self.runs)
        return {name: [run for run in self.runs.values() if run.name == name] for name in names}


def read_run(folder, record):
    config, outputs, answers, labels = record["config"], common.load_outputs(folder), {}, {}
    for test in TESTS[config["task"]]:
        logits = outputs[f"{test}_logits"]
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(logits), generator=generator)[:COMPARED_EXAMPLES]
        answers[test] = logits[chosen].float().softmax(dim=1)
        labels[test] = outputs[f"{test}_labels"][chosen]
        if not isinstance(record["metrics"][test]["accuracy"], float):
            raise ValueError(f"accuracy of {test}")
    record["environment"]["device"]
    path = dict(zip(outputs["probe_epochs"].tolist(), outputs["probe_representations"],
                    strict=True))
    return Run(common.run_name(config), config["seed"], folder, config, record, answers, labels,
               path)


def place_of_kind(run):
    """Sorts by student, the plain runs first, then by teacher."""
    student, teacher = run.config["student"], run.config.get("teacher")
    return MODELS.index(student), MODELS.index(teacher) if teacher else -1, run.name, run.seed


def load_groups(root, problems):
    """Yield one Group at a time, to spare memory; `problems` gets a line for what is left out."""
    groups = {}
    for path in sorted(root.glob("**/seed*/run.json")):
        try:
            record = common.load_run(path.parent)
            data = str([record["config"].get(field) for field in DATA_FIELDS])
            groups.setdefault((path.parents[2], data), []).append((path.parent, record))
        except common.UserError as error:
            problems.append(f"left out: {error}")
    for (place, _), members in sorted(groups.items()):
        runs = {}
        for folder, record in members:
            try:
                run = read_run(folder, record)
                if (run.name, run.seed) in runs:
                    raise common.UserError(f"a second {run.name} of seed {run.seed}")
                place_of_kind(run)
                runs[run.name, run.seed] = run
            except (common.UserError, KeyError, TypeError, ValueError, AttributeError) as error:
                problems.append(f"left out: {folder} ({type(error).__name__}: {error})")
        if runs:
            runs = {(run.name, run.seed): run for run in sorted(runs.values(), key=place_of_kind)}
            config = next(iter(runs.values())).config
            title = {"mnist": "MNIST", "sva": "Subject-verb agreement"}[config["task"]]
            title += ", language models" if config.get("objective") == "lm" else ""
            title += f", data: {config['data']}, {config['examples']:,} training examples"
            group = Group(title, config["task"], config, runs, {})
            problems += gaps(group, place)
            yield group


def gaps(group, place):
    """Lines that name seeds that are not there, and runs that were not made alike."""
    lines = []
    for name, runs in group.kinds().items():
        alike = [run for run in group.runs.values() if bool(run.config["kd"]) == ("-to-" in name)]
        if missing := sorted({run.seed for run in alike} - {run.seed for run in runs}):
            lines.append(f"{place}: no {name} with seed {', '.join(map(str, missing))}")
        for field in sorted({*runs[0].config} - {"seed", "teacher_seed"}):
            if any(run.config.get(field) != runs[0].config[field] for run in runs):
                lines.append(f"{place}: the runs of {name} differ in {field}")
    for field in ("device", "precision"):
        values = {str(run.record["environment"].get(field)) for run in group.runs.values()}
        if len(values) > 1:
            lines.append(f"{place}: runs of different {field} stand in one table: "
                         + ", ".join(sorted(values)))
    return lines


# ---- Comparisons of two runs ---------------------------------------------------------------------


def over_tests(measure):
    """The mean of measure(probabilities of a, of b, labels) over the out-of-distribution tests."""
    return lambda a, b: statistics.fmean(
        measure(a.answers[test], b.answers[test], a.labels[test])
        for test in OUT_OF_DISTRIBUTION[a.config["task"]])


def path_distance(a, b):
    """Mean of 1 - RSA over the epochs of which both runs have a snapshot."""
    return statistics.fmean(1 - common.rsa(a.path[epoch], b.path[epoch])
                            for epoch in a.path if epoch in b.path)


def shape_of_path(run):
    """{"length", "straightness": end to end over length} of a training path, in 1 - RSA."""
    steps = list(run.path.values())
    length = sum(1 - common.rsa(a, b) for a, b in itertools.pairwise(steps))
    return {"length": length,
            "straightness": (1 - common.rsa(steps[0], steps[-1])) / (length or math.nan)}


def last(run):
    return run.path[max(run.path)]


# Name: (value for two runs, +1 if more means more alike, what it is).
COMPARISONS = {
    "agreement": (
        over_tests(lambda p, q, labels: (p.argmax(1) == q.argmax(1)).double().mean().item()),
        1, "share of equal answers, out of distribution"),
    "kappa": (
        over_tests(lambda p, q, labels: common.error_consistency(p.argmax(1), q.argmax(1), labels)),
        1, "error consistency, out of distribution"),
    "divergence": (
        over_tests(lambda p, q, labels: common.js_divergence(p, q)),
        -1, "Jensen-Shannon divergence of predictions in bits, out of distribution"),
    "CKA": (lambda a, b: common.linear_cka(last(a), last(b)),
            1, "of the representations of 1,000 test examples"),
    "RSA": (lambda a, b: common.rsa(last(a), last(b)),
            1, "of the representations of 1,000 test examples"),
    "path distance": (path_distance, -1, "mean of 1 - RSA over equal epochs"),
}


def compare(group, name, run, others):
    """Mean of a comparison between `run` and each of `others`; None where there are none."""
    values = []
    for other in others:
        key = name, *sorted((run.folder, other.folder))
        if key not in group.known:
            group.known[key] = COMPARISONS[name][0](run, other)
        values.append(group.known[key])
    return statistics.fmean(values) if values else None


def references(group, run):
    """The plain runs to compare `run` with: {"own teacher", "other strong", "other plain": [runs]}.

    Others are neither its own teacher nor a twin that started from the same weights.
    """
    student = run.config["student"]
    teacher = run.config.get("teacher"), run.config.get("teacher_seed")

    def others(kind):
        return [other for key, other in group.runs.items()
                if key[0] == kind and key not in (teacher, (student, run.seed))]

    offline = run.config["kd"] == "offline" and teacher in group.runs
    return {"own teacher": [group.runs[teacher]] if offline else [],
            "other strong": others(STRONGER.get(student, student)),
            "other plain": others(student)}


# ---- Basins: are two solutions of one architecture connected by low loss? ------------------------


def barrier(losses):
    """How far the loss on the straight way rises above the line between its ends; at least 0.

    losses: at equally spaced points. Frankle et al. 2020 (arXiv 1912.05671), sec. 2, in the form
    of Entezari et al. 2022 (arXiv 2110.06296), eq. 1. For accuracies give their negatives.
    """
    losses = torch.as_tensor(losses, dtype=torch.double)
    line = torch.linspace(0, 1, len(losses), dtype=torch.double)
    return (losses - torch.lerp(losses[0], losses[-1], line)).max().item()


def interpolate(model, state_a, state_b, measure):
    """[measure(model)] with the weights (1-a) state_a + a state_b for equally spaced a in 0..1."""
    results = []
    for a in torch.linspace(0, 1, BARRIER_POINTS).tolist():
        model.load_state_dict({
            name: torch.lerp(value, state_b[name], a) if value.is_floating_point() else value
            for name, value in state_a.items()})
        results.append(measure(model))
    return results


def barrier_examples(config):
    return min(BARRIER_EXAMPLES[config["task"]], max(2, config["examples"] // 48))


def mnist_measure(config, data_dir, device):
    """(build, measure): an untrained model of a kind; {"train loss" ...} of a model on the way."""
    n, amp = barrier_examples(config), common.has_bfloat16(device)
    _, digits = train_mnist.load_digits(config["data"], config["examples"], data_dir)
    data = train_mnist.make_data(digits, config["examples"], device)

    def measure(model):
        # Without new batch-norm statistics for each point, barriers are an artefact of old ones.
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            update_bn([train_mnist.to_input(data["train"][0][:n])], model)
        results = {}
        for part in ("train", "test"):
            logits, labels = (train_mnist.evaluate(model, data[part][0][:n], amp)[0],
                              data[part][1][:n].cpu())
            metrics = common.classification_metrics(logits, labels)
            results |= {f"{part} loss": metrics["nll"], f"{part} accuracy": metrics["accuracy"]}
        return results

    return lambda kind: train_mnist.build_model(kind, 0, device), measure


def sva_measure(config, data_dir, device):
    """As mnist_measure; a language model's loss is that of all words, its accuracy the verb's."""
    n, amp, objective = barrier_examples(config), common.has_bfloat16(device), config["objective"]
    if config["data"] == "linzen" and not train_sva.find_linzen(data_dir):
        raise common.UserError(f"the sentences are not in {data_dir}")
    _, sizes, sentences = train_sva.load_sentences(config["data"], data_dir, config["examples"])
    if sizes != config.get("bytes", {}):
        raise common.UserError(f"the sentences in {data_dir} are not those of the runs")
    data, sizes = train_sva.make_data(sentences, objective, device)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(sizes["train"], generator=generator)[:n].to(device)
    first = torch.arange(sizes["probe"])[:n].to(device)
    splits = {"train": data["train"].take(chosen), "test": data["probe"].take(first)}

    def measure(model):
        results = {}
        for part, split in splits.items():
            logits, _, perplexity = train_sva.evaluate(model, split, objective, amp)
            metrics = common.classification_metrics(logits, split.labels.cpu())
            loss = metrics["nll"] if perplexity is None else math.log(perplexity)
            results |= {f"{part} loss": loss, f"{part} accuracy": metrics["accuracy"]}
        return results

    words = sizes["vocabulary"]
    return lambda kind: train_sva.build_model(kind, 0, words, objective, device), measure


def barrier_pairs(group):
    """[(label, Run, Run)]: taught runs with their plain twins, and neighbouring plain seeds."""
    pairs = []
    for name, runs in group.kinds().items():
        student, teacher = runs[0].config["student"], runs[0].config.get("teacher")
        if teacher is None:
            pairs += [(f"{name}, two seeds", a, b) for a, b in zip(runs, runs[1:])]
        elif runs[0].config["kd"] == "offline" and (
                teacher in (student, STRONGER.get(student)) or STRONGER.get(teacher) == student):
            twins = [(group.runs.get((student, run.seed)), run) for run in runs]
            pairs += [(name, twin, run) for twin, run in twins if twin]
    return pairs


def measure_barriers(group, data_dir, device, problems):
    """[{"pair", "runs", "train loss": [at BARRIER_POINTS points], "train accuracy" ...}]."""
    pairs, results = barrier_pairs(group), []
    if not pairs:
        return []
    try:
        prepare = {"mnist": mnist_measure, "sva": sva_measure}[group.task]
        build, measure = prepare(group.config, data_dir, device)
    except common.UserError as error:
        problems.append(f"no barriers for {group.title}: {error} (--data-dir: where the data are)")
        return []

    def measure_pair(label, a, b):
        model, other = (common.load_weights(build(run.config["student"]), run.folder)
                        for run in (a, b))
        points = interpolate(model, copy.deepcopy(model.state_dict()), other.state_dict(), measure)
        return {"pair": label, "runs": [f"{run.name}/seed{run.seed}" for run in (a, b)],
                **{name: [point[name] for point in points] for name in points[0]}}

    # The models are small: a pair on each core is faster than one pair on all of them.
    threads = torch.get_num_threads()
    workers = threads if device.type == "cpu" else 1
    torch.set_num_threads(threads // workers)
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(measure_pair, *pair) for pair in pairs]
        for done, future in enumerate(futures, 1):
            if sys.stderr.isatty():
                print(f"\r\033[Kbarrier {done}/{len(pairs)}", end="\r", file=sys.stderr, flush=True)
            try:
                results.append(future.result())
            except common.UserError as error:
                problems.append(f"no barrier: {error}")
    torch.set_num_threads(threads)
    return results


# ---- Claims of the paper's abstract --------------------------------------------------------------

# The claims that make the answer; see claims_about.
HEADLINES = ("teaching improves accuracy", "... more than self-distillation",
             "teaching improves calibration (ECE)", "errors nearer to other strong models (kappa)")


def out_of_distribution(run, metric):
    """Mean of a metric over the out-of-distribution tests."""
    tests = OUT_OF_DISTRIBUTION[run.config["task"]]
    return statistics.fmean(run.record["metrics"][test][metric] for test in tests)


def claims_about(group, weak, barriers):
    """{claim: {seed: value}} about the student `weak`; a value is positive if the claim holds.

    Differences are paired by seed: a student and its untaught twin, compared with the same strong
    models, which are the student's own teacher, or those that did not teach it.
    """
    strong, claims, accuracy = STRONGER[weak], {}, ACCURACY[group.task]
    heights = {tuple(entry["runs"]): barrier(entry["train loss"]) for entry in barriers}

    def add(claim, seed, value):
        if value is not None and math.isfinite(value):
            claims.setdefault(claim, {})[seed] = value

    def gain(metric, better, worse):
        return out_of_distribution(better, metric) - out_of_distribution(worse, metric)

    def nearer(measure, run, twin, models):
        """How much nearer than its plain twin `run` is to `models`."""
        near, far = (compare(group, measure, one, models) for one in (run, twin))
        return None if near is None else COMPARISONS[measure][1] * (near - far)

    for seed in sorted({seed for _, seed in group.runs}):
        names = weak, strong, f"{strong}-to-{weak}", f"{weak}-to-{weak}"
        plain, strong_run, taught, self_taught = (group.runs.get((name, seed)) for name in names)
        if plain and strong_run:
            add("the stronger bias generalises better", seed, gain(accuracy, strong_run, plain))
        if plain and taught:
            add("teaching improves accuracy", seed, gain(accuracy, taught, plain))
        if taught and self_taught:
            add("... more than self-distillation", seed, gain(accuracy, taught, self_taught))
        if plain and taught:
            add("teaching improves calibration (ECE)", seed, gain("ece", plain, taught))
            models = references(group, taught)
            for aspect, measure in (("errors", "kappa"), ("representations", "CKA"),
                                    ("representations", "RSA"), ("training path", "path distance")):
                add(f"{aspect} nearer to other strong models ({measure})", seed,
                    nearer(measure, taught, plain, models["other strong"]))
                add(f"{aspect} nearer to its teacher ({measure})", seed,
                    nearer(measure, taught, plain, models["own teacher"]))
        if plain and self_taught:
            others = references(group, self_taught)["other plain"]
            add(f"self-distillation changes little (CKA within ±{MARGIN})", seed,
                nearer("CKA", self_taught, plain, others))
        twins = [heights.get((f"{weak}/seed{seed}", f"{name}/seed{seed}")) for name in names[2:]]
        if None not in twins:
            add("a strong teacher moves the basin, itself doesn't", seed, twins[0] - twins[1])

    seeds = [seed for name, seed in group.runs if name == weak and (strong, seed) in group.runs]
    if len(seeds) > 2:
        for aspect, measure in (("predictions", "divergence"), ("representations", "CKA")):
            spread = torch.zeros(len(seeds), len(seeds), dtype=torch.double)
            for (i, a), (j, b) in itertools.permutations(enumerate(seeds), 2):
                likeness = [compare(group, measure, group.runs[kind, a], [group.runs[kind, b]])
                            for kind in (strong, weak)]
                spread[i, j] = COMPARISONS[measure][1] * (likeness[0] - likeness[1])
            for seed, value in zip(seeds, jackknife(spread).tolist()):
                add(f"a stronger bias, less variance of {aspect}", seed, value)
    return claims


def test_claims(group, barriers):
    """[{"student", "claim", "values", "mean", "low", "high", "verdict", "p", "holm"}]."""
    results = []
    for weak in STRONGER:
        for claim, values in claims_about(group, weak, barriers).items():
            statistic = t_test(list(values.values()), MARGIN if "±" in claim else 0.0)
            results.append({"student": weak, "claim": claim, "values": values,
                            **dict(zip(("mean", "low", "high", "verdict", "p"), statistic))})
    tested = [result for result in results if result["verdict"] != "untested"]
    for result, survives in zip(tested, holm([result["p"] for result in tested])):
        result["holm"] = survives and result["verdict"] != "inconclusive"
    return results


def print_answer(claims):
    """The answer in a few lines for each student: what teaching by the stronger kind changed."""
    for weak, strong in STRONGER.items():
        found = [c for c in claims if c["student"] == weak and c["claim"] in HEADLINES]
        if found:
            print(f"{weak} taught by {strong}, {len(found[0]['values'])} seeds:")
        for claim in found:
            interval = f" ({claim['low']:+.3f} to {claim['high']:+.3f})"
            print(f"- {claim['claim']}: {claim['mean']:+.3f}"
                  f"{'' if claim['verdict'] == 'untested' else interval} {claim['verdict']}")
    print(flush=True)


# ---- Tables --------------------------------------------------------------------------------------


def mean_and_spread(values):
    """0.912±0.005 (standard deviation over seeds), 0.912 for one value, - for none."""
    values = [value for value in values if value is not None and math.isfinite(value)]
    if not values:
        return "-"
    spread = f"±{statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def print_table(caption, header, rows):
    """A Markdown table that reads well in a terminal too; columns without a value are left out."""
    used = [column for column in range(len(header)) if any(row[column] != "-" for row in rows)]
    lines = [[line[column] for column in used] for line in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    print(f"{caption}\n")
    for line in lines:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |")
    print(flush=True)


def print_tables(group, barriers):
    """Tables (a) to (f); returns {letter: {"caption", "rows"}} for --json."""
    tables, kinds = {}, group.kinds()

    def add(letter, caption, members, columns, paper={}):
        """A row for each kind. members: {kind: [run]}, columns: run -> {column title: value}."""
        rows, cells = {}, []
        for kind, of_kind in members.items():
            values = [columns(member) for member in of_kind]
            rows[kind] = {title: [row[title] for row in values] for title in values[0]}
            cells.append([kind, *map(mean_and_spread, rows[kind].values()), str(len(of_kind))])
            if kind in paper:
                cells.append([f"{kind} (paper)", *(f"{value:.3f}" for value in paper[kind]), "-"])
        print_table(f"**({letter}) {caption}", ["run", *rows[kind], "n"], cells)
        tables[letter] = {"caption": caption, "rows": rows}

    def metrics(run):
        return run.record["metrics"]["test"]

    if group.task == "mnist":
        add("a", "Accuracy and calibration**, mean ± standard deviation over n seeds.\n"
            "No model saw scaled or translated digits in training.", kinds,
            lambda run: {f"{prefix}{test}": run.record["metrics"][test][name]
                         for prefix, name in (("", "accuracy"), ("ECE, ", "ece"))
                         for test in TESTS["mnist"]},
            PAPER_MNIST if group.config["data"] == "mnist" else {})
    else:
        add("a", "Agreement**, mean ± standard deviation over n seeds.\n"
            "A-accuracy: mean over 0, 1, 2, 3, 4+ attractors; D-accuracy: over distances.", kinds,
            lambda run: {title: metrics(run)[title.lower().replace("-", "_")]
                         for title in ("accuracy", "A-accuracy", "D-accuracy")})
        add("b", "Accuracy by attractors**, which are rare in training; 4: and more.", kinds,
            lambda run: {f"{k} attr.": metrics(run)["accuracy_by_attractors"].get(str(k))
                         for k in range(5)})
        add("c", "Calibration and fit**: NLL of the answer in nats, perplexity per word.", kinds,
            lambda run: {title: metrics(run).get(title.lower())
                         for title in ("ECE", "NLL", "perplexity")})
    for number, (name, (_, _, caption)) in enumerate(COMPARISONS.items(), 1):
        add(f"d{number}", f"Likeness to plain models: {name}**, {caption}.", kinds,
            lambda run: {which: compare(group, name, run, others)
                         for which, others in references(group, run).items()})
    add("e", "Training paths** in the space of 1 - RSA: length, and straightness (end to end over "
        "length;\nit can exceed 1, as 1 - RSA is no metric).", kinds, shape_of_path)
    if barriers:
        pairs = {}
        for entry in barriers:
            pairs.setdefault(entry["pair"], []).append(entry)
        add("f", "Basins**: barrier on the straight way from a taught run to its plain twin, or "
            f"between two seeds.\n{BARRIER_POINTS} points, {barrier_examples(group.config)} "
            "examples of training and test each. Near 0: one basin.", pairs,
            lambda entry: {f"{name}, {part}": barrier([sign * x for x in entry[f"{part} {name}"]])
                           for name, sign in (("loss", 1), ("accuracy", -1))
                           for part in ("train", "test")})
    return tables


def print_claims(claims):
    """Table (g) for each student; claims that can't be tested yet are counted in one line."""
    tested = [claim for claim in claims if claim["verdict"] != "untested"]
    if tested:
        print("**(g) Claims**: differences paired by seed, positive where the claim holds, with "
              "the 95 % t-interval over n seeds.\n"
              f"If nothing were real, about {0.05 * len(tested):.1f} of these {len(tested)} "
              "verdicts would be \"supported\" or \"contradicted\" by chance.\n"
              "*: survives Holm's correction over them. Seeds share one data set, and a teacher "
              "is its neighbour's plain twin.\n")
    for weak in dict.fromkeys(claim["student"] for claim in tested):
        rows = [[claim["claim"], f"{claim['mean']:+.3f}",
                 f"{claim['low']:+.3f} to {claim['high']:+.3f}", str(len(claim["values"])),
                 claim["verdict"] + (" *" if claim["holm"] else "")]
                for claim in tested if claim["student"] == weak]
        print_table(f"{weak}, taught by {STRONGER[weak]}",
                    ["claim", "difference", "95 % interval", "n", "verdict"], rows)
    if len(tested) < len(claims):
        print(f"{len(claims) - len(tested)} claims have fewer than 3 seeds and are left out; "
              "SEEDS=3 ./run_all.sh makes them testable.\n")


def print_data_sizes(place, accuracies):
    """Table (h). accuracies: {run name: {training examples: [accuracy]}}."""
    sizes = sorted({size for by_size in accuracies.values() for size in by_size})
    rows = [[kind, *(mean_and_spread(by_size.get(size, [])) for size in sizes)]
            for kind, by_size in accuracies.items() if len(by_size) > 1]
    print_table(f"\n## {place}\n\n**(h) Training examples**: accuracy out of distribution "
                "(sentences: A-accuracy), mean ± standard deviation over seeds.",
                ["run", *map("{:,}".format, sizes)], rows)


# ---- Figures -------------------------------------------------------------------------------------

# Told apart in grey by line and marker too.
STYLES = {"plain": {"color": "#1b6ca8", "linestyle": "-", "marker": "o"},
          "self": {"color": "#8c8c8c", "linestyle": "--", "marker": "s"},
          "taught": {"color": "#d1495b", "linestyle": "-.", "marker": "^"},
          "strong": {"color": "#222222", "linestyle": ":", "marker": "D"}}
LABELS = {"plain": "alone", "self": "taught by its own kind",
          "taught": "taught by the stronger kind", "strong": "the stronger kind alone"}


def import_pyplot():
    """matplotlib.pyplot; UserError where it isn't installed."""
    try:
        import matplotlib
    except ImportError:
        raise common.UserError("--plots needs matplotlib: pip install matplotlib, "
                               "or leave --plots out") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams |= {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False,
                     "legend.frameon": False, "figure.constrained_layout.use": True,
                     "savefig.dpi": 150, "lines.markersize": 3, "lines.linewidth": 1}
    return plt


def roles(weak, kinds):
    """{role: what `kinds` has for it} in a figure about the student `weak`."""
    strong = STRONGER[weak]
    names = {"plain": weak, "self": f"{weak}-to-{weak}", "taught": f"{strong}-to-{weak}",
             "strong": strong}
    return {role: kinds[name] for role, name in names.items() if name in kinds}


def draw(plt, panels, xlabel, ylabel, **limits):
    """A figure of panels side by side: {title: [(role, x, y, standard deviation or None)]}."""
    size = (max(3.6, 2.5 * len(panels) + 0.6), 2.9)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
    for axis, (title, curves) in zip(axes[0], panels.items()):
        axis.set(title=title, xlabel=xlabel, **limits)
        for role, x, y, spread in curves:
            axis.errorbar(x, y, spread, **STYLES[role], label=LABELS[role], capsize=2)
    axes[0][0].set_ylabel(ylabel)
    handles, labels = axes[0][0].get_legend_handles_labels()
    one_each = dict(zip(labels, handles))
    figure.legend(one_each.values(), one_each, loc="outside upper center", ncols=2, fontsize=7)
    return figure


def mean_curve(role, x, rows):
    """A curve of `draw`: the mean of rows and their standard deviation."""
    rows = torch.tensor(rows)
    return role, x, rows.mean(dim=0), rows.std(dim=0) if len(rows) > 1 else None


def plot_reliability(plt, group, weak):
    """Accuracy over confidence in 15 bins over all seeds; bins of under 20 examples left out."""
    panels = {}
    for test in TESTS[group.task]:
        panels[f"{weak}, {test}"] = curves = []
        for role, runs in roles(weak, group.kinds()).items():
            confidence, predicted = torch.cat([run.answers[test] for run in runs]).max(dim=1)
            correct = predicted == torch.cat([run.labels[test] for run in runs])
            bins = (confidence * 15).ceil().clamp(1, 15)
            points = [(confidence[bins == b].mean(), correct[bins == b].float().mean())
                      for b in range(1, 16) if (bins == b).sum() >= 20]
            curves += [(role, *zip(*points), None)] if points else []
    figure = draw(plt, panels, "confidence", "accuracy", xlim=(0, 1), ylim=(0, 1))
    for axis in figure.axes:
        axis.axline((0, 0), slope=1, color="#cccccc")
    return figure


def plot_paths(plt, group, weak):
    """Training paths of up to four seeds in two dimensions, by classical MDS of 1 - RSA."""
    runs = [(role, run) for role, runs in roles(weak, group.kinds()).items() for run in runs[:4]]
    steps = [representations for _, run in runs for representations in run.path.values()]
    distances = torch.zeros(len(steps), len(steps))
    for i, j in itertools.combinations(range(len(steps)), 2):
        distances[i, j] = distances[j, i] = 1 - common.rsa(steps[i], steps[j])
    paths = classical_mds(distances).split([len(run.path) for _, run in runs])
    curves = [(role, *path.T, None) for (role, _), path in zip(runs, paths)]
    figure = draw(plt, {weak: curves}, "first dimension of 1 - RSA", "second dimension")
    figure.axes[0].set_aspect("equal", adjustable="datalim")  # distances mean the same both ways
    for (role, _), path in zip(runs, paths):  # a large marker: the end
        figure.axes[0].plot(*path[-1], **STYLES[role], markersize=7, markeredgecolor="white")
    return figure


def plot_barriers(plt, group, weak, barriers):
    """Training loss on the straight way between two runs, mean and deviation over pairs."""
    losses = {}
    for entry in barriers:  # between two seeds for the student alone, else from its plain twin
        losses.setdefault(entry["pair"].removesuffix(", two seeds"), []).append(entry["train loss"])
    curves = [mean_curve(role, torch.linspace(0, 1, BARRIER_POINTS), rows)
              for role, rows in roles(weak, losses).items() if role != "strong"]
    return draw(plt, {weak: curves}, "from its plain twin (alone: from another seed)",
                "training loss (nats)")


def plot_attractors(plt, group):
    """Accuracy over attractors, a panel for each student."""
    panels = {}
    for weak in STRONGER:
        by_role = roles(weak, group.kinds())
        if "plain" in by_role:
            panels[weak] = [mean_curve(role, range(5), [
                [run.record["metrics"]["test"]["accuracy_by_attractors"].get(str(k), math.nan)
                 for k in range(5)] for run in runs]) for role, runs in by_role.items()]
    return draw(plt, panels, "attractors (4: and more)", "accuracy", xticks=range(5),
                ylim=(0, 1.02))


def plot_data_sizes(plt, accuracies):
    """Accuracy over training examples, a panel for each student; see table (h)."""
    panels = {}
    for weak in STRONGER:
        if len(accuracies.get(weak, [])) > 1:
            panels[weak] = [
                (role, *zip(*((size, statistics.fmean(by_size[size]),
                               statistics.stdev(by_size[size]) if by_size[size][1:] else 0)
                              for size in sorted(by_size))))
                for role, by_size in roles(weak, accuracies).items()]
    return draw(plt, panels, "training examples", "accuracy out of distribution", xscale="log")


def plot_group(plt, group, barriers):
    """{name: figure} of one group."""
    figures = {}
    for weak in STRONGER:
        if weak in group.kinds():
            figures[f"reliability-{weak}"] = plot_reliability(plt, group, weak)
            figures[f"paths-{weak}"] = plot_paths(plt, group, weak)
            if any(entry["pair"].startswith(weak) for entry in barriers):
                figures[f"barriers-{weak}"] = plot_barriers(plt, group, weak, barriers)
    if group.task == "sva" and figures:
        figures["attractors"] = plot_attractors(plt, group)
    return figures


# ---- Command line --------------------------------------------------------------------------------


def parse_arguments(argv):
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("runs", type=Path, help="folder with the runs; every run below it is taken")
    add("--json", type=Path, metavar="FILE", help="write all numbers there")
    add("--plots", type=Path, metavar="DIR", help="write figures there (needs matplotlib)")
    add("--data-dir", type=Path, default=Path("data"),
        help="where the training scripts had their data, for the barriers (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    device = common.choose_device(args.device)
    if not args.runs.is_dir():
        raise common.UserError(f"{args.runs}: no such folder; give the training scripts' --out")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    if args.plots:
        plt = import_pyplot()
        args.plots.mkdir(parents=True, exist_ok=True)
    problems, results, studies = [], [], {}
    for group in load_groups(args.runs, problems):
        barriers = measure_barriers(group, args.data_dir, device, problems)
        claims = test_claims(group, barriers)
        print(f"\n## {group.title}\n")
        print_answer(claims)
        tables = print_tables(group, barriers)
        print_claims(claims)
        runs = list(group.runs.values())
        place, examples = runs[0].folder.parts[-3], group.config["examples"]  # sva-lm-linzen, ...
        for run in runs:
            by_size = studies.setdefault(place, {}).setdefault(run.name, {})
            accuracy = out_of_distribution(run, ACCURACY[group.task])
            by_size.setdefault(examples, []).append(accuracy)
        results.append({"title": group.title, "claims": claims, "tables": tables,
                        "barriers": barriers,
                        "runs": [{key: run.record.get(key) for key in KEPT} for run in runs]})
        if args.plots:
            for name, figure in plot_group(plt, group, barriers).items():
                figure.savefig(args.plots / f"{place}-{examples}-{name}.png")
            plt.close("all")
    for place, accuracies in studies.items():
        if any(len(accuracies.get(weak, [])) > 1 for weak in STRONGER):
            print_data_sizes(place, accuracies)
            if args.plots:
                figure = plot_data_sizes(plt, accuracies)
                figure.savefig(args.plots / f"{place}-data-sizes.png")
    if args.plots:
        print(f"figures written to {args.plots}")
    if not results:
        problems.append(f"{args.runs} has no finished run: try ./run_all.sh --quick")
    if problems:
        print("\n## What is missing\n\n" + "\n".join(f"- {problem}" for problem in problems))
    if args.json:
        common.write_json(args.json, {"groups": results, "missing": problems},
                          parse_float=lambda text: round(float(text), 5))
        print(f"numbers written to {args.json}")


if __name__ == "__main__":
    common.run_main(main)
