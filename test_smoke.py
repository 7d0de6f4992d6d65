"""Tests without data or network: `python -m pytest -q test_smoke.py`."""

import csv
import gzip
import json
import os
import re
import shutil
import signal
import sys
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

HERE, CPU, close = Path(__file__).parent, torch.device("cpu"), partial(torch.allclose, atol=1e-4)
SMALL = "--data synthetic --no-amp --device cpu --examples 600 --epochs 3 --batch-size 48"
SVA_SMALL = "--data synthetic --no-amp --device cpu --examples 120 --epochs 2 --batch-size 32"


def run(script, flags, out):
    small = SMALL if script is mnist else SVA_SMALL
    script.main([*small.split(), *flags.split(), "--out", str(out)])
    folder = max(out.glob("*/*/seed*"), key=lambda folder: folder.stat().st_mtime_ns)
    return folder, json.loads((folder / "run.json").read_text())


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def refused(capfd, expected, function, *arguments):
    end = pytest.raises(SystemExit, function, *arguments)
    return end.value.code and expected in capfd.readouterr().err + str(end.value.code)


def test_kd_loss_and_metrics():
    student, teacher = normal(2, 3, 4), normal(2, 3, 4, seed=1).requires_grad_()
    labels, t, alpha, total = tensor([[0, 2, 1], [1, 3, 3]]), 3.0, 0.7, 0.0
    for at in np.ndindex(2, 3):
        p, q, r = ((x[at] / d).exp() / (x[at] / d).exp().sum()
                   for x, d in ((teacher, t), (student, t), (student, 1)))
        total += alpha * t**2 * (p * (p / q).log()).sum() - (1 - alpha) * r[labels[at]].log()
    loss = common.kd_loss(student, teacher, labels, t, alpha)
    assert loss.item() == approx(total.item() / 6) and not loss.requires_grad
    pytest.raises(AssertionError, common.kd_loss, student[:1], teacher, labels)
    logits, labels, ece = normal(500, 10) * 2, torch.arange(500) % 10, 0.0
    two = tensor([[0.9, 0.1], [0.95, 0.05]])
    assert common.expected_calibration_error(two, tensor([0, 1])) == approx((0.1 + 0.95) / 2)
    p, right = logits.softmax(1), (logits.argmax(1) == labels).double()
    for low in range(15):
        rows = (p.amax(1) > low / 15) & (p.amax(1) <= (low + 1) / 15)
        ece += (right[rows] - p.amax(1)[rows]).sum().abs().item() / 500
    nll = -np.mean([p[i, labels[i]].log() for i in range(500)])
    assert common.classification_metrics(logits, labels) == approx({
        "accuracy": right.mean().item(), "ece": ece, "nll": nll})
    a, b = tensor([[0] * 7 + [1] * 3, [0] * 6 + [1] * 3 + [0]])
    assert common.error_consistency(a, b, torch.zeros_like(a)) == approx((0.8 - 0.58) / 0.42)
    q = normal(500, 10, seed=1).softmax(1)
    m = (p + q) / 2
    by_kl = ((p * (p / m).log2()).sum(1) / 2 + (q * (q / m).log2()).sum(1) / 2).mean().item()
    assert common.js_divergence(p, q) == approx(by_kl)
    x, y = normal(8, 3) + 0.3, normal(8, 5, seed=2)
    centring = torch.eye(8).double() - 1 / 8
    k, l = (centring @ (z @ z.T) @ centring for z in (x, y))
    assert common.linear_cka(x, y) == approx(((k * l).sum() / (k.norm() * l.norm())).item())
    cosines = [F.cosine_similarity(z[:, None], z[None], 2) for z in (x, y)]
    assert common.rsa(x, y) == approx(F.cosine_similarity(*cosines).mean().item())


def test_run_files(tmp_path, monkeypatch, capfd):
    folder, model, config = tmp_path / "kind/seed0", nn.Linear(1, 1), {"tag": 1}
    save = partial(common.save_run, folder, outputs={"x": torch.arange(3)}, model=model)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Path, "rename", lambda *_: 1 / 0)
        save({"config": config})
    assert not list(folder.parent.iterdir()) and common.find_run(folder, config) is None
    save({"config": config, "loss": np.inf})
    save({"config": {"tag": 2}})
    assert common.find_run(folder, config) == {"config": config, "loss": None}
    assert refused(capfd, "tag is 1, not 2", common.find_run, folder, {"tag": 2})
    for name, *read in (("model.pt", common.load_weights, model, folder),
                        ("run.json", common.find_run, folder, config)):
        (folder / name).write_bytes((folder / name).read_bytes()[:-9])
        assert refused(capfd, "unreadable: delete", *read)


