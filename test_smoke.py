"""Tests: `pytest -q test_smoke.py`. No network, no files from elsewhere; metrics are held against other arithmetic."""

import contextlib
import gzip
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import analyze
import common
import train_mnist
import train_sva

HERE = Path(__file__).parent
QUICK = ["--data", "synthetic", "--examples", "600", "--epochs", "3", "--device", "cpu"]
SETUPS = {"mlp": ["--student", "mlp"],
          "cnn": ["--student", "cnn"],
          "mlp-to-mlp": ["--student", "mlp", "--kd"],
          "cnn-to-cnn": ["--student", "cnn", "--kd"],
          "cnn-to-mlp": ["--teacher", "cnn", "--student", "mlp", "--kd"],
          "mlp-to-cnn": ["--teacher", "mlp", "--student", "cnn", "--kd"],
          "cnn-to-mlp-online": ["--teacher", "cnn", "--student", "mlp", "--kd", "online"],
          "mlp-to-mlp-online": ["--student", "mlp", "--kd", "online"]}


def mnist(*arguments):
    """train_mnist.py with these arguments, in this process, ended as from the shell."""
    common.run_main(train_mnist.main, [str(argument) for argument in arguments])


def random_logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------------------
# KD loss


def test_kd_loss_is_the_formula():
    student, teacher, labels = random_logits(4, 3), random_logits(4, 3, seed=1), [0, 2, 1, 1]
    temperature, alpha, total = 3.0, 0.7, 0.0

    def softmax(row, t):
        exponentials = [math.exp(value / t) for value in row]
        return [value / sum(exponentials) for value in exponentials]

    for s, t, label in zip(student.tolist(), teacher.tolist(), labels):
        p, q = softmax(t, temperature), softmax(s, temperature)
        divergence = sum(a * math.log(a / b) for a, b in zip(p, q))
        total += alpha * temperature**2 * divergence - (1 - alpha) * math.log(softmax(s, 1)[label])
    assert common.kd_loss(student, teacher, torch.tensor(labels), temperature, alpha).item() == pytest.approx(total / 4)


def test_kd_loss_identities():
    student, teacher, labels = random_logits(2, 5, 7), random_logits(2, 5, 7, seed=1), torch.arange(10).view(2, 5) % 7
    cross_entropy = F.cross_entropy(student.view(10, 7), labels.view(10))
    one_hot = torch.full((2, 5, 7), -math.inf).scatter(2, labels.unsqueeze(2), 0.0)
    assert common.kd_loss(student, student, None, temperature=4).item() == pytest.approx(0, abs=1e-6)
    assert torch.allclose(common.kd_loss(student, None, labels, alpha=0), cross_entropy)
    assert torch.allclose(common.kd_loss(student, one_hot, labels), cross_entropy)
    sizes = []
    for temperature in (20, 200):
        z = student.clone().requires_grad_()
        common.kd_loss(z, teacher, labels, temperature).backward()
        sizes.append(z.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05) and sizes[0] > 0.01


def test_kd_loss_masked_positions_and_teacher_get_no_gradient():
    student, teacher = random_logits(2, 3, 4).requires_grad_(), random_logits(2, 3, 4, seed=1)
    labels, mask = torch.zeros(2, 3, dtype=torch.long), torch.tensor([[1, 1, 0], [1, 0, 0]])
    teacher[0, 2], labels[1, 1] = math.nan, -100
    teacher.requires_grad_()
    loss = common.kd_loss(student, teacher, labels, 2.0, 0.5, mask)
    loss.backward()
    kept = mask.bool()
    assert loss.item() == pytest.approx(common.kd_loss(student[kept], teacher[kept], labels[kept], 2.0, 0.5).item())
    assert (student.grad[~kept] == 0).all() and (student.grad[kept].abs().sum(dim=1) > 0).all() and teacher.grad is None
    assert common.kd_loss(student, teacher, labels, mask=torch.zeros(2, 3)).item() == 0
    for wrong in ({"temperature": 0}, {"alpha": 1.5}, {"teacher_logits": teacher[..., :3]}):
        with pytest.raises(ValueError):
            common.kd_loss(**{"student_logits": student, "teacher_logits": teacher, "labels": labels, **wrong})


# ----------------------------------------------------------------------------------------------------------------------
# Metrics


def test_expected_calibration_error():
    # Worked by hand, 2 bins, (0, .5] and (.5, 1]: confidences .5 (right) | .9 (right), .8 (wrong), .6 (right).
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.1, 0], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    labels = torch.tensor([0, 0, 0, 2])
    by_hand = 1 / 4 * abs(1 - 0.5) + 3 / 4 * abs(2 / 3 - (0.9 + 0.8 + 0.6) / 3)
    assert common.expected_calibration_error(probabilities, labels, n_bins=2) == pytest.approx(by_hand, abs=1e-6)

    probabilities, labels = random_logits(500, 10).mul(2).softmax(1), torch.arange(500) % 10
    expected = 0.0
    for low in range(15):
        rows = [i for i in range(500) if low / 15 < probabilities[i].max() <= (low + 1) / 15]
        if rows:
            right = sum(int(probabilities[i].argmax() == labels[i]) for i in rows) / len(rows)
            expected += len(rows) / 500 * abs(right - sum(probabilities[i].max().item() for i in rows) / len(rows))
    assert common.expected_calibration_error(probabilities, labels) == pytest.approx(expected, abs=1e-6)
    assert common.expected_calibration_error(F.one_hot(labels).float(), labels) == 0


def test_error_consistency():
    labels = torch.zeros(10, dtype=torch.long)
    a = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1, 1])  # right on 7
    b = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 0])  # right on 7, as a on 8 of 10: expected .7*.7 + .3*.3 = .58
    assert common.error_consistency(a, b, labels) == pytest.approx((0.8 - 0.58) / (1 - 0.58))
    assert common.error_consistency(a, a, labels) == 1
    assert common.error_consistency(labels, labels, labels) == 1  # no errors at all: no NaN
    assert common.error_consistency(labels, a, labels) == pytest.approx(0)
    assert common.error_consistency(1 - labels, labels, labels) == pytest.approx(0)
    assert common.error_consistency(torch.tensor([0, 1]), torch.tensor([1, 0]), labels[:2]) == pytest.approx(-1)


def test_js_divergence():
    a, b = torch.tensor([[1.0, 0]]), torch.tensor([[0.5, 0.5]])
    entropy_of_mean = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert common.js_divergence(a, b) == pytest.approx(entropy_of_mean - 0.5)
    assert common.js_divergence(a, a) == 0 and common.js_divergence(a, a.flip(1)) == pytest.approx(1)
    p, q = random_logits(50, 4).softmax(1), random_logits(50, 4, seed=1).softmax(1)
    m = (p + q) / 2
    by_kl = ((p * (p / m).log2()).sum(1) / 2 + (q * (q / m).log2()).sum(1) / 2).mean().item()
    assert common.js_divergence(p, q) == pytest.approx(by_kl, abs=1e-6) == common.js_divergence(q, p)


def test_rsa_and_linear_cka():
    x = random_logits(300, 6).double() + 0.3
    rotation = torch.linalg.qr(random_logits(6, 6, seed=1).double())[0]
    noise, wide = random_logits(300, 6, seed=2).double(), torch.cat([x, torch.zeros(300, 2)], dim=1)
    assert common.rsa(x, 3 * x @ rotation) == pytest.approx(1) == common.rsa(x, wide)
    assert common.linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1) == common.linear_cka(x, wide)
    # Unrelated rows of cosines share nothing but the 1 on the diagonal: 1 in about 1 + 300 / 6.
    assert common.rsa(x - 0.3, noise) < 0.05 and common.linear_cka(x, noise) < 0.1

    centring = torch.eye(300, dtype=torch.double) - 1 / 300
    k, l = (centring @ (z @ z.T) @ centring for z in (x, noise))  # HSIC by kernels: eq. 3
    assert common.linear_cka(x, noise) == pytest.approx(((k * l).sum() / (k.norm() * l.norm())).item())
    a, b, rows = x[:8], noise[:8], []
    for i in range(8):
        row_a = [torch.dot(a[i], other) / a[i].norm() / other.norm() for other in a]
        row_b = [torch.dot(b[i], other) / b[i].norm() / other.norm() for other in b]
        norms = math.sqrt(sum(v**2 for v in row_a)) * math.sqrt(sum(v**2 for v in row_b))
        rows.append(sum(v * w for v, w in zip(row_a, row_b)) / norms)
    assert common.rsa(a, b) == pytest.approx(float(sum(rows) / 8))


