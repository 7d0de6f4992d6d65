"""Train an MLP or a CNN on MNIST, alone or on a teacher's soft labels.

    python train_mnist.py --student mlp                       # no distillation
    python train_mnist.py --student mlp --kd                  # self-distillation: an MLP teaches
    python train_mnist.py --teacher cnn --student mlp --kd    # distillation: a CNN teaches

Training never moves or scales a digit, so the scaled and translated test sets ask for the
inductive bias, not for the fit: does the CNN's come over to the MLP? Every run leaves run.json,
outputs.npz and model.pt in runs/mnist/<run name>/seed<k>/ (runs/mnist-synthetic for digits drawn
here). After Abnar, Dehghani & Zuidema 2020 (arXiv 2006.00555).
"""

import argparse
import math
import socket
import sys
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common

# One recipe for all setups of a model. Chosen on the validation digits, also scaled and translated,
# three seeds. Epochs for all digits: n times fewer get sqrt(n) times as many.
RECIPES = {"mlp": {"epochs": 24, "batch_size": 512, "lr": 0.4},
           "cnn": {"epochs": 6, "batch_size": 256, "lr": 0.1}}
TEMPERATURE, EXAMPLES = 20.0, 60_000
TESTS = ("test", "scaled", "translated")


# ---- Models: (n, 1, 28, 28) -> (n, 10) -----------------------------------------------------------


def network(*layers):
    """`body`, all layers but the last, gives the penultimate representation; `head` is the last."""
    return nn.Sequential(OrderedDict(body=nn.Sequential(*layers[:-1]), head=layers[-1]))


def mlp():
    return network(
        nn.Flatten(), nn.Linear(784, 512), nn.BatchNorm1d(512), nn.ReLU(),
        nn.Linear(512, 128), nn.BatchNorm1d(128), nn.ReLU(),
        nn.Linear(128, 32), nn.BatchNorm1d(32), nn.ReLU(),
        nn.Linear(32, 10))


def cnn():
    """A maximum over all positions forgets where a digit stands and how large it is. Padding lets
    every position see the same filters; windows that overlap hide the sampling grid."""
    return network(
        nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.AvgPool2d(4, 2, 1), nn.BatchNorm2d(16),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AvgPool2d(4, 2, 1), nn.BatchNorm2d(32),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),  # (n, 64, 7, 7)
        nn.AdaptiveMaxPool2d(1), nn.Flatten(),                           # (n, 64)
        nn.Linear(64, 10))


MODELS = {"mlp": mlp, "cnn": cnn}


def build_model(name, seed, device):
    """A new model; its initial weights depend on (name, seed) alone."""
    torch.manual_seed(seed)
    return MODELS[name]().to(device, memory_format=torch.channels_last)  # 1.5 times as fast on CPUs


def to_input(images):
    """Grey levels 0..255, (n, 28, 28) -> model input (n, 1, 28, 28), normalised as usual."""
    # In place on a copy: half the time of two new tensors.
    return images.to(torch.float32, copy=True).sub_(0.1307 * 255).div_(0.3081 * 255).unsqueeze(1)


# ---- Data: images are grey levels 0..255, (n, 28, 28); labels are (n,) int64 ---------------------


def warp(images, theta):
    """Images -> (n, 28, 28) float32, bilinear where the affine maps theta (n, 2, 3) lead."""
    grid = F.affine_grid(theta, (len(images), 1, 28, 28), align_corners=False)
    return F.grid_sample(images.float().unsqueeze(1), grid, align_corners=False).squeeze(1)


def synthetic_digits(n, seed):
    """Images (n, 28, 28) uint8 and labels (n,), the same for one seed: glyphs of Pillow's font,
    each with its own size, slant, rotation, place and thickness."""
    from PIL import Image, ImageDraw, ImageFilter, ImageFont  # comes with torchvision

    glyphs, font = [], ImageFont.load_default(size=62)
    for digit in "0123456789":
        image = Image.new("L", (64, 64))
        ImageDraw.Draw(image).text((32, 32), digit, fill=255, font=font, anchor="mm")
        glyphs.append(np.array(image.filter(ImageFilter.GaussianBlur(2.5))))
    glyphs = torch.from_numpy(np.stack(glyphs)) / 255
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return 2 * torch.rand(*shape, generator=generator) - 1

    # Where a pixel looks in its glyph: an affine map, each entry with its own range.
    centre = torch.tensor([[1.35, -0.2, 0], [0, 1.03, 0]])
    spread = torch.tensor([[0.35, 0.6, 2 / 14], [0.35, 0.23, 2 / 14]])  # 1 / 14: a pixel
    labels, images = torch.randint(0, 10, (n,), generator=generator), []
    for part in labels.split(2000):  # keeps the intermediate tensors small
        m = len(part)
        blurred = warp(glyphs[part], centre + spread * noise(m, 2, 3))
        # The lower the threshold on the blurred glyph, the thicker the stroke. It varies with the
        # pressure of the pen, down to gaps: so that neither model is perfect.
        pressure = F.interpolate(noise(m, 1, 5, 5), size=(28, 28), mode="bicubic").squeeze(1)
        threshold = 0.4 + 0.2 * noise(m, 1, 1) + 0.4 * pressure
        strokes = ((blurred - threshold) * 5 + 0.5).clamp(0, 1) * (blurred > 0.02)
        images.append((strokes * 255).byte())
    return torch.cat(images), labels