@pytest.mark.parametrize("script, flags, name", [
    (mnist, "--teacher cnn --kd online --epochs 24 --lr 0.05", "cnn-to-mlp-online-lr0.05"),
    (mnist, "--teacher cnn --kd --epochs 24", "cnn-to-mlp-epochs24"),
    (mnist, "--kd permuted --alpha 0.9 --teacher-seed 7 --temperature 5",
     "mlp-to-mlp-permuted-temperature5-alpha0.9-teacher-seed7"),
    (mnist, "--examples 3000 --teacher cnn --kd", "cnn-to-mlp-examples3000"),
    (sva, "--teacher lstm --kd --answers last", "lstm-to-transformer-seq-last"),
    (sva, "--student ut-seq --kd --answers every --temperature 2", "ut-seq-to-ut-seq"),
    (sva, "--student lstm --objective lm --kd --batch-size 8", "lstm-to-lstm-batch-size8")])
def test_names_of_runs(script, flags, name, tmp_path):
    args = script.parse_arguments([*flags.split(), "--data", "synthetic", "--out", str(tmp_path)])
    args.files, args.available = {}, 750
    folder, config = script.configure(args)
    assert folder.parts[-2:] == (name, "seed0")
    for flag, value in re.findall(r"--(epochs|lr|temperature|alpha) (\S+)", flags):
        assert config[flag] == config.get(f"teacher_{flag}", float(value)) == float(value)
    related = script.relatives(args)
    if "3000" in name:
        expected = "mlp- cnn- mlp- mlp-to-mlp- cnn-to-mlp-permuted- cnn-".split()
        assert [*related.pop("plain").values(), *related.values()] == [
            f"{kind}examples3000/seed{place == 5:d}" for place, kind in enumerate(expected)]
    assert "last" not in name or related["untaught"] == "transformer-seq/seed0"


@pytest.mark.parametrize("script, flags, expected", [
    (mnist, "--epochs 0", "--epochs must"), (mnist, "--out /proc/runs", "/proc/runs"),
    (mnist, "--temperature 3", "--temperature has no effect without --kd"),
    (mnist, "--kd --seed 3 --teacher-seed 3", "must not be the student's own"),
    (sva, "--objective lm --student transformer", "reads both ways"),
    (sva, "--answers every --kd --teacher transformer", "reads both ways"),
    (sva, "--objective lm --kd permuted", "for classifiers"), (analyze, "x", "no finished")])
def test_bad_input(capfd, script, flags, expected):
    assert refused(capfd, expected, script.main, flags.split())


def arguments(**changes):
    defaults = dict(data="auto", examples=None, data_dir=Path("nowhere"), device=CPU)
    return Namespace(objective="classification", **defaults | changes)


def test_mnist_or_synthetic(monkeypatch, capfd):
    from torchvision import datasets
    def made_up(root, train, download=False):
        i = torch.arange(60_000 if train else 10_000)
        return Namespace(data=i.byte()[:, None, None].expand(-1, 28, 28), targets=i % 10)
    monkeypatch.setattr(datasets, "MNIST", made_up)
    data = mnist.load_data(args := arguments())
    assert [len(y) for _, y in data.values()] == [55_000, 5_000] + [10_000] * 3
    images, labels = data["validation"]
    assert args.data == "mnist" and (images[0] == 55_000 % 256).all() and labels[1] == 1
    monkeypatch.setattr(datasets, "MNIST", lambda *_, **__: 1 / 0)
    data = mnist.load_data(args := arguments(examples=60))
    assert len(data["train"][1]) == 55 and args.data == "synthetic"
    assert "SYNTHETIC" in capfd.readouterr().err
    assert refused(capfd, "no MNIST in", mnist.load_data, arguments(data="mnist"))


