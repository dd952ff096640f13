"""Find the images of a folder that are copies of indexed training images."""

from pathlib import Path

import pyarrow.parquet as parquet

import memfree


def main(images: str = "my_images", index: str = "runs/index", out: str = "runs/audit") -> None:
    """Write a page of pairs, then list the images that are copies at 5 % false discoveries."""
    status = memfree.audit(Path(images), Path(index), Path(out), false_discovery_rate=0.05)
    for row in parquet.read_table(Path(out) / "audit.parquet").to_pylist():
        if row["discovery"]:
            print(f"{row['image']} is a copy of {row['nearest_key']} (p = {row['p_value']:.3g})")
    if status:
        print("some files could not be judged: they are named above")


if __name__ == "__main__":
    main()
