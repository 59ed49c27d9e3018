"""Map to box: one integral image against nested loops over window positions.

    python -m benchmarks.boxes

Prints, per map size, the median time of both on the same maps, their spread (quartiles) and the median ratio of pairs.
"""

import argparse
import statistics
import time

import numpy as np

from vicrop.boxes import bbox_from_att_image_adaptive


def nested_loops(att_map, image_size, bbox_size):
    """The definition, word by word: every window summed on its own."""
    (width, height), (rows, columns) = image_size, att_map.shape
    cell_w, cell_h = width / columns, height / rows
    proposals = []
    for r in (1, 1.2, 1.4, 1.6, 1.8, 2):
        n_x = max(1, min(int(bbox_size * r / cell_w), columns))
        n_y = max(1, min(int(bbox_size * r / cell_h), rows))
        if n_x == columns and n_y == rows:
            if r == 1:
                return 0, 0, width, height
            continue
        sums = {}
        for x in range(columns - n_x + 1):
            for y in range(rows - n_y + 1):
                sums[x, y] = float(att_map[y : y + n_y, x : x + n_x].sum())
        x, y = max(sums, key=sums.get)  # dicts keep order: the first maximum has the smallest x, then the smallest y
        near = [sums[p] for p in ((x - 1, y), (x + 1, y), (x, y - 1), (x, y + 1)) if p in sums]
        proposals.append(((sums[x, y] - np.mean(near)) / (n_x * n_y), r, x, y, n_x, n_y))
    _, r, x, y, n_x, n_y = max(proposals, key=lambda proposal: proposal[0])
    half = int(bbox_size * r // 2)
    cx = min(max(int(x * cell_w + cell_w * n_x / 2), half), width - half)
    cy = min(max(int(y * cell_h + cell_h * n_y / 2), half), height - half)
    return max(0, cx - half), max(0, cy - half), min(width, cx + half), min(height, cy + half)


def seconds(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[16, 24, 48, 96], help="sides of square maps, cells")
    parser.add_argument("--repeats", type=int, default=15, help="pairs per map size")
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error(f"--repeats {args.repeats} is not at least 2: there are quartiles to tell")
    rng = np.random.default_rng(0)
    print("map      integral image (ms)   nested loops (ms)        ratio")
    for side in args.sides:
        image_size, pairs = (28 * side, 28 * side), []
        for _ in range(args.repeats):
            case = rng.random((side, side)), image_size, 224
            if bbox_from_att_image_adaptive(*case) != nested_loops(*case):
                raise AssertionError(f"the two disagree on a {side} x {side} map")
            pairs.append((seconds(bbox_from_att_image_adaptive, *case), seconds(nested_loops, *case)))
        ours, loops = (statistics.quantiles([1e3 * pair[i] for pair in pairs], n=4) for i in (0, 1))
        ratio = statistics.median(slow / fast for fast, slow in pairs)
        low, middle, high = ours
        print(f"{side:2} x {side:2}  {middle:5.2f} ({low:.2f} to {high:.2f})   {loops[1]:8.1f} "
              f"({loops[0]:.1f} to {loops[2]:.1f})  {ratio:7.0f}")  # fmt: skip


if __name__ == "__main__":
    main()
