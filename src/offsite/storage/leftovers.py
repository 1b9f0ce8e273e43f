"""Recognises, by their names, files that file managers, editors, version control and transfers leave in folders.

Such files are no part of a bundle or of a data set, and nobody put them there on purpose.
"""

import fnmatch
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

_NAMES = (
    # macOS
    ".DS_Store", "._*", "__MACOSX", ".AppleDouble", ".AppleDesktop", ".AppleDB", ".LSOverride", ".localized", "Icon\r",
    ".Spotlight-V100", ".Trashes", ".fseventsd", ".TemporaryItems", ".DocumentRevisions-V100", ".VolumeIcon.icns",
    ".apdisk", ".com.apple.timemachine.*", "*.icloud",
    # Windows
    "Thumbs.db", "Thumbs.db:encryptable", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "$RECYCLE.BIN",
    "System Volume Information", "*:Zone.Identifier", "*.Zone.Identifier", "~$*",
    # desktops of Linux, file systems, network storage
    ".directory", ".Trash-*", ".hidden", ".goutputstream-*", ".fuse_hidden*", ".nfs*", "lost+found", "@eaDir",
    ".@__thumb", "#recycle", ".~lock.*#",
    # services that synchronise folders
    ".stfolder", ".stversions", ".stignore", ".syncthing.*", "~syncthing~*", ".dropbox", ".dropbox.attr",
    ".dropbox.cache", ".owncloudsync.log*", ".sync_*.db*", "._sync_*.db*", ".tmp.driveupload", ".tmp.drivedownload",
    # version control, hubs, notebooks, editors
    ".git", ".gitattributes", ".gitignore", ".gitkeep", ".svn", ".hg", ".cache", ".huggingface",
    ".ipynb_checkpoints", "__pycache__", ".idea", ".vscode", "*~", ".*.sw?", "*.bak", ".#*", "#*#",
)  # fmt: skip
_UNFINISHED = (
    "*.part",
    "*.partial",
    "*.crdownload",
    "*.download",
    "*.filepart",
    "*.aria2",
    "*.incomplete",
    "*.opdownload",
)
_PATTERN = re.compile("|".join(fnmatch.translate(name.casefold()) for name in (*_NAMES, *_UNFINISHED)))
_RSYNC = re.compile(r"\.(?P<whole>.+)\.[A-Za-z0-9]{6}")  # the name that rsync gives to a file during the transfer
_PLAIN = re.compile(r"[\w .,:;@+=~$#()\[\]{}&%!^-]+")


def is_leftover(name: str, listed: Iterable[str] = ()) -> bool:
    """Whether a file or folder of this name was left by a file manager, an editor, version control or a transfer.

    Args:
        name: the name, without its folder.
        listed: names of files that belong to the folder; a partly transferred copy of one is a leftover too.
    """
    if name in listed or not (_PLAIN.fullmatch(name) or name == "Icon\r"):
        return False
    return _PATTERN.fullmatch(name.casefold()) is not None or unfinished(name, listed) is not None


def unfinished(name: str, listed: Iterable[str]) -> str | None:
    """The name in `listed` of the file that `name` is a partly transferred copy of; None if there is no such file."""
    rsync = _RSYNC.fullmatch(name)
    stems = [name[: -len(end) + 1] for end in _UNFINISHED if name.casefold().endswith(end[1:])]
    return next((stem for stem in [*stems, *([rsync["whole"]] if rsync else [])] if stem in listed), None)


def leftovers_in(folder: Path) -> list[Path]:
    """The entries of a folder that file managers, editors, version control or transfers left there, sorted by name.

    Empty if the folder cannot be read.
    """
    try:
        return sorted(path for path in folder.iterdir() if is_leftover(path.name))
    except OSError:
        return []


def delete_command(paths: Iterable[Path]) -> str:
    """The shell command that deletes these files and folders, with quoted names."""
    named = list(paths)
    end = ["--"] if any(str(path).startswith("-") for path in named) else []
    return " ".join(["rm", "-r", *end, *map(_word, named)])


def _word(path: Path) -> str:
    """A path as one quoted word of a shell command."""
    if "\r" in str(path):  # only "Icon\r" has a control character, which is written as an escape
        return "$'" + str(path).replace("\\", "\\\\").replace("'", "\\'").replace("\r", "\\r") + "'"
    return shlex.quote(str(path))
