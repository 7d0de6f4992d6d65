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
COMPARED_EXAMPLES = 10_000  # of each test, for comparisons of two models
BARRIER_POINTS = 21
# Of training and test each, and at most a 48th of the training set; a compromise with time.
BARRIER_EXAMPLES = {"mnist": 500, "sva": 250}
KEPT = ("config", "history", "metrics", "timing", "environment")  # of run.json, in --json
MARGIN = 0.05  # a change of CKA below this counts as little

# Abnar et al. 2020: accuracy, then ECE, on the test digits, scaled, translated.
PAPER_MNIST = {
    "mlp": (.985, .794, .373, .015, .175, .564), "cnn": (.992, .962, .981, .011, .060, .028),
    "mlp-to-mlp": (.985, .839, .395, .015, .155, .555),
    "cnn-to-mlp": (.988, .904, .510, .013, .109, .432),
    "mlp-to-cnn": (.990, .955, .976, .013, .054, .030),
    "cnn-to-cnn": (.991, .951, .978, .014, .068, .033),
}


# The claims that make the answer; see claims_about.
HEADLINES = ("teaching improves accuracy", "... more than self-distillation",
             "teaching improves calibration (ECE)", "errors nearer to other strong models (kappa)")


# ---- Statistics ----------------------------------------------------------------------------------


def t_probability(t, degrees):
    """P(|T| < t) for Student's t with `degrees` (1, 2, ...) degrees of freedom.

    Abramowitz & Stegun 1964, eq. 26.7.3 and 26.7.4: a finite sum for whole degrees.
    """
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term = total = math.cos(angle) if odd else 1.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    total *= math.sin(angle)
    if not odd:
        return total
    return 2 / math.pi * (angle + (total if degrees > 1 else 0))


def t_quantile(degrees):
    """The t with P(|T| < t) = 0.95, such as 12.706 for one degree of freedom; by bisection."""
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, degrees) < 0.95 else (low, middle)
    return high


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
    error = statistics.stdev(values) / math.sqrt(len(values))
    half = t_quantile(len(values) - 1) * error
    low, high = mean - half, mean + half
    distance = abs(abs(mean) - margin)
    p = 1 - t_probability(distance / error, len(values) - 1) if error > 0 else 0.0
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
    for rank, (p, place) in enumerate(sorted(zip(p_values, range(len(p_values))))):
        if p > level / (len(p_values) - rank):
            break
        survives[place] = True
    return survives


def jackknife(pairs):
    """One value per seed for the mean over all pairs of seeds: its jackknife pseudo-values.

    pairs: (n, n) symmetric, n > 2. The means over each seed's own pairs depend on each other, since
    every pair enters two of them; the pseudo-values theta + 2 (n-1)/(n-2) (s_i - theta) hardly do
    (Efron & Stein 1981, "The jackknife estimate of variance", for U-statistics of degree 2).
    """
    n = len(pairs)
    own_mean = (pairs.sum(dim=1) - pairs.diagonal()) / (n - 1)
    return own_mean.mean() + 2 * (n - 1) / (n - 2) * (own_mean - own_mean.mean())


def classical_mds(distances, dimensions=2):
    """Points (n, dimensions) whose distances come closest to `distances` (n, n). Torgerson 1952."""
    n = len(distances)
    centre = torch.eye(n, dtype=torch.double) - 1 / n
    values, vectors = torch.linalg.eigh(-0.5 * centre @ distances.double().square() @ centre)
    return (vectors * values.clamp(min=0).sqrt())[:, -dimensions:].flip(1)


