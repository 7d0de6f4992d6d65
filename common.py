"""What the scripts share: the KD loss, the metrics, run files, command-line flags, progress.

Nothing here knows a model or a data set. kd_loss and the metrics work alone with their imports.
Metrics compute in double precision, so they want tensors on the CPU.
"""

import argparse
import contextlib
import json
import math
import platform
import re
import shlex
import shutil
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


# ---- Knowledge distillation --------------------------------------------------------------------


def kd_loss(student_logits, teacher_logits, labels, temperature=1.0, alpha=1.0):
    """alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) * CE(student)

    Hinton, Vinyals & Dean 2015 (arXiv 1503.02531), eq. 1 and sec. 2.1: the factor T^2 keeps the
    size of the gradient when T changes. Logits: (examples, classes), labels: (examples,) int64.
    Returns the mean over examples, a scalar in nats. Only the student gets a gradient.
    """
    loss = (1 - alpha) * F.cross_entropy(student_logits, labels) if alpha < 1 else 0
    if temperature != 1:  # with a vocabulary of 10,000 words dividing by 1 would take its time
        student_logits, teacher_logits = student_logits / temperature, teacher_logits / temperature
    student_log_probabilities = F.log_softmax(student_logits, dim=1)
    teacher_log_probabilities = F.log_softmax(teacher_logits.detach(), dim=1)
    divergence = F.kl_div(student_log_probabilities, teacher_log_probabilities,
                          reduction="batchmean", log_target=True)
    return loss + alpha * temperature**2 * divergence


# ---- Metrics of one model ----------------------------------------------------------------------


def expected_calibration_error(probabilities, labels, n_bins=15):
    """Mean over examples of |accuracy - confidence| of the example's bin, 0..1.

    Guo et al. 2017 (arXiv 1706.04599), eq. 3: bins ((m-1)/n_bins, m/n_bins] of the top probability.
    probabilities: (examples, classes), rows sum to 1. labels: (examples,).
    """
    confidence, predictions = probabilities.double().max(dim=1)
    upper_edges = torch.linspace(0, 1, n_bins + 1, dtype=torch.double)[1:-1]
    bins = torch.bucketize(confidence, upper_edges)
    # |bin| / n * |acc(bin) - conf(bin)| is |sum over the bin of (confidence - correct)| / n.
    excess = confidence - (predictions == labels).double()
    gaps = torch.bincount(bins, weights=excess, minlength=n_bins)
    return (gaps.abs().sum() / len(labels)).item()


def classification_metrics(logits, labels):
    """Accuracy (0..1), ECE (0..1), mean negative log-likelihood (nats) and number of examples.

    logits: (examples, classes). labels: (examples,).
    """
    logits = logits.double()
    return {
        "accuracy": (logits.argmax(dim=1) == labels).double().mean().item(),
        "ece": expected_calibration_error(logits.softmax(dim=1), labels),
        "nll": F.cross_entropy(logits, labels).item(),
        "n": len(labels),
    }


# ---- Comparisons of two models -----------------------------------------------------------------


def error_consistency(predictions_a, predictions_b, labels):
    """Cohen's kappa of "is it right?": 1 same errors, 0 as by chance, below 0 opposite errors.

    Geirhos, Meding & Wichmann 2020 (arXiv 2006.16736), eq. 1-3. All arguments: (examples,).
    Two models that are right on exactly the same examples get 1, also where neither makes an error
    (the convention of the authors' code): no NaN.
    """
    correct_a = (predictions_a == labels).double()
    correct_b = (predictions_b == labels).double()
    accuracy_a, accuracy_b = correct_a.mean().item(), correct_b.mean().item()
    observed = (correct_a == correct_b).double().mean().item()
    expected = accuracy_a * accuracy_b + (1 - accuracy_a) * (1 - accuracy_b)
    return 1.0 if observed == 1 else (observed - expected) / (1 - expected)


def js_divergence(probabilities_a, probabilities_b):
    """Jensen-Shannon divergence in bits, mean over examples: 0 same, 1 disjoint.

    Lin 1991, "Divergence measures based on the Shannon entropy", eq. 4.1 with equal weights:
    entropy of the mean - mean of the entropies. Both: (examples, classes), rows sum to 1.
    """
    a, b, entropy = probabilities_a.double(), probabilities_b.double(), torch.special.entr
    nats = (entropy((a + b) / 2) - (entropy(a) + entropy(b)) / 2).sum(dim=1).mean()
    return (nats / math.log(2)).clamp(0, 1).item()


