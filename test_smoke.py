"""What these scripts promise, one promise a test. No data, no network, about a minute:

    python -m pytest -q test_smoke.py

Metrics are compared with independent arithmetic; the runs are small and their data synthetic.
"""

import csv
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from argparse import Namespace
from collections import Counter
from functools import partial
from itertools import product
from pathlib import Path
from subprocess import PIPE, Popen

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from torch import nn, tensor

import analyze
import common
import train_mnist as mnist
import train_sva as sva

HERE = Path(__file__).parent
CPU = torch.device("cpu")
SMALL = "--data synthetic --no-amp --device cpu --examples 600 --epochs 3 --batch-size 48"
SVA_SMALL = "--data synthetic --no-amp --device cpu --examples 120 --epochs 2 --batch-size 32"
close = partial(torch.allclose, atol=1e-4)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def arguments(**changes):
    """Flags as the scripts parse them, as far as functions want them."""
    defaults = dict(data="auto", examples=None, data_dir=Path("nowhere"), device=CPU, amp=False,
                    objective="classification", tokens=20)
    return Namespace(**defaults | changes)


def run(script, flags, out):
    """(folder, record) of a small run."""
    small = SMALL if script is mnist else SVA_SMALL
    script.main([*small.split(), *flags.split(), "--out", str(out)])
    folders = [path.parent for path in out.glob("*/*/seed*/run.json")]
    newest = max(folders, key=lambda folder: folder.stat().st_mtime_ns)
    return newest, json.loads((newest / "run.json").read_text())


def refusal(capfd, function, *inputs):
    """What the program says when it ends with an error."""
    with pytest.raises(SystemExit) as end:
        function(*inputs)
    assert end.value.code, "it ended as if all were well"
    said = f"{capfd.readouterr().err}{end.value.code}"
    assert "Traceback" not in said
    return said


# ---- The KD loss ---------------------------------------------------------------------------------


def test_kd_loss_is_its_formula():
    """alpha T^2 KL(teacher || student) + (1 - alpha) CE, example by example, by exp and log."""
    student = normal(2, 3, 4)
    teacher = normal(2, 3, 4, seed=1)
    labels = tensor([[0, 2, 1], [1, 3, 3]])
    losses = []
    for s, t, label in zip(student.flatten(0, 1), teacher.flatten(0, 1), labels.flatten()):
        p = (t / 3).exp() / (t / 3).exp().sum()
        q = (s / 3).exp() / (s / 3).exp().sum()
        divergence = (p * (p / q).log()).sum()
        cross_entropy = -(s.exp() / s.exp().sum())[label].log()
        losses.append((0.7 * 3**2 * divergence + 0.3 * cross_entropy).item())

    loss = common.kd_loss(student, teacher, labels, temperature=3, alpha=0.7)

    assert loss.item() == approx(np.mean(losses))


def test_kd_loss_is_cross_entropy_where_it_must_be():
    """With alpha = 0, and with a teacher that is certain of the labels at T = 1."""
    student = normal(5, 4)
    labels = tensor([0, 3, 1, 1, 2])
    certain = 1000.0 * F.one_hot(labels, 4)
    expected = approx(F.cross_entropy(student, labels).item())

    assert common.kd_loss(student, normal(5, 4), labels, 3, alpha=0).item() == expected
    assert common.kd_loss(student, certain.double(), labels).item() == expected


def test_kd_loss_of_a_perfect_copy_is_zero():
    logits = normal(6, 4)
    assert common.kd_loss(logits, logits, torch.zeros(6).long(), 3).item() == approx(0, abs=1e-12)


def test_kd_loss_keeps_its_gradient_when_the_temperature_changes():
    """That is what the factor T^2 is for (Hinton et al. 2015, sec. 2.1)."""
    sizes = []
    for temperature in (20.0, 80.0):
        student = normal(6, 4).requires_grad_()
        common.kd_loss(student, normal(6, 4, seed=1), torch.zeros(6).long(), temperature).backward()
        sizes.append(student.grad.norm().item())
    assert sizes[0] == approx(sizes[1], rel=0.1)


def test_kd_loss_trains_the_student_alone():
    teacher = normal(2, 4).requires_grad_()
    loss = common.kd_loss(normal(2, 4, seed=1), teacher, tensor([0, 1]))
    assert not loss.requires_grad, "the teacher would get a gradient"


def test_kd_loss_refuses_logits_of_other_shapes():
    """They would be broadcast, and the loss be that of other examples."""
    with pytest.raises(AssertionError):
        common.kd_loss(normal(1, 3, 4), normal(2, 3, 4), torch.zeros(2, 3).long())


# ---- The metrics ---------------------------------------------------------------------------------


def test_calibration_error_of_two_predictions():
    """0.9 and right, 0.95 and wrong: two bins, off by 0.1 and by 0.95."""
    probabilities = tensor([[0.9, 0.1], [0.95, 0.05]])
    found = common.expected_calibration_error(probabilities, tensor([0, 1]))
    assert found == approx((0.1 + 0.95) / 2)


def test_a_confidence_on_the_edge_belongs_to_the_lower_bin():
    """Bins are (0.5, 0.75] and so on: 0.75 (right) and 0.6 (wrong) are in one, off by their sum."""
    probabilities = tensor([[0.75, 0.25], [0.6, 0.4]])
    found = common.expected_calibration_error(probabilities, tensor([0, 1]), n_bins=4)
    assert found == approx(abs(0.25 - 0.6) / 2)


def test_calibration_error_refuses_logits():
    """It would take a logit of 4 for a confidence, silently."""
    with pytest.raises(AssertionError, match="probabilities"):
        common.expected_calibration_error(4 * normal(5, 3), torch.zeros(5).long())


def test_calibration_error_works_where_its_tensors_are():
    """On a GPU the edges of the bins must lie there too: here the default device is elsewhere."""
    with torch.device("meta"):
        found = common.expected_calibration_error(tensor([[0.9, 0.1]], device=CPU),
                                                  tensor([0], device=CPU))
    assert found == approx(0.1)


def test_metrics_of_a_classifier_by_a_loop_over_bins():
    logits = 2 * normal(500, 10)
    labels = torch.arange(500) % 10
    probabilities = logits.softmax(1)
    confidence = probabilities.amax(1)
    correct = (logits.argmax(1) == labels).double()
    ece = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        ece += (correct[inside] - confidence[inside]).sum().abs().item() / 500
    nll = -np.mean([probabilities[i, labels[i]].log() for i in range(500)])

    metrics = common.classification_metrics(logits, labels)

    assert metrics == approx({"accuracy": correct.mean().item(), "ece": ece, "nll": nll})


def test_nan_is_no_answer():
    """argmax takes NaN for the most probable class: a diverged model would have an accuracy."""
    logits = tensor([[math.nan, 0.0], [1.0, 0.0]])
    metrics = common.classification_metrics(logits, tensor([0, 0]))
    assert all(math.isnan(value) for value in metrics.values())


def test_error_consistency_by_hand():
    """Right on 7 and on 7 of 10, on 8 alike: (0.8 - 0.58) / (1 - 0.58)."""
    a = tensor([0, 0, 0, 0, 0, 0, 0, 1, 1, 1])
    b = tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 0])
    labels = torch.zeros(10).long()
    assert common.error_consistency(a, b, labels) == approx((0.8 - 0.58) / 0.42)
    assert common.error_consistency(labels, labels, labels) == 1, "no error is the same errors"


def test_js_divergence_by_two_kl_divergences():
    p = (2 * normal(500, 10)).softmax(1)
    q = normal(500, 10, seed=1).softmax(1)
    m = (p + q) / 2
    from_p = (p * (p / m).log2()).sum(1)
    from_q = (q * (q / m).log2()).sum(1)
    assert common.js_divergence(p, q) == approx(((from_p + from_q) / 2).mean().item())


def test_cka_by_centred_kernels():
    x = normal(8, 3) + 0.3
    y = normal(8, 5, seed=2)
    centring = torch.eye(8).double() - 1 / 8
    k = centring @ (x @ x.T) @ centring
    l = centring @ (y @ y.T) @ centring
    expected = (k * l).sum() / (k.norm() * l.norm())
    assert common.linear_cka(x, y) == approx(expected.item())


def test_rsa_by_all_cosines():
    x = normal(8, 3) + 0.3
    y = normal(8, 5, seed=2)
    cosines_x = F.cosine_similarity(x[:, None], x[None], dim=2)
    cosines_y = F.cosine_similarity(y[:, None], y[None], dim=2)
    expected = F.cosine_similarity(cosines_x, cosines_y, dim=1).mean()
    assert common.rsa(x, y) == approx(expected.item())


# ---- The files of a run --------------------------------------------------------------------------


def save(folder, config, **record):
    outputs = {"x": torch.arange(3)}
    common.save_run(folder, {"config": config, **record}, outputs, nn.Linear(1, 1))


def test_a_run_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    """Interrupted just before its folder is renamed, it leaves nothing behind."""
    folder = tmp_path / "name/seed0"
    monkeypatch.setattr(Path, "rename", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(folder, {"tag": 1})
    assert not list(folder.parent.iterdir())
    assert common.find_run(folder, {"tag": 1}) is None


def test_of_two_writers_the_first_stays(tmp_path):
    folder = tmp_path / "name/seed0"
    save(folder, {"tag": 1})
    save(folder, {"tag": 2})
    assert common.find_run(folder, {"tag": 1}) == {"config": {"tag": 1}}


def test_run_json_is_valid_json_where_a_model_diverged(tmp_path):
    """JSON has no word for infinity and NaN: they become null."""
    save(tmp_path / "seed0", {}, perplexity=math.inf, nll=math.nan)
    record = json.loads((tmp_path / "seed0/run.json").read_text(), parse_constant=lambda _: 1 / 0)
    assert record == {"config": {}, "perplexity": None, "nll": None}


@pytest.mark.parametrize("stored, wanted, expected", [
    ({"tag": 1}, {"tag": 2}, "its tag is 1, not 2"),
    ({"tag": 1, "more": 3}, {"tag": 1}, "its more is 3, not None"),
    ({"tag": 1}, {"tag": 1, "more": 3}, "its more is None, not 3")])
def test_a_run_of_another_configuration_is_not_taken_for_this_one(
        stored, wanted, expected, tmp_path, capfd):
    """A line says which setting differs, also where one side has a setting more."""
    save(tmp_path / "seed0", stored)
    assert expected in refusal(capfd, common.find_run, tmp_path / "seed0", wanted)


def test_a_damaged_run_is_named(tmp_path, capfd):
    folder = tmp_path / "seed0"
    save(folder, {"tag": 1})
    for name in ("model.pt", "run.json"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-9])
    assert "delete" in refusal(capfd, common.load_weights, nn.Linear(1, 1), folder)
    assert "unreadable: delete" in refusal(capfd, common.find_run, folder, {"tag": 1})


def test_run_json_says_which_code_made_it(tmp_path):
    """A hash of the script and of common.py: the analysis names runs of different code."""
    script = tmp_path / "script.py"
    script.write_text("print()")
    code = b"print()" + Path(common.__file__).read_bytes()
    environment = common.environment(arguments(), script)
    assert environment["code"] == hashlib.sha256(code).hexdigest()[:8]
    assert environment["precision"] == "float32" and environment["device"] == "cpu"


# ---- Which run it is -----------------------------------------------------------------------------


def parsed(script, flags, out):
    args = script.parse_arguments([*flags.split(), "--data", "synthetic", "--out", str(out)])
    args.files = {}
    args.available = 750
    return args


@pytest.mark.parametrize("script, flags, name", [
    (mnist, "--student cnn", "cnn"),
    (mnist, "--teacher cnn --kd", "cnn-to-mlp"),
    (mnist, "--teacher cnn --kd online --epochs 20 --lr 0.05", "cnn-to-mlp-online-lr0.05"),
    (mnist, "--teacher cnn --kd --epochs 20", "cnn-to-mlp-epochs20"),
    (mnist, "--kd permuted --alpha 0.9 --teacher-seed 7 --temperature 5",
     "mlp-to-mlp-permuted-temperature5-alpha0.9-teacher-seed7"),
    (mnist, "--examples 3000 --teacher cnn --kd", "cnn-to-mlp-examples3000"),
    (sva, "--teacher lstm --kd --answers last", "lstm-to-transformer-seq-last"),
    (sva, "--student ut-seq --kd --answers every --temperature 2", "ut-seq-to-ut-seq"),
    (sva, "--student lstm --objective lm --kd --batch-size 8", "lstm-to-lstm-batch-size8")])
