"""Tests: `pytest -q test_smoke.py`, without network or data."""

import contextlib
import gzip
import http.server
import itertools
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import analyze
import common
import train_mnist
import train_sva

HERE = Path(__file__).parent
CPU = torch.device("cpu")
QUICK = ["--data", "synthetic", "--examples", "600", "--epochs", "3", "--device", "cpu"]
SVA_QUICK = ["--data", "synthetic", "--examples", "200", "--epochs", "2", "--device", "cpu"]
SETUPS = {
    "mlp": ["--student", "mlp"],
    "cnn": ["--student", "cnn"],
    "mlp-to-mlp": ["--student", "mlp", "--kd"],
    "cnn-to-mlp": ["--teacher", "cnn", "--student", "mlp", "--kd"],
    "mlp-to-cnn": ["--teacher", "mlp", "--student", "cnn", "--kd"],
    "cnn-to-mlp-online": ["--teacher", "cnn", "--student", "mlp", "--kd", "online"],
}


def in_process(main):
    """A script's main with these arguments, in this process, ended as from the shell."""
    return lambda *arguments: common.run_main(main, [str(argument) for argument in arguments])


mnist, sva = in_process(train_mnist.main), in_process(train_sva.main)
analyze_here = in_process(lambda argv: analyze.main(["--device", "cpu", *argv]))


def random_logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_refused(capfd, script, arguments, expected):
    """Bad input: one line on stderr, exit code 2."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        script(*arguments)
    stderr = capfd.readouterr().err
    assert end.value.code == 2 and stderr.count("\n") == 1 and expected in stderr, stderr


# ---- KD loss and metrics -------------------------------------------------------------------------


def test_kd_loss_is_the_formula():
    student, teacher = random_logits(4, 3).double(), random_logits(4, 3, seed=1).double()
    labels, temperature, alpha, total = [0, 2, 1, 1], 3.0, 0.7, 0.0

    def softmax(row, t):
        exponentials = [math.exp(value / t) for value in row]
        return [value / sum(exponentials) for value in exponentials]

    for s, t, label in zip(student.tolist(), teacher.tolist(), labels):
        p, q = softmax(t, temperature), softmax(s, temperature)
        total += alpha * temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q))
        total -= (1 - alpha) * math.log(softmax(s, 1)[label])
    loss = common.kd_loss(student, teacher, torch.tensor(labels), temperature, alpha)
    assert loss.item() == pytest.approx(total / 4)


def test_kd_loss_identities():
    student, teacher = random_logits(10, 7).requires_grad_(), random_logits(10, 7, seed=1)
    teacher.requires_grad_()
    labels = torch.arange(10) % 7
    cross_entropy, one_hot = F.cross_entropy(student, labels), F.one_hot(labels, 7) * 1e4
    assert common.kd_loss(student, student, None, 4).item() == pytest.approx(0, abs=1e-6)
    assert torch.allclose(common.kd_loss(student, teacher, labels, alpha=0), cross_entropy)
    assert torch.allclose(common.kd_loss(student, one_hot, labels), cross_entropy)
    sizes = []
    for temperature in (20, 200):
        student.grad = None
        common.kd_loss(student, teacher, labels, temperature).backward()
        sizes.append(student.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05) and sizes[0] > 0.01
    assert teacher.grad is None


def test_expected_calibration_error():
    # By hand, 2 bins, (0, .5] and (.5, 1]: .5 (right) | .9 (right), .8 (wrong), .6 (right).
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.1, 0], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    by_hand = 1 / 4 * abs(1 - 0.5) + 3 / 4 * abs(2 / 3 - (0.9 + 0.8 + 0.6) / 3)
    labels = torch.tensor([0, 0, 0, 2])
    found = common.expected_calibration_error(probabilities, labels, n_bins=2)
    assert found == pytest.approx(by_hand, abs=1e-6)
    probabilities, labels = random_logits(500, 10).mul(2).softmax(1), torch.arange(500) % 10
    expected = 0.0
    for low in range(15):
        rows = [i for i in range(500) if low / 15 < probabilities[i].max() <= (low + 1) / 15]
        right = sum(int(probabilities[i].argmax() == labels[i]) for i in rows)
        expected += abs(right - sum(probabilities[i].max().item() for i in rows)) / 500
    found = common.expected_calibration_error(probabilities, labels)
    assert found == pytest.approx(expected, abs=1e-6)
    assert common.expected_calibration_error(F.one_hot(labels).float(), labels) == 0


def test_error_consistency():
    labels = torch.zeros(10, dtype=torch.long)
    a = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1, 1])  # right on 7
    b = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 0])  # 7 right, as a on 8; .7² + .3² = .58
    assert common.error_consistency(a, b, labels) == pytest.approx((0.8 - 0.58) / (1 - 0.58))
    assert common.error_consistency(labels, labels, labels) == 1  # no errors at all: no NaN
    assert common.error_consistency(a, a, labels) == 1
    assert common.error_consistency(labels, a, labels) == pytest.approx(0)
    opposite = torch.tensor([0, 1]), torch.tensor([1, 0])
    assert common.error_consistency(*opposite, labels[:2]) == pytest.approx(-1)


def test_js_divergence():
    a, b = torch.tensor([[1.0, 0]]), torch.tensor([[0.5, 0.5]])
    entropy_of_mean = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert common.js_divergence(a, b) == pytest.approx(entropy_of_mean - 0.5)
    assert common.js_divergence(a, a) == 0
    assert common.js_divergence(a, a.flip(1)) == pytest.approx(1)
    p, q = random_logits(50, 4).softmax(1), random_logits(50, 4, seed=1).softmax(1)
    m = (p + q) / 2
    by_kl = ((p * (p / m).log2()).sum(1) / 2 + (q * (q / m).log2()).sum(1) / 2).mean().item()
    assert common.js_divergence(p, q) == pytest.approx(by_kl, abs=1e-6)


def test_rsa_and_linear_cka():
    x = random_logits(300, 6).double() + 0.3
    rotation = torch.linalg.qr(random_logits(6, 6, seed=1).double())[0]
    noise = random_logits(300, 6, seed=2).double()
    assert common.rsa(x, 3 * x @ rotation) == pytest.approx(1)
    assert common.linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1)
    # Unrelated rows of cosines share nothing but the 1 on the diagonal: 1 in about 1 + 300 / 6.
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


# ---- Run files, progress, bad input --------------------------------------------------------------


def save_example(directory, tag, force=False, **record):
    common.save_run(directory, {"config": {"student": "x", "tag": tag}, "metrics": {}, **record},
                    {"x": torch.arange(3)}, {"w": torch.tensor([float(tag)])}, force)


def test_run_files(tmp_path):
    directory, config = tmp_path / "a" / "seed0", {"student": "x", "tag": 1}
    assert common.load_run(directory) is None
    save_example(directory, 1, loss=math.nan)
    assert common.load_run(directory)["loss"] is None  # valid JSON, not the word NaN
    assert sorted(p.name for p in directory.iterdir()) == ["model.pt", "outputs.npz", "run.json"]
    assert common.load_outputs(directory)["x"].tolist() == [0, 1, 2]
    assert common.finished_run(directory, config)["config"] == config
    assert common.finished_run(directory, config | {"tag": 2}, force=True) is None
    with pytest.raises(common.UserError, match="tag is 1, not 2"):  # another process was faster
        save_example(directory, 2)
    save_example(directory, 1, loss=3)
    assert common.load_run(directory)["loss"] is None  # the first of two equal runs stays
    save_example(directory, 2, force=True)
    assert common.load_run(directory)["config"]["tag"] == 2
    assert [path.name for path in directory.parent.iterdir()] == ["seed0"]  # nothing left behind
    for name, load in (("outputs.npz", common.load_outputs), ("run.json", common.load_run),
                       ("model.pt", lambda d: common.load_weights(torch.nn.Linear(1, 1), d))):
        (directory / name).write_bytes((directory / name).read_bytes()[:-9])
        with pytest.raises(common.UserError, match="damaged"):
            load(directory)


@pytest.mark.parametrize("moment", range(3))
def test_interrupted_save_leaves_the_old_run_or_the_new_one(tmp_path, monkeypatch, moment):
    save_example(tmp_path / "seed0", 1)
    rename, calls = Path.rename, []

    def interrupted(*paths):
        calls.append(paths)
        if len(calls) == moment + 1:
            raise KeyboardInterrupt
        return rename(*paths)

    monkeypatch.setattr(Path, "rename", interrupted)
    with contextlib.suppress(KeyboardInterrupt):
        save_example(tmp_path / "seed0", 2, force=True)
    assert common.load_run(tmp_path / "seed0")["config"]["tag"] == (2 if moment == 2 else 1)
    assert [path.name for path in tmp_path.iterdir()] == ["seed0"]


def test_progress_says_where_it_is_and_how_long(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    progress = common.Progress(epochs=4)
    progress.start -= 10  # as if the first epoch had taken ten seconds
    progress.epoch(1, 0.5, 0.9, 10.0)
    progress.last_shown -= 1
    progress.step(2, 3, 8)
    assert re.search(r"1/4 .*0\.5.*0\.9.* 30 s left\n.*batch 3/8", capsys.readouterr().out)


@pytest.mark.parametrize("script, arguments, expected", [
    (mnist, ["--student", "rnn"], "invalid choice"),
    (mnist, ["--teacher", "cnn"], "--teacher has no effect without --kd"),
    (mnist, ["--kd", "--seed", "3", "--teacher-seed", "3"], "twin"),
    (mnist, ["--epochs", "1.5"], "invalid whole number value: '1.5'"),
    (mnist, ["--kd", "--alpha", "nan"], "not in 0..1"),
    (mnist, ["--lr", "1e9"], "try a lower --lr"),
    (mnist, ["--device", "cuda:99"], "--device cuda:99"),
    (mnist, ["--out", "/proc/runs"], "/proc/runs"),
    (sva, ["--objective", "lm", "--student", "transformer"], "needs transformer-seq"),
    (sva, ["--every-word", "--objective", "lm"], "--every-word is for classifiers"),
    (analyze_here, ["nowhere"], "no such folder"),
])
def test_bad_input_is_one_line(tmp_path, capfd, script, arguments, expected):
    if script is not analyze_here:  # what the case gives comes last and wins
        arguments = [*QUICK, "--quiet", "--out", tmp_path, *arguments]
    assert_refused(capfd, script, arguments, expected)
    assert not list(tmp_path.rglob("*.*"))


class Watch(TorchDispatchMode):
    """Notes every operation: (name, types of its arguments, types of its results)."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        dtypes = [[x.dtype for x in torch.utils._pytree.tree_leaves(values)
                   if isinstance(x, torch.Tensor)] for values in (args, result)]
        self.seen.append((function.overloadpacket.__name__, *dtypes))
        return result