def test_translated_and_scaled():
    from torchvision.transforms.functional import InterpolationMode, affine
    data = mnist.load_data(arguments(data="synthetic", examples=240))
    (images, labels), seen = data["test"], Counter()
    for image, moved in zip(images, data["translated"][0]):
        framed = F.pad(image, (3,) * 4)
        seen.update(shift for shift in product((-3, 3), repeat=2)
                    if torch.equal(framed.roll(shift, (0, 1))[3:-3, 3:-3], moved))
    assert len(seen) == 4 and seen.total() == 40
    scaled = affine(images.float(), 0, [0, 0], 0.7, [0], InterpolationMode.BILINEAR)
    assert close(data["scaled"][0], scaled, atol=0.02)
    assert all(torch.equal(data[test][1], labels) for test in mnist.TESTS)


def watch_loss(patch, steps):
    kd_loss = common.kd_loss
    def watched(student, teacher, labels, *flags):
        steps[-1].update(soft=teacher.detach(), labels=labels, flags=flags)
        return kd_loss(student, teacher, labels, *flags)
    patch.setattr(common, "kd_loss", watched)


def check_soft_labels(steps, fresh, permuted, temperature, alpha, tolerance):
    soft, labels = (torch.cat([step[key] for step in steps]) for key in ("soft", "labels"))
    own = ((fresh - soft).abs().amax(1) < tolerance).double().mean()
    assert own < 0.2 if permuted else own > 0.999
    for label in labels.unique() if permuted else ():
        distance = torch.cdist(soft[labels == label], fresh[labels == label]).amin(1)
        assert (distance < 10 * tolerance).double().mean() > 0.9
    assert all(step["flags"] == (temperature, alpha) for step in steps)


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    out, runs, steps = tmp_path_factory.mktemp("grid"), {}, []
    patch, to_input = pytest.MonkeyPatch(), mnist.to_input
    watch_loss(patch, steps)
    patch.setattr(mnist, "to_input", lambda x: (steps.append({"images": x}), to_input(x))[1])
    for flags in ("--seed 1", "--student cnn --seed 1", "--student cnn", "", "--kd",
                  "--teacher cnn --kd", "--teacher cnn --kd permuted",
                  "--teacher cnn --kd online --alpha 0.9", "--teacher cnn --kd --temperature 5"):
        steps.clear()
        runs[flags] = *run(mnist, flags, out), [step for step in steps if len(step["images"]) == 48]
    patch.undo()
    return runs


@torch.no_grad()
def test_setups_of_digits(grid):
    data, first = mnist.load_data(arguments(data="synthetic", examples=600)), {}
    for folder, record, steps in grid.values():
        config, outputs = record["config"], np.load(folder / "outputs.npz")
        images, path = [step["images"] for step in steps], outputs["probe_representations"]
        assert len(steps) == 33 and outputs["probe_epochs"].tolist() == [0, 1, 2, 3]
        plain, batches = first.setdefault((config["student"], config["seed"]), (path, images))
        assert np.array_equal(path[0], plain[0]) and all(map(torch.equal, images, batches))
        model = common.load_weights(mnist.MODELS[config["student"]](), folder)
        for test in mnist.TESTS:
            logits = mnist.evaluate(model.train(), data[test][0], False)[0]
            assert close(model.eval()(mnist.to_input(data[test][0][:7])), logits[:7])
            assert close(tensor(outputs[f"{test}_logits"]), logits)
    path, images = first["mlp", 0]
    assert not np.array_equal(path[0], first["mlp", 1][0][0])
    assert not torch.equal(images[0], images[11])


@torch.no_grad()
def test_soft_labels_of_digits(grid):
    folder, plain, _ = grid["--student cnn --seed 1"]
    teacher = common.load_weights(mnist.cnn(), folder).eval()
    for flags in ("", " permuted", " --temperature 5"):
        _, record, steps = grid[f"--teacher cnn --kd{flags}"]
        fresh = torch.cat([teacher(mnist.to_input(step["images"])) for step in steps])
        check_soft_labels(steps, fresh, "permuted" in flags, 5 if "5" in flags else 20, 1, 1e-3)
        assert record["teacher_metrics"] == plain["metrics"]
    steps = grid["--teacher cnn --kd online --alpha 0.9"][2]
    losses = [F.cross_entropy(step["soft"], step["labels"]).item() for step in steps]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5]) and steps[0]["flags"] == (20, 0.9)


