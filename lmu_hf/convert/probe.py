"""Reads everything in an HDF5 file once, in a process of its own: ``python probe.py``, the file on standard input.

The HDF5 library is C, and some damaged files crash it or make it loop, which no ``except`` sees. The process that survives says
nothing and ends with 0; only then is the file opened in the process of the caller. It imports
h5py and NumPy alone, to start fast.
"""

import io
import sys

import h5py

LIMITS = 20_000, 24, 4 << 30, 100  # objects, levels, bytes of an array, and of an array over its bytes in the file


def probe(file: h5py.File) -> None:
    """Touches attributes and arrays, but follows no link and unpacks no bomb: those are refused later, with a reason."""
    objects, levels, size, ratio = LIMITS
    stack: list[tuple[h5py.Group, int]] = [(file, 0)]
    while stack and objects > 0:
        group, depth = stack.pop()
        for value in group.attrs.values():
            str(value)
        for name in group:
            objects -= 1
            if objects <= 0 or not isinstance(group.get(name, getlink=True), h5py.HardLink):
                continue
            child = group[name]
            if isinstance(child, h5py.Group):
                if depth < levels:
                    stack.append((child, depth + 1))
            elif not (child.is_virtual or child.external or child.shape is None):
                unpacked = child.size * child.dtype.itemsize
                if unpacked <= 1 << 20 or (unpacked <= size and unpacked <= ratio * child.id.get_storage_size()):
                    child[()]


if __name__ == "__main__":
    with h5py.File(io.BytesIO(sys.stdin.buffer.read()), "r") as opened:
        try:
            probe(opened)
        except Exception:  # an error is no crash; the caller meets it again and says what it means
            sys.exit(0)