def test_a_name_holds_each_flag_that_is_not_at_its_default(script, flags, name, tmp_path):
    args = parsed(script, flags, tmp_path)
    assert script.run_folder(args).parts[-2:] == (name, "seed0")


@pytest.mark.parametrize("script", [mnist, sva])
def test_flags_of_training_are_for_student_and_teacher(script, tmp_path):
    flags = "--kd --epochs 7 --lr 0.05 --batch-size 9 --temperature 3 --alpha 0.25"
    config = script.configure(parsed(script, flags, tmp_path))
    for name, value in (("epochs", 7), ("lr", 0.05), ("batch_size", 9)):
        assert config[name] == config[f"teacher_{name}"] == value
    assert (config["temperature"], config["alpha"]) == (3, 0.25)


def test_a_run_names_the_runs_it_is_compared_with(tmp_path):
    """They have its own settings, and no settings of distillation where they have no teacher. A
    teacher has the next seed: with the student's own, one of its kind would be its untaught twin.
    """
    flags = "--teacher cnn --kd --examples 3000 --temperature 5"
    assert mnist.relatives(parsed(mnist, flags, tmp_path)) == {
        "plain": {"mlp": "mlp-examples3000/seed0", "cnn": "cnn-examples3000/seed0",
                  "cnn-shuffled": "cnn-shuffled-examples3000/seed0"},
        "self_taught": "mlp-to-mlp-examples3000-temperature5/seed0",
        "permuted": "cnn-to-mlp-permuted-examples3000-temperature5/seed0",
        "teacher": "cnn-examples3000/seed1",
    }
    assert sva.relatives(parsed(sva, "--teacher lstm --kd --temperature 5", tmp_path)) == {
        "plain": {model: f"{model}/seed0" for model in sva.MODELS},
        "self_taught": "transformer-seq-to-transformer-seq-temperature5/seed0",
        "permuted": "lstm-to-transformer-seq-permuted-temperature5/seed0",
        "teacher": "lstm/seed1",
    }


def test_the_plain_twin_of_a_taught_classifier_answers_after_the_last_word(tmp_path):
    args = parsed(sva, "--teacher lstm --kd", tmp_path)
    assert sva.configure(args)["answers"] == "every"
    assert sva.relatives(args)["plain"]["transformer-seq"] == "transformer-seq/seed0"
    assert sva.configure(sva.plain(args, "transformer-seq", 0))["answers"] == "last"
    args = parsed(sva, "--teacher lstm --kd --answers every", tmp_path)
    assert sva.relatives(args)["plain"]["transformer-seq"] == "transformer-seq/seed0"


@pytest.mark.parametrize("script, flags, expected", [
    (mnist, "--examples 60000", {"mlp": 20, "cnn": 3}),
    (mnist, "--examples 15000", {"mlp": 40, "cnn": 6}),
    (sva, "--examples 280000", {"lstm": 2, "transformer-seq": 2}),
    (sva, "--examples 56000 --objective lm", {"lstm": 10, "ut-seq": 10}),
    (sva, "--examples 500", {"lstm": 24}),
    (sva, "--examples 500 --objective lm", {"lstm": 30})])
def test_fewer_examples_get_more_epochs(script, flags, expected, tmp_path):
    """Digits: n times fewer get sqrt(n) times as many. Sentences: 560,000 are read, in 2 to 24
    epochs, language models 30."""
    for model, epochs in expected.items():
        args = parsed(script, f"{flags} --student {model}", tmp_path)
        assert script.configure(args)["epochs"] == epochs


@pytest.mark.parametrize("script, flags, expected", [
    (mnist, "--epochs 0", "--epochs must be at least 1"),
    (mnist, "--examples 70000", "--examples must be at most 60000"),
    (mnist, "--kd --temperature 0", "--temperature must be at least 0.001"),
    (mnist, "--out /proc/runs", "/proc/runs"),
    (mnist, "--temperature 3", "--temperature has no effect without --kd"),
    (mnist, "--kd --seed 3 --teacher-seed 3", "must not be the student's own"),
    (mnist, "--kd hard --temperature 3", "--temperature has no effect on --kd hard"),
    (sva, "--kd hard --temperature 3", "--temperature has no effect on --kd hard"),
    (sva, "--kd confidence", "invalid choice"),
    (sva, "--objective lm --kd hard", "for classifiers"),
    (sva, "--objective lm --student transformer", "bidirectional"),
    (sva, "--answers every --kd --teacher transformer", "bidirectional"),
    (sva, "--objective lm --kd permuted", "for classifiers"),
    (analyze, "x", "no finished")])
def test_bad_input_gets_one_line(script, flags, expected, capfd):
    assert expected in refusal(capfd, script.main, flags.split())


def test_a_high_temperature_is_no_mistake(tmp_path):
    assert parsed(mnist, "--kd --temperature 70000", tmp_path).temperature == 70000


# ---- Digits --------------------------------------------------------------------------------------


class FakeMNIST:
    """Stands in for torchvision's: `download` takes its time, and half of a file can't be read."""

    def __init__(self, root, train=True, download=False):
        raw = Path(root) / "MNIST/raw"
        if download:
            raw.mkdir(parents=True, exist_ok=True)
            for name in mnist.MNIST_FILES:
                (raw / name).write_text("half")
                time.sleep(0.01)
                (raw / name).write_text("half and half")
        for name in mnist.MNIST_FILES:
            if (raw / name).read_text() != "half and half":
                raise ValueError("invalid literal for int() with base 16")
        number = torch.arange(60_000 if train else 10_000)
        self.data = number.byte()[:, None, None].expand(-1, 28, 28)
        self.targets = number % 10