# ----------------------------------------------------------------------------------------------------------------------
# Run files and progress


def save_example(directory, tag, force=False, **record):
    common.save_run(directory, {"config": {"tag": tag}, "metrics": {}, **record},
                    {"x": torch.arange(3)}, {"w": torch.tensor([float(tag)])}, force)


def test_run_files(tmp_path):
    directory = tmp_path / "a" / "seed0"
    assert common.load_run(directory) is None and common.find_runs(tmp_path) == []
    save_example(directory, 1, loss=math.nan)
    assert common.load_run(directory)["loss"] is None  # valid JSON, not the word NaN
    assert common.find_runs(tmp_path) == [directory]
    assert sorted(p.name for p in directory.iterdir()) == ["model.pt", "outputs.npz", "run.json"]
    assert common.load_outputs(directory)["x"].tolist() == [0, 1, 2]
    assert common.finished_run(directory, {"tag": 1})["config"] == {"tag": 1}
    assert common.finished_run(directory, {"tag": 2}, force=True) is None
    with pytest.raises(common.UserError, match="tag is 1, not 2"):
        common.finished_run(directory, {"tag": 2})
    with pytest.raises(common.UserError, match="tag is 1, not 2"):  # as if another process had been faster
        save_example(directory, 2)
    save_example(directory, 1, loss=3)
    assert common.load_run(directory)["loss"] is None  # the first of two equal runs stays
    for name, load in (("outputs.npz", common.load_outputs), ("run.json", common.load_run),
                       ("model.pt", lambda d: common.load_weights(torch.nn.Linear(1, 1), d))):
        (directory / name).write_bytes((directory / name).read_bytes()[:-9])
        with pytest.raises(common.UserError, match="damaged"):
            load(directory)


@pytest.mark.parametrize("moment", range(3))
def test_interrupted_save_leaves_no_mixture(tmp_path, monkeypatch, moment):
    save_example(tmp_path, 1)
    replace, calls = os.replace, []

    def interrupted(*paths):
        calls.append(paths)
        if len(calls) > moment:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_example(tmp_path, 2, force=True)
    assert common.load_run(tmp_path) is None and not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*.tmp"))


def test_interrupted_rewriting_of_one_file_leaves_the_old_one(tmp_path, monkeypatch):
    common.write_files(tmp_path, {"all.json": b"old"})

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        common.write_files(tmp_path, {"all.json": b"new"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"all.json": b"old"}


def test_progress_says_how_long(capsys, monkeypatch):
    progress = common.Progress(epochs=4)
    progress.start -= 10  # as if the first epoch had taken ten seconds
    progress.epoch(1, 0.5, 0.9, 10.0)
    line = capsys.readouterr().out
    assert "1/4" in line and "0.5" in line and "0.9" in line and "30 s left" in line
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    progress = common.Progress(epochs=4)
    progress.last_shown -= 1
    progress.step(2, 3, 8)
    assert "batch 3/8" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# MNIST: data


def test_translate_and_scale_against_a_loop():
    images = torch.randint(0, 256, (6, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    moved, seen = train_mnist.translate(images), set()
    for image, result in zip(images, moved):
        matches = []
        for down in (-3, 3):
            for right in (-3, 3):
                expected = torch.zeros_like(image)
                for row in range(28):
                    for column in range(28):
                        if 0 <= row - down < 28 and 0 <= column - right < 28:
                            expected[row, column] = image[row - down, column - right]
                if torch.equal(expected, result):
                    matches.append((down, right))
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) > 1 and torch.equal(moved, train_mnist.translate(images))

    shrunk = train_mnist.scale(images[:1])[0]
    for row, column in ((0, 0), (4, 4), (9, 20), (13, 14), (23, 5), (27, 13)):
        y, x = (row - 13.5) / 0.7 + 13.5, (column - 13.5) / 0.7 + 13.5
        expected = sum((1 - abs(y - i)) * (1 - abs(x - j)) * images[0, i, j].item()
                       for i in (math.floor(y), math.floor(y) + 1) for j in (math.floor(x), math.floor(x) + 1)
                       if 0 <= i < 28 and 0 <= j < 28)
        assert shrunk[row, column].item() == pytest.approx(expected, abs=0.02)  # of 255


def test_synthetic_digits_are_seeded_centred_and_like_mnist():
    images, labels = train_mnist.synthetic_digits(2000, seed=0)
    again, same_labels = train_mnist.synthetic_digits(2000, seed=0)
    other, _ = train_mnist.synthetic_digits(2000, seed=1)
    assert torch.equal(images, again) and torch.equal(labels, same_labels) and not torch.equal(images, other)
    assert labels.bincount().min() > 150 and images.shape == (2000, 28, 28) and images.dtype == torch.uint8
    assert labels[:8].tolist() == LABELS_OF_SEED_0  # the same on every machine
    ink = images.double() / 255
    assert 0.08 < ink.mean() < 0.18  # MNIST: 0.131
    rows = (ink.sum(2) * torch.arange(28)).sum(1) / ink.sum((1, 2))
    columns = (ink.sum(1) * torch.arange(28)).sum(1) / ink.sum((1, 2))
    assert (rows - 13.5).abs().max() < 2.5 and (columns - 13.5).abs().max() < 2.5
    assert ink[:, 0].mean() < 0.02 and ink[:, :, 0].mean() < 0.02  # hardly anything cut off at the edge


LABELS_OF_SEED_0 = [4, 9, 3, 0, 3, 9, 7, 3]


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(header + array.tobytes())


@pytest.fixture(scope="module")
def mnist_files(tmp_path_factory):
    """A folder laid out like MNIST, with the right sizes; image i is grey level i % 256 all over."""
    raw = tmp_path_factory.mktemp("data") / "MNIST" / "raw"
    for part, size in (("train", 60_000), ("t10k", 10_000)):
        grey = np.arange(size).astype(np.uint8)
        write_idx(raw / f"{part}-images-idx3-ubyte", np.broadcast_to(grey[:, None, None], (size, 28, 28)))
        write_idx(raw / f"{part}-labels-idx1-ubyte", grey % 10)
    return raw


def test_mnist_files_are_read(mnist_files):
    source = train_mnist.load_mnist(mnist_files.parent.parent)
    data = train_mnist.make_data("mnist", 60_000, source, torch.device("cpu"))
    assert [len(data[name][1]) for name in data] == [55_000, 5_000, 10_000, 10_000, 10_000]
    assert (data["train"][0][300] == 300 - 256).all() and (data["validation"][0][0] == 55_000 % 256).all()


def truncate(raw):
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:1000])


def swap(a, b):
    def apply(raw):
        (raw / a).rename(raw / "other"), (raw / b).rename(raw / a), (raw / "other").rename(raw / b)
    return apply


