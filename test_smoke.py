"""Tests: `python -m pytest -q test_smoke.py`. They need neither data nor a network, and use none."""

import argparse
import csv
import functools
import gzip
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import analyze
import common
import train_mnist
import train_sva

HERE, CPU = Path(__file__).parent, torch.device("cpu")
SMALL = "--data synthetic --examples 600 --epochs 3 --batch-size 48 --no-amp --device cpu"
SVA_SMALL = "--data synthetic --examples 120 --epochs 2 --batch-size 32 --no-amp --device cpu"


def mnist(flags, out):
    train_mnist.main([*flags.split(), *SMALL.split(), "--out", str(out)])


def sva(flags, out):
    train_sva.main([*SVA_SMALL.split(), *flags.split(), "--out", str(out)])


def newest(out):
    """The folder of the run that was written last."""
    return max(out.glob("*/*/seed*"), key=lambda folder: folder.stat().st_mtime_ns)


def record_of(folder):
    return json.loads((folder / "run.json").read_text())


def random_logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_refused(capfd, main, flags, expected):
    """Bad input: exit code not 0, one line that says what is wrong, no traceback."""
    with pytest.raises(SystemExit) as end:
        main(flags.split())
    message = (capfd.readouterr().err + str(end.value.code)).strip()
    assert end.value.code not in (0, None) and expected in message, message


# ---- KD loss and metrics, against arithmetic by hand or by loops ---------------------------------


def test_kd_loss_is_the_formula():
    student, teacher = random_logits(2, 3, 4).double(), random_logits(2, 3, 4, seed=1).double()
    labels, temperature, alpha, total = torch.tensor([[0, 2, 1], [1, 3, 3]]), 3.0, 0.7, 0.0

    def softmax(row, t):
        exponentials = [math.exp(value / t) for value in row]
        return [value / sum(exponentials) for value in exponentials]

    for s, t, label in zip(student.view(6, 4).tolist(), teacher.view(6, 4).tolist(),
                           labels.flatten().tolist()):
        p, q = softmax(t, temperature), softmax(s, temperature)
        total += alpha * temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q))
        total -= (1 - alpha) * math.log(softmax(s, 1)[label])
    loss = common.kd_loss(student, teacher, labels, temperature, alpha)
    assert loss.item() == pytest.approx(total / 6)
    flat = student.view(6, 4), teacher.view(6, 4), labels.flatten()
    assert common.kd_loss(*flat, temperature, alpha).item() == pytest.approx(loss.item())


def test_kd_loss_identities():
    student, teacher = random_logits(10, 7).requires_grad_(), random_logits(10, 7, seed=1)
    labels, teacher = torch.arange(10) % 7, teacher.requires_grad_()
    cross_entropy, one_hot = F.cross_entropy(student, labels), F.one_hot(labels, 7) * 1e4
    assert common.kd_loss(student, student, labels, 4).item() == pytest.approx(0, abs=1e-6)
    assert torch.allclose(common.kd_loss(student, teacher, labels, alpha=0), cross_entropy)
    assert torch.allclose(common.kd_loss(student, one_hot, labels), cross_entropy)
    sizes = []
    for temperature in (20, 200):
        student.grad = None
        common.kd_loss(student, teacher, labels, temperature).backward()
        sizes.append(student.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05) and sizes[0] > 0.01
    assert teacher.grad is None
    for wrong in ((student[:1], teacher, labels), (student, teacher, labels[:1])):
        with pytest.raises(AssertionError):  # nothing is broadcast
            common.kd_loss(*wrong)


def test_calibration_error_and_metrics():
    # By hand, 2 bins, (0, .5] and (.5, 1]: .5 (right) | .9 (right), .8 (wrong), .6 (right).
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.1, 0], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    by_hand = 1 / 4 * abs(1 - 0.5) + 3 / 4 * abs(2 / 3 - (0.9 + 0.8 + 0.6) / 3)
    labels = torch.tensor([0, 0, 0, 2])
    found = common.expected_calibration_error(probabilities, labels, n_bins=2)
    assert found == pytest.approx(by_hand, abs=1e-6)
    logits, labels, expected = random_logits(500, 10) * 2, torch.arange(500) % 10, 0.0
    probabilities = logits.softmax(1)
    for low in range(15):
        rows = [i for i in range(500) if low / 15 < probabilities[i].max() <= (low + 1) / 15]
        right = sum(int(probabilities[i].argmax() == labels[i]) for i in rows)
        expected += abs(right - sum(probabilities[i].max().item() for i in rows)) / 500
    metrics = common.classification_metrics(logits, labels)
    right = [int(row.argmax()) == label for row, label in zip(logits, labels.tolist())]
    nll = -np.mean([math.log(row[label]) for row, label in zip(probabilities, labels.tolist())])
    assert metrics == pytest.approx({"accuracy": np.mean(right), "ece": expected, "nll": nll},
                                    abs=1e-6)


def test_error_consistency_and_js_divergence():
    labels = torch.zeros(10, dtype=torch.long)
    a = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1, 1])  # right on 7
    b = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 0])  # 7 right, as a on 8; .7² + .3² = .58
    assert common.error_consistency(a, b, labels) == pytest.approx((0.8 - 0.58) / (1 - 0.58))
    assert common.error_consistency(labels, labels, labels) == 1  # no errors at all: no NaN
    opposite = torch.tensor([0, 1]), torch.tensor([1, 0])
    assert common.error_consistency(*opposite, labels[:2]) == pytest.approx(-1)
    with pytest.raises(AssertionError):
        common.error_consistency(a, b, labels[:, None])
    a, b = torch.tensor([[1.0, 0]]), torch.tensor([[0.5, 0.5]])
    entropy_of_mean = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert common.js_divergence(a, b) == pytest.approx(entropy_of_mean - 0.5)
    assert common.js_divergence(a, a.flip(1)) == pytest.approx(1)
    p, q = random_logits(50, 4).softmax(1), random_logits(50, 4, seed=1).softmax(1)
    m = (p + q) / 2
    by_kl = ((p * (p / m).log2()).sum(1) / 2 + (q * (q / m).log2()).sum(1) / 2).mean().item()
    assert common.js_divergence(p, q) == pytest.approx(by_kl, abs=1e-6)


def test_rsa_and_linear_cka():
    x, noise = random_logits(300, 6).double() + 0.3, random_logits(300, 6, seed=2).double()
    rotation = torch.linalg.qr(random_logits(6, 6, seed=1).double())[0]
    assert common.rsa(x, 3 * x @ rotation) == pytest.approx(1)
    assert common.linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1)
    assert common.rsa(x - 0.3, noise) < 0.05 and common.linear_cka(x, noise) < 0.1
    assert common.rsa(torch.zeros(5, 2), noise[:5]) == 0  # dead units: no NaN
    wide = torch.cat([noise, x * noise], dim=1)  # the numbers of features may differ
    centring = torch.eye(300, dtype=torch.double) - 1 / 300
    k, l = (centring @ (z @ z.T) @ centring for z in (x, wide))  # HSIC by kernels: eq. 3
    by_kernels = ((k * l).sum() / (k.norm() * l.norm())).item()
    assert common.linear_cka(x, wide) == pytest.approx(by_kernels)
    cosines = [[[(torch.dot(u, v) / u.norm() / v.norm()).item() for v in z] for u in z]
               for z in (x[:8], wide[:8])]
    rows = [np.dot(u, v) / np.linalg.norm(u) / np.linalg.norm(v) for u, v in zip(*cosines)]
    assert common.rsa(x[:8], wide[:8]) == pytest.approx(np.mean(rows))