def test_grammar():
    parts = sva.synthetic_sentences(600)
    for name, sentence in [(name, sentence) for name, part in parts.items() for sentence in part]:
        words, plural = sentence.text.split(), sentence.plural
        assert words[sentence.verb].endswith("s") is not plural
        begin = sentence.verb - sentence.distance
        nouns = [(i, word.endswith("s")) for i, word in enumerate(words[:sentence.verb])
                 if word.removesuffix("s") in sva.WORDS["N"]]
        others = [number is not plural for i, number in nouns if i > begin]
        assert (begin, plural) in nouns and sentence.attractors == sum(others)
        assert name != "test" or all(others)
    assert Counter(min(one.attractors, 4) for one in parts["test"]) == dict.fromkeys(range(5), 240)
    seen = set(map(sva.before_verb, parts["train"]))
    assert not seen & set(map(sva.before_verb, parts["test"] + parts["validation"]))


HEADER = "x\tsentence\tverb_index\tverb_pos\tn_intervening\tn_diff_intervening\tdistance\n"
ROWS = ["-\tthe key near the cats is here\t6\tVBZ\t1\t1\t\n", "-\tkeys VBP here\t2\tVBP\t0\t0\t1\n",
        "-\tthe key near the cats VBZ here\t6\tVBZ\t2\t1\t4\n", "-\tkeys are it\t2\tVBP\t0\t0\t1\n"]


def test_tables_of_sentences(tmp_path, capfd):
    for name, third in (("train", "near"), ("validation", "near"), ("test", "whale")):
        (tmp_path / f"{name}.tsv").write_text(HEADER + "".join(ROWS).replace("near", third))
    args = arguments(data_dir=tmp_path)
    test = sva.load_data(args)["test"]
    assert (args.data, args.available, len(args.files)) == ("linzen", 4, 3)
    for column, expected in (("attractors", [1, 0, -1, 0]), ("labels", [0, 1, 0, 1]),
                             ("distance", [-1, 1, 4, 1]), ("answer_at", [4, 0, 4, 0])):
        assert test[column].tolist() == expected
    assert test["tokens"][0, 2] == sva.UNKNOWN
    args.objective = "lm"
    lm = sva.load_data(args)["train"]
    assert args.tokens == 4 + 11 and lm["lengths"].tolist() == [9, 5, 9, 5]
    for row, label in enumerate((0, 1, 0, 1)):
        shown = lm["tokens"][row, lm["answer_at"][row] + 1].item()
        assert shown == lm["forms"][row, label] != lm["forms"][row, 1 - label]
    (tmp_path / "test.tsv").write_text(HEADER + "a\tb\n")
    assert refused(capfd, "test.tsv, line 2", sva.load_data, args)
    rows = "".join(ROWS[0].replace("key", f"key{i}") for i in range(200))
    args = arguments(data_dir=tmp_path / "one", examples=10)
    args.data_dir.mkdir()
    (args.data_dir / sva.TABLE).write_bytes(gzip.compress((HEADER + rows).encode()))
    parts = sva.load_sentences(args)
    assert [len(part) for part in parts.values()] == [10, 2, 178] and args.available == 20


@pytest.mark.parametrize("name", sva.MODELS)
@torch.no_grad()
def test_padding_and_causality(name):
    model = sva.build_model(name, 0, 20, "classification", CPU).eval()
    tokens = torch.arange(4, 18).view(2, 7)
    tokens[0, 5:] = sva.PAD
    before, changed = model.states(tokens), tokens.clone()
    assert close(model.states(tokens[:1, :5]), before[:1, :5], atol=1e-5)
    changed[:, 4] = 19
    after = model.states(changed)
    assert (before[:, 4] - after[:, 4]).abs().amax(1).min() > 1e-4
    assert close(before[:, :4], after[:, :4], atol=1e-5) is (name != "transformer")


