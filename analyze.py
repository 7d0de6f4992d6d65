"""Compare finished runs: the answer first, then tables in Markdown, every number as CSV, figures.

    python analyze.py runs
    python analyze.py runs --csv runs.csv --plots figures

Every run is a row of numbers, which all that is shown reads. Runs of one name (one setting) differ
in their seeds alone.
"""

import argparse
import csv
import functools
import importlib.util
import json
import math
import sys
import zipfile
import zlib
from itertools import combinations
from pathlib import Path
from statistics import covariance, fmean, pstdev, stdev, variance
from typing import NamedTuple

import numpy as np
import torch

import common
import train_mnist
import train_sva

SCRIPTS = {"mnist": train_mnist, "sva": train_sva}
OUT_OF_DISTRIBUTION = {"mnist": ("scaled", "translated"), "sva": ("test",)}
ACCURACY = {"mnist": "accuracy", "sva": "a_accuracy"}  # that asks for the bias

# Whose inductive bias suits the task better than the model's own.
STRONGER = {"mlp": "cnn", "transformer": "lstm", "transformer-seq": "lstm", "ut-seq": "lstm"}

COMPARED_EXAMPLES = 10_000
BARRIER_POINTS = 21
BARRIER_EXAMPLES = 250
CALIBRATION_BINS = 15
LEAST_IN_BIN = 20  # fewer examples say little about their accuracy
MARGIN = 0.05  # a smaller difference is little

# 97.5 % quantiles of Student's t, by the number of values.
T_QUANTILES = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262,
               11: 2.228, 12: 2.201}

# (claim, column of the rows, sign, role of the one run, role of the other). Sign 1: more is better;
# -1: less; 0: the difference is little.
GAP = ("the stronger bias generalises better", "OOD: accuracy", 1, "strong", "plain")
HEADLINES = [  # the answer
    ("teaching improves accuracy", "OOD: accuracy", 1, "taught", "plain"),
    ("... more than self-distillation", "OOD: accuracy", 1, "taught", "self-taught"),
    ("... more than permuted soft labels", "OOD: accuracy", 1, "taught", "permuted"),
    ("teaching improves calibration", "OOD: ece", -1, "taught", "plain"),
    ("errors come nearer to other strong models", "other strong: kappa", 1, "taught", "plain"),
]
CLAIMS = [
    GAP,
    *HEADLINES,
    ("representations come nearer (CKA)", "other strong: CKA", 1, "taught", "plain"),
    ("representations come nearer (RSA)", "other strong: RSA", 1, "taught", "plain"),
    ("training paths come nearer", "other strong: path distance", -1, "taught", "plain"),
    ("teaching moves the basin", "solutions: barrier", 1, "taught", "self-taught"),
    ("self-distillation changes little (CKA)", "own kind: CKA", 0, "self-taught", "plain"),
    ("stronger bias, less variance", "solutions: prediction spread", -1, "strong", "plain"),
    ("... of representations", "solutions: representation spread", -1, "strong", "plain"),
]
# Differences that are printed of every run that has them.
AGAINST_ALONE = ("OOD: accuracy", "OOD: ece", "scaled: accuracy", "translated: accuracy",
                 "test: balanced_a_accuracy")


# ---- Statistics ----------------------------------------------------------------------------------


def quantile_of_t(n):
    """How many standard errors a 95 % t-interval of n values, at least 3, reaches to each side."""
    return T_QUANTILES[min(n, 12)]


def t_test(values, sign):
    """(mean, half of its 95 % t-interval, verdict). supported: the interval, turned by the sign, is
    above 0; contradicted: below. Sign 0: it lies inside +-MARGIN; outside."""
    n = len(values)
    mean = fmean(values)
    if n < 3:
        return mean, math.inf, "untested"
    half = quantile_of_t(n) * stdev(values) / math.sqrt(n)

    distance = sign * mean if sign else MARGIN - abs(mean)
    if abs(distance) <= half:
        return mean, half, "inconclusive"
    return mean, half, "supported" if distance > 0 else "contradicted"


def difference_text(values):
    """+0.158 (+0.134 to +0.182): mean and 95 % t-interval, from 3 values on."""
    mean, half, _ = t_test(values, 1)
    interval = f" ({mean - half:+.3f} to {mean + half:+.3f})" if math.isfinite(half) else ""
    return f"{mean:+.3f}{interval}"


