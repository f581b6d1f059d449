"""Exchange the linear layers of a model for structured ones, measure what that cost, and keep the result in a file."""

from structmat.surgery.checkpoint import load_file, save_file
from structmat.surgery.replace import compress_, densify_, replace_
from structmat.surgery.report import LayerRow, Report

__all__ = ["LayerRow", "Report", "compress_", "densify_", "load_file", "replace_", "save_file"]
