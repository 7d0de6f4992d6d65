"""What the training scripts and the analysis share: the KD loss, the metrics, run files, arguments, progress.

Everything here takes torch tensors and gives tensors or plain Python numbers, and nothing here knows a model or a
data set. To use a part elsewhere, copy the function: none needs more than the imports below.
"""

import argparse
import contextlib
import io
import json
import math
import os
import platform
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


# ----------------------------------------------------------------------------------------------------------------------
# Knowledge distillation


def kd_loss(student_logits, teacher_logits, labels, temperature=1.0, alpha=1.0, mask=None):
    """Knowledge distillation loss, a scalar tensor, mean over examples (or over the unmasked positions).

        alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) * CE(student, label)

    Hinton, Vinyals & Dean 2015 (arXiv 1503.02531), eq. 1 for the softened probabilities and sec. 2.1 for the factor
    T^2, which keeps the size of the gradient when T changes. Gradients flow into the student alone.

    student_logits, teacher_logits: (..., classes). labels: (...), int64, unused where alpha = 1 (None will do); the
    teacher's logits are unused where alpha = 0. mask: (...), true where a position counts; the others add neither
    loss nor gradient, whatever they hold. An empty selection gives 0. temperature > 0, alpha in 0..1.
    """
    if not temperature > 0 or not 0 <= alpha <= 1:
        raise ValueError(f"kd_loss needs temperature > 0 and alpha in 0..1, got {temperature} and {alpha}")
    if alpha > 0 and student_logits.shape != teacher_logits.shape:
        raise ValueError(f"student and teacher logits differ: {student_logits.shape}, {teacher_logits.shape}")
    if mask is not None:
        mask = mask.bool()
        student_logits, teacher_logits, labels = (t if t is None else t[mask]
                                                  for t in (student_logits, teacher_logits, labels))
    student_logits = student_logits.float()
    examples = max(student_logits.shape[:-1].numel(), 1)
    soft = hard = 0.0
    if alpha > 0:
        teacher_probabilities = F.softmax(teacher_logits.detach().float() / temperature, dim=-1)
        student_log_probabilities = F.log_softmax(student_logits / temperature, dim=-1)
        # Probabilities, not log-probabilities, as the target: kl_div then takes 0 log 0 as 0 (a one-hot teacher).
        divergence = F.kl_div(student_log_probabilities, teacher_probabilities, reduction="sum")
        soft = divergence * (alpha * temperature**2 / examples)
    if alpha < 1:
        flat_logits = student_logits.reshape(-1, student_logits.shape[-1])
        cross_entropy = F.cross_entropy(flat_logits, labels.reshape(-1), reduction="sum")
        hard = cross_entropy * ((1 - alpha) / examples)
    return soft + hard if 0 < alpha < 1 else soft if alpha > 0 else hard


# ----------------------------------------------------------------------------------------------------------------------
# Metrics


def expected_calibration_error(probabilities, labels, n_bins=15):
    """Expected calibration error in 0..1: the mean over examples of |accuracy - confidence| of the example's bin.

    Guo et al. 2017 (arXiv 1706.04599), eq. 3: equal-width bins ((m-1)/n_bins, m/n_bins] of the top probability.
    probabilities: (examples, classes), rows sum to 1. labels: (examples,). NaN where there are no examples.
    """
    confidence, predictions = probabilities.double().max(dim=1)
    upper_edges = torch.linspace(0, 1, n_bins + 1, dtype=torch.double, device=confidence.device)[1:-1]
    bins = torch.bucketize(confidence, upper_edges)  # upper edge included, as in the paper
    excess = confidence - (predictions == labels).double()
    # |bin| / n * |acc(bin) - conf(bin)| is |sum of (confidence - correct) over the bin| / n.
    return (torch.zeros(n_bins, dtype=torch.double, device=bins.device).index_add_(0, bins, excess).abs().sum()
            / len(labels)).item()


def classification_metrics(logits, labels):
    """Accuracy (0..1), ECE (0..1) and mean negative log-likelihood (nats) of `logits` (examples, classes), and n."""
    logits = logits.double()
    return {"accuracy": (logits.argmax(dim=1) == labels).double().mean().item(),
            "ece": expected_calibration_error(logits.softmax(dim=1), labels),
            "nll": F.cross_entropy(logits, labels).item(),
            "n": len(labels)}


