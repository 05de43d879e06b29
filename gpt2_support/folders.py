"""Where models and data sets live.

In a checkout (`python gpt2.py`, or `pip install -e`) all models are in its `models/`, data sets in
its `datasets/`. Where the package is installed, the bundled model is inside the package and
downloads go to the user's cache. GPT2_MODELS_DIR and GPT2_DATASETS_DIR in the environment name
other folders in both cases.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent

# The wheel holds the checkout's `models/stories` as `gpt2_support/bundled/stories`.
INSTALLED = (PACKAGE / "bundled").is_dir()
BUNDLED_DIR = PACKAGE / "bundled" if INSTALLED else PACKAGE.parent / "models"
BUNDLED_MODEL = "stories"


def bundled_model() -> Path:
    """Return the folder of the bundled model, whatever other models have its name."""
    return BUNDLED_DIR / BUNDLED_MODEL


def user_cache_dir() -> Path:
    """Return the folder in which an installed package keeps `models` and `datasets`."""
    home = Path(os.path.expanduser("~"))
    if sys.platform == "win32":
        cache = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        cache = home / "Library" / "Caches"
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
        cache = cache if cache.is_absolute() else home / ".cache"  # as the XDG specification asks
    return cache / "gpt2-numpy"


def default_models_dir() -> Path:
    """Return the folder where models are looked for by name and downloaded to."""
    if os.environ.get("GPT2_MODELS_DIR"):
        return Path(os.environ["GPT2_MODELS_DIR"]).expanduser()
    return user_cache_dir() / "models" if INSTALLED else BUNDLED_DIR


MODELS_DIR = default_models_dir()


def datasets_dir() -> Path:
    """Return the folder of downloaded data sets, and of the tokens that texts were encoded to."""
    if os.environ.get("GPT2_DATASETS_DIR"):
        return Path(os.environ["GPT2_DATASETS_DIR"]).expanduser()
    checkout = PACKAGE.parent
    in_cache = INSTALLED or not os.access(checkout, os.W_OK)  # of another user, say
    return (user_cache_dir() if in_cache else checkout) / "datasets"


def trained_models_dir(models_dir: str | Path = MODELS_DIR) -> Path:
    """Return the folder for models of the user's own: `models_dir`, but never the cache."""
    return Path("models") if Path(models_dir) == user_cache_dir() / "models" else Path(models_dir)


def candidates(name: str | Path, models_dir: str | Path = MODELS_DIR) -> list[Path]:
    """Return the paths where a model of this name may be, in the order in which they are tried."""
    unique: dict[str, Path] = {}
    for folder in (models_dir, "models", BUNDLED_DIR):
        path = Path(folder, name)
        unique.setdefault(os.path.abspath(path), path)
    return list(unique.values())