@pytest.mark.parametrize("damage", [truncate, swap("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"),
                                    swap("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
                                    swap("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte")])
def test_damaged_mnist_files_are_reported(mnist_files, tmp_path, capfd, damage):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in mnist_files.iterdir():
        os.link(path, raw / path.name)
    if damage is truncate:  # not through the link
        (raw / "train-images-idx3-ubyte").unlink()
        shutil.copy(mnist_files / "train-images-idx3-ubyte", raw)
    damage(raw)
    assert_refused(capfd, ["--data-dir", tmp_path, "--out", tmp_path / "runs"], "truncated, swapped or unreadable")


# ----------------------------------------------------------------------------------------------------------------------
# MNIST: all setups


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """All setups, once; -> (root, printed text per setup, the bytes of all plain runs before any of them taught)."""
    out, text = tmp_path_factory.mktemp("grid"), {}
    root = out / "mnist-synthetic"
    for model in ("mlp", "cnn"):
        mnist("--student", model, "--seed", 1, *QUICK, "--out", out, "--quiet")
    before = {path: path.read_bytes() for path in root.rglob("*.*") if path.is_file()}
    for name, flags in SETUPS.items():
        stdout = out / f"{name}.txt"
        with open(stdout, "w") as file, contextlib.redirect_stdout(file):
            mnist(*flags, *QUICK, "--out", out)
        text[name] = stdout.read_text()
    return root, text, before


def test_every_setup_leaves_a_complete_run(grid):
    root, text, before = grid
    assert {path.parent.name for path in common.find_runs(root) if path.name == "seed0"} == set(SETUPS)
    assert len(before) == 6 and all(path.read_bytes() == content for path, content in before.items())  # teachers
    for name in SETUPS:
        directory = root / name / "seed0"
        record = json.loads((directory / "run.json").read_text())
        assert set(record) >= {"config", "data", "environment", "parameters", "history", "metrics", "timing"}
        assert [entry["epoch"] for entry in record["history"]] == [1, 2, 3]
        assert set(record["timing"]) == {"data", "teacher", "teacher_logits", "training", "evaluation",
                                         "examples_per_second"}
        outputs = common.load_outputs(directory)
        assert outputs["probe_epochs"].tolist() == [0, 1, 2, 3]
        width = {"mlp": 32, "cnn": 64}[record["config"]["student"]]
        assert outputs["probe_representations"].shape == (4, 100, width)
        for test_set, metrics in record["metrics"].items():  # once more, in numpy
            logits, labels = outputs[f"{test_set}_logits"].astype(np.float64), outputs[f"{test_set}_labels"]
            log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            assert metrics["accuracy"] == pytest.approx((logits.argmax(axis=1) == labels).mean())
            assert metrics["nll"] == pytest.approx(-log_probabilities[np.arange(100), labels].mean())
            assert metrics["n"] == 100 and 0 <= metrics["ece"] <= 1
            assert f"{metrics['accuracy']:.4f}" in text[name] and f"{metrics['ece']:.4f}" in text[name]
        assert ("teacher" in record["parameters"]) == ("-to-" in name)
        model = common.load_weights(train_mnist.MODELS[record["config"]["student"]](), directory)
        data = train_mnist.make_data("synthetic", 600, None, torch.device("cpu"))
        logits, _ = train_mnist.evaluate(model, data["test"][0], record["environment"]["precision"] == "bfloat16")
        assert np.abs(logits.numpy() - outputs["test_logits"]).max() < 0.05


def test_teacher_is_the_plain_run_of_its_seed_and_its_figures_are_in_the_record(grid):
    root, _, _ = grid
    record = common.load_run(root / "cnn-to-mlp" / "seed0")
    teacher = common.load_run(root / "cnn" / "seed1")
    assert record["teacher_metrics"] == teacher["metrics"] and record["config"]["teacher_seed"] == 1
    assert record["parameters"]["teacher"] == teacher["parameters"]["student"]


@pytest.mark.parametrize("student", ["mlp", "cnn"])
def test_setups_of_one_seed_share_initialisation_but_not_outcome(grid, student):
    root, _, _ = grid
    paths = {name: common.load_outputs(root / name / "seed0")["probe_representations"]
             for name in SETUPS if name.split("-online")[0].split("-")[-1] == student}
    plain = paths.pop(student)
    twin = common.load_outputs(root / student / "seed1")["probe_representations"]
    assert len(paths) >= 2 and not np.array_equal(plain[0], twin[0])
    for path in paths.values():
        assert np.array_equal(path[0], plain[0]) and not np.allclose(path[-1], plain[-1])


def test_same_batches_in_every_setup_and_cached_logits_are_the_teachers(grid, tmp_path, monkeypatch):
    """Watch every training batch: same digits in the same order, each with what its teacher says of it."""
    seen, to_input, kd_loss = [], train_mnist.to_input, common.kd_loss
    teacher = common.load_weights(train_mnist.CNN(), grid[0] / "cnn" / "seed1").eval()

    def watched_input(images):
        seen.append(images)
        return to_input(images)

    def watched_loss(student_logits, teacher_logits, *rest):
        with torch.no_grad():
            fresh = teacher(to_input(seen[-1]))
        assert (fresh - teacher_logits).abs().max() < 0.1 < fresh.std()  # bfloat16 in batches of another size
        return kd_loss(student_logits, teacher_logits, *rest)

    shutil.copytree(grid[0] / "cnn", tmp_path / "mnist-synthetic" / "cnn")
    monkeypatch.setattr(train_mnist, "to_input", watched_input)
    monkeypatch.setattr(common, "kd_loss", watched_loss)
    batches = []
    for name in ("mlp", "cnn-to-mlp"):
        mnist(*SETUPS[name], *QUICK, "--out", tmp_path, "--quiet")
        batches.append([images for images in seen if len(images) == 128])
        seen.clear()
    assert len(batches[0]) == 3 * (550 // 128)
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))
    assert not torch.equal(batches[0][0], batches[0][550 // 128])  # and another order in every epoch


def test_answers_do_not_depend_on_the_other_examples_of_a_test(grid):
    """Batch norm goes by what it learnt in training, also where the model is still being trained."""
    model = common.load_weights(train_mnist.CNN(), grid[0] / "cnn" / "seed0").train()
    images = train_mnist.synthetic_digits(100, seed=1)[0]
    statistics = [buffer.clone() for buffer in model.buffers()]
    whole, part = train_mnist.evaluate(model, images, False)[0], train_mnist.evaluate(model, images[:7], False)[0]
    assert torch.allclose(whole[:7], part, atol=1e-4) and model.training
    assert all(torch.equal(a, b) for a, b in zip(statistics, model.buffers(), strict=True))


def test_same_command_twice_gives_the_same_metrics(grid, tmp_path):
    mnist(*SETUPS["cnn-to-mlp"], *QUICK, "--out", tmp_path, "--quiet")
    first, second = (common.load_run(root / "cnn-to-mlp" / "seed0") for root in (grid[0], tmp_path / "mnist-synthetic"))
    assert first["metrics"] == second["metrics"] and first["config"] == second["config"]


def test_finished_run_is_not_repeated_unless_forced(grid, capsys):
    directory = grid[0] / "mlp" / "seed0"
    before = (directory / "run.json").stat().st_mtime_ns
    mnist(*SETUPS["mlp"], *QUICK, "--out", grid[0].parent)
    assert (directory / "run.json").stat().st_mtime_ns == before and "finished already" in capsys.readouterr().out
    mnist(*SETUPS["mlp"], *QUICK, "--out", grid[0].parent, "--force", "--quiet")
    assert (directory / "run.json").stat().st_mtime_ns > before and capsys.readouterr().out == ""


@pytest.mark.parametrize("examples, batch_size, epochs", [(60, 50, 1), (60, 1000, 1), (132, 60, 1), (60, 50, 3),
                                                          (60, 50, 4), (60, 50, 5)])
def test_few_steps_are_enough_for_the_schedule(tmp_path, examples, batch_size, epochs):
    mnist("--data", "synthetic", "--examples", examples, "--batch-size", batch_size, "--epochs", epochs,
          "--out", tmp_path, "--device", "cpu", "--quiet")
    assert common.load_run(tmp_path / "mnist-synthetic" / "mlp" / "seed0")["history"][0]["loss"] > 0


# ----------------------------------------------------------------------------------------------------------------------
# The real command line, alone in an empty folder


@pytest.fixture(scope="module")
def copied_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copied out ü")
    for name in ("train_mnist.py", "common.py"):
        shutil.copy(HERE / name, folder)
    return folder


def start(folder, *arguments, largest_file=None):
    def prepare():  # Ctrl-C is switched off, and that is inherited, where the tests run in the background.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.Popen([sys.executable, "train_mnist.py", *arguments], cwd=folder, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=prepare)


def test_two_files_alone_do_the_main_job(copied_out):
    process = start(copied_out, "--teacher", "cnn", "--student", "mlp", "--kd", *QUICK)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0 and stderr == ""
    assert "teacher cnn" in stdout and "student mlp" in stdout and "s left" in stdout
    assert common.load_run(copied_out / "runs" / "mnist-synthetic" / "cnn-to-mlp" / "seed0")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_killed_run_leaves_nothing_that_looks_finished(copied_out, how):
    process = start(copied_out, "--student", "mlp", *QUICK, "--epochs", "100000", "--seed", "7")
    for line in process.stdout:
        if "epoch  " in line:
            break
    process.send_signal(how)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert len(stderr.split("\n")) <= 3 and "Traceback" not in stderr
    assert not list((copied_out / "runs" / "mnist-synthetic" / "mlp").rglob("*.*"))


def test_disk_that_is_full_at_the_end(copied_out):
    process = start(copied_out, "--student", "mlp", *QUICK, "--seed", "8", "--quiet", largest_file=100_000)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 2 and stderr.count("\n") == 1 and "can't write to" in stderr
    assert not list((copied_out / "runs" / "mnist-synthetic" / "mlp" / "seed8").iterdir())


def test_bad_input_from_the_shell(copied_out):
    process = start(copied_out, "--student", "rnn")
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 2 and stderr.count("\n") == 1 and "rnn" in stderr and "mlp" in stderr


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: one line, exit code 2


def assert_refused(capfd, arguments, expected, script=mnist):
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        script(*arguments)
    stdout, stderr = capfd.readouterr()
    assert end.value.code == 2 and stderr.count("\n") == 1 and expected in stderr, stderr


@pytest.mark.parametrize("arguments, expected", [
    (["--student", "rnn"], "invalid choice"),
    (["--teacher", "gnn", "--kd"], "invalid choice"),
    (["--kd", "sometimes"], "invalid choice"),
    (["--teacher", "cnn"], "--teacher has no effect without --kd"),
    (["--temperature", "2"], "--temperature has no effect without --kd"),
    (["--kd", "--seed", "3", "--teacher-seed", "3"], "twin"),
    (["--epochs", "0"], "--epochs"), (["--epochs", "1.5"], "--epochs"), (["--epochs", "many"], "--epochs"),
    (["--batch-size", "-4"], "--batch-size"), (["--batch-size", "1"], "--batch-size"),
    (["--lr", "0"], "--lr"), (["--lr", "nan"], "--lr"), (["--lr", "inf"], "--lr"),
    (["--kd", "--temperature", "0"], "--temperature"), (["--kd", "--temperature", "-1"], "--temperature"),
    (["--kd", "--alpha", "1.1"], "--alpha"), (["--kd", "--alpha", "-0.1"], "--alpha"),
    (["--seed", "-1"], "--seed"), (["--examples", "10"], "--examples"), (["--data", "cifar"], "invalid choice"),
    (["--device", "cuda:99"], "--device cuda:99"), (["--device", "abacus"], "--device abacus"),
    (["--data-dir", "no/such/folder"], "no such folder"), (["--nonsense"], "unrecognized"),
    (["--lr", "1e30"], "try a lower --lr"),
])
def test_bad_input_is_one_line(tmp_path, capfd, arguments, expected):
    # What the case gives comes last and wins.
    assert_refused(capfd, [*QUICK, "--quiet", "--out", tmp_path, *arguments], expected)
    assert not list(tmp_path.rglob("*.*"))


def test_failing_compiler_is_one_line(capfd):
    def main(argv):
        raise type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})("no compiler\nno luck")

    with pytest.raises(SystemExit) as end:
        common.run_main(main)
    assert end.value.code == 2 and capfd.readouterr().err.count("\n") == 1