def ratio_of_means(above, below):
    """(mean of `above` / mean of `below`, low, high): Fieller's 95 % interval for paired values
    (Fieller 1954, "Some problems in interval estimation", J. R. Stat. Soc. B 16): each ratio r for
    which a t-test finds no difference between `above` and r times `below`. None where `below` is
    not surely above 0; below 3 values the interval is infinite."""
    n = len(above)
    mean_above = fmean(above)
    mean_below = fmean(below)
    if mean_below <= 0:
        return None
    ratio = mean_above / mean_below
    if n < 3:
        return ratio, -math.inf, math.inf

    # Its ends are where (mean_above - r mean_below)^2 is the quantile^2 times the squared standard
    # error of that: a r^2 - 2 b r + c = 0.
    factor = quantile_of_t(n)**2 / n
    a = mean_below**2 - factor * variance(below)
    b = mean_above * mean_below - factor * covariance(above, below)
    c = mean_above**2 - factor * variance(above)
    if a <= 0:
        return None
    root = math.sqrt(max(b * b - a * c, 0))
    return ratio, (b - root) / a, (b + root) / a


def share_text(share):
    """0.83 (0.72 to 0.95): what ratio_of_means returns."""
    if share is None:
        return "-"
    ratio, low, high = share
    return f"{ratio:.2f} ({low:.2f} to {high:.2f})" if math.isfinite(low) else f"{ratio:.2f}"


def pairwise(items, distance):
    """Symmetric (n, n) matrix of distance(a, b), 0 on the diagonal."""
    matrix = torch.zeros(len(items), len(items), dtype=torch.double)
    for i, j in combinations(range(len(items)), 2):
        matrix[i, j] = matrix[j, i] = distance(items[i], items[j])
    return matrix


def jackknife(pairs):
    """One value per seed for the mean over all pairs (n, n) of seeds: jackknife pseudo-values.

    Means over a seed's own pairs depend on each other, as every pair enters two; theta + 2 (n-1)/
    (n-2) (s_i - theta) hardly do (Efron & Stein 1981, "The jackknife estimate of variance").
    """
    n = len(pairs)
    of_seed = (pairs.sum(dim=1) - pairs.diagonal()) / (n - 1)
    theta = of_seed.mean()
    return theta + 2 * (n - 1) / (n - 2) * (of_seed - theta)


def mean_and_spread(values):
    """0.912±0.005 (standard deviation); - for none."""
    values = [value for value in values if value is not None and math.isfinite(value)]
    if not values:
        return "-"
    spread = f"±{stdev(values):.3f}" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{spread}"


# ---- Runs ----------------------------------------------------------------------------------------


class Run:
    """A finished run. name: its setting; key: "<name>/seed<k>", as run.json names other runs."""

    def __init__(self, folder):
        self.folder = folder
        self.name = folder.parts[-2]
        self.key = "/".join(folder.parts[-2:])
        self.record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        self.config = self.record["config"]
        self.metrics = self.record["metrics"]
        self.student = self.config["student"]
        self.seed = self.config["seed"]
        self.tests = OUT_OF_DISTRIBUTION[self.config["task"]]

        outputs = {name: torch.from_numpy(x) for name, x in np.load(folder / "outputs.npz").items()}
        epochs = outputs["probe_epochs"].tolist()
        self.snapshots = dict(zip(epochs, outputs["probe_representations"]))
        self.last_snapshot = self.snapshots[max(epochs)]
        self.predictions = {}  # {test: (probabilities, labels)} of the compared examples
        for test in self.metrics:
            logits = outputs[f"{test}_logits"]
            labels = outputs[f"{test}_labels"]
            generator = torch.Generator().manual_seed(0)
            chosen = torch.randperm(len(labels), generator=generator)[:COMPARED_EXAMPLES]
            self.predictions[test] = (logits[chosen].softmax(dim=1), labels[chosen])

    def role(self):
        """plain, taught (by the stronger kind), self-taught, permuted; else other"""
        kd = self.config["kd"]
        teacher = self.config.get("teacher")
        by_stronger = teacher == STRONGER.get(self.student)
        if not kd:
            return "plain" if self.plain_key() == self.key else "other"
        if kd == "permuted" and by_stronger:
            return "permuted"
        if kd in ("offline", "online") and by_stronger:
            return "taught"
        if kd in ("offline", "online") and teacher == self.student:
            return "self-taught"
        return "other"  # a part of the soft labels, another teacher, another setting

    def plain_key(self):
        """The run of its student and seed without a teacher."""
        return self.record["plain"][self.student]