def rsa(representations_a, representations_b):
    """Representational similarity: 1 for a rotated or rescaled copy, towards 0 for unrelated ones.

    Abnar et al. 2020 (arXiv 2006.00555): each model's matrix of cosines between examples, then the
    cosine between equal rows of the two matrices, mean over rows. Nothing is centred, so
    representations after a ReLU start well above 0. Both: (examples, features), widths may differ.
    """

    def row_products(x, y):
        # Row i of x's matrix is X x_i. Its product with row i of y's matrix is x_i' (X' Y) y_i,
        # so that the (examples, examples) matrices themselves are never needed.
        return ((x @ (x.T @ y)) * y).sum(dim=1)

    a = F.normalize(representations_a.double(), dim=1)
    b = F.normalize(representations_b.double(), dim=1)
    norms = (row_products(a, a) * row_products(b, b)).clamp(min=1e-24).sqrt()
    return (row_products(a, b) / norms).mean().item()


def linear_cka(representations_a, representations_b):
    """Linear centred kernel alignment: 1 for a rotated, rescaled, shifted copy; 0 if unrelated.

    Kornblith et al. 2019 (arXiv 1905.00414), eq. 3-5 with linear kernels, columns centred:
    |B'A|^2 / (|A'A| |B'B|), Frobenius norms. Both: (examples, features), widths may differ. Wants
    many more examples than features. NaN where one side is the same for all examples.
    """
    a = representations_a.double() - representations_a.double().mean(dim=0)
    b = representations_b.double() - representations_b.double().mean(dim=0)
    norms = torch.linalg.norm(a.T @ a) * torch.linalg.norm(b.T @ b)
    return ((b.T @ a).square().sum() / norms).item()


# ---- Run files: <out>/<task>-<data>/<run name>/seed<k>/ with run.json, outputs.npz and model.pt


DISTILLATION = ("kd", "teacher", "teacher_seed", "temperature", "alpha")  # flags, and in `config`


class UserError(Exception):
    """Something that the person at the keyboard can mend; its text is the one line they see."""


def run_name(config):
    """mlp, cnn-to-mlp (offline distillation) or cnn-to-mlp-online."""
    if config["kd"] is None:
        return config["student"]
    name = f"{config['teacher']}-to-{config['student']}"
    return f"{name}-online" if config["kd"] == "online" else name


def taught_config(student, teacher, args):
    """The configuration of a taught run, from the plain ones of the student and the teacher."""
    if args.kd == "online":  # both models train in the student's batches
        teacher = teacher | {key: student[key] for key in ("epochs", "batch_size")}
    recipe = ("epochs", "batch_size", "lr", "weight_decay")
    return (student | {key: getattr(args, key) for key in DISTILLATION}
            | {f"teacher_{key}": teacher[key] for key in recipe})


def write_json(path, value, **float_hook):
    """Write `value` as JSON. NaN and infinity, which are not JSON, become null."""
    plain = json.loads(json.dumps(value), parse_constant=lambda _: None, **float_hook)
    Path(path).write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


