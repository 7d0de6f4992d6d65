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
import shutil
import socket
import sys
import time
import uuid
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import update_bn

import common

# One recipe for all setups of a model. Chosen on the validation digits, also scaled and translated,
# three seeds. Epochs for all digits: n times fewer get sqrt(n) times as many.
RECIPES = {
    "mlp": {"epochs": 20, "batch_size": 512, "lr": 0.4, "weight_decay": 2e-3},
    "cnn": {"epochs": 3, "batch_size": 256, "lr": 0.1, "weight_decay": 5e-4},
}
RECIPES["cnn-shuffled"] = RECIPES["cnn"]
TEMPERATURE = 20.0
EXAMPLES = 60_000  # training digits, with those for validation
TESTS = ("test", "scaled", "translated")
PARTS = ("hard", "confidence", "ratios")  # of what a teacher says, for --kd
MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


# ---- Models: (n, 1, 28, 28) -> (n, 10) -----------------------------------------------------------


def network(*layers):
    """`body`, all layers but the last, gives the penultimate representation; `head` is the last."""
    return nn.Sequential(OrderedDict(body=nn.Sequential(*layers[:-1]), head=layers[-1]))


def mlp():
    return network(
        nn.Flatten(),

        nn.Linear(784, 512),
        nn.BatchNorm1d(512),
        nn.ReLU(),

        nn.Linear(512, 128),
        nn.BatchNorm1d(128),
        nn.ReLU(),

        nn.Linear(128, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),

        nn.Linear(32, 10),
    )


def cnn():
    """A maximum over all positions forgets where a digit stands and how large it is. Padding lets
    every position see the same filters. Windows that are wider than their stride overlap, which
    hides the sampling grid from a digit that moves by one pixel."""
    return network(
        nn.Conv2d(1, 16, kernel_size=6, stride=2, padding=2),  # (n, 16, 14, 14)
        nn.BatchNorm2d(16),
        nn.ReLU(),

        nn.Conv2d(16, 24, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(kernel_size=4, stride=2, padding=1),  # (n, 24, 7, 7)
        nn.BatchNorm2d(24),

        nn.Conv2d(24, 64, kernel_size=3, padding=1),
        nn.BatchNorm2d(64),  # before ReLU: a maximum of normalised values keeps their scale
        nn.ReLU(),

        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),  # (n, 64)
        nn.Linear(64, 10),
    )


class Shuffle(nn.Module):
    """Puts the pixels of all digits in one random order: now neighbours mean nothing."""

    def __init__(self):
        super().__init__()
        order = torch.randperm(28 * 28, generator=torch.Generator().manual_seed(0))
        self.register_buffer("order", order)

    def forward(self, x):
        return x.flatten(1)[:, self.order].view(-1, 1, 28, 28)


def cnn_shuffled():
    """Control: the CNN without its locality. Its weights, its recipe, its size stay."""
    model = cnn()
    return network(Shuffle(), *model.body, model.head)


MODELS = {"mlp": mlp, "cnn": cnn, "cnn-shuffled": cnn_shuffled}