def test_cuda_where_there_is_none(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused(capfd, [*QUICK, "--out", tmp_path, "--device", "cuda"], "--device cuda")


def test_output_folder_that_cannot_be_written(tmp_path, capfd):
    (tmp_path / "file").write_text("in the way")
    assert_refused(capfd, [*QUICK, "--out", tmp_path / "file", "--quiet"], "--out")
    assert (tmp_path / "file").read_text() == "in the way"


def test_runs_in_the_way_and_broken_teachers(grid, tmp_path, capfd):
    root = tmp_path / "mnist-synthetic"
    shutil.copytree(grid[0], root)
    finished = (root / "cnn-to-mlp" / "seed0" / "run.json").read_bytes()
    command = [*SETUPS["cnn-to-mlp"], *QUICK, "--out", tmp_path, "--quiet"]
    assert_refused(capfd, [*command, "--temperature", "3"], "temperature is 20.0, not 3.0")
    assert (root / "cnn-to-mlp" / "seed0" / "run.json").read_bytes() == finished
    assert_refused(capfd, [*command, "--seed", "5", "--teacher-seed", "1", "--epochs", "2"], "epochs is 3, not 2")
    teacher = root / "cnn" / "seed1"
    (teacher / "model.pt").write_bytes(b"not weights")
    assert_refused(capfd, [*command, "--force"], "model.pt is missing, damaged or of another model")
    shutil.copy(root / "mlp" / "seed1" / "model.pt", teacher)
    assert_refused(capfd, [*command, "--force"], "model.pt is missing, damaged or of another model")
    (teacher / "run.json").write_text("{")
    assert_refused(capfd, [*command, "--force"], "run.json is damaged")
    assert (root / "cnn-to-mlp" / "seed0" / "run.json").read_bytes() == finished


def test_without_network_auto_takes_synthetic_digits_and_says_so(tmp_path, capfd, monkeypatch):
    from torchvision.datasets import MNIST

    def no_network(*_, **__):
        raise RuntimeError("Error downloading")

    monkeypatch.setattr(MNIST, "download", no_network)
    data = ["--data-dir", tmp_path, "--out", tmp_path / "runs", "--epochs", 1, "--examples", 60, "--quiet"]
    assert_refused(capfd, ["--data", "mnist", *data], "can't be downloaded")
    mnist(*data)
    assert "SYNTHETIC" in capfd.readouterr().err
    assert common.load_run(tmp_path / "runs" / "mnist-synthetic" / "mlp" / "seed0")["config"]["data"] == "synthetic"


# ----------------------------------------------------------------------------------------------------------------------
# SVA: sentences


def sva(*arguments):
    """train_sva.py with these arguments, in this process, ended as from the shell."""
    common.run_main(train_sva.main, [str(argument) for argument in arguments])


def test_synthetic_sentences_are_what_they_claim():
    """Number, attractors and distance once more, from the words alone; neither first nor last noun is a safe guess."""
    number_of = {noun: False for noun in train_sva.NOUNS} | {noun + "s": True for noun in train_sva.NOUNS}
    lemmas = {*train_sva.TRANSITIVE, *train_sva.INTRANSITIVE, *train_sva.THINKING}
    assert len(number_of) == 2 * len(set(train_sva.NOUNS)) and not lemmas & set(number_of)
    parts = train_sva.synthetic_sentences(2000)
    for name, part in parts.items():
        slips = 0
        for sentence in part:
            words = sentence.text.split()
            verb, head = words[sentence.verb], sentence.verb - sentence.distance
            assert (verb in lemmas) == sentence.plural and (verb if sentence.plural else verb[:-1]) in lemmas
            assert sentence.forms[sentence.plural] == verb
            slips += number_of[words[head]] != sentence.plural
            between = [number_of[word] for word in words[head + 1:sentence.verb] if word in number_of]
            assert sentence.attractors == between.count(not number_of[words[head]])
        assert slips == 0 if name == "test" else 0.05 < slips / len(part) < 0.15
    without = sum(sentence.attractors == 0 for sentence in parts["train"]) / len(parts["train"])
    assert 0.7 < without < 0.9
    groups = [min(sentence.attractors, 4) for sentence in parts["test"]]
    assert [groups.count(group) for group in range(5)] == [200] * 5
    hard = [sentence for sentence in parts["test"] if sentence.attractors > 0]
    nouns = [[number_of[word] for word in train_sva.before_verb(sentence) if word in number_of] for sentence in hard]
    for guess in (0, -1):
        right = sum(numbers[guess] == sentence.plural for numbers, sentence in zip(nouns, hard)) / len(hard)
        assert right < 0.75
    seen = {train_sva.before_verb(sentence) for sentence in parts["train"]}
    assert not seen & {train_sva.before_verb(sentence) for sentence in parts["test"]}
    assert parts == train_sva.synthetic_sentences(2000)


def test_vocabulary_comes_from_training_sentences_alone():
    sentence = train_sva.Sentence("the cat sees the dog", 2, False, 0, 1, ("sees", "see"))
    vocabulary = train_sva.make_vocabulary([sentence])
    assert vocabulary["the"] == 4 and sorted(vocabulary.values()) == [4, 5, 6, 7]
    other = sentence._replace(text="the whale sees it")
    split, left_out = train_sva.encode([other], vocabulary, "classification")
    assert split.tokens.tolist() == [4, train_sva.UNKNOWN] and left_out == 0
    assert train_sva.encode([other], vocabulary, "lm")[1] == 1  # "see" was never seen, so there is nothing to choose
    endless = sentence._replace(text="the " * 300 + "cat sees", verb=301)
    split, left_out = train_sva.encode([endless, sentence], vocabulary, "classification")
    assert len(split.lengths) == left_out == 1


def test_batches_have_little_padding_and_leave_out_no_sentence_for_long():
    parts = train_sva.synthetic_sentences(6000)
    split, _ = train_sva.encode(parts["train"], train_sva.make_vocabulary(parts["train"]), "classification")
    generator, seen = torch.Generator().manual_seed(0), []
    for _ in range(4):
        batches = train_sva.batches_by_length(split.lengths, 128, generator)
        assert len(torch.cat(batches).unique()) == 128 * len(batches) == 128 * (6000 // 128)
        longest = sum(128 * split.lengths[batch].max().item() for batch in batches)
        words = sum(split.lengths[batch].sum().item() for batch in batches)
        assert 1 - words / longest <= 0.08
        seen += batches
    assert len(torch.cat(seen).unique()) == 6000
    tokens, lengths = split.batch(batches[0])
    for row, sentence, length in zip(tokens, batches[0], lengths):
        start = split.starts[sentence]
        assert row[:length].tolist() == split.tokens[start:start + length].tolist() and not row[length:].any()


# ----------------------------------------------------------------------------------------------------------------------
# SVA: models


def sva_model(name, objective="classification"):
    return train_sva.build_model(name, 0, 20, objective).eval()


@pytest.mark.parametrize("name", train_sva.MODELS)
@torch.no_grad()
def test_padding_has_no_influence_and_only_the_class_token_sees_both_sides(name):
    model, lengths = sva_model(name), torch.tensor([5, 7])
    tokens = torch.randint(4, 20, (2, 7), generator=torch.Generator().manual_seed(0))
    tokens[0, 5:] = train_sva.PAD
    both = model.represent(tokens, lengths)
    assert torch.allclose(model.represent(tokens[:1, :5], lengths[:1]), both[:1], atol=1e-5)
    garbled = tokens.clone()
    garbled[0, 5:] = 9
    assert torch.allclose(model.represent(garbled, lengths), both, atol=1e-5)
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] - 3) % 16 + 4
    before, after = model.states(tokens, lengths), model.states(changed, lengths)
    if name == "transformer":
        assert (before[:, 0] - after[:, 0]).abs().amax(dim=1).min() > 1e-4  # the class token, in front
    else:
        assert torch.allclose(before[:, :4], after[:, :4], atol=1e-5)
        assert (before[:, 4] - after[:, 4]).abs().max() > 1e-4


