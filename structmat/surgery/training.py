"""What a training loop calls to go from dense to structured weights by degrees, with the dense model as a teacher."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from structmat._checks import check_inexact, check_int, check_tensor
from structmat.nn import StructuredLinear
from structmat.surgery.allocation import Rule, allocate
from structmat.surgery.carry import carry_optimizer, linear_layers
from structmat.surgery.densify import densify_
from structmat.surgery.replace import compress_
from structmat.surgery.report import Report
from structmat.surgery.selection import Configs, FilterFn, check_model, module_names
from structmat.surgery.swap import swap


# ---------------------------------------------------------------- gradual schedule
def gradual_ratio(step: int, start: int, end: int, final: float, levels: int = 4) -> float:
    """The share of parameters to keep at a step: 1 before ``start``, falling in ``levels`` steps to ``final``.

    At level k = 1, ..., levels it is final + (1 - final) (1 - k / levels)^3, the cubic schedule of Zhu and Gupta 2017
    ("To prune, or not to prune"), which removes most early, when there is most to spare. The first level begins at
    ``start``, the last at ``end``, the others at equal distances.

    Args:
        step: of the training loop.
        start: the step of the first level.
        end: the step of the last, above ``start``.
        final: the last ratio, in (0, 1].
        levels: how many ratios below 1; with 1, ``final`` holds from ``start`` on.

    Raises:
        TypeError: if a count is not an integer.
        ValueError: if a number is out of range.

    Example:
        >>> from structmat import surgery
        >>> [round(surgery.gradual_ratio(step, 10, 40, final=0.2), 4) for step in (9, 10, 20, 30, 40, 99)]
        [1.0, 0.5375, 0.3, 0.2125, 0.2, 0.2]
    """
    check_int("step", step, 0)
    check_int("start", start, 0)
    check_int("end", end, start + 1)
    check_int("levels", levels)
    if not isinstance(final, (int, float)) or not 0 < final <= 1:
        raise ValueError(f"final must be a number in (0, 1], got {final!r}")
    if step < start:
        return 1.0
    level = levels if step >= end else 1 + (levels - 1) * (step - start) // (end - start)
    return final + (1 - final) * (1 - level / levels) ** 3


def reproject_(
    model: nn.Module,
    ratio: float,
    config: Configs,
    rule: str | Rule = "equal",
    optimizer: torch.optim.Optimizer | None = None,
    filter_fn: FilterFn | None = None,
) -> Report:
    """Bring the linear layers of a model, dense or structured already, to a ratio of their dense parameters, in place.

    Structured layers are made dense, the budget is shared by :func:`allocate`, and all are projected by
    :func:`compress_`. Each level of a gradual schedule so begins with the projection of what training has made of the
    last one; the levels are not nested in general. All dense weights are in memory meanwhile. After an error the model
    and the optimizer are as before.

    Args:
        model: any module that contains linear layers.
        ratio: of the dense parameters, in (0, 1].
        config: as for :func:`allocate`.
        rule: as for :func:`allocate`.
        optimizer: goes on, as :func:`carry_optimizer` says; the state of the new factors starts anew.
        filter_fn: called with name and module, dense or structured; false leaves the layer alone.

    Returns:
        One row for each layer; errors are relative to the weights before this call, sizes to the dense ones.

    Raises:
        structmat.BudgetError: if the ratio cannot be met.
        TypeError: if an argument has the wrong type.
        ValueError: as for :func:`allocate`.

    Example:
        >>> import torch, structmat
        >>> from structmat import surgery
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
        >>> for ratio in (0.5, 0.25):
        ...     surgery.reproject_(model, ratio, structmat.LowRankConfig(ratio=1)).params_after
        4096
        2048
    """
    check_model(model)
    patterns = list(config) if isinstance(config, Mapping) else ["*"]
    aliases = {names[0]: names for names in module_names(model).values()}

    def named(name: str, module: nn.Module) -> bool:
        matched = any(fnmatch.fnmatchcase(alias, p) for alias in aliases[name] for p in patterns)
        return matched and (filter_fn is None or filter_fn(name, module))

    before = linear_layers(model)
    chosen = [name for name, layer in before.items() if isinstance(layer, StructuredLinear) and named(name, layer)]
    with nullcontext() if optimizer is None else carry_optimizer(model, optimizer):
        try:
            if chosen:
                densify_(model, lambda name, module: name in chosen)
            return compress_(model, allocate(model, ratio, config, rule, filter_fn), progress=False)
        except BaseException:
            now = linear_layers(model)
            swap(model, [(now[name], old) for name, old in before.items() if now[name] is not old])
            raise


# ---------------------------------------------------------------- distillation
def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor | None = None,
    temperature: float = 2.0,
    alpha: float = 0.5,
) -> Tensor:
    """``alpha T^2 KL(softmax(teacher / T) | softmax(student / T)) + (1 - alpha) cross_entropy(student, targets)``.

    As in Hinton, Vinyals and Dean 2015; T^2 keeps the gradient's size when the temperature changes. Both terms are
    means over the positions whose target is not -100, as in ``F.cross_entropy``. The teacher gets no gradient. To
    distill features too, add ``F.mse_loss`` of them.

    Args:
        student_logits: shape (*, classes).
        teacher_logits: the same shape.
        targets: classes, integers of shape (*); None with ``alpha=1`` for distillation alone.
        temperature: T > 0.
        alpha: in [0, 1].

    Returns:
        A scalar of the student's dtype.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if shapes or numbers do not fit.

    Example:
        >>> import torch
        >>> from structmat import surgery
        >>> logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
        >>> surgery.distillation_loss(logits, logits.clone(), alpha=1).abs().item() < 1e-6
        True
    """
    for name, value in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        check_tensor(name, value, 1)
        check_inexact(name, value)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"teacher_logits must have the shape {tuple(student_logits.shape)} of student_logits, got "
            f"{tuple(teacher_logits.shape)}"
        )
    if not (math.isfinite(temperature) and temperature > 0 and 0 <= alpha <= 1):
        raise ValueError(f"temperature must be positive and alpha in [0, 1], got {temperature} and {alpha}")
    if targets is None and alpha != 1:
        raise ValueError(f"without targets alpha must be 1, got {alpha}")
    if targets is not None and targets.shape != student_logits.shape[:-1]:
        raise ValueError(f"targets must have shape {tuple(student_logits.shape[:-1])}, got {tuple(targets.shape)}")
    classes = student_logits.shape[-1]
    student, teacher = student_logits.reshape(-1, classes), teacher_logits.detach().reshape(-1, classes)
    teacher = teacher.to(student.dtype)
    terms = F.kl_div(
        F.log_softmax(student / temperature, -1),
        F.log_softmax(teacher / temperature, -1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    if targets is None:
        return temperature**2 * terms.mean()
    kept = (targets != -100).reshape(-1)
    distance = terms.masked_fill(~kept, 0).sum() / kept.sum()
    return alpha * temperature**2 * distance + (1 - alpha) * F.cross_entropy(student, targets.reshape(-1))
