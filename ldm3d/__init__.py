"""3D latent diffusion of brain MRI: the library behind the scripts, the notebook and the service."""

import os

# monai imports MLflow wherever it is installed, and MLflow's import reports to its makers unless it is told not to.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

__version__ = "0.1.0"