def load_runs(root):
    """{folder of a task: [Run]}: by student, plain before taught, then by name and seed."""
    groups = {}
    for path in sorted(root.glob("**/seed*/run.json")):
        folder = path.parent
        try:
            run = Run(folder)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            print(f"left out: {folder} is damaged ({error}): delete it", file=sys.stderr)
        except KeyError as error:
            print(f"left out: {folder} is of another version: {error} is unknown or missing",
                  file=sys.stderr)
        else:
            groups.setdefault(path.parents[2], []).append(run)

    for runs in groups.values():
        runs.sort(key=lambda run: (run.student, bool(run.config["kd"]), run.name, run.seed))
    return groups


def runs_by_name(runs):
    """{name: [Run]}"""
    found = {}
    for run in runs:
        found.setdefault(run.name, []).append(run)
    return found


# ---- How alike two runs are ----------------------------------------------------------------------


def over_tests(measure):
    """Mean over the tests out of distribution of measure(p of a, p of b, labels)."""
    def compared(a, b):
        values = []
        for test in a.tests:
            p, _ = a.predictions[test]
            q, labels = b.predictions[test]
            values.append(measure(p, q, labels))
        return fmean(values)
    return compared


def agreement(p, q, labels):
    return (p.argmax(dim=1) == q.argmax(dim=1)).double().mean().item()


def kappa(p, q, labels):
    return common.error_consistency(p.argmax(dim=1), q.argmax(dim=1), labels)


def divergence(p, q, labels):
    return common.js_divergence(p, q)


@functools.cache
def prepared_for_rsa(run, epoch):
    """A snapshot as RSA wants it: a run is compared with many, so that is done once."""
    return common.prepare_rsa(run.snapshots[epoch])


def rsa(a, b, epoch_of_a, epoch_of_b):
    prepared_a = prepared_for_rsa(a, epoch_of_a)
    prepared_b = prepared_for_rsa(b, epoch_of_b)
    return common.rsa_of_prepared(prepared_a, prepared_b)


def path_distance(a, b):
    """Mean of 1 - RSA over the epochs of which both have a snapshot, the first weights included."""
    epochs = [epoch for epoch in a.snapshots if epoch in b.snapshots]
    return fmean(1 - rsa(a, b, epoch, epoch) for epoch in epochs)


COMPARISONS = {
    "agreement": over_tests(agreement),
    "kappa": over_tests(kappa),
    "JS divergence": over_tests(divergence),
    "CKA": lambda a, b: common.linear_cka(a.last_snapshot, b.last_snapshot),
    "RSA": lambda a, b: rsa(a, b, max(a.snapshots), max(b.snapshots)),
    "path distance": path_distance,
}


@functools.cache
def compare_in_order(name, a, b):
    return COMPARISONS[name](a, b)


def compare(name, a, b):
    """The comparison `name` of two runs, which is symmetric: computed once for each pair."""
    if a.key > b.key:
        a, b = b, a
    return compare_in_order(name, a, b)


def references(run, runs):
    """{"own teacher", "other strong", "own kind": [Run]}. The last two leave out its teacher and
    the seeds s and s + 1: so a taught run and its plain twin are compared with the same models,
    which taught neither."""
    teacher = run.record.get("teacher")
    found = {"own teacher": [other for other in runs if other.key == teacher]}

    strong = STRONGER.get(run.student, run.student)
    for whose, model in (("other strong", strong), ("own kind", run.student)):
        key = run.record["plain"].get(model, "")  # none where the run is older than the model
        name = key.split("/")[0]
        found[whose] = [other for other in runs
                        if other.name == name
                        and other.key != teacher
                        and other.seed not in (run.seed, run.seed + 1)]
    return found


# ---- A row of numbers for each run ---------------------------------------------------------------


def make_rows(runs):
    """{key of a run: its row}, what all tables, claims, figures and the CSV file read. A row is
    flat: {"run": "cnn-to-mlp", "role": "taught", "temperature": 20.0, ...the configuration,
    "OOD: accuracy": 0.786, "other strong: kappa": 0.19, ...}. What stands before the colon is the
    table in which the number is printed, what stands behind it the column."""
    rows = {}
    for run in runs:
        row = {"run": run.name, "role": run.role(), **run.config}
        for column, metric in (("accuracy", ACCURACY[run.config["task"]]), ("ece", "ece")):
            values = [run.metrics[test][metric] for test in run.tests]
            row[f"OOD: {column}"] = None if None in values else fmean(values)

        for test, metrics in run.metrics.items():
            for name, value in metrics.items():
                if isinstance(value, dict):  # "accuracy_by_attractors"
                    table = name.replace("_", " ")
                    for attractors, accuracy in value.items():
                        row[f"{table}: {attractors}"] = accuracy
                else:
                    row[f"{test}: {name}"] = value

        for whose, others in references(run, runs).items():
            for name in COMPARISONS:
                values = [compare(name, run, other) for other in others]
                row[f"{whose}: {name}"] = fmean(values) if values else None
        rows[run.key] = row

    add_spreads(rows, runs)
    return rows