@pytest.mark.parametrize("script, student, teacher, flags", [
    (train_mnist, "mlp", "cnn", []), (train_sva, "transformer-seq", "lstm", []),
    (train_sva, "transformer", "ut-seq", []), (train_sva, "ut-seq", "lstm", ["--every-word"]),
    (train_sva, "transformer-seq", "lstm", ["--objective", "lm"])])
def test_no_step_waits_for_a_gpu_and_nothing_is_float64(tmp_path, monkeypatch, script, student,
                                                        teacher, flags):
    steps = []
    monkeypatch.setattr(script, "test_all", lambda *_: ({"test": {}}, {}))  # metrics: on the CPU
    monkeypatch.setattr(common.Progress, "step", lambda *_: steps.append(len(watch.seen)))
    monkeypatch.setattr(common.Progress, "epoch", lambda *_: steps.append(None))
    flags = [*SVA_QUICK, "--batch-size", 40, "--epochs", 1, "--quiet", *flags]
    for kd in ([], ["--kd", "--teacher", teacher], ["--kd", "online", "--teacher", teacher]):
        with Watch() as watch:
            in_process(script.main)(*flags, "--student", student, *kd, "--out", tmp_path)
        assert not any(torch.float64 in results for _, _, results in watch.seen)
        within = [watch.seen[a:b] for a, b in zip(steps, steps[1:]) if None not in (a, b) and a < b]
        assert len(within) >= 2
        for name, arguments, _ in itertools.chain(*within):
            assert name not in ("nonzero", "_local_scalar_dense")
            assert not (name == "index" and torch.bool in arguments)  # nonzero by another name
        steps.clear()


# ---- MNIST: data ---------------------------------------------------------------------------------


def test_translate_and_scale():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 28, 28), dtype=torch.uint8, generator=generator)
    moved, seen = train_mnist.translate(images), set()
    for image, result in zip(images, moved):
        framed = F.pad(image, (3,) * 4)  # rolled, zeros move in
        matches = [shift for shift in itertools.product((-3, 3), repeat=2)
                   if torch.equal(framed.roll(shift, (0, 1))[3:-3, 3:-3], result)]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) == 4 and torch.equal(moved, train_mnist.translate(images))
    shrunk = train_mnist.scale(images[:1])[0]
    for row, column in ((0, 0), (4, 4), (9, 20), (13, 14), (23, 5), (27, 13)):
        y, x = (row - 13.5) / 0.7 + 13.5, (column - 13.5) / 0.7 + 13.5
        expected = sum((1 - abs(y - i)) * (1 - abs(x - j)) * images[0, i, j].item()
                       for i in (math.floor(y), math.floor(y) + 1)
                       for j in (math.floor(x), math.floor(x) + 1) if 0 <= i < 28 and 0 <= j < 28)
        assert shrunk[row, column].item() == pytest.approx(expected, abs=0.02)  # of 255


def test_synthetic_digits_are_seeded_centred_and_like_mnist():
    images, labels = train_mnist.synthetic_digits(2000, seed=0)
    assert torch.equal(images, train_mnist.synthetic_digits(2000, seed=0)[0])
    assert not torch.equal(images, train_mnist.synthetic_digits(2000, seed=1)[0])
    assert torch.equal(labels, train_mnist.synthetic_digits(2000, seed=0)[1])
    assert labels.bincount().min() > 150
    assert images.shape == (2000, 28, 28) and images.dtype == torch.uint8
    ink = images.double() / 255
    assert 0.08 < ink.mean() < 0.18  # MNIST: 0.131
    for axis in (1, 2):
        centre = (ink.sum(axis) * torch.arange(28)).sum(1) / ink.sum((1, 2))
        assert abs(centre.mean() - 13.5) < 1 and centre.std() < 2.5  # gaps move the centre
        assert ink.select(axis, 0).mean() < 0.02  # hardly anything cut off at the edge