# ---- Runs ----------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One finished run. answers: {test: probabilities (compared examples, classes)}.
    path: {epoch: representations of the probe examples}."""

    name: str
    seed: int
    folder: Path
    config: dict
    record: dict
    answers: dict
    path: dict


class Group(NamedTuple):
    """All runs of one task on the same data. labels: {test: labels of the compared examples}.
    known: comparisons already made, see compare."""

    title: str
    task: str
    config: dict
    runs: dict  # {(run name, seed): Run}
    labels: dict
    known: dict

    def kinds(self):
        """{run name: [its runs]}."""
        kinds = {}
        for (name, _), run in self.runs.items():
            kinds.setdefault(name, []).append(run)
        return kinds


def read_run(folder, record):
    """(Run, {test: labels of its compared examples})."""
    config, outputs, answers, labels = record["config"], common.load_outputs(folder), {}, {}
    for test in TESTS[config["task"]]:
        logits = outputs[f"{test}_logits"]
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(logits), generator=generator)[:COMPARED_EXAMPLES]
        answers[test] = logits[chosen].float().softmax(dim=1)
        labels[test] = outputs[f"{test}_labels"][chosen]
        if not isinstance(record["metrics"][test]["accuracy"], float):
            raise ValueError(f"accuracy of {test}")
    path = dict(zip(outputs["probe_epochs"].tolist(), outputs["probe_representations"],
                    strict=True))
    name = common.run_name(config)
    return Run(name, int(config["seed"]), folder, config, record, answers, path), labels


def order_of_kind(name):
    """Sorts by student, the plain runs first, then by teacher."""
    teacher, _, student = name.removesuffix("-online").rpartition("-to-")
    places = [MODELS.index(model) if model in MODELS else 99 for model in (student, teacher)]
    return places[0], teacher != "", places[1], name


DATA_FIELDS = ("task", "objective", "data", "examples", "bytes")  # equal within a group


def load_groups(root, problems):
    """Yield one Group at a time, to spare memory; `problems` gets a line for what is left out."""
    records = {}
    for folder in common.find_runs(root):
        try:
            record = common.load_run(folder)
            data = [record["config"].get(field) for field in DATA_FIELDS]
            group = records.setdefault((str(folder.parent.parent), str(data)), {})
            group[folder] = record
        except common.UserError as error:
            problems.append(f"left out: {error}")
    for (parent, _), members in sorted(records.items()):
        runs, labels = {}, {}
        for folder, record in members.items():
            try:
                run, labels_of_run = read_run(folder, record)
            except common.UserError as error:
                problems.append(f"left out: {error}")
                continue
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                problems.append(f"left out: {folder} is not a run of this version "
                                f"({type(error).__name__}: {error})")
                continue
            if (run.name, run.seed) in runs:
                problems.append(f"left out: {folder} is a second {run.name} of seed {run.seed}")
                continue
            runs[run.name, run.seed], labels = run, labels_of_run
        if not runs:
            continue
        runs = dict(sorted(runs.items(), key=lambda item: (order_of_kind(item[0][0]), item[0][1])))
        config = next(iter(runs.values())).config
        title = {"mnist": "MNIST", "sva": "Subject-verb agreement"}[config["task"]]
        if config.get("objective") == "lm":
            title += ", language models"
        group = Group(f"{title}, data: {config['data']}", config["task"], config, runs, labels, {})
        note_gaps(group, parent, problems)
        yield group


def note_gaps(group, parent, problems):
    """Name seeds that are not there, and runs of one kind that were not made alike."""
    taught = [run for run in group.runs.values() if run.config["kd"]]
    for name, runs in group.kinds().items():
        seeds = {run.seed for run in (taught if runs[0].config["kd"] else group.runs.values())}
        if missing := sorted(seeds - {run.seed for run in runs}):
            problems.append(f"{parent}: no {name} with seed {', '.join(map(str, missing))}")
        for field in sorted({field for run in runs for field in run.config}):
            values = {str(run.config.get(field)) for run in runs}
            if len(values) > 1 and field not in ("seed", "teacher_seed"):
                problems.append(f"{parent}: the runs of {name} differ in {field}")
    for field in ("device", "precision"):
        values = {str(run.record.get("environment", {}).get(field)) for run in group.runs.values()}
        if len(values) > 1:
            problems.append(f"{parent}: runs of different {field} stand in one table: "
                            + ", ".join(sorted(values)))


# ---- Comparisons of two runs ---------------------------------------------------------------------


def over_tests(measure):
    """The mean of measure(probabilities of a, of b, labels) over the out-of-distribution tests."""
    return lambda group, a, b: statistics.fmean(
        measure(a.answers[test], b.answers[test], group.labels[test])
        for test in OUT_OF_DISTRIBUTION[group.task])


def path_distance(group, a, b):
    """Mean of 1 - RSA over the epochs of which both runs have a snapshot."""
    return statistics.fmean(1 - common.rsa(a.path[epoch], b.path[epoch])
                            for epoch in a.path if epoch in b.path)


def last(run):
    return run.path[max(run.path)]


# Name: (value for two runs of a group, +1 if more means more alike, what it is).
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
    "CKA": (lambda group, a, b: common.linear_cka(last(a), last(b)),
            1, "of the representations of 1,000 test examples"),
    "RSA": (lambda group, a, b: common.rsa(last(a), last(b)),
            1, "of the representations of 1,000 test examples"),
    "path distance": (path_distance, -1, "mean of 1 - RSA over equal epochs"),
}


def compare(group, name, run, others):
    """Mean of a comparison between `run` and each of `others`; None where there are none."""
    values = []
    for other in others:
        key = name, *sorted((run.folder, other.folder))
        if key not in group.known:
            group.known[key] = COMPARISONS[name][0](group, run, other)
        values.append(group.known[key])
    return statistics.fmean(values) if values else None


def references(group, run):
    """The plain runs to compare `run` with: {"own teacher", "other strong", "other plain": [runs]}.

    Others are neither its own teacher nor a twin that started from the same weights.
    """
    student, teacher = run.config["student"], run.config.get("teacher")
    teacher_seed = run.config.get("teacher_seed")

    def others(kind):
        return [other for (name, seed), other in group.runs.items() if name == kind
                and (name, seed) not in ((teacher, teacher_seed), (student, run.seed))]

    own = group.runs.get((teacher, teacher_seed)) if run.config["kd"] == "offline" else None
    return {"own teacher": [own] if own else [],
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


def interpolate(model, state_a, state_b, measure, points=BARRIER_POINTS):
    """[measure(model)] with the weights (1-a) state_a + a state_b for equally spaced a in 0..1."""
    results = []
    for a in torch.linspace(0, 1, points).tolist():
        model.load_state_dict({
            name: torch.lerp(value, state_b[name], a) if value.is_floating_point() else value
            for name, value in state_a.items()})
        results.append(measure(model))
    return results


def barrier_examples(group):
    return min(BARRIER_EXAMPLES[group.task], max(2, group.config["examples"] // 48))


def mnist_measure(group, data_dir, device):
    """(build, measure): an untrained model of a kind; what is measured of a model on the way."""
    config, n = group.config, barrier_examples(group)
    _, digits = train_mnist.load_digits(config["data"], config["examples"], data_dir)
    data = train_mnist.make_data(digits, config["examples"], device)
    amp = common.has_bfloat16(device)
    (train_images, _), (test_images, _) = data["train"], data["test"]
    labels = torch.cat([data["train"][1][:n], data["test"][1][:n]]).cpu()
    images = torch.cat([train_images[:n], test_images[:n]])

    def measure(model):
        # Without new batch-norm statistics for each point, barriers are an artefact of old ones.
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            update_bn([train_mnist.to_input(images[:n])], model)
        logits = train_mnist.evaluate(model, images, amp)[0]
        return [common.classification_metrics(logits[part], labels[part])[name]
                for part in (slice(n), slice(n, None)) for name in ("nll", "accuracy")]

    return lambda kind: train_mnist.build_model(kind, 0, device), measure


def sva_measure(group, data_dir, device):
    """As mnist_measure; a language model's loss is that of all words, its accuracy the verb's."""
    config, amp = group.config, common.has_bfloat16(device)
    source, files = train_sva.find_data(config["data"], data_dir)
    data, described = train_sva.make_data(source, files, config["examples"], config["objective"],
                                          device)
    if described != next(iter(group.runs.values())).record["data"]:
        raise common.UserError(f"the sentences in {data_dir} are not those of the runs")
    generator = torch.Generator().manual_seed(0)
    n = barrier_examples(group)
    chosen = torch.randperm(described["train"], generator=generator)[:n]
    first = torch.arange(described["probe"])[:n]
    splits = data["train"].take(chosen.to(device)), data["probe"].take(first.to(device))

    def measure(model):
        values = []
        for split in splits:
            logits, _, perplexity = train_sva.evaluate(model, split, config["objective"], amp)
            metrics = common.classification_metrics(logits, split.labels.cpu())
            loss = metrics["nll"] if perplexity is None else math.log(perplexity)
            values += [loss, metrics["accuracy"]]
        return values

    return lambda kind: train_sva.build_model(kind, 0, described["vocabulary"],
                                              config["objective"], device), measure


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


def measure_pair(label, a, b, build, measure):
    """{"pair", "runs", and BARRIER_POINTS values of "train_loss", "train_accuracy" ...}."""
    model, other = (common.load_weights(build(run.config["student"]), run.folder)
                    for run in (a, b))
    points = interpolate(model, copy.deepcopy(model.state_dict()), other.state_dict(), measure)
    names = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
    return {"pair": label, "runs": [f"{run.name}/seed{run.seed}" for run in (a, b)],
            **dict(zip(names, map(list, zip(*points))))}


def measure_barriers(group, data_dir, device, problems):
    """What measure_pair returns for each of barrier_pairs."""
    pairs, results = barrier_pairs(group), []
    if not pairs:
        return []
    try:
        prepare = {"mnist": mnist_measure, "sva": sva_measure}[group.task]
        build, measure = prepare(group, data_dir, device)
    except common.UserError as error:
        problems.append(f"no barriers for {group.title}: {error} (--data-dir: where the data are)")
        return []

    # The models are small: a pair on each core is faster than one pair on all of them.
    threads = torch.get_num_threads()
    workers = threads if device.type == "cpu" else 1
    torch.set_num_threads(threads // workers)
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(measure_pair, *pair, build, measure) for pair in pairs]
        for done, ((label, _, run), future) in enumerate(zip(pairs, futures), 1):
            live(f"{group.title}: barrier {done}/{len(pairs)}")
            try:
                results.append(future.result())
            except (common.UserError, KeyError) as error:
                problems.append(f"no barrier for {label}, seed {run.seed}: {error}")
    torch.set_num_threads(threads)
    live("")
    return results


def live(text):
    """A line on the terminal that the next one overwrites; nothing if stderr is not a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text[:118]}", end="", file=sys.stderr, flush=True)


