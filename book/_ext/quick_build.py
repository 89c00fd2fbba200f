"""Build quicker: let nothing be searched for, or swept up, again and again."""
import gc

from pybtex.plugin import find_plugin, register_plugin


def setup(app):
    # Each citation asks how to be printed, and pybtex searches all installed packages for that, unless it was told.
    register_plugin("pybtex.backends", "plaintext", find_plugin("pybtex.backends", "plaintext"), force=True)
    gc.disable()  # pages are trees of many small objects, and little of them is garbage: 1.1 GB in place of 0.6
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
