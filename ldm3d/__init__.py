"""3D latent diffusion of brain MRI: the library behind the scripts, the notebook and the service."""

__version__ = "0.1.0"
