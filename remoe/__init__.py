"""The vocabulary every Remoe service shares: identifiers, wire types, errors, prices, ledgers.

Services import this package and never each other. Nothing here imports a tensor library.
"""

from __future__ import annotations

__version__ = "0.1.0"