# ---- Run files and names -------------------------------------------------------------------------


def test_a_run_is_whole_or_absent_and_the_first_one_stays(tmp_path, monkeypatch, capfd):
    folder, model = tmp_path / "kind" / "seed0", torch.nn.Linear(1, 1)

    def save(tag):
        record = {"config": {"tag": tag}, "loss": math.inf}
        common.save_run(folder, record, {"x": torch.arange(3)}, model)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", interrupted)
        save(1)
    assert not list(folder.parent.iterdir()) and common.find_run(folder, {"tag": 1}) is None
    save(1)
    save(2)
    assert [path.name for path in folder.parent.iterdir()] == ["seed0"]
    assert common.find_run(folder, {"tag": 1}) == {"config": {"tag": 1}, "loss": None}  # JSON
    assert np.load(folder / "outputs.npz")["x"].tolist() == [0, 1, 2]
    assert torch.equal(common.load_weights(torch.nn.Linear(1, 1), folder).weight, model.weight)
    assert_refused(capfd, lambda _: common.find_run(folder, {"tag": 2}), "", "tag is 1, not 2")
    for name, read in (("model.pt", lambda _: common.load_weights(model, folder)),
                       ("run.json", lambda _: common.find_run(folder, {"tag": 1}))):
        (folder / name).write_bytes((folder / name).read_bytes()[:-9])
        assert_refused(capfd, read, "", "unreadable: delete")


@pytest.mark.parametrize("flags, name", [
    ("--student mlp", "mlp"), ("--student mlp --kd --alpha 1 --temperature 20", "mlp-to-mlp"),
    ("--teacher cnn --kd online --epochs 24 --batch-size 512 --seed 3", "cnn-to-mlp-online"),
    ("--teacher cnn --kd --epochs 24", "cnn-to-mlp-epochs24"),  # the CNN's default is another
    ("--epochs 24 --lr 0.05", "mlp-lr0.05"), ("--teacher cnn --kd permuted --temperature 5 "
     "--alpha 0.9 --teacher-seed 7", "cnn-to-mlp-permuted-temperature5-alpha0.9-teacher-seed7"),
    ("--examples 3000 --teacher cnn --kd", "cnn-to-mlp-examples3000"),
    ("--student transformer-seq --kd", "transformer-seq-to-transformer-seq"),
    ("--teacher lstm --kd --answers last", "lstm-to-transformer-seq-last"),
    ("--teacher lstm --kd --answers every --temperature 2", "lstm-to-transformer-seq"),
    ("--answers every --examples 300", "transformer-seq-examples300-every"),
    ("--student transformer --teacher lstm --kd --answers last", "lstm-to-transformer"),
    ("--objective lm --teacher lstm --kd --temperature 2", "lstm-to-transformer-seq-temperature2"),
])
def test_a_runs_name_holds_each_flag_that_is_not_at_its_default(flags, name):
    script = train_sva if re.search("lstm|answers|seq", flags) else train_mnist
    args = script.parse_arguments([*flags.split(), "--device", "cpu", "--data", "synthetic"])
    args.files, args.available = {}, 750
    folder, config = script.configure(args)
    assert folder.parts[-2:] == (name, f"seed{args.seed}")
    for flag, value in re.findall(r"--(epochs|lr|temperature|alpha) (\S+)", flags):
        assert config[flag] == config.get(f"teacher_{flag}", float(value)) == float(value)
    related = script.relatives(args)
    if args.kd:
        assert related["untaught"] == related["plain"][args.student] != folder.parts[-2]
        assert related["self_taught"].startswith(f"{args.student}-to-{args.student}")
    if "3000" in name:
        assert [*related["plain"].values(), related["teacher"], related["permuted"]] == [
            "mlp-examples3000/seed0", "cnn-examples3000/seed0", "cnn-examples3000/seed1",
            "cnn-to-mlp-permuted-examples3000/seed0"]


@pytest.mark.parametrize("main, flags, expected", [
    (train_mnist.main, "--student rnn", "invalid choice"),
    (train_mnist.main, "--teacher cnn", "--teacher has no effect without --kd"),
    (train_mnist.main, "--temperature 3", "--temperature has no effect without --kd"),
    (train_mnist.main, "--kd --seed 3 --teacher-seed 3", "must not be the student's own"),
    (train_mnist.main, "--epochs 0", "--epochs must be"),
    (train_mnist.main, "--device cuda:99", ""), (train_mnist.main, "--out /proc/runs", "/proc/runs"),
    (train_sva.main, "--objective lm --student transformer", "reads both ways"),
    (train_sva.main, "--answers every --kd --teacher transformer", "reads both ways"),
    (train_sva.main, "--objective lm --kd permuted", "for classifiers"),
    (train_sva.main, "--objective lm --answers last", "for classifiers"),
    (train_sva.main, "--alpha 0.5", "--alpha has no effect without --kd"),
    (analyze.main, "nowhere", "no finished run"),
])
def test_bad_input_is_one_line(capfd, main, flags, expected):
    assert_refused(capfd, main, flags, expected)


def test_a_new_model_that_reads_both_ways_is_refused_by_its_property(monkeypatch, capfd):
    monkeypatch.setitem(train_sva.MODELS, "mine", train_sva.MODELS["transformer"])
    assert_refused(capfd, train_sva.main, "--student mine --objective lm", "reads both ways")


# ---- MNIST ---------------------------------------------------------------------------------------


def fake_mnist(monkeypatch, problem=None):
    """In place of torchvision's: image i is grey level i % 256. Nothing is read or downloaded."""
    import torchvision

    class MNIST:
        def __init__(self, root, train=True, download=False):
            if problem:
                raise RuntimeError(problem)
            n = 60_000 if train else 10_000
            self.targets = torch.arange(n) % 10
            self.data = (torch.arange(n) % 256).byte()[:, None, None].expand(n, 28, 28)

    monkeypatch.setattr(torchvision.datasets, "MNIST", MNIST)


def data_arguments(**changes):
    return argparse.Namespace(**{"data": "auto", "examples": None, "data_dir": Path("nowhere"),
                                 "device": CPU, "objective": "classification"} | changes)


