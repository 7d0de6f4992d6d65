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
SMALL = "--data synthetic --examples 600 --epochs 3 --batch-size 50 --no-amp --device cpu"
SVA_SMALL = "--data synthetic --examples 120 --epochs 2 --batch-size 32 --no-amp --device cpu"
SUFFIX = "-examples600-epochs3-batch-size50"


def mnist(flags, out):
    train_mnist.main([*flags.split(), *SMALL.split(), "--out", str(out)])


def sva(flags, out):
    train_sva.main([*SVA_SMALL.split(), *flags.split(), "--out", str(out)])


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
    words = ("transformer", "answers", "objective")
    script = train_sva if any(word in flags for word in words) or "lstm" in flags else train_mnist
    args = script.parse_arguments([*flags.split(), "--device", "cpu", "--data", "synthetic"])
    args.files, args.available = {}, 750
    folder, config = script.configure(args)
    assert folder.parts[-2:] == (name, f"seed{args.seed}")
    expected = {"epochs": "24" in flags or None, "lr": 0.05 if "lr" in flags else None}
    assert expected["lr"] in (None, config["lr"]) and config["seed"] == args.seed
    if "epochs 24" in flags:
        assert config["epochs"] == 24 and config.get("teacher_epochs", 24) == 24
    if args.kd:
        related = script.relatives(args)
        assert related["untaught"] == related["plain"][args.student]
        assert "-to-" not in related["untaught"] and related["untaught"].endswith(f"seed{args.seed}")
        if args.kd != "online":
            assert re.fullmatch(rf"{args.teacher}\b.*/seed{args.teacher_seed}", related["teacher"])
        assert related["self_taught"].startswith(f"{args.student}-to-{args.student}")
        for flag in ("epochs24", "examples3000"):
            assert all((flag in path) == (flag in name) for path in (
                related["self_taught"], related.get("teacher", name), related["permuted"]))


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
    """All setups of digits, watched: (folder, {run: [what went into each step]})."""
    out, seen, batches = tmp_path_factory.mktemp("grid"), {}, []
    patch, kd_loss, to_input = pytest.MonkeyPatch(), common.kd_loss, train_mnist.to_input

    def watched_loss(student, teacher, labels, temperature, alpha):
        batches[-1].update(soft=teacher.detach(), labels=labels, flags=(temperature, alpha))
        return kd_loss(student, teacher, labels, temperature, alpha)

    def watched_input(images):
        batches.append({"images": images})
        return to_input(images)

    patch.setattr(common, "kd_loss", watched_loss)
    patch.setattr(train_mnist, "to_input", watched_input)
    for flags in ("--seed 1", "--student cnn --seed 1", "--student cnn", "", "--kd",
                  "--teacher cnn --kd", "--teacher cnn --kd permuted", "--teacher cnn --kd online",
                  "--student cnn --teacher mlp --kd", "--teacher cnn --kd --temperature 5"):
        batches.clear()
        mnist(flags, out)
        name = max(out.glob("*/*/seed*"), key=lambda folder: folder.stat().st_mtime_ns)
        steps = [batch for batch in batches if len(batch["images"]) == 50]
        seen[name.parts[-2].replace(SUFFIX, "") + "/" + name.name] = steps[-33 - 1:]
    patch.undo()
    return out / "mnist-synthetic", seen