def error_consistency(predictions_a, predictions_b, labels):
    """Cohen's kappa of "is it right?" between two models: 1 same errors, 0 as by chance, below 0 opposite errors.

    Geirhos, Meding & Wichmann 2020 (arXiv 2006.16736), eq. 1-3. All arguments (examples,). Where both models are
    right and wrong on exactly the same examples the answer is 1, also where chance alone would give that (two models
    without an error): the convention of the authors' code, and no NaN.
    """
    correct_a, correct_b = (predictions_a == labels).double(), (predictions_b == labels).double()
    observed = (correct_a == correct_b).double().mean().item()
    accuracy_a, accuracy_b = correct_a.mean().item(), correct_b.mean().item()
    expected = accuracy_a * accuracy_b + (1 - accuracy_a) * (1 - accuracy_b)
    return 1.0 if observed == 1 else (observed - expected) / (1 - expected)


def js_divergence(probabilities_a, probabilities_b):
    """Jensen-Shannon divergence in bits (0 same, 1 disjoint), mean over examples.

    Lin 1991, "Divergence measures based on the Shannon entropy", eq. 4.1 with equal weights and logarithms of base 2:
    H(mean of the two) - mean of the two H. Both arguments (examples, classes), rows sum to 1.
    """
    a, b = probabilities_a.double(), probabilities_b.double()

    def entropy(p):
        return -torch.special.xlogy(p, p).sum(dim=1) / math.log(2)

    return (entropy((a + b) / 2) - (entropy(a) + entropy(b)) / 2).mean().clamp(0, 1).item()


def rsa(representations_a, representations_b):
    """Representational similarity: 1 for a rotated or rescaled copy, towards 0 for unrelated zero-mean ones.

    As in Abnar et al. 2020 (arXiv 2006.00555): each model's matrix of cosine similarities between examples, then the
    cosine between matching rows of the two matrices, mean over rows. Nothing is centred and the diagonal counts, so
    all-positive representations (after a ReLU) start well above 0: compare values, don't read one alone.
    Both arguments (examples, features); the numbers of features may differ.
    """
    similarities = []
    for representations in (representations_a, representations_b):
        unit = F.normalize(representations.double(), dim=1)
        similarities.append(unit @ unit.T)  # (examples, examples)
    return F.cosine_similarity(*similarities, dim=1).mean().item()


def linear_cka(representations_a, representations_b):
    """Linear centred kernel alignment, 0..1: 1 for a rotated, rescaled or shifted copy, near 0 for unrelated ones.

    Kornblith et al. 2019 (arXiv 1905.00414), eq. 3-5 with linear kernels: |B'A|^2 / (|A'A| |B'B|), Frobenius norms,
    columns centred. Both arguments (examples, features), widths may differ; wants many more examples than features
    (it is biased upwards else). NaN where one side is the same for all examples.
    """
    a, b = (x.double() - x.double().mean(dim=0) for x in (representations_a, representations_b))
    return ((b.T @ a).square().sum() / (torch.linalg.norm(a.T @ a) * torch.linalg.norm(b.T @ b))).item()


# ----------------------------------------------------------------------------------------------------------------------
# Run files: <out>/<task>-<data>/<run name>/seed<k>/ with run.json, outputs.npz and model.pt


class UserError(Exception):
    """Something the person at the keyboard can mend; its text is the one line they get to see."""


def run_name(config):
    """mlp, cnn-to-mlp (offline distillation) or cnn-to-mlp-online."""
    if config["kd"] is None:
        return config["student"]
    return f"{config['teacher']}-to-{config['student']}" + ("-online" if config["kd"] == "online" else "")


def check_writable(directory, flag="--out"):
    """Make `directory`, which came with `flag`, and prove that a file can be written there; UserError if not."""
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(f"can't write to {directory} ({error.strerror}); choose another folder with {flag}") from None


def write_files(directory, contents):
    """Write {file name: bytes} into `directory`; UserError, with nothing changed, where there is no room or permission.

    Of several files the last goes first and comes last: while it is there, all are, and they belong together.
    """
    directory = Path(directory)
    temporary = {name: directory / f".{name}.{os.getpid()}.tmp" for name in contents}
    *others, last = contents
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            temporary[name].write_bytes(content)
        if others:
            (directory / last).unlink(missing_ok=True)
        for name in contents:
            os.replace(temporary[name], directory / name)
    except OSError as error:
        raise UserError(f"can't write to {directory} ({error.strerror}); nothing was changed there") from None
    finally:
        with contextlib.suppress(OSError):  # of a disk that is read-only by now
            for path in temporary.values():
                path.unlink(missing_ok=True)