def test_mnist_is_split_and_its_absence_is_said(monkeypatch, capfd, tmp_path):
    fake_mnist(monkeypatch)
    args = data_arguments()
    data = train_mnist.load_data(args)
    assert args.data == "mnist" and [len(y) for _, y in data.values()] == [
        55_000, 5_000, 10_000, 10_000, 10_000]
    assert (data["validation"][0][0] == 55_000 % 256).all() and data["validation"][1][1] == 1
    fake_mnist(monkeypatch, "Error downloading")
    args = data_arguments(examples=60)
    assert len(train_mnist.load_data(args)["train"][1]) == 55 and args.data == "synthetic"
    assert "SYNTHETIC" in capfd.readouterr().err
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte").write_text("damaged")
    for args in (data_arguments(data="mnist"), data_arguments(data_dir=tmp_path)):
        assert_refused(capfd, lambda _: train_mnist.load_data(args), "", "Error downloading")


def test_translated_and_scaled_digits():
    data = train_mnist.load_data(data_arguments(data="synthetic", examples=240))
    images, seen = data["test"][0], Counter()
    for image, moved in zip(images, data["translated"][0]):
        framed = F.pad(image, (3,) * 4)  # rolled, zeros move in
        matches = [shift for shift in itertools.product((-3, 3), repeat=2)
                   if torch.equal(framed.roll(shift, (0, 1))[3:-3, 3:-3], moved)]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) == 4 and min(seen.values()) >= 3 and len(images) == 40
    image, shrunk = images[0].float(), data["scaled"][0][0]
    for row, column in itertools.product(range(0, 28, 3), repeat=2):
        y, x = (row - 13.5) / 0.7 + 13.5, (column - 13.5) / 0.7 + 13.5
        expected = sum((1 - abs(y - i)) * (1 - abs(x - j)) * image[i, j].item()
                       for i in (math.floor(y), math.floor(y) + 1)
                       for j in (math.floor(x), math.floor(x) + 1) if 0 <= i < 28 and 0 <= j < 28)
        assert shrunk[row, column].item() == pytest.approx(expected, abs=0.02)  # of 255
    assert all(torch.equal(data[test][1], data["test"][1]) for test in train_mnist.TESTS)


def test_synthetic_digits_are_seeded_and_like_mnist():
    images, labels = train_mnist.synthetic_digits(2000, seed=0)
    assert torch.equal(images, train_mnist.synthetic_digits(2000, seed=0)[0])
    assert not torch.equal(images, train_mnist.synthetic_digits(2000, seed=1)[0])
    assert images.shape == (2000, 28, 28) and images.dtype == torch.uint8
    ink = images.double() / 255
    assert labels.bincount().min() > 150 and 0.08 < ink.mean() < 0.2  # MNIST: 0.131
    for axis in (1, 2):
        centre = (ink.sum(axis) * torch.arange(28)).sum(1) / ink.sum((1, 2))
        assert abs(centre.mean() - 13.5) < 1 and centre.std() < 2.5
    means = torch.stack([ink[labels == digit].mean(0) for digit in range(10)]).flatten(1)
    fresh, fresh_labels = train_mnist.synthetic_digits(500, seed=2)
    nearest = torch.cdist(fresh.double().flatten(1) / 255, means).argmin(1)
    assert (nearest == fresh_labels).double().mean() > 0.5  # labels are those of the glyphs


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """All setups of digits: {flags: (folder of the run, [what went into each step])}."""
    out, runs, steps = tmp_path_factory.mktemp("grid"), {}, []
    patch, kd_loss, to_input = pytest.MonkeyPatch(), common.kd_loss, train_mnist.to_input

    def watched_loss(student, teacher, labels, *flags):
        steps[-1].update(soft=teacher.detach(), labels=labels, flags=flags)
        return kd_loss(student, teacher, labels, *flags)

    def watched_input(images):
        steps.append({"images": images})
        return to_input(images)

    patch.setattr(common, "kd_loss", watched_loss)
    patch.setattr(train_mnist, "to_input", watched_input)
    for flags in ("--seed 1", "--student cnn --seed 1", "--student cnn", "", "--kd",
                  "--teacher cnn --kd", "--teacher cnn --kd permuted", "--teacher cnn --kd online",
                  "--student cnn --teacher mlp --kd", "--teacher cnn --kd --temperature 5"):
        steps.clear()
        mnist(flags, out)
        runs[flags] = newest(out), [step for step in steps if len(step["images"]) == 48]
    patch.undo()
    return runs


def test_setups_start_alike_see_the_same_batches_and_leave_whole_runs(grid):
    data = train_mnist.load_data(data_arguments(data="synthetic", examples=600))
    first = {}
    for folder, steps in grid.values():
        record, outputs = record_of(folder), np.load(folder / "outputs.npz")
        config, path = record["config"], outputs["probe_representations"]
        assert len(steps) == 33 and outputs["probe_epochs"].tolist() == [0, 1, 2, 3]
        plain, batches = first.setdefault((config["student"], config["seed"]), (path, steps))
        assert np.array_equal(path[0], plain[0])
        assert path is plain or not np.allclose(path[-1], plain[-1])
        assert all(torch.equal(a["images"], b["images"]) for a, b in zip(steps, batches))
        model = common.load_weights(train_mnist.MODELS[config["student"]](), folder)
        for test in (*train_mnist.TESTS, "validation"):  # what the kept weights say
            logits = train_mnist.evaluate(model.train(), data[test][0], False)[0]
            accuracy = (logits.argmax(dim=1) == data[test][1]).double().mean().item()
            if test == "validation":
                assert record["history"][-1]["validation_accuracy"] == pytest.approx(accuracy)
                continue
            with torch.no_grad():  # of seven digits as of all: in eval mode
                alone = model.eval()(train_mnist.to_input(data[test][0][:7]))
            assert torch.allclose(alone, torch.from_numpy(outputs[f"{test}_logits"])[:7], atol=1e-4)
            assert np.allclose(outputs[f"{test}_logits"], logits, atol=1e-4)
            assert record["metrics"][test]["accuracy"] == pytest.approx(accuracy)
    assert not np.array_equal(first["mlp", 0][0][0], first["mlp", 1][0][0])
    batches = first["mlp", 0][1]
    assert not torch.equal(batches[0]["images"], batches[11]["images"])  # another order


def test_soft_labels_of_digits_are_the_teachers(grid):
    teacher = common.load_weights(train_mnist.cnn(), grid["--student cnn --seed 1"][0]).eval()
    for flags, temperature in (("--teacher cnn --kd", 20), ("--teacher cnn --kd permuted", 20),
                               ("--teacher cnn --kd --temperature 5", 5)):
        steps = grid[flags][1]
        soft, labels = (torch.cat([step[key] for step in steps]) for key in ("soft", "labels"))
        with torch.no_grad():
            fresh = torch.cat([teacher(train_mnist.to_input(step["images"])) for step in steps])
        own = ((fresh - soft).abs().amax(dim=1) < 1e-3).double().mean()
        assert own < 0.2 if "permuted" in flags else own > 0.999
        for label in range(10):  # permuted: those of another digit of the same label
            distance = torch.cdist(soft[labels == label], fresh[labels == label]).amin(dim=1)
            assert (distance < 1e-2).double().mean() > 0.9
        assert all(step["flags"] == (temperature, 1.0) for step in steps)
    record = record_of(grid["--teacher cnn --kd"][0])
    assert record["teacher_metrics"] == record_of(grid["--student cnn --seed 1"][0])["metrics"]
    folder, steps = grid["--teacher cnn --kd online"]
    assert record_of(folder)["teacher_metrics"]["test"]["accuracy"] > 0.25  # both learn
    assert record_of(folder)["metrics"]["test"]["accuracy"] > 0.25
    assert steps[-1]["soft"].std() > 1.5 * steps[0]["soft"].std()


