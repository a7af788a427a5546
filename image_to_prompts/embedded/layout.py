"""Where the things of a scene stand: boxes by relation, copies inside a box by count."""

import math
import random

from .grammar import Scene

# Centre x, centre y and width of a box as fractions of the canvas, for the first and the second thing.
BOXES: dict[str | None, tuple[tuple[float, float, float], ...]] = {
    None: ((0.5, 0.53, 0.66),),
    "beside": ((0.26, 0.5, 0.45), (0.74, 0.5, 0.45)),
    "above": ((0.5, 0.27, 0.42), (0.5, 0.71, 0.48)),
    "below": ((0.5, 0.72, 0.44), (0.5, 0.29, 0.45)),
    "behind": ((0.36, 0.38, 0.5), (0.6, 0.66, 0.46)),
    "around": ((0.5, 0.5, 0.34), (0.5, 0.5, 0.2)),
}
THIRD = {"beside": (0.5, 0.84, 0.24)}
THIRD_ELSEWHERE = (0.85, 0.82, 0.27)
# Offsets and size of each copy as fractions of the box.
COPIES = {
    1: ((0, 0, 1),),
    2: ((-0.27, 0.05, 0.62), (0.27, -0.05, 0.62)),
    3: ((0, -0.24, 0.54), (-0.27, 0.24, 0.54), (0.27, 0.24, 0.54)),
    5: ((-0.3, -0.3, 0.42), (0.3, -0.3, 0.42), (0, 0, 0.42), (-0.3, 0.3, 0.42), (0.3, 0.3, 0.42)),
}
RING = 9  # copies of the second thing that surround the first


def place(scene: Scene, canvas: int, rng: random.Random) -> list[tuple[str, tuple[int, int, int]]]:
    """Places every copy of every thing.

    Args:
        scene: What to place.
        canvas: Side of the square canvas in px.
        rng: Source of the jitter.

    Returns:
        (name, (left, top, size)) in px, in drawing order.
    """
    boxes = list(BOXES[scene.relation])
    if len(scene.things) > 2:
        boxes.append(THIRD.get(scene.relation or "", THIRD_ELSEWHERE))
    placed = []
    for position, ((name, count), (x, y, width)) in enumerate(zip(scene.things, boxes, strict=False)):
        x += rng.uniform(-0.03, 0.03)
        y += rng.uniform(-0.03, 0.03)
        width *= rng.uniform(0.9, 1.08)
        if scene.relation == "around" and position == 1:
            turn = rng.uniform(0, math.tau)
            angles = [turn + math.tau * i / RING for i in range(RING)]
            copies = [(1.9 * math.cos(a), 1.9 * math.sin(a), 1.0) for a in angles]
        else:
            copies = list(COPIES[count])
        for dx, dy, scale in copies:
            size = round(width * scale * canvas)
            left = round((x + dx * width) * canvas - size / 2)
            top = round((y + dy * width) * canvas - size / 2)
            placed.append((name, (left, top, size)))
    return placed