# ---- Claims of the paper's abstract --------------------------------------------------------------


def claims_about(group, weak, barriers):
    """{claim: {seed: value}} about the student `weak`; a value is positive if the claim holds.

    Differences are paired by seed: a student and its untaught twin, compared with the same strong
    models, which are the student's own teacher, or those that did not teach it.
    """
    strong, claims = STRONGER[weak], {}
    heights = {tuple(entry["runs"]): barrier(entry["train_loss"]) for entry in barriers}

    def add(claim, seed, value):
        if value is not None and math.isfinite(value):
            claims.setdefault(claim, {})[seed] = value

    def gain(measure, better, worse):
        tests = [(better.record["metrics"][test], worse.record["metrics"][test])
                 for test in OUT_OF_DISTRIBUTION[group.task]]
        return statistics.fmean(a[measure] - b[measure] for a, b in tests)

    def nearer(measure, run, models):
        """How much nearer than its plain twin `run` is to `models`."""
        twin = group.runs[run.config["student"], run.seed]
        near, far = (compare(group, measure, one, models) for one in (run, twin))
        return None if near is None else COMPARISONS[measure][1] * (near - far)

    accuracy = "accuracy" if group.task == "mnist" else "a_accuracy"
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
            for measure, what in (("kappa", "errors"), ("CKA", "representations"),
                                  ("RSA", "representations"), ("path distance", "training path")):
                add(f"{what} nearer to other strong models ({measure})", seed,
                    nearer(measure, taught, models["other strong"]))
                add(f"{what} nearer to its teacher ({measure})", seed,
                    nearer(measure, taught, models["own teacher"]))
        if plain and self_taught:
            add(f"self-distillation changes little (CKA within ±{MARGIN})", seed,
                nearer("CKA", self_taught, references(group, self_taught)["other plain"]))
        twins = [heights.get((f"{weak}/seed{seed}", f"{name}/seed{seed}")) for name in names[2:]]
        if None not in twins:
            add("a strong teacher moves the basin, itself doesn't", seed, twins[0] - twins[1])

    seeds = [seed for name, seed in group.runs if name == weak and (strong, seed) in group.runs]
    if len(seeds) > 2:
        for measure, what in (("divergence", "predictions"), ("CKA", "representations")):
            spread = torch.zeros(len(seeds), len(seeds), dtype=torch.double)
            for (i, a), (j, b) in itertools.permutations(enumerate(seeds), 2):
                likeness = [compare(group, measure, group.runs[kind, a], [group.runs[kind, b]])
                            for kind in (strong, weak)]
                spread[i, j] = COMPARISONS[measure][1] * (likeness[0] - likeness[1])
            for seed, value in zip(seeds, jackknife(spread).tolist()):
                add(f"a stronger bias, less variance of {what}", seed, value)
    return claims