def test_a_finished_run_is_not_repeated_and_a_repeated_one_is_equal(grid, tmp_path, capsys):
    old = grid["--teacher cnn --kd"][0]
    shutil.copytree(old.parents[1], tmp_path / old.parts[-3])
    folder = tmp_path / Path(*old.parts[-3:])
    before = (folder / "run.json").read_bytes()
    mnist("--teacher cnn --kd", tmp_path)
    out = capsys.readouterr().out
    assert (folder / "run.json").read_bytes() == before and "is finished" in out
    metrics = record_of(folder)["metrics"]["scaled"]
    assert f"{metrics['accuracy']:.4f} / {metrics['ece']:.4f}" in out and "untaught twin" in out
    shutil.rmtree(folder)
    mnist("--teacher cnn --kd", tmp_path)  # its teacher is loaded now
    assert record_of(folder)["metrics"] == json.loads(before)["metrics"]


# ---- Sentences -----------------------------------------------------------------------------------


def test_the_grammar_counted_again_from_the_words_alone():
    parts = train_sva.synthetic_sentences(600)
    assert parts == train_sva.synthetic_sentences(600)
    nouns, verbs = set(train_sva.WORDS["N"]), {*train_sva.WORDS["SEE"], *train_sva.WORDS["SLEEP"]}
    guesses = {0: [], -1: []}
    for name, part in parts.items():
        for sentence in part:
            words, agree = sentence.text.split(), {True: "", False: "s"}
            number = [word.endswith("s") for word in words if word.removesuffix("s") in nouns]
            before = [w for w in words[:sentence.verb] if w.removesuffix("s") in nouns]
            head = words[sentence.verb - sentence.distance]
            subject = words[sentence.verb - sentence.distance:sentence.verb]
            assert words[sentence.verb].removesuffix("s") in verbs and words[-1] == "."
            assert words[sentence.verb].endswith("s") is not sentence.plural
            assert head.removesuffix("s") in nouns and head.endswith("s") is sentence.plural
            others = [w.endswith("s") is not sentence.plural
                      for w in subject[1:] if w.removesuffix("s") in nouns]
            assert sentence.attractors == sum(others) and len(number) >= 1
            assert name != "test" or all(others)
            for place, right in guesses.items():
                if name == "test" and sentence.attractors:
                    right.append(before[place].endswith("s") is sentence.plural)
    groups = Counter(min(s.attractors, 4) for s in parts["test"])
    assert groups == dict.fromkeys(range(5), 240) and len(parts["train"]) == 600
    assert 0.75 < sum(s.attractors == 0 for s in parts["train"]) / 600 < 0.85
    assert np.mean(guesses[0]) < 0.7 and np.mean(guesses[-1]) < 0.3
    seen = {train_sva.before_verb(sentence) for sentence in parts["train"]}
    assert not seen & {train_sva.before_verb(s) for s in parts["test"] + parts["validation"]}


HEADER = "x\tsentence\tverb_index\tverb_pos\tn_intervening\tn_diff_intervening\tdistance\n"


def write_tables(folder, lines=8):
    """A split of one's own: even lines have an attractor, odd ones a noun that is none besides."""
    for name, extra in (("train", ""), ("validation", ""), ("test", " whale")):
        rows = [f"-\tthe key near the{extra} cats {'is' if i % 2 else 'VBZ'} here\t{6 + bool(extra)}"
                f"\tVBZ\t{1 + i % 2}\t1\t{i if i else ''}\n" for i in range(lines)]
        rows += [f"-\tkeys {verb} here\t2\tVBP\t0\t0\t1\n" for verb in ("are", "VBP")]
        (folder / f"{name}.tsv").write_text(HEADER + "".join(rows))


def test_both_layouts_of_real_sentences_are_read(tmp_path, capfd):
    write_tables(tmp_path)
    args = data_arguments(data_dir=tmp_path)
    data = train_sva.load_data(args)
    assert args.data == "linzen" and args.available == 10
    assert args.files == {f"{name}.tsv": (tmp_path / f"{name}.tsv").stat().st_size
                          for name in ("train", "validation", "test")}
    test = data["test"]
    assert test["attractors"].tolist() == [1, -1] * 4 + [0, 0]  # -1: not all are attractors
    assert test["labels"].tolist() == [0] * 8 + [1, 1]
    assert test["distance"].tolist() == [-1, 1, 2, 3, 4, 5, 6, 7, 1, 1]
    assert test["answer_at"].tolist() == [5] * 8 + [0, 0] and test["lengths"][0] == 6
    assert test["tokens"][0, 4] == train_sva.UNKNOWN  # no training sentence has "whale"
    lm_args = data_arguments(data_dir=tmp_path, objective="lm")
    lm = train_sva.load_data(lm_args)["train"]
    assert lm_args.tokens == args.tokens == 4 + len("the key near cats is VBZ here keys are VBP".split())
    assert (lm["lengths"] == torch.tensor([9] * 8 + [5, 5])).all()  # START, whole sentence, END
    for row, verb in ((0, "VBZ VBP"), (1, "is are"), (8, "is are"), (9, "VBZ VBP")):
        shown = lm["tokens"][row, lm["answer_at"][row] + 1].item()
        assert shown == lm["forms"][row, lm["labels"][row]] and len(set(lm["forms"][row])) == 2
    assert lm["forms"][0].tolist() == lm["forms"][9].tolist() != lm["forms"][1].tolist()
    assert lm["forms"][1].tolist() == lm["forms"][8].tolist()
    for name, text in (("no column", HEADER.replace("verb_pos", "tag")), ("bad", HEADER + "a\tb\n"),
                       ("no word before", HEADER + "-\tare here\t1\tVBP\t0\t0\t1\n")):
        (tmp_path / "validation.tsv").write_text(text)
        assert_refused(capfd, lambda _: train_sva.load_data(args), "", "validation.tsv, line")
    rows = [f"-\tthe key{i} is here\t3\tVBZ\t0\t0\t1\n" for i in range(200)]
    table = tmp_path / "one" / train_sva.TABLE
    table.parent.mkdir()
    table.write_bytes(gzip.compress((HEADER + "".join(rows)).encode()))
    sentences = train_sva.load_sentences(data_arguments(data_dir=table.parent))
    assert [len(part) for part in sentences.values()] == [20, 2, 178]
    assert len({s.text for part in sentences.values() for s in part}) == 200
    args = data_arguments(data_dir=table.parent, examples=10)
    few = train_sva.load_sentences(args)
    assert len(few["train"]) == 10 and args.available == 20 and few["test"] == sentences["test"]
    args.examples = 21
    assert_refused(capfd, lambda _: train_sva.load_sentences(args), "", "there are 20")
    args = data_arguments(examples=50)
    assert len(train_sva.load_sentences(args)["train"]) == 50 and args.data == "synthetic"
    assert "SYNTHETIC" in capfd.readouterr().err


