"""Diffusion models as Lightning modules, and the way to a diffusers folder and back."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
