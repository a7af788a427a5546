"""The phrases that an interrogator chooses from: CLIP Interrogator's lists (MIT), from its wheel, or one's own."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from ..run.errors import UserError
from ..run.folders import package_folder

SITES = (
    *("Artstation", "behance", "cg society", "cgsociety", "deviantart", "dribble", "flickr", "instagram", "pexels"),
    *("pinterest", "pixabay", "pixiv", "polycount", "reddit", "shutterstock", "tumblr", "unsplash", "zbrush central"),
)
"""Where CLIP Interrogator 0.6.0 says that a picture is trending; in its code, not in its lists."""
KINDS = ("artists", "flavors", "mediums", "movements", "trendings")  # in the order in which it merges them


def read(
    folder: Path | None = None, artists: bool = True, more: Mapping[str, list[str]] = MappingProxyType({})
) -> dict[str, list[str]]:
    """Reads term lists.

    Args:
        folder: Files `<kind>.txt`, a phrase a line, in place of the wheel's lists of these kinds; an empty file leaves
            a kind out.
        artists: Whether names of artists are used.
        more: Further kinds and their phrases where the folder has none.

    Returns:
        Phrases of each of `KINDS` and of `more`; names of artists as "by ..." and "inspired by ...".

    Raises:
        UserError: If the folder has none of these files, or one is not UTF-8.
    """
    wheel = package_folder("clip_interrogator")
    found: dict[str, list[str]] = {"trendings": [*SITES]}
    found["trendings"] += [f"trending on {site}" for site in SITES]
    found["trendings"] += [f"featured on {site}" for site in SITES]
    found["trendings"] += [f"{site} contest winner" for site in SITES]
    for kind in KINDS[:-1]:
        found[kind] = _lines(wheel / "data" / f"{kind}.txt")
    found |= more
    kinds = (*KINDS, *more)
    own = {kind: folder / f"{kind}.txt" for kind in kinds if (folder / f"{kind}.txt").is_file()} if folder else {}
    if folder and not own:
        raise UserError(f"{folder}: none of {', '.join(f'{kind}.txt' for kind in kinds)} there; give another folder")
    found |= {kind: _lines(path) for kind, path in own.items()}
    names = found["artists"] if artists else []
    found["artists"] = [f"by {name}" for name in names] + [f"inspired by {name}" for name in names]
    return {kind: found[kind] for kind in kinds}


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def words(text: str) -> list[str]:
    """The words of a text in small letters, without marks."""
    return re.findall(r"\w+", text.lower())
