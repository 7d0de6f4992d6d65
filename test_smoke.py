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


def run(script, flags, out):
    """Train and return the folder of the run, the newest one."""
    small = SMALL if script is train_mnist else SVA_SMALL
    script.main([*small.split(), *flags.split(), "--out", str(out)])
    return max(out.glob("*/*/seed*"), key=lambda folder: folder.stat().st_mtime_ns)


def record_of(folder):
    return json.loads((folder / "run.json").read_text())


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_refused(capfd, expected, function, *arguments):
    with pytest.raises(SystemExit) as end:
        function(*arguments)
    message = capfd.readouterr().err + str(end.value.code)
    assert end.value.code not in (0, None) and expected in message, message


# ---- KD loss and metrics, against arithmetic by hand or by loops ---------------------------------


def test_kd_loss_is_the_formula():
    student, teacher = normal(2, 3, 4).double(), normal(2, 3, 4, seed=1).double()
    labels, t, alpha, total = torch.tensor([[0, 2, 1], [1, 3, 3]]), 3.0, 0.7, 0.0
    for i, j in itertools.product(range(2), range(3)):
        p, q, r = ((x[i, j] / d).exp() / (x[i, j] / d).exp().sum()
                   for x, d in ((teacher, t), (student, t), (student, 1)))
        total += alpha * t**2 * (p * (p / q).log()).sum() - (1 - alpha) * r[labels[i, j]].log()
    assert common.kd_loss(student, teacher, labels, t, alpha).item() == pytest.approx(total / 6)
    flat = student.view(6, 4), teacher.view(6, 4), labels.flatten()
    assert common.kd_loss(*flat, t, alpha).item() == pytest.approx(total / 6)


def test_kd_loss_identities():
    student, teacher = normal(10, 7).requires_grad_(), normal(10, 7, seed=1).requires_grad_()
    labels, sizes = torch.arange(10) % 7, []
    cross_entropy, one_hot = F.cross_entropy(student, labels), F.one_hot(labels, 7) * 1e4
    assert common.kd_loss(student, student, labels, 4).item() == pytest.approx(0, abs=1e-6)
    assert torch.allclose(common.kd_loss(student, teacher, labels, alpha=0), cross_entropy)
    assert torch.allclose(common.kd_loss(student, one_hot, labels), cross_entropy)
    for temperature in (20, 200):
        student.grad = None
        common.kd_loss(student, teacher, labels, temperature).backward()
        sizes.append(student.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05) and teacher.grad is None
    for wrong in ((student[:1], teacher, labels), (student, teacher, labels[:1])):
        with pytest.raises(AssertionError):  # nothing is broadcast
            common.kd_loss(*wrong)


def test_metrics_of_one_model():
    # By hand, 2 bins, (0, .5] and (.5, 1]: .5 (right) | .9 (right), .8 (wrong), .6 (right).
    p = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.1, 0], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    by_hand = 1 / 4 * abs(1 - 0.5) + 3 / 4 * abs(2 / 3 - (0.9 + 0.8 + 0.6) / 3)
    found = common.expected_calibration_error(p, torch.tensor([0, 0, 0, 2]), n_bins=2)
    assert found == pytest.approx(by_hand, abs=1e-6)
    logits, labels, ece = normal(500, 10) * 2, torch.arange(500) % 10, 0.0
    p, right = logits.softmax(1), (logits.argmax(1) == labels).numpy()
    for low in range(15):
        rows = [i for i in range(500) if low / 15 < p[i].max() <= (low + 1) / 15]
        ece += abs(sum(right[i] - p[i].max().item() for i in rows)) / 500
    nll = -np.mean([math.log(p[i, i % 10]) for i in range(500)])
    assert common.classification_metrics(logits, labels) == pytest.approx(
        {"accuracy": right.mean(), "ece": ece, "nll": nll}, abs=1e-6)


def test_comparisons_of_two_models():
    labels = torch.zeros(10, dtype=torch.long)
    a = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1, 1])  # right on 7
    b = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 0])  # 7 right, as a on 8; .7² + .3² = .58
    assert common.error_consistency(a, b, labels) == pytest.approx((0.8 - 0.58) / (1 - 0.58))
    assert common.error_consistency(labels, labels, labels) == 1  # no errors at all: no NaN
    with pytest.raises(AssertionError):
        common.error_consistency(a, b, labels[:, None])
    p, q = normal(50, 4).softmax(1), normal(50, 4, seed=1).softmax(1)
    m = (p + q) / 2
    by_kl = ((p * (p / m).log2()).sum(1) / 2 + (q * (q / m).log2()).sum(1) / 2).mean().item()
    assert common.js_divergence(p, q) == pytest.approx(by_kl, abs=1e-6)
    x, noise = normal(300, 6).double() + 0.3, normal(300, 6, seed=2).double()
    rotation = torch.linalg.qr(normal(6, 6, seed=1).double())[0]
    assert common.rsa(x, 3 * x @ rotation) == pytest.approx(1)
    assert common.linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1)
    assert common.rsa(torch.zeros(5, 2), noise[:5]) == 0  # dead units: no NaN
    wide = torch.cat([noise, x * noise], dim=1)  # the numbers of features may differ
    centring = torch.eye(300, dtype=torch.double) - 1 / 300
    k, l = (centring @ (z @ z.T) @ centring for z in (x, wide))  # HSIC by kernels: eq. 3
    by_kernels = ((k * l).sum() / (k.norm() * l.norm())).item()
    assert common.linear_cka(x, wide) == pytest.approx(by_kernels)
    cosines = [np.array([[F.cosine_similarity(u, v, 0) for v in z] for u in z])
               for z in (x[:8], wide[:8])]
    rows = [u @ v / np.linalg.norm(u) / np.linalg.norm(v) for u, v in zip(*cosines)]
    assert common.rsa(x[:8], wide[:8]) == pytest.approx(np.mean(rows))