def test_other_files_under_the_same_name_are_another_run(tmp_path, capfd):
    write_tables(tmp_path, 60)
    flags = f"--data linzen --data-dir {tmp_path} --out {tmp_path} --epochs 1 --student lstm"
    train_sva.main(flags.split())
    write_tables(tmp_path, 61)
    assert_refused(capfd, train_sva.main, flags, "its files is")


def test_other_form_of_a_verb():
    known = {"is", "are", "goes", "go", "tries", "try", "sees", "see", "'", "s", "VBZ", "VBP"}
    for singular, plural in (("is", "are"), ("goes", "go"), ("tries", "try"), ("sees", "see"),
                             ("VBZ", "VBP")):
        assert train_sva.other_form(singular, False, known) == plural
        assert train_sva.other_form(plural, True, known) == singular
    assert train_sva.other_form("'s", False, known) is None
    assert train_sva.other_form("whales", False, known) is None


def test_batches_have_little_padding_and_leave_out_no_sentence_for_long():
    lengths = torch.randint(1, 40, (6000,), generator=torch.Generator().manual_seed(0))
    generator, seen = torch.Generator().manual_seed(0), []
    for _ in range(4):
        batches = train_sva.batches_by_length(lengths, 128, generator)
        assert len(batches.unique()) == batches.numel() == 128 * (6000 // 128)
        longest = lengths[batches].amax(dim=1, keepdim=True).expand_as(batches)
        assert 1 - lengths[batches].sum() / longest.sum() <= 0.08
        seen.append(batches.flatten())
    assert len(torch.cat(seen).unique()) == 6000 and not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("name", train_sva.MODELS)
@torch.no_grad()
def test_padding_has_no_influence_and_only_the_class_token_sees_both_sides(name):
    model = train_sva.build_model(name, 0, 20, "classification", CPU).eval()
    tokens = random_logits(2, 7).mul(99).long() % 16 + 4
    tokens[0, 5:] = train_sva.PAD
    both, alone = model.states(tokens), model.states(tokens[:1, :5])
    assert torch.allclose(alone, both[:1, :5], atol=1e-5)
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] - 3) % 16 + 4
    before, after = both, model.states(changed)
    assert (before[:, 4] - after[:, 4]).abs().amax(dim=1).min() > 1e-4
    assert torch.allclose(before[:, :4], after[:, :4], atol=1e-5) is model.causal
    assert train_sva.reads_both_ways(name) is (not model.causal) is (name == "transformer")
    assert name != "ut-seq" or len(model.blocks) == 1 < model.layers  # one layer shared


VOCABULARY = {"a": 4, "b": 5, "c": 6, "bs": 7}
SENTENCES = [train_sva.Sentence("a c a b c", 3, True, 0, 1), train_sva.Sentence("c bs a", 1, False, 1, 2),
             train_sva.Sentence("a a bs c", 2, False, 4, 3)]


@torch.no_grad()
def test_answers_after_every_word_and_at_the_last_against_a_loop():
    model = train_sva.build_model("lstm", 0, 20, "classification", CPU).eval()
    split = train_sva.encode(SENTENCES, VOCABULARY, "classification")
    prefixes = [[[4], [4, 6], [4, 6, 4]], [[6]], [[4], [4, 4]]]
    logits = [[model.head(model.states(torch.tensor([p]))[0, -1]) for p in row] for row in prefixes]
    for answers, expected, labels in (
            ("every", sum(logits, []), [1, 1, 1, 0, 0, 0]), ("last", [r[-1] for r in logits], [1, 0, 0])):
        tokens, where, right = train_sva.questions(split, answers)
        found = model.head(train_sva.read(model, tokens, where))
        assert torch.allclose(found, torch.stack(expected), atol=1e-6)
        assert right.tolist() == labels
    found, loss = train_sva.evaluate(model.train(), split, "classification", False, CPU)
    last = torch.stack([row[-1] for row in logits])
    assert torch.allclose(found, last, atol=1e-6)
    assert loss == pytest.approx(F.cross_entropy(last, split["labels"]).item())
    cached = train_sva.answer_every_word(model.train(), split, False, CPU)
    for row, expected in zip(cached, logits):
        assert torch.allclose(row[:len(expected)], torch.stack(expected), atol=1e-6)
    states = train_sva.represent(model.train(), split, False, CPU)
    assert torch.allclose(model.head(states), last, atol=1e-6)


