"""The two layouts of checkpoint folders: what their files are called, and which a folder has."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Literal, NamedTuple

Layout = Literal["native", "huggingface"]


class LayoutFiles(NamedTuple):
    """The names of a layout's files."""

    config: str
    stem: str  # of <stem>.safetensors and <stem>-00001-of-00002.safetensors
    indexed: bool  # shards come with an index, which names them
    pickles: re.Pattern[str]

    @property
    def single(self) -> str:
        return f"{self.stem}.safetensors"

    @property
    def index(self) -> str:
        return f"{self.single}.index.json"

    def among(self, names: Collection[str]) -> list[str]:
        """The files of a set of safetensors that are among these, the single one before shards."""
        if self.single in names:
            return [self.single]
        shards = [n for n in names if re.fullmatch(rf"{self.stem}-\d+-of-\d+\.safetensors", n)]
        return sorted(shards) + [self.index] * (self.indexed and self.index in names)

    def pickles_among(self, names: Collection[str]) -> list[str]:
        """The pickles of this layout that are among these."""
        return sorted(filter(self.pickles.fullmatch, names))


# In the order of preference.
LAYOUTS: dict[Layout, LayoutFiles] = {
    "native": LayoutFiles(
        "params.json", "consolidated", False, re.compile(r"consolidated\.\d\d\.(pth|pt)")
    ),
    "huggingface": LayoutFiles(
        "config.json", "model", True, re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin")
    ),
}
CONFIG_FILES: dict[Layout, str] = {name: files.config for name, files in LAYOUTS.items()}


def check_layout(layout: object) -> None:
    """Raises a ValueError unless this is None or a layout."""
    if layout is not None and layout not in tuple(LAYOUTS):
        raise ValueError(f"layout: expected None, 'native' or 'huggingface', got {layout!r}")


def folder_layout(folder: str | Path, layout: Layout | None = None) -> Layout:
    """Tells which layout to read a checkpoint folder in.

    Where it holds both configurations, the weights decide, as downloads often take both of these
    small files: safetensors go before pickles, then the native layout before the other.

    Args:
        folder: path of the checkpoint.
        layout: the layout asked for; None finds out.

    Returns:
        "native" or "huggingface".

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder, or it holds no
            configuration.
        ValueError: the layout asked for does not exist.
    """
    folder = Path(folder)
    check_layout(layout)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: expected a checkpoint folder, got a file")
    present = [name for name, file in CONFIG_FILES.items() if (folder / file).exists()]
    if not present or (layout and layout not in present):
        files = CONFIG_FILES[layout] if layout else " nor ".join(CONFIG_FILES.values())
        raise FileNotFoundError(f"{folder}: holds no {files}")
    if layout or len(present) == 1:
        return layout or present[0]
    names = {path.name for path in folder.iterdir()}
    stored = [name for name, files in LAYOUTS.items() if files.among(names)]
    pickled = [name for name, files in LAYOUTS.items() if files.pickles_among(names)]
    return (stored or pickled or present)[0]