@torch.no_grad()
def test_answers_and_metrics(monkeypatch):
    vocabulary = {"a": 4, "b": 5, "c": 6, "bs": 7}
    sentences = [sva.Sentence("a c a b c", 3, True, 0, 1), sva.Sentence("c bs a", 1, False, 1, 2),
                 sva.Sentence("a a bs c", 2, False, 4, 3)]
    monkeypatch.setattr(sva, "LOGITS_AT_ONCE", 4 * 20)
    def loop(model, words):
        return torch.stack([model.head(model.states(tensor([words[:place]]))[0, -1])
                            for place in range(1, len(words) + 1)])
    model = sva.build_model("lstm", 0, 20, "classification", CPU).eval()
    split = sva.encode(sentences, vocabulary, "classification")
    logits = [loop(model, words) for words in ([4, 6, 4], [6], [4, 4])]
    last = torch.stack([row[-1] for row in logits])
    cached = sva.answer_every_word(model.train(), split, False, CPU)
    assert all(close(row[:len(expected)], expected) for row, expected in zip(cached, logits))
    for answers, expected, labels in (("every", torch.cat(logits), [1, 1, 1, 0, 0, 0]),
                                      ("last", last, [1, 0, 0])):
        tokens, where, right = sva.questions(split, answers)
        assert close(model.eval().head(sva.read(model, tokens, where)), expected)
        assert right.tolist() == labels
    found, loss = sva.evaluate(model.train(), split, "classification", False, CPU)
    assert close(found, last) and loss == approx(F.cross_entropy(last, split["labels"]).item())
    model, losses = sva.build_model("transformer-seq", 0, 20, "lm", CPU), []
    split = sva.encode(sentences, vocabulary, "lm")
    found, loss = sva.evaluate(model.train(), split, "lm", False, CPU)
    for row, sentence in zip(found, sentences):
        words = [sva.START, *map(vocabulary.get, sentence.text.split()), sva.END]
        scores = loop(model, words).log_softmax(1)
        losses += [-scores[place, word].item() for place, word in enumerate(words[1:])]
        assert close(row, scores[sentence.verb, [7, 5]])
    assert loss == approx(np.mean(losses), rel=1e-5)
    split = {"labels": tensor([0, 0, 1, 0, 1]), "distance": tensor([1, 20, 3, 3, -1]),
             "attractors": tensor([0, 0, 0, 6, -1])}
    singular = tensor([[2.0, 0]] * 5)
    monkeypatch.setattr(sva, "evaluate", lambda *_: (singular, np.log(7)))
    metrics = sva.test_all(None, {"test": split}, "lm", False, CPU)[0]["test"]
    assert metrics["perplexity"] == approx(7)
    assert metrics["a_accuracy"] == approx((2 / 3 + 1) / 2)


@pytest.fixture
def small_models(monkeypatch):
    seq = partial(sva.Transformer, width=16, layers=1)
    monkeypatch.setattr(sva, "MODELS", {"lstm": partial(sva.LSTM, width=16, dropout=0.0),
                        "transformer-seq": seq, "transformer": partial(seq, causal=False)})


def test_setups_of_sentences(tmp_path, monkeypatch, small_models):
    monkeypatch.setattr(sva, "LOGITS_AT_ONCE", 10**9)
    seen, read, first = [], sva.read, {}
    def watched_read(model, tokens, where):
        if model.training:
            seen.append({"tokens": tokens, "where": where})
        return read(model, tokens, where)
    monkeypatch.setattr(sva, "read", watched_read)
    watch_loss(monkeypatch, seen)
    for flags, every in (
            ("", False), ("--answers every", True), ("--teacher lstm --kd", True),
            ("--teacher lstm --kd --answers last", False), ("--teacher lstm --kd permuted", True),
            ("--teacher transformer --kd --temperature 3 --alpha 0.9", False),
            ("--objective lm", True), ("--objective lm --teacher lstm --kd", True)):
        folder, record = run(sva, flags, tmp_path)
        config, lm, steps = record["config"], "lm" in flags, seen[-6:]
        batches = first.setdefault(lm, [step["tokens"] for step in steps])
        for tokens, step in zip(batches, steps, strict=True):
            words = len(step["where"]) if lm else tokens.count_nonzero()
            assert torch.equal(tokens, step["tokens"])
            assert len(step["where"]) == (words if every else 32)
        if "--kd" in flags:
            teacher = sva.build_model(
                config["teacher"], 5, record["sizes"]["tokens"], config["objective"], CPU).eval()
            common.load_weights(teacher, folder.parents[1] / record["teacher"])
            fresh = torch.cat([teacher.head(read(teacher, step["tokens"], step["where"])).detach()
                               for step in steps])
            temperature, alpha = (3, 0.9) if "3" in flags else (1 if lm else 2, 1)
            check_soft_labels(steps, fresh, "permuted" in flags, temperature, alpha, 1e-5)