def save_run(directory, record, outputs, state_dict, force=False):
    """Write a run: record to run.json, {name: tensor} to outputs.npz and to model.pt.

    The run is written into a folder beside its place, which is then renamed: it appears whole or
    not at all. Of two writers the first stays, unless `force` replaces it. UserError where there
    is no room, no permission, or by now a run of another configuration.
    """
    directory = Path(directory)
    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    replaced = directory.with_name(f"{temporary.name}.old")
    try:
        temporary.mkdir(parents=True)
        weights = {name: tensor.cpu() for name, tensor in state_dict.items()}
        torch.save(weights, temporary / "model.pt")
        np.savez(temporary / "outputs.npz", **{name: np.asarray(v) for name, v in outputs.items()})
        write_json(temporary / "run.json", record)
        if directory.exists() and (force or load_run(directory) is None):
            directory.rename(replaced)
        temporary.rename(directory)  # fails where a run is in place
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        if finished_run(directory, record["config"], force) is None:
            reason = str(error).splitlines()[0]
            raise UserError(f"can't write {directory} ({reason}): choose another --out") from None
    finally:
        if replaced.exists() and not directory.exists():
            replaced.rename(directory)  # interrupted between the two: the old run stays
        for leftover in (temporary, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def reading(path):
    """UserError for whatever goes wrong when a file of a run is read."""
    try:
        yield
    except Exception as error:  # json, zipfile, pickle and torch have their own words for damage
        raise UserError(f"{path} is missing, damaged or of another model ({type(error).__name__}); "
                        f"delete {path.parent} and run it again") from None


def load_run(directory):
    """The dictionary in run.json; None where there is no finished run; UserError if damaged."""
    path = Path(directory) / "run.json"
    if not path.is_file():
        return None
    with reading(path):
        record = json.loads(path.read_text(encoding="utf-8"))
        record["config"]["student"], record["metrics"]
        return record


def load_outputs(directory):
    """The arrays in outputs.npz as {name: tensor}; UserError where it is missing or damaged."""
    path = Path(directory) / "outputs.npz"
    with reading(path), np.load(path) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def load_weights(model, directory):
    """`model` with the weights in model.pt; UserError where they are missing or don't fit."""
    path = Path(directory) / "model.pt"
    with reading(path):
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model


def finished_run(directory, config, force=False):
    """The record of the finished run of this configuration; None where it is still to be made.

    UserError, naming the fields, where a run of another configuration is in its place. `force`
    overlooks any run.
    """
    record = None if force else load_run(directory)
    if record is None:
        return None
    found = record["config"]
    differences = [f"{key} is {found.get(key)}, not {config.get(key)}"
                   for key in sorted({*config, *found}) if found.get(key) != config.get(key)]
    if differences:
        raise UserError(f"{directory} holds a run of another configuration "
                        f"({'; '.join(differences)}): choose another --out, or delete it")
    return record


def print_table(record, directory, titles):
    """Metrics of teacher, student and the student's untaught twin, a block for each test set.

    Where the twin's run isn't there, the command that makes it. directory: the student's. titles:
    {metric: column title}; metrics without a value are left out.
    """
    config = record["config"]
    rows, twin = {f"student {config['student']}": record["metrics"]}, None
    if config["kd"]:
        twin = load_run(directory.parents[1] / config["student"] / directory.name)
        if twin and not twin["config"].items() <= (config | {"kd": None}).items():
            twin = None  # trained in another way
        rows = {f"teacher {config['teacher']}": record["teacher_metrics"]} | rows
    if twin:
        rows[f"untaught {config['student']}"] = twin["metrics"]
    for test, metrics in record["metrics"].items():
        known = [name for name in titles if metrics.get(name) is not None]
        print(f"\n{config['data'] + ', ' + test:<32}"
              + "".join(f"{titles[name]:<12}" for name in known))
        for label, tests in rows.items():
            values = [tests[test][name] for name in known]
            cells = ("-" if value is None else f"{value:.4f}" for value in values)
            print(f"{label:<32}" + "".join(f"{cell:<12}" for cell in cells))
    if config["kd"] and not twin:
        command = re.sub(r" --(kd([ =](offline|online))?|force|every-word"
                         r"|(teacher|teacher-seed|temperature|alpha)[ =]\S+)(?= |$)", "",
                         command_line())
        print(f"\nto see what teaching changed, train the untaught twin: python {command}")


# ---- Device, precision -------------------------------------------------------------------------


def choose_device(name):
    """The torch device `name`; "auto": an accelerator if there is one. UserError if absent."""
    if name == "auto" and torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    name = "cpu" if name == "auto" else name
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name}: there is no such device here; leave it out") from None


def has_bfloat16(device):
    """Whether the hardware multiplies bfloat16 (elsewhere it is slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def command_line():
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def describe_environment(device, precision):
    """Versions, hardware and precision, for run.json."""
    on_gpu = device.type == "cuda"
    return {
        "command": command_line(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": str(device),
        "hardware": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


# ---- Command line ------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line on stderr, with exit code 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help shows all flags)\n")


def number(kind, low, high=10**9):
    """An argparse type: a number of `kind` (int or float) in low..high."""

    def parse(text):
        value = kind(text)  # argparse has a line for text that is no number
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in {low:g}..{high:g}")
        return value

    parse.__name__ = "number" if kind is float else "whole number"
    return parse


def make_parser(documentation):
    """A parser whose help is the first two paragraphs of a script's documentation."""
    description, commands = documentation.split("\n\n")[:2]
    return OneLineParser(description=description, epilog=f"examples:\n{commands}",
                         formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)