def test_universal_transformer_shares_its_layer():
    shared, separate = sva_model("ut-seq"), sva_model("transformer-seq")
    assert len(shared.blocks) == 1 < len(separate.blocks) == separate.layers
    calls = []
    shared.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    shared.represent(torch.full((1, 3), 5), torch.tensor([3]))
    assert len(calls) == shared.layers > 1


@torch.no_grad()
def test_language_model_scores_words_and_verb_forms_like_a_loop():
    model = sva_model("lstm-small", "lm")
    sentence = train_sva.Sentence("a b c d", 2, True, 0, 1, ("b", "c"))
    other = sentence._replace(text="a c d", verb=1)
    vocabulary = {"a": 4, "b": 5, "c": 6, "d": 7}
    split, _ = train_sva.encode([sentence, other], vocabulary, "lm")
    logits, _, perplexity = train_sva.evaluate(model, split, "lm", False)
    total, words = 0.0, 0
    for row, (text, verb) in enumerate((([4, 5, 6, 7], 2), ([4, 6, 7], 1))):
        sequence = [train_sva.START, *text, train_sva.END]
        for position in range(1, len(sequence)):
            prefix = torch.tensor([sequence[:position]])
            scores = model.head(model.states(prefix, torch.tensor([position]))[0, -1]).log_softmax(0)
            total, words = total - scores[sequence[position]].item(), words + 1
            if position == verb + 1:
                assert torch.allclose(logits[row], scores[[5, 6]], atol=1e-5)
    assert perplexity == pytest.approx(math.exp(total / words), rel=1e-5)


@pytest.mark.parametrize("kd", [[], ["--kd", "--teacher", "lstm"], ["--kd", "online"]])
def test_pieces_of_the_last_layer_give_the_gradient_of_the_whole(tmp_path, monkeypatch, kd):
    outcomes = []
    for piece in (50, 100_000):
        monkeypatch.setattr(train_sva, "PIECE", piece)
        sva("--data", "synthetic", "--examples", 200, "--epochs", 1, "--objective", "lm", "--student", "lstm-small",
            *kd, "--device", "cpu", "--no-amp", "--quiet", "--out", tmp_path / str(piece))
        run, = [path for path in (tmp_path / str(piece)).glob("*/*lstm-small*/seed0")]
        loss = common.load_run(run)["history"][0]["loss"]
        outcomes.append((loss, torch.load(run / "model.pt", weights_only=True)))
    (loss, weights), (whole_loss, whole_weights) = outcomes
    assert loss == pytest.approx(whole_loss, rel=1e-4)
    assert all(torch.allclose(weights[name], whole_weights[name], atol=2e-4) for name in weights)


