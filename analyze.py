"""Compare finished runs: the answer first, then tables in Markdown, every number as CSV, figures.

    python analyze.py runs
    python analyze.py runs --csv runs.csv --plots figures

Every run is a row of numbers, which all that is shown reads. Each setting is a kind of run.
"""

import argparse
import csv
import functools
import importlib.util
import json
import math
import re
import sys
from itertools import combinations, groupby, product
from pathlib import Path
from statistics import fmean, pstdev, stdev

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import update_bn

import common
import train_mnist
import train_sva

# Whose inductive bias suits the task better than the model's own.
STRONGER = {"mlp": "cnn", "transformer": "lstm", "transformer-seq": "lstm", "ut-seq": "lstm"}
OUT_OF_DISTRIBUTION = {"mnist": ("scaled", "translated"), "sva": ("test",)}
ACCURACY = {"mnist": "accuracy", "sva": "a_accuracy"}  # that asks for the bias
COMPARED_EXAMPLES, BARRIER_POINTS, BARRIER_EXAMPLES = 10_000, 21, 250
MARGIN = 0.05  # a smaller difference is little
# 97.5 % quantiles of Student's t, by the number of values.
T = dict(zip(range(3, 13), (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)))

# (claim, column, sign, one kind of run, against another). Sign 1: more is better; -1: less; 0:
# it is little.
CLAIMS = [
    ("the stronger bias generalises better", "OOD: accuracy", 1, "strong", "plain"),
    ("teaching improves accuracy", "OOD: accuracy", 1, "taught", "plain"),
    ("... more than self-distillation", "OOD: accuracy", 1, "taught", "self-taught"),
    ("... more than permuted soft labels", "OOD: accuracy", 1, "taught", "permuted"),
    ("teaching improves calibration", "OOD: ece", -1, "taught", "plain"),
    ("errors come nearer to other strong models", "other strong: kappa", 1, "taught", "plain"),
    ("representations come nearer (CKA)", "other strong: CKA", 1, "taught", "plain"),
    ("representations come nearer (RSA)", "other strong: RSA", 1, "taught", "plain"),
    ("training paths come nearer", "other strong: path distance", -1, "taught", "plain"),
    ("teaching moves the basin", "solutions: barrier", 1, "taught", "self-taught"),
    ("self-distillation changes little (CKA)", "own kind: CKA", 0, "self-taught", "plain"),
    ("stronger bias, less variance", "solutions: prediction spread", -1, "strong", "plain"),
    ("... of representations", "solutions: representation spread", -1, "strong", "plain"),
]
HEADLINES = [claim for claim, *_ in CLAIMS[1:6]]  # the answer


def t_test(values, sign):
    """(mean, half of its 95 % t-interval, verdict). supported: the interval, turned by the sign, is
    above 0; contradicted: below. Sign 0: it lies inside +-MARGIN; outside."""
    n, mean = len(values), fmean(values)
    if n < 3:
        return mean, math.inf, "untested"
    half = T[min(n, 12)] * stdev(values) / math.sqrt(n)
    distance = sign * mean if sign else MARGIN - abs(mean)
    if abs(distance) <= half:
        return mean, half, "inconclusive"
    return mean, half, "supported" if distance > 0 else "contradicted"


