"""Train a compressed model to compute again what its dense original computes."""

from structmat.surgery.healing.api import heal
from structmat.surgery.healing.loss import healing_loss
from structmat.surgery.healing.rates import learning_rates
from structmat.surgery.healing.report import HealReport
from structmat.surgery.healing.trainer import healing_trainer

__all__ = ["HealReport", "heal", "healing_loss", "healing_trainer", "learning_rates"]