def test_agreement_metrics_by_hand():
    logits = torch.tensor([[2.0, 0], [2, 0], [2, 0], [2, 0]])  # says singular, always
    labels, attractors = torch.tensor([0, 0, 1, 0]), torch.tensor([0, 0, 0, 6])
    metrics = train_sva.agreement_metrics(logits, labels, attractors, torch.tensor([1, 20, 3, 3]))
    assert metrics["accuracy"] == 0.75 and metrics["a_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert metrics["accuracy_by_attractors"] == {"0": pytest.approx(2 / 3), "4": 1.0}
    assert metrics["accuracy_by_distance"] == {"1": 1.0, "3": 0.5} and metrics["d_accuracy"] == 0.75
    unknown = torch.full((4,), -1)
    assert train_sva.agreement_metrics(logits, labels, attractors, unknown)["d_accuracy"] is None


# ----------------------------------------------------------------------------------------------------------------------
# SVA: files of Linzen et al.

HEAD = "sentence\tverb_pos\tsubj_index\tverb_index\tn_diff_intervening\tdistance"


def write_table(path, rows=None):
    singular, plural = "the key near it is old {}\tVBZ\t2\t5\t0\t3", "the keys near it are old {}\tVBP\t2\t5\t0\t3"
    rows = rows or [(plural if i % 2 else singular).format(i % 7) for i in range(200)]
    text = "\n".join([HEAD, *rows]) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_before_verbs(folder, leave_out=()):
    for name in ("train", "val", *(f"test.{k}" for k in range(6))):
        if name not in leave_out:
            lines = [f"VBZ\tthe key near {name.split('.')[0]}\n", f"VBP\tthe keys near {name.split('.')[0]}\n"] * 20
            (folder / f"numpred.{name}").write_text("".join(lines))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_table_is_read(tmp_path, suffix):
    path = tmp_path / f"agr_50_mostcommon_10K.tsv{suffix}"
    write_table(path)
    parts, notes = train_sva.read_linzen(train_sva.find_linzen(tmp_path))
    assert [len(parts[name]) for name in ("train", "validation", "test")] == [20, 2, 178] and notes == []
    sentence = parts["train"][0]
    assert sentence.text.split()[sentence.verb] == ("are" if sentence.plural else "is") and sentence.distance == 3
    vocabulary = train_sva.make_vocabulary(parts["train"])
    split, left_out = train_sva.encode(parts["test"], vocabulary, "lm")
    assert left_out == 0 and (split.forms == torch.tensor([vocabulary["is"], vocabulary["are"]])).all()


def test_words_before_the_verb_are_read_and_missing_files_named(tmp_path):
    write_before_verbs(tmp_path, leave_out=("val", "test.5"))
    parts, notes = train_sva.read_linzen(train_sva.find_linzen(tmp_path))
    assert [len(parts[name]) for name in ("train", "validation", "test")] == [38, 2, 200]
    assert any("numpred.val" in note for note in notes) and any("numpred.test.5" in note for note in notes)
    assert parts["test"][-1].attractors == 4 and parts["test"][0].forms == ("VBZ", "VBP")


@pytest.mark.parametrize("damage, expected", [
    (lambda f: write_table(f / "agr_50_mostcommon_10K.tsv", ["a b\tVBZ\t1\t2\t0\t1", "broken"]), "line 3"),
    (lambda f: (f / "agr_50_mostcommon_10K.tsv").write_text("sentence\tverb_pos\n"), "no column verb_index"),
    (lambda f: (f / "agr_50_mostcommon_10K.tsv").write_text(""), "is empty"),
    (lambda f: (f / "agr_50_mostcommon_10K.tsv").write_bytes(f"{HEAD}\n".encode() + b"\xff\xfe\n"), "not UTF-8"),
    (lambda f: (f / "agr_50_mostcommon_10K.tsv.gz").write_bytes(b"not gzip"), "can't be read"),
    (lambda f: (write_before_verbs(f), (f / "numpred.val").write_text("VBZ\tthe key\nVBX\toh\n")), "line 2"),
    (lambda f: write_before_verbs(f, leave_out=("train",)), "no numpred.train"),
    (lambda f: write_before_verbs(f, leave_out=[f"test.{k}" for k in range(6)]), "nothing to test"),
])
def test_damaged_sentence_files_are_reported(tmp_path, capfd, damage, expected):
    damage(tmp_path)
    command = ["--data", "linzen", "--data-dir", tmp_path, "--out", tmp_path / "runs", "--quiet"]
    assert_refused(capfd, command, expected, sva)


def test_real_sentences_are_cached_until_a_file_changes(tmp_path, monkeypatch, capfd):
    write_before_verbs(tmp_path)
    reads, read_linzen = [], train_sva.read_linzen
    monkeypatch.setattr(train_sva, "read_linzen", lambda files: reads.append(1) or read_linzen(files))
    command = ["--data-dir", tmp_path, "--out", tmp_path / "runs", "--epochs", 1, "--student", "lstm-small", "--quiet",
               "--device", "cpu"]
    sva(*command)
    sva(*command, "--seed", 1)
    assert len(reads) == 1
    first, second = (common.load_run(tmp_path / "runs" / "sva-linzen" / "lstm-small" / f"seed{k}") for k in (0, 1))
    assert first["data"] == second["data"] and first["metrics"]["test"]["d_accuracy"] is None
    (tmp_path / "numpred.val").write_text("VBZ\tthe key\n")
    assert_refused(capfd, [*command, "--seed", 1], "bytes", sva)  # not the data that run was made with
    sva(*command, "--seed", 2)
    sva(*command, "--seed", 2, "--objective", "lm")
    assert len(reads) == 3


# ----------------------------------------------------------------------------------------------------------------------
# SVA: command line


SVA_QUICK = ["--data", "synthetic", "--examples", "200", "--epochs", "2", "--device", "cpu", "--quiet"]


@pytest.mark.parametrize("objective", ["classification", "lm"])
def test_sva_setups(tmp_path, objective):
    root = tmp_path / ("sva-lm-synthetic" if objective == "lm" else "sva-synthetic")
    command = [*SVA_QUICK, "--objective", objective, "--out", tmp_path]
    for model in train_sva.MODELS:
        if (objective, model) != ("lm", "transformer"):
            sva(*command, "--student", model, "--seed", 1)
    teacher = root / "lstm" / "seed1" / "model.pt"
    before = teacher.read_bytes()
    for flags in ([], ["--kd"], ["--kd", "--teacher", "lstm"], ["--kd", "online", "--teacher", "lstm"]):
        sva(*command, "--student", "transformer-seq", *flags)
    sva(*command, "--student", "lstm", "--kd", "--teacher", "ut-seq")
    assert teacher.read_bytes() == before
    names = ("transformer-seq", "transformer-seq-to-transformer-seq", "lstm-to-transformer-seq",
             "lstm-to-transformer-seq-online")
    runs = {name: common.load_outputs(root / name / "seed0") for name in names}
    plain = runs["transformer-seq"]["probe_representations"]
    for name, outputs in runs.items():
        metrics = common.load_run(root / name / "seed0")["metrics"]["test"]
        correct = outputs["test_logits"].argmax(axis=1) == outputs["test_labels"]
        groups = np.minimum(outputs["test_attractors"], 4)
        assert metrics["accuracy"] == pytest.approx(correct.mean())
        assert metrics["n"] == len(correct) >= 90  # of 100; few training words leave some without the other form
        assert metrics["a_accuracy"] == pytest.approx(np.mean([correct[groups == k].mean() for k in range(5)]))
        assert ("perplexity" in metrics) == (objective == "lm")
        assert np.array_equal(outputs["probe_representations"][0], plain[0])  # same initialisation
        assert name == "transformer-seq" or not np.allclose(outputs["probe_representations"][-1], plain[-1])
    sva(*command, "--student", "transformer-seq", "--out", tmp_path / "again")
    again = common.load_run(tmp_path / "again" / root.name / "transformer-seq" / "seed0")
    assert again["metrics"] == common.load_run(root / "transformer-seq" / "seed0")["metrics"]


def test_classifiers_teacher_is_not_asked_while_the_student_trains(tmp_path, monkeypatch):
    calls, train, states = [], train_sva.train, train_sva.LSTM.states

    def watched(*arguments):
        calls.clear()
        return train(*arguments)

    monkeypatch.setattr(train_sva, "train", watched)
    monkeypatch.setattr(train_sva.LSTM, "states", lambda *arguments: calls.append(1) or states(*arguments))
    sva(*SVA_QUICK, "--student", "transformer-seq", "--teacher", "lstm", "--kd", "--out", tmp_path)
    assert not calls


def test_offline_teacher_of_a_language_model_rests(tmp_path, monkeypatch):
    """Its dropout is off and its weights stay; the batches come with fresh outputs, so no cached logits can show it."""
    teachers, train = [], train_sva.train

    def watched(*arguments):
        teachers.append(arguments[-1])
        before = None if teachers[-1] is None else [p.clone() for p in teachers[-1].parameters()]
        result = train(*arguments)
        if before is not None:
            assert not teachers[-1].training
            assert all(torch.equal(a, b) for a, b in zip(before, teachers[-1].parameters(), strict=True))
        return result

    monkeypatch.setattr(train_sva, "train", watched)
    sva(*SVA_QUICK, "--objective", "lm", "--student", "lstm-small", "--kd", "--out", tmp_path)
    assert [teacher is not None for teacher in teachers] == [False, True]


@pytest.mark.parametrize("arguments, expected", [
    (["--objective", "lm", "--student", "transformer"], "needs transformer-seq"),
    (["--objective", "lm", "--student", "lstm", "--teacher", "transformer", "--kd"], "needs transformer-seq"),
    (["--student", "mlp"], "invalid choice"), (["--teacher", "lstm"], "no effect without --kd"),
    (["--data", "linzen", "--data-dir", "."], "nor numpred.train"),
    (["--data-dir", "no/such/folder"], "no such folder"),
])
def test_sva_bad_input_is_one_line(tmp_path, capfd, arguments, expected):
    assert_refused(capfd, [*SVA_QUICK, "--out", tmp_path, *arguments], expected, sva)
    assert not list(tmp_path.rglob("*.*"))


# ----------------------------------------------------------------------------------------------------------------------
# Analysis and grid


def test_t_interval_and_verdicts():
    tabulated = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042, 120: 1.980}
    for degrees, expected in tabulated.items():
        assert analyze.t_quantile(degrees) == pytest.approx(expected, abs=6e-4)
    mean, low, high = analyze.t_interval([1.0, 2.0, 3.0, 4.0])  # standard error sqrt(5/3) / 2
    assert (mean, low, high) == pytest.approx((2.5, 2.5 - 3.1824 * 0.645497, 2.5 + 3.1824 * 0.645497), abs=1e-4)
    assert analyze.verdict([0.1, 0.2, 0.3]) == "inconclusive" and analyze.verdict([0.1, 0.2]) == "untested"
    assert analyze.verdict([0.2, 0.21, 0.22]) == "supported" and analyze.verdict([-0.2, -0.21, -0.22]) == "contradicted"
    assert analyze.verdict([0.01, 0.0, -0.01], margin=0.05) == "supported"
    assert analyze.verdict([0.2, 0.21, 0.22], margin=0.05) == "contradicted"
    assert analyze.verdict([0.2, 0.0, -0.2], margin=0.05) == "inconclusive"