def load_data(args):
    """{"train", "validation", "test", "scaled", "translated": (images, labels)}; sets args.data.

    The last twelfth of the training digits is for validation; each test has a sixth as many. Scaled
    to 0.7, or translated by 3 pixels in both axes, each sign drawn at random: as MNIST-C's "scale"
    and "translate" at severity 3 (Mu & Gilmer 2019, arXiv 1906.02337).
    """
    examples = args.examples or EXAMPLES
    train, n = examples - examples // 12, examples // 6
    if args.data != "synthetic":
        from torchvision.datasets import MNIST  # takes a second to import

        socket.setdefaulttimeout(10)  # seconds without an answer
        try:
            mnist = MNIST(args.data_dir, train=True, download=True), MNIST(args.data_dir, False)
            images, labels, test, test_labels = [x for m in mnist for x in (m.data, m.targets)]
            args.data = "mnist"
        except Exception as error:  # torchvision reports damage in many ways
            if args.data == "mnist" or list(Path(args.data_dir).glob("MNIST/raw/*-ubyte")):
                sys.exit(f"error: no MNIST in {args.data_dir}/MNIST/raw: {error}")
            args.data = "synthetic"
            print("*** WARNING: MNIST can't be fetched. These are SYNTHETIC digits, drawn here:\n"
                  "*** no figure of this run is about MNIST.", file=sys.stderr)
    if args.data == "synthetic":
        images, labels = synthetic_digits(examples, seed=0)
        test, test_labels = synthetic_digits(n, seed=1)
    test, test_labels = test[:n], test_labels[:n]
    scaled = warp(test, (torch.eye(2, 3) / 0.7).expand(n, 2, 3))
    corners = F.pad(test, (3, 3, 3, 3)).unfold(1, 28, 6).unfold(2, 28, 6)  # (n, 2, 2, 28, 28)
    row, column = torch.randint(0, 2, (n, 2), generator=torch.Generator().manual_seed(0)).T
    data = {"train": (images[:train], labels[:train]),
            "validation": (images[train:examples], labels[train:examples]),
            "test": (test, test_labels), "scaled": (scaled, test_labels),
            "translated": (corners[torch.arange(n), 1 - row, 1 - column], test_labels)}
    return {name: (x.to(args.device), y.to(args.device)) for name, (x, y) in data.items()}


# ---- Training ------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, images, amp):
    """Logits (n, 10) and representations (n, width) in eval mode, float32, on the CPU."""
    model.eval()
    logits, representations = [], []
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        for part in images.split(1000):
            representations.append(model.body(to_input(part)))
            logits.append(model.head(representations[-1]))
    return torch.cat(logits).float().cpu(), torch.cat(representations).float().cpu()


def test_all(model, data, amp):
    """({test set: metrics}, {"<test set>_logits", "<test set>_labels": tensor})."""
    metrics, outputs = {}, {}
    for name in TESTS:
        logits, labels = evaluate(model, data[name][0], amp)[0], data[name][1].cpu()
        metrics[name] = common.classification_metrics(logits, labels)
        outputs |= {f"{name}_logits": logits, f"{name}_labels": labels}
    return metrics, outputs


def configure(args, **changes):
    """(folder, configuration) of the run that `args` describe, with some changes. Results depend on
    the configuration alone; device and precision are no part of it."""
    args = argparse.Namespace(**vars(args) | changes)
    config = {"task": "mnist", "data": args.data, "examples": EXAMPLES, "student": args.student,
              "seed": args.seed, "kd": args.kd}
    models = {"": args.student}
    if args.kd:
        models["teacher_"] = args.teacher
        config |= {"teacher": args.teacher, "teacher_seed": args.seed + 1,
                   "temperature": TEMPERATURE, "alpha": 1.0}
    fewer = EXAMPLES / (args.examples or EXAMPLES)
    for role, model in models.items():
        config |= {role + key: value for key, value in RECIPES[model].items()}
        config[f"{role}epochs"] = int(RECIPES[model]["epochs"] * fewer**0.5)
    if args.kd == "online":  # the teacher learns in the student's batches
        del config["teacher_epochs"], config["teacher_batch_size"]
    name, config = common.apply_flags(args, config)
    task = "mnist" if args.data == "mnist" else "mnist-synthetic"
    return args.out / task / name / f"seed{args.seed}", config