def save_run(directory, record, outputs, state_dict, force=False):
    """Write model.pt, outputs.npz and, last, run.json: a run exists if and only if its run.json does.

    record: what json can write. outputs: {name: tensor or array}. state_dict: {name: tensor}. A run of this
    configuration that another process has finished meanwhile is kept, unless `force`; UserError for one of another.
    """
    if finished_run(directory, record["config"], force) is not None:
        return
    model, arrays = io.BytesIO(), io.BytesIO()  # torch has its own words for a full disk, so it doesn't get to see it
    torch.save({name: tensor.cpu() for name, tensor in state_dict.items()}, model)
    np.savez(arrays, **{name: np.asarray(value) for name, value in outputs.items()})
    write_files(directory, {"model.pt": model.getbuffer(), "outputs.npz": arrays.getbuffer(),
                            "run.json": json_bytes(record, indent=1)})


def json_bytes(value, digits=None, indent=None):
    """`value` as JSON in UTF-8: NaN and infinity, which only Python reads, as null, floats rounded to `digits`."""
    def plain(value):
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if isinstance(value, float):
            return None if not math.isfinite(value) else value if digits is None else round(value, digits)
        return value

    return json.dumps(plain(value), indent=indent, allow_nan=False).encode()


def load_run(directory):
    """The dictionary in run.json, or None where there is no finished run; UserError where it can't be read."""
    path = Path(directory) / "run.json"
    try:
        record = json.loads(path.read_bytes())
        if not all(isinstance(record[key], dict) for key in ("config", "metrics")):
            raise ValueError
        return record
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; delete {directory} and run it again") from None


def load_outputs(directory):
    """The arrays in outputs.npz as {name: array}; UserError where it is missing or damaged."""
    try:
        with np.load(Path(directory) / "outputs.npz", allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # zipfile, zlib, numpy and the file system all have their own words for it
        raise UserError(f"{directory}/outputs.npz is missing or damaged ({type(error).__name__})") from None


def load_weights(model, directory):
    """Load model.pt into `model`; UserError where it is missing, damaged or of another architecture."""
    try:
        model.load_state_dict(torch.load(Path(directory) / "model.pt", map_location="cpu", weights_only=True))
    except Exception as error:  # pickle, zipfile, torch and the file system all have their own words for it
        raise UserError(f"{directory}/model.pt is missing, damaged or of another model ({type(error).__name__}); "
                        f"delete {directory} and train it again") from None
    return model


def find_runs(root):
    """Sorted folders of the finished runs below `root`."""
    return sorted(path.parent for path in Path(root).glob("**/run.json"))


def finished_run(directory, config, force=False, remedy="--force to replace it, or another --out"):
    """The record of the finished run of exactly this configuration, or None where it is still to be made.

    UserError, naming the fields, where a run of another configuration is in its place; `force` overlooks any run.
    """
    record = None if force else load_run(directory)
    if record is not None:
        found = record["config"]
        differences = [f"{key} is {found.get(key)}, not {config.get(key)}"
                       for key in sorted({*config, *found}) if found.get(key) != config.get(key)]
        if differences:
            raise UserError(f"{directory} holds a run of another configuration ({'; '.join(differences)}): {remedy}")
    return record


# ----------------------------------------------------------------------------------------------------------------------
# Seeds, device, precision


def seed_everything(seed):
    """Seed Python, numpy and torch (all devices), so that what follows depends on `seed` alone."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def choose_device(name="auto"):
    """The torch device called `name`; for "auto" the best there is: cuda, then mps, then cpu. UserError if absent."""
    present = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    try:
        device = torch.device(present[0] if name == "auto" else name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such device; choose from auto, {', '.join(present)}") from None
    if device.type not in present or (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise UserError(f"--device {name}: there is none on this machine; leave --device out or choose from "
                        f"{', '.join(present)}")
    return device


def has_bfloat16(device):
    """Whether the processor behind `device` multiplies bfloat16 in hardware (elsewhere it is slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def describe_environment(device, amp, compiled):
    """Versions, hardware and precision, for run.json."""
    on_gpu = device.type == "cuda"
    hardware = torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine()
    return {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), "python": platform.python_version(),
            "torch": torch.__version__, "numpy": np.__version__, "platform": platform.platform(),
            "device": str(device), "hardware": hardware, "threads": torch.get_num_threads(),
            "precision": "bfloat16" if amp else "float32", "compiled": compiled,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


# ----------------------------------------------------------------------------------------------------------------------
# Command line


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line on stderr (and exit code 2), without the usage text before it."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help shows all flags)\n")


def number(kind, low, high=math.inf, above=False):
    """An argparse type: a finite `kind` (int or float) in low..high, or above low where `above`."""
    wanted = ("a whole number " if kind is int else "a number ") + (
        f"above {low}" if above else f"in {low}..{high}" if high < math.inf else f"of at least {low}")

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or not value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text!r}")
        return value

    return parse