def test_claims(group, barriers):
    """[{"student", "claim", "values", "mean", "low", "high", "verdict", "p", "holm"}]."""
    results = []
    for weak in STRONGER:
        for claim, values in claims_about(group, weak, barriers).items():
            margin = MARGIN if "±" in claim else 0.0
            statistic = t_test(list(values.values()), margin)
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
        for claim in found:
            if claim is found[0]:
                print(f"{weak} taught by {strong}, {len(claim['values'])} seeds:")
            interval = ""
            if claim["verdict"] != "untested":
                interval = f" ({claim['low']:+.3f} to {claim['high']:+.3f})"
            print(f"- {claim['claim']}: {claim['mean']:+.3f}{interval} {claim['verdict']}")
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
    used = [place for place in range(len(header)) if any(row[place] != "-" for row in rows)]
    lines = [[line[place] for place in used] for line in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    print(f"{caption}\n")
    for line in lines:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |")
    print(flush=True)


def table_of_kinds(group, caption, columns, paper=None):
    """Print a row for each kind of run; return the values behind it, {kind: {column: [values]}}.

    columns: {title: function of a run}. paper: {kind: its values, column by column}.
    """
    values, rows = {}, []
    for kind, runs in group.kinds().items():
        values[kind] = {title: [value(run) for run in runs] for title, value in columns.items()}
        rows.append([kind, *map(mean_and_spread, values[kind].values()), str(len(runs))])
        if paper and kind in paper:
            rows.append([f"{kind} (paper)", *(f"{value:.3f}" for value in paper[kind]), "-"])
    print_table(caption, ["run", *columns, "n"], rows)
    return values


def metric(test, name, number=None):
    """A function of a run: a metric in its run.json; None where it has no such value."""
    def value(run):
        found = run.record["metrics"][test].get(name)
        return found if number is None or found is None else found.get(number)

    return value


def likeness(group, name, which):
    """A function of a run: a comparison with one kind of its references."""
    return lambda run: compare(group, name, run, references(group, run)[which])


def path_length(run):
    return sum(1 - common.rsa(a, b) for a, b in itertools.pairwise(run.path.values()))


def path_straightness(run):
    return (1 - common.rsa(run.path[0], last(run))) / (path_length(run) or math.nan)


def print_tables(group, barriers):
    """Tables (a) to (f); returns {letter: {"caption", "rows"}} for --json."""
    tables = {}

    def add(letter, caption, columns, paper=None):
        caption = f"**({letter}) {caption}"
        tables[letter] = {"caption": caption,
                          "rows": table_of_kinds(group, caption, columns, paper)}

    if group.task == "mnist":
        add("a", "Accuracy and calibration**, mean ± standard deviation over n seeds.\n"
            "No model saw scaled or translated digits in training.",
            {f"{prefix}{test}": metric(test, name)
             for prefix, name in (("", "accuracy"), ("ECE, ", "ece")) for test in TESTS["mnist"]},
            PAPER_MNIST if group.config["data"] == "mnist" else None)
    else:
        names = {"accuracy": "accuracy", "A-accuracy": "a_accuracy", "D-accuracy": "d_accuracy"}
        add("a", "Agreement**, mean ± standard deviation over n seeds.\n"
            "A-accuracy: mean over 0, 1, 2, 3, 4+ attractors; D-accuracy: over distances.",
            {title: metric("test", name) for title, name in names.items()})
        add("b", "Accuracy by attractors**, which are rare in training; 4: and more.",
            {f"{k} attr.": metric("test", "accuracy_by_attractors", str(k)) for k in range(5)})
        add("c", "Calibration and fit**: NLL of the answer in nats, perplexity per word.",
            {"ECE": metric("test", "ece"), "NLL": metric("test", "nll"),
             "perplexity": metric("test", "perplexity")})

    for place, (name, (_, _, caption)) in enumerate(COMPARISONS.items(), 1):
        add(f"d{place}", f"Likeness to plain models: {name}**, {caption}.",
            {which: likeness(group, name, which)
             for which in ("own teacher", "other strong", "other plain")})
    add("e", "Training paths** in the space of 1 - RSA: length, and straightness (end to end over "
        "length;\nit can exceed 1, as 1 - RSA is no metric).",
        {"length": path_length, "straightness": path_straightness})

    if barriers:
        rows, values = [], {}
        for label in dict.fromkeys(entry["pair"] for entry in barriers):
            entries = [entry for entry in barriers if entry["pair"] == label]
            values[label] = {
                f"{name}, {part}": [barrier([sign * value for value in entry[f"{part}_{name}"]])
                                    for entry in entries]
                for name, sign in (("loss", 1), ("accuracy", -1)) for part in ("train", "test")}
            rows.append([label, *map(mean_and_spread, values[label].values()), str(len(entries))])
        caption = ("**(f) Basins**: barrier on the straight way from a taught run to its plain "
                   f"twin, or between two seeds.\n{BARRIER_POINTS} points, "
                   f"{barrier_examples(group)} examples of training and test each. "
                   "Near 0: one basin.")
        print_table(caption, ["pair", *values[label], "n"], rows)
        tables["f"] = {"caption": caption, "rows": values}
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


def accuracy_of(group, run):
    """Accuracy out of distribution; of sentences the A-accuracy."""
    name = "accuracy" if group.task == "mnist" else "a_accuracy"
    tests = OUT_OF_DISTRIBUTION[group.task]
    return statistics.fmean(run.record["metrics"][test][name] for test in tests)


def print_data_sizes(title, accuracies):
    """Table (h). accuracies: {run name: {training examples: [accuracy]}}."""
    sizes = sorted({size for by_size in accuracies.values() for size in by_size})
    rows = [[kind, *(mean_and_spread(by_size.get(size, [])) for size in sizes)]
            for kind, by_size in accuracies.items() if len(by_size) > 1]
    print(f"\n## {title}\n")
    print_table("**(h) Training examples**: accuracy out of distribution (sentences: A-accuracy), "
                "mean ± standard deviation over seeds.", ["run", *map("{:,}".format, sizes)], rows)


# ---- Figures -------------------------------------------------------------------------------------

# Told apart in grey by line and marker too.
STYLES = {"plain": {"color": "#1b6ca8", "linestyle": "-", "marker": "o"},
          "self": {"color": "#8c8c8c", "linestyle": "--", "marker": "s"},
          "taught": {"color": "#d1495b", "linestyle": "-.", "marker": "^"},
          "strong": {"color": "#222222", "linestyle": ":", "marker": "D"}}


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


def names_of_roles(weak):
    """{role: run name} of what a figure about the student `weak` shows."""
    strong = STRONGER[weak]
    return {"plain": weak, "self": f"{weak}-to-{weak}", "taught": f"{strong}-to-{weak}",
            "strong": strong}


def roles_of(group, weak):
    """{role: [runs]} of a figure about the student `weak`."""
    kinds = group.kinds()
    return {role: kinds[name] for role, name in names_of_roles(weak).items() if name in kinds}


def panels(plt, titles, width):
    """(figure, axes): one panel for each title, side by side."""
    size = (max(3.6, width * len(titles) + 0.6), 2.9)
    figure, axes = plt.subplots(1, len(titles), figsize=size, squeeze=False)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title)
    return figure, axes[0]