def test_mnist_is_cut_into_training_validation_and_tests(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.MNIST", FakeMNIST)
    args = arguments(data_dir=tmp_path)
    data = mnist.load_data(args)
    assert args.data == "mnist"
    assert [len(labels) for _, labels in data.values()] == [55_000, 5_000] + [10_000] * 3
    images, labels = data["validation"]
    assert (images[0] == 55_000 % 256).all() and labels[1] == 1, "the last twelfth validates"


def test_many_runs_at_once_find_mnist_whole(tmp_path, monkeypatch):
    """On an empty data folder: each fetches it beside its place, or finds it there."""
    monkeypatch.setattr("torchvision.datasets.MNIST", FakeMNIST)
    found = []

    def start():
        found.append(len(mnist.mnist_digits(tmp_path)[0]))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert found == [60_000] * 8, "some met half of a file"
    assert [path.name for path in tmp_path.iterdir()] == ["MNIST"], "something was left over"


def test_without_mnist_synthetic_digits_stand_in_with_a_warning(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("torchvision.datasets.MNIST", lambda *_, **__: 1 / 0)
    args = arguments(data_dir=tmp_path, examples=60)
    data = mnist.load_data(args)
    assert args.data == "synthetic" and len(data["train"][1]) == 55
    assert "SYNTHETIC" in capfd.readouterr().err


def test_who_asks_for_mnist_never_gets_synthetic_digits(tmp_path, monkeypatch, capfd):
    """Nor does who has damaged files of it."""
    monkeypatch.setattr("torchvision.datasets.MNIST", lambda *_, **__: 1 / 0)
    asked = arguments(data_dir=tmp_path, data="mnist")
    assert "no MNIST in" in refusal(capfd, mnist.load_data, asked)
    (tmp_path / "MNIST/raw").mkdir(parents=True)
    (tmp_path / "MNIST/raw/train-images-idx3-ubyte").write_text("half")
    assert "no MNIST in" in refusal(capfd, mnist.load_data, arguments(data_dir=tmp_path))


def test_translated_digits_are_moved_by_three_pixels_in_all_four_directions():
    images, _ = mnist.synthetic_digits(40, seed=1)
    seen = Counter()
    for image, moved in zip(images, mnist.translate(images)):
        framed = F.pad(image, (3, 3, 3, 3))
        for shift in product((-3, 3), repeat=2):
            if torch.equal(framed.roll(shift, (0, 1))[3:-3, 3:-3], moved):
                seen[shift] += 1
    assert len(seen) == 4 and seen.total() == 40


def test_scaled_digits_are_those_of_torchvision():
    from torchvision.transforms.functional import InterpolationMode, affine

    images, _ = mnist.synthetic_digits(40, seed=1)
    expected = affine(images.float(), 0, [0, 0], 0.7, [0], InterpolationMode.BILINEAR)
    assert close(mnist.scale(images), expected, atol=0.02)


def test_the_tests_have_the_same_labels_and_synthetic_digits_their_seed():
    data = mnist.load_data(arguments(data="synthetic", examples=240))
    labels = data["test"][1]
    assert all(torch.equal(data[test][1], labels) for test in mnist.TESTS)
    again, _ = mnist.synthetic_digits(40, seed=1)
    assert torch.equal(data["test"][0], again)
    assert not torch.equal(data["train"][0][:40], again), "the test must not be trained on"


# ---- Training on digits: one small run of each setup ---------------------------------------------


def watch_loss(patch, steps):
    """Adds to the last of `steps` what the KD loss is given."""
    kd_loss = common.kd_loss

    def watched(student, teacher, labels, temperature, alpha):
        steps[-1].update(soft=teacher.detach(), labels=labels, temperature=temperature, alpha=alpha)
        return kd_loss(student, teacher, labels, temperature, alpha)

    patch.setattr(common, "kd_loss", watched)


def watch_optimizers(patch, seen):
    """Notes the optimizer's class and flags and the schedule's highest rates."""
    schedule_class = torch.optim.lr_scheduler.OneCycleLR

    def watched(optimizer, max_lr, **flags):
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        seen.append({"class": type(optimizer), "max_lr": max_lr, "decays": decays,
                     **optimizer.defaults, **flags})
        return schedule_class(optimizer, max_lr, **flags)

    patch.setattr(torch.optim.lr_scheduler, "OneCycleLR", watched)


SETUPS = ("--seed 1", "--student cnn --seed 1", "--student cnn", "", "--kd", "--teacher cnn --kd",
          "--teacher cnn --kd permuted", "--teacher cnn --kd online --alpha 0.9",
          "--teacher cnn --kd --temperature 5")


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """{flags: Namespace(folder, record, steps, optimizer)}; a step: the batch, what the loss got"""
    out = tmp_path_factory.mktemp("grid")
    patch = pytest.MonkeyPatch()
    steps = []
    optimizers = []
    to_input = mnist.to_input

    def watched(images):
        steps.append({"images": images})
        return to_input(images)

    patch.setattr(mnist, "to_input", watched)
    watch_loss(patch, steps)
    watch_optimizers(patch, optimizers)
    runs = {}
    for flags in SETUPS:
        steps.clear()
        folder, record = run(mnist, flags, out)
        batches = [step for step in steps if len(step["images"]) == 48]  # else an evaluation
        runs[flags] = Namespace(folder=folder, record=record, steps=batches,
                                optimizer=optimizers[-1], outputs=np.load(folder / "outputs.npz"))
    patch.undo()
    return runs


def test_twins_start_from_the_same_weights_and_see_the_same_batches(grid):
    """All setups of one model and seed: so that a difference is the teacher's."""
    first = {}
    for one in grid.values():
        key = one.record["config"]["student"], one.record["config"]["seed"]
        twin = first.setdefault(key, one)
        assert np.array_equal(one.outputs["probe_representations"][0],
                              twin.outputs["probe_representations"][0]), "other first weights"
        for step, twin_step in zip(one.steps, twin.steps, strict=True):
            assert torch.equal(step["images"], twin_step["images"]), "another batch"


def test_another_seed_is_another_start_and_another_epoch_another_order(grid):
    first_weights = [grid[flags].outputs["probe_representations"][0] for flags in ("", "--seed 1")]
    assert not np.array_equal(*first_weights)
    steps = grid[""].steps
    assert len(steps) == 3 * 11, "3 epochs of 550 digits in batches of 48"
    assert not torch.equal(steps[0]["images"], steps[11]["images"])
    other_steps = grid["--seed 1"].steps
    assert not torch.equal(steps[0]["images"], other_steps[0]["images"]), "one order for all seeds"


@torch.no_grad()
def test_what_is_on_disk_are_the_answers_of_the_stored_model(grid):
    """In eval mode, whatever mode it was left in; of the penultimate layer at some epochs."""
    data = mnist.load_data(arguments(data="synthetic", examples=600))
    for one in grid.values():
        model = common.load_weights(mnist.MODELS[one.record["config"]["student"]](), one.folder)
        for test in mnist.TESTS:
            images, labels = data[test]
            logits, representations = mnist.evaluate(model.train(), images, amp=False)
            assert close(model.eval()(mnist.to_input(images[:7])), logits[:7])
            assert close(tensor(one.outputs[f"{test}_logits"]), logits)
            assert torch.equal(tensor(one.outputs[f"{test}_labels"]), labels)
            assert close(model.head(representations), logits)
        assert one.outputs["probe_epochs"].tolist() == [0, 1, 2, 3]


def check_soft_labels(steps, fresh, flags, tolerance):
    """The loss got the teacher's fresh answers, or those to other examples of the same label, or
    its decisions."""
    soft = torch.cat([step["soft"] for step in steps])
    labels = torch.cat([step["labels"] for step in steps])
    is_own = (fresh - soft).abs().amax(1) < tolerance
    if "hard" in flags:
        decisions = F.one_hot(fresh.argmax(dim=1), fresh.shape[1]).float()
        assert close(soft.softmax(dim=1), decisions), "not the teacher's decisions"
        return
    if "permuted" not in flags:
        assert is_own.double().mean() > 0.999, "not the teacher's answers"
        return
    assert is_own.double().mean() < 0.2, "not permuted"
    for label in labels.unique():
        distances = torch.cdist(soft[labels == label], fresh[labels == label]).amin(1)
        assert (distances < 10 * tolerance).double().mean() > 0.9, "not of the same label"


@pytest.mark.parametrize("flags", ["", " permuted", " --temperature 5"])
@torch.no_grad()
def test_a_student_learns_what_its_teacher_answers(flags, grid):
    """The teacher is the plain run of seed + 1, in eval mode."""
    plain = grid["--student cnn --seed 1"]
    teacher = common.load_weights(mnist.cnn(), plain.folder).eval()
    taught = grid[f"--teacher cnn --kd{flags}"]
    fresh = torch.cat([teacher(mnist.to_input(step["images"])) for step in taught.steps])

    check_soft_labels(taught.steps, fresh, flags, tolerance=1e-3)
    assert taught.record["teacher_metrics"] == plain.record["metrics"]
    assert {step["temperature"] for step in taught.steps} == {5 if "5" in flags else 20}
    assert {step["alpha"] for step in taught.steps} == {1}


def test_online_both_learn_at_their_own_rates(grid):
    online = grid["--teacher cnn --kd online --alpha 0.9"]
    losses = [F.cross_entropy(step["soft"], step["labels"]).item() for step in online.steps]
    assert np.mean(losses[-5:]) < losses[0] - 0.3, "the teacher learns nothing"
    assert online.optimizer["max_lr"] == [mnist.RECIPES["mlp"]["lr"], mnist.RECIPES["cnn"]["lr"]]
    assert online.record["config"]["teacher_lr"] == mnist.RECIPES["cnn"]["lr"]
    assert {step["alpha"] for step in online.steps} == {0.9}


def test_digits_are_learned_with_nesterov_momentum(grid):
    """The recipe of all published digits; each model with its own weight decay, in its place."""
    decay = {"mlp": 2e-3, "cnn": 5e-4}
    for flags, one in grid.items():
        found = one.optimizer
        assert found["class"] is torch.optim.SGD
        assert (found["momentum"], found["nesterov"]) == (0.9, True)
        models = ["mlp", "cnn"] if "online" in flags else [one.record["config"]["student"]]
        assert found["decays"] == [decay[model] for model in models]
        assert (found["pct_start"], found["total_steps"]) == (0.25, 33)


def test_many_seeds_are_run_one_after_the_other(grid, tmp_path):
    """As if each had been started alone."""
    mnist.main(f"{SMALL} --seed 0 1 --out {tmp_path}".split())
    for flags in ("", "--seed 1"):
        folder = tmp_path.joinpath(*grid[flags].folder.parts[-3:])
        outputs = np.load(folder / "outputs.npz")
        assert np.array_equal(outputs["test_logits"], grid[flags].outputs["test_logits"])

    sva.main(f"{SVA_SMALL} --student lstm --seed 0 1 --out {tmp_path}".split())
    assert len(list(tmp_path.glob("sva-synthetic/lstm-*/seed[01]/run.json"))) == 2


def test_each_seed_has_its_own_permutation(tmp_path, grid):
    """Else a control of many seeds would be one control."""
    data = mnist.load_data(arguments(data="synthetic", examples=600))
    soft = []
    for seed in (0, 2):
        flags = f"{SMALL} --teacher cnn --kd permuted --seed {seed} --teacher-seed 1 --out"
        args = mnist.parse_arguments([*flags.split(), str(grid[""].folder.parents[2])])
        soft.append(mnist.ask_teacher(args, data)[0])
    assert not torch.equal(*soft)
    assert close(soft[0].sort(dim=0)[0], soft[1].sort(dim=0)[0]), "not the same soft labels"


PROBABILITIES = tensor([  # two answers of a teacher; the third and the sixth class come first
    [0.30, 0.0125, 0.60, *[0.0125] * 7],
    [0.01, 0.15, 0.01, 0.01, 0.01, 0.80, *[0.0025] * 4],
]).double()


def kept(part, temperature):
    teacher = temperature * PROBABILITIES.log() + 7  # a constant changes nothing
    soft_labels = mnist.keep_part(teacher, part, temperature)
    return (soft_labels.double() / temperature).softmax(dim=1)


def test_hard_keeps_the_most_probable_class_alone():
    assert close(kept("hard", 1.0), F.one_hot(tensor([2, 5]), 10).double())
    soft_labels = mnist.keep_part(PROBABILITIES.log(), "hard", 1.0)
    loss = common.kd_loss(normal(2, 10).float(), soft_labels, tensor([0, 0]))
    assert loss.item() == approx(F.cross_entropy(normal(2, 10), tensor([2, 5])).item(), rel=1e-5)


def test_confidence_keeps_how_probable_the_first_class_is():
    """0.6 and 0.8; the nine others share 0.4 and 0.2."""
    expected = torch.stack([torch.full((10,), 0.4 / 9), torch.full((10,), 0.2 / 9)]).double()
    expected[0, 2] = 0.6
    expected[1, 5] = 0.8
    assert close(kept("confidence", 4.0), expected)


def test_ratios_keep_the_ratios_among_the_other_classes():
    """The first class has 0.7, the mean of 0.6 and 0.8; what is left is shared as before."""
    expected = PROBABILITIES / tensor([[0.4], [0.2]]) * 0.3
    expected[0, 2] = 0.7
    expected[1, 5] = 0.7
    assert close(kept("ratios", 4.0), expected)


def test_parts_of_a_teacher_that_is_certain_are_numbers():
    """At T = 1 a trained teacher says 1.0, and nothing seems to be left for the others."""
    teacher = tensor([[90.0, 0.0, 1.0, *[-20.0] * 7], [0.0, 60.0, 2.0, *[-20.0] * 7]])
    for part in mnist.PARTS:
        soft_labels = mnist.keep_part(teacher, part, 1.0)
        loss = common.kd_loss(normal(2, 10).float(), soft_labels, tensor([0, 1]))
        assert math.isfinite(loss.item()), part
    assert (soft_labels[1, 0] - soft_labels[1, 2]).item() == approx(-2, abs=1e-4), "not the ratio"


@pytest.mark.parametrize("part, temperature", [("hard", 1), ("confidence", 20), ("ratios", 20)])
def test_a_student_of_a_part_learns_that_part_of_its_teachers_answers(part, temperature, grid):
    data = mnist.load_data(arguments(data="synthetic", examples=600))
    found = {}
    for kd in ("offline", part):
        flags = f"{SMALL} --teacher cnn --kd {kd} --seed 0 --out {grid[''].folder.parents[2]}"
        args = mnist.parse_arguments(flags.split())
        found[kd], metrics = mnist.ask_teacher(args, data)
    assert mnist.configure(args)["temperature"] == temperature
    assert close(found[part], mnist.keep_part(found["offline"], part, temperature))
    assert metrics == grid["--student cnn --seed 1"].record["metrics"]


@torch.no_grad()
def test_the_shuffled_cnn_is_the_cnn_on_shuffled_pixels():
    """The same first weights, the same size, the same order of pixels for all seeds."""
    orders = []
    for seed in (0, 3):
        plain = mnist.build_model("cnn", seed, arguments()).eval()
        shuffled = mnist.build_model("cnn-shuffled", seed, arguments()).eval()
        order = shuffled.body[0].order
        orders.append(order)
        x = normal(5, 1, 28, 28).float()
        pixels = torch.stack([digit.flatten()[order].view(1, 28, 28) for digit in x])
        assert close(shuffled(x), plain(pixels))
    assert torch.equal(*orders) and orders[0].unique().tolist() == list(range(784))
    neighbours = (orders[0].diff() == 1).sum().item()
    assert neighbours < 10, "neighbours have stayed together"
    assert mnist.RECIPES["cnn-shuffled"] == mnist.RECIPES["cnn"]


@torch.no_grad()
def test_a_barrier_does_not_see_old_batch_norm_statistics(grid):
    """Between two models they belong to neither: they are estimated anew before the loss."""
    args = arguments(data="synthetic", examples=600)
    data = mnist.load_data(args)
    model = common.load_weights(mnist.mlp(), grid[""].folder)
    expected = mnist.training_loss(model, data, args, 100)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d):
            layer.running_mean.add_(5)
    assert mnist.training_loss(model, data, args, 100) == approx(expected, rel=1e-4)


# ---- Sentences: the grammar ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def grammar():
    return sva.synthetic_sentences(600)


def test_the_verb_of_a_synthetic_sentence_agrees_with_its_subject(grammar):
    """And the counts of nouns in between are true, as is the distance."""
    for sentence in [sentence for part in grammar.values() for sentence in part]:
        words = sentence.text.split()
        assert words[sentence.verb].endswith("s") is not sentence.plural
        subject = sentence.verb - sentence.distance
        nouns = {place: word.endswith("s") for place, word in enumerate(words[:sentence.verb])
                 if word.removesuffix("s") in sva.WORDS["N"]}
        assert nouns[subject] is sentence.plural
        between = [number for place, number in nouns.items() if place > subject]
        assert sentence.attractors == between.count(not sentence.plural)


def test_attractors_are_rare_in_training_and_as_frequent_as_none_in_the_test(grammar):
    """80, 13, 5, 1, 1 % have 0, 1, 2, 3, 4+; in the test a fifth each, without other nouns."""
    shares = {}
    for name, part in grammar.items():
        shares[name] = Counter(min(sentence.attractors, 4) for sentence in part)
    assert shares["train"] == {0: 480, 1: 78, 2: 30, 3: 6, 4: 6}
    assert shares["validation"] == {0: 122, 1: 19, 2: 7, 3: 1, 4: 1}
    assert shares["test"] == {attractors: 240 for attractors in range(5)}
    for sentence in grammar["test"]:
        subject = sentence.text.split()[sentence.verb - sentence.distance:sentence.verb]
        nouns = [word for word in subject if word.removesuffix("s") in sva.WORDS["N"]]
        assert len(nouns) - 1 == sentence.attractors, "a noun of the subject's own number"


def test_no_test_begins_like_a_training_sentence(grammar):
    seen = {sva.words_before_verb(sentence) for sentence in grammar["train"]}
    for sentence in grammar["test"] + grammar["validation"]:
        assert sva.words_before_verb(sentence) not in seen


# ---- Sentences: tables ---------------------------------------------------------------------------

HEADER = "x\tsentence\tverb_index\tverb_pos\tn_intervening\tn_diff_intervening\tdistance\n"
ROWS = [
    "-\tthe key near the cats is here\t6\tVBZ\t1\t1\t\n",
    "-\tkeys VBP here\t2\tVBP\t0\t0\t1\n",
    "-\tthe key near the cats VBZ here\t6\tVBZ\t2\t1\t4\n",
    "-\tkeys are it\t2\tVBP\t0\t0\t1\n",
]


@pytest.fixture
def tables(tmp_path):
    """train.tsv, validation.tsv and test.tsv, in which a word is new."""
    for name, word in (("train", "near"), ("validation", "near"), ("test", "whale")):
        text = HEADER + "".join(ROWS).replace("near", word)
        (tmp_path / f"{name}.tsv").write_text(text)
    return arguments(data_dir=tmp_path)


def test_a_table_becomes_the_tensors_of_a_classifier(tables):
    """Attractors count only where no other noun stands between; unknown is -1."""
    test = sva.load_data(tables)["test"]
    assert (tables.data, tables.available, len(tables.files)) == ("linzen", 4, 3)
    assert test["attractors"].tolist() == [1, 0, -1, 0]
    assert test["labels"].tolist() == [0, 1, 0, 1]
    assert test["distance"].tolist() == [-1, 1, 4, 1]
    assert test["answer_at"].tolist() == [4, 0, 4, 0], "the word before the verb"
    assert test["lengths"].tolist() == [5, 1, 5, 1], "a classifier must not see the verb"
    assert test["tokens"][0, 2] == sva.UNKNOWN, "a word that training has not"


def test_a_language_model_reads_whole_sentences_and_knows_both_forms(tables):
    """The tag in place of a verb counts as its form."""
    tables.objective = "lm"
    train = sva.load_data(tables)["train"]
    assert tables.tokens == 4 + 11
    assert train["lengths"].tolist() == [9, 5, 9, 5], "with START and END"
    for row, label in enumerate((0, 1, 0, 1)):
        shown = train["tokens"][row, train["answer_at"][row] + 1].item()
        assert shown == train["forms"][row, label], "the form that the sentence has"
        assert shown != train["forms"][row, 1 - label]


@pytest.mark.parametrize("verb, plural, expected", [
    ("is", False, "are"), ("are", True, "is"), ("has", False, "have"), ("sees", False, "see"),
    ("see", True, "sees"), ("goes", False, "go"), ("flies", False, "fly"), ("fly", True, "flies"),
    ("VBP", True, "VBZ"), ("reads", False, None)])
def test_the_other_form_of_a_verb(verb, plural, expected):
    vocabulary = dict.fromkeys("is are has have sees see goes go flies fly VBZ VBP".split(), 4)
    assert sva.other_form(verb, plural, vocabulary) == expected


def test_the_one_table_is_shuffled_and_cut_as_in_the_paper(tmp_path):
    """10 % train, 1 % validate, the rest tests."""
    rows = "".join(ROWS[0].replace("key", f"key{i}") for i in range(200))
    (tmp_path / sva.TABLE).write_bytes(gzip.compress((HEADER + rows).encode()))
    parts = sva.load_sentences(arguments(data_dir=tmp_path))
    assert [len(part) for part in parts.values()] == [20, 2, 178]
    sentences = [sentence.text for part in parts.values() for sentence in part]
    assert len(set(sentences)) == 200
    assert "key0 " not in sentences[0] or "key1 " not in sentences[1], "not shuffled"


def test_a_sample_of_sentences_is_drawn_from_all_of_them(tables):
    """--examples takes no first part: a table may be sorted."""
    rows = "".join(ROWS[0].replace("key", f"key{i}") for i in range(200))
    (tables.data_dir / "train.tsv").write_text(HEADER + rows)
    tables.examples = 100
    texts = [sentence.text for sentence in sva.load_sentences(tables)["train"]]
    numbers = {int(re.search(r"key(\d+)", text)[1]) for text in texts}
    assert len(numbers) == 100 and tables.available == 200
    assert 25 < len([number for number in numbers if number >= 100]) < 75
    tables.examples = 201
    with pytest.raises(SystemExit, match="there are 200"):
        sva.load_sentences(tables)


@pytest.mark.parametrize("change, column, expected", [
    (("1\t1\t\n", "1\t1.0\t\n"), "attractors", 1),    # as pandas writes numbers beside gaps
    (("6\tVBZ\t1\t1", "6.0\tVBZ\t1.0\t1.0"), "attractors", 1),
    (("1\t1\t\n", "\t\t\n"), "attractors", -1),       # a gap
    (("1\t1\t\n", "nan\tnan\tnan\n"), "attractors", -1),
    (("1\t1\t\n", "nan\tnan\tnan\n"), "distance", -1),
    (("1\t1\t\n", "1\t1\t4.0\n"), "distance", 4),
    (("near the", "near\u00a0it the"), "answer_at", 4),  # a no-break space is no blank
    (("key near", "key  near"), "answer_at", 4),
    (("here\t2\tVBP\t0\t0\t1\n", "here\t2\tVBP\t0\t0\t1\n\n"), "answer_at", 4)])
def test_tables_as_people_have_them(change, column, expected, tables):
    text = (HEADER + "".join(ROWS)).replace(*change, 1)
    (tables.data_dir / "test.tsv").write_text(text + "\n", encoding="utf-8")
    test = sva.load_data(tables)["test"]
    assert len(test["labels"]) == 4
    assert test[column][0] == expected


def test_a_byte_order_mark_is_no_part_of_the_first_column(tables):
    """Spreadsheets write one, and the first column may be one of the six."""
    text = "\ufeff" + (HEADER + "".join(ROWS)).replace("x\t", "", 1).replace("-\t", "")
    (tables.data_dir / "test.tsv").write_text(text, encoding="utf-8")
    assert sva.load_data(tables)["test"]["labels"].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("change, expected", [
    (("\tdistance", "\twords"), "line 1: there is no column distance"),
    (("\tsentence", '\t"sentence"'), "line 1: there is no column sentence (names are not quoted)"),
    (("VBZ\t1\t1\t", "VBZ"), "line 2: 4 fields"),
    (("VBZ", "VBD"), "line 2: verb_pos VBD is neither VBZ nor VBP"),
    (("6\tVBZ", "9\tVBZ"), "line 2: verb_index 9 of 7 words"),
    (("6\tVBZ", "1\tVBZ"), "line 2: verb_index 1 of 7 words"),
    (("6\tVBZ", "\tVBZ"), "line 2: verb_index"),
    (("6\tVBZ", "inf\tVBZ"), "line 2: inf is no whole number"),
    (("VBZ\t1\t1", "VBZ\t1\t1.5"), "line 2: 1.5 is no whole number")])
def test_a_line_that_is_no_sentence_is_named(change, expected, tables, capfd):
    text = (HEADER + "".join(ROWS)).replace(*change, 1)
    (tables.data_dir / "test.tsv").write_text(text)
    said = refusal(capfd, sva.load_data, tables)
    assert "test.tsv" in said and expected in said


def test_quoted_sentences_are_refused_with_the_way_out(tables, capfd):
    """pandas quotes a field with a quote in it, and doubles that; a sentence in quotes is none."""
    row = ROWS[0].replace("the key near the cats is here", '" the key near it is " here "')
    (tables.data_dir / "test.tsv").write_text(HEADER + row)
    assert len(sva.load_data(tables)["test"]["labels"]) == 1
    quoted = ROWS[0].replace("the key near the cats is here", '"the "" key "" near it is"')
    (tables.data_dir / "test.tsv").write_text(HEADER + quoted)
    assert "quoting=csv.QUOTE_NONE" in refusal(capfd, sva.load_data, tables)


def test_a_file_without_a_usable_sentence_is_named(tables, capfd):
    """As when all are too long, or a language model knows no verb."""
    for name in ("validation", "test"):
        path = tables.data_dir / f"{name}.tsv"
        before = path.read_text()
        path.write_text(HEADER + ROWS[0].replace("here", "here " * 300))
        assert f"no {name} sentence" in refusal(capfd, sva.load_data, tables)
        path.write_text(before)


def test_without_sentences_synthetic_ones_stand_in_with_a_warning(tmp_path, capfd):
    args = arguments(data_dir=tmp_path)
    sva.load_sentences(args)
    assert args.data == "synthetic" and args.available == 750
    assert "SYNTHETIC" in capfd.readouterr().err


# ---- Sentences: models, and where they answer ----------------------------------------------------


@pytest.mark.parametrize("name", sva.MODELS)
@torch.no_grad()
def test_padding_does_not_matter_and_later_words_only_where_they_may(name):
    """Only a bidirectional model sees the words to come."""
    model = sva.build_model(name, 0, arguments()).eval()
    tokens = torch.arange(4, 18).view(2, 7)
    tokens[0, 5:] = sva.PAD
    states = model.states(tokens)
    assert close(model.states(tokens[:1, :5]), states[:1, :5], atol=1e-5), "padding matters"

    changed = tokens.clone()
    changed[:, 4] = 19
    states_changed = model.states(changed)
    assert (states[:, 4] - states_changed[:, 4]).abs().amax(1).min() > 1e-4, "a word is not seen"
    is_causal = close(states[:, :4], states_changed[:, :4], atol=1e-5)
    assert is_causal is (name not in sva.BIDIRECTIONAL)


@torch.no_grad()
def test_a_block_hides_no_word_unless_it_is_told_to():
    """So it can be copied: without a mask every word sees every word."""
    block = sva.Block(width=8).eval()
    x = normal(1, 4, 8).float()
    changed = x.clone()
    changed[:, 3] *= -1
    assert not close(block(x)[:, 0], block(changed)[:, 0])
    assert close(block(x, causal=True)[:, 0], block(changed, causal=True)[:, 0])


def test_a_model_can_be_called():
    for name in sva.MODELS:
        model = sva.build_model(name, 0, arguments())
        assert model(torch.arange(4, 18).view(2, 7)).shape == (2, 7, 2)


VOCABULARY = {"a": 4, "b": 5, "c": 6, "bs": 7}
SENTENCES = [  # the verb is b or bs
    sva.Sentence("a c a b c", 3, True, 0, 1),
    sva.Sentence("c bs a", 1, False, 1, 2),
    sva.Sentence("a a bs c", 2, False, 4, 3),
]


def answers_by_loop(model, words):
    """Logits after every word, from a model that has seen no later one."""
    logits = []
    for end in range(1, len(words) + 1):
        states = model.states(tensor([words[:end]]))
        logits.append(model.head(states[0, -1]))
    return torch.stack(logits)


@pytest.mark.parametrize("answers, expected", [("every", [1, 1, 1, 0, 0, 0]), ("last", [1, 0, 0])])
@torch.no_grad()
def test_a_classifier_answers_after_every_word_or_the_last_before_the_verb(answers, expected):
    model = sva.build_model("lstm", 0, arguments()).eval()
    split = sva.encode(SENTENCES, VOCABULARY, "classification")
    by_sentence = [answers_by_loop(model, words) for words in ([4, 6, 4], [6], [4, 4])]
    if answers == "last":
        by_sentence = [logits[-1:] for logits in by_sentence]

    tokens, positions, targets = sva.inputs_and_targets(split, answers)
    states = model.states(tokens).flatten(0, 1)[positions]

    assert close(model.head(states), torch.cat(by_sentence))
    assert targets.tolist() == expected


@torch.no_grad()
def test_a_teacher_of_sentences_is_asked_after_every_word():
    """In eval mode, whatever mode it was left in."""
    model = sva.build_model("lstm", 0, arguments()).eval()
    split = sva.encode(SENTENCES, VOCABULARY, "classification")
    by_sentence = [answers_by_loop(model, words) for words in ([4, 6, 4], [6], [4, 4])]
    found = sva.answer_every_word(model.train(), split, arguments())
    for row, expected in zip(found, by_sentence):
        assert close(row[:len(expected)], expected)


@torch.no_grad()
def test_a_classifier_is_tested_after_the_last_word(monkeypatch):
    """Logits, states before the verb and loss, in the order of the sentences."""
    monkeypatch.setattr(sva, "LOGITS_AT_ONCE", 2)
    model = sva.build_model("lstm", 0, arguments()).eval()
    split = sva.encode(SENTENCES, VOCABULARY, "classification")
    expected = torch.stack([answers_by_loop(model, words)[-1]
                            for words in ([4, 6, 4], [6], [4, 4])])
    logits, states, loss = sva.evaluate(model.train(), split, arguments())
    assert close(logits, expected)
    assert close(model.head(states), expected)
    assert loss == approx(F.cross_entropy(expected, split["labels"]).item())


@torch.no_grad()
def test_a_language_model_is_tested_by_its_verbs_and_by_all_words(monkeypatch):
    """P(singular) and P(plural) in the verb's place; the mean loss of all words and of END."""
    monkeypatch.setattr(sva, "LOGITS_AT_ONCE", 4 * 20)
    args = arguments(objective="lm")
    model = sva.build_model("transformer-seq", 0, args).eval()
    split = sva.encode(SENTENCES, VOCABULARY, "lm")
    logits, states, loss = sva.evaluate(model.train(), split, args)

    losses = []
    for row, state, sentence in zip(logits, states, SENTENCES):
        words = [VOCABULARY[word] for word in sentence.text.split()]
        words = [sva.START, *words, sva.END]
        scores = answers_by_loop(model, words).log_softmax(1)
        losses += [-scores[place, word].item() for place, word in enumerate(words[1:])]
        assert close(row, scores[sentence.verb, [7, 5]]), "singular first"
        assert close(model.head(state).log_softmax(0), scores[sentence.verb])
    assert loss == approx(np.mean(losses), rel=1e-5)


def metrics_of(split, logits, monkeypatch, loss=0.0, objective="classification"):
    monkeypatch.setattr(sva, "evaluate", lambda *_: (logits, None, loss))
    metrics, _ = sva.test_all(None, {"test": split}, arguments(objective=objective))
    return metrics["test"]


def test_a_accuracy_is_the_mean_over_numbers_of_attractors(monkeypatch):
    """0, 1, 2, 3, and 4 with all above; not where other nouns stand between (-1)."""
    split = {"labels": tensor([0, 0, 1, 0, 1, 0, 1]), "distance": tensor([1, 1, 1, 1, 1, 1, 1]),
             "attractors": tensor([0, 0, 0, 3, 4, 6, -1])}
    always_singular = tensor([[2.0, 0.0]] * 7)
    metrics = metrics_of(split, always_singular, monkeypatch)
    assert metrics["accuracy_by_attractors"] == approx({"0": 2 / 3, "3": 1, "4": 1 / 2})
    assert metrics["a_accuracy"] == approx((2 / 3 + 1 + 1 / 2) / 3)


def test_balanced_a_accuracy_weighs_singular_and_plural_subjects_alike(monkeypatch):
    """Who always says "singular" has 0.5 where both numbers are there. Here: 0 attractors 1/3 and
    1, one attractor (all singular) 1, four and more 0 and 1/2."""
    split = {"labels": tensor([0, 0, 0, 1, 0, 1, 0, 0, 0]), "distance": torch.ones(9).long(),
             "attractors": tensor([0, 0, 0, 0, 1, 4, 5, 4, -1])}
    says_plural = tensor([0, 1, 1, 1, 0, 0, 0, 1, 1])
    metrics = metrics_of(split, F.one_hot(says_plural, 2).double(), monkeypatch)
    expected = [(1 / 3 + 1) / 2, 1, (0 + 1 / 2) / 2]
    assert metrics["balanced_a_accuracy"] == approx(np.mean(expected))
    by_attractors = dict(zip("014", expected))
    assert metrics["balanced_accuracy_by_attractors"] == approx(by_attractors)


def test_d_accuracy_is_the_mean_over_distances_up_to_sixteen(monkeypatch):
    split = {"labels": tensor([0, 1, 1, 0, 1, 0]), "distance": tensor([1, 1, 16, 16, 17, -1]),
             "attractors": torch.zeros(6).long()}
    split["labels"][3] = 1
    metrics = metrics_of(split, tensor([[2.0, 0.0]] * 6), monkeypatch)
    assert metrics["d_accuracy"] == approx((1 / 2 + 0) / 2)


def test_perplexity_is_the_exponential_of_the_loss_and_nan_no_answer(monkeypatch):
    split = {"labels": tensor([0, 1]), "distance": tensor([1, 1]), "attractors": tensor([0, 1])}
    logits = tensor([[math.nan, 0.0], [0.0, 1.0]])
    metrics = metrics_of(split, logits, monkeypatch, loss=math.log(7), objective="lm")
    assert metrics["perplexity"] == approx(7)
    assert math.isnan(metrics["accuracy"]) and math.isnan(metrics["a_accuracy"])


def test_batches_hold_every_sentence_once_with_little_padding():
    lengths = torch.randint(1, 50, (1010,), generator=torch.Generator().manual_seed(0))
    batches = sva.batches_by_length(lengths, 8, torch.Generator().manual_seed(0))
    assert batches.shape == (126, 8) and len(batches.unique()) == 126 * 8
    padded = lengths[batches].amax(1).sum() * 8
    assert lengths[batches].sum() > 0.9 * padded, "much padding"


def test_batches_are_sorted_within_windows_only():
    """Sorted over everything, sentences of one length would always meet the same others."""
    lengths = torch.arange(120 * 8) % 40
    batches = sva.batches_by_length(lengths, 8, torch.Generator().manual_seed(0))
    with_shortest = (lengths[batches] == 0).any(1).sum()
    assert with_shortest > 24 / 8, "all of the shortest are in as few batches as can be"
    again = sva.batches_by_length(lengths, 8, torch.Generator().manual_seed(1))
    assert not torch.equal(batches, again)


# ---- Training on sentences -----------------------------------------------------------------------


def test_the_backward_pass_in_parts_is_that_of_the_whole():
    """Also through two inputs, one of them without gradient, and with a shorter last part."""
    weights = normal(3, 4).requires_grad_()
    inputs = normal(7, 3, seed=1)
    soft = normal(7, 4, seed=2)
    targets = torch.arange(7) % 4

    def loss_of(targets, logits, soft):
        return common.kd_loss(logits, soft, targets, 2.0, 0.5)

    expected = loss_of(targets, inputs @ weights, soft)
    expected.backward()
    gradient = weights.grad.clone()
    weights.grad = None

    loss = sva.backward_in_parts(loss_of, targets, inputs @ weights, soft, at_once=3)

    assert loss.item() == approx(expected.item())
    assert torch.allclose(weights.grad, gradient)


@pytest.fixture
def small_models(monkeypatch):
    seq = partial(sva.Transformer, width=16, layers=1)
    monkeypatch.setattr(sva, "MODELS", {
        "lstm": partial(sva.LSTM, width=16),
        "transformer-seq": seq,
        "transformer": partial(seq, causal=False),
    })
    monkeypatch.setitem(sva.DROPOUT, ("classification", "lstm"), 0.0)
    monkeypatch.setitem(sva.DROPOUT, ("lm", "lstm"), 0.0)


@pytest.fixture
def watched(monkeypatch):
    """The steps of training: tokens, positions, and what the KD loss is given."""
    monkeypatch.setattr(sva, "LOGITS_AT_ONCE", 10**9)
    steps = []
    inputs_and_targets = sva.inputs_and_targets

    def noted(batch, answers):
        tokens, positions, targets = inputs_and_targets(batch, answers)
        if len(tokens) == 32:  # else an evaluation
            steps.append({"tokens": tokens, "positions": positions})
        return tokens, positions, targets

    monkeypatch.setattr(sva, "inputs_and_targets", noted)
    monkeypatch.setattr(sva, "evaluate", unwatched(sva.evaluate, steps))
    watch_loss(monkeypatch, steps)
    return steps


def unwatched(evaluate, steps):
    def without_notes(*inputs):
        before = len(steps)
        found = evaluate(*inputs)
        del steps[before:]
        return found
    return without_notes


SENTENCE_SETUPS = [  # flags, whether every word is asked
    ("--answers every", True),
    ("--teacher lstm --kd", True),
    ("--teacher lstm --kd --answers last", False),
    ("--teacher lstm --kd permuted", True),
    ("--teacher lstm --kd hard", True),
    ("--teacher transformer --kd --temperature 3 --alpha 0.9", False),
    ("--objective lm --teacher lstm --kd", True),
]


@pytest.mark.parametrize("flags, every", SENTENCE_SETUPS)
def test_setups_of_sentences(flags, every, tmp_path, watched, small_models, monkeypatch):
    """The batches are those of the plain twin, the words asked those of the setup, and the soft
    labels what the teacher answers there, without its dropout."""
    monkeypatch.setitem(sva.DROPOUT, ("lm", "lstm"), 0.3)
    lm = "lm" in flags
    run(sva, "--objective lm" if lm else "", tmp_path)
    twin = list(watched)
    watched.clear()
    folder, record = run(sva, flags, tmp_path)
    config = record["config"]
    steps = watched[-6:]  # 2 epochs of 3 batches, after those of the teacher
    snapshots = np.load(folder / "outputs.npz")["probe_representations"]
    assert snapshots.shape == (3, 240, 16), "epochs 0, 1, 2 of all 240 test sentences"

    for step, twin_step in zip(steps, twin, strict=True):
        assert torch.equal(step["tokens"], twin_step["tokens"]), "another batch"
        if lm:
            assert len(step["positions"]) == len(twin_step["positions"])
        elif every:
            assert len(step["positions"]) == step["tokens"].count_nonzero()
        else:
            assert len(step["positions"]) == 32

    if "--kd" in flags:
        check_teacher_of_sentences(folder, record, steps, flags)
        expected = (3, 0.9) if "3" in flags else (1 if lm or "hard" in flags else 2, 1)
        assert {(step["temperature"], step["alpha"]) for step in steps} == {expected}
        assert (config["temperature"], config["alpha"]) == expected


@torch.no_grad()
def check_teacher_of_sentences(folder, record, steps, flags):
    config = record["config"]
    args = arguments(tokens=record["sizes"]["tokens"], objective=config["objective"])
    teacher = sva.build_model(config["teacher"], 5, args).eval()
    common.load_weights(teacher, folder.parents[1] / record["teacher"])
    fresh = []
    for step in steps:
        logits = teacher(step["tokens"]).flatten(0, 1)
        fresh.append(logits[step["positions"]])
    check_soft_labels(steps, torch.cat(fresh), flags, tolerance=1e-5)


def test_each_seed_has_its_own_permutation_of_sentences():
    split = sva.encode(SENTENCES * 20, VOCABULARY, "classification")
    found = []
    for seed in (0, 1):
        soft_labels = normal(*split["tokens"].shape, 2, seed=5)
        sva.permute(soft_labels, split, "every", seed)
        found.append(soft_labels)
    assert not torch.equal(*found)
    assert found[0].sum().item() == approx(found[1].sum().item()), "not the same soft labels"


def test_a_run_permutes_with_its_own_seed(tmp_path, monkeypatch, small_models):
    seeds = []
    permute = sva.permute

    def noted(soft_labels, split, answers, seed):
        seeds.append(seed)
        permute(soft_labels, split, answers, seed)

    monkeypatch.setattr(sva, "permute", noted)
    run(sva, "--teacher lstm --kd permuted --seed 3", tmp_path)
    assert seeds == [3]


def test_an_lstm_drops_out_before_between_and_after_its_layers():
    model = sva.build_model("lstm", 0, arguments())
    calls = []
    model.drop.register_forward_hook(lambda *_: calls.append(1))
    model(torch.arange(4, 18).view(2, 7))
    assert len(calls) == 2 and model.lstm.dropout == 0.25


def test_parts_change_nothing_and_online_both_learn(tmp_path, monkeypatch, small_models):
    """A language model's losses are the same, whether its words go in parts or in one."""
    losses = []
    for at_once, kd in product((10**9, 50 * 49), ("--kd", "--kd online")):
        monkeypatch.setattr(sva, "LOGITS_AT_ONCE", at_once)
        flags = f"--objective lm --student lstm --epochs 20 --lr 0.03 {kd}"
        _, record = run(sva, flags, tmp_path / str(at_once))
        losses.append([entry["loss"] for entry in record["history"]])
        assert record["teacher_metrics"]["test"]["perplexity"] < 32, "the teacher learns nothing"
    assert np.allclose(losses[:2], losses[2:], atol=1e-3)


def test_sentences_are_learned_with_adamw_and_clipped_gradients(
        tmp_path, monkeypatch, small_models):
    """The recipe of all published sentences; online each model has its own rate and its own
    clipping."""
    optimizers = []
    clipped = []
    clip = nn.utils.clip_grad_norm_

    def noted(parameters, largest):
        clipped.append((len(parameters), largest))
        return clip(parameters, largest)

    watch_optimizers(monkeypatch, optimizers)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", noted)
    run(sva, "--student transformer-seq --teacher lstm --kd online", tmp_path)

    found = optimizers[-1]
    assert found["class"] is torch.optim.AdamW and found["weight_decay"] == 0.01
    assert (found["pct_start"], found["total_steps"]) == (0.25, 6)
    rates = [sva.RECIPES["classification", family]["lr"] for family in ("transformer", "lstm")]
    assert found["max_lr"] == rates
    assert [largest for _, largest in clipped] == [1.0] * 12, "2 models, 6 steps"


def test_dropout_is_that_of_the_objective():
    """0.25 for the LSTM that classifies, which learns by heart; 0.1 for all others."""
    for name, objective in product(sva.MODELS, ("classification", "lm")):
        model = sva.build_model(name, 0, arguments(objective=objective))
        rates = {layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)}
        assert rates == {0.25 if (name, objective) == ("lstm", "classification") else 0.1}