@torch.no_grad()
def test_a_language_model_scores_words_and_verb_forms_like_a_loop(monkeypatch):
    monkeypatch.setattr(train_sva, "WORDS_AT_ONCE", 4)
    model = train_sva.build_model("transformer-seq", 0, 20, "lm", CPU).eval()
    split = train_sva.encode(SENTENCES, VOCABULARY, "lm")
    logits, loss = train_sva.evaluate(model.train(), split, "lm", False, CPU)
    losses = []
    for row, sentence in enumerate(SENTENCES):
        words = [train_sva.START, *map(VOCABULARY.get, sentence.text.split()), train_sva.END]
        for place in range(1, len(words)):
            scores = model.head(model.states(torch.tensor([words[:place]]))[0, -1]).log_softmax(0)
            losses.append(-scores[words[place]].item())
            if place == sentence.verb + 1:  # "bs" is the singular, "b" the plural
                assert torch.allclose(logits[row], scores[[7, 5]], atol=1e-5)
    assert loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_agreement_metrics_by_hand(monkeypatch):
    split = {"labels": torch.tensor([0, 0, 1, 0, 1]), "distance": torch.tensor([1, 20, 3, 3, -1]),
             "attractors": torch.tensor([0, 0, 0, 6, -1])}
    singular = torch.tensor([[2.0, 0]] * 5)  # what it says, always
    monkeypatch.setattr(train_sva, "evaluate", lambda *_: (singular, math.log(7)))
    metrics = train_sva.test_all(None, {"test": split}, "lm", False, CPU)[0]["test"]
    assert metrics["accuracy"] == pytest.approx(0.6) and metrics["perplexity"] == pytest.approx(7)
    assert metrics["accuracy_by_attractors"] == {"0": pytest.approx(2 / 3), "4": 1.0}
    assert metrics["a_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert metrics["d_accuracy"] == pytest.approx((1 + 0.5) / 2)  # at 1 and 3


SMALL_MODELS = {
    "lstm": functools.partial(train_sva.LSTM, width=16, dropout=0.0),
    "transformer": functools.partial(train_sva.Transformer, width=16, layers=1, causal=False),
    "transformer-seq": functools.partial(train_sva.Transformer, width=16, layers=1)}


def test_setups_of_sentences_see_the_same_batches_and_the_teachers_answers(tmp_path, monkeypatch):
    """Watch every step: the same sentences in the same order, each word with its teacher's answer."""
    monkeypatch.setattr(train_sva, "MODELS", SMALL_MODELS)
    monkeypatch.setattr(train_sva, "WORDS_AT_ONCE", 10**6)
    seen, read, kd_loss, first = [], train_sva.read, common.kd_loss, {}

    def watched_read(model, tokens, where):
        if model.training:  # the student; an offline teacher is in eval mode
            seen.append({"tokens": tokens, "where": where})
        return read(model, tokens, where)

    def watched_loss(student, teacher, labels, *flags):
        seen[-1].update(soft=teacher.detach(), labels=labels, flags=flags)
        return kd_loss(student, teacher, labels, *flags)

    monkeypatch.setattr(train_sva, "read", watched_read)
    monkeypatch.setattr(common, "kd_loss", watched_loss)
    for flags, every in (
            ("", False), ("--answers every", True), ("--teacher lstm --kd", True),
            ("--teacher lstm --kd --answers last", False), ("--teacher lstm --kd permuted", True),
            ("--teacher transformer --kd --temperature 3", False), ("--objective lm", True),
            ("--objective lm --teacher lstm --kd", True)):
        sva(flags, tmp_path)
        record, steps = record_of(newest(tmp_path)), seen[-6:]  # 2 epochs of 120 // 32 batches
        config, soft = record["config"], []
        batches = first.setdefault(config["objective"], [step["tokens"] for step in steps])
        assert all(torch.equal(a, b["tokens"]) for a, b in zip(batches, steps, strict=True))
        for step in steps:  # answers after every word, or one a sentence; see the loops for "lm"
            words = len(step["where"]) if "lm" in flags else int((step["tokens"] != 0).sum())
            assert len(step["where"]) == (words if every else 32)
        if "--kd" in flags:
            teacher = train_sva.build_model(config["teacher"], 5, record["sizes"]["tokens"],
                                            config["objective"], CPU).eval()
            common.load_weights(teacher, newest(tmp_path).parents[1] / record["teacher"])
            with torch.no_grad():
                fresh = torch.cat([teacher.head(read(teacher, step["tokens"], step["where"]))
                                   for step in steps])
            soft, labels = (torch.cat([step[key] for step in steps]) for key in ("soft", "labels"))
            own = ((fresh - soft).abs().amax(dim=1) < 1e-5).double().mean()
            assert own < 0.2 if "permuted" in flags else own > 0.999, flags
            if "permuted" in flags:  # the teacher's answers to other words of the same label
                distance = torch.cdist(soft[labels == 1], fresh[labels == 1]).amin(dim=1)
                assert (distance < 1e-5).double().mean() > 0.9
            default = 1.0 if "lm" in flags else 2.0
            assert steps[0]["flags"] == (3.0 if "3" in flags else default, 1.0)


def test_parts_of_a_language_models_batch_add_up(tmp_path, monkeypatch):
    monkeypatch.setattr(train_sva, "MODELS", SMALL_MODELS)
    losses = []
    for at_once in (10**6, 50):
        monkeypatch.setattr(train_sva, "WORDS_AT_ONCE", at_once)
        for kd in ("", "--kd", "--kd online"):
            sva(f"--objective lm --student lstm {kd}", tmp_path / str(at_once))
        runs = sorted((tmp_path / str(at_once)).rglob("run.json"))
        losses.append([[entry["loss"] for entry in json.loads(path.read_text())["history"]]
                       for path in runs])
    assert np.allclose(losses[0], losses[1], atol=1e-4) and len(losses[0]) == 4


def test_online_both_models_of_sentences_learn(tmp_path, monkeypatch):
    monkeypatch.setattr(train_sva, "MODELS", SMALL_MODELS)
    sva("--teacher lstm --kd online --objective lm --epochs 40 --lr 0.03", tmp_path)
    record = record_of(newest(tmp_path))
    for metrics in (record["teacher_metrics"], record["metrics"]):
        assert metrics["test"]["perplexity"] < 25  # of 49 tokens
    assert "teacher" not in record and "teacher_epochs" not in record["config"]


# ---- Analysis ------------------------------------------------------------------------------------


def made_up_run(kind, seed, student, teacher=None, kd=None):
    """A Run that was never trained, of MNIST's models."""
    run = analyze.Run.__new__(analyze.Run)
    run.kind, run.seed, run.key, run.student = kind, seed, f"{kind}/seed{seed}", student
    run.config = {"task": "mnist", "student": student, "teacher": teacher, "kd": kd, "seed": seed}
    run.record = {"config": run.config, "plain": {m: f"{m}/seed{seed}" for m in ("mlp", "cnn")}}
    if kd:
        run.record |= {"untaught": f"{student}/seed{seed}", "teacher": f"{teacher}/seed{seed + 1}",
                       "self_taught": f"{student}-to-{student}/seed{seed}",
                       "permuted": f"{teacher}-to-{student}-permuted/seed{seed}"}
    return run


def made_up_grid(seeds):
    kinds = [("cnn", "cnn"), ("mlp", "mlp"), ("cnn-to-mlp", "mlp", "cnn", "offline"),
             ("mlp-to-mlp", "mlp", "mlp", "offline"), ("mlp-to-cnn", "cnn", "mlp", "offline"),
             ("cnn-to-mlp-permuted", "mlp", "cnn", "permuted"), ("mlp-x", "mlp")]
    return [made_up_run(kind, seed, *rest) for kind, *rest in kinds for seed in range(seeds)]


# What a claim is about, said once more: (column, the better of two kinds, the other one).
BETTER = {
    "the stronger bias generalises better": ("OOD: accuracy", "cnn", "mlp"),
    "teaching improves accuracy": ("OOD: accuracy", "cnn-to-mlp", "mlp"),
    "... more than self-distillation": ("OOD: accuracy", "cnn-to-mlp", "mlp-to-mlp"),
    "... more than permuted soft labels": ("OOD: accuracy", "cnn-to-mlp", "cnn-to-mlp-permuted"),
    "teaching improves calibration": ("OOD: ece", "mlp", "cnn-to-mlp"),
    "errors come nearer to other strong models": ("other strong: kappa", "cnn-to-mlp", "mlp"),
    "representations come nearer (CKA)": ("other strong: CKA", "cnn-to-mlp", "mlp"),
    "representations come nearer (RSA)": ("other strong: RSA", "cnn-to-mlp", "mlp"),
    "training paths come nearer": ("other strong: path distance", "mlp", "cnn-to-mlp"),
    "teaching moves the basin": ("solutions: barrier", "cnn-to-mlp", "mlp-to-mlp"),
    "stronger bias, less variance": ("solutions: prediction spread", "mlp", "cnn"),
    "... of representations": ("solutions: representation spread", "mlp", "cnn")}


def test_every_claim_reads_the_right_runs_the_right_way_round():
    runs = made_up_grid(4)
    for claim, (column, high, low) in BETTER.items():
        for sign, verdict in ((1, "supported"), (-1, "contradicted")):
            rows = {run.key: {column: 50.0 + run.seed} for run in runs}  # others change nothing
            for run in runs:
                if run.kind in (high, low):
                    rows[run.key][column] += sign * (run.kind == high) + 0.01 * run.seed**2 % 0.03
            found, = [c for c in analyze.test_claims(runs, rows) if c["claim"] == claim]
            assert found["verdict"] == verdict and {found["one"], found["against"]} == {high, low}
            assert sorted(found["values"]) == [0, 1, 2, 3]
    same = "self-distillation changes little (CKA)"
    assert {claim for claim, *_ in analyze.CLAIMS} == {same, *BETTER}
    for change, verdict in ((0.01, "supported"), (0.2, "contradicted"), (-0.2, "contradicted")):
        rows = {run.key: {"own kind: CKA": 0.5 + run.seed + change * (run.kind == "mlp-to-mlp")
                          + 1e-4 * run.seed * (run.kind == "mlp")} for run in runs}
        found, = [c for c in analyze.test_claims(runs, rows) if c["claim"] == same]
        assert found["verdict"] == verdict and found["against"] == "mlp"
    assert analyze.test_claims(made_up_grid(2), {run.key: {"OOD: accuracy": 0.5} for run in runs})[
        0]["verdict"] == "untested"


def test_false_verdicts_come_as_often_as_they_should(capsys):
    """Where nothing differs, 5 % of verdicts are wrong; for spreads of seeds too."""
    generator, runs = np.random.default_rng(0), made_up_grid(4)
    verdicts = Counter()
    for _ in range(300):
        rows = {run.key: {column: generator.normal() for column, *_ in BETTER.values()}
                for run in runs}
        verdicts.update(claim["verdict"] for claim in analyze.test_claims(runs, rows))
    assert 0.03 < 1 - verdicts["inconclusive"] / verdicts.total() < 0.07
    generator = torch.Generator().manual_seed(0)
    for n, features in itertools.product((3, 4, 8), (1, 30)):
        weak, strong = torch.randn(2, 1000, n, features, generator=generator).double()
        spread = torch.cdist(weak, weak).square() - torch.cdist(strong, strong).square()
        found = [analyze.t_test(analyze.jackknife(pairs).tolist(), 1)[2] for pairs in spread]
        assert found.count("inconclusive") >= 930, (n, features)
    pairs, others = torch.rand(6, 6, generator=generator), torch.eye(6) == 0
    pairs = pairs + pairs.T
    left_out = pairs[1:, 1:][others[1:, 1:]].mean()  # the pseudo-value of the first seed
    expected = 6 * pairs[others].mean() - 5 * left_out
    assert analyze.jackknife(pairs)[0] == pytest.approx(expected.item(), rel=1e-5)
    mean, half, _ = analyze.t_test([1.0, 2.0, 3.0, 4.0], 1)  # tabulated: t(3) = 3.182
    assert (mean, half) == pytest.approx((2.5, 3.182 * 0.645497), abs=1e-3)
    # The answer: 0.5 of a gap of 0.8, over the seeds that have both.
    rows = {run.key: {"OOD: accuracy": {"cnn": 0.9, "cnn-to-mlp": 0.5}.get(run.kind, 0.1)
                      + 1e-3 * run.seed * (run.kind != "mlp")} for run in runs}
    analyze.print_answer(analyze.test_claims(runs, rows))
    out = capsys.readouterr().out
    assert "0.50 of the gap between mlp and cnn (+0.80" in out
    assert "- teaching improves accuracy: +0.40" in out and out.count("supported") == 3


def test_reference_models_are_neither_teachers_nor_twins():
    runs = made_up_grid(5)
    for run in runs:
        found = {whose: [other.key for other in others]
                 for whose, others in analyze.references(run, runs).items()}
        away = [seed for seed in range(5) if seed not in (run.seed, run.seed + 1)]
        assert found["own kind"] == [f"{run.student}/seed{seed}" for seed in away]
        assert found["other strong"] == [f"cnn/seed{seed}" for seed in away]
        teacher = f"{run.config['teacher']}/seed{run.seed + 1}"
        assert found["own teacher"] == ([teacher] if run.seed < 4 and run.config["kd"] else [])
    runs[10].record["teacher"] = "cnn/seed3"  # by --teacher-seed
    assert "cnn/seed3" not in [o.key for o in analyze.references(runs[10], runs)["other strong"]]


def test_barrier_and_mds():
    model, heights = torch.nn.Linear(1, 1), iter([1.0, *[2.0] * 19, 1.5])
    state = model.state_dict()
    assert analyze.barrier(model, state, state, lambda _: next(heights)) == pytest.approx(0.975)
    x = train_mnist.to_input(train_mnist.synthetic_digits(300, seed=0)[0])
    labels = train_mnist.synthetic_digits(300, seed=0)[1]
    model = train_mnist.build_model("mlp", 0, CPU)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def measure(model):
        analyze.update_bn([x], model)
        return F.cross_entropy(model.eval()(x), labels).item()

    state = {name: value.clone() for name, value in model.state_dict().items()}
    order = torch.randperm(512, generator=torch.Generator().manual_seed(0))
    permuted = {name: value[order] if name.startswith(("body.1.", "body.2.")) and value.dim()
                else value for name, value in state.items()}
    permuted["body.4.weight"] = permuted["body.4.weight"][:, order]
    assert analyze.barrier(model, state, state, measure) == pytest.approx(0, abs=1e-6)
    assert analyze.barrier(model, state, permuted, measure) > 0.1
    points = random_logits(12, 2).double()
    found = analyze.classical_mds(torch.cdist(points, points))
    assert torch.allclose(torch.cdist(found, found), torch.cdist(points, points), atol=1e-9)


def test_the_analysis_of_a_grid(grid, tmp_path, capsys, monkeypatch):
    old = grid[""][0].parents[1]
    root = shutil.copytree(old, tmp_path / "a" / "mnist-synthetic")
    twins = []
    monkeypatch.setattr(analyze, "barrier", lambda model, a, b, measure: twins.append((
        [n for n in root.glob("*/seed*") for s in (a, b) if all(torch.equal(s[k], v) for k, v in
         torch.load(n / "model.pt").items())])) or measure(model))
    kind = grid["--kd"][0].parts[-2]
    plain = grid[""][0].parts[-2]
    # A student with its teacher's outputs is found out.
    shutil.copy(root / plain / "seed1" / "outputs.npz", root / kind / "seed0" / "outputs.npz")
    shutil.copytree(root / plain, tmp_path / "b" / "mnist-synthetic" / plain)
    (root / grid["--student cnn"][0].parts[-2] / "seed0" / "outputs.npz").write_bytes(b"PK")
    figures = tmp_path / "figures"
    plots = ["--plots", str(figures)] if analyze.importlib.util.find_spec("matplotlib") else []
    analyze.main([str(tmp_path), "--csv", str(tmp_path / "all.csv"), *plots])
    out, err = capsys.readouterr()
    with open(tmp_path / "all.csv", encoding="utf-8") as file:
        rows = {(row["group"], row["run"], row["seed"]): row for row in csv.DictReader(file)}
    assert len(rows) == 9 + 2 and "cnn" in err and "unreadable" in err and "delete it" in err
    found = rows["a/mnist-synthetic", kind, "0"]
    for name, value in (("agreement", 1), ("kappa", 1), ("JS divergence", 0), ("CKA", 1),
                        ("RSA", 1), ("path distance", 0)):
        assert float(found[f"own teacher: {name}"]) == pytest.approx(value, abs=1e-4)
        assert found[f"other strong: {name}"] == ""  # seeds 0 and 1 don't count
    metrics = record_of(grid[""][0])["metrics"]
    row, mean = rows["b/mnist-synthetic", plain, "0"], {}
    for metric in ("accuracy", "ece"):
        mean[metric] = (metrics["scaled"][metric] + metrics["translated"][metric]) / 2
        assert float(row[f"OOD: {metric}"]) == pytest.approx(mean[metric])
    assert float(row["scaled: nll"]) == metrics["scaled"]["nll"] and row["role"] == "plain"
    other = record_of(root / plain / "seed1")["metrics"]
    both = [mean["accuracy"], (other["scaled"]["accuracy"] + other["translated"]["accuracy"]) / 2]
    assert f"| {np.mean(both):.3f}±{np.std(both, ddof=1):.3f} |" in re.sub(" +", " ", out)
    assert "## a/mnist-synthetic" in out and "## b/mnist-synthetic" in out
    sweep = re.search(r"OOD accuracy over temperature.*\n\n(.*)\n.*\n(.*)\n", out)
    assert sweep and re.findall(r"\d+\.\d", sweep[1]) == ["5.0", "20.0"] and plain in sweep[2]
    assert {"mnist-synthetic" in str(path) for path in figures.glob("*.png")} <= {True}
    assert not plots or len(list(figures.glob("*.png"))) == 6
    assert (all(len(pair) == 2 for pair in twins) and len(twins) == 9)
    seeds = {tuple(sorted(f"{n.parts[-2]}/{n.name}" for n in pair)) for pair in twins}
    assert tuple(sorted((f"{kind}/seed0", f"{plain}/seed0"))) in seeds
    assert (f"{plain}/seed0", f"{plain}/seed1") in seeds
    monkeypatch.setattr(analyze.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit):
        analyze.main([str(tmp_path), "--plots", str(figures)])
    assert "pip install matplotlib" in capsys.readouterr().err


# ---- The programs as a user starts them ----------------------------------------------------------


def start(folder, *command, **variables):
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True,
                            env=os.environ | {"PYTHON": sys.executable} | variables)