def add_spreads(rows, runs):
    """How far the seeds of a name are apart, in predictions (bits) and in representations."""
    spreads = {
        "prediction spread": lambda a, b: compare("JS divergence", a, b),
        "representation spread": lambda a, b: 1 - compare("CKA", a, b),
    }
    for of_name in runs_by_name(runs).values():
        if len(of_name) < 3:  # the jackknife wants three
            continue
        for column, distance in spreads.items():
            values = jackknife(pairwise(of_name, distance)).tolist()
            for run, value in zip(of_name, values):
                rows[run.key][f"solutions: {column}"] = value


def table_of(column):
    return column.split(": ")[0]


def heading_of(column):
    return column.split(": ")[1]


# ---- Basins of attraction ------------------------------------------------------------------------


def barrier(model, state_a, state_b, measure):
    """How far the loss measure(model) rises, on the straight way between two states, above the line
    between its ends: Entezari et al. 2022 (arXiv 2110.06296), eq. 1."""
    points = torch.linspace(0, 1, BARRIER_POINTS).tolist()
    losses = []
    for point in points:
        state = {}
        for name, value in state_a.items():
            is_weight = value.is_floating_point()  # else a counter of batches
            state[name] = torch.lerp(value, state_b[name], point) if is_weight else value
        model.load_state_dict(state)
        losses.append(measure(model))

    lines = [(1 - point) * losses[0] + point * losses[-1] for point in points]
    return max(loss - line for loss, line in zip(losses, lines))


def prepare(config, data_dir):
    """(name -> new model, model -> its training loss on a few examples) for runs like `config`."""
    script = SCRIPTS[config["task"]]
    args = argparse.Namespace(**config)
    args.data_dir = data_dir
    args.device = torch.device("cpu")
    args.amp = False
    if args.data != "synthetic":
        args.data = "auto"  # nothing large is fetched
    data = script.load_data(args)
    if args.data != config["data"] or getattr(args, "files", None) != config.get("files"):
        sys.exit(f"error: {data_dir} has other data: use --data-dir or --no-barriers")

    def build(name):
        return script.build_model(name, 0, args)

    def measure(model):
        return script.training_loss(model, data, args, BARRIER_EXAMPLES)

    return build, measure


def add_barriers(rows, runs, data_dir):
    """Of a taught run from its plain twin, of a run without a teacher from the next seed."""
    by_key = {run.key: run for run in runs}
    prepared = {}  # {examples: (build, measure)}
    for run in runs:
        if run.config["kd"]:
            other = by_key.get(run.plain_key())
        else:
            other = by_key.get(f"{run.name}/seed{run.seed + 1}")
        if other is None:
            continue
        examples = run.config["examples"]
        if examples not in prepared:
            prepared[examples] = prepare(run.config, data_dir)
        build, measure = prepared[examples]

        ends = []
        for one in (other, run):
            model = common.load_weights(build(run.student), one.folder)
            ends.append(model.state_dict())
        rows[run.key]["solutions: barrier"] = barrier(build(run.student), *ends, measure)


# ---- Claims --------------------------------------------------------------------------------------


def family(run):
    """{role: key} of the runs that a claim about `run` compares: one seed, one setting. Nothing for
    a student without a stronger kind, or a run whose role no claim is about."""
    if run.student not in STRONGER or run.role() == "other":
        return {}
    plain = run.record["plain"]
    return {
        "plain": plain[run.student],
        "strong": plain.get(STRONGER[run.student]),
        "self-taught": run.record.get("self_taught"),
        "permuted": run.record.get("permuted"),
        run.role(): run.key,
    }


def difference(rows, one, other, column):
    """Of two runs; None where one of them, or its number, is missing."""
    a = rows.get(one, {}).get(column)
    b = rows.get(other, {}).get(column)
    if a is None or b is None or not math.isfinite(a - b):
        return None
    return a - b