def test_mnist_files_are_read_and_damage_is_reported(tmp_path, capfd):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, size in (("train", 60_000), ("t10k", 10_000)):
        grey = np.arange(size).astype(np.uint8)  # image i is grey level i % 256
        images = np.broadcast_to(grey[:, None, None], (size, 28, 28))
        for name, array in (("images-idx3", images), ("labels-idx1", grey % 10)):
            header = bytes([0, 0, 8, array.ndim])
            header += b"".join(n.to_bytes(4, "big") for n in array.shape)
            (raw / f"{part}-{name}-ubyte").write_bytes(header + array.tobytes())
    source, digits = train_mnist.load_digits("auto", 60_000, tmp_path)
    data = train_mnist.make_data(digits, 60_000, CPU)
    assert source == "mnist" and [len(labels) for _, labels in data.values()] == [
        55_000, 5_000, 10_000, 10_000, 10_000]
    assert (data["validation"][0][0] == 55_000 % 256).all()
    (raw / "train-images-idx3-ubyte").write_bytes(b"cut")
    arguments = ["--device", "cpu", "--data-dir", tmp_path, "--out", tmp_path / "runs"]
    assert_refused(capfd, mnist, arguments, "damaged or swapped")
    result = run_all(tmp_path / "runs", quick=False, DATA=str(tmp_path))
    assert result.wait() == 2 and "damaged or swapped" in result.stderr.read()


def test_without_network_auto_takes_synthetic_digits_and_says_so(tmp_path, capfd, monkeypatch):
    from torchvision.datasets import MNIST

    def no_network(*_, **__):
        raise RuntimeError("Error downloading")

    monkeypatch.setattr(MNIST, "download", no_network)
    arguments = [*QUICK, "--quiet", "--data-dir", tmp_path, "--out", tmp_path / "runs"]
    assert_refused(capfd, mnist, [*arguments, "--data", "mnist"], "can't be downloaded")
    mnist(*arguments, "--data", "auto")
    assert "SYNTHETIC" in capfd.readouterr().err
    assert common.load_run(tmp_path / "runs" / "mnist-synthetic" / "mlp" / "seed0")


# ---- MNIST: all setups ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """All setups, once: (root, printed text per setup, files of the teachers before)."""
    out, text = tmp_path_factory.mktemp("grid"), {}
    root = out / "mnist-synthetic"
    for model in ("mlp", "cnn"):
        mnist("--student", model, "--seed", 1, *QUICK, "--out", out, "--quiet")
    before = {path: path.read_bytes() for path in root.rglob("*.*")}
    for name, flags in SETUPS.items():
        with open(out / f"{name}.txt", "w") as file, contextlib.redirect_stdout(file):
            mnist(*flags, *QUICK, "--out", out)
        text[name] = (out / f"{name}.txt").read_text()
    return root, text, before