def test_two_files_alone_do_the_title_commands_and_a_killed_run_leaves_nothing(tmp_path):
    for name in ("train_mnist.py", "train_sva.py", "common.py"):
        shutil.copy(HERE / name, tmp_path)
    python = [sys.executable, "-u"]
    commands = [
        [*python, "train_mnist.py", *"--teacher cnn --student mlp --kd".split(), *SMALL.split()],
        [*python, "train_sva.py", *"--teacher lstm --student transformer-seq --kd".split(),
         *SVA_SMALL.split()],
        [*python, "train_mnist.py", *SMALL.split(), "--epochs", "100000"]]
    title, sentences, endless = [start(tmp_path, *command) for command in commands]
    for process in (title, sentences):
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and err == "" and "teacher" in out and "s left" in out
        assert "untaught twin   not there yet: the same command without --kd" in out
    for line in endless.stdout:
        if line.startswith("epoch"):
            break
    endless.send_signal(signal.SIGKILL)
    endless.wait()
    runs = sorted(path.parts[-3] for path in tmp_path.rglob("run.json"))
    assert len(runs) == 4 and not [run for run in runs if "100000" in run]


STUB = """#!/bin/sh
echo "$OMP_NUM_THREADS $*" >> "$LOG"
case "$*" in *analyze.py*) echo tables ;; *"--teacher cnn"*) sleep 0.01; exit "$FAIL" ;; esac
"""