# ---- Run files, names, bad input -----------------------------------------------------------------


def test_a_run_is_whole_or_absent_and_the_first_one_stays(tmp_path, monkeypatch, capfd):
    folder, model, config = tmp_path / "kind" / "seed0", torch.nn.Linear(1, 1), {"tag": 1}

    def save(tag, *_):
        record = {"config": {"tag": tag}, "loss": math.inf}
        common.save_run(folder, record, {"x": torch.arange(3)}, model)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Path, "rename", lambda *_: 1 / 0)  # interrupted
        save(1)
    assert not list(folder.parent.iterdir()) and common.find_run(folder, config) is None
    save(1)
    save(2)
    assert [path.name for path in folder.parent.iterdir()] == ["seed0"]
    assert common.find_run(folder, config) == {"config": config, "loss": None}  # valid JSON
    assert np.load(folder / "outputs.npz")["x"].tolist() == [0, 1, 2]
    assert common.load_weights(torch.nn.Linear(1, 1), folder).weight == model.weight
    assert_refused(capfd, "tag is 1, not 2", common.find_run, folder, {"tag": 2})
    for name, read in (("model.pt", lambda: common.load_weights(model, folder)),
                       ("run.json", lambda: common.find_run(folder, config))):
        (folder / name).write_bytes((folder / name).read_bytes()[:-9])
        assert_refused(capfd, "unreadable: delete", read)


@pytest.mark.parametrize("script, flags, name", [
    (train_mnist, "--kd --alpha 1 --temperature 20", "mlp-to-mlp"),
    (train_mnist, "--teacher cnn --kd online --epochs 24 --seed 3", "cnn-to-mlp-online"),
    (train_mnist, "--teacher cnn --kd --epochs 24", "cnn-to-mlp-epochs24"),  # a CNN has fewer
    (train_mnist, "--epochs 24 --lr 0.05", "mlp-lr0.05"),
    (train_mnist, "--teacher cnn --kd permuted --alpha 0.9 --teacher-seed 7 --temperature 5",
     "cnn-to-mlp-permuted-temperature5-alpha0.9-teacher-seed7"),
    (train_mnist, "--examples 3000 --teacher cnn --kd", "cnn-to-mlp-examples3000"),
    (train_sva, "--teacher lstm --kd --answers last", "lstm-to-transformer-seq-last"),
    (train_sva, "--kd --answers every --temperature 2", "transformer-seq-to-transformer-seq"),
    (train_sva, "--answers every --examples 300", "transformer-seq-examples300-every"),
    (train_sva, "--student transformer --kd --answers last", "transformer-to-transformer"),
    (train_sva, "--objective lm --teacher lstm --kd --batch-size 8",
     "lstm-to-transformer-seq-batch-size8")])
def test_a_runs_name_holds_each_flag_that_is_not_at_its_default(script, flags, name):
    args = script.parse_arguments([*flags.split(), "--device", "cpu", "--data", "synthetic"])
    args.files, args.available = {}, 750
    folder, config = script.configure(args)
    assert folder.parts[-2:] == (name, f"seed{args.seed}")
    for flag, value in re.findall(r"--(epochs|lr|temperature|alpha) (\S+)", flags):
        assert config[flag] == config.get(f"teacher_{flag}", float(value)) == float(value)
    related = script.relatives(args)
    if args.kd:
        assert related["untaught"] == related["plain"][args.student] != name
        assert related["self_taught"].startswith(f"{args.student}-to-{args.student}")
    if "3000" in name:
        assert [*related["plain"].values(), related["teacher"], related["permuted"]] == [
            "mlp-examples3000/seed0", "cnn-examples3000/seed0", "cnn-examples3000/seed1",
            "cnn-to-mlp-permuted-examples3000/seed0"]


@pytest.mark.parametrize("script, flags, expected", [
    (train_mnist, "--student rnn", "invalid choice"), (train_mnist, "--epochs 0", "--epochs must"),
    (train_mnist, "--teacher cnn", "--teacher has no effect without --kd"),
    (train_mnist, "--temperature 3", "--temperature has no effect without --kd"),
    (train_mnist, "--kd --seed 3 --teacher-seed 3", "must not be the student's own"),
    (train_mnist, "--device cuda:99", "error"), (train_mnist, "--out /proc/runs", "/proc/runs"),
    (train_sva, "--objective lm --student mine", "reads both ways"),
    (train_sva, "--answers every --kd --teacher transformer", "reads both ways"),
    (train_sva, "--objective lm --kd permuted", "for classifiers"), (analyze, "x", "no finished")])