def jackknife(pairs):
    """One value per seed for the mean over all pairs (n, n) of seeds: jackknife pseudo-values.

    Means over a seed's own pairs depend on each other, as every pair enters two; theta + 2 (n-1)/
    (n-2) (s_i - theta) hardly do (Efron & Stein 1981, "The jackknife estimate of variance").
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


# ---- Runs, and how alike two of them are ---------------------------------------------------------


class Run:
    """A finished run. kind: its name; key: "<kind>/seed<k>", as run.json names other runs."""

    def __init__(self, folder):
        self.folder, self.kind, self.key = folder, folder.parts[-2], "/".join(folder.parts[-2:])
        self.record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        self.config, self.metrics = self.record["config"], self.record["metrics"]
        self.student, self.seed = self.config["student"], self.config["seed"]
        self.place = self.student, bool(self.config["kd"]), self.kind, self.seed
        self.tests = OUT_OF_DISTRIBUTION[self.config["task"]]
        outputs = {name: torch.from_numpy(x) for name, x in np.load(folder / "outputs.npz").items()}
        self.path = dict(zip(outputs["probe_epochs"].tolist(), outputs["probe_representations"]))
        self.answers = {}  # {test: (probabilities, labels)} of the compared examples
        for test in self.metrics:
            logits, labels = outputs[f"{test}_logits"], outputs[f"{test}_labels"]
            generator = torch.Generator().manual_seed(0)
            chosen = torch.randperm(len(labels), generator=generator)[:COMPARED_EXAMPLES]
            self.answers[test] = logits[chosen].softmax(dim=1), labels[chosen]

    def role(self):
        """plain, taught (by the stronger kind), self-taught, permuted; else other"""
        kd, teacher = self.config["kd"], self.config.get("teacher")
        if not kd:
            return "plain" if self.record["plain"][self.student] == self.key else "other"
        if teacher == STRONGER.get(self.student):
            return "permuted" if kd == "permuted" else "taught"
        return "self-taught" if teacher == self.student and kd != "permuted" else "other"

    def relative(self, role):
        """The key of the run that a claim compares this one with, if there is one."""
        if role == "strong":
            return self.record["plain"].get(STRONGER.get(self.student))
        return self.record.get({"plain": "untaught", "self-taught": "self_taught"}.get(role, role))


def load_runs(root):
    """{folder of a task: [Run]}, sorted."""
    groups = {}
    for path in sorted(root.glob("**/seed*/run.json")):
        try:
            groups.setdefault(path.parents[2], []).append(Run(path.parent))
        except Exception as error:
            print(f"left out: {path.parent} is unreadable ({error}): delete it", file=sys.stderr)
    return {folder: sorted(runs, key=lambda run: run.place) for folder, runs in groups.items()}


def kinds_of(runs):
    """{name: [Run]}"""
    return {kind: list(of_kind) for kind, of_kind in groupby(runs, lambda run: run.kind)}


def over_tests(measure):
    """Mean over the tests out of distribution of measure(p of a, p of b, labels)."""
    return lambda a, b: fmean(measure(a.answers[test][0], *b.answers[test]) for test in a.tests)


COMPARISONS = {
    "agreement": over_tests(lambda p, q, y: (p.argmax(1) == q.argmax(1)).double().mean().item()),
    "kappa": over_tests(lambda p, q, y: common.error_consistency(p.argmax(1), q.argmax(1), y)),
    "JS divergence": over_tests(lambda p, q, y: common.js_divergence(p, q)),
    "CKA": lambda a, b: common.linear_cka(a.path[max(a.path)], b.path[max(b.path)]),
    "RSA": lambda a, b: common.rsa(a.path[max(a.path)], b.path[max(b.path)]),
    "path distance": lambda a, b: fmean(
        1 - common.rsa(a.path[epoch], b.path[epoch]) for epoch in a.path if epoch in b.path)}


@functools.cache
def compare(name, a, b):
    return COMPARISONS[name](a, b)


def references(run, runs):
    """{"own teacher", "other strong", "own kind": [Run]}. The last two leave out its teacher and
    the seeds s and s + 1: so a taught run and its untaught twin are compared with the same models,
    which taught neither."""
    teacher, strong = run.record.get("teacher"), STRONGER.get(run.student, run.student)
    found = {"own teacher": [other for other in runs if other.key == teacher]}
    for whose, model in (("other strong", strong), ("own kind", run.student)):
        kind = run.record["plain"][model].split("/")[0]
        found[whose] = [other for other in runs if other.kind == kind and other.key != teacher
                        and other.seed not in (run.seed, run.seed + 1)]
    return found


def make_rows(runs):
    """{key: {"table: column": value}}"""
    rows = {}
    for run in runs:
        rows[run.key] = row = {"run": run.kind, "role": run.role(), **run.config}
        for name, metric in (("accuracy", ACCURACY[run.config["task"]]), ("ece", "ece")):
            values = [run.metrics[test][metric] for test in run.tests]
            row[f"OOD: {name}"] = None if None in values else fmean(values)
        for test, metrics in run.metrics.items():
            attractors = metrics.get("accuracy_by_attractors", {})
            row |= {f"{test}: {name}": x for name, x in metrics.items() if x is not attractors}
            row |= {f"accuracy by attractors: {k}": x for k, x in attractors.items()}
        for whose, others in references(run, runs).items():
            for name in COMPARISONS:
                values = [compare(name, *sorted((run, other), key=lambda each: each.key))
                          for other in others]
                row[f"{whose}: {name}"] = fmean(values) if values else None
    for of_kind in kinds_of(runs).values():  # how far the seeds of a kind are apart
        n = len(of_kind) if len(of_kind) > 2 else 0
        for column, name, alike in (("prediction spread", "JS divergence", 0),
                                    ("representation spread", "CKA", 1)):
            pairs = torch.zeros(n, n, dtype=torch.double)
            for i, j in combinations(range(n), 2):
                pairs[i, j] = pairs[j, i] = abs(alike - compare(name, of_kind[i], of_kind[j]))
            for run, value in zip(of_kind, jackknife(pairs).tolist()):
                rows[run.key][f"solutions: {column}"] = value
    return rows


def barrier(model, state_a, state_b, measure):
    """How far the loss measure(model) rises, on the straight way between two states, above the line
    between its ends: Entezari et al. 2022 (arXiv 2110.06296), eq. 1."""
    losses, ways = [], torch.linspace(0, 1, BARRIER_POINTS).tolist()
    for a in ways:
        model.load_state_dict({
            name: torch.lerp(value, state_b[name], a) if value.is_floating_point() else value
            for name, value in state_a.items()})
        losses.append(measure(model))
    return max(loss - ((1 - a) * losses[0] + a * losses[-1]) for a, loss in zip(ways, losses))


def prepare(config, data_dir):
    """(name -> new model, model -> training loss on a few examples) for runs on these data."""
    cpu = torch.device("cpu")
    args = argparse.Namespace(**config | {"data_dir": data_dir, "device": cpu})
    if args.data != "synthetic":
        args.data = "auto"  # nothing large is fetched
    if args.task == "mnist":
        images, labels = (x[:BARRIER_EXAMPLES] for x in train_mnist.load_data(args)["train"])
        build = functools.partial(train_mnist.build_model, seed=0, device=cpu)

        def measure(model):  # old batch-norm statistics would make barriers
            update_bn([train_mnist.to_input(images)], model)
            return F.cross_entropy(train_mnist.evaluate(model, images, False)[0], labels).item()
    else:
        split = train_sva.take(train_sva.load_data(args)["train"], slice(BARRIER_EXAMPLES))
        build = functools.partial(train_sva.build_model, seed=0, tokens=args.tokens,
                                  objective=args.objective, device=cpu)

        def measure(model):
            return train_sva.evaluate(model, split, args.objective, False, cpu)[1]
    if any(vars(args).get(name) != config.get(name) for name in ("data", "files")):
        sys.exit(f"error: {data_dir} has other data: use --data-dir or --no-barriers")
    return build, measure


def add_barriers(rows, runs, data_dir):
    """Of a taught run from its untaught twin, of a plain run from the next seed."""
    by_key, prepared = {run.key: run for run in runs}, {}
    for run in runs:
        other = by_key.get(run.record.get("untaught", f"{run.kind}/seed{run.seed + 1}"))
        if other:
            examples = run.config["examples"]
            prepared[examples] = prepared.get(examples) or prepare(run.config, data_dir)
            build, measure = prepared[examples]
            ends = [common.load_weights(build(run.student), one.folder).state_dict()
                    for one in (other, run)]
            rows[run.key]["solutions: barrier"] = barrier(build(run.student), *ends, measure)


def test_claims(runs, rows):
    """A dictionary for each claim and pair of kinds."""
    results = []
    for name, column, sign, one, against in CLAIMS:
        found = {}
        for run in runs:
            pair = run.key, run.relative(against)
            if one == "strong" and run.role() == "plain":
                pair = run.relative("strong"), run.key
            elif run.role() != one or run.student not in STRONGER:
                continue
            values = [rows.get(key, {}).get(column) for key in pair]
            if None not in values and math.isfinite(values[0] - values[1]):
                kinds = tuple(key.split("/")[0] for key in pair)
                found.setdefault(kinds, {})[run.seed] = values[0] - values[1]
        for (kind, other), values in found.items():
            mean, half, verdict = t_test(list(values.values()), sign)
            text = "" if verdict == "untested" else f" ({mean - half:+.3f} to {mean + half:+.3f})"
            results.append({"claim": name, "one": kind, "against": other, "values": values,
                            "mean": mean, "difference": f"{mean:+.3f}{text}", "verdict": verdict})
    return results


def mean_and_spread(values):
    """0.912±0.005 (standard deviation); - for none."""
    values = [value for value in values if value is not None and math.isfinite(value)]
    if not values:
        return "-"
    spread = f"±{stdev(values):.3f}" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{spread}"


def print_table(caption, header, lines):
    """A Markdown table without empty columns."""
    if not lines:
        return
    columns = [column for column in zip(header, *lines) if {*column[1:]} - {"-"}]
    widths = [max(map(len, column)) for column in columns]
    table = list(zip(*columns))
    table.insert(1, ["-" * width for width in widths])
    print(f"\n**{caption}**\n")
    for line in table:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |")


def print_answer(claims):
    """(taught - plain) / (strong - plain), unless that gap is in doubt, and the headline claims."""
    for gain in [claim for claim in claims if claim["claim"] == HEADLINES[0]]:
        print(f"\n{gain['one']}, {len(gain['values'])} seeds:")
        for claim in claims:
            if (claim["claim"], claim["against"]) == (CLAIMS[0][0], gain["against"]):
                gap = fmean(claim["values"].get(seed, math.nan) for seed in gain["values"])
                if gap > 0 and claim["verdict"] in ("supported", "untested"):
                    print(f"- {gain['mean'] / gap:.2f} of the gap between "
                          f"{gain['against']} and {claim['one']} ({gap:+.3f}) is closed")
            if claim["one"] == gain["one"] and claim["claim"] in HEADLINES:
                print(f"- {claim['claim']}: {claim['difference']}, {claim['verdict']}")


def sweeps(runs, rows):
    """{flag: {run name without it: (role, {value: [OOD accuracy]})}} of the flags that vary."""
    found = {}
    for flag, run in product(("examples", "temperature", "alpha"), runs):
        accuracy = rows[run.key]["OOD: accuracy"]
        if flag in run.config and accuracy is not None:
            name = re.sub(f"-{flag}[^-]+", "", run.kind)
            curve = found.setdefault(flag, {}).setdefault(name, (run.role(), {}))[1]
            curve.setdefault(run.config[flag], []).append(accuracy)
    found = {flag: {name: curve for name, curve in curves.items() if len(curve[1]) > 1}
             for flag, curves in found.items()}
    return {flag: curves for flag, curves in found.items() if curves}


def print_group(title, runs, rows, claims):
    """The answer, then all tables about one task."""
    print(f"\n## {title}: mean ± standard deviation over n seeds")
    print_answer(claims)
    kinds, tables = kinds_of(runs), {}
    for column in dict.fromkeys(name for row in rows.values() for name in row if ": " in name):
        tables.setdefault(column.split(": ")[0], []).append(column)
    for table, columns in tables.items():
        print_table(table, ["run", *(column.split(": ")[1] for column in columns), "n"], [
            [kind, *(mean_and_spread([rows[run.key].get(column) for run in of_kind])
                     for column in columns), str(len(of_kind))] for kind, of_kind in kinds.items()])
    for flag, curves in sweeps(runs, rows).items():
        values = sorted({value for _, curve in curves.values() for value in curve})
        print_table(f"OOD accuracy over {flag}", ["run", *map(str, values)], [
            [name, *(mean_and_spread(curve.get(value, [])) for value in values)]
            for name, (_, curve) in curves.items()])
    tested = [claim for claim in claims if claim["verdict"] != "untested"]
    print_table("Claims: differences paired by seed with 95 % t-intervals; by chance about "
                f"{len(tested) / 20:.1f} are not inconclusive",
                ["claim", "run", "against", "difference", "seeds", "verdict"],
                [[claim["claim"], claim["one"], claim["against"], claim["difference"],
                  str(len(claim["values"])), claim["verdict"]] for claim in tested])
    print(f"\n{len(claims) - len(tested)} untested: fewer than 3 seeds")
    for kind, field in product(kinds, ("code", "device", "precision")):
        values = sorted({run.record["environment"][field] for run in kinds[kind]})
        if len(values) > 1:
            print(f"note: the runs of {kind} differ in {field}: {', '.join(values)}")


# ---- Figures -------------------------------------------------------------------------------------

STYLES = {"plain": "b-o", "self-taught": "c--s", "permuted": "y--x", "taught": "r-.^",
          "strong": "k:D", "other": "g:v"}  # differ in grey too


def draw(path, panels, xlabel, ylabel, **limits):
    """A figure of panels side by side, {title: [(name, role, x, y, deviation or None)]}."""
    import matplotlib.pyplot as plt

    size = (5.5 * len(panels), 3.2)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, (title, curves) in zip(axes[0], panels.items()):
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel, **limits)
        for name, role, x, y, deviation in curves:
            axis.errorbar(x, y, deviation, fmt=STYLES[role], label=name, markersize=3, capsize=2)
        axis.legend(fontsize=7, bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def roles_of(plain, runs):
    """{role: [Run]}: the kind `plain`, those taught from it, the stronger kind."""
    kinds, found = kinds_of(runs), {}
    for kind, of_kind in kinds.items():
        if of_kind[0].record.get("untaught", kind).split("/")[0] == plain:
            found.setdefault(of_kind[0].role(), of_kind)  # of settings the shortest name
        if kind == kinds[plain][0].relative("strong").split("/")[0]:
            found["strong"] = of_kind
    return found


def reliability(runs):
    """Confidence and accuracy out of distribution in bins of 20 and more."""
    answers = [run.answers[test] for run in runs for test in run.tests]
    confidence, predictions = torch.cat([p for p, _ in answers]).max(dim=1)
    right = (predictions == torch.cat([y for _, y in answers])).float()
    bins = (confidence * 15).ceil()
    kept = [bins == b for b in range(1, 16) if (bins == b).sum() >= 20]
    return [confidence[b].mean() for b in kept], [right[b].mean() for b in kept]


def paths_in_two_dimensions(runs):
    """[(2, epochs)]: training paths by MDS of 1 - RSA between all their steps."""
    steps = [representations for run in runs for representations in run.path.values()]
    distances = torch.zeros(len(steps), len(steps))
    for i, j in combinations(range(len(steps)), 2):
        distances[i, j] = distances[j, i] = 1 - common.rsa(steps[i], steps[j])
    return [path.T for path in classical_mds(distances).split([len(run.path) for run in runs])]


def plot_group(prefix, runs, rows):
    """The figures of one task: a panel for each plain kind."""
    paths, calibration, attractors = {}, {}, {}
    for plain in dict.fromkeys(run.kind for run in runs if run.role() == "plain"
                               and run.student in STRONGER):
        roles = roles_of(plain, runs)
        some = [(role, run) for role, of_role in roles.items() for run in of_role[:2]]
        ways = paths_in_two_dimensions([run for _, run in some])
        paths[plain] = [(run.key, role, *way, None) for (role, run), way in zip(some, ways)]
        calibration[plain], attractors[plain] = [], []
        for role, of_role in roles.items():
            calibration[plain].append((of_role[0].kind, role, *reliability(of_role), None))
            y = torch.tensor([[rows[run.key].get(f"accuracy by attractors: {k}", math.nan)
                               for k in range(5)] for run in of_role])
            curve = range(5), y.mean(dim=0), y.std(dim=0, correction=0)
            attractors[plain].append((of_role[0].kind, role, *curve))
    if paths:
        draw(f"{prefix}-paths.png", paths, "first dimension of 1 - RSA", "second dimension")
        draw(f"{prefix}-reliability.png", calibration, "confidence", "accuracy")
        if "test" in runs[0].tests:
            draw(f"{prefix}-attractors.png", attractors, "attractors", "accuracy")
    for flag, curves in sweeps(runs, rows).items():
        lines = [(name, "strong" if name in STRONGER.values() else role, sorted(curve),
                  [fmean(curve[x]) for x in sorted(curve)],
                  [pstdev(curve[x]) for x in sorted(curve)])
                 for name, (role, curve) in curves.items()]
        draw(f"{prefix}-{flag}.png", {"": lines}, flag, "OOD accuracy", xscale="symlog")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s RUNS [flags], see --help",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", type=Path, help="folder: every run below it is taken")
    add("--csv", type=Path, metavar="FILE", help="write one line a run, with all columns")
    add("--plots", type=Path, metavar="DIR", help="write figures there (needs matplotlib)")
    add("--no-barriers", action="store_true", help="they take the longest, and need the data")
    add("--data-dir", type=Path, default="data", help="where the data are")
    args = parser.parse_args(argv)
    if args.plots:
        if not importlib.util.find_spec("matplotlib"):
            parser.error("--plots needs matplotlib: pip install matplotlib")
        args.plots.mkdir(parents=True, exist_ok=True)
    all_rows = []
    for folder, runs in load_runs(args.runs).items():
        title, rows = "/".join(folder.parts[len(args.runs.parts):]) or folder.name, make_rows(runs)
        if not args.no_barriers:
            add_barriers(rows, runs, args.data_dir)
        print_group(title, runs, rows, test_claims(runs, rows))
        if args.plots:
            plot_group(args.plots / title.replace("/", "-"), runs, rows)
        all_rows += [{"group": title, **row} for row in rows.values()]
    if not all_rows:
        sys.exit(f"error: no finished run in {args.runs}: try ./run_all.sh --quick")
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, dict.fromkeys(name for row in all_rows for name in row))
            writer.writeheader()
            writer.writerows(all_rows)


if __name__ == "__main__":
    main()
