"""Train an MLP or a CNN on MNIST, alone or on a teacher's soft labels, and test it on moved and scaled digits.

    python train_mnist.py --student mlp                       # no distillation
    python train_mnist.py --student mlp --kd                  # self-distillation: the teacher is another MLP
    python train_mnist.py --teacher cnn --student mlp --kd    # distillation: does the CNN's inductive bias come along?

Training never moves or scales a digit, so the scaled and translated test sets ask for the inductive bias, not for
the fit. Every run leaves run.json, outputs.npz and model.pt in runs/mnist/<run name>/seed<k>/ (runs/mnist-synthetic
when the digits were drawn here). After Abnar, Dehghani & Zuidema 2020 (arXiv 2006.00555).
"""

import argparse
import contextlib
import io
import socket
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import common

# The same recipe for every setup of a model, distilled or not. Chosen on held-out training digits.
RECIPES = {"mlp": {"epochs": 20, "batch_size": 128, "lr": 4e-3, "weight_decay": 0.01},
           "cnn": {"epochs": 16, "batch_size": 128, "lr": 4e-3, "weight_decay": 0.01}}
TEMPERATURE = 20.0

TRAIN_SIZE, VALIDATION_SHARE, TEST_SHARE = 60_000, 12, 6  # one in 12 training digits validates; tests are 1/6 as many
PROBE_SIZE = 1000  # test digits whose representations are kept


# ----------------------------------------------------------------------------------------------------------------------
# Models. `body` ends in the penultimate representation, `head` is the last linear layer.


class MLP(nn.Module):
    """Hidden layers of 512, 128 and 32 units with batch norm. (n, 1, 28, 28) -> (n, 10); representation (n, 32)."""

    def __init__(self):
        super().__init__()
        layers = [nn.Flatten()]
        for inputs, outputs in ((28 * 28, 512), (512, 128), (128, 32)):
            layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.body(x))


class CNN(nn.Module):
    """Three padded convolutions, averaged over all positions. (n, 1, 28, 28) -> (n, 10); representation (n, 64).

    Average pooling (a max moves with the sampling grid) and padding (every position sees the same filters) are what
    makes it indifferent to where a digit stands.
    """

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 5, padding=2), nn.BatchNorm2d(32), nn.ReLU(), nn.AvgPool2d(2),   # (n, 32, 14, 14)
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AvgPool2d(2),  # (n, 64, 7, 7)
            nn.Conv2d(64, 64, 5, padding=2), nn.BatchNorm2d(64), nn.ReLU(), nn.Dropout(0.05),
            nn.AdaptiveAvgPool2d(1), nn.Flatten())                                            # (n, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.body(x))


MODELS = {"mlp": MLP, "cnn": CNN}


def build_model(name, seed):
    """A new model whose initial weights depend on (name, seed) alone."""
    common.seed_everything(seed)
    return MODELS[name]()


def place(model, device):
    """`model` on `device`, its convolutions channels-last where that pays (1.5 times as fast on the CPU)."""
    return model.to(device, memory_format=torch.preserve_format if device.type == "mps" else torch.channels_last)


def to_input(images):
    """Grey levels 0..255, (n, 28, 28), of any type -> model input (n, 1, 28, 28) with MNIST's mean and deviation."""
    # In place on a copy: half the time of two new tensors, and the data stay as they are.
    return images.to(torch.float32, copy=True).sub_(0.1307 * 255).div_(0.3081 * 255).unsqueeze(1)


# ----------------------------------------------------------------------------------------------------------------------
# Data: images are grey levels 0..255, (n, 28, 28); labels (n,) int64