def test_bad_input_is_one_line(capfd, monkeypatch, script, flags, expected):
    monkeypatch.setitem(train_sva.MODELS, "mine", train_sva.MODELS["transformer"])
    assert_refused(capfd, expected, script.main, flags.split())


# ---- Digits --------------------------------------------------------------------------------------


def data_arguments(**changes):
    return argparse.Namespace(**{"data": "auto", "examples": None, "data_dir": Path("nowhere"),
                                 "device": CPU, "objective": "classification"} | changes)


def test_mnist_is_split_and_its_absence_is_said(monkeypatch, capfd, tmp_path):
    from torchvision import datasets

    def mnist(root, train, download=False):  # image i is grey level i % 256
        numbers = torch.arange(60_000 if train else 10_000)
        images = (numbers % 256).byte()[:, None, None].expand(-1, 28, 28)
        return argparse.Namespace(data=images, targets=numbers % 10)

    monkeypatch.setattr(datasets, "MNIST", mnist)
    args = data_arguments()
    data = train_mnist.load_data(args)
    sizes = [len(y) for _, y in data.values()]
    assert args.data == "mnist" and sizes == [55_000, 5_000, 10_000, 10_000, 10_000]
    assert (data["validation"][0][0] == 55_000 % 256).all() and data["validation"][1][1] == 1
    monkeypatch.setattr(datasets, "MNIST", lambda *_, **__: 1 / 0)  # no network
    args = data_arguments(examples=60)
    assert len(train_mnist.load_data(args)["train"][1]) == 55 and args.data == "synthetic"
    assert "SYNTHETIC" in capfd.readouterr().err
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte").write_text("damaged")
    for args in (data_arguments(data="mnist"), data_arguments(data_dir=tmp_path)):
        assert_refused(capfd, "no MNIST in", train_mnist.load_data, args)


def test_translated_and_scaled_digits():
    data = train_mnist.load_data(data_arguments(data="synthetic", examples=240))
    (images, labels), seen = data["test"], Counter()
    assert images.dtype == torch.uint8 and 0.08 < images.float().mean() / 255 < 0.2  # MNIST: .131
    for image, moved in zip(images, data["translated"][0]):
        framed = F.pad(image, (3,) * 4)  # rolled, zeros move in
        seen.update(shift for shift in itertools.product((-3, 3), repeat=2)
                    if torch.equal(framed.roll(shift, (0, 1))[3:-3, 3:-3], moved))
    assert len(seen) == 4 and seen.total() == 40 and min(seen.values()) > 2
    for row, column in itertools.product(range(0, 28, 3), repeat=2):
        y, x = (row - 13.5) / 0.7 + 13.5, (column - 13.5) / 0.7 + 13.5
        expected = sum((1 - abs(y - i)) * (1 - abs(x - j)) * images[0, i, j].item()
                       for i in (math.floor(y), math.floor(y) + 1)
                       for j in (math.floor(x), math.floor(x) + 1) if 0 <= i < 28 and 0 <= j < 28)
        assert data["scaled"][0][0][row, column].item() == pytest.approx(expected, abs=0.02)
    assert all(torch.equal(data[test][1], labels) for test in train_mnist.TESTS)
    assert not torch.equal(images, data["train"][0][:40])


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
        folder = run(train_mnist, flags, out)
        runs[flags] = folder, [step for step in steps if len(step["images"]) == 48]
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
        for test in train_mnist.TESTS:  # of seven digits as of all: in eval mode
            with torch.no_grad():
                alone = model.eval()(train_mnist.to_input(data[test][0][:7]))
            logits = train_mnist.evaluate(model.train(), data[test][0], False)[0]
            assert torch.allclose(alone, logits[:7], atol=1e-4)
            assert np.allclose(outputs[f"{test}_logits"], logits, atol=1e-4)
            accuracy = (logits.argmax(dim=1) == data[test][1]).double().mean().item()
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
    steps = grid["--teacher cnn --kd online"][1]
    losses = [F.cross_entropy(step["soft"], step["labels"]).item() for step in steps]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])  # the online teacher learns


def test_a_finished_run_is_not_repeated_and_a_repeated_one_is_equal(grid, tmp_path, capsys):
    old = grid["--teacher cnn --kd"][0]
    shutil.copytree(old.parents[1], tmp_path / old.parts[-3])
    folder = tmp_path / Path(*old.parts[-3:])
    before = (folder / "run.json").read_bytes()
    run(train_mnist, "--teacher cnn --kd", tmp_path)
    out, scaled = capsys.readouterr().out, record_of(folder)["metrics"]["scaled"]
    assert (folder / "run.json").read_bytes() == before and "is finished" in out
    assert f"{scaled['accuracy']:.4f} / {scaled['ece']:.4f}" in out and "untaught twin" in out
    shutil.rmtree(folder)
    run(train_mnist, "--teacher cnn --kd", tmp_path)  # its teacher is loaded now
    assert record_of(folder)["metrics"] == json.loads(before)["metrics"]


