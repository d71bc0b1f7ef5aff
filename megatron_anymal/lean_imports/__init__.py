"""Make commands start in less processor time: libraries' needless imports are kept out, and garbage collection waits.

A package that is kept out is deferred: its own code runs as soon as anything but the listed parts is asked for, so that
a version that needs more is slower, not broken. `libraries.py` lists them.

While libraries are loaded, Python's cycle collector does not run: it would traverse the same functions and classes
again and again, and find nothing. Later passes, and the one at exit, leave out what a large import has created. That is
2 of the 7 seconds of a rank that ends after one step.
"""

from megatron_anymal.lean_imports.frozen_objects import are_frozen, freeze
from megatron_anymal.lean_imports.hooks import call, hide_torch, install, when_run

__all__ = ["are_frozen", "call", "freeze", "hide_torch", "install", "when_run"]
