"""Write the embedded digits, src/acclimate/assets/digits.npz, from scikit-learn's copy of the UCI data.

Run it only to rebuild the asset: `pip install scikit-learn && python tools/make_digits.py`. The same bytes
come out every time; --check compares the arrays with the file that is in the tree.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

ASSET = Path(__file__).resolve().parents[1] / "src" / "acclimate" / "assets" / "digits.npz"


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 8, 8) uint8 in 0..16 and labels (1797,) uint8 in 0..9, in the order of the source."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = bunch.images.astype(np.uint8)
    if images.shape != (1797, 8, 8) or not np.array_equal(images, bunch.images) or images.max() != 16:
        raise SystemExit(f"unexpected source data: {images.shape}, maximum {images.max()}")
    return images, bunch.target.astype(np.uint8)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the asset, write nothing")
    arguments = parser.parse_args()
    images, labels = digits()
    if arguments.check:
        with np.load(ASSET, allow_pickle=False) as stored:
            same = np.array_equal(stored["images"], images) and np.array_equal(stored["labels"], labels)
        print("same" if same else "DIFFERENT", ASSET)
        return 0 if same else 1
    ASSET.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(ASSET, images=images, labels=labels)
    print(f"{ASSET}: {ASSET.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