# ---- Sentences -----------------------------------------------------------------------------------


def test_the_grammar_counted_again_from_the_words_alone():
    parts, nouns = train_sva.synthetic_sentences(600), set(train_sva.WORDS["N"])
    assert parts == train_sva.synthetic_sentences(600) and len(parts["train"]) == 600
    guesses = []
    for name, sentence in [(name, sentence) for name, part in parts.items() for sentence in part]:
        words, plural = sentence.text.split(), sentence.plural
        assert words[sentence.verb].endswith("s") is not plural
        begin = sentence.verb - sentence.distance  # of the subject, at its head
        before = [(i, word.endswith("s")) for i, word in enumerate(words[:sentence.verb])
                  if word.removesuffix("s") in nouns]
        others = [number is not plural for i, number in before if i > begin]
        assert (begin, plural) in before and sentence.attractors == sum(others)
        assert name != "test" or all(others)
        if name == "test" and sentence.attractors:
            guesses.append([before[0][1] is plural, before[-1][1] is plural])
    assert (np.mean(guesses, axis=0) < 0.7).all()  # neither the first nor the last noun tells
    groups = Counter(min(sentence.attractors, 4) for sentence in parts["test"])
    assert groups == dict.fromkeys(range(5), 240)
    assert 0.75 < sum(s.attractors == 0 for s in parts["train"]) / 600 < 0.85
    seen = {train_sva.before_verb(sentence) for sentence in parts["train"]}
    assert not seen & {train_sva.before_verb(s) for s in parts["test"] + parts["validation"]}


HEADER = "x\tsentence\tverb_index\tverb_pos\tn_intervening\tn_diff_intervening\tdistance\n"
ROWS = ["-\tthe key near the cats is here\t6\tVBZ\t1\t1\t\n", "-\tkeys VBP here\t2\tVBP\t0\t0\t1\n",
        "-\tthe key near the cats VBZ here\t6\tVBZ\t2\t1\t4\n", "-\tkeys are it\t2\tVBP\t0\t0\t1\n"]


def test_both_layouts_of_real_sentences_are_read(tmp_path, capfd):
    for name in ("train", "validation", "test"):
        rows = ROWS if name != "test" else [row.replace("near", "whale") for row in ROWS]
        (tmp_path / f"{name}.tsv").write_text(HEADER + "".join(rows))
    args = data_arguments(data_dir=tmp_path)
    data = train_sva.load_data(args)
    assert (args.data, args.available, len(args.files)) == ("linzen", 4, 3)
    for column, expected in (("attractors", [1, 0, -1, 0]), ("labels", [0, 1, 0, 1]),
                             ("distance", [-1, 1, 4, 1]), ("answer_at", [4, 0, 4, 0])):
        assert data["test"][column].tolist() == expected  # -1: not all are attractors; unknown
    assert data["test"]["tokens"][0, 2] == train_sva.UNKNOWN  # no training sentence has "whale"
    args = data_arguments(data_dir=tmp_path, objective="lm")
    lm = train_sva.load_data(args)["train"]
    assert args.tokens == 4 + 11 and lm["lengths"].tolist() == [9, 5, 9, 5]  # START, all, END
    for row, label in enumerate((0, 1, 0, 1)):
        shown = lm["tokens"][row, lm["answer_at"][row] + 1].item()
        assert shown == lm["forms"][row, label] != lm["forms"][row, 1 - label]
    assert torch.equal(lm["forms"][0], lm["forms"][3])  # is, are
    assert torch.equal(lm["forms"][1], lm["forms"][2])  # VBZ, VBP: verbs that stand as their tag
    flags = f"--data linzen --data-dir {tmp_path} --out {tmp_path} --epochs 1 --batch-size 2"
    train_sva.main(flags.split())
    with open(tmp_path / "test.tsv", "a") as file:
        file.write(ROWS[0])  # other files under the same name are another run
    assert_refused(capfd, "its files is", train_sva.main, flags.split())
    for text in (HEADER.replace("verb_pos", "tag"), HEADER + "a\tb\n", HEADER + ROWS[1].replace(
            "2", "1")):
        (tmp_path / "test.tsv").write_text(text)
        assert_refused(capfd, "test.tsv, line", train_sva.load_data, args)
    rows = [ROWS[0].replace("key", f"key{i}") for i in range(200)]
    (tmp_path / "one").mkdir()
    table = tmp_path / "one" / train_sva.TABLE
    table.write_bytes(gzip.compress((HEADER + "".join(rows)).encode()))
    args = data_arguments(data_dir=tmp_path / "one")
    parts = train_sva.load_sentences(args)
    assert [len(part) for part in parts.values()] == [20, 2, 178] and len(args.files) == 1
    assert len({sentence.text for part in parts.values() for sentence in part}) == 200
    args.examples = 10
    assert len(train_sva.load_sentences(args)["train"]) == 10 and args.available == 20
    args.examples = 21
    assert_refused(capfd, "there are 20", train_sva.load_sentences, args)
    args = data_arguments(examples=50)
    assert len(train_sva.load_sentences(args)["train"]) == 50 and args.data == "synthetic"
    assert "SYNTHETIC" in capfd.readouterr().err