def test_reading_what_a_run_is_leaves_the_random_state_alone(tmp_path):
    before = torch.random.get_rng_state()
    args = parsed(sva, "--teacher transformer --kd", tmp_path)
    sva.configure(args)
    sva.run_folder(args)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_accuracy_of_zero_is_printed_as_zero(tmp_path, capsys):
    """It is a number, and not nan; what is unknown is a dash."""
    metrics = {"accuracy": 0.0, "nll": 1.0}
    unknown = {"accuracy": None, "nll": 2.0}
    args = parsed(sva, "--kd", tmp_path)
    sva.print_results(args, {"metrics": {"test": metrics}, "teacher_metrics": {"test": unknown}})
    printed = capsys.readouterr().out
    assert re.search(r"student +0\.0000 +1\.0000", printed)
    assert re.search(r"teacher +- +2\.0000", printed)


# ---- Analysis: claims ----------------------------------------------------------------------------


def made_up_run(name, seed, student, teacher=None, kd=None):
    """A run without files: what claims and references read of it."""
    end = f"/seed{seed}"
    record = {"plain": {model: model + end for model in ("mlp", "cnn")}}
    if teacher:
        record |= {
            "teacher": f"{teacher}/seed{seed + 1}",
            "self_taught": f"{student}-to-{student}{end}",
            "permuted": f"{teacher}-to-{student}-permuted{end}",
        }
    one = analyze.Run.__new__(analyze.Run)
    one.name = name
    one.seed = seed
    one.key = name + end
    one.student = student
    one.record = record
    one.config = {"kd": kd, "teacher": teacher}
    return one


