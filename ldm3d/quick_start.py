"""Import monai without the packages that only its other parts want: a program starts in two thirds of the time.

For programs; the library does not import it, because notebooks use it together with the rest of monai, of which some
parts, its pictures above all, say in this process that these packages are missing. It comes before everything that
imports monai.
"""

import sys
from typing import Any, cast

UNUSED_BY_US = ("matplotlib", "mlflow", "pandas", "scipy.signal", "scipy.stats", "sklearn", "tensorboard")
"""Not found while monai is imported; what imports them later gets them. mlflow is among them because it is imported by
monai, and would for good be without what needs pandas."""


def _import_monai() -> None:
    modules = cast(dict[str, Any], sys.modules)
    hidden = [name for name in UNUSED_BY_US if name not in modules]
    modules.update(dict.fromkeys(hidden))  # None is how the import system marks what is not to be found
    try:
        import monai  # noqa: F401
    finally:
        for name in hidden:
            del modules[name]


_import_monai()