def test_other_form_of_a_verb():
    known = {"goes", "go", "tries", "try", "sees", "see", "'", "s"}
    for singular, plural in (("goes", "go"), ("tries", "try"), ("sees", "see")):
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
        assert lengths[batches].sum() / longest.sum() > 0.92
        seen.append(batches.flatten())
    assert len(torch.cat(seen).unique()) == 6000 and not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("name", train_sva.MODELS)
@torch.no_grad()
def test_padding_has_no_influence_and_only_the_class_token_sees_both_sides(name):
    model = train_sva.build_model(name, 0, 20, "classification", CPU).eval()
    tokens = normal(2, 7).mul(99).long() % 16 + 4
    tokens[0, 5:] = train_sva.PAD
    before, changed = model.states(tokens), tokens.clone()
    assert torch.allclose(model.states(tokens[:1, :5]), before[:1, :5], atol=1e-5)
    changed[:, 4] = (changed[:, 4] - 3) % 16 + 4
    after = model.states(changed)
    assert (before[:, 4] - after[:, 4]).abs().amax(dim=1).min() > 1e-4
    assert torch.allclose(before[:, :4], after[:, :4], atol=1e-5) is (name != "transformer")
    assert name != "ut-seq" or len(model.blocks) == 1 < model.layers  # one layer shared


VOCABULARY = {"a": 4, "b": 5, "c": 6, "bs": 7}
SENTENCES = [train_sva.Sentence("a c a b c", 3, True, 0, 1), train_sva.Sentence(
    "c bs a", 1, False, 1, 2), train_sva.Sentence("a a bs c", 2, False, 4, 3)]


@torch.no_grad()
def test_classifiers_answers_against_a_loop():
    model = train_sva.build_model("lstm", 0, 20, "classification", CPU).eval()
    split = train_sva.encode(SENTENCES, VOCABULARY, "classification")
    logits = [[model.head(model.states(torch.tensor([words[:place]]))[0, -1])
               for place in range(1, len(words) + 1)] for words in ([4, 6, 4], [6], [4, 4])]
    last, cached = torch.stack([row[-1] for row in logits]), train_sva.answer_every_word(
        model.train(), split, False, CPU)
    for row, expected in zip(cached, logits):
        assert torch.allclose(row[:len(expected)], torch.stack(expected), atol=1e-6)
    for answers, expected, labels in (("every", torch.stack(sum(logits, [])), [1, 1, 1, 0, 0, 0]),
                                      ("last", last, [1, 0, 0])):
        tokens, where, right = train_sva.questions(split, answers)
        found = model.eval().head(train_sva.read(model, tokens, where))
        assert torch.allclose(found, expected, atol=1e-6) and right.tolist() == labels
    found, loss = train_sva.evaluate(model.train(), split, "classification", False, CPU)
    assert torch.allclose(found, last, atol=1e-6)
    assert loss == pytest.approx(F.cross_entropy(last, split["labels"]).item())
    states = train_sva.represent(model.train(), split, False, CPU)
    assert torch.allclose(model.head(states), last, atol=1e-6)


@torch.no_grad()
def test_a_language_model_scores_words_and_verb_forms_like_a_loop(monkeypatch):
    monkeypatch.setattr(train_sva, "WORDS_AT_ONCE", 4)
    model = train_sva.build_model("transformer-seq", 0, 20, "lm", CPU)
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


@pytest.fixture
def small_models(monkeypatch):
    Transformer = functools.partial(train_sva.Transformer, width=16, layers=1)
    monkeypatch.setattr(train_sva, "MODELS", {
        "lstm": functools.partial(train_sva.LSTM, width=16, dropout=0.0),
        "transformer": functools.partial(Transformer, causal=False), "transformer-seq": Transformer})


def test_setups_of_sentences_see_the_same_batches_and_the_teachers_answers(
        tmp_path, monkeypatch, small_models):
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
        folder = run(train_sva, flags, tmp_path)
        record, steps = record_of(folder), seen[-6:]  # 2 epochs of 120 // 32 batches
        config = record["config"]
        batches = first.setdefault(config["objective"], [step["tokens"] for step in steps])
        for tokens, step in zip(batches, steps, strict=True):
            words = len(step["where"]) if "lm" in flags else int((tokens != 0).sum())
            assert torch.equal(tokens, step["tokens"])
            assert len(step["where"]) == (words if every else 32)  # or one a sentence
        if "--kd" in flags:
            teacher = train_sva.build_model(config["teacher"], 5, record["sizes"]["tokens"],
                                            config["objective"], CPU).eval()
            common.load_weights(teacher, folder.parents[1] / record["teacher"])
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


