"""Within a Kaggle kernel: the images of this session as a dataset of their own, for the sessions after it."""

from pathlib import Path

from ..pipeline import IMAGES
from ..run.folders import MANIFEST, on_kaggle
from . import mounts


def publish_images(folder: Path) -> str:
    """Publishes a folder of rendered sets as the next of the datasets `image-to-prompts-images-1`, `-2`, ...

    Args:
        folder: `images` of the run, with `train` and `test` in it.

    Returns:
        A line on what was published, or why not.
    """
    if not on_kaggle():
        return "Not on Kaggle: nothing to publish."
    if not list(folder.glob(f"*/{MANIFEST}")):
        return "This session has rendered nothing new."
    number = 1 + max(
        [int(one.name.rpartition("-")[2]) for one in mounts.find() if one.name.startswith(f"{IMAGES}-")] or [0]
    )
    try:
        import kagglehub

        name = f"{kagglehub.whoami()['username']}/{IMAGES}-{number}"
        kagglehub.dataset_upload(name, str(folder), version_notes="image-to-prompts", ignore_patterns=[".*", "seeds/"])
    except Exception as error:  # of whichever library it talks HTTP with; the images are in the output all the same
        said = " ".join(str(error).split())
        by_hand = f"make a dataset {IMAGES}-{number} of this kernel's output, on its page on Kaggle"
        return f"Not published ({said}): {by_hand}."
    return f"Published as {name}."