def add_shared_arguments(parser, models, default_student, default_temperature):
    """The flags both training scripts have, with the same meaning in both."""
    add = parser.add_argument
    add("--student", choices=models, default=default_student, help="model to train (default: %(default)s)")
    add("--teacher", choices=models, help="model to learn from; needs --kd (default with --kd: the student's kind)")
    add("--kd", nargs="?", const="offline", choices=["offline", "online"],
        help="distil: offline from a trained teacher (plain --kd), or online, both trained together")
    add("--temperature", type=number(float, 0, above=True),
        help=f"softens both outputs in the KD loss (default: {default_temperature})")
    add("--alpha", type=number(float, 0, 1), help="share of the KD loss, the rest is cross-entropy (default: 1)")
    add("--epochs", type=number(int, 1), help="of student and teacher (default: each model's recipe)")
    add("--batch-size", type=number(int, 2), help="of student and teacher (default: each model's recipe)")
    add("--lr", type=number(float, 0, above=True), help="peak learning rate, likewise")
    add("--seed", type=number(int, 0, 2**31), default=0, help="initialisation and data order (default: %(default)s)")
    add("--teacher-seed", type=number(int, 0, 2**31), help="the teacher's seed (default: seed + 1)")
    add("--data-dir", type=Path, help="folder with the data (default: data)")
    add("--out", type=Path, default=Path("runs"), help="folder for the runs (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 (default: where the hardware multiplies it)")
    add("--compile", action="store_true", help="torch.compile the models")
    add("--force", action="store_true", help="replace a finished run")
    add("--quiet", action="store_true", help="print nothing but warnings and errors")


def check_shared_arguments(parser, args, default_temperature):
    """Fill in what depends on other flags; a one-line error for flags that would be without effect."""
    if args.kd is None:
        for flag in ("teacher", "temperature", "alpha", "teacher_seed"):
            if getattr(args, flag) is not None:
                parser.error(f"--{flag.replace('_', '-')} has no effect without --kd: add --kd to distil")
        return
    args.teacher = args.teacher or args.student
    args.temperature = default_temperature if args.temperature is None else args.temperature
    args.alpha = 1.0 if args.alpha is None else args.alpha
    args.teacher_seed = args.seed + 1 if args.teacher_seed is None else args.teacher_seed
    if args.teacher == args.student and args.teacher_seed == args.seed:
        parser.error("--teacher-seed: with the student's own seed the teacher would be its twin; choose another")


def run_main(main, argv=None):
    """Call main(argv); end what the user can mend in one line and exit code 2, Ctrl-C in 130, a closed pipe in 141."""
    sys.stdout.reconfigure(errors="replace")  # where the locale has no ±, the tables come all the same
    try:
        main(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, head say, has seen enough; what is left unwritten must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):  # no compiler, say
            error = UserError(f"--compile doesn't work here ({type(error).__name__}); leave it out")
        if not isinstance(error, (UserError, OSError)):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted: the unfinished run is not kept, finished ones are", file=sys.stderr)
        sys.exit(130)


class Progress:
    """A line per epoch with the time left, and a live counter within the epoch where stdout is a terminal."""

    def __init__(self, epochs, quiet=False):
        self.epochs, self.quiet = epochs, quiet
        self.live = not quiet and sys.stdout.isatty()
        self.start = self.last_shown = time.perf_counter()

    def step(self, epoch, done, total):
        """Within epoch `epoch` (from 1), after `done` of `total` batches."""
        if self.live and time.perf_counter() - self.last_shown > 0.5:
            self.last_shown = time.perf_counter()
            print(f"\r  epoch {epoch}/{self.epochs}  batch {done}/{total} ", end="", flush=True)

    def epoch(self, epoch, loss, validation_accuracy, seconds):
        """After epoch `epoch` (from 1)."""
        if not self.quiet:
            left = (time.perf_counter() - self.start) / epoch * (self.epochs - epoch)
            start_of_line = "\r" if self.live else ""
            print(f"{start_of_line}  epoch {epoch:>3}/{self.epochs}   loss {loss:8.4f}   "
                  f"validation accuracy {validation_accuracy:.4f}   {seconds:6.1f} s   {left:5.0f} s left", flush=True)