def translate(images, pixels=3, seed=0):
    """Every digit shifted by `pixels` in both axes, each sign drawn at random; zeros move in.

    images: (n, rows, columns) of any type; the result is alike and depends on `seed` alone.
    As MNIST-C's "translate" (Mu & Gilmer 2019, arXiv 1906.02337) at severity 3.
    """
    signs = torch.randint(0, 2, (len(images), 2), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    padded = F.pad(images, (pixels,) * 4)
    moved = torch.empty_like(images)
    for down in (-1, 1):
        for right in (-1, 1):
            chosen = (signs[:, 0] == down) & (signs[:, 1] == right)
            top, left = pixels - down * pixels, pixels - right * pixels
            moved[chosen] = padded[chosen, top:top + images.shape[1], left:left + images.shape[2]]
    return moved


def scale(images, factor=0.7):
    """Every digit shrunk to `factor` about the image centre, bilinear, zeros outside.

    images: (n, rows, columns) of any type -> the same in float32, not rounded to whole grey levels.
    As MNIST-C's "scale" (Mu & Gilmer 2019) at severity 3.
    """
    theta = torch.tensor([[1 / factor, 0, 0], [0, 1 / factor, 0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, (len(images), 1, *images.shape[1:]), align_corners=False)
    return F.grid_sample(images.float().unsqueeze(1), grid, align_corners=False).squeeze(1)


def load_mnist(data_dir, quiet=False):
    """MNIST as (train images, train labels, test images, test labels), downloaded into `data_dir` if it isn't there.

    FileNotFoundError where it is neither there nor to be downloaded; UserError where the files are damaged.
    """
    from torchvision.datasets import MNIST  # takes a second to import, so not for synthetic data

    raw = Path(data_dir) / "MNIST" / "raw"
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    present = all((raw / name).is_file() for name in names)
    if not present and not quiet:
        print(f"downloading MNIST (11 MB) to {raw}", flush=True)
    timeout = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(10)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train, test = (MNIST(data_dir, train=part, download=not present) for part in (True, False))
        tensors = train.data, train.targets, test.data, test.targets
        for tensor, shape in zip(tensors, ((60_000, 28, 28), (60_000,), (10_000, 28, 28), (10_000,))):
            if tensor.shape != shape:
                raise ValueError(f"{tuple(tensor.shape)} where {shape} belongs")
        for labels in (tensors[1], tensors[3]):
            if labels.min() < 0 or labels.max() > 9:
                raise ValueError("labels outside 0..9")
        return tensors
    except Exception as error:  # torchvision reports damage as ValueError, RuntimeError, AssertionError, OSError ...
        if not all((raw / name).is_file() for name in names):
            with contextlib.suppress(OSError):  # the folders of a download that brought nothing
                raw.rmdir(), raw.parent.rmdir()
            raise FileNotFoundError(f"MNIST is not in {raw} and can't be downloaded") from None
        reason = " ".join(str(error).split())
        raise common.UserError(f"the MNIST files in {raw} are truncated, swapped or unreadable ({reason}); "
                               "delete that folder to download them anew") from None
    finally:
        socket.setdefaulttimeout(timeout)


# The pen's way through each digit: for each way of writing it a list of strokes, x to the right, y down, in a unit
# box. A smooth curve runs through the points; a point given twice is a corner.
PEN_STROKES = {
    0: [[[(.5, 0), (.15, .2), (.05, .5), (.15, .8), (.5, 1), (.85, .8), (.95, .5), (.85, .2), (.5, 0)]],
        [[(.7, .05), (.25, .15), (.08, .55), (.3, .95), (.7, .95), (.92, .5), (.75, .1), (.45, .08)]]],
    1: [[[(.5, 0), (.5, .5), (.5, 1)]],
        [[(.25, .25), (.55, 0), (.55, 0), (.55, .5), (.55, 1)]],
        [[(.25, .22), (.5, 0), (.5, 0), (.5, .5), (.5, 1)], [(.2, 1), (.5, 1), (.85, 1)]]],
    2: [[[(.1, .25), (.35, .02), (.75, .05), (.85, .3), (.5, .65), (.08, 1), (.08, 1), (.5, .98), (.95, 1)]],
        [[(.1, .2), (.4, 0), (.8, .15), (.75, .5), (.4, .9), (.12, .95), (.2, .75), (.5, .85), (.95, .97)]]],
    3: [[[(.1, .1), (.5, 0), (.85, .2), (.7, .42), (.38, .48), (.38, .48), (.8, .56), (.9, .8), (.5, 1), (.05, .88)]],
        [[(.1, .03), (.85, .03), (.85, .03), (.4, .42), (.4, .42), (.82, .52), (.88, .8), (.5, 1), (.08, .9)]]],
    4: [[[(.15, 0), (.1, .5), (.1, .52), (.5, .56), (.95, .52)], [(.78, .05), (.74, .5), (.7, 1)]],
        [[(.7, 0), (.4, .32), (.05, .65), (.05, .65), (.5, .65), (.95, .65)], [(.7, 0), (.7, .5), (.7, 1)]]],
    5: [[[(.85, 0), (.2, .02), (.2, .02), (.15, .42), (.15, .42), (.55, .38), (.9, .65), (.6, .98), (.05, .92)]],
        [[(.25, .05), (.18, .45), (.18, .45), (.6, .4), (.88, .7), (.55, 1), (.08, .93)],
         [(.25, .05), (.6, .04), (.95, 0)]]],
    6: [[[(.75, 0), (.3, .3), (.08, .7), (.35, 1), (.8, .9), (.85, .65), (.5, .52), (.12, .7)]],
        [[(.45, 0), (.2, .4), (.15, .8), (.45, 1), (.8, .85), (.7, .6), (.4, .6), (.18, .8)]]],
    7: [[[(.05, .03), (.5, .03), (.92, .03), (.92, .03), (.6, .5), (.4, 1)]],
        [[(.05, .15), (.1, .03), (.1, .03), (.92, .03), (.92, .03), (.6, .5), (.45, 1)],
         [(.3, .5), (.6, .5), (.88, .5)]]],
    8: [[[(.8, .15), (.5, 0), (.2, .18), (.35, .42), (.7, .58), (.85, .8), (.5, 1), (.15, .8), (.3, .58), (.68, .4),
          (.8, .15)]],
        [[(.5, .45), (.2, .25), (.5, 0), (.8, .22), (.5, .45), (.12, .75), (.5, 1), (.88, .75), (.5, .45)]]],
    9: [[[(.85, .25), (.5, 0), (.15, .2), (.3, .48), (.65, .45), (.85, .25), (.85, .25), (.8, .6), (.75, 1)]],
        [[(.82, .2), (.45, 0), (.12, .25), (.4, .5), (.8, .2), (.8, .2), (.88, .6), (.65, .95), (.2, .93)]]],
}
DABS = 48  # dabs of ink a digit is drawn with


def spline_weights(strokes):
    """(DABS, points) weights that turn control points into points on Catmull-Rom splines, stroke after stroke."""
    control_points = sum(map(len, strokes))
    weights, first = [], 0
    for stroke in strokes:
        last_stroke = stroke is strokes[-1]
        dabs = DABS - sum(map(len, weights)) if last_stroke else DABS * len(stroke) // control_points
        position = torch.linspace(0, len(stroke) - 1.0001, dabs)
        segment, u = position.long(), position.frac()
        rows = torch.zeros(dabs, control_points)
        for offset, weight in ((-1, -u + 2 * u**2 - u**3), (0, 2 - 5 * u**2 + 3 * u**3),
                               (1, u + 4 * u**2 - 3 * u**3), (2, -u**2 + u**3)):
            columns = first + (segment + offset).clamp(0, len(stroke) - 1)
            rows[torch.arange(dabs), columns] += weight / 2
        weights.append(rows)
        first += len(stroke)
    return torch.cat(weights)


def synthetic_digits(n, seed):
    """`n` digits drawn here, the same on every machine to rounding: images (n, 28, 28) uint8, labels (n,) int64.

    Each has its own way of writing, wobble of the pen, width, height, slant, rotation and thickness, is centred by
    its mass as MNIST's are, then off by at most one pixel, and more or less inked. No noise from pixel to pixel: a CNN
    takes that for texture and then loses shrunken digits, where it has gone.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return torch.rand(*shape, generator=generator) * (high - low) + low

    labels = torch.randint(0, 10, (n,), generator=generator)
    style, wobble = uniform(0, 1, n), uniform(0.02, 0.14, n, 1, 1)
    path = torch.empty(n, DABS, 2)
    for digit, variants in PEN_STROKES.items():
        for variant, strokes in enumerate(variants):
            chosen = (labels == digit) & ((style * len(variants)).long() == variant)
            points = torch.tensor(sum(strokes, []))  # (points, 2)
            # The sum of three uniform numbers stands in for a normal one, which rounds differently between machines.
            jitter = uniform(-1, 1, int(chosen.sum()), *points.shape, 3).sum(dim=-1)
            path[chosen] = spline_weights(strokes) @ (points + wobble[chosen] * jitter)

    height, angle, slant = uniform(17, 21, n, 1), uniform(-0.25, 0.25, n, 1), uniform(-0.15, 0.45, n, 1)
    x, y = ((path - 0.5) * height.unsqueeze(-1)).unbind(dim=-1)  # pixels, (n, DABS) each
    x = x * uniform(0.55, 0.95, n, 1) - y * slant
    x, y = x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()
    # A dab's ink is the way to the next one, so that slow and fast strokes are equally thick; no ink between strokes.
    ink = torch.hypot(x.diff(dim=1), y.diff(dim=1)).clamp(max=3)
    ink = torch.cat([ink, ink[:, -1:]], dim=1)
    x, y = (p - (p * ink).sum(1, keepdim=True) / ink.sum(1, keepdim=True) + 13.5 + uniform(-1, 1, n, 1) for p in (x, y))
    thickness, pressure = uniform(0.6, 1.3, n, 1, 1), uniform(0.8, 2.0, n, 1, 1)

    images = torch.empty(n, 28, 28, dtype=torch.uint8)
    pixels = torch.arange(28.0)
    for part in torch.arange(n).split(2000):  # keeps the (part, DABS, 28) tensors small
        sigma = thickness[part]
        # A round dab is a row of ink times a column of ink, so a digit is one (28, DABS) @ (DABS, 28) product.
        across, down = (torch.exp((p[part, :, None] - pixels).square() / (-2 * sigma.square())) for p in (x, y))
        drawn = (down * (ink[part, :, None] / (2.5066 * sigma))).mT @ across
        images[part] = (drawn * pressure[part] * 255).clamp(0, 255).round().byte()
    return images, labels


def make_data(source, examples, mnist, device):
    """{"train", "validation", "test", "scaled", "translated": (images, labels)} on `device`.

    The last twelfth of the training digits is for validation. mnist: load_mnist's tensors, for that source.
    """
    if source == "mnist":
        train_images, train_labels, test_images, test_labels = mnist
    else:
        train_images, train_labels = synthetic_digits(examples, seed=0)
        test_images, test_labels = synthetic_digits(examples // TEST_SHARE, seed=1)
    train = examples - examples // VALIDATION_SHARE
    test_images, test_labels = test_images[:examples // TEST_SHARE], test_labels[:examples // TEST_SHARE]
    data = {"train": (train_images[:train], train_labels[:train]),
            "validation": (train_images[train:examples], train_labels[train:examples]),
            "test": (test_images, test_labels),
            "scaled": (scale(test_images), test_labels),
            "translated": (translate(test_images), test_labels)}
    return {name: (images.to(device), labels.to(device)) for name, (images, labels) in data.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Training


@torch.no_grad()
def evaluate(model, images, amp):
    """Logits (n, 10) and penultimate representations (n, width), float32, of `model` in eval mode."""
    was_training = model.training
    model.eval()
    logits, representations = [], []
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        for part in images.split(1000):
            representations.append(model.body(to_input(part)))
            logits.append(model.head(representations[-1]))
    model.train(was_training)
    return torch.cat(logits).float(), torch.cat(representations).float()


def make_optimizer(model, recipe, steps):
    """AdamW and its one-cycle schedule over `steps` steps."""
    fused = next(model.parameters()).device.type != "mps"
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe["lr"], weight_decay=recipe["weight_decay"], fused=fused)
    steps = max(steps, 5)  # OneCycleLR divides by 0 where the first quarter is one step
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["lr"], total_steps=steps, pct_start=0.25)


def train(config, data, args, teacher_logits=None):
    """Train what `config` describes; -> (models, history, snapshots, timing).

    teacher_logits: (training examples, 10), the offline teacher's, indexed by example. models: {"student": model},
    and for online distillation {"teacher": model} too. snapshots: {epoch: representations of the probe digits}.
    timing: {"training": seconds, "examples_per_second"}, without validation and snapshots.
    """
    images, labels = data["train"]
    batch_size = min(config["batch_size"], len(labels))
    steps = len(labels) // batch_size  # the incomplete last batch is left out; another one is every epoch
    models = {"student": build_model(config["student"], config["seed"])}
    recipes = {"student": config}
    if config["kd"] == "online":
        models["teacher"] = build_model(config["teacher"], config["teacher_seed"])
        recipes["teacher"] = {key: config[f"teacher_{key}"] for key in RECIPES[config["teacher"]]}
    forward, optimizers = {}, []
    for name, model in models.items():
        place(model, args.device).train()
        forward[name] = torch.compile(model) if args.compile else model
        optimizers.append(make_optimizer(model, recipes[name], config["epochs"] * steps))
    common.seed_everything(config["seed"])  # dropout
    order = torch.Generator().manual_seed(config["seed"])

    def loss_of(batch):
        # index_select, not images[batch]: on the CPU it copies a batch in a seventh of the time.
        x, y = to_input(images.index_select(0, batch)), labels.index_select(0, batch)
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
            logits = {name: run(x) for name, run in forward.items()}
        if config["kd"] is None:
            return F.cross_entropy(logits["student"].float(), y)
        offline = config["kd"] == "offline"
        soft_labels = teacher_logits.index_select(0, batch) if offline else logits["teacher"].detach()
        loss = common.kd_loss(logits["student"], soft_labels, y, config["temperature"], config["alpha"])
        if config["kd"] == "online":
            loss = loss + F.cross_entropy(logits["teacher"].float(), y)  # reaches the teacher alone
        return loss

    progress = common.Progress(config["epochs"], args.quiet)
    history, snapshots, training_seconds = [], {}, 0.0
    probe, (validation_images, validation_labels) = data["test"][0][:PROBE_SIZE], data["validation"]
    for epoch in range(config["epochs"] + 1):
        if epoch > 0:
            start, total_loss = time.perf_counter(), 0.0
            batches = torch.randperm(len(labels), generator=order).to(args.device).split(batch_size)[:steps]
            for done, batch in enumerate(batches, 1):
                loss = loss_of(batch)
                for optimizer, _ in optimizers:
                    optimizer.zero_grad()
                loss.backward()
                for optimizer, schedule in optimizers:
                    optimizer.step()
                    schedule.step()
                total_loss += loss.detach()  # no .item(): it would make the device wait in every step
                progress.step(epoch, done, steps)
            mean_loss = float(total_loss) / steps
            seconds = time.perf_counter() - start
            training_seconds += seconds
            logits, _ = evaluate(models["student"], validation_images, args.amp)
            accuracy = (logits.argmax(dim=1) == validation_labels).float().mean().item()
            history.append({"epoch": epoch, "loss": mean_loss, "validation_accuracy": accuracy, "seconds": seconds})
            progress.epoch(epoch, mean_loss, accuracy, seconds)
            if not mean_loss < float("inf"):
                raise common.UserError(f"the loss is {mean_loss} in epoch {epoch}: nothing is kept; try a lower --lr")
        if epoch & (epoch - 1) == 0 or epoch == config["epochs"]:  # 0, 1, 2, 4, 8 ... and the last
            snapshots[epoch] = evaluate(models["student"], probe, args.amp)[1]
    examples = config["epochs"] * steps * batch_size
    timing = {"training": training_seconds, "examples_per_second": examples / training_seconds}
    return models, history, snapshots, timing


def test_all(model, data, args):
    """-> ({test set: metrics}, {"<test set>_logits", "<test set>_labels": tensor on the CPU})."""
    metrics, outputs = {}, {}
    for name in ("test", "scaled", "translated"):
        images, labels = data[name]
        logits, labels = evaluate(model, images, args.amp)[0].cpu(), labels.cpu()
        metrics[name] = common.classification_metrics(logits, labels)
        outputs |= {f"{name}_logits": logits, f"{name}_labels": labels}
    return metrics, outputs


def run(config, data, directory, args, timing, teacher_record=None, teacher_logits=None):
    """Train, test and save one run; -> its record, as in run.json."""
    if not args.quiet:
        print(f"\n{common.run_name(config)}, seed {config['seed']}: {config['epochs']} epochs of "
              f"{len(data['train'][1]):,} digits in batches of {config['batch_size']}")
    models, history, snapshots, training_timing = train(config, data, args, teacher_logits)
    start = time.perf_counter()
    metrics, outputs = test_all(models["student"], data, args)
    outputs |= {"probe_epochs": list(snapshots), "probe_representations": torch.stack(list(snapshots.values())).cpu()}
    record = {"config": config,
              "data": {"source": config["data"], **{name: len(labels) for name, (_, labels) in data.items()}},
              "environment": common.describe_environment(args.device, args.amp, args.compile),
              "parameters": {role: count_parameters(model) for role, model in models.items()},
              "history": history, "metrics": metrics}
    if config["kd"] == "online":
        record["teacher_metrics"], teacher_outputs = test_all(models["teacher"], data, args)
        outputs |= {f"teacher_{name}": value for name, value in teacher_outputs.items() if name.endswith("logits")}
    elif config["kd"] == "offline":
        record["teacher_metrics"] = teacher_record["metrics"]
        record["parameters"]["teacher"] = teacher_record["parameters"]["student"]
    record["timing"] = {**timing, **training_timing, "evaluation": time.perf_counter() - start}
    common.save_run(directory, record, outputs, models["student"].state_dict(), args.force)
    if not args.quiet:
        print(f"written to {directory}")
    return record


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def parse_arguments(argv):
    description, commands = __doc__.split("\n\n")[:2]
    parser = common.OneLineParser(description=description, epilog=f"examples:\n{commands}", allow_abbrev=False,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_shared_arguments(parser, list(MODELS), default_student="mlp", default_temperature=f"{TEMPERATURE:g}")
    parser.add_argument("--data", choices=["auto", "mnist", "synthetic"], default="auto",
                        help="auto: MNIST if it is there or can be downloaded, else digits drawn here")
    parser.add_argument("--examples", type=common.number(int, 60, TRAIN_SIZE), default=TRAIN_SIZE,
                        help="training digits to use, and a sixth of it for each test (default: all %(default)s)")
    args = parser.parse_args(argv)
    common.check_shared_arguments(parser, args, TEMPERATURE)
    return args


def find_data(args):
    """-> (source, MNIST's tensors or None): what --data asks for, UserError where it can't be had."""
    if args.data_dir is not None and not args.data_dir.is_dir():
        raise common.UserError(f"--data-dir {args.data_dir}: no such folder; make it, or leave the flag out")
    if args.data == "synthetic":
        return "synthetic", None
    try:
        return "mnist", load_mnist(args.data_dir or "data", args.quiet)
    except FileNotFoundError as error:
        if args.data == "mnist":
            raise common.UserError(f"{error}: put its four files there, or use --data synthetic") from None
        print(f"\n*** WARNING: {error}.\n*** Using SYNTHETIC digits drawn here: "
              "no figure of this run is about MNIST.\n", file=sys.stderr, flush=True)
        return "synthetic", None


def plain_config(model, seed, source, args):
    """The configuration of a run without distillation; a teacher's configuration is this too."""
    recipe = {key: getattr(args, key, None) or value for key, value in RECIPES[model].items()}
    return {"task": "mnist", "data": source, "examples": args.examples, "student": model, "seed": seed, "kd": None,
            **recipe}


def print_table(record):
    """Accuracy, ECE and NLL of teacher and student on the three test sets."""
    config = record["config"]
    rows = [("student", config["student"], record["metrics"])]
    if config["kd"]:
        rows.insert(0, ("teacher", config["teacher"], record["teacher_metrics"]))
    print(f"\n{'data: ' + config['data']:<16}" + "".join(f"{name:<26}" for name in rows[0][2]))
    print(f"{'':<16}" + f"{'accuracy':<10}{'ECE':<8}{'NLL':<8}" * 3)
    for role, model, metrics in rows:
        print(f"{role + ' ' + model:<16}" + "".join(
            f"{m['accuracy']:<10.4f}{m['ece']:<8.4f}{m['nll']:<8.4f}" for m in metrics.values()))


def main(argv=None):
    args = parse_arguments(argv)
    args.device = common.choose_device(args.device)
    args.amp = common.has_bfloat16(args.device) if args.amp is None else args.amp
    start = time.perf_counter()
    source, mnist = find_data(args)
    root = args.out / ("mnist" if source == "mnist" else f"mnist-{source}")

    config = plain_config(args.student, args.seed, source, args)
    if args.kd:
        teacher_config = plain_config(args.teacher, args.teacher_seed, source, args)
        teacher_directory = root / args.teacher / f"seed{args.teacher_seed}"
        config |= {key: getattr(args, key) for key in ("kd", "teacher", "teacher_seed", "temperature", "alpha")}
        config |= {f"teacher_{key}": teacher_config[key] for key in RECIPES[args.teacher]}
    directory = root / common.run_name(config) / f"seed{args.seed}"
    record = common.finished_run(directory, config, args.force)
    if record is not None:
        if not args.quiet:
            environment = record["environment"]
            print(f"{directory} is finished already ({environment['finished']}, {environment['hardware']}, "
                  f"{environment['precision']}); --force repeats it")
            print_table(record)
        return

    # All that can be wrong is looked at before the first minute is spent.
    teacher_record = teacher_logits = None
    if args.kd == "offline":
        teacher = build_model(args.teacher, args.teacher_seed)
        remedy = "delete it to have the teacher trained again, or choose another --out"
        if teacher_record := common.finished_run(teacher_directory, teacher_config, remedy=remedy):
            common.load_weights(teacher, teacher_directory)
    common.check_writable(directory.parent)
    if not args.quiet:
        models = dict.fromkeys([args.student] + [args.teacher] * (args.kd is not None))
        sizes = (f"{name} {count_parameters(build_model(name, 0)):,} parameters" for name in models)
        print(f"models: {', '.join(sizes)}\ndevice: {args.device}, {'bfloat16' if args.amp else 'float32'}")
    data = make_data(source, args.examples, mnist, args.device)
    timing = {"data": time.perf_counter() - start, "teacher": 0.0, "teacher_logits": 0.0}
    if not args.quiet:
        print(f"data: {source}, " + ", ".join(f"{len(labels):,} {name}" for name, (_, labels) in data.items()))

    if args.kd == "offline":
        start = time.perf_counter()
        if teacher_record is None:
            teacher_record = run(teacher_config, data, teacher_directory, args, timing)
            common.load_weights(teacher, teacher_directory)
        timing["teacher"] = time.perf_counter() - start
        start = time.perf_counter()
        teacher_logits, _ = evaluate(place(teacher, args.device), data["train"][0], args.amp)
        timing["teacher_logits"] = time.perf_counter() - start
    record = run(config, data, directory, args, timing, teacher_record, teacher_logits)
    if not args.quiet:
        print_table(record)


if __name__ == "__main__":
    common.run_main(main)
