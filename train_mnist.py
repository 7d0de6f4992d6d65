"""Train an MLP or a CNN on MNIST, alone or on a teacher's soft labels.

    python train_mnist.py --student mlp                       # no distillation
    python train_mnist.py --student mlp --kd                  # self-distillation: an MLP teaches
    python train_mnist.py --teacher cnn --student mlp --kd    # distillation: a CNN teaches

Training never moves or scales a digit, so the scaled and translated test sets ask for the
inductive bias, not for the fit: does the CNN's come over to the MLP? Every run leaves run.json,
outputs.npz and model.pt in runs/mnist/<run name>/seed<k>/ (runs/mnist-synthetic for digits drawn
here). After Abnar, Dehghani & Zuidema 2020 (arXiv 2006.00555).
"""

import contextlib
import io
import socket
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common

# One recipe for all setups of a model. Chosen on the validation digits among batches of 64 to 256,
# learning rates of 4e-3 to 2e-2, weight decay of 0.01 to 0.3 and temperatures of 5 to 40.
RECIPES = {
    "mlp": {"epochs": 20, "batch_size": 128, "lr": 4e-3, "weight_decay": 0.01},
    "cnn": {"epochs": 16, "batch_size": 128, "lr": 4e-3, "weight_decay": 0.01},
}
TEMPERATURE = 20.0
TRAIN_SIZE = 60_000
PROBE_SIZE = 1000  # test digits whose representations are kept
TESTS = ("test", "scaled", "translated")


# ---- Models: `body` gives the penultimate representation, `head` is the last linear layer --------