def test_parts_of_a_language_models_batch_add_up_and_online_both_learn(
        tmp_path, monkeypatch, small_models):
    losses = []
    for at_once, kd in itertools.product((10**6, 50), ("--kd", "--kd online")):
        monkeypatch.setattr(train_sva, "WORDS_AT_ONCE", at_once)
        flags = f"--objective lm --student lstm --epochs 20 --lr 0.03 {kd}"
        record = record_of(run(train_sva, flags, tmp_path / str(at_once)))
        losses.append([entry["loss"] for entry in record["history"]])
        for metrics in (record["teacher_metrics"], record["metrics"]):
            assert metrics["test"]["perplexity"] < 25  # of 49 tokens
    assert np.allclose(losses[:2], losses[2:], atol=1e-3)


# ---- Analysis ------------------------------------------------------------------------------------


def made_up_runs(seeds):
    """Runs that were never trained, of MNIST's models."""
    runs = []
    for kind, seed in itertools.product(("cnn", "mlp", "cnn-to-mlp", "mlp-to-mlp", "mlp-to-cnn",
                                         "cnn-to-mlp-permuted", "mlp-lr1"), range(seeds)):
        made = analyze.Run.__new__(analyze.Run)
        *teacher, student = re.sub("-permuted|-lr1", "", kind).split("-to-")
        kd = "permuted" if "permuted" in kind else "offline" if teacher else None
        made.kind, made.seed, made.key, made.student = kind, seed, f"{kind}/seed{seed}", student
        made.config = {"kd": kd, "teacher": teacher[0] if teacher else None}
        made.record = {"plain": {model: f"{model}/seed{seed}" for model in ("mlp", "cnn")}}
        if teacher:
            made.record |= {"untaught": f"{student}/seed{seed}",
                            "teacher": f"{teacher[0]}/seed{seed + 1}",
                            "self_taught": f"{student}-to-{student}/seed{seed}",
                            "permuted": f"{teacher[0]}-to-{student}-permuted/seed{seed}"}
        runs.append(made)
    return runs


TAUGHT = "cnn-to-mlp"
HIGHER = [  # for each claim but "changes little", in order: the kind with more in a column if it is true
    ("OOD: accuracy", "cnn", "mlp"), ("OOD: accuracy", TAUGHT, "mlp"),
    ("OOD: accuracy", TAUGHT, "mlp-to-mlp"), ("OOD: accuracy", TAUGHT, "cnn-to-mlp-permuted"),
    ("OOD: ece", "mlp", TAUGHT), ("other strong: kappa", TAUGHT, "mlp"),
    ("other strong: CKA", TAUGHT, "mlp"), ("other strong: RSA", TAUGHT, "mlp"),
    ("other strong: path distance", "mlp", TAUGHT), ("solutions: barrier", TAUGHT, "mlp-to-mlp"),
    ("solutions: prediction spread", "mlp", "cnn"),
    ("solutions: representation spread", "mlp", "cnn")]


def test_every_claim_reads_the_right_runs_the_right_way_round():
    runs, names = made_up_runs(4), [claim for claim, _, sign, *_ in analyze.CLAIMS if sign]
    little, = {claim for claim, *_ in analyze.CLAIMS} - set(names)
    cases = [(name, *higher, change, verdict) for name, higher in zip(names, HIGHER, strict=True)
             for change, verdict in ((1, "supported"), (-1, "contradicted"))]
    cases += [(little, "own kind: CKA", "mlp-to-mlp", "mlp", change, verdict) for change, verdict in (
        (0.01, "supported"), (0.2, "contradicted"), (-0.2, "contradicted"))]
    for name, column, high, low, change, verdict in cases:
        rows = {each.key: {column: 50.0 + each.seed + change * (each.kind == high)
                           + 1e-4 * each.seed**2 * (each.kind == low)} for each in runs}
        found, = [claim for claim in analyze.test_claims(runs, rows) if claim["claim"] == name]
        assert found["verdict"] == verdict and {found["one"], found["against"]} == {high, low}
        assert sorted(found["values"]) == [0, 1, 2, 3]