def run_all(folder, *arguments, **variables):
    """run_all.sh with a stand-in for python, which notes its arguments."""
    stub = folder / "my python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    return start(HERE, "./run_all.sh", *arguments, **{
        "PYTHON": str(stub), "LOG": str(folder / "log"), "OUT": str(folder / "a b"), "SEEDS": "2",
        "FAIL": "0"} | variables)


def test_the_grid_runs_all_commands_goes_on_and_reports_failures(tmp_path):
    (tmp_path / "a b").mkdir()
    listed, _ = run_all(tmp_path, "--list", "--quick").communicate()
    more, _ = run_all(tmp_path, "--list", "--quick", SEEDS="5").communicate()
    assert set(listed.split("\n")) < set(more.split("\n"))  # a grid can grow
    process = run_all(tmp_path, "--quick")
    while not (tmp_path / "log").exists() or len((tmp_path / "log").read_text().split("\n")) < 9:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (tmp_path / "log").unlink()
    process = run_all(tmp_path, "--quick", FLAGS="--epochs 1", OMP_NUM_THREADS="")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out.endswith("tables\n") and "FAILED" not in err
    lines = (tmp_path / "log").read_text().splitlines()
    ran = [re.sub(r"^1 | --out.*", "", line) for line in lines if "--student" in line]
    assert sorted(set(ran)) == sorted(listed.split("\n")[:-1]) and "analyze.py" in lines[-1]
    taught = [place for place, line in enumerate(ran) if "--kd" in line]
    assert taught == list(range(min(taught), len(ran))) and len(taught) > 10
    assert all("--out" in line and "--epochs 1" in line for line in lines[:-1])
    assert (tmp_path / "a b" / "analysis.md").read_text() == "tables\n"
    process = run_all(tmp_path, "--quick", FAIL="2")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "some runs FAILED" in err and out.endswith("tables\n")
    assert "FAILED" in err and "--teacher cnn --student mlp --seed 1 --kd" in err
    full, _ = run_all(tmp_path, "--list").communicate()
    for line in (full + listed).splitlines():  # what is listed can be typed
        script, *flags = line.split()
        {"train_mnist.py": train_mnist, "train_sva.py": train_sva}[script].parse_arguments(
            [*flags, "--device", "cpu", "--out", str(tmp_path)])
    assert run_all(tmp_path, "--fast").wait() == 2


def test_the_commands_and_the_example_of_the_readme(tmp_path, monkeypatch):
    text = (HERE / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"python (train_mnist|train_sva)\.py(.*?)(?:#.*)?$", text, re.MULTILINE)
    for script, flags in commands:
        flags = flags.split(";")[0].replace("$T", "5").split("`")[0].split()
        {"train_mnist": train_mnist, "train_sva": train_sva}[script].parse_arguments(flags)
    assert len(commands) >= 6
    example, = re.findall(r"## Copying out.*?```python\n(.*?)```", text, re.DOTALL)
    teacher, student = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    x = random_logits(64, 5)
    loader = torch.utils.data.DataLoader(list(zip(x, x.argmax(1) % 3)), batch_size=16)
    before = F.mse_loss(student(x).softmax(1), teacher(x).softmax(1)).item()
    names = {"teacher": teacher, "student": student, "loader": loader}
    for _ in range(20):
        exec(example, names)
    after = F.mse_loss(names["student"](x).softmax(1), teacher(x).softmax(1)).item()
    assert after < 0.5 * before and 10 <= len(example.splitlines()) <= 16
