"""What both trainings share: rows, the loop, frozen features, scores by source."""