def test_verdicts_are_wrong_as_often_as_they_should_and_the_answer(capsys):
    random, runs, verdicts = np.random.default_rng(0), made_up_runs(4), Counter()
    for _ in range(300):
        rows = {each.key: {column: random.normal() for column, *_ in HIGHER} for each in runs}
        verdicts.update(claim["verdict"] for claim in analyze.test_claims(runs, rows))
    assert 0.03 < 1 - verdicts["inconclusive"] / verdicts.total() < 0.07
    generator = torch.Generator().manual_seed(0)
    for n, features in itertools.product((3, 4, 8), (1, 30)):
        weak, strong = torch.randn(2, 500, n, features, generator=generator).double()
        spread = torch.cdist(weak, weak).square() - torch.cdist(strong, strong).square()
        found = [analyze.t_test(analyze.jackknife(pairs).tolist(), 1)[2] for pairs in spread]
        assert found.count("inconclusive") >= 460, (n, features)
    mean, half, _ = analyze.t_test([1.0, 2.0, 3.0, 4.0], 1)  # tabulated: t(3) = 3.182
    assert (mean, half) == pytest.approx((2.5, 3.182 * 0.645497), abs=1e-3)
    assert analyze.t_test([1.0, 1.0], 1)[2] == "untested"
    rows = {each.key: {"OOD: accuracy": {"cnn": 0.9, TAUGHT: 0.5}.get(each.kind, 0.1)
                       + 1e-3 * each.seed * (each.kind != "mlp")} for each in runs}
    analyze.print_answer(analyze.test_claims(runs, rows))
    out = capsys.readouterr().out
    assert "0.50 of the gap between mlp and cnn (+0.80" in out
    assert "- teaching improves accuracy: +0.40" in out and out.count("supported") == 3


def test_reference_models_are_neither_teachers_nor_twins():
    runs = made_up_runs(5)
    for each in runs:
        found = {whose: [other.key for other in others]
                 for whose, others in analyze.references(each, runs).items()}
        away = [seed for seed in range(5) if seed not in (each.seed, each.seed + 1)]
        assert found["own kind"] == [f"{each.student}/seed{seed}" for seed in away]
        assert found["other strong"] == [f"cnn/seed{seed}" for seed in away]
        teacher = [each.record["teacher"]] if each.seed < 4 and each.config["kd"] else []
        assert found["own teacher"] == teacher
    runs[10].record["teacher"] = "cnn/seed3"  # by --teacher-seed
    assert "cnn/seed3" not in [o.key for o in analyze.references(runs[10], runs)["other strong"]]


def test_barrier_and_mds():
    model, heights = torch.nn.Linear(1, 1), iter([1.0, *[2.0] * 19, 1.5])
    state = model.state_dict()
    assert analyze.barrier(model, state, state, lambda _: next(heights)) == pytest.approx(0.975)
    images, labels = train_mnist.synthetic_digits(300, seed=0)
    x, model = train_mnist.to_input(images), train_mnist.build_model("mlp", 0, CPU)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
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
    assert analyze.barrier(model, state, permuted, measure) > 0.02
    distances = torch.cdist(normal(12, 2).double(), normal(12, 2).double())
    found = analyze.classical_mds(distances)
    assert torch.allclose(torch.cdist(found, found), distances, atol=1e-9)


def test_the_analysis_of_a_grid(grid, tmp_path, capsys, monkeypatch):
    root = shutil.copytree(grid[""][0].parents[1], tmp_path / "a" / "mnist-synthetic")
    self_taught, plain, cnn = (grid[f][0].parts[-2] for f in ("--kd", "", "--student cnn"))
    # A student with its teacher's outputs is found out; a damaged run is left out.
    shutil.copy(root / plain / "seed1" / "outputs.npz", root / self_taught / "seed0")
    shutil.copytree(root / plain, tmp_path / "b" / "mnist-synthetic" / plain)
    (root / cnn / "seed0" / "outputs.npz").write_bytes(b"PK")
    ends, load_weights = [], common.load_weights
    monkeypatch.setattr(common, "load_weights", lambda model, folder: (
        ends.append("/".join(folder.parts[-2:])), load_weights(model, folder))[1])
    with_plots = analyze.importlib.util.find_spec("matplotlib")
    plots = ["--plots", str(tmp_path / "figures")] if with_plots else []
    analyze.main([str(tmp_path), "--csv", str(tmp_path / "all.csv"), *plots])
    out, err = capsys.readouterr()
    with open(tmp_path / "all.csv", encoding="utf-8") as file:
        rows = {(row["group"], row["run"], row["seed"]): row for row in csv.DictReader(file)}
    assert len(rows) == 9 + 2 and cnn in err and "unreadable" in err
    found = rows["a/mnist-synthetic", self_taught, "0"]
    for name, value in zip(analyze.COMPARISONS, (1, 1, 0, 1, 1, 0)):
        assert float(found[f"own teacher: {name}"]) == pytest.approx(value, abs=1e-4)
    row, means = rows["b/mnist-synthetic", plain, "0"], []
    for seed in (0, 1):
        metrics = record_of(root / plain / f"seed{seed}")["metrics"]
        means.append((metrics["scaled"]["accuracy"] + metrics["translated"]["accuracy"]) / 2)
    assert float(row["OOD: accuracy"]) == pytest.approx(means[0]) and row["role"] == "plain"
    assert f"| {np.mean(means):.3f}±{np.std(means, ddof=1):.3f} |" in re.sub(" +", " ", out)
    assert "## a/mnist-synthetic" in out and "## b/mnist-synthetic" in out
    sweep = re.search(r"OOD accuracy over temperature.*\n\n(.*)\n.*\n(.*)\n", out)
    assert re.findall(r"\d+\.\d", sweep[1]) == ["5.0", "20.0"] and TAUGHT in sweep[2]
    pairs = set(zip(ends[::2], ends[1::2]))
    assert pairs >= {(f"{plain}/seed0", f"{self_taught}/seed0"), (f"{plain}/seed1", f"{plain}/seed0")}
    assert not plots or len(list((tmp_path / "figures").glob("[ab]-mnist-synthetic-*.png"))) == 5
    monkeypatch.setattr(analyze.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit):
        analyze.main([str(tmp_path), "--plots", str(tmp_path)])
    assert "pip install matplotlib" in capsys.readouterr().err


