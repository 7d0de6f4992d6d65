"""What the scripts share: the KD loss, the metrics, names and files of runs. Copy what you need.

Metrics compute in double precision, on the device of their arguments, and return Python numbers.
"""

import argparse
import hashlib
import json
import math
import shlex
import shutil
import sys
import uuid
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


def kd_loss(student_logits, teacher_logits, labels, temperature=1.0, alpha=1.0):
    """alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) * CE(student)

    Hinton, Vinyals & Dean 2015 (arXiv 1503.02531), eq. 1 and sec. 2.1: the factor T^2 keeps the
    size of the gradient when T changes. Logits: (..., classes), labels: (...), int64; the leading
    dimensions, such as (batch, time), are flattened. Returns the mean over examples, a scalar in
    nats. Only the student gets a gradient. Rows that don't count, such as padding labelled -100,
    must be filtered out first: the KL term would count them. No rows give NaN. The loss is computed
    in the precision of the logits: cast bfloat16 to float32 before.
    """
    assert student_logits.shape == teacher_logits.shape == (*labels.shape, student_logits.shape[-1])
    student = student_logits.flatten(0, -2)
    teacher = teacher_logits.detach().flatten(0, -2)

    divergence = F.kl_div(
        F.log_softmax(student / temperature, dim=-1),
        F.log_softmax(teacher / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    loss = alpha * temperature**2 * divergence
    if alpha == 1:
        return loss
    return loss + (1 - alpha) * F.cross_entropy(student, labels.flatten())


# ---- Metrics of one model: logits or probabilities (examples, classes), labels (examples,) -------


def expected_calibration_error(probabilities, labels, n_bins=15):
    """Mean over examples of |accuracy - confidence| of the example's bin, 0..1.

    Guo et al. 2017 (arXiv 1706.04599), eq. 3: bins ((m-1)/n_bins, m/n_bins] of the top probability.
    """
    confidence, predictions = probabilities.double().max(dim=1)
    assert labels.shape == confidence.shape
    assert (probabilities.sum(dim=1) - 1).abs().max() < 0.01, "wants probabilities, not logits"
    correct = (predictions == labels).double()

    edges = torch.linspace(0, 1, n_bins + 1, dtype=torch.double, device=confidence.device)
    bins = torch.bucketize(confidence, edges[1:-1])  # a confidence on an edge is in the lower bin

    # |bin| / n * |acc(bin) - conf(bin)| is |sum over the bin of (correct - confidence)| / n.
    gaps = torch.bincount(bins, weights=correct - confidence, minlength=n_bins)
    return (gaps.abs().sum() / len(labels)).item()


def classification_metrics(logits, labels):
    """{"accuracy": 0..1, "ece": 0..1, "nll": mean negative log-likelihood in nats}.

    All are NaN where a logit is: argmax would take NaN for the most probable class.
    """
    logits = logits.double()
    probabilities = logits.softmax(dim=1)
    if probabilities.isnan().any():
        return {"accuracy": math.nan, "ece": math.nan, "nll": math.nan}
    return {
        "accuracy": (logits.argmax(dim=1) == labels).double().mean().item(),
        "ece": expected_calibration_error(probabilities, labels),
        "nll": F.cross_entropy(logits, labels).item(),
    }


# ---- Comparisons of two models -------------------------------------------------------------------


def error_consistency(predictions_a, predictions_b, labels):
    """Cohen's kappa of "is it right?": 1 same errors, 0 as by chance, below 0 opposite errors.

    Geirhos, Meding & Wichmann 2020 (arXiv 2006.16736), eq. 1-3. All arguments: (examples,). Models
    that are right on exactly the same examples get 1, also where neither makes an error: no NaN.
    """
    assert predictions_a.shape == predictions_b.shape == labels.shape == (len(labels),)
    correct_a = predictions_a == labels
    correct_b = predictions_b == labels
    accuracy_a = correct_a.double().mean().item()
    accuracy_b = correct_b.double().mean().item()

    observed = (correct_a == correct_b).double().mean().item()
    expected = accuracy_a * accuracy_b + (1 - accuracy_a) * (1 - accuracy_b)
    if observed == 1:
        return 1.0
    return (observed - expected) / (1 - expected)


def js_divergence(probabilities_a, probabilities_b):
    """Jensen-Shannon divergence in bits, mean over examples: 0 same, 1 disjoint.

    Lin 1991, "Divergence measures based on the Shannon entropy", eq. 4.1 with equal weights:
    entropy of the mean - mean of the entropies. Both: (..., classes), rows sum to 1.
    """
    assert probabilities_a.shape == probabilities_b.shape
    a = probabilities_a.double()
    b = probabilities_b.double()
    entropy = torch.special.entr  # -p ln p, 0 at 0
    nats = entropy((a + b) / 2) - (entropy(a) + entropy(b)) / 2
    bits = nats.sum(dim=-1).mean() / math.log(2)
    return bits.clamp(0, 1).item()


def rsa(representations_a, representations_b):
    """Representational similarity: 1 for a rotated or rescaled copy, towards 0 for unrelated ones.

    Abnar et al. 2020 (arXiv 2006.00555): each model's matrix of cosines between examples, then the
    cosine between equal rows of the two matrices, mean over rows. Nothing is centred, so
    representations after a ReLU start well above 0. A row holds the example's cosine with itself,
    always 1, which lifts small samples. Both: (examples, features), widths may differ.
    """
    return rsa_of_prepared(prepare_rsa(representations_a), prepare_rsa(representations_b))


def row_products(x, y):
    """Row i of X X' times row i of Y Y', (examples,): x_i' (X' Y) y_i, without these matrices."""
    return ((x @ (x.T @ y)) * y).sum(dim=1)


def prepare_rsa(representations):
    """What rsa needs of each side: unit vectors (examples, features), and the norm of each row of
    their matrix of cosines (examples,). Who compares many models does this once for each."""
    unit = F.normalize(representations.double(), dim=1)
    return unit, row_products(unit, unit).clamp(min=1e-24).sqrt()


def rsa_of_prepared(prepared_a, prepared_b):
    """rsa of what prepare_rsa has made of each side."""
    a, norms_a = prepared_a
    b, norms_b = prepared_b
    assert len(a) == len(b)
    return (row_products(a, b) / (norms_a * norms_b)).mean().item()


def linear_cka(representations_a, representations_b):
    """Linear centred kernel alignment: 1 for a rotated, rescaled, shifted copy; 0 if unrelated.

    Kornblith et al. 2019 (arXiv 1905.00414), eq. 3-5 with linear kernels, columns centred:
    |B'A|^2 / (|A'A| |B'B|), Frobenius norms. Both: (examples, features), widths may differ. Wants
    many more examples than features. NaN where one side is the same for all examples.
    """
    assert len(representations_a) == len(representations_b)
    a = representations_a.double()
    b = representations_b.double()
    a = a - a.mean(dim=0)
    b = b - b.mean(dim=0)
    norms = torch.linalg.norm(a.T @ a) * torch.linalg.norm(b.T @ b)
    return ((b.T @ a).square().sum() / norms).item()


# ---- A run is a folder with run.json (configuration, metrics), outputs.npz (logits), model.pt ----


def run_name(args, configure, flags):
    """cnn-to-mlp-temperature5: the models, the kind of distillation, then each of `flags` without
    which configure(args), all that the results depend on, would be another. So runs never collide.
    """
    name = args.student
    if args.kd:
        name = f"{args.teacher}-to-{args.student}"
    if args.kd and args.kd != "offline":
        name += f"-{args.kd}"

    for flag in flags:
        without = argparse.Namespace(**vars(args) | {flag: None})
        if configure(without) != configure(args):
            name += flag_in_name(flag, getattr(args, flag))
    return name


def flag_in_name(flag, value):
    """How a flag stands in a run's name: -temperature5, -teacher-seed7; -last for --answers."""
    if isinstance(value, str):
        return f"-{value}"
    return f"-{flag.replace('_', '-')}{value:.10g}"


def find_run(folder, config):
    """What run.json in `folder` says; None where no run is finished. Ends the program with one
    line where it can't be read, or belongs to another configuration."""
    if not (folder / "run.json").exists():
        return None
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        found = record["config"]
    except (OSError, ValueError, KeyError):
        sys.exit(f"error: {folder} is unreadable: delete it and run this again")

    for key in found | config:
        if found.get(key) != config.get(key):
            sys.exit(f"error: {folder} is another run, its {key} is {found.get(key)}, not "
                     f"{config.get(key)}: choose another --out, or delete it")
    return record


def environment(args, script):
    """What made a run, for run.json; `code` is a hash of the script and this file."""
    code = Path(script).read_bytes() + Path(__file__).read_bytes()
    return {
        "command": shlex.join(sys.argv),
        "torch": torch.__version__,
        "device": str(args.device),
        "precision": "bfloat16" if args.amp else "float32",
        "code": hashlib.sha256(code).hexdigest()[:8],
    }


def save_run(folder, record, outputs, model):
    """Write `record` to run.json, {name: array} to outputs.npz, the model's weights to model.pt:
    beside their place, then renamed, so that a run appears whole or not at all. Of two writers the
    first stays. NaN and infinity, which JSON has no words for, become null."""
    temporary = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    valid = json.loads(json.dumps(record), parse_constant=lambda _: None)
    weights = {name: value.cpu() for name, value in model.state_dict().items()}
    try:
        temporary.mkdir(parents=True)
        torch.save(weights, temporary / "model.pt")
        np.savez(temporary / "outputs.npz", **outputs)
        (temporary / "run.json").write_text(json.dumps(valid, indent=1) + "\n", encoding="utf-8")
        temporary.rename(folder)  # fails where a run is in place
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        if not (folder / "run.json").exists():
            sys.exit(f"error: can't write {folder} ({error}): choose another --out")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # nothing is left of an interrupted run


def load_weights(model, folder):
    """`model` with the weights in model.pt; ends the program with one line where they don't fit."""
    try:
        weights = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)
        model.load_state_dict(weights)
    except Exception:  # torch, pickle and zipfile have many words for damage
        sys.exit(f"error: {folder / 'model.pt'} is unreadable: delete {folder} and run this again")
    return model