class MLP(nn.Module):
    """Hidden layers of 512, 128 and 32 units: (n, 1, 28, 28) -> (n, 10), representation (n, 32)."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(),
            nn.Linear(784, 512), nn.BatchNorm1d(512), nn.ReLU(),
            nn.Linear(512, 128), nn.BatchNorm1d(128), nn.ReLU(),
            nn.Linear(128, 32), nn.BatchNorm1d(32), nn.ReLU(),
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.body(x))


class CNN(nn.Module):
    """Three convolutions: (n, 1, 28, 28) -> (n, 10), representation (n, 64).

    Average pooling (a max moves with the sampling grid) and padding (every position sees the same
    filters) make it indifferent to where a digit stands.
    """

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 5, padding=2), nn.BatchNorm2d(32), nn.ReLU(),
            nn.AvgPool2d(2),                                                # (n, 32, 14, 14)
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.AvgPool2d(2),                                                # (n, 64, 7, 7)
            nn.Conv2d(64, 64, 5, padding=2), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Dropout(0.05),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),                          # (n, 64)
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.body(x))


MODELS = {"mlp": MLP, "cnn": CNN}


def build_model(name, seed, device):
    """A new model whose initial weights depend on (name, seed) alone."""
    torch.manual_seed(seed)
    # Channels-last convolutions are 1.5 times as fast on the CPU; MPS doesn't have them all.
    layout = torch.preserve_format if device.type == "mps" else torch.channels_last
    return MODELS[name]().to(device, memory_format=layout)


def to_input(images):
    """Grey levels 0..255, (n, 28, 28) -> model input (n, 1, 28, 28), normalised as usual."""
    # In place on a copy: half the time of two new tensors.
    return images.to(torch.float32, copy=True).sub_(0.1307 * 255).div_(0.3081 * 255).unsqueeze(1)


# ---- Data: images are grey levels 0..255, (n, 28, 28); labels are (n,) int64 ---------------------


def translate(images, pixels=3, seed=0):
    """Every digit shifted by `pixels` in both axes, each sign drawn at random; zeros move in.

    images: (n, rows, columns); the signs depend on `seed` alone. As MNIST-C's "translate" at
    severity 3 (Mu & Gilmer 2019, arXiv 1906.02337).
    """
    n, rows, columns = images.shape
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, 2, (n, 2), generator=generator).sub(1).mul(-2 * pixels)
    row = first[:, :1] + torch.arange(rows)        # (n, rows)
    column = first[:, 1:] + torch.arange(columns)  # (n, columns)
    padded = F.pad(images, (pixels,) * 4)
    return padded[torch.arange(n)[:, None, None], row[:, :, None], column[:, None, :]]


def scale(images, factor=0.7):
    """Every digit shrunk to `factor` about the image centre, bilinear, zeros outside.

    images: (n, rows, columns) -> the same in float32, not rounded to whole grey levels. As
    MNIST-C's "scale" at severity 3 (Mu & Gilmer 2019).
    """
    theta = torch.tensor([[1 / factor, 0, 0], [0, 1 / factor, 0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, (len(images), 1, *images.shape[1:]), align_corners=False)
    return F.grid_sample(images.float().unsqueeze(1), grid, align_corners=False).squeeze(1)


def load_mnist(data_dir):
    """(train images, train labels, test images, test labels), downloaded if they are not there.

    None where they can't be had; UserError where the files are damaged.
    """
    from torchvision.datasets import MNIST  # takes a second to import, so not for synthetic data

    socket.setdefaulttimeout(10)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # a line for every mirror that fails
            train, test = MNIST(data_dir, True, download=True), MNIST(data_dir, False)
        tensors = train.data, train.targets, test.data, test.targets
        if [len(tensor) for tensor in tensors] != [60_000, 60_000, 10_000, 10_000]:
            raise ValueError("wrong sizes")
        return tensors
    except Exception as error:  # torchvision reports damage in many ways
        raw = Path(data_dir) / "MNIST" / "raw"
        if len(list(raw.glob("*-ubyte"))) < 4:
            return None
        reason = " ".join(str(error).split())
        raise common.UserError(f"the MNIST files in {raw} are damaged or swapped ({reason}); "
                               "delete that folder to download them again") from None


def synthetic_digits(n, seed):
    """`n` digits drawn here: images (n, 28, 28) uint8, labels (n,) int64, the same for one seed.

    Glyphs of Pillow's font, each with its own size, width, slant, rotation, bends, thickness and
    ink, off centre by at most a pixel, as MNIST's are.
    """
    from PIL import Image, ImageDraw, ImageFilter, ImageFont  # comes with torchvision

    glyphs = torch.zeros(10, 1, 64, 64)
    for digit in range(10):
        image = Image.new("L", (64, 64))
        font = ImageFont.load_default(size=62)
        ImageDraw.Draw(image).text((32, 32), str(digit), fill=255, font=font, anchor="mm")
        blurred = image.filter(ImageFilter.GaussianBlur(2.5))
        glyphs[digit, 0] = torch.from_numpy(np.array(blurred)) / 255

    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return torch.rand(*shape, generator=generator) * (high - low) + low

    labels = torch.randint(0, 10, (n,), generator=generator)
    images = torch.empty(n, 28, 28, dtype=torch.uint8)
    for part in torch.arange(n).split(2000):  # keeps the intermediate tensors small
        m = len(part)
        # Where a pixel looks in its glyph: scaled, slanted, rotated, shifted by up to a pixel ...
        width, height, slant = uniform(1.0, 1.7, m), uniform(0.9, 1.15, m), uniform(-0.6, 0.3, m)
        angle, shift = uniform(-0.15, 0.15, m), uniform(-1 / 14, 1 / 14, 2, m)
        cos, sin = angle.cos(), angle.sin()
        theta = torch.stack([cos * width, (slant * cos - sin) * width, shift[0],
                             sin * height, (slant * sin + cos) * height, shift[1]], dim=1)
        grid = F.affine_grid(theta.view(m, 2, 3), (m, 1, 28, 28), align_corners=False)
        # ... and bent, by a smooth field that leaves the centre where it is.
        bends = uniform(-0.12, 0.12, m, 2, 4, 4)
        bends -= bends[:, :, 1:3, 1:3].mean(dim=(2, 3), keepdim=True)
        bends = F.interpolate(bends, size=(28, 28), mode="bicubic", align_corners=True)
        blurred = F.grid_sample(glyphs[labels[part]], grid + bends.permute(0, 2, 3, 1),
                                align_corners=False).squeeze(1)
        # The lower the threshold on the blurred glyph, the thicker the stroke. It varies with the
        # pressure of the pen, down to gaps: so that neither model is perfect.
        pressure = F.interpolate(uniform(-0.37, 0.37, m, 1, 5, 5), size=(28, 28), mode="bicubic",
                                 align_corners=True).squeeze(1)
        threshold, ink = uniform(0.2, 0.6, m, 1, 1) + pressure, uniform(200, 500, m, 1, 1)
        strokes = ((blurred - threshold) * 5 + 0.5).clamp(0, 1) * (blurred > 0.02)
        images[part] = (strokes * ink).clamp(0, 255).byte()
    return images, labels


def load_digits(source, examples, data_dir):
    """(source, (train images, train labels, test images, test labels)).

    source "auto": MNIST if it can be had, else synthetic digits, with a warning.
    """
    if source != "synthetic":
        digits = load_mnist(data_dir)
        if digits is not None:
            return "mnist", digits
        problem = f"MNIST is not in {data_dir}/MNIST/raw and can't be downloaded"
        if source == "mnist":
            raise common.UserError(f"{problem}: put its files there, or use --data synthetic")
        print(f"\n*** WARNING: {problem}.\n*** Using SYNTHETIC digits drawn here: "
              "no figure of this run is about MNIST.\n", file=sys.stderr)
    train, test = synthetic_digits(examples, seed=0), synthetic_digits(examples // 6, seed=1)
    return "synthetic", (*train, *test)


def make_data(digits, examples, device):
    """{"train", "validation", "test", "scaled", "translated": (images, labels)} on `device`.

    digits: as from load_digits. The first `examples` training digits are used, the last twelfth
    of them for validation, and a sixth as many test digits.
    """
    train_images, train_labels, test_images, test_labels = digits
    train = examples - examples // 12
    test_images, test_labels = test_images[:examples // 6], test_labels[:examples // 6]
    data = {
        "train": (train_images[:train], train_labels[:train]),
        "validation": (train_images[train:examples], train_labels[train:examples]),
        "test": (test_images, test_labels),
        "scaled": (scale(test_images), test_labels),
        "translated": (translate(test_images), test_labels),
    }
    return {name: (images.to(device), labels.to(device))
            for name, (images, labels) in data.items()}


# ---- Training ------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, images, amp):
    """Logits (n, 10) and representations (n, width) in eval mode, float32, on the CPU."""
    model.eval()
    logits, representations = [], []
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        for part in images.split(1000):
            representations.append(model.body(to_input(part)))
            logits.append(model.head(representations[-1]))
    return torch.cat(logits).float().cpu(), torch.cat(representations).float().cpu()


def test_all(model, data, amp):
    """({test set: metrics}, {"<test set>_logits", "<test set>_labels": tensor})."""
    metrics, outputs = {}, {}
    for name in TESTS:
        images, labels = data[name]
        logits, labels = evaluate(model, images, amp)[0], labels.cpu()
        metrics[name] = common.classification_metrics(logits, labels)
        outputs |= {f"{name}_logits": logits, f"{name}_labels": labels}
    return metrics, outputs


def run(config, data, args, force=False):
    """Train, test and save what `config` describes; return its record, as in run.json.

    A finished run of this configuration is not repeated, unless `force`. The teacher of offline
    distillation is such a run too: it is loaded, or trained first.
    """
    directory = run_directory(config, args)
    record = common.finished_run(directory, config, force)
    if record is not None:
        if not args.quiet:
            print(f"{directory} is finished already; --force repeats the student's run")
        return record
    device, online, offline = args.device, config["kd"] == "online", config["kd"] == "offline"

    if offline:
        teacher_config = plain_config(args.teacher, args.teacher_seed, config["data"], args)
        teacher_metrics = run(teacher_config, data, args)["metrics"]
        teacher = build_model(config["teacher"], config["teacher_seed"], device)
        common.load_weights(teacher, run_directory(teacher_config, args))
        # Neither the teacher nor the digits change: it is asked once for each digit.
        teacher_logits = evaluate(teacher, data["train"][0], args.amp)[0].to(device)

    # The student and, online, the teacher that learns beside it: a parameter group for each.
    student = build_model(config["student"], config["seed"], device)
    groups = [{"params": list(student.parameters()), "lr": config["lr"],
               "weight_decay": config["weight_decay"]}]
    if online:
        teacher = build_model(config["teacher"], config["teacher_seed"], device)
        groups.append({"params": list(teacher.parameters()), "lr": config["teacher_lr"],
                       "weight_decay": config["teacher_weight_decay"]})

    images, labels = data["train"]
    batch_size = min(config["batch_size"], len(labels))
    steps = len(labels) // batch_size  # the incomplete last batch is left out
    optimizer = torch.optim.AdamW(groups, fused=device.type != "mps")
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=[group["lr"] for group in groups], pct_start=0.25,
        total_steps=max(config["epochs"] * steps, 5))  # it divides by zero below 5

    if not args.quiet:
        print(f"\n{common.run_name(config)}, seed {config['seed']}: {count_parameters(student):,} "
              f"parameters, {config['epochs']} epochs of {len(labels):,} digits "
              f"in batches of {batch_size}")
    progress = common.Progress(config["epochs"], args.quiet)
    history = []
    probe = data["test"][0][:PROBE_SIZE]
    snapshots = {0: evaluate(student, probe, args.amp)[1]}
    # Dropout and the order of the batches depend on the seed alone: twins see the same batches.
    torch.manual_seed(config["seed"])
    order = torch.Generator().manual_seed(config["seed"])

    for epoch in range(1, config["epochs"] + 1):
        start, total_loss = time.perf_counter(), 0.0
        student.train()
        shuffled = torch.randperm(len(labels), generator=order).to(device)
        for step, batch in enumerate(shuffled.split(batch_size)[:steps], 1):
            # index_select copies a batch in a seventh of the time of images[batch] on the CPU.
            x, y = to_input(images.index_select(0, batch)), labels.index_select(0, batch)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                logits = student(x).float()
                if online:
                    soft = teacher(x).float()
            if offline:
                soft = teacher_logits.index_select(0, batch)

            if config["kd"] is None:
                loss = F.cross_entropy(logits, y)
            else:
                loss = common.kd_loss(logits, soft, y, config["temperature"], config["alpha"])
            if online:  # reaches the teacher alone, as the KD loss reaches the student alone
                loss = loss + F.cross_entropy(soft, y)

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.detach()  # no .item(): a GPU would wait for it in every step
            progress.step(epoch, step, steps)

        mean_loss = float(total_loss) / steps
        seconds = time.perf_counter() - start
        if not mean_loss < float("inf"):
            raise common.UserError(f"the loss is {mean_loss} in epoch {epoch}: nothing is kept; "
                                   "try a lower --lr")
        validation_images, validation_labels = data["validation"]
        predictions = evaluate(student, validation_images, args.amp)[0].argmax(dim=1)
        accuracy = (predictions == validation_labels.cpu()).float().mean().item()
        history.append({"epoch": epoch, "loss": mean_loss, "validation_accuracy": accuracy,
                        "seconds": seconds})
        progress.epoch(epoch, mean_loss, accuracy, seconds)
        if epoch & (epoch - 1) == 0 or epoch == config["epochs"]:  # 1, 2, 4, 8 ... and the last
            snapshots[epoch] = evaluate(student, probe, args.amp)[1]

    metrics, outputs = test_all(student, data, args.amp)
    outputs |= {"probe_epochs": list(snapshots),
                "probe_representations": torch.stack(list(snapshots.values()))}
    seconds = sum(entry["seconds"] for entry in history)
    record = {
        "config": config,
        "data": {"source": config["data"],
                 **{name: len(labels) for name, (_, labels) in data.items()}},
        "environment": common.describe_environment(device, "bfloat16" if args.amp else "float32"),
        "parameters": {"student": count_parameters(student)},
        "history": history,
        "metrics": metrics,
        "timing": {"training": seconds,
                   "examples_per_second": config["epochs"] * steps * batch_size / seconds},
    }
    if online:
        teacher_metrics, _ = test_all(teacher, data, args.amp)
    if config["kd"]:
        record["teacher_metrics"] = teacher_metrics
        record["parameters"]["teacher"] = count_parameters(teacher)
    common.save_run(directory, record, outputs, student.state_dict(), force)
    if not args.quiet:
        print(f"written to {directory}")
    return record


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


# ---- Command line --------------------------------------------------------------------------------


def parse_arguments(argv):
    parser = common.make_parser(__doc__)
    common.add_shared_arguments(parser, list(MODELS), "mlp", f"{TEMPERATURE:g}")
    parser.add_argument("--data", choices=["auto", "mnist", "synthetic"], default="auto",
                        help="auto: MNIST if it can be had, else digits drawn here")
    parser.add_argument("--examples", type=common.number(int, 60, TRAIN_SIZE), default=TRAIN_SIZE,
                        help="training digits, and a sixth of it for each test (default: all)")
    args = parser.parse_args(argv)
    common.check_shared_arguments(parser, args, TEMPERATURE)
    return args


def plain_config(model, seed, source, args):
    """The configuration of a run without distillation: all that its results depend on.

    Two runs with equal configurations are the same run. Device and precision are not part of it.
    """
    recipe = {key: getattr(args, key, None) or value for key, value in RECIPES[model].items()}
    return {"task": "mnist", "data": source, "examples": args.examples,
            "student": model, "seed": seed, "kd": None, **recipe}


def run_directory(config, args):
    root = "mnist" if config["data"] == "mnist" else "mnist-synthetic"
    return args.out / root / common.run_name(config) / f"seed{config['seed']}"


def main(argv=None):
    args = parse_arguments(argv)
    args.device = common.choose_device(args.device)
    args.amp = common.has_bfloat16(args.device) if args.amp is None else args.amp
    args.out.mkdir(parents=True, exist_ok=True)
    source, digits = load_digits(args.data, args.examples, args.data_dir)
    data = make_data(digits, args.examples, args.device)
    if not args.quiet:
        sizes = ", ".join(f"{len(labels):,} {name}" for name, (_, labels) in data.items())
        print(f"device: {args.device}, {'bfloat16' if args.amp else 'float32'}\n"
              f"data: {source}, {sizes}")

    config = plain_config(args.student, args.seed, source, args)
    if args.kd:
        teacher = plain_config(args.teacher, args.teacher_seed, source, args)
        config = common.taught_config(config, teacher, args)
    record = run(config, data, args, args.force)
    if not args.quiet:
        common.print_table(record, run_directory(config, args),
                           {"accuracy": "accuracy", "ece": "ECE", "nll": "NLL"})


if __name__ == "__main__":
    common.run_main(main)