# ---- The programs as a user starts them ----------------------------------------------------------


def start(folder, *command, **variables):
    return subprocess.Popen(command, cwd=folder, env=os.environ | variables, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def test_title_commands_alone_in_a_folder_and_a_killed_run_leaves_nothing(tmp_path):
    for name in ("train_mnist.py", "train_sva.py", "common.py"):
        shutil.copy(HERE / name, tmp_path)
    *titles, endless = [start(tmp_path, sys.executable, "-u", *command.split()) for command in (
        f"train_mnist.py --teacher cnn --student mlp --kd {SMALL}",
        f"train_sva.py --teacher lstm --student transformer-seq --kd {SVA_SMALL}",
        f"train_mnist.py {SMALL} --epochs 100000")]
    for process in titles:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and err == "" and "teacher" in out and "s left" in out
        assert "untaught twin   not there yet: the same command without --kd" in out
    while not endless.stdout.readline().startswith("epoch"):
        assert endless.poll() is None
    endless.send_signal(signal.SIGKILL)
    endless.wait()
    runs = [path.parts[-3] for path in tmp_path.rglob("run.json")]
    assert len(runs) == 4 and not [name for name in runs if "100000" in name]


STUB = """#!/bin/sh
echo "$OMP_NUM_THREADS $*" >> "$LOG"
case "$*" in *analyze.py*) echo tables ;; *"--teacher cnn"*) sleep 0.01; exit "$FAIL" ;; esac
"""


def test_the_grid_runs_all_commands_goes_on_and_reports_failures(tmp_path):
    stub, log, out = tmp_path / "my python", tmp_path / "log", tmp_path / "a b"
    stub.write_text(STUB)  # it notes its arguments
    stub.chmod(0o755)
    out.mkdir()

    def grid(*arguments, **variables):
        return start(HERE, "./run_all.sh", *arguments, **{
            "PYTHON": str(stub), "LOG": str(log), "OUT": str(out), "SEEDS": "2", "FAIL": "0",
            "OMP_NUM_THREADS": ""} | variables)

    listed = grid("--list", "--quick").communicate()[0].splitlines()
    more = grid("--list", "--quick", SEEDS="5").communicate()[0].splitlines()
    assert set(listed) < set(more)  # a grid can grow
    killed = grid("--quick")
    while not log.exists() or len(log.read_text().splitlines()) < 9:
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    log.unlink()
    process = grid("--quick", FLAGS="--epochs 1")
    printed, err = process.communicate(timeout=60)
    assert process.returncode == 0 and printed.endswith("tables\n") and err == ""
    *lines, last = log.read_text().splitlines()
    assert "analyze.py" in last and (out / "analysis.md").read_text() == "tables\n"
    assert all(f"--out {out}" in line and line.endswith("--epochs 1") for line in lines)
    ran = [re.sub(r"^1 | --out.*", "", line) for line in lines]
    assert set(ran) == set(listed) and len(listed) == len(set(listed)) > 20
    taught = [place for place, line in enumerate(ran) if "--kd" in line]
    assert taught == list(range(min(taught), len(ran)))  # after all plain ones
    process = grid("--quick", FAIL="2")
    printed, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "some runs FAILED" in err and printed.endswith("tables\n")
    assert "FAILED" in err and "--teacher cnn --student mlp --seed 1 --kd" in err
    for line in listed + grid("--list").communicate()[0].splitlines():  # what is listed can be typed
        script, *flags = line.split()
        sys.modules[script.removesuffix(".py")].parse_arguments([*flags, "--out", str(tmp_path)])
    assert grid("--fast").wait() == 2


def test_the_commands_and_the_example_of_the_readme(tmp_path, monkeypatch):
    text = (HERE / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^ *python (train_\w+)\.py([^#\n]*)", text, re.MULTILINE)
    for script, flags in commands:
        sys.modules[script].parse_arguments(flags.replace("$T", "5").split())
    example, = re.findall(r"## Copying out.*?```python\n(.*?)```", text, re.DOTALL)
    teacher, student, x = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3), normal(64, 5)
    loader = torch.utils.data.DataLoader(list(zip(x, x.argmax(1) % 3)), batch_size=16)
    gap = [F.mse_loss(student(x).softmax(1), teacher(x).softmax(1)).item()]
    exec(example, {"teacher": teacher, "student": student, "loader": loader})
    gap.append(F.mse_loss(student(x).softmax(1), teacher(x).softmax(1)).item())
    assert gap[1] < gap[0] and len(commands) > 6 and 10 <= len(example.splitlines()) <= 15