def made_up_runs():
    """Five seeds of everything that a claim may confuse."""
    runs = []
    for seed in range(5):
        runs += [
            made_up_run("cnn", seed, "cnn"),
            made_up_run("mlp", seed, "mlp"),
            made_up_run("cnn-to-mlp", seed, "mlp", "cnn", "offline"),
            made_up_run("mlp-to-mlp", seed, "mlp", "mlp", "offline"),
            made_up_run("mlp-to-cnn", seed, "cnn", "mlp", "offline"),
            made_up_run("cnn-to-mlp-permuted", seed, "mlp", "cnn", "permuted"),
            made_up_run("mlp-lr1", seed, "mlp"),
        ]
    return sorted(runs, key=lambda one: (one.student, bool(one.config["kd"]), one.name, one.seed))


HIGHER = [  # claim, column, and of which name the value must be higher than of which
    ("the stronger bias generalises better", "OOD: accuracy", "cnn", "mlp"),
    ("teaching improves accuracy", "OOD: accuracy", "cnn-to-mlp", "mlp"),
    ("... more than self-distillation", "OOD: accuracy", "cnn-to-mlp", "mlp-to-mlp"),
    ("... more than permuted soft labels", "OOD: accuracy", "cnn-to-mlp", "cnn-to-mlp-permuted"),
    ("teaching improves calibration", "OOD: ece", "mlp", "cnn-to-mlp"),
    ("errors come nearer to other strong models", "other strong: kappa", "cnn-to-mlp", "mlp"),
    ("representations come nearer (CKA)", "other strong: CKA", "cnn-to-mlp", "mlp"),
    ("representations come nearer (RSA)", "other strong: RSA", "cnn-to-mlp", "mlp"),
    ("training paths come nearer", "other strong: path distance", "mlp", "cnn-to-mlp"),
    ("teaching moves the basin", "solutions: barrier", "cnn-to-mlp", "mlp-to-mlp"),
    ("self-distillation changes little (CKA)", "own kind: CKA", "mlp-to-mlp", "mlp"),
    ("stronger bias, less variance", "solutions: prediction spread", "mlp", "cnn"),
    ("... of representations", "solutions: representation spread", "mlp", "cnn"),
]