def test_every_setup_leaves_a_complete_run_from_one_initialisation(grid):
    root, text, before = grid
    assert len(before) == 6
    assert all(path.read_bytes() == content for path, content in before.items())  # teachers
    digits = train_mnist.load_digits("synthetic", 600, None)[1]
    images, labels = train_mnist.make_data(digits, 600, CPU)["test"]
    first = {}
    for name in SETUPS:
        record, outputs = (load(root / name / "seed0")
                           for load in (common.load_run, common.load_outputs))
        assert set(record) >= {"data", "environment", "parameters", "history", "timing"}
        assert outputs["probe_epochs"].tolist() == [0, 1, 2, 3]
        student, path = record["config"]["student"], outputs["probe_representations"]
        assert path.shape == (4, 100, {"mlp": 32, "cnn": 64}[student])
        plain = first.setdefault(student, path)
        assert torch.equal(path[0], plain[0])
        assert path is plain or not torch.allclose(path[-1], plain[-1])
        logits, metrics = outputs["test_logits"], record["metrics"]["test"]
        accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
        assert metrics["accuracy"] == pytest.approx(accuracy)
        assert metrics["nll"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
        assert metrics["n"] == 100 and f"{accuracy:.4f}" in text[name]
        assert ("untaught" in text[name]) == ("-to-" in name)  # what teaching changed
        model = common.load_weights(train_mnist.MODELS[student](), root / name / "seed0")
        amp = record["environment"]["precision"] == "bfloat16"
        assert (train_mnist.evaluate(model, images, amp)[0] - logits).abs().max() < 0.05
    other = common.load_outputs(root / "mlp" / "seed1")["probe_representations"]
    assert not torch.equal(first["mlp"][0], other[0])
    record = common.load_run(root / "cnn-to-mlp" / "seed0")
    assert record["teacher_metrics"] == common.load_run(root / "cnn" / "seed1")["metrics"]


def test_same_batches_in_every_setup_and_cached_logits_are_the_teachers(grid, tmp_path,
                                                                        monkeypatch):
    """Watch every batch: the same digits in the same order, each with its teacher's logits."""
    seen, to_input, kd_loss = [], train_mnist.to_input, common.kd_loss
    teacher = common.load_weights(train_mnist.CNN(), grid[0] / "cnn" / "seed1").eval()

    def watched_input(images):
        seen.append(images)
        return to_input(images)

    def watched_loss(student_logits, teacher_logits, *rest):
        with torch.no_grad():
            fresh = teacher(to_input(seen[-1]))
        assert (fresh - teacher_logits).abs().max() < 0.1 < fresh.std()  # bfloat16
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
    assert not torch.equal(batches[0][0], batches[0][550 // 128])  # another order in every epoch


def test_answers_do_not_depend_on_the_other_examples_of_a_test(grid):
    model = common.load_weights(train_mnist.CNN(), grid[0] / "cnn" / "seed0").train()
    images = train_mnist.synthetic_digits(100, seed=1)[0]
    statistics = [buffer.clone() for buffer in model.buffers()]
    whole, part = (train_mnist.evaluate(model, x, False)[0] for x in (images, images[:7]))
    assert torch.allclose(whole[:7], part, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(statistics, model.buffers(), strict=True))


def test_finished_run_is_not_repeated_and_repeats_exactly(grid, capsys):
    out, directory = grid[0].parent, grid[0] / "cnn-to-mlp" / "seed0"
    before = (directory / "run.json").read_bytes()
    mnist(*SETUPS["cnn-to-mlp"], *QUICK, "--out", out)
    assert (directory / "run.json").read_bytes() == before
    assert "finished already" in capsys.readouterr().out
    mnist(*SETUPS["cnn-to-mlp"], *QUICK, "--out", out, "--force", "--quiet")
    assert capsys.readouterr().out == "" and (directory / "run.json").read_bytes() != before
    assert common.load_run(directory)["metrics"] == json.loads(before)["metrics"]


def test_runs_in_the_way_and_broken_teachers(grid, tmp_path, capfd):
    root = tmp_path / "mnist-synthetic"
    shutil.copytree(grid[0], root)
    finished = (root / "cnn-to-mlp" / "seed0" / "run.json").read_bytes()
    command = [*SETUPS["cnn-to-mlp"], *QUICK, "--out", tmp_path, "--quiet"]
    assert_refused(capfd, mnist, [*command, "--temperature", "3"], "temperature is 20.0, not 3.0")
    other = [*command, "--seed", "5", "--teacher-seed", "1", "--epochs", "2"]
    assert_refused(capfd, mnist, other, "epochs is 3, not 2")
    shutil.copy(root / "mlp" / "seed1" / "model.pt", root / "cnn" / "seed1")
    assert_refused(capfd, mnist, [*command, "--force"], "model.pt is missing, damaged or of")
    (root / "cnn" / "seed1" / "run.json").write_text("{")
    assert_refused(capfd, mnist, [*command, "--force"], "run.json is missing, damaged")
    assert (root / "cnn-to-mlp" / "seed0" / "run.json").read_bytes() == finished


# ---- The real command line, alone in an empty folder ---------------------------------------------


@pytest.fixture(scope="module")
def copied_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copied out ü")
    for name in ("train_mnist.py", "common.py"):
        shutil.copy(HERE / name, folder)
    return folder


def start(folder, *arguments, largest_file=None):
    def prepare():  # Ctrl-C is switched off, and that is inherited, in the background.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    return subprocess.Popen([sys.executable, "train_mnist.py", *arguments, *QUICK[:4],
                             "--device", "cpu"], cwd=folder, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, preexec_fn=prepare)


def test_two_files_alone_do_the_main_job(copied_out):
    process = start(copied_out, "--teacher", "cnn", "--student", "mlp", "--kd", "--epochs", "2")
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0 and stderr == ""
    assert "teacher cnn" in stdout and "student mlp" in stdout and "s left" in stdout
    assert common.load_run(copied_out / "runs" / "mnist-synthetic" / "cnn-to-mlp" / "seed0")
    command = re.search(r"untaught twin: python train_mnist.py (.*)", stdout).group(1)
    assert start(copied_out, *shlex.split(command), "--quiet").wait(60) == 0  # as it stands
    assert common.load_run(copied_out / "runs" / "mnist-synthetic" / "mlp" / "seed0")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_killed_run_leaves_nothing_that_looks_finished(copied_out, how):
    process = start(copied_out, "--student", "mlp", "--epochs", "100000", "--seed", "7")
    for line in process.stdout:
        if "epoch  " in line:
            break
    process.send_signal(how)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert len(stderr.split("\n")) <= 3 and "Traceback" not in stderr
    assert not list((copied_out / "runs" / "mnist-synthetic" / "mlp").glob("*seed7*"))


def test_disk_that_is_full_at_the_end(copied_out):
    process = start(copied_out, "--epochs", "1", "--seed", "8", "--quiet", largest_file=100_000)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 2 and stderr.count("\n") == 1 and "can't write" in stderr
    assert not list((copied_out / "runs" / "mnist-synthetic" / "mlp").glob("*seed8*"))


# ---- SVA: sentences and models -------------------------------------------------------------------


def test_synthetic_sentences_are_what_they_claim():
    """Number, attractors and distance once more, from the words alone."""
    number_of = {noun + s: bool(s) for noun in train_sva.NOUNS for s in ("", "s")}
    lemmas = {*train_sva.TRANSITIVE, *train_sva.INTRANSITIVE, *train_sva.THINKING}
    assert len(number_of) == 2 * len(set(train_sva.NOUNS)) and not lemmas & set(number_of)
    parts = train_sva.synthetic_sentences(2000)
    assert parts == train_sva.synthetic_sentences(2000)
    for name, part in parts.items():
        slips = 0
        for sentence in part:
            words = sentence.text.split()
            verb, head = words[sentence.verb], sentence.verb - sentence.distance
            assert (verb if sentence.plural else verb[:-1]) in lemmas
            assert sentence.forms[sentence.plural] == verb
            slips += number_of[words[head]] != sentence.plural
            between = [number_of[w] for w in words[head + 1:sentence.verb] if w in number_of]
            assert sentence.attractors == between.count(not number_of[words[head]])
        assert slips == 0 if name == "test" else 0.05 < slips / len(part) < 0.15
    without = sum(sentence.attractors == 0 for sentence in parts["train"]) / len(parts["train"])
    assert 0.7 < without < 0.9
    groups = [min(sentence.attractors, 4) for sentence in parts["test"]]
    assert [groups.count(group) for group in range(5)] == [200] * 5
    hard = [sentence for sentence in parts["test"] if sentence.attractors > 0]
    nouns = [[number_of[word] for word in train_sva.before_verb(s) if word in number_of]
             for s in hard]
    for guess in (0, -1):  # neither the first nor the last noun is a safe guess
        right = sum(numbers[guess] == s.plural for numbers, s in zip(nouns, hard)) / len(hard)
        assert right < 0.75
    seen = {train_sva.before_verb(sentence) for sentence in parts["train"]}
    assert not seen & {train_sva.before_verb(sentence) for sentence in parts["test"]}


def test_vocabulary_and_other_form_of_a_verb():
    sentence = train_sva.Sentence("the cat sees the dog", 2, False, 0, 1, ("sees", "see"))
    vocabulary = train_sva.make_vocabulary([sentence])
    assert vocabulary["the"] == 4 and sorted(vocabulary.values()) == [4, 5, 6, 7]
    other = sentence._replace(text="the whale sees it")
    split, left_out = train_sva.encode([other], vocabulary, "classification")
    assert split.tokens.tolist() == [4, train_sva.UNKNOWN] and left_out == 0
    assert train_sva.encode([other], vocabulary, "lm")[1] == 1  # nobody has ever seen "see"
    endless = sentence._replace(text="the " * 300 + "cat sees", verb=301)
    split, left_out = train_sva.encode([endless, sentence], vocabulary, "classification")
    assert len(split.lengths) == left_out == 1
    known = {"is", "are", "goes", "go", "tries", "try", "sees", "see", "'", "s"}
    for singular, plural in (("is", "are"), ("goes", "go"), ("tries", "try"), ("sees", "see")):
        assert train_sva.counterpart(singular, False, known) == plural
        assert train_sva.counterpart(plural, True, known) == singular
    assert train_sva.counterpart("'s", False, known) is None
    assert train_sva.counterpart("whales", False, known) is None


def test_batches_have_little_padding_and_leave_out_no_sentence_for_long():
    parts = train_sva.synthetic_sentences(6000)
    vocabulary = train_sva.make_vocabulary(parts["train"])
    split, _ = train_sva.encode(parts["train"], vocabulary, "classification")
    generator, seen = torch.Generator().manual_seed(0), []
    for _ in range(4):
        batches = train_sva.batches_by_length(split.lengths, 128, generator)
        assert len(batches.unique()) == batches.numel() == 128 * (6000 // 128)
        lengths = split.lengths[batches]
        padded = lengths.amax(dim=1, keepdim=True).expand_as(lengths)
        assert 1 - lengths.sum() / padded.sum() <= 0.08
        seen.append(batches.flatten())
    assert len(torch.cat(seen).unique()) == 6000
    batch = split.take(batches[0])
    for row, index in zip(batch.padded(int(batch.lengths.max())), batches[0]):
        start, length = split.starts[index], split.lengths[index]
        assert torch.equal(row[:length], split.tokens[start:start + length].long())
        assert not row[length:].any()


@pytest.mark.parametrize("name", train_sva.MODELS)
@torch.no_grad()
def test_padding_has_no_influence_and_only_the_class_token_sees_both_sides(name):
    model = train_sva.build_model(name, 0, 20, "classification", CPU).eval()
    tokens, lengths = random_logits(2, 7).mul(99).long() % 16 + 4, torch.tensor([5, 7])
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
        assert (before[:, 0] - after[:, 0]).abs().amax(dim=1).min() > 1e-4  # the class token
    else:
        assert torch.allclose(before[:, :4], after[:, :4], atol=1e-5)
        assert (before[:, 4] - after[:, 4]).abs().max() > 1e-4
    assert name != "ut-seq" or len(model.blocks) == 1 < model.layers  # one layer shared


@torch.no_grad()
def test_every_word_asks_a_classifier_after_each_word():
    model = train_sva.build_model("lstm-small", 0, 20, "classification", CPU).eval()
    sentences = [train_sva.Sentence(text, verb, verb == 3, 0, 1, ("b", "c"))
                 for text, verb in (("a b c d", 3), ("a c d", 2))]
    split, _ = train_sva.encode(sentences, {"a": 4, "b": 5, "c": 6, "d": 7}, "classification")
    tokens, lengths, where, labels = train_sva.questions(split, 3, 5, "classification", True)
    answers = train_sva.answer(model, tokens, lengths, where)
    prefixes = [[4], [4, 5], [4, 5, 6], [4], [4, 6]]
    alone = [model.head(model.represent(torch.tensor([prefix]), torch.tensor([len(prefix)])))
             for prefix in prefixes]
    assert torch.allclose(answers, torch.cat(alone), atol=1e-6)
    assert labels.tolist() == [1, 1, 1, 0, 0]


@torch.no_grad()
def test_language_model_scores_words_and_verb_forms_like_a_loop():
    model = train_sva.build_model("lstm-small", 0, 20, "lm", CPU).eval()
    sentence = train_sva.Sentence("a b c d", 2, True, 0, 1, ("b", "c"))
    other = sentence._replace(text="a c d", verb=1)
    split, _ = train_sva.encode([sentence, other], {"a": 4, "b": 5, "c": 6, "d": 7}, "lm")
    logits, _, perplexity = train_sva.evaluate(model, split, "lm", False)
    tokens, lengths, where, labels = train_sva.questions(split, 6, 9, "lm")
    in_training = train_sva.answer(model, tokens, lengths, where).log_softmax(dim=1)
    assert labels.tolist() == [4, 5, 6, 7, train_sva.END, 4, 6, 7, train_sva.END]
    total, words = 0.0, 0
    for row, (text, verb) in enumerate((([4, 5, 6, 7], 2), ([4, 6, 7], 1))):
        sequence = [train_sva.START, *text, train_sva.END]
        for position in range(1, len(sequence)):
            prefix = torch.tensor([sequence[:position]])
            state = model.states(prefix, torch.tensor([position]))[0, -1]
            scores = model.head(state).log_softmax(0)
            assert torch.allclose(in_training[words], scores, atol=1e-5)
            total, words = total - scores[sequence[position]].item(), words + 1
            if position == verb + 1:
                assert torch.allclose(logits[row], scores[[5, 6]], atol=1e-5)
    assert perplexity == pytest.approx(math.exp(total / words), rel=1e-5)


def test_agreement_metrics_by_hand():
    logits = torch.tensor([[2.0, 0]] * 4)  # says singular, always
    labels, attractors = torch.tensor([0, 0, 1, 0]), torch.tensor([0, 0, 0, 6])
    metrics = train_sva.agreement_metrics(logits, labels, attractors, torch.tensor([1, 20, 3, 3]))
    assert metrics["accuracy"] == 0.75
    assert metrics["a_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert metrics["accuracy_by_attractors"] == {"0": pytest.approx(2 / 3), "4": 1.0}
    assert metrics["accuracy_by_distance"] == {"1": 1.0, "3": 0.5} and metrics["d_accuracy"] == 0.75
    unknown = torch.full((4,), -1)
    assert train_sva.agreement_metrics(logits, labels, attractors, unknown)["d_accuracy"] is None


# ---- SVA: files of Linzen et al. -----------------------------------------------------------------

NUMPRED = sorted(f"numpred.{name}" for name in ("train", "val", *(f"test.{k}" for k in range(6))))
TABLE = "agr_50_mostcommon_10K.tsv"
HEAD = "sentence\tverb_pos\tsubj_index\tverb_index\tn_diff_intervening\tdistance"


def write_table(path, rows=None):
    singular = "the key near it is old {}\tVBZ\t2\t5\t0\t3"
    plural = "the keys near it are old {}\tVBP\t2\t5\t0\t3"
    rows = rows or [(plural if i % 2 else singular).format(i % 7) for i in range(600)]
    text = "\n".join([HEAD, *rows]) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_before_verbs(folder, leave_out=()):
    for name in set(NUMPRED) - set(leave_out):
        lines = [f"VBZ\tthe key near {name[8:]}\n", f"VBP\tthe keys near {name[8:]}\n"] * 40
        (folder / name).write_text("".join(lines))


def test_both_layouts_are_read(tmp_path):
    write_before_verbs(tmp_path)
    source, sizes, parts = train_sva.load_sentences("auto", tmp_path)
    assert source == "linzen" and sorted(sizes) == NUMPRED
    assert [len(part) for part in parts.values()] == [80, 80, 480]
    assert parts["test"][-1].attractors == 5 and parts["test"][0].forms == ("VBZ", "VBP")
    for name in (f"{TABLE}.gz", TABLE):
        write_table(tmp_path / name)
        _, sizes, parts = train_sva.load_sentences("auto", tmp_path)
        assert list(sizes) == [name] and [len(part) for part in parts.values()] == [60, 6, 534]
        sentence = parts["train"][0]
        assert sentence.text.split()[sentence.verb] == ("are" if sentence.plural else "is")
        assert sentence.distance == 3
    vocabulary = train_sva.make_vocabulary(parts["train"])
    split, left_out = train_sva.encode(parts["test"], vocabulary, "lm")
    forms = torch.tensor([vocabulary["is"], vocabulary["are"]])
    assert left_out == 0 and (split.forms == forms).all()


@pytest.mark.parametrize("damage, expected", [
    (lambda f: write_table(f / TABLE, ["a b\tVBZ\t1\t2\t0\t1", "broken"]), "line 3"),
    (lambda f: (f / TABLE).write_bytes(f"{HEAD}\n".encode() + b"\xff\xfe\n"), "can't decode"),
    (lambda f: (f / f"{TABLE}.gz").write_bytes(b"not gzip"), "ot a gzipped file"),
    (lambda f: (write_before_verbs(f), (f / "numpred.val").write_text("VBZ\ta\nVBX\n")), "line 2"),
    (lambda f: write_before_verbs(f, ("numpred.train", "numpred.test.3")),
     "no numpred.train, numpred.test.3"),
])
def test_damaged_sentence_files_are_reported(tmp_path, capfd, damage, expected):
    damage(tmp_path)
    command = ["--data", "linzen", "--data-dir", tmp_path, "--out", tmp_path / "runs", "--quiet",
               "--device", "cpu"]
    assert_refused(capfd, sva, command, expected)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a server that plays each way in which a download can go."""
    folder = tmp_path_factory.mktemp("server")
    write_table(folder / f"{TABLE}.gz")
    write_before_verbs(folder)
    with tarfile.open(folder / "a.tar.gz", "w:gz") as archive:
        for path in sorted(folder.glob("numpred.*")):
            archive.add(path, f"../../{path.name}")
        archive.add(folder / f"{TABLE}.gz", "/tmp/not-asked-for")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            fault, name = self.path[1:].split("/")
            found = b"<html>gone</html>" if fault == "html" else (folder / name).read_bytes()
            if fault == "hangs":
                return time.sleep(1.5)
            self.send_response(200)
            self.send_header("Content-Length", str(len(found)))
            self.end_headers()
            self.wfile.write(found[:-50] if fault == "cut" else found)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize("first, second", [
    ("html/table", "whole/archive"), ("cut/table", "whole/archive"), ("hangs/table", "whole/table"),
    ("refused/table", "whole/table"), ("cut/archive", "html/table"),
])
def test_sentences_are_fetched_whole_or_not_at_all(server, tmp_path, monkeypatch, capfd, first,
                                                   second):
    names, sources = {"table": f"{TABLE}.gz", "archive": "a.tar.gz"}, []
    for source in (first, second):
        fault, kind = source.split("/")
        address = "http://127.0.0.1:9" if fault == "refused" else server
        sources.append((f"{address}/{fault}/{names[kind]}", names[kind]))
    monkeypatch.setattr(train_sva, "SOURCES", sources)
    monkeypatch.setattr(train_sva, "TIMEOUT", 0.5)
    if second.startswith("html"):
        with pytest.raises(SystemExit) as end:
            sva("--data", "linzen", "--data-dir", tmp_path, "--out", tmp_path.parent / "runs")
        lines = capfd.readouterr().err.splitlines()
        assert end.value.code == 2 and "can't fetch" in lines[-1] and len(lines) == 3
        assert not list(tmp_path.iterdir())
    else:
        assert train_sva.load_sentences("linzen", tmp_path)[0] == "linzen"
        fetched = sorted(path.name for path in tmp_path.iterdir())
        assert fetched == ([f"{TABLE}.gz"] if second == "whole/table" else NUMPRED)


def test_examples_are_drawn_once_and_files_told_apart(tmp_path, capfd):
    write_before_verbs(tmp_path)
    parts, again = (train_sva.load_sentences("linzen", tmp_path, 30)[2] for _ in range(2))
    assert parts == again and len(parts["train"]) == 30 and len(parts["test"]) == 480
    command = ["--data-dir", tmp_path, "--out", tmp_path / "runs", "--epochs", 1, "--quiet",
               "--student", "lstm-small", "--device", "cpu"]
    assert_refused(capfd, sva, [*command, "--examples", 81], "there are 80")
    sva(*command)
    (tmp_path / "numpred.val").write_text("VBZ\tthe key\n")
    assert_refused(capfd, sva, command, "bytes is")  # not the data that run was made with


# ---- SVA: all setups -----------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["classification", "lm"])
def test_sva_setups(tmp_path, monkeypatch, objective):
    """Complete runs, one initialisation, the same batches, a teacher that rests."""
    root = tmp_path / ("sva-lm-synthetic" if objective == "lm" else "sva-synthetic")
    command = [*SVA_QUICK, "--objective", objective, "--out", tmp_path, "--quiet"]
    for model in train_sva.MODELS:
        if (objective, model) != ("lm", "transformer"):
            sva(*command, "--student", model, "--seed", 1)
    before = (root / "lstm" / "seed1" / "model.pt").read_bytes()
    batches, asked, questions, states = [], [], train_sva.questions, train_sva.LSTM.states

    def watched_questions(batch, *rest):
        if torch.is_grad_enabled():
            batches.append(batch.starts)
        return questions(batch, *rest)

    def watched_states(model, *rest):
        asked.append((torch.is_grad_enabled(), model.training))
        return states(model, *rest)

    monkeypatch.setattr(train_sva, "questions", watched_questions)
    monkeypatch.setattr(train_sva.LSTM, "states", watched_states)
    setups = {"transformer-seq": [], "transformer-seq-to-transformer-seq": ["--kd"],
              "lstm-to-transformer-seq": ["--kd", "--teacher", "lstm"],
              "lstm-to-transformer-seq-online": ["--kd", "online", "--teacher", "lstm"]}
    paths, seen = {}, {}
    for name, flags in setups.items():
        sva(*command, "--student", "transformer-seq", *flags)
        while_training = [training for gradient, training in asked if gradient]
        if name == "lstm-to-transformer-seq":  # a classifier's teacher is never asked, a language
            assert bool(while_training) == (objective == "lm")  # model's in eval mode
            assert not any(while_training)
        seen[name] = batches[:]
        batches.clear()
        asked.clear()
        record, arrays = (load(root / name / "seed0")
                          for load in (common.load_run, common.load_outputs))
        metrics, paths[name] = record["metrics"]["test"], arrays["probe_representations"]
        correct = arrays["test_logits"].argmax(dim=1) == arrays["test_labels"]
        groups = arrays["test_attractors"].clamp(max=4)
        by_group = [correct[groups == k].float().mean().item() for k in range(5)]
        assert metrics["n"] == len(correct) >= 90  # of 100; some lack the verb's other form
        assert metrics["accuracy"] == pytest.approx(correct.float().mean().item())
        assert metrics["a_accuracy"] == pytest.approx(np.mean(by_group))
        assert ("perplexity" in metrics) == (objective == "lm")
    assert (root / "lstm" / "seed1" / "model.pt").read_bytes() == before
    plain, *taught = setups
    assert not torch.equal(seen[plain][0], seen[plain][-1])
    for name in taught:
        assert torch.equal(paths[name][0], paths[plain][0])
        assert not torch.allclose(paths[name][-1], paths[plain][-1])
        assert all(torch.equal(a, b) for a, b in zip(seen[name], seen[plain], strict=True))
    assert record["config"]["teacher_batch_size"] == record["config"]["batch_size"]  # online


def test_diverged_language_model_has_no_perplexity_and_can_teach(tmp_path, capfd):
    command = [*SVA_QUICK, "--objective", "lm", "--student", "lstm-small", "--lr", 1000, "--out",
               tmp_path]
    sva(*command, "--seed", 1)
    record = common.load_run(tmp_path / "sva-lm-synthetic" / "lstm-small" / "seed1")
    assert record["metrics"]["test"]["perplexity"] is None  # valid JSON
    sva(*command, "--kd")
    assert "teacher lstm-small" in capfd.readouterr().out


# ---- Analysis ------------------------------------------------------------------------------------


def test_t_test():
    mean, low, high, *_ = analyze.t_test([1.0, 2.0, 3.0, 4.0])  # standard error sqrt(5/3) / 2
    expected = 2.5, 2.5 - 3.1824 * 0.645497, 2.5 + 3.1824 * 0.645497  # tabulated: t(3) = 3.182
    assert (mean, low, high) == pytest.approx(expected, abs=1e-4)
    assert analyze.t_distribution(1, 12.706)[1][-1].item() == pytest.approx(0.95, abs=1e-5)
    assert analyze.t_distribution(9, 4.781)[1][-1].item() == pytest.approx(0.999, abs=1e-5)
    for values, margin, expected in (
            ([0.1, 0.2, 0.3], 0, "inconclusive"), ([0.1, 0.2], 0, "untested"),
            ([0.2, 0.21, 0.22], 0, "supported"), ([-0.2, -0.21, -0.22], 0, "contradicted"),
            ([0.01, 0.0, -0.01], 0.05, "supported"), ([0.2, 0.21, 0.22], 0.05, "contradicted"),
            ([-0.2, -0.21, -0.22], 0.05, "contradicted"), ([0.2, 0.0, -0.2], 0.05, "inconclusive")):
        *_, verdict, p = analyze.t_test(values, margin)
        assert verdict == expected
        assert verdict == "untested" or (p < 0.05) == (verdict != "inconclusive")
    assert analyze.holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]  # Holm's example


def test_few_false_verdicts_on_variance():
    """Simulated seeds without any difference between two kinds of model: 5 % false verdicts."""
    generator = torch.Generator().manual_seed(0)
    for n, features in itertools.product((3, 4, 8), (1, 30)):
        weak, strong = torch.randn(2, 1000, n, features, generator=generator).double()
        spread = torch.cdist(weak, weak).square() - torch.cdist(strong, strong).square()
        values = torch.stack([analyze.jackknife(pairs) for pairs in spread])
        half = {3: 4.3027, 4: 3.1824, 8: 2.3646}[n] * values.std(dim=1) / math.sqrt(n)
        assert (values.mean(dim=1).abs() > half).sum() <= 70, (n, features)
    pairs = torch.rand(6, 6, generator=generator)
    pairs, others = pairs + pairs.T, torch.eye(6) == 0
    left_out = pairs[1:, 1:][others[1:, 1:]].mean()  # the pseudo-value of the first seed
    expected = 6 * pairs[others].mean() - 5 * left_out
    assert analyze.jackknife(pairs)[0] == pytest.approx(expected.item(), rel=1e-5)


def test_classical_mds_recovers_a_configuration():
    points = random_logits(12, 2).double()
    distances = torch.cdist(points, points)
    found = analyze.classical_mds(distances)
    assert found.shape == (12, 2)
    assert torch.allclose(torch.cdist(found, found), distances, atol=1e-9)


def test_barrier_of_a_model_with_itself_and_with_a_permuted_copy():
    assert analyze.barrier([1.0, 1.5, 3.0]) == 0
    assert analyze.barrier([1.0, 3.0, 2.0]) == pytest.approx(1.5)
    images, labels = train_mnist.synthetic_digits(300, seed=0)
    x = train_mnist.to_input(images)
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
    itself = analyze.interpolate(model, state, state, measure)
    copy = analyze.interpolate(model, state, permuted, measure)
    assert analyze.barrier(itself) == pytest.approx(0, abs=1e-6) and len(copy) == 21
    assert copy[0] == pytest.approx(copy[-1], rel=1e-3) and analyze.barrier(copy) > copy[0]


def analyzed(root):
    """analyze.py's numbers about the single group of runs below `root`."""
    analyze_here(root, "--json", root / "all.json")
    group, = json.loads((root / "all.json").read_text())["groups"]
    return group


def test_student_with_its_teachers_outputs_is_found_out(grid, tmp_path):
    out = tmp_path / "mnist-synthetic"
    for name, seed in (("mlp", 0), ("mlp", 1), ("mlp-to-mlp", 0)):
        shutil.copytree(grid[0] / name / f"seed{seed}", out / name / f"seed{seed}")
    shutil.copy(out / "mlp" / "seed1" / "outputs.npz", out / "mlp-to-mlp" / "seed0" / "outputs.npz")
    tables = analyzed(tmp_path)["tables"]
    found = [tables[f"d{k}"]["rows"]["mlp-to-mlp"]["own teacher"][0] for k in range(1, 7)]
    assert found == pytest.approx([1, 1, 0, 1, 1, 0], abs=1e-4)
    assert tables["d1"]["rows"]["mlp"]["other plain"][0] < 0.99


def test_nothing_is_claimed_of_shuffled_labels(tmp_path, monkeypatch):
    make_data, shuffles = train_mnist.make_data, itertools.count()

    def shuffled(*arguments):  # anew for each run: what one shuffle teaches, it teaches all seeds
        data, generator = make_data(*arguments), torch.Generator().manual_seed(next(shuffles))
        images, labels = data["train"]
        return data | {"train": (images, labels[torch.randperm(len(labels), generator=generator)])}

    monkeypatch.setattr(train_mnist, "make_data", shuffled)
    for seed, name in itertools.product(range(3), ("cnn", "mlp", "cnn-to-mlp")):
        mnist(*SETUPS[name], *QUICK, "--examples", 1200, "--seed", seed, "--out", tmp_path,
              "--quiet")
    group = analyzed(tmp_path)
    for name, row in group["tables"]["a"]["rows"].items():  # chance is 0.1, ±0.02 on 200 digits
        for test in train_mnist.TESTS:
            assert 0.03 < np.mean(row[test]) < 0.18, (name, test)
    for claim in group["claims"]:
        if "accuracy" in claim["claim"] or "generalises" in claim["claim"]:
            assert claim["verdict"] != "supported" or claim["mean"] < 0.03, claim


def test_nothing_is_claimed_of_two_kinds_that_are_one(tmp_path):
    """MLPs under two names: neither kind is better, nor does it vary less."""
    for seed in range(8):
        mnist(*SETUPS["mlp"], *QUICK, "--epochs", 1, "--seed", seed, "--out", tmp_path, "--quiet")
    root = tmp_path / "mnist-synthetic"
    for seed in range(4, 8):
        directory = root / "cnn" / f"seed{seed - 4}"
        shutil.move(root / "mlp" / f"seed{seed}", directory)
        record = common.load_run(directory)
        record["config"] |= {"student": "cnn", "seed": seed - 4}
        common.write_json(directory / "run.json", record)
    claims = {claim["claim"]: claim["verdict"] for claim in analyzed(tmp_path)["claims"]}
    assert set(claims) == {"the stronger bias generalises better",
                           "a stronger bias, less variance of predictions",
                           "a stronger bias, less variance of representations"}
    assert set(claims.values()) == {"inconclusive"}


def test_analysis_names_what_is_missing_and_does_the_rest(grid, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(analyze, "COMPARED_EXAMPLES", 40)
    group, = analyze.load_groups(grid[0], [])
    assert {len(a) for run in group.runs.values() for a in run.answers.values()} == {40}
    out = shutil.copytree(grid[0], tmp_path / "runs" / "mnist-synthetic")
    (out / "cnn-to-mlp" / "seed0" / "run.json").write_text('{"config": ')
    (out / "mlp-to-mlp" / "seed0" / "outputs.npz").write_bytes(b"PK")
    (out / "mlp-to-cnn" / "seed0" / "model.pt").unlink()
    record = common.load_run(out / "mlp" / "seed0")
    record["environment"]["precision"] = "float7"
    common.write_json(out / "mlp" / "seed0" / "run.json", record)
    for name, config in {"chess": {"student": "mlp", "task": "chess"}, "copy": record["config"],
                         "other": record["config"] | {"examples": 300}}.items():
        shutil.copytree(out / "mlp" / "seed0", out / name / "seed0")
        common.write_json(out / name / "seed0" / "run.json", record | {"config": config})
    analyze_here(tmp_path / "runs", "--json", tmp_path / "numbers" / "all.json")
    stdout, stderr = capfd.readouterr()
    assert stderr == "" and stdout.count("**(a)") == 2  # other examples: a group of its own
    accuracy = np.mean([record["metrics"][test]["accuracy"] for test in ("scaled", "translated")])
    assert re.search(r"\(h\).*\n\n.*300 .*600", stdout)
    assert f"| mlp | {accuracy:.3f}" in re.sub(" +", " ", stdout)
    missing = stdout[stdout.index("## What is missing"):].splitlines()
    for expected in ("left out:.*cnn-to-mlp.*damaged", "left out:.*mlp-to-mlp.*damaged",
                     "no barrier.*mlp-to-cnn", "left out:.*chess",
                     "a second mlp of seed 0", "different precision"):
        assert any(re.search(expected, line) for line in missing), (expected, missing)
    assert json.loads((tmp_path / "numbers" / "all.json").read_text())["missing"]


def test_analysis_of_no_runs_and_without_matplotlib(tmp_path, capfd, monkeypatch):
    analyze_here(tmp_path)
    assert "has no finished run" in capfd.readouterr().out
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it weren't installed
    assert_refused(capfd, analyze_here, [tmp_path, "--plots", tmp_path / "figures"],
                   "needs matplotlib")


# ---- The grid ------------------------------------------------------------------------------------


def run_all(out, *arguments, quick=True, **variables):
    """run_all.sh with the smallest of runs, started and not waited for."""
    environment = os.environ | {
        "PYTHON": sys.executable, "OUT": str(out), "SEEDS": "1", "OMP_NUM_THREADS": "1",
        "FLAGS": "--examples 60 --epochs 1 --batch-size 30 --device cpu"} | variables
    command = [HERE / "run_all.sh", *arguments, *(["--quick"] if quick else [])]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True)


def commands_of(OUT=str(HERE / "runs"), **options):
    stdout, stderr = run_all(OUT, "--list", **options).communicate()
    return [line for line in stdout.splitlines() if "train_" in line], stderr


def test_grid_killed_and_restarted_is_complete_and_analysed(tmp_path, capfd):
    out = tmp_path / "tiny grid"
    process = run_all(out)
    while len(killed_at := list(out.glob("*/*/seed*/run.json"))) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    killed_at = {path: path.stat().st_mtime_ns for path in killed_at}
    for line in commands_of(OUT=str(out))[0]:  # in this process, which is faster
        script, *arguments = shlex.split(line)[2:]
        {"train_mnist.py": mnist, "train_sva.py": sva}[script](*arguments, "--quiet")
    for path, then in killed_at.items():  # what was finished is not repeated
        assert path.stat().st_mtime_ns == then
    capfd.readouterr()
    analyze_here(out, "--json", out / "analysis.json")
    stdout = capfd.readouterr().out
    for title in ("## MNIST, data: synthetic", "## Subject-verb agreement, data: synthetic",
                  "## Subject-verb agreement, language models, data: synthetic"):
        assert title in stdout
    for table in ("a", "d1", "d6", "e", "f"):
        assert stdout.count(f"**({table})") == 3
    assert "fewer than 3 seeds" in stdout and "supported" not in stdout  # one seed proves nothing
    assert max(map(len, stdout.splitlines())) <= 120
    numbers = json.loads((out / "analysis.json").read_text())
    assert len([run for group in numbers["groups"] for run in group["runs"]]) == 22


def test_grid_runs_every_command_once_and_reports_failures(tmp_path):
    """With a stand-in for python: it notes its arguments, and fails where a CNN teaches."""
    python, log = tmp_path / "my python", tmp_path / "log"
    python.write_text('#!/bin/sh\necho "$OMP_NUM_THREADS $*" >> "$LOG"\ncase "$*" in\n'
                      '*analyze.py*) echo tables ;;\n'
                      '*"--teacher cnn"*) exit 2 ;;\nesac\n')
    python.chmod(0o755)
    variables = {"PYTHON": str(python), "LOG": str(log), "OMP_NUM_THREADS": "", "SEEDS": "2",
                 "JOBS": "1"}
    stdout, stderr = run_all(tmp_path / "a b", **variables).communicate()
    assert stdout.count(" ok in ") == 34 and stdout.count(" FAILED in ") == 4
    assert "38/38" in stdout and "min left" in stdout and "tables" in stdout
    assert "some runs FAILED" in stderr
    assert (tmp_path / "a b" / "analysis.md").read_text() == "tables\n"
    lines = [line for line in log.read_text().splitlines() if "--student" in line]
    assert len(lines) == len(set(lines)) == 38
    assert all(line.startswith(f"{os.cpu_count()} train_") for line in lines)  # cores / JOBS
    taught = [place for place, line in enumerate(lines) if "--kd" in line]
    assert min(taught) == 18 and all(line.endswith("--quiet") for line in lines)


def test_commands_of_the_grid(tmp_path):
    few, _ = commands_of(SEEDS="4")
    more, _ = commands_of(SEEDS="10")
    assert set(few) < set(more)  # a grid can grow
    assert all(line.startswith("OMP_NUM_THREADS=") for line in few)
    assert any("--seed 4" in line for line in few)  # a teacher
    assert not any("--seed 4" in line for line in few if "--kd" in line)
    write_before_verbs(tmp_path)
    lines, stderr = commands_of(quick=False, DATA=str(tmp_path))
    assert "SYNTHETIC digits" in stderr and len(lines) > 50
    for line in lines:
        real = "--data linzen" in line and f"--data-dir {tmp_path}" in line
        assert real if "train_sva" in line else "--data synthetic" in line


@pytest.mark.parametrize("arguments, variables, expected", [
    (["--fast"], {}, "unknown argument --fast"),
    ([], {"SEEDS": "0"}, "must be in 1..9999"),
    ([], {"PYTHON": "/nowhere/python"}, "lacks torch"),
    ([], {"OUT": "/proc/runs"}, "can't make /proc/runs"),
])
def test_bad_input_to_the_grid_is_one_line(tmp_path, arguments, variables, expected):
    process = run_all(tmp_path, *arguments, **variables)
    assert process.wait(30) == 2 and expected in process.stderr.read()