def test_claims(runs, rows):
    """A dictionary for each claim and pair of names: the differences by seed, and the verdict."""
    results = []
    for claim, column, sign, one, against in CLAIMS:
        found = {}  # {(name of the one, of the other): {seed: difference}}
        for run in runs:
            keys = family(run)
            value = difference(rows, keys.get(one), keys.get(against), column)
            if value is not None:
                names = (keys[one].split("/")[0], keys[against].split("/")[0])
                found.setdefault(names, {})[run.seed] = value

        for (name, other), by_seed in found.items():
            values = list(by_seed.values())
            _, _, verdict = t_test(values, sign)
            results.append({"claim": claim, "one": name, "against": other, "values": by_seed,
                            "difference": difference_text(values), "verdict": verdict})
    return results


def against_alone(runs, rows):
    """{name: {column: {seed: difference}}} of each kind with a teacher, or with another setting,
    from the plain run of its student and seed. "gap": by how much the stronger kind is ahead."""
    found = {}
    for run in runs:
        alone = run.plain_key()
        if run.key == alone:
            continue
        values = {column: difference(rows, run.key, alone, column) for column in AGAINST_ALONE}
        strong = run.record["plain"].get(STRONGER.get(run.student))
        values["gap"] = difference(rows, strong, alone, "OOD: accuracy")

        of_name = found.setdefault(run.name, {column: {} for column in values})
        for column, value in values.items():
            if value is not None:
                of_name[column][run.seed] = value
    return found


def share_of_gap(gains, gaps):
    """(taught - plain) / (strong - plain) as ratio_of_means has it; both {seed: difference}. None
    where a gap is missing, or the strong kind is not surely ahead."""
    if not gains or not gains.keys() <= gaps.keys():
        return None
    return ratio_of_means(list(gains.values()), [gaps[seed] for seed in gains])


# ---- What is printed -----------------------------------------------------------------------------


def print_table(caption, headings, lines):
    """A Markdown table without empty columns."""
    if not lines:
        return
    columns = []
    for heading, *cells in zip(headings, *lines):
        if set(cells) != {"-"}:
            columns.append([heading, *cells])
    widths = [max(len(cell) for cell in column) for column in columns]
    table = list(zip(*columns))
    table.insert(1, ["-" * width for width in widths])

    print(f"\n**{caption}**\n")
    for line in table:
        cells = [cell.ljust(width) for cell, width in zip(line, widths)]
        print(f"| {' | '.join(cells)} |")


def print_answer(claims):
    """For each taught student: the share of the gap that is closed, and the headline claims."""
    gains = [claim for claim in claims if claim["claim"] == HEADLINES[0][0]]
    gaps = [claim for claim in claims if claim["claim"] == GAP[0]]
    headlines = [claim for claim, *_ in HEADLINES]
    for gain in gains:
        print(f"\n{gain['one']}, {len(gain['values'])} seeds:")
        for gap in gaps:
            if gap["against"] != gain["against"]:
                continue
            share = share_of_gap(gain["values"], gap["values"])
            if share:
                print(f"- {share_text(share)} of the gap between {gap['against']} and "
                      f"{gap['one']} is closed")
        for claim in claims:
            if claim["one"] == gain["one"] and claim["claim"] in headlines:
                print(f"- {claim['claim']}: {claim['difference']}, {claim['verdict']}")


class Sweep(NamedTuple):
    run: Run  # one of those that are alike but for the flag
    accuracies: dict  # {value of the flag: [OOD accuracy of each seed]}


def sweeps(runs, rows):
    """{flag: {(name without the flag, role): Sweep}} of the flags that vary."""
    found = {}
    for flag in ("examples", "temperature", "alpha"):
        curves = {}
        for run in runs:
            accuracy = rows[run.key]["OOD: accuracy"]
            if flag in run.config and accuracy is not None:
                value = run.config[flag]
                name = run.name.replace(common.flag_in_name(flag, value), "")
                sweep = curves.setdefault((name, run.role()), Sweep(run, {}))
                sweep.accuracies.setdefault(value, []).append(accuracy)
        curves = {key: sweep for key, sweep in curves.items() if len(sweep.accuracies) > 1}
        if curves:
            found[flag] = curves
    return found