def relatives(args):
    """The runs to compare with, as "<run name>/seed<k>"; plain: one of each kind of model."""
    def path(**changes):
        return "/".join(configure(args, **changes)[0].parts[-2:])

    found = {"plain": {model: path(student=model, kd=None) for model in MODELS}}
    if args.kd:
        found |= {"untaught": path(kd=None), "self_taught": path(teacher=args.student),
                  "permuted": path(kd="permuted")}
    if args.kd in ("offline", "permuted"):
        found["teacher"] = path(student=args.teacher, seed=args.teacher_seed, kd=None)
    return found


def train(args, data):
    """Train, test and save the run that `args` describe, unless that is done; returns its record.
    An offline teacher is such a run too: it is loaded, or trained first."""
    (folder, config), device, kd = configure(args), args.device, args.kd
    record = common.find_run(folder, config)
    if record:
        print(f"{folder} is finished: delete it to repeat it")
        return record
    images, labels = data["train"]
    if kd:
        teacher = build_model(args.teacher, args.teacher_seed, device)
    if kd in ("offline", "permuted"):
        plain = {"student": args.teacher, "seed": args.teacher_seed, "kd": None}
        teacher_metrics = train(argparse.Namespace(**vars(args) | plain), data)["metrics"]
        common.load_weights(teacher, configure(args, **plain)[0])
        # Neither the teacher nor the digits change: it is asked once for each digit.
        teacher_logits = evaluate(teacher, images, args.amp)[0].to(device)
    if kd == "permuted":
        torch.manual_seed(args.seed)
        for label in range(10):
            own = (labels == label).nonzero().squeeze(1)
            teacher_logits[own] = teacher_logits[own[torch.randperm(len(own), device=device)]]

    student = build_model(args.student, args.seed, device)
    groups = [{"params": student.parameters(), "lr": config["lr"]}]
    if kd == "online":
        groups.append({"params": teacher.parameters(), "lr": config["teacher_lr"]})
    epochs, batch_size = config["epochs"], min(config["batch_size"], len(labels))
    steps = len(labels) // batch_size  # the incomplete last batch is left out
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=[group["lr"] for group in groups], pct_start=0.25,
        total_steps=max(epochs * steps, 5))  # it divides by zero below 5
    sizes = {name: len(y) for name, (_, y) in data.items()}
    sizes["parameters"] = sum(parameter.numel() for parameter in student.parameters())
    print(f"\n{folder}, on {device}: {sizes['train']:,} digits, {sizes['parameters']:,} "
          f"parameters, {epochs} epochs of {steps} batches")
    history, begin, probe = [], time.perf_counter(), data["test"][0][:1000]
    snapshots = {0: evaluate(student, probe, args.amp)[1]}
    # The order of the batches depends on the seed alone: twins see the same batches.
    order = torch.Generator().manual_seed(args.seed)
    for epoch in range(1, epochs + 1):
        start, total_loss = time.perf_counter(), 0.0
        student.train()
        shuffled = torch.randperm(len(labels), generator=order).to(device)
        for step, batch in enumerate(shuffled.split(batch_size)[:steps], 1):
            # index_select copies a batch in a seventh of the time of images[batch] on the CPU.
            x, y = to_input(images.index_select(0, batch)), labels.index_select(0, batch)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.amp):
                logits = student(x).float()
                if kd == "online":
                    soft = teacher(x).float()
            if kd in ("offline", "permuted"):
                soft = teacher_logits.index_select(0, batch)

            loss = F.cross_entropy(logits, y) if not kd else common.kd_loss(
                logits, soft, y, config["temperature"], config["alpha"])
            if kd == "online":  # reaches the teacher alone, as the KD loss the student alone
                loss = loss + F.cross_entropy(soft, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.detach()  # no .item(): a GPU would wait for it in every step
            if step % 20 == 0 and sys.stdout.isatty():
                print(f"epoch {epoch}/{epochs}  batch {step}/{steps}", end="\r", flush=True)

        mean_loss, seconds = float(total_loss) / steps, time.perf_counter() - start
        if not math.isfinite(mean_loss):
            sys.exit(f"error: the loss is {mean_loss} in epoch {epoch}: try a lower --lr")
        x, y = data["validation"]
        right = evaluate(student, x, args.amp)[0].argmax(dim=1) == y.cpu()
        history.append({"epoch": epoch, "loss": mean_loss, "seconds": seconds,
                        "validation_accuracy": right.float().mean().item()})
        if epoch & (epoch - 1) == 0 or epoch == epochs:  # 1, 2, 4, 8 ... and the last
            snapshots[epoch] = evaluate(student, probe, args.amp)[1]
        left = (time.perf_counter() - begin) / epoch * (epochs - epoch)
        print(f"epoch {epoch}/{epochs}  loss {mean_loss:.4f}  validation accuracy "
              f"{history[-1]['validation_accuracy']:.4f}  {left:.0f} s left", flush=True)

    metrics, outputs = test_all(student, data, args.amp)
    outputs["probe_epochs"] = list(snapshots)
    outputs["probe_representations"] = torch.stack(list(snapshots.values()))
    record = {"config": config, **relatives(args), "sizes": sizes, "history": history,
              "environment": common.environment(args, __file__), "metrics": metrics}
    if kd == "online":
        teacher_metrics, _ = test_all(teacher, data, args.amp)
    if kd:
        record["teacher_metrics"] = teacher_metrics
    common.save_run(folder, record, outputs, student)
    return record


def print_results(args, record):
    """Accuracy and ECE of the student and, after distillation, of its teacher and untaught twin."""
    rows = {"student": record["metrics"]}
    if args.kd:
        twin = common.find_run(*configure(args, kd=None)) or {"metrics": None}
        rows = {"teacher": record["teacher_metrics"], "untaught twin": twin["metrics"], **rows}
    print("\naccuracy / ECE  " + "".join(f"{test:<17}" for test in TESTS))
    for role, tests in rows.items():
        cells = ["not there yet: the same command without --kd and its flags"] if not tests else [
            f"{tests[test]['accuracy']:.4f} / {tests[test]['ece']:.4f}" for test in TESTS]
        print(f"{role:<16}" + "".join(f"{cell:<17}" for cell in cells))


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [flags], see --help",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--student", choices=MODELS, default="mlp", help="model to train")
    add("--teacher", choices=MODELS, help="model to learn from (default: the student's kind)")
    add("--kd", nargs="?", const="offline", choices=["offline", "online", "permuted"],
        help="distil from a trained teacher (plain --kd); online: train both together; permuted: "
             "permute the soft labels among the digits of one label")
    add("--temperature", type=float, help=f"softens both outputs (default: {TEMPERATURE:g})")
    add("--alpha", type=float, help="share of the KD loss, the rest: cross-entropy (default: 1)")
    for flag, kind in (("--epochs", int), ("--batch-size", int), ("--lr", float)):
        add(flag, type=kind, help="for student and teacher (default: each model's recipe)")
    add("--seed", type=int, default=0, help="initialisation and order of the batches")
    add("--teacher-seed", type=int, help="(default: seed + 1)")
    add("--data", choices=["auto", "mnist", "synthetic"], default="auto",
        help="auto: MNIST if it can be had, else digits drawn here")
    add("--examples", type=int, help="training digits, a sixth in each test (default: 60,000)")
    add("--data-dir", type=Path, default="data", help="where MNIST is or is downloaded to")
    add("--out", type=Path, default="runs", help="folder for runs")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16, on CPUs",
        default=torch.cpu._is_avx512_bf16_supported())
    args = parser.parse_args(argv)

    for flag in ("teacher", "teacher_seed", "temperature", "alpha"):
        if getattr(args, flag) is not None and not args.kd:
            parser.error(f"--{flag.replace('_', '-')} has no effect without --kd")
    for flag, least in (("epochs", 1), ("batch_size", 2), ("examples", 60), ("temperature", 1e-3)):
        if getattr(args, flag) is not None and not least <= getattr(args, flag) <= EXAMPLES:
            parser.error(f"--{flag.replace('_', '-')} must be in {least} .. {EXAMPLES}")
    args.teacher = args.teacher or args.student
    args.teacher_seed = args.seed + 1 if args.teacher_seed is None else args.teacher_seed
    if args.teacher_seed == args.seed:
        parser.error("--teacher-seed must not be the student's own")
    try:
        torch.empty(1, device=args.device)
        args.out.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, AssertionError, OSError) as error:
        parser.error(str(error).splitlines()[0])
    args.amp = args.amp and args.device.type == "cpu"  # GPUs have TF32
    return args


def main(argv=None):
    args = parse_arguments(argv)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs
    print_results(args, train(args, load_data(args)))


if __name__ == "__main__":
    main()