def build_model(name, seed, args):
    """A new model on args.device; its initial weights depend on (name, seed) alone."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    return model.to(args.device, memory_format=torch.channels_last)  # 1.5 times as fast on CPUs


def to_input(images):
    """Grey levels 0..255, (n, 28, 28) -> model input (n, 1, 28, 28), normalised as usual."""
    x = images.to(torch.float32, copy=True)
    x.sub_(0.1307 * 255).div_(0.3081 * 255)  # in place: half the time of two new tensors
    return x.unsqueeze(1)


# ---- Data: images are grey levels 0..255, (n, 28, 28); labels are (n,) int64 ---------------------


def load_data(args):
    """{"train", "validation", "test", "scaled", "translated": (images, labels)}; sets args.data.

    The last twelfth of the training digits is for validation; each test has a sixth as many. Scaled
    to 0.7, or translated by 3 pixels in both axes, each sign drawn at random: as MNIST-C's "scale"
    and "translate" at severity 3 (Mu & Gilmer 2019, arXiv 1906.02337).
    """
    examples = args.examples or EXAMPLES
    n_train = examples - examples // 12
    n_test = examples // 6

    if args.data != "synthetic":
        try:
            images, labels, test, test_labels = mnist_digits(args.data_dir)
            args.data = "mnist"
        except Exception as error:  # torchvision reports damage in many ways
            if args.data == "mnist" or list(args.data_dir.glob("MNIST/raw/*-ubyte")):
                sys.exit(f"error: no MNIST in {args.data_dir}/MNIST/raw: {error}")
            args.data = "synthetic"
            print("*** WARNING: MNIST can't be fetched. These are SYNTHETIC digits, drawn here:\n"
                  "*** no figure of this run is about MNIST.", file=sys.stderr)
    if args.data == "synthetic":
        images, labels = synthetic_digits(examples, seed=0)
        test, test_labels = synthetic_digits(n_test, seed=1)

    test = test[:n_test]
    test_labels = test_labels[:n_test]
    data = {
        "train": (images[:n_train], labels[:n_train]),
        "validation": (images[n_train:examples], labels[n_train:examples]),
        "test": (test, test_labels),
        "scaled": (scale(test), test_labels),
        "translated": (translate(test), test_labels),
    }
    return {name: (x.to(args.device), y.to(args.device)) for name, (x, y) in data.items()}


def mnist_digits(data_dir):
    """Training images and labels, test images and labels. What is missing is fetched beside its
    place, then renamed: of many runs that start at once, none meets half of a file."""
    from torchvision.datasets import MNIST  # takes a second to import

    raw = data_dir / "MNIST/raw"
    if not all((raw / name).exists() for name in MNIST_FILES):
        temporary = data_dir / f".mnist-{uuid.uuid4().hex}"
        socket.setdefaulttimeout(10)  # seconds without an answer
        try:
            if raw.exists():  # archives that are there need no network
                shutil.copytree(raw, temporary / "MNIST/raw")
            MNIST(temporary, download=True)
            raw.mkdir(parents=True, exist_ok=True)
            for name in MNIST_FILES:
                (temporary / "MNIST/raw" / name).replace(raw / name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    train_set = MNIST(data_dir, train=True)
    test_set = MNIST(data_dir, train=False)
    return train_set.data, train_set.targets, test_set.data, test_set.targets


def warp(images, theta):
    """Images -> (n, 28, 28) float32, bilinear where the affine maps theta (n, 2, 3) lead."""
    grid = F.affine_grid(theta, (len(images), 1, 28, 28), align_corners=False)
    return F.grid_sample(images.float().unsqueeze(1), grid, align_corners=False).squeeze(1)


def scale(images):
    """Shrunk to 0.7 about the centre: a pixel looks 1 / 0.7 times as far from it."""
    return warp(images, (torch.eye(2, 3) / 0.7).expand(len(images), 2, 3))


def translate(images):
    """Moved by 3 pixels in both axes, each sign drawn at random, the same for one number of images:
    a window of 28 x 28 is cut out at one of the corners of the padded digit."""
    signs = torch.randint(0, 2, (len(images), 2), generator=torch.Generator().manual_seed(0))
    corners = (6 * (1 - signs)).tolist()  # where the window begins: 0 moves a digit down or right
    padded = F.pad(images, (3, 3, 3, 3))  # (n, 34, 34)
    return torch.stack([digit[y:y + 28, x:x + 28] for digit, (y, x) in zip(padded, corners)])


def synthetic_digits(n, seed):
    """Images (n, 28, 28) uint8 and labels (n,), the same for one seed: glyphs of Pillow's font,
    each with its own size, slant, rotation, place and thickness."""
    from PIL import Image, ImageDraw, ImageFilter, ImageFont  # comes with torchvision

    font = ImageFont.load_default(size=62)
    glyphs = []
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
    labels = torch.randint(0, 10, (n,), generator=generator)
    images = []
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


# ---- Evaluation ----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, images, amp):
    """Logits (n, 10) and representations (n, width) in eval mode, float32, on the CPU."""
    model.eval()
    logits = []
    representations = []
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        for part in images.split(1000):
            representation = model.body(to_input(part))
            representations.append(representation)
            logits.append(model.head(representation))
    return torch.cat(logits).float().cpu(), torch.cat(representations).float().cpu()


def test_all(model, data, amp):
    """({test set: metrics}, {"<test set>_logits", "<test set>_labels": tensor})."""
    metrics = {}
    outputs = {}
    for name in TESTS:
        images, labels = data[name]
        logits, _ = evaluate(model, images, amp)
        metrics[name] = common.classification_metrics(logits, labels.cpu())
        outputs[f"{name}_logits"] = logits
        outputs[f"{name}_labels"] = labels.cpu()
    return metrics, outputs


def training_loss(model, data, args, examples):
    """Mean cross-entropy on the first training digits, for analyze.py. Batch-norm statistics are
    estimated anew: those between two models belong to neither, and would make a barrier."""
    images, labels = data["train"]
    images = images[:examples]
    update_bn([to_input(images)], model)
    logits, _ = evaluate(model, images, amp=False)
    return F.cross_entropy(logits, labels[:examples].cpu()).item()


# ---- Which run it is: its configuration, its folder, its relatives -------------------------------

# Flags that enter a run's name where they change its configuration.
FLAGS = ("examples", "epochs", "batch_size", "lr", "temperature", "alpha", "teacher_seed")


def given(value, default):
    return default if value is None else value


def recipe(args, model):
    """The recipe of `model`, with the flags that were given."""
    found = dict(RECIPES[model])
    fewer = EXAMPLES / given(args.examples, EXAMPLES)
    found["epochs"] = int(found["epochs"] * fewer**0.5)
    for flag in ("epochs", "batch_size", "lr"):
        found[flag] = given(getattr(args, flag), found[flag])
    return found


def configure(args):
    """All that the results depend on; device and precision are no part of it."""
    config = {
        "task": "mnist",
        "data": args.data,
        "examples": given(args.examples, EXAMPLES),
        "student": args.student,
        "seed": args.seed,
        "kd": args.kd,
        **recipe(args, args.student),
    }
    if args.kd:
        teacher = recipe(args, args.teacher)
        if args.kd == "online":  # the teacher learns in the student's batches
            teacher = {"lr": teacher["lr"], "weight_decay": teacher["weight_decay"]}
        config |= {f"teacher_{key}": value for key, value in teacher.items()}
        config["teacher"] = args.teacher
        config["teacher_seed"] = given(args.teacher_seed, args.seed + 1)
        temperature = 1.0 if args.kd == "hard" else TEMPERATURE
        config["temperature"] = given(args.temperature, temperature)
        config["alpha"] = given(args.alpha, 1.0)
    return config


def run_folder(args):
    """<out>/<task>/<run name>/seed<k>"""
    task = "mnist" if args.data == "mnist" else "mnist-synthetic"
    return args.out / task / common.run_name(args, configure, FLAGS) / f"seed{args.seed}"


def changed(args, **changes):
    return argparse.Namespace(**vars(args) | changes)


def plain(args, model, seed):
    """The flags of the run of `model` without distillation."""
    return changed(args, student=model, seed=seed, kd=None)


def relatives(args):
    """The runs to compare with, as "<run name>/seed<k>"; plain: one of each kind of model."""
    def path(relative):
        return "/".join(run_folder(relative).parts[-2:])

    found = {"plain": {model: path(plain(args, model, args.seed)) for model in MODELS}}
    if args.kd:
        found["self_taught"] = path(changed(args, teacher=args.student))
        found["permuted"] = path(changed(args, kd="permuted"))
    if args.kd and args.kd != "online":
        teacher_seed = configure(args)["teacher_seed"]
        found["teacher"] = path(plain(args, args.teacher, teacher_seed))
    return found


# ---- Training ------------------------------------------------------------------------------------


def permute(soft_labels, labels, seed):
    """Permutes soft labels (n, 10), in place, among the digits of one label: no function of the
    image is left."""
    torch.manual_seed(seed)
    for label in range(10):
        own = (labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(own), device=own.device)
        soft_labels[own] = soft_labels[own[order]]


def keep_part(soft_labels, part, temperature):
    """Soft labels (n, 10) that keep one part of what softmax(soft_labels / temperature) says.

    hard: which class is the most probable one; the others get nothing.
    confidence: how probable it is; the others share the rest equally.
    ratios: the ratios among the others; the first class is as probable for each digit, as it is on
    average. Zhao et al. 2022 (arXiv 2203.08679), eq. 3-5, part the distribution in this way, with
    the label in the place of the first class.
    """
    log_p = (soft_labels.double() / temperature).log_softmax(dim=1)
    first, first_class = log_p.max(dim=1, keepdim=True)
    others = log_p.scatter(1, first_class, -math.inf)
    rest = others.logsumexp(dim=1, keepdim=True)  # log(1 - p), exact where p is almost 1

    if part == "hard":
        first = torch.zeros_like(first)
        others = torch.full_like(others, -1000)  # infinity would make the KD loss NaN
    elif part == "confidence":
        n_others = others.shape[1] - 1
        others = (rest - math.log(n_others)).expand_as(others)
    elif part == "ratios":
        others = others - rest + rest.exp().mean().log()
        first = first.exp().mean().log().expand_as(first)
    kept = others.scatter(1, first_class, first)
    return (temperature * kept).float()


def ask_teacher(args, data):
    """(soft labels (n, 10) of the training digits, test metrics) of the teacher that was trained
    before: a plain run, loaded, or trained now. Neither it nor the digits change, so it is asked
    once for each digit."""
    plain_args = plain(args, args.teacher, configure(args)["teacher_seed"])
    record = train(plain_args, data)
    teacher = build_model(args.teacher, plain_args.seed, args)
    common.load_weights(teacher, run_folder(plain_args))

    images, labels = data["train"]
    soft_labels, _ = evaluate(teacher, images, args.amp)
    soft_labels = soft_labels.to(args.device)

    if args.kd == "permuted":
        permute(soft_labels, labels, args.seed)
    elif args.kd in PARTS:
        soft_labels = keep_part(soft_labels, args.kd, configure(args)["temperature"])
    return soft_labels, record["metrics"]


def train(args, data):
    """Train, test and save the run that `args` describe, unless it is done; returns its record."""
    folder = run_folder(args)
    config = configure(args)
    record = common.find_run(folder, config)
    if record:
        print(f"{folder} is finished: delete it to repeat it")
        return record

    # ---- The teacher: one that was trained before has answered once, an online one learns below
    soft_labels = None
    online_teacher = None
    if args.kd == "online":
        online_teacher = build_model(args.teacher, config["teacher_seed"], args)
    elif args.kd:
        soft_labels, teacher_metrics = ask_teacher(args, data)

    # ---- The student, and what it learns with
    student = build_model(args.student, args.seed, args)
    groups = [{"params": student.parameters(), "lr": config["lr"],
               "weight_decay": config["weight_decay"]}]
    if online_teacher:
        groups.append({"params": online_teacher.parameters(), "lr": config["teacher_lr"],
                       "weight_decay": config["teacher_weight_decay"]})

    images, labels = data["train"]
    epochs = config["epochs"]
    batch_size = min(config["batch_size"], len(labels))
    steps = len(labels) // batch_size  # the incomplete last batch is left out

    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in groups],
        pct_start=0.25,  # the part of the steps in which the rate rises
        total_steps=max(epochs * steps, 5),  # it divides by zero below 5
    )

    sizes = {name: len(part_labels) for name, (_, part_labels) in data.items()}
    sizes["parameters"] = sum(parameter.numel() for parameter in student.parameters())
    print(f"\n{folder}, on {args.device}: {sizes['train']:,} digits, {sizes['parameters']:,} "
          f"parameters, {epochs} epochs of {steps} batches")

    # ---- The loop. The order of the batches depends on the seed alone: twins see the same batches
    order = torch.Generator().manual_seed(args.seed)
    history = []
    probe, _ = data["test"]
    probe = probe[:1000]
    snapshots = {0: evaluate(student, probe, args.amp)[1]}  # {epoch: representations}
    begin = time.perf_counter()

    for epoch in range(1, epochs + 1):
        epoch_begin = time.perf_counter()
        total_loss = 0.0
        student.train()
        shuffled = torch.randperm(len(labels), generator=order).to(args.device)

        for step, batch in enumerate(shuffled.split(batch_size)[:steps], 1):
            # index_select copies a batch in a seventh of the time of images[batch] on the CPU.
            x = to_input(images.index_select(0, batch))
            y = labels.index_select(0, batch)

            with torch.autocast("cpu", torch.bfloat16, enabled=args.amp):
                logits = student(x).float()
                if online_teacher:
                    soft = online_teacher(x).float()
            if soft_labels is not None:
                soft = soft_labels.index_select(0, batch)

            if args.kd:
                loss = common.kd_loss(logits, soft, y, config["temperature"], config["alpha"])
            else:
                loss = F.cross_entropy(logits, y)
            if online_teacher:  # kd_loss detaches `soft`: this trains the teacher alone
                loss = loss + F.cross_entropy(soft, y)

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.detach()  # no .item(): a GPU would wait for it in every step

            if step % 20 == 0 and sys.stdout.isatty():
                print(f"epoch {epoch}/{epochs}  batch {step}/{steps}", end="\r", flush=True)

        mean_loss = float(total_loss) / steps
        seconds = time.perf_counter() - epoch_begin
        if not math.isfinite(mean_loss):
            sys.exit(f"error: the loss is {mean_loss} in epoch {epoch}: try a lower --lr")

        validation_images, validation_labels = data["validation"]
        logits, _ = evaluate(student, validation_images, args.amp)
        correct = logits.argmax(dim=1) == validation_labels.cpu()
        accuracy = correct.float().mean().item()
        history.append({"epoch": epoch, "loss": mean_loss, "seconds": seconds,
                        "validation_accuracy": accuracy})

        is_power_of_two = epoch & (epoch - 1) == 0
        if is_power_of_two or epoch == epochs:  # representations change most at the beginning
            snapshots[epoch] = evaluate(student, probe, args.amp)[1]

        left = (time.perf_counter() - begin) / epoch * (epochs - epoch)
        print(f"epoch {epoch}/{epochs}  loss {mean_loss:.4f}  validation accuracy "
              f"{accuracy:.4f}  {left:.0f} s left", flush=True)

    # ---- The tests, and the record of the run
    metrics, outputs = test_all(student, data, args.amp)
    outputs["probe_epochs"] = list(snapshots)
    outputs["probe_representations"] = torch.stack(list(snapshots.values()))
    record = {
        "config": config,
        **relatives(args),
        "sizes": sizes,
        "history": history,
        "environment": common.environment(args, __file__),
        "metrics": metrics,
    }
    if online_teacher:
        teacher_metrics, _ = test_all(online_teacher, data, args.amp)
    if args.kd:
        record["teacher_metrics"] = teacher_metrics
    common.save_run(folder, record, outputs, student)
    return record


def print_results(args, record):
    """Accuracy and ECE of the student and, after distillation, of its teacher and plain twin."""
    rows = {}
    if args.kd:
        twin_args = plain(args, args.student, args.seed)
        twin = common.find_run(run_folder(twin_args), configure(twin_args))
        rows["teacher"] = record["teacher_metrics"]
        rows["plain twin"] = twin["metrics"] if twin else None
    rows["student"] = record["metrics"]

    def shown(value):  # run.json has null for NaN
        return "-" if value is None else f"{value:.4f}"

    print("\naccuracy / ECE  " + "".join(f"{test:<17}" for test in TESTS))
    for role, tests in rows.items():
        if tests is None:
            print(f"{role:<16}not there yet: the same command without --kd and its flags")
            continue
        line = f"{role:<16}"
        for test in TESTS:
            cell = f"{shown(tests[test]['accuracy'])} / {shown(tests[test]['ece'])}"
            line += f"{cell:<17}"
        print(line)


# ---- Flags ---------------------------------------------------------------------------------------


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="%(prog)s [flags], see --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    # Models and distillation
    add("--student", choices=MODELS, default="mlp", help="model to train")
    add("--teacher", choices=MODELS, help="model to learn from (default: the student's kind)")
    add("--kd", nargs="?", const="offline", choices=["offline", "online", "permuted", *PARTS],
        help="distil from a trained teacher (plain --kd); online: train both together; permuted: "
             "permute the soft labels among the digits of one label; hard, confidence, ratios: "
             "keep that part of them alone")
    add("--temperature", type=float, help=f"softens both outputs (default: {TEMPERATURE:g})")
    add("--alpha", type=float, help="share of the KD loss, the rest: cross-entropy (default: 1)")
    # Training, of student and teacher (default: each model's recipe)
    add("--epochs", type=int)
    add("--batch-size", type=int)
    add("--lr", type=float, help="the highest learning rate")
    add("--seed", dest="seeds", type=int, nargs="+", default=[0],
        help="initialisation and order of the batches; of many, one is run after the other")
    add("--teacher-seed", type=int, help="(default: seed + 1)")
    # Data
    add("--data", choices=["auto", "mnist", "synthetic"], default="auto",
        help="auto: MNIST if it can be had, else digits drawn here")
    add("--examples", type=int,
        help=f"training digits, a sixth in each test (default: {EXAMPLES:,})")
    add("--data-dir", type=Path, default="data", help="where MNIST is or is downloaded to")
    # Where and how
    add("--out", type=Path, default="runs", help="folder for runs")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16, on CPUs",
        default=torch.cpu._is_avx512_bf16_supported())
    args = parser.parse_args(argv)

    for flag in ("teacher", "teacher_seed", "temperature", "alpha"):
        if getattr(args, flag) is not None and not args.kd:
            parser.error(f"--{flag.replace('_', '-')} has no effect without --kd")
    for flag, least in (("epochs", 1), ("batch_size", 2), ("examples", 60), ("temperature", 1e-3)):
        value = getattr(args, flag)
        if value is not None and not value >= least:
            parser.error(f"--{flag.replace('_', '-')} must be at least {least}")
    if args.examples is not None and args.examples > EXAMPLES:
        parser.error(f"--examples must be at most {EXAMPLES}")
    if args.kd == "hard" and args.temperature:
        parser.error("--temperature has no effect on --kd hard")
    if args.teacher_seed in args.seeds:
        parser.error("--teacher-seed must not be the student's own")

    args.seed = args.seeds[0]  # the others follow in main
    args.teacher = args.teacher or args.student
    args.amp = args.amp and args.device.type == "cpu"  # GPUs have TF32
    try:
        torch.empty(1, device=args.device)
        args.out.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, AssertionError, OSError) as error:
        parser.error(str(error).splitlines()[0])
    return args


def main(argv=None):
    args = parse_arguments(argv)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs
    data = load_data(args)
    for seed in args.seeds:
        args.seed = seed
        record = train(args, data)
        print_results(args, record)


if __name__ == "__main__":
    main()
