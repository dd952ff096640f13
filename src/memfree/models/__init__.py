"""Diffusion models as Lightning modules, and the way to a diffusers folder and back."""

from memfree.models.ddpm import DDPMModule
from memfree.models.denoiser import Denoiser, LoadedModel, load_model
from memfree.models.ema import ExponentialMovingAverage
from memfree.models.export import export_model
from memfree.models.finite import FiniteTraining
from memfree.models.module import DiffusionModule
from memfree.models.network import NetworkOptions, build_network
from memfree.models.noise_schedule import NoiseOptions, build_scheduler
from memfree.models.options import FineTuneOptions, ModelOptions
from memfree.models.sample_grid import SampleGrid

__all__ = [
    "DDPMModule",
    "Denoiser",
    "DiffusionModule",
    "ExponentialMovingAverage",
    "FineTuneOptions",
    "FiniteTraining",
    "LoadedModel",
    "ModelOptions",
    "NetworkOptions",
    "NoiseOptions",
    "SampleGrid",
    "build_network",
    "build_scheduler",
    "export_model",
    "load_model",
]
