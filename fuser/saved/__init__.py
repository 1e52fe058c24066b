"""Saving compiled programs to one file, and running them on a machine that needs neither the model nor a compiler.

The file is in the format of safetensors. Its parts are ``programs.json`` (plans, structures of inputs and outputs,
parameters of kernels: :mod:`fuser.saved.codec`), ``weights/N`` (constants as the kernels read them, each once),
``kernels/SYMBOL.so``, ``report.txt`` and ``report.html``; the metadata holds format, version and the manifest
(:class:`~fuser.saved.content.Manifest`). Only kernels are code.
"""

from fuser.saved.content import describe
from fuser.saved.module import LoadedModule
from fuser.saved.reader import load

__all__ = ["LoadedModule", "describe", "load"]
