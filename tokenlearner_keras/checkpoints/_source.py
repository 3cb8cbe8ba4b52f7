"""Arrays by name, from a file or a mapping, checked one by one."""

import contextlib
import os
import zipfile
import zlib

import numpy as np

_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    NotImplementedError,
    ValueError,
)


class ArraySource:
    """Reads arrays when they are asked for, so that only one is in memory at a time.

    Args:
        arrays: Mapping from names to arrays.
        description: Text that names the source in errors.
    """

    def __init__(self, arrays, description: str):
        self._arrays = arrays
        self._description = description
        self.names = tuple(arrays)

    def __contains__(self, name):
        return name in self._arrays

    def __str__(self):
        return self._description

    def read(self, name: str) -> np.ndarray:
        """Returns the array `name`, which must be finite numbers."""
        try:
            array = np.asarray(self._arrays[name])
        except _DAMAGED as error:
            raise ValueError(
                f"Weight '{name}' of {self} cannot be read: it is damaged or holds "
                f"Python objects, which are never unpickled. Error: {error}"
            ) from error
        if array.dtype == np.dtype("V2"):
            # NumPy has no bfloat16 and stores its two bytes as they are.
            import ml_dtypes

            array = array.view(ml_dtypes.bfloat16)
        is_float = array.dtype.kind == "f" or array.dtype.name == "bfloat16"
        if not is_float:
            raise ValueError(
                f"Weight '{name}' of {self} must be an array of floats. "
                f"Received: dtype={array.dtype}"
            )
        if not np.all(np.isfinite(array)):
            raise ValueError(
                f"Weight '{name}' of {self} has values that are not finite (NaN or "
                "infinite). Nothing was loaded."
            )
        return array

    def read_integers(self, name: str) -> tuple[int, ...]:
        """Returns the array `name` of integers as a tuple."""
        return tuple(int(value) for value in self._arrays[name])


@contextlib.contextmanager
def open_source(weights):
    """Opens a path to an `.npz` file, or a mapping, as an `ArraySource`."""
    if hasattr(weights, "keys"):
        yield ArraySource(weights, "the given mapping")
        return
    path = os.fspath(weights)
    description = f"'{path}'"
    try:
        archive = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise
    except _DAMAGED as error:
        raise ValueError(
            f"{description} is no readable .npz archive: truncated, damaged, or a "
            f"pickle, which is never loaded. Error: {error}"
        ) from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(
            f"{description} must be an .npz archive of named arrays. "
            "Received: a single array"
        )
    with archive:
        yield ArraySource(archive, description)