def test_classical_mds_recovers_a_configuration():
    points = random_logits(12, 2).double()
    distances = torch.cdist(points, points)
    found = analyze.classical_mds(distances)
    assert found.shape == (12, 2) and torch.allclose(torch.cdist(found, found), distances, atol=1e-9)


def test_comparisons_of_all_pairs_are_those_of_single_pairs():
    logits, labels = random_logits(4, 200, 3), torch.arange(200) % 3
    logits[3] = logits[0]
    found = analyze.behaviour(logits, labels)
    representations = [random_logits(150, width, seed=width) + 1 for width in (5, 20, 8)]
    representations.append(3 * representations[1] @ torch.linalg.qr(random_logits(20, 20))[0])
    pairs = analyze.similarities(representations, rows=40)
    for i in range(4):
        for j in range(4):
            a, b = logits[i], logits[j]
            assert found["agreement"][i, j] == pytest.approx((a.argmax(1) == b.argmax(1)).double().mean().item())
            kappa = common.error_consistency(a.argmax(1), b.argmax(1), labels)
            assert found["error consistency"][i, j] == pytest.approx(kappa)
            divergence = common.js_divergence(a.double().softmax(1), b.double().softmax(1))
            assert found["divergence"][i, j] == pytest.approx(divergence, abs=1e-12)
            assert pairs["RSA"][i, j] == pytest.approx(common.rsa(representations[i], representations[j]), abs=1e-5)
            cka = common.linear_cka(representations[i], representations[j])
            assert pairs["CKA"][i, j] == pytest.approx(cka, abs=1e-5)
    assert [found[name][0, 3].item() for name in found] == [1, 1, 0]
    assert pairs["CKA"][1, 3] == pytest.approx(1, abs=1e-5) and pairs["CKA"][0, 2] < 0.5


def test_barrier_of_a_model_with_itself_and_with_a_permuted_copy():
    assert analyze.barrier([1.0, 1.5, 3.0]) == 0 and analyze.barrier([1.0, 3.0, 2.0]) == pytest.approx(1.5)
    images, labels = train_mnist.synthetic_digits(300, seed=0)
    x = train_mnist.to_input(images)
    model = train_mnist.build_model("mlp", 0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def measure(model):
        analyze.reestimate_batch_norm(model, x)
        return F.cross_entropy(model(x), labels).item()

    state = {name: value.clone() for name, value in model.state_dict().items()}
    order = torch.randperm(512, generator=torch.Generator().manual_seed(0))
    permuted = {name: value[order] if name.startswith(("body.1.", "body.2.")) and value.dim() else value.clone()
                for name, value in state.items()}
    permuted["body.4.weight"] = permuted["body.4.weight"][:, order]
    itself = analyze.interpolate(model, state, state, measure)
    copy = analyze.interpolate(model, state, permuted, measure)
    assert analyze.barrier(itself) == pytest.approx(0, abs=1e-6) and len(copy) == 21
    assert copy[0] == pytest.approx(copy[-1], rel=1e-3) and analyze.barrier(copy) > copy[0]


def tables(stdout, out):
    """run_all.sh's Markdown about the runs in `out`, without its name and without the table of seconds."""
    markdown = stdout[stdout.index("\n## MNIST"):].replace(str(out), "")
    return re.sub(r"\*\*\(g\).*?(?=\*\*\(h\))", "", markdown, flags=re.S)


def run_all(out, *arguments, **options):
    """run_all.sh with the smallest of runs, started and not waited for."""
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(out), "SEEDS": "1", "JOBS": "2",
                                "OMP_NUM_THREADS": "1", "FLAGS": "--examples 60 --epochs 1 --batch-size 30"}
    return subprocess.Popen([HERE / "run_all.sh", "--quick", *arguments], env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True, **options)


@pytest.fixture(scope="module")
def tiny_grid(tmp_path_factory):
    """A whole grid through run_all.sh, in a folder with a blank in its name, killed once on its way."""
    out = tmp_path_factory.mktemp("grid") / "tiny grid"
    process = run_all(out)
    while len(common.find_runs(out)) < 5:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    killed_at = {path: (path / "run.json").stat().st_mtime_ns for path in common.find_runs(out)}
    process = run_all(out)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert all((path / "run.json").stat().st_mtime_ns == then for path, then in killed_at.items())
    return out, stdout


def test_grid_killed_and_restarted_is_complete_and_analysed(tiny_grid):
    out, stdout = tiny_grid
    commands = run_all(out, "--list").communicate()[0].splitlines()
    teachers, students = (commands[i + 1:j] for i, j in ((0, commands.index("# students")),
                                                         (commands.index("# students"), None)))
    assert len(common.find_runs(out)) == len(teachers) + len(students) == 22
    assert all("--kd" in line for line in students) and not any("--kd" in line for line in teachers)
    assert f"{len(teachers) + len(students)}/22  ok" in stdout and "unfinished" not in stdout
    for title in ("MNIST (synthetic data)", "Subject-verb agreement (synthetic data):", "language models"):
        assert title in stdout
    for table in "cdefgh":
        assert stdout.count(f"**({table})") == 3
    assert "untested" in stdout and "supported" not in stdout  # one seed proves nothing
    assert "## What is missing" in stdout and (out / "analysis.md").read_text() == stdout[stdout.index("\n## MNIST"):]
    numbers = json.loads((out / "analysis.json").read_text())
    for group in numbers["groups"]:
        for run in group["runs"]:
            record = common.load_run(next(path for path in common.find_runs(out) if path.parts[-2:] == (
                run["name"], f"seed{run['seed']}") and common.load_run(path)["config"] == run["config"]))
            for test, metrics in record["metrics"].items():
                for name, value in metrics.items():
                    if isinstance(value, float):
                        assert run["metrics"][test][name] == pytest.approx(value, abs=2e-5), (run["name"], name)


def test_grid_run_in_another_order_gives_the_same_tables(tiny_grid, tmp_path):
    out, expected = tiny_grid
    copy = shutil.copytree(out, tmp_path / "tiny grid")
    for path in common.find_runs(copy)[::5]:  # as if never run
        shutil.rmtree(path)
    (copy / "mnist-synthetic" / "mlp" / "seed0").mkdir(parents=True, exist_ok=True)
    (copy / "mnist-synthetic" / "mlp" / "seed0" / ".run.json.1.tmp").write_text("{")
    process = run_all(copy)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert tables(stdout, copy) == tables(expected, out)


def analyze_here(*arguments):
    """analyze.py with these arguments, in this process, ended as from the shell."""
    common.run_main(analyze.main, [str(argument) for argument in arguments])