def print_runs(runs, rows):
    """A table for each group of columns, a line for each name."""
    tables = {}  # {table: {column: True}}: a dictionary keeps the order
    for row in rows.values():
        for column in row:
            if ": " in column:
                tables.setdefault(table_of(column), {})[column] = True

    for table, columns in tables.items():
        lines = []
        for name, of_name in runs_by_name(runs).items():
            cells = [mean_and_spread([rows[run.key].get(column) for run in of_name])
                     for column in columns]
            lines.append([name, *cells, str(len(of_name))])
        headings = [heading_of(column) for column in columns]
        print_table(table, ["run", *headings, "n"], lines)


def print_sweeps(runs, rows):
    for flag, curves in sweeps(runs, rows).items():
        values = sorted({value for sweep in curves.values() for value in sweep.accuracies})
        lines = []
        for (name, _), sweep in curves.items():
            cells = [mean_and_spread(sweep.accuracies.get(value, [])) for value in values]
            lines.append([name, *cells])
        headings = [str(value) for value in values]
        print_table(f"OOD accuracy over {flag}", ["run", *headings], lines)


def print_against_alone(runs, rows):
    lines = []
    for name, columns in against_alone(runs, rows).items():
        cells = []
        for column in AGAINST_ALONE:
            values = list(columns[column].values())
            cells.append(difference_text(values) if values else "-")
        share = share_of_gap(columns["OOD: accuracy"], columns["gap"])
        n = len(columns["OOD: accuracy"])
        if n:
            lines.append([name, *cells, share_text(share), str(n)])
    print_table("Against alone: differences from the plain run of the same student and seed, share "
                "of the gap to the stronger kind, with 95 % intervals",
                ["run", *AGAINST_ALONE, "share of the gap", "seeds"], lines)


def print_claims(claims):
    tested = [claim for claim in claims if claim["verdict"] != "untested"]
    lines = []
    for claim in tested:
        seeds = str(len(claim["values"]))
        lines.append([claim["claim"], claim["one"], claim["against"], claim["difference"], seeds,
                      claim["verdict"]])
    by_chance = len(tested) / 20
    print_table("Claims: differences paired by seed with 95 % t-intervals; by chance about "
                f"{by_chance:.1f} are not inconclusive",
                ["claim", "run", "against", "difference", "seeds", "verdict"], lines)
    print(f"\n{len(claims) - len(tested)} untested: fewer than 3 seeds")


def print_group(title, runs, rows, claims):
    """The answer, then all tables about one task."""
    print(f"\n## {title}: mean ± standard deviation over n seeds")
    print_answer(claims)
    print_runs(runs, rows)
    print_sweeps(runs, rows)
    print_against_alone(runs, rows)
    print_claims(claims)

    for name, of_name in runs_by_name(runs).items():
        for field in ("code", "device", "precision"):
            values = sorted({run.record["environment"][field] for run in of_name})
            if len(values) > 1:
                print(f"note: the runs of {name} differ in {field}: {', '.join(values)}")


# ---- Figures -------------------------------------------------------------------------------------

# Colours of Okabe & Ito (2008), which colour-blind readers tell apart; markers differ in grey too.
STYLES = {
    "plain": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "self-taught": {"color": "#56B4E9", "marker": "s", "linestyle": "--"},
    "permuted": {"color": "#CC79A7", "marker": "x", "linestyle": ":"},
    "taught": {"color": "#D55E00", "marker": "^", "linestyle": "-"},
    "strong": {"color": "#000000", "marker": "D", "linestyle": "--"},
    "other": {"color": "#009E73", "marker": "v", "linestyle": "-."},
}


class Curve(NamedTuple):
    """What a figure draws: a line in the style of its role."""
    label: str
    role: str
    x: list
    y: list
    deviation: list = None  # of y


def label(run, role):
    """How a figure names a run: by what taught it."""
    teacher = run.config.get("teacher")
    return {
        "plain": "alone",
        "self-taught": "taught by its own kind",
        "permuted": f"taught by {teacher}, permuted",
        "taught": f"taught by {teacher}",
        "strong": f"{run.student} itself",
    }.get(role, run.name)