def rows_with_a_difference(runs, column, high, low, difference):
    """Seeds differ much, differences of one seed hardly."""
    rows = {}
    for one in runs:
        value = 50.0 + one.seed
        if one.name == high:
            value += difference
        elif one.name == low:
            value += 1e-4 * one.seed**2
        rows[one.key] = {column: value}
    return rows


def test_every_claim_is_listed():
    assert [claim for claim, *_ in HIGHER] == [claim for claim, *_ in analyze.CLAIMS]


@pytest.mark.parametrize("claim, column, high, low", HIGHER)
def test_a_claim_has_its_sign_its_column_and_its_runs(claim, column, high, low):
    """Supported where `high` is above `low`, contradicted where it is below; paired by seed. A
    claim that little changes is contradicted by both."""
    runs = made_up_runs()
    cases = [(1.0, "supported"), (-1.0, "contradicted")]
    if claim == "self-distillation changes little (CKA)":
        cases = [(0.01, "supported"), (0.2, "contradicted"), (-0.2, "contradicted")]
    for difference, verdict in cases:
        rows = rows_with_a_difference(runs, column, high, low, difference)
        found, = [each for each in analyze.test_claims(runs, rows) if each["claim"] == claim]
        assert found["verdict"] == verdict
        assert {found["one"], found["against"]} == {high, low}
        assert sorted(found["values"]) == [0, 1, 2, 3, 4]


def test_only_the_stronger_kind_teaches_a_taught_run():
    """A teacher of another, no stronger kind makes no claim, nor does a part of what it says."""
    roles = {}
    for student, teacher, kd in (("transformer-seq", "lstm", "offline"),
                                 ("transformer-seq", "lstm", "online"),
                                 ("transformer-seq", "lstm", "permuted"),
                                 ("transformer-seq", "transformer-seq", "offline"),
                                 ("transformer-seq", "transformer-seq", "permuted"),
                                 ("transformer-seq", "lstm", "hard"),
                                 ("mlp", "cnn", "confidence"),
                                 ("mlp", "mlp", "ratios"),
                                 ("transformer-seq", "ut-seq", "offline"),
                                 ("lstm", "transformer-seq", "offline"),
                                 ("lstm", "lstm", "offline")):
        roles[student, teacher, kd] = made_up_run("name", 0, student, teacher, kd).role()
    assert list(roles.values()) == ["taught", "taught", "permuted", "self-taught", *6 * ["other"],
                                    "self-taught"]


def test_fewer_than_three_seeds_decide_nothing():
    assert analyze.t_test([1.0, 1.0001], 1)[2] == "untested"


def test_the_interval_is_that_of_students_t():
    """Of 1, 2, 3, 4: mean 2.5, standard deviation 1.291, quantile 3.182."""
    mean, half, _ = analyze.t_test([1, 2, 3, 4], 1)
    assert (mean, half) == approx((2.5, 3.182 * 0.645497), abs=1e-3)


def test_one_in_twenty_verdicts_is_wrong_by_chance():
    """Where all runs are alike: 95 % of the verdicts are inconclusive."""
    runs = made_up_runs()
    random = np.random.default_rng(0)
    verdicts = Counter()
    for _ in range(200):
        rows = {one.key: {column: random.normal() for _, column, *_ in analyze.CLAIMS}
                for one in runs}
        verdicts.update(claim["verdict"] for claim in analyze.test_claims(runs, rows))
    assert 0.03 < 1 - verdicts["inconclusive"] / verdicts.total() < 0.07


def test_so_are_verdicts_about_spreads():
    """Though a spread is of pairs of seeds, which depend on each other."""
    weak, strong = normal(2, 1000, 4, 30)
    differences = torch.cdist(weak, weak).square() - torch.cdist(strong, strong).square()
    verdicts = [analyze.t_test(analyze.jackknife(pairs).tolist(), 1)[2] for pairs in differences]
    assert 30 < 1000 - verdicts.count("inconclusive") < 70


def test_pairwise_fills_a_symmetric_matrix():
    found = analyze.pairwise([1, 4, 9], lambda a, b: b - a)
    assert found.tolist() == [[0, 3, 8], [3, 0, 5], [8, 5, 0]]


def share_printed(accuracies, capsys):
    """accuracies: name -> function of the seed."""
    runs = made_up_runs()
    rows = {one.key: {"OOD: accuracy": accuracies[one.name](one.seed)} for one in runs
            if one.name in accuracies}
    analyze.print_answer(analyze.test_claims(runs, rows))
    return re.findall(r"- (.+) of the gap", capsys.readouterr().out)


def test_the_answer_begins_with_the_share_of_the_gap(capsys):
    """0.3 of 0.4; over the seeds of the gain alone, of which there is one less."""
    names = {"mlp": lambda seed: 0.0, "cnn": lambda seed: 0.4, "cnn-to-mlp": lambda seed: 0.3}
    assert share_printed(names, capsys) == ["0.75 (0.75 to 0.75)"]

    gaps = {0: 0.4, 1: 0.4, 2: 0.4, 3: 9.0}
    share = analyze.share_of_gap({0: 0.3, 1: 0.3, 2: 0.3}, gaps)
    assert share == approx((0.75, 0.75, 0.75)), "a seed without gain counts"
    assert analyze.share_of_gap({0: 0.3, 5: 0.3}, gaps) is None, "a gap is missing"


def test_the_interval_of_a_share_is_fiellers():
    """At its ends a t-test between the gains and the share of the gaps is just inconclusive."""
    gains = [0.16, 0.13, 0.17, 0.19, 0.15]
    gaps = [0.20, 0.19, 0.18, 0.25, 0.21]
    share, *ends = analyze.ratio_of_means(gains, gaps)
    assert share == approx(0.80 / 1.03) and ends[0] < share < ends[1]
    for end in ends:
        left = [gain - end * gap for gain, gap in zip(gains, gaps)]
        mean, half, _ = analyze.t_test(left, 1)
        assert abs(mean) == approx(half)
    assert analyze.share_text((share, *ends)) == f"0.78 ({ends[0]:.2f} to {ends[1]:.2f})"
    assert analyze.share_text(analyze.ratio_of_means([0.1, 0.3], [0.4, 0.4])) == "0.50"