def test_analysis_names_what_is_missing_and_does_the_rest(grid, tmp_path, capfd):
    out = shutil.copytree(grid[0], tmp_path / "runs" / "mnist-synthetic")
    (out / "cnn-to-mlp" / "seed0" / "run.json").write_text('{"config": ')
    (out / "mlp-to-mlp" / "seed0" / "outputs.npz").write_bytes(b"PK")
    (out / "cnn-to-cnn" / "seed0" / "model.pt").unlink()
    (out / "mlp-to-cnn" / "seed0" / "run.json").unlink()
    for name, record in {"other-task": {"config": {"task": "chess"}, "metrics": {}},
                         "other-keys": {"config": {"task": "mnist", "model": "mlp"}, "metrics": {}}}.items():
        shutil.copytree(out / "mlp" / "seed0", out / name / "seed0")
        (out / name / "seed0" / "run.json").write_text(json.dumps(record))
    shutil.copytree(out / "mlp" / "seed0", out / "copy" / "seed0")
    for seed in (0, 1):  # of a version with more models
        shutil.copytree(out / "mlp" / f"seed{seed}", out / "perceptron" / f"seed{seed}")
        record = common.load_run(out / "perceptron" / f"seed{seed}")
        record["config"]["student"] = "perceptron"
        (out / "perceptron" / f"seed{seed}" / "run.json").write_text(json.dumps(record))
    mnist("--student", "mlp", "--seed", 7, *QUICK, "--out", tmp_path / "runs", "--quiet", "--examples", 300)
    analyze_here(tmp_path / "runs", "--json", tmp_path / "numbers" / "all.json")
    stdout, stderr = capfd.readouterr()
    assert stderr == "" and stdout.count("**(a)") == 1 and stdout.count("**(h)") == 1
    missing = stdout[stdout.index("## What is missing"):].splitlines()
    for name, words in {"cnn-to-mlp": "left out", "mlp-to-mlp": "left out", "cnn-to-cnn": "no barrier",
                        "mlp-to-cnn": "unfinished", "other-task": "left out", "other-keys": "left out",
                        "mlp/seed7": "other data", "mlp/seed0": "a second mlp"}.items():
        assert any(words in line and f"/{name}" in line for line in missing), name
    assert any("no barrier for perceptron" in line and "no model 'perceptron'" in line for line in missing)
    assert json.loads((tmp_path / "numbers" / "all.json").read_text())["missing"]


def test_reader_that_has_seen_enough(grid):
    process = subprocess.Popen([sys.executable, HERE / "analyze.py", grid[0]], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert "0.5" in process.stdout.read(3000)  # and a table, though ± is unknown there
    process.stdout.close()
    assert process.wait(60) == 141 and process.stderr.read() == ""


def test_analysis_of_no_runs_and_of_no_folder(tmp_path, capfd, monkeypatch):
    analyze_here(tmp_path)
    assert "has no finished run" in capfd.readouterr().out
    assert_refused(capfd, [tmp_path / "nowhere"], "no such folder", script=analyze_here)
    assert_refused(capfd, [tmp_path, "--json", tmp_path], "is a folder", script=analyze_here)
    assert_refused(capfd, [tmp_path, "--json", "/proc/numbers.json"], "another folder with --json", script=analyze_here)
    assert_refused(capfd, [], "required: runs", script=analyze_here)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it weren't installed
    assert_refused(capfd, [tmp_path, "--plots", tmp_path / "figures"], "needs matplotlib", script=analyze_here)


def test_student_with_its_teachers_outputs_is_found_out(grid, tmp_path, capfd):
    out = tmp_path / "mnist-synthetic"
    for name, seed in (("mlp", 0), ("mlp", 1), ("mlp-to-mlp", 0)):
        shutil.copytree(grid[0] / name / f"seed{seed}", out / name / f"seed{seed}")
    shutil.copy(out / "mlp" / "seed1" / "outputs.npz", out / "mlp-to-mlp" / "seed0" / "outputs.npz")
    analyze_here(tmp_path, "--json", tmp_path / "all.json")
    group, = json.loads((tmp_path / "all.json").read_text())["groups"]
    rows = {key: group["tables"][key]["rows"]["mlp-to-mlp"] for key in "cde"}
    found = [rows["c"][f"{name}, own teacher"] for name in ("agreement", "error consistency", "divergence")]
    found += [rows["d"]["RSA, own teacher"], rows["d"]["CKA, own teacher"], rows["e"]["distance, own teacher"]]
    assert [value for value, in found] == pytest.approx([1, 1, 0, 1, 1, 0], abs=1e-4)
    assert group["tables"]["c"]["rows"]["mlp"]["agreement, other plain"][0] < 0.99


def test_nothing_is_learnt_from_shuffled_labels_and_the_analysis_says_so(tmp_path, monkeypatch):
    make_data, shuffles = train_mnist.make_data, itertools.count()

    def shuffled(*arguments):  # anew for each run: what one shuffle teaches by chance, it teaches all seeds
        data, generator = make_data(*arguments), torch.Generator().manual_seed(next(shuffles))
        images, labels = data["train"]
        return data | {"train": (images, labels[torch.randperm(len(labels), generator=generator)])}

    monkeypatch.setattr(train_mnist, "make_data", shuffled)
    for seed in range(3):
        for flags in (SETUPS["cnn"], SETUPS["mlp"], SETUPS["cnn-to-mlp"]):
            mnist(*flags, *QUICK, "--examples", 1200, "--seed", seed, "--out", tmp_path, "--quiet")
    analyze_here(tmp_path, "--json", tmp_path / "all.json")
    group, = json.loads((tmp_path / "all.json").read_text())["groups"]
    for name, row in group["tables"]["a"]["rows"].items():  # chance is 0.1, standard deviation over 200 digits 0.02
        for test in ("test", "scaled", "translated"):
            assert max(row[f"accuracy, {test}"]) < 0.2 and 0.03 < np.mean(row[f"accuracy, {test}"]) < 0.18, (name, test)
    for claim in group["claims"]:
        if "accuracy, cnn" in claim["claim"]:
            assert claim["verdict"] != "supported" or claim["mean"] < 0.03, claim


@pytest.mark.parametrize("name", ["agr_50_mostcommon_10K.tsv.gz", "numpred.train"])
def test_grid_takes_real_sentences_in_either_layout(tmp_path, name):
    for script in HERE.glob("*.*"):
        if script.suffix in (".py", ".sh"):
            shutil.copy(script, tmp_path)
    for kind in ("images-idx3", "labels-idx1"):  # of no use, but there: nothing is downloaded
        for part in ("train", "t10k"):
            write_idx(tmp_path / "data" / "MNIST" / "raw" / f"{part}-{kind}-ubyte", np.zeros(3, dtype=np.uint8))
    (tmp_path / "data" / name).touch()
    result = subprocess.run([tmp_path / "run_all.sh", "--list"], env=os.environ | {"PYTHON": sys.executable},
                            capture_output=True, text=True)
    lines = {script: [line for line in result.stdout.splitlines() if script in line] for script in ("mnist", "sva")}
    assert len(lines["mnist"]) == 24 and all("--data synthetic" in line for line in lines["mnist"])
    assert len(lines["sva"]) == 132 and not any("--data synthetic" in line for line in lines["sva"])


@pytest.mark.parametrize("arguments, variables, expected", [
    (["--fast"], {}, "unknown argument --fast"),
    ([], {"SEEDS": "0"}, "whole numbers in 1..9999"),
    ([], {"JOBS": "two"}, "whole numbers in 1..9999"),
    ([], {"PYTHON": "/nowhere/python"}, "lacks torch"),
    (["--quick"], {"OUT": "/proc/runs"}, "can't write to /proc/runs"),
])
def test_bad_input_to_the_grid_is_one_line(arguments, variables, expected):
    result = subprocess.run([HERE / "run_all.sh", *arguments], capture_output=True, text=True,
                            env=os.environ | {"PYTHON": sys.executable} | variables)
    assert result.returncode == 2 and expected in result.stderr and result.stderr.count("\n") == 1