def add_shared_arguments(parser, models, student, temperature):
    """The flags of both training scripts. student, temperature: what --help gives as default."""
    add = parser.add_argument
    recipe = "for student and teacher (default: the model's recipe)"
    add("--student", choices=models, default=student,
        help="model to train (default: %(default)s)")
    add("--teacher", choices=models,
        help="model to learn from, needs --kd (default: the student's kind)")
    add("--kd", nargs="?", const="offline", choices=["offline", "online"],
        help="distil: from a trained teacher (plain --kd), or online, both trained together")
    add("--temperature", type=number(float, 1e-3),
        help=f"softens both outputs in the KD loss (default: {temperature})")
    add("--alpha", type=number(float, 0, 1),
        help="share of the KD loss, the rest is cross-entropy (default: 1)")
    add("--epochs", type=number(int, 1), help=recipe)
    add("--batch-size", type=number(int, 2), help=recipe)
    add("--lr", type=number(float, 1e-9), help=f"peak learning rate, {recipe}")
    add("--seed", type=number(int, 0, 2**31), default=0,
        help="initialisation and data order (default: %(default)s)")
    add("--teacher-seed", type=number(int, 0, 2**31), help="the teacher's seed (default: seed + 1)")
    add("--data-dir", type=Path, default=Path("data"),
        help="folder with the data (default: %(default)s)")
    add("--out", type=Path, default=Path("runs"), help="folder for runs (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    add("--amp", action=argparse.BooleanOptionalAction,
        help="compute in bfloat16 (default: where the hardware multiplies it)")
    add("--force", action="store_true", help="replace a finished run")
    add("--quiet", action="store_true", help="print nothing but warnings and errors")


def check_shared_arguments(parser, args, temperature):
    """Fill in defaults that depend on other flags; refuse flags that would have no effect."""
    defaults = args.kd, args.student, args.seed + 1, temperature, 1.0
    for name, default in zip(DISTILLATION, defaults):
        if args.kd is None and getattr(args, name) is not None:
            flag = name.replace("_", "-")
            parser.error(f"--{flag} has no effect without --kd: add --kd to distil")
        if args.kd and getattr(args, name) is None:
            setattr(args, name, default)
    if args.teacher == args.student and args.teacher_seed == args.seed:
        parser.error("--teacher-seed: with the student's own seed the teacher would be its twin")


def run_main(main, argv=None):
    """Call main(argv). One line and exit code 2 for what the user can mend, 130 for Ctrl-C."""
    sys.stdout.reconfigure(errors="replace")  # some terminals have no ±
    try:
        main(argv)
    except (UserError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted: the unfinished run is not kept, finished ones are", file=sys.stderr)
        sys.exit(130)


class Progress:
    """A line per epoch with the time left; on a terminal also a counter within the epoch."""

    def __init__(self, epochs, quiet=False):
        self.epochs, self.quiet = epochs, quiet
        self.live = not quiet and sys.stdout.isatty()
        self.start = self.last_shown = time.perf_counter()

    def step(self, epoch, done, total):
        """After `done` of `total` batches of epoch `epoch` (from 1)."""
        if self.live and time.perf_counter() - self.last_shown > 0.5:
            self.last_shown = time.perf_counter()
            print(f"\r  epoch {epoch}/{self.epochs}  batch {done}/{total} ", end="", flush=True)

    def epoch(self, epoch, loss, validation_accuracy, seconds):
        """After epoch `epoch` (from 1)."""
        if self.quiet:
            return
        left = (time.perf_counter() - self.start) / epoch * (self.epochs - epoch)
        start_of_line = "\r" if self.live else ""
        print(f"{start_of_line}  epoch {epoch:>3}/{self.epochs}   loss {loss:8.4f}   validation "
              f"accuracy {validation_accuracy:.4f}   {seconds:6.1f} s   {left:5.0f} s left",
              flush=True)