def test_every_kind_is_compared_with_its_student_alone(capsys):
    """Parts, controls and weaker teachers too; paired by seed; not the plain runs with themselves.
    mlp-to-cnn's student has no stronger kind, so no share."""
    runs = made_up_runs()
    rows = {}
    gains = {"cnn": 0.4, "mlp": 0.0, "cnn-to-mlp": 0.3, "mlp-lr1": -0.1, "mlp-to-cnn": 0.35}
    for one in runs:
        if one.name in gains:
            accuracy = 0.1 * one.seed + gains[one.name]
            rows[one.key] = {"OOD: accuracy": accuracy, "OOD: ece": 0.5 - accuracy}
    del rows["cnn-to-mlp/seed3"]
    analyze.print_against_alone(runs, rows)
    lines = [re.split(r" *\| *", line) for line in capsys.readouterr().out.splitlines()[4:]]
    assert [line[1:] for line in lines[1:]] == [
        ["mlp-to-cnn", "-0.050 (-0.050 to -0.050)", "+0.050 (+0.050 to +0.050)", "-", "5", ""],
        ["mlp-lr1", "-0.100 (-0.100 to -0.100)", "+0.100 (+0.100 to +0.100)",
         "-0.25 (-0.25 to -0.25)", "5", ""],
        ["cnn-to-mlp", "+0.300 (+0.300 to +0.300)", "-0.300 (-0.300 to -0.300)",
         "0.75 (0.75 to 0.75)", "4", ""]]


def test_no_share_is_shown_of_a_gap_that_is_in_doubt(capsys):
    names = {"mlp": lambda seed: 0.0, "cnn": lambda seed: 0.4 + 9 * (-1)**seed,
             "cnn-to-mlp": lambda seed: 0.3}
    assert share_printed(names, capsys) == []


def test_a_run_is_compared_with_models_that_did_not_teach_it():
    """Nor have its seed s or s + 1: a taught run and its plain twin have the same references."""
    runs = made_up_runs()
    odd_one, = [one for one in runs if one.key == "cnn-to-mlp/seed0"]
    odd_one.record["teacher"] = "cnn/seed3"
    for one in runs:
        teacher = one.record.get("teacher")
        found = {whose: [other.key for other in others]
                 for whose, others in analyze.references(one, runs).items()}
        for whose, model in (("own kind", one.student), ("other strong", "cnn")):
            keys = [f"{model}/seed{seed}" for seed in range(5)
                    if seed not in (one.seed, one.seed + 1)]
            assert found[whose] == [key for key in keys if key != teacher]
        assert found["own teacher"] == [other.key for other in runs if other.key == teacher]


def test_runs_older_than_a_model_have_no_references_of_it(monkeypatch):
    """Who adds a model and a line to STRONGER keeps the runs on disk."""
    monkeypatch.setitem(analyze.STRONGER, "mlp", "resnet")
    runs = made_up_runs()
    one, = [one for one in runs if one.key == "cnn-to-mlp/seed0"]
    assert analyze.references(one, runs)["other strong"] == []
    assert analyze.test_claims(runs, {}) == []


# ---- Analysis: what is measured ------------------------------------------------------------------


def test_a_barrier_is_the_height_above_the_line_between_the_ends():
    """Losses 1.0, 2.0 (19 times), 1.5: highest above the line right after the start, at 1.025."""
    model = nn.BatchNorm1d(1)
    heights = iter([1.0, *[2.0] * 19, 1.5])
    way = []

    def measure(model):
        way.append(model.weight.item())
        return next(heights)

    ends = [model.state_dict() | {"weight": tensor([end])} for end in (3.0, 5.0)]
    assert analyze.barrier(model, *ends, measure) == approx(2 - 1.025)
    assert way == approx(np.linspace(3, 5, 21))


def test_a_path_begins_with_the_first_weights():
    """Mean of 1 - RSA over the epochs that both have, epoch 0 among them."""
    a, b = made_up_run("mlp", 0, "mlp"), made_up_run("mlp", 1, "mlp")
    same = normal(9, 4)
    a.snapshots = {0: normal(9, 4, seed=1), 1: same, 2: same, 4: same}
    b.snapshots = {0: normal(9, 4, seed=2), 1: same, 2: same}
    expected = (1 - common.rsa(a.snapshots[0], b.snapshots[0])) / 3
    assert expected > 0.01
    assert analyze.path_distance(a, b) == approx(expected)


def test_comparisons_are_means_over_the_tests_out_of_distribution():
    """Alike on the scaled digits, never on the translated ones; the unmoved ones don't count."""
    labels = tensor([0, 1])
    right = F.one_hot(labels, 2).double()
    a = Namespace(tests=("scaled", "translated"), key="a",
                  predictions={"test": (right, labels), "scaled": (right, labels),
                               "translated": (right, labels)})
    b = Namespace(tests=a.tests, key="b",
                  predictions={"test": (right, labels), "scaled": (right, labels),
                               "translated": (1 - right, labels)})
    assert analyze.COMPARISONS["agreement"](a, b) == approx(0.5)
    assert analyze.COMPARISONS["JS divergence"](a, b) == approx(0.5)
    assert analyze.COMPARISONS["kappa"](a, b) == approx(0.5)


@pytest.fixture(scope="module")
def analysed(grid, tmp_path_factory):
    """The small runs of digits in a/; their self-taught run with the outputs of its teacher; in b/
    the plain ones alone; one damaged, one of another version. Namespace(rows, out, err, ends)"""
    root = tmp_path_factory.mktemp("analysed")
    shutil.copytree(grid[""].folder.parents[1], root / "a/mnist-synthetic")
    name = {flags: one.folder.parts[-2] for flags, one in grid.items()}
    shutil.copy(root / "a/mnist-synthetic" / name[""] / "seed1/outputs.npz",
                root / "a/mnist-synthetic" / name["--kd"] / "seed0")
    shutil.copytree(root / "a/mnist-synthetic" / name[""], root / "b/mnist-synthetic" / name[""])
    (root / "a/mnist-synthetic" / name["--student cnn"] / "seed0/outputs.npz").write_bytes(b"PK")
    stranger = root / "c/mnist/name/seed0"
    shutil.copytree(grid[""].folder, stranger)
    text = (stranger / "run.json").read_text().replace('"mnist"', '"fashion"')
    (stranger / "run.json").write_text(text)

    ends = []
    load_weights = common.load_weights

    def noted(model, folder):
        ends.append("/".join(folder.parts[-2:]))
        return load_weights(model, folder)

    patch = pytest.MonkeyPatch()
    patch.setattr(common, "load_weights", noted)
    process = Namespace(ends=ends, root=root, name=name)
    with open(root / "out", "w+", encoding="utf-8") as out, open(root / "err", "w+") as err:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        analyze.main([str(root), "--csv", str(root / "all.csv")])
        patch.undo()
    process.out = (root / "out").read_text(encoding="utf-8")
    process.err = (root / "err").read_text()
    table = csv.DictReader((root / "all.csv").read_text().splitlines())
    process.rows = {(row["group"], f"{row['run']}/seed{row['seed']}"): row for row in table}
    return process


def test_a_finished_run_is_not_repeated(grid, tmp_path):
    root = shutil.copytree(grid[""].folder.parents[1], tmp_path / "mnist-synthetic")
    folder = root / grid["--kd"].folder.parts[-2] / "seed0"
    before = (folder / "run.json").stat().st_mtime_ns
    mnist.main([*SMALL.split(), "--kd", "--out", str(tmp_path)])
    assert (folder / "run.json").stat().st_mtime_ns == before


def test_every_run_is_a_row_with_its_numbers(analysed, grid):
    """In the folder's own group; out of distribution: the mean of scaled and translated digits."""
    assert len(analysed.rows) == 8 + 2
    row = analysed.rows["b/mnist-synthetic", f"{analysed.name['']}/seed0"]
    metrics = grid[""].record["metrics"]
    for column, metric in (("OOD: accuracy", "accuracy"), ("OOD: ece", "ece")):
        mean = (metrics["scaled"][metric] + metrics["translated"][metric]) / 2
        assert float(row[column]) == approx(mean)
    assert float(row["test: nll"]) == approx(metrics["test"]["nll"])
    assert row["role"] == "plain"


def test_a_run_with_its_teachers_outputs_is_its_teacher(analysed):
    row = analysed.rows["a/mnist-synthetic", f"{analysed.name['--kd']}/seed0"]
    alike = {"agreement": 1, "kappa": 1, "JS divergence": 0, "CKA": 1, "RSA": 1,
             "path distance": 0}
    assert list(alike) == list(analyze.COMPARISONS)
    for name, value in alike.items():
        assert float(row[f"own teacher: {name}"]) == approx(value, abs=1e-4)


def test_damaged_runs_are_left_out_and_named(analysed):
    """Those of another version too: but nobody is told to delete them."""
    lines = dict(zip(("cnn", "fashion"), analysed.err.splitlines(), strict=True))
    assert analysed.name["--student cnn"] in lines["cnn"] and "delete it" in lines["cnn"]
    assert "'fashion' is unknown" in lines["fashion"] and "delete" not in lines["fashion"]


def test_barriers_are_between_a_taught_run_and_its_twin_or_two_seeds(analysed):
    plain, self_taught = analysed.name[""], analysed.name["--kd"]
    pairs = set(zip(analysed.ends[::2], analysed.ends[1::2]))
    assert (f"{plain}/seed0", f"{self_taught}/seed0") in pairs
    assert (f"{plain}/seed1", f"{plain}/seed0") in pairs
    assert "barrier" in analysed.out


def test_values_of_a_flag_become_a_table_of_a_sweep(analysed):
    sweep = re.search(r"OOD accuracy over temperature.*\n\n(.*)\n.*\n(.*)\n", analysed.out)
    assert re.findall(r"\d+\.\d", sweep[1]) == ["5.0", "20.0"]
    assert "cnn-to-mlp" in sweep[2]


def test_a_sweep_knows_small_values_by_their_names():
    """alpha = 1e-05 has a minus sign in its name."""
    runs = [made_up_run(f"cnn-to-mlp{flag}", 0, "mlp", "cnn", "offline")
            for flag in ("", "-alpha1e-05", "-epochs3-alpha0.5")]
    for one, alpha in zip(runs, (1.0, 1e-05, 0.5)):
        one.config["alpha"] = alpha
    rows = {one.key: {"OOD: accuracy": one.config["alpha"]} for one in runs}
    found = analyze.sweeps(runs, rows)
    assert list(found) == ["alpha"] and list(found["alpha"]) == [("cnn-to-mlp", "taught")]
    sweep = found["alpha"]["cnn-to-mlp", "taught"]
    assert sweep.accuracies == {1.0: [1.0], 1e-05: [1e-05]}


def test_the_analysis_prints_where_the_locale_knows_ascii_alone(analysed):
    """It printed ± after all its work, and failed."""
    process = start(HERE, sys.executable, "analyze.py", str(analysed.root / "b"), "--no-barriers",
                    PYTHONIOENCODING="ascii", LC_ALL="C")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "±" in out


# ---- Analysis: figures, by the numbers that are drawn --------------------------------------------


def test_each_panel_has_the_plain_runs_those_taught_and_the_stronger_kind():
    by_role = analyze.runs_by_role("mlp", made_up_runs())
    assert {role: of_role[0].name for role, of_role in by_role.items()} == {
        "plain": "mlp", "taught": "cnn-to-mlp", "self-taught": "mlp-to-mlp",
        "permuted": "cnn-to-mlp-permuted", "strong": "cnn"}
    assert [len(of_role) for of_role in by_role.values()] == [5] * 5


def test_attractors_are_drawn_as_mean_and_deviation_over_seeds():
    runs = [made_up_run("mlp", seed, "mlp") for seed in range(2)]
    rows = {"mlp/seed0": {f"accuracy by attractors: {k}": 0.9 - k / 10 for k in range(5)},
            "mlp/seed1": {f"accuracy by attractors: {k}": 0.7 - k / 10 for k in range(5)}}
    curve, = analyze.attractor_curves({"plain": runs}, rows)
    assert curve.x == [0, 1, 2, 3, 4]
    assert curve.y == approx([0.8, 0.7, 0.6, 0.5, 0.4])
    assert curve.deviation == approx([0.1] * 5)


def test_reliability_is_drawn_of_bins_with_enough_examples():
    """30 predictions at 0.9, of which 20 are right; 19 at 0.6 are too few."""
    confidence = tensor([0.9] * 30 + [0.6] * 19)
    labels = tensor([0] * 20 + [1] * 10 + [0] * 19)
    one = made_up_run("mlp", 0, "mlp")
    one.tests = ("scaled",)
    one.predictions = {"test": (torch.rand(9, 2), torch.zeros(9)),
                       "scaled": (torch.stack([confidence, 1 - confidence], 1), labels)}
    curve, = analyze.reliability_curves({"plain": [one]})
    assert (curve.x, curve.y) == (approx([0.9]), approx([2 / 3]))


