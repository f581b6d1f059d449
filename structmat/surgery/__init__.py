"""Exchange the linear layers of a model for structured ones, measure what that cost, and keep the result in a file."""

from structmat.surgery.allocation import allocate
from structmat.surgery.calibrating import calibrate
from structmat.surgery.calibration import Calibration
from structmat.surgery.carry import carry_optimizer
from structmat.surgery.checkpoint import load_file, save_file
from structmat.surgery.costs import measure_seconds
from structmat.surgery.densify import densify_
from structmat.surgery.healing import HealReport, heal, healing_loss, healing_trainer, learning_rates
from structmat.surgery.hidden_units import HiddenUnits
from structmat.surgery.latency import Speed, Speeds, measure_latency, slower_layers
from structmat.surgery.permuting import PermuteReport, permute_hidden_
from structmat.surgery.plan import Allocation
from structmat.surgery.pretrained import load_pretrained, save_pretrained
from structmat.surgery.replace import compress_, replace_
from structmat.surgery.report import LayerRow, Report
from structmat.surgery.sensitivities import sensitivity
from structmat.surgery.to_m2 import to_m2
from structmat.surgery.training import distillation_loss, gradual_ratio, reproject_

__all__ = [
    "Allocation",
    "Calibration",
    "HealReport",
    "HiddenUnits",
    "LayerRow",
    "PermuteReport",
    "Report",
    "Speed",
    "Speeds",
    "allocate",
    "calibrate",
    "carry_optimizer",
    "compress_",
    "densify_",
    "distillation_loss",
    "gradual_ratio",
    "heal",
    "healing_loss",
    "healing_trainer",
    "learning_rates",
    "load_file",
    "load_pretrained",
    "measure_latency",
    "measure_seconds",
    "permute_hidden_",
    "replace_",
    "reproject_",
    "save_file",
    "save_pretrained",
    "sensitivity",
    "slower_layers",
    "to_m2",
]