def draw(path, panels, xlabel, ylabel, decorate):
    """A figure of panels side by side, {title: [Curve]}, with one y axis and one legend.
    decorate(axis, curves): what is special about this figure."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(max(3 * len(panels), 5), 3.6),
                                sharey=True, squeeze=False, layout="constrained")
    lines = {}  # {label: line}: equal ones stand in the legend once
    for axis, (title, curves) in zip(axes[0], panels.items()):
        axis.set(title=title, xlabel=xlabel)
        for curve in curves:
            lines[curve.label] = axis.errorbar(curve.x, curve.y, curve.deviation, markersize=4,
                                               capsize=2, **STYLES[curve.role])
    for axis, curves in zip(axes[0], panels.values()):  # now the y axis spans all panels
        decorate(axis, curves)
    axes[0, 0].set_ylabel(ylabel)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def decorate_paths(axis, curves):
    """Distances are what a path shows, so both axes have one scale. A ring: the first weights."""
    left, right = axis.get_xlim()
    bottom, top = axis.get_ylim()
    half = max(top - bottom, right - left) / 2  # at least a square: else paths would lie flat
    middle = (top + bottom) / 2
    axis.set_ylim(min(bottom, middle - half), max(top, middle + half))
    axis.set_aspect("equal")
    for curve in curves:
        color = STYLES[curve.role]["color"]
        axis.plot(curve.x[0], curve.y[0], marker="o", markersize=9, color=color, fillstyle="none")
        axis.plot(curve.x[-1], curve.y[-1], marker="*", markersize=11, color=color)


def decorate_reliability(axis, curves):
    axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8)  # where confidence is accuracy


def decorate_attractors(axis, curves):
    axis.set(ylim=(0, 1))
    axis.set_xticks(range(5), ["0", "1", "2", "3", "4+"])
    axis.axhline(0.5, color="grey", linewidth=0.8)
    axis.annotate("chance", (0, 0.5), color="grey", fontsize=8, va="top")


def decorate_sweep(axis, curves):
    """The values of the flag are the ticks, on a logarithmic scale where they span much."""
    values = sorted({x for curve in curves for x in curve.x})
    if values[0] > 0 and values[-1] > 10 * values[0]:
        axis.set_xscale("log")
    axis.set_xticks(values, [f"{value:g}" for value in values])
    axis.minorticks_off()


def runs_by_role(plain_name, runs):
    """{role: [Run]}: the plain runs of that name, those taught with them as twins, the stronger
    kind. Of several settings of one role the one with the shortest name."""
    by_name = runs_by_name(runs)
    first = by_name[plain_name][0]
    strong = first.record["plain"].get(STRONGER[first.student], "")
    found = {}
    for name in sorted(by_name, key=lambda name: (len(name), name)):
        run = by_name[name][0]
        plain = run.record["plain"][run.student].split("/")[0]
        is_of_plain = name == plain_name or (run.config["kd"] and plain == plain_name)
        if is_of_plain and run.role() != "other":
            found.setdefault(run.role(), by_name[name])
        if name == strong.split("/")[0]:
            found["strong"] = by_name[name]
    return found


def reliability(runs):
    """(confidences, accuracies) out of distribution, of the bins with enough examples."""
    predictions = [run.predictions[test] for run in runs for test in run.tests]
    probabilities = torch.cat([p for p, _ in predictions])
    labels = torch.cat([y for _, y in predictions])
    confidence, predicted = probabilities.max(dim=1)
    correct = (predicted == labels).float()

    bins = (confidence * CALIBRATION_BINS).ceil()
    confidences = []
    accuracies = []
    for number in range(1, CALIBRATION_BINS + 1):
        inside = bins == number
        if inside.sum() >= LEAST_IN_BIN:
            confidences.append(confidence[inside].mean().item())
            accuracies.append(correct[inside].mean().item())
    return confidences, accuracies


def classical_mds(distances):
    """Points (n, 2) whose distances come closest to `distances` (n, n). Torgerson 1952."""
    n = len(distances)
    centre = torch.eye(n, dtype=torch.double) - 1 / n
    values, vectors = torch.linalg.eigh(-0.5 * centre @ distances.double().square() @ centre)
    largest = vectors[:, -2:] * values[-2:].clamp(min=0).sqrt()
    return largest.flip(1)


def paths_in_two_dimensions(runs):
    """[(epochs, 2)]: training paths by MDS of 1 - RSA between all their snapshots."""
    snapshots = [prepared_for_rsa(run, epoch) for run in runs for epoch in run.snapshots]
    distances = pairwise(snapshots, lambda a, b: 1 - common.rsa_of_prepared(a, b))
    return classical_mds(distances).split([len(run.snapshots) for run in runs])


def path_curves(by_role):
    """Two seeds of each role."""
    chosen = [(role, run) for role, of_role in by_role.items() for run in of_role[:2]]
    paths = paths_in_two_dimensions([run for _, run in chosen])
    curves = []
    for (role, run), path in zip(chosen, paths):
        x, y = path.T.tolist()
        curves.append(Curve(label(run, role), role, x, y))
    return curves


def reliability_curves(by_role):
    return [Curve(label(of_role[0], role), role, *reliability(of_role))
            for role, of_role in by_role.items()]


def attractor_curves(by_role, rows):
    """Accuracy at 0, 1, 2, 3, 4+ attractors: mean and standard deviation over the seeds."""
    curves = []
    for role, of_role in by_role.items():
        means = []
        deviations = []
        for attractors in range(5):
            column = f"accuracy by attractors: {attractors}"
            values = [rows[run.key].get(column, math.nan) for run in of_role]
            means.append(np.mean(values).item())  # NaN, no point, where no sentence has so many
            deviations.append(np.std(values).item())
        curves.append(Curve(label(of_role[0], role), role, list(range(5)), means, deviations))
    return curves


def sweep_panels(curves):
    """{student: [Curve]} of one flag of sweeps(): mean and standard deviation over the seeds, with
    the stronger kind where it varies too."""
    panels = {}
    for student, strong in STRONGER.items():
        chosen = []
        for sweep in curves.values():
            role = sweep.run.role()
            if sweep.run.student == strong and role == "plain":
                role = "strong"
            elif sweep.run.student != student:
                continue
            values = sorted(sweep.accuracies)
            means = [fmean(sweep.accuracies[value]) for value in values]
            deviations = [pstdev(sweep.accuracies[value]) for value in values]
            chosen.append(Curve(label(sweep.run, role), role, values, means, deviations))
        if any(curve.role != "strong" for curve in chosen):
            panels[student] = chosen
    return panels


def plot_group(prefix, runs, rows):
    """The figures of one task: a panel for each plain name that has a stronger kind."""
    paths = {}
    reliabilities = {}
    attractors = {}
    for run in runs:
        if run.role() == "plain" and run.student in STRONGER and run.name not in paths:
            by_role = runs_by_role(run.name, runs)
            paths[run.name] = path_curves(by_role)
            reliabilities[run.name] = reliability_curves(by_role)
            if run.config["task"] == "sva":
                attractors[run.name] = attractor_curves(by_role, rows)

    if paths:
        draw(f"{prefix}-paths.png", paths, "1 - RSA, first dimension", "second dimension",
             decorate_paths)
        draw(f"{prefix}-reliability.png", reliabilities, "confidence", "accuracy",
             decorate_reliability)
    if attractors:
        draw(f"{prefix}-attractors.png", attractors, "attractors", "accuracy", decorate_attractors)
    for flag, curves in sweeps(runs, rows).items():
        panels = sweep_panels(curves)
        if panels:
            draw(f"{prefix}-{flag}.png", panels, flag, "OOD accuracy", decorate_sweep)


# ---- Flags ---------------------------------------------------------------------------------------


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="%(prog)s RUNS [flags], see --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", type=Path, help="folder: every run below it is taken")
    add("--csv", type=Path, metavar="FILE", help="write one line a run, with all columns")
    add("--plots", type=Path, metavar="DIR", help="write figures there (needs matplotlib)")
    add("--no-barriers", action="store_true", help="they take the longest, and need the data")
    add("--data-dir", type=Path, default="data", help="where the data are")
    args = parser.parse_args(argv)
    if args.plots and not importlib.util.find_spec("matplotlib"):
        parser.error("--plots needs matplotlib: pip install matplotlib")
    return args


def write_csv(path, rows):
    columns = dict.fromkeys(column for row in rows for column in row)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def main(argv=None):
    args = parse_arguments(argv)
    sys.stdout.reconfigure(encoding="utf-8")  # ± is printed where the locale knows ASCII alone
    if args.plots:
        args.plots.mkdir(parents=True, exist_ok=True)

    all_rows = []
    for folder, runs in load_runs(args.runs).items():
        below = folder.parts[len(args.runs.parts):]
        title = "/".join(below) if below else folder.name
        rows = make_rows(runs)
        if not args.no_barriers:
            add_barriers(rows, runs, args.data_dir)
        print_group(title, runs, rows, test_claims(runs, rows))
        if args.plots:
            plot_group(args.plots / title.replace("/", "-"), runs, rows)
        all_rows += [{"group": title, **row} for row in rows.values()]

    if not all_rows:
        sys.exit(f"error: no finished run in {args.runs}: try ./run_all.sh --quick")
    if args.csv:
        write_csv(args.csv, all_rows)


if __name__ == "__main__":
    main()