def test_parts_add_up_and_both_online_learn(tmp_path, monkeypatch, small_models):
    losses, built, build = [], [], sva.build_model
    monkeypatch.setattr(sva, "build_model", lambda *of: (
        built.append((of, build(*of))), built[-1][1])[1])
    for at_once, kd in product((10**9, 50 * 49), ("--kd", "--kd online")):
        monkeypatch.setattr(sva, "LOGITS_AT_ONCE", at_once)
        flags = f"--objective lm --student lstm --epochs 20 --lr 0.03 {kd}"
        _, record = run(sva, flags, tmp_path / str(at_once))
        losses.append([entry["loss"] for entry in record["history"]])
        assert record["teacher_metrics"]["test"]["perplexity"] < 32
    assert np.allclose(losses[:2], losses[2:], atol=1e-3)
    for of, model in built[-2:]:
        assert not torch.equal(model.embedding.weight, build(*of).embedding.weight)


def made_up_runs():
    runs, kinds = [], "cnn mlp cnn-to-mlp mlp-to-mlp mlp-to-cnn cnn-to-mlp-permuted mlp-lr1"
    for kind, seed in product(kinds.split(), range(5)):
        *teacher, student = re.sub("-permuted|-lr1", "", kind).split("-to-")
        kd = "permuted" if "permuted" in kind else "offline" if teacher else None
        end = f"/seed{seed}"
        record = {"plain": {model: model + end for model in ("mlp", "cnn")}}
        if teacher:
            record |= {"untaught": student + end, "teacher": f"{teacher[0]}/seed{seed + 1}",
                       "self_taught": f"{student}-to-{student}{end}",
                       "permuted": f"{teacher[0]}-to-{student}-permuted{end}"}
        runs.append(analyze.Run.__new__(analyze.Run))
        vars(runs[-1]).update(kind=kind, seed=seed, key=kind + end, student=student, record=record,
                              config={"kd": kd, "teacher": "".join(teacher)})
    return runs


HIGHER = """OOD: accuracy, cnn, mlp | OOD: accuracy, cnn-to-mlp, mlp
OOD: accuracy, cnn-to-mlp, mlp-to-mlp | OOD: accuracy, cnn-to-mlp, cnn-to-mlp-permuted
OOD: ece, mlp, cnn-to-mlp | other strong: kappa, cnn-to-mlp, mlp
other strong: CKA, cnn-to-mlp, mlp | other strong: RSA, cnn-to-mlp, mlp
other strong: path distance, mlp, cnn-to-mlp | solutions: barrier, cnn-to-mlp, mlp-to-mlp
own kind: CKA, mlp-to-mlp, mlp | solutions: prediction spread, mlp, cnn
solutions: representation spread, mlp, cnn""".replace("\n", " | ").split(" | ")


