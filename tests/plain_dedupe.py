"""The law of deduplication in a few plain lines, for tests and benchmarks."""

import numpy as np


def leaders(vectors: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """`near_pairs.leaders` in a few plain lines: each row, in order, takes what comes later, is near and still free."""
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    # FAISS keeps inner products greater than the radius, the law says at least the threshold.
    radius = float(np.nextafter(np.float32(threshold), np.float32(-1)))
    limits, cosines, neighbours = index.range_search(vectors, radius)
    leader, cosine = np.arange(len(vectors)), np.ones(len(vectors), np.float32)
    for row in range(len(vectors)):
        if leader[row] == row:
            found = slice(limits[row], limits[row + 1])
            near, how = neighbours[found], cosines[found]
            free = (near > row) & (leader[near] == near)
            leader[near[free]], cosine[near[free]] = row, how[free]
    return leader, cosine