def with_legend(figure):
    """One legend above all panels, where it hides no curve."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=7)
    return figure


def plot_reliability(plt, group, weak):
    """Accuracy over confidence in 15 bins over all seeds; bins of under 20 examples left out."""
    tests = TESTS[group.task]
    figure, axes = panels(plt, tests, 2.4)
    for axis, test in zip(axes, tests):
        axis.plot([0, 1], [0, 1], color="#cccccc")
        for role, runs in roles_of(group, weak).items():
            answers = [run.answers[test].max(dim=1) for run in runs]
            confidence = torch.cat([values for values, _ in answers])
            correct = torch.cat([predicted == group.labels[test] for _, predicted in answers])
            bins = (confidence * 15).ceil().clamp(1, 15)
            points = [(confidence[bins == b].mean(), correct[bins == b].float().mean())
                      for b in range(1, 16) if (bins == b).sum() >= 20]
            if points:
                axis.plot(*zip(*points), **STYLES[role], label=runs[0].name, clip_on=False)
        axis.set(xlabel="confidence", xlim=(0 if group.task == "mnist" else 0.5, 1), ylim=(0, 1))
    axes[0].set_ylabel("accuracy")
    return with_legend(figure)


def plot_paths(plt, group, weak):
    """Training paths in two dimensions, by classical MDS of 1 - RSA; large markers: the end."""
    steps = [(role, run, epoch) for role, runs in roles_of(group, weak).items()
             for run in runs[:4] for epoch in run.path]
    distances = torch.zeros(len(steps), len(steps))
    for (i, a), (j, b) in itertools.combinations(enumerate(steps), 2):
        distances[i, j] = distances[j, i] = 1 - common.rsa(a[1].path[a[2]], b[1].path[b[2]])
    points = classical_mds(distances)
    figure, (axis,) = panels(plt, [""], 4)
    for role, runs in roles_of(group, weak).items():
        for run in runs[:4]:
            x, y = points[[i for i, step in enumerate(steps) if step[1] is run]].T
            label = run.name if run is runs[0] else None
            axis.plot(x, y, **STYLES[role], label=label)
            axis.plot(x[-1], y[-1], **STYLES[role], markersize=7, markeredgecolor="white")
    axis.set(xlabel="first dimension of 1 - RSA", ylabel="second dimension")
    axis.set_aspect("equal", adjustable="datalim")
    return with_legend(figure)


def plot_barriers(plt, group, weak, barriers):
    """Training loss and accuracy on the straight way between two runs, mean over pairs."""
    labels = names_of_roles(weak) | {"plain": f"{weak}, two seeds"}
    figure, axes = panels(plt, ["training loss (nats)", "training accuracy"], 2.8)
    for axis, name in zip(axes, ("train_loss", "train_accuracy")):
        for role, label in labels.items():
            curves = [entry[name] for entry in barriers if entry["pair"] == label]
            if curves:
                mean = torch.tensor(curves).mean(dim=0)
                axis.plot(torch.linspace(0, 1, len(mean)), mean, **STYLES[role], label=label,
                          markevery=4)
        axis.set_xlabel("way from one run to the other")
    return with_legend(figure)


def plot_attractors(plt, group):
    """Accuracy over attractors, mean and standard deviation over seeds, a panel per student."""
    students = [weak for weak in STRONGER if "plain" in roles_of(group, weak)]
    figure, axes = panels(plt, students, 2.2)
    for axis, weak in zip(axes, students):
        for role, runs in roles_of(group, weak).items():
            values = torch.tensor([[run.record["metrics"]["test"]["accuracy_by_attractors"]
                                    .get(str(k), math.nan) for k in range(5)] for run in runs])
            spread = values.std(dim=0) if len(runs) > 1 else None
            axis.errorbar(range(5), values.mean(dim=0), spread, **STYLES[role], capsize=2,
                          label=runs[0].name)
        axis.set(xlabel="attractors (4: and more)", xticks=range(5), ylim=(0, 1.02))
        axis.legend(fontsize=6)
    axes[0].set_ylabel("accuracy")
    return figure


def plot_data_sizes(plt, accuracies):
    """Accuracy over training examples, mean and standard deviation over seeds; see table (h)."""
    students = [weak for weak in STRONGER if len(accuracies.get(weak, [])) > 1]
    figure, axes = panels(plt, students, 2.8)
    for axis, weak in zip(axes, students):
        for role, name in names_of_roles(weak).items():
            points = sorted(accuracies.get(name, {}).items())
            means = [statistics.fmean(values) for _, values in points]
            spreads = [statistics.stdev(values) if values[1:] else 0 for _, values in points]
            axis.errorbar([size for size, _ in points], means, spreads, **STYLES[role],
                          capsize=2, label=name)
        axis.set(xlabel="training examples", xscale="log")
        axis.legend(fontsize=6)
    axes[0].set_ylabel("accuracy out of distribution")
    return figure


def plot_group(plt, group, barriers):
    """{name: figure} of one group."""
    figures = {}
    for weak in STRONGER:
        if "plain" in roles_of(group, weak):
            figures[f"reliability-{weak}"] = plot_reliability(plt, group, weak)
            figures[f"paths-{weak}"] = plot_paths(plt, group, weak)
            if any(entry["pair"].startswith(weak) for entry in barriers):
                figures[f"barriers-{weak}"] = plot_barriers(plt, group, weak, barriers)
    if group.task == "sva" and figures:
        figures["attractors"] = plot_attractors(plt, group)
    return figures


def save_figures(plt, figures, folder, stem):
    for name, figure in figures.items():
        figure.savefig(folder / f"{stem}-{name}.png")
        plt.close(figure)
    print(f"{len(figures)} figures written to {folder}\n")


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
        common.make_folder(args.json.parent, "--json")
    if args.plots:
        plt = import_pyplot()
        common.make_folder(args.plots, "--plots")
    problems, results, studies = [], [], {}
    for group in load_groups(args.runs, problems):
        barriers = measure_barriers(group, args.data_dir, device, problems)
        claims = test_claims(group, barriers)
        examples = group.config["examples"]
        title = f"{group.title}, {examples:,} training examples"
        print(f"\n## {title}\n")
        print_answer(claims)
        tables = print_tables(group, barriers)
        print_claims(claims)
        runs = list(group.runs.values())
        place = runs[0].folder.parts[-3]  # such as sva-lm-linzen
        if args.plots:
            figures = plot_group(plt, group, barriers)
            save_figures(plt, figures, args.plots, f"{place}-{examples}")
        for run in runs:
            by_size = studies.setdefault(place, {}).setdefault(run.name, {})
            by_size.setdefault(examples, []).append(accuracy_of(group, run))
        results.append({"title": title, "claims": claims, "tables": tables, "barriers": barriers,
                        "runs": [{key: run.record.get(key) for key in KEPT} for run in runs]})
    for place, accuracies in studies.items():
        if any(len(accuracies.get(weak, [])) > 1 for weak in STRONGER):
            print_data_sizes(place, accuracies)
            if args.plots:
                figures = {"data-sizes": plot_data_sizes(plt, accuracies)}
                save_figures(plt, figures, args.plots, place)
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