def test_claims_and_verdicts(capsys):
    runs = made_up_runs()
    for (name, *_), line in zip(analyze.CLAIMS, HIGHER, strict=True):
        column, high, low = line.split(", ")
        cases = [(1, "supported"), (-1, "contradicted")]
        if column == "own kind: CKA":
            cases = [(0.01, "supported"), (0.2, "contradicted"), (-0.2, "contradicted")]
        for change, verdict in cases:
            rows = {one.key: {column: 50.0 + one.seed + change * (one.kind == high)
                              + 1e-4 * one.seed**2 * (one.kind == low)} for one in runs}
            found, = [claim for claim in analyze.test_claims(runs, rows) if claim["claim"] == name]
            assert found["verdict"] == verdict and {found["one"], found["against"]} == {high, low}
            assert sorted(found["values"]) == [0, 1, 2, 3, 4]
    for doubt in (0, 9):
        rows = {one.key: {"OOD: accuracy": {"cnn": 0.4 + doubt * (-1)**one.seed,
            "cnn-to-mlp": 0.3}.get(one.kind, 0)} for one in runs}
        analyze.print_answer(analyze.test_claims(runs, rows))
        assert re.findall(r"(\S+) of the gap", capsys.readouterr()[0]) == ["0.75"] * (not doubt)
    random, verdicts = np.random.default_rng(0), Counter()
    for _ in range(200):  # kinds that are one
        rows = {one.key: {column: random.normal() for _, column, *_ in analyze.CLAIMS}
                for one in runs}
        verdicts.update(claim["verdict"] for claim in analyze.test_claims(runs, rows))
    assert 0.03 < 1 - verdicts["inconclusive"] / verdicts.total() < 0.07
    weak, strong = normal(2, 1000, 4, 30)
    spread = torch.cdist(weak, weak).square() - torch.cdist(strong, strong).square()
    found = [analyze.t_test(analyze.jackknife(pairs).tolist(), 1)[2] for pairs in spread]
    assert 30 < 1000 - found.count("inconclusive") < 70
    mean, half, _ = analyze.t_test([1, 2, 3, 4], 1)
    assert (mean, half) == approx((2.5, 3.182 * 0.645497), abs=1e-3)


def test_references_and_barrier():
    runs = made_up_runs()
    runs[10].record["teacher"] = "cnn/seed3"
    for one in runs:
        found = {whose: [other.key for other in others]
                 for whose, others in analyze.references(one, runs).items()}
        teacher = one.record.get("teacher")
        for whose, model in (("own kind", one.student), ("other strong", "cnn")):
            keys = [f"{model}/seed{s}" for s in range(5) if s not in (one.seed, one.seed + 1)]
            assert found[whose] == [key for key in keys if key != teacher]
        assert found["own teacher"] == [other.key for other in runs if other.key == teacher]
    model, heights, way = nn.BatchNorm1d(1), iter([1.0, *[2.0] * 19, 1.5]), []
    ends = [model.state_dict() | {"weight": tensor([end])} for end in (3.0, 5.0)]
    found = analyze.barrier(model, *ends, lambda model: way.append(
        model.weight.item()) or next(heights))
    assert found == approx(0.975) and way == approx(np.linspace(3, 5, 21))


def test_analysis(grid, tmp_path, capsys, monkeypatch):
    root = shutil.copytree(grid[""][0].parents[1], tmp_path / "a/mnist-synthetic")
    self_taught, plain, cnn = (grid[f][0].parts[-2] for f in ("--kd", "", "--student cnn"))
    mnist.main([*SMALL.split(), "--kd", "--out", str(root.parent)])
    assert json.loads((root / self_taught / "seed0/run.json").read_text()) == grid["--kd"][1]
    shutil.copy(root / plain / "seed1/outputs.npz", root / self_taught / "seed0")
    shutil.copytree(root / plain, tmp_path / "b/mnist-synthetic" / plain)
    (root / cnn / "seed0/outputs.npz").write_bytes(b"PK")
    ends, load_weights = [], common.load_weights
    monkeypatch.setattr(common, "load_weights", lambda model, folder: (
        ends.append(folder.parts[-2:]), load_weights(model, folder))[1])
    analyze.main([str(tmp_path), "--csv", str(tmp_path / "all.csv")])
    out, err = capsys.readouterr()
    table = csv.DictReader((tmp_path / "all.csv").read_text().splitlines())
    rows = {(row["group"], row["run"], row["seed"]): row for row in table}
    assert len(rows) == 8 + 2 and cnn in err and "unreadable" in err
    found = rows["a/mnist-synthetic", self_taught, "0"]
    for name, value in zip(analyze.COMPARISONS, (1, 1, 0, 1, 1, 0)):
        assert float(found[f"own teacher: {name}"]) == approx(value, abs=1e-4)
    row, metrics = rows["b/mnist-synthetic", plain, "0"], grid[""][1]["metrics"]
    mean = (metrics["scaled"]["accuracy"] + metrics["translated"]["accuracy"]) / 2
    assert float(row["OOD: accuracy"]) == approx(mean) and row["role"] == "plain"
    sweep = re.search(r"OOD accuracy over temperature.*\n\n(.*)\n.*\n(.*)\n", out)
    assert re.findall(r"\d+\.\d", sweep[1]) == ["5.0", "20.0"] and "cnn-to-mlp" in sweep[2]
    assert set(zip(ends[::2], ends[1::2])) >= {
        ((plain, "seed0"), (self_taught, "seed0")), ((plain, "seed1"), (plain, "seed0"))}