def test_paths_are_drawn_at_the_distances_of_their_snapshots():
    """Distances between points in a plane are kept."""
    points = normal(5, 2)
    found = analyze.classical_mds(torch.cdist(points, points))
    assert torch.allclose(torch.cdist(found, found), torch.cdist(points, points), atol=1e-9)

    runs = [made_up_run("mlp", seed, "mlp") for seed in range(3)]
    for one in runs:
        one.snapshots = {epoch: normal(6, 3, seed=10 * one.seed + epoch) for epoch in (0, 1, 2)}
    curves = analyze.path_curves({"plain": runs})
    assert len(curves) == 2, "two seeds are enough"
    assert {curve.label for curve in curves} == {"alone"}
    snapshots = [*runs[0].snapshots.values(), *runs[1].snapshots.values()]
    distances = tensor([[1 - common.rsa(a, b) for b in snapshots] for a in snapshots])
    expected = analyze.classical_mds(distances).T
    assert curves[0].x + curves[1].x == approx(expected[0].tolist())
    assert curves[0].y + curves[1].y == approx(expected[1].tolist())


def test_sweeps_are_drawn_over_sorted_values():
    """A panel a student, with the stronger kind; not one for a kind that is only the stronger."""
    taught = made_up_run("cnn-to-mlp", 0, "mlp", "cnn", "offline")
    strong = made_up_run("cnn", 0, "cnn")
    panels = analyze.sweep_panels({
        ("cnn-to-mlp", "taught"): analyze.Sweep(taught, {5.0: [0.7, 0.9], 1.0: [0.6]}),
        ("cnn", "plain"): analyze.Sweep(strong, {1.0: [0.9], 5.0: [0.9]}),
    })
    assert list(panels) == ["mlp"]
    first, second = panels["mlp"]
    assert first[:4] == ("taught by cnn", "taught", [1.0, 5.0], [0.6, approx(0.8)])
    assert first.deviation == [0, approx(0.1)]
    assert (second.label, second.role) == ("cnn itself", "strong")


@pytest.mark.parametrize("role, expected", [
    ("plain", "alone"), ("strong", "mlp itself"), ("taught", "taught by cnn"),
    ("permuted", "taught by cnn, permuted"), ("self-taught", "taught by its own kind"),
    ("other", "cnn-to-mlp-x")])
def test_a_curve_is_named_by_what_taught_it(role, expected):
    one = made_up_run("cnn-to-mlp-x", 0, "mlp", "cnn", "offline")
    assert analyze.label(one, role) == expected


def drawn_axes(tmp_path, monkeypatch, panels, decorate):
    """The axes of a figure, as matplotlib has them."""
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(plt, "close", lambda figure: None)
    analyze.draw(tmp_path / "figure.png", panels, "x", "y", decorate)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    return plt.gcf()


def test_panels_share_one_y_axis_and_one_legend(tmp_path, monkeypatch):
    """At most 9 inches wide for three; a name stands in the legend once."""
    curve = analyze.Curve("alone", "plain", [0, 1], [0.5, 0.6], [0.1, 0.1])
    figure = drawn_axes(tmp_path, monkeypatch, {"a": [curve], "b": [curve], "c": [curve]},
                        analyze.decorate_attractors)
    assert figure.get_size_inches()[0] <= 9
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["alone"]
    assert {axis.get_ylim() for axis in figure.axes} == {(0, 1)}
    assert [axis.get_title() for axis in figure.axes] == ["a", "b", "c"]


def test_a_sweep_has_the_values_of_its_flag_as_ticks(tmp_path, monkeypatch):
    """On a logarithmic scale where they span more than ten times, and hold no zero."""
    for values, scale in (([1, 5, 40], "log"), ([0, 0.5, 1], "linear"), ([2, 4], "linear")):
        curve = analyze.Curve("alone", "plain", values, [0.5] * len(values))
        axis, = drawn_axes(tmp_path, monkeypatch, {"mlp": [curve]}, analyze.decorate_sweep).axes
        assert axis.get_xscale() == scale
        assert axis.get_xticks().tolist() == values


def test_figures_are_of_the_runs_on_disk(analysed, monkeypatch, tmp_path):
    """Each figure is handed the curves of its runs."""
    drawn = {}
    monkeypatch.setattr(analyze, "draw", lambda path, panels, *_, **__: drawn.update(
        {Path(path).name: panels}))
    runs, = analyze.load_runs(analysed.root / "b").values()
    analyze.plot_group(tmp_path / "mnist", runs, analyze.make_rows(runs))
    plain = analysed.name[""]
    assert drawn["mnist-paths.png"][plain][0].label == "alone"
    assert len(drawn["mnist-paths.png"][plain][0].x) == 4, "epochs 0, 1, 2, 3"
    assert [curve.label for curve in drawn["mnist-reliability.png"][plain]] == ["alone"]
    assert "mnist-attractors.png" not in drawn


# ---- The commands of the README ------------------------------------------------------------------


def start(folder, *command, **variables):
    return Popen(command, cwd=folder, env=os.environ | variables, text=True, stdout=PIPE,
                 stderr=PIPE, start_new_session=True, encoding="utf-8")


@pytest.mark.parametrize("command", [
    f"train_mnist.py --teacher cnn --student mlp --kd --teacher-seed 2 {SMALL}",
    f"train_sva.py --teacher lstm --student transformer-seq --kd --teacher-seed 2 {SVA_SMALL}"])
def test_a_title_command_trains_teacher_and_student(command, tmp_path):
    """From a folder with the script and common.py alone; it says how long it takes."""
    for module in (mnist, sva, common):
        shutil.copy(module.__file__, tmp_path)
    process = start(tmp_path, sys.executable, "-u", *command.split())
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and err == "", err
    assert "s left" in out
    assert "plain twin      not there yet: the same command without --kd" in out
    assert len(list(tmp_path.rglob("run.json"))) == 2
    assert len(list(tmp_path.rglob("seed2/run.json"))) == 1, "--teacher-seed was not heeded"


def test_a_killed_run_leaves_nothing_that_looks_finished(tmp_path):
    command = f"train_mnist.py {SMALL} --epochs 50000 --out {tmp_path}"
    process = start(HERE, sys.executable, "-u", *command.split())
    while not process.stdout.readline().startswith("epoch"):
        assert process.poll() is None
    process.kill()
    process.communicate()
    assert not list(tmp_path.rglob("run.json"))


STUB = """#!/bin/sh
echo "$OMP_NUM_THREADS$OMP_WAIT_POLICY $*" >> "$LOG"
case "$*" in *analyze.py*) echo tables ;; *"--teacher cnn"*) sleep 0.01; exit "$FAIL" ;; esac
"""


@pytest.fixture
def run_all(tmp_path):
    """Runs ./run_all.sh with a stub for Python: (what it printed, errors, exit code)."""
    stub = tmp_path / "my python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    (tmp_path / "a b").mkdir()
    variables = dict(PYTHON=str(stub), LOG=str(tmp_path / "log"), OUT=str(tmp_path / "a b"),
                     SEEDS="2", FAIL="0", OMP_NUM_THREADS="")

    def call(*flags, **changes):
        process = start(HERE, "./run_all.sh", *flags, **variables | changes)
        out, err = process.communicate(timeout=300)
        return out, err, process.returncode

    call.log = tmp_path / "log"
    call.out = tmp_path / "a b"
    call.start = lambda *flags: start(HERE, "./run_all.sh", *flags, **variables)
    return call


def test_the_grid_runs_what_it_lists_and_then_the_analysis(run_all):
    """Plain runs first, each once, with one thread; also into a folder with a blank in its name."""
    listed, _, _ = run_all("--list", "--quick", FLAGS="--epochs 1")
    printed, err, code = run_all("--quick", FLAGS="--epochs 1")
    *lines, last = run_all.log.read_text().splitlines()
    assert code == 0 and err == "" and printed.endswith("tables\n")
    assert last.startswith("passive analyze.py"), "its threads would spin beside other processes"
    assert all(f"--out {run_all.out}" in line and line.endswith("--epochs 1") for line in lines)
    ran = [line.removeprefix("1 ") for line in lines]
    assert sorted(ran, key=lambda line: "--kd" in line) == ran, "a taught run before its teacher"
    wanted = [line.replace("\\", "").split("my python ")[1] for line in listed.splitlines()]
    assert set(ran) == set(wanted) and len(wanted) == len(set(wanted)) > 10


def test_one_run_of_each_script_fetches_the_data_before_all_others(run_all):
    """Else many runs at once would fetch the same files."""
    run_all()
    first, second, *_ = run_all.log.read_text().splitlines()
    assert {line.split()[1] for line in (first, second)} == {"train_mnist.py", "train_sva.py"}


def test_a_grid_that_was_killed_goes_on(run_all):
    process = run_all.start("--quick")
    while not run_all.log.exists() or run_all.log.read_text().count("--student") < 9:
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    _, _, code = run_all("--quick")
    assert code == 0


def test_a_failed_run_is_named_and_the_others_go_on(run_all):
    printed, err, code = run_all("--quick", FAIL="2")
    assert code == 1 and "some runs FAILED" in err
    assert "--teacher cnn --student mlp --seed 0 1 --kd" in err
    assert printed.endswith("tables\n")


def test_a_grid_grows_by_raising_seeds(run_all):
    few, _, _ = run_all("--list")
    many, _, _ = run_all("--list", SEEDS="5")
    assert set(few.splitlines()) < set(many.splitlines())


@pytest.mark.parametrize("flags", [["--quick"], []])
def test_every_taught_run_has_its_teacher_in_the_grid(flags, run_all):
    """Seed 1 teaches seed 0, and so on: there is a plain run more than taught ones."""
    listed, _, _ = run_all("--list", *flags)
    plain = set()
    taught = 0
    for line in listed.splitlines():
        task = "lm" if "--objective lm" in line else re.search(r"train_\w+", line)[0]
        student, seeds = re.search(r"--student (\S+) --seed ([\d ]+)", line).groups()
        for seed in seeds.split():
            if "--kd" not in line:
                plain.add((task, student, int(seed)))
                continue
            teacher = re.search(r"--teacher (\S+)", line)[1]
            assert (task, teacher, int(seed) + 1) in plain and (task, student, int(seed)) in plain
            taught += 1
    assert taught > 10


def test_a_listed_line_runs_as_it_stands(run_all):
    """Pasted into any shell: interpreter, flags and folders are there, and quoted."""
    out = run_all.out / "more blanks"
    flags = f"{SMALL.replace('--data synthetic ', '')} --epochs 1"
    listed, _, _ = run_all("--list", "--quick", PYTHON=sys.executable, OUT=str(out), FLAGS=flags)
    lines = [line for line in listed.splitlines() if "train_mnist.py" in line]
    for line in (lines[1], lines[-1]):
        process = start(HERE, "bash", "-c", line)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert len(list(out.glob("mnist-synthetic/*/seed*/run.json"))) >= 2


def readme():
    return (HERE / "README.md").read_text(encoding="utf-8")


def test_the_commands_of_the_readme_have_flags_that_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"python (train_\w+)\.py([^#;&\n`]*)", readme())
    assert len(commands) > 6
    for script, flags in commands:
        sys.modules[script].parse_arguments(flags.replace("$T", "5").split())


def test_the_example_of_the_readme_distils():
    """As it stands, with a teacher, a student and two loaders of one's own."""
    example, = re.findall(r"## Copying out.*?```python\n(.*?)```", readme(), re.DOTALL)
    teacher = nn.Linear(5, 3)
    student = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.1))
    x = normal(64, 5).float()
    pairs = list(zip(x, x.argmax(1) % 3))
    loader = torch.utils.data.DataLoader(pairs, batch_size=16)

    def distance():
        student.eval()
        return F.mse_loss(student(x).softmax(1), teacher(x).softmax(1))

    before = distance()
    exec(example, {"teacher": teacher, "student": student, "train_loader": loader,
                   "validation_loader": loader})
    assert distance() < before
    assert "student.eval()" in example and "student.train()" in example
    assert len(example.splitlines()) <= 30
