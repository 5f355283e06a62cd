"""The CS-Flow model: torch, timm, OpenVINO and Triton only; no Ray, no files, no object store."""

from csflow.model.backbone import PAPER_STAGE, Backbone, BackboneError, download_weights, load_weights
from csflow.model.cpu_backbone import CpuBackbone, SavedBackbone
from csflow.model.detector import Architecture, Detector, Head, energies, new_flow
from csflow.model.flow import CrossScaleFlow, FlowOutput, negative_log_likelihood
from csflow.model.inference import Form, InferenceBackbone, InferenceDetector, default_batch_size
from csflow.model.statistic import PlainStatistic, Scores, StandardisedStatistic, fitted_statistic
from csflow.model.tiles import TiledDetector
from csflow.model.whitening import Gaussians, Moments, Whitening, fit_latents, gaussians_of

__all__ = [
    "PAPER_STAGE",
    "Architecture",
    "Backbone",
    "BackboneError",
    "CpuBackbone",
    "CrossScaleFlow",
    "Detector",
    "FlowOutput",
    "Form",
    "Gaussians",
    "Head",
    "InferenceBackbone",
    "InferenceDetector",
    "Moments",
    "PlainStatistic",
    "SavedBackbone",
    "Scores",
    "StandardisedStatistic",
    "TiledDetector",
    "Whitening",
    "default_batch_size",
    "download_weights",
    "energies",
    "fit_latents",
    "fitted_statistic",
    "gaussians_of",
    "load_weights",
    "negative_log_likelihood",
    "new_flow",
]