def start(folder, *command, **variables):
    return Popen(command, cwd=folder, env=os.environ | variables, text=True, stdout=PIPE,
                 stderr=PIPE, start_new_session=True)


def test_titles_and_a_killed_run(tmp_path):
    for module in mnist, sva, common:
        shutil.copy(module.__file__, tmp_path)
    *titles, endless = [start(tmp_path, sys.executable, "-u", *command.split()) for command in (
        f"train_mnist.py --teacher cnn --student mlp --kd --teacher-seed 2 {SMALL}",
        f"train_sva.py --teacher lstm --student transformer-seq --kd --teacher-seed 2 {SVA_SMALL}",
        f"train_mnist.py {SMALL} --epochs 50000")]
    for process in titles:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0 and err == "" and "s left" in out
        assert "untaught twin   not there yet: the same command without --kd" in out
    while not endless.stdout.readline().startswith("epoch"):
        assert endless.poll() is None
    endless.kill()
    endless.communicate()
    runs = [path.parts[-3] for path in tmp_path.rglob("run.json")]
    assert len(runs) == 4 and "50000" not in str(runs) and len([*tmp_path.rglob("seed2")]) == 2


STUB = """#!/bin/sh
echo "$OMP_NUM_THREADS $*" >> "$LOG"
case "$*" in *analyze.py*) echo tables ;; *"--teacher cnn"*) sleep 0.01; exit "$FAIL" ;; esac
"""


def test_run_all(tmp_path):
    stub, log, out = tmp_path / "my python", tmp_path / "log", tmp_path / "a b"
    stub.write_text(STUB)
    stub.chmod(0o755)
    out.mkdir()
    variables = dict(PYTHON=stub, LOG=log, OUT=out, SEEDS="2", FAIL="0", OMP_NUM_THREADS="")
    def grid(*flags, **changes):
        process = start(HERE, "./run_all.sh", *flags, **variables | changes)
        return *process.communicate(timeout=300), process.returncode
    listed = grid("--list", "--quick")[0].splitlines()
    assert set(listed) < set(grid("--list", "--quick", SEEDS="5")[0].splitlines())
    killed = start(HERE, "./run_all.sh", "--quick", **variables)
    while not log.exists() or log.read_text().count("--student") < 9:
        assert killed.poll() is None
    os.killpg(killed.pid, signal.SIGKILL)
    log.unlink()
    printed, err, code = grid("--quick", FLAGS="--epochs 1")
    *lines, last = log.read_text().splitlines()
    assert code == 0 and printed.endswith("tables\n") and err == "" and "analyze.py" in last
    assert all(f"--out {out}" in line and line.endswith("--epochs 1") for line in lines)
    ran = [re.sub(r"^1 | --out.*", "", line) for line in lines]
    assert set(ran) == set(listed) and len(listed) == len(set(listed)) > 20
    assert sorted(ran, key=lambda line: "--kd" in line) == ran
    printed, err, code = grid("--quick", FAIL="2")
    assert code == 1 and "some runs FAILED" in err and printed.endswith("tables\n")
    assert "--teacher cnn --student mlp --seed 1 --kd" in err


def test_readme(tmp_path, monkeypatch):
    text = (HERE / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"python (train_\w+)\.py([^#;\n]*)", text)
    for script, flags in commands:
        sys.modules[script].parse_arguments(flags.replace("$T", "5").split())
    example, = re.findall(r"## Copying out.*?```python\n(.*?)```", text, re.DOTALL)
    teacher, student, x = nn.Linear(5, 3), nn.Linear(5, 3), normal(64, 5).float()
    loader = torch.utils.data.DataLoader(list(zip(x, x.argmax(1) % 3)), batch_size=16)
    before = F.mse_loss(student(x).softmax(1), teacher(x).softmax(1))
    exec(example, {"teacher": teacher, "student": student, "loader": loader})
    assert F.mse_loss(student(x).softmax(1), teacher(x).softmax(1)) < before and len(commands) > 6
    assert 10 <= len(example.splitlines()) <= 15
