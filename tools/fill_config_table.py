#!/usr/bin/env python
"""Fill in the parameters and GMAC of the configurations in the tables of configs/README.md.

python tools/fill_config_table.py
"""

import argparse
import re
import sys
from pathlib import Path

import dynamic_detr  # noqa: F401  (first: silences a warning of Detectron2's import)

# isort: split
from benchmarks.costs import config_costs
from tqdm import tqdm

from dynamic_detr import compat
from dynamic_detr.cli.exits import report_user_errors

README = Path(__file__).resolve().parents[1] / "configs" / "README.md"
SIZE = (800, 1333)
ROW = re.compile(r"^(\|.*\]\((?P<config>.*\.yaml)\).*)\| [^|]* \| [^|]* \|$")
COSTS = "| parameters, M | GMAC |"  # end of the header of the tables to fill


def fill(text: str, folder: Path, size: tuple[int, int]) -> str:
    """Fill in the last two columns of the tables.

    Args:
        text: Markdown with tables whose rows link to configurations.
        folder: folder that the links are relative to.
        size: (height, width) in pixels of the image that GMAC are counted for.

    Returns:
        The text with filled tables.

    Raises:
        UserError: a configuration does not exist or is invalid.
    """
    filled, has_costs = [], False
    for line in tqdm(text.splitlines(), leave=False):
        has_costs = line.endswith(COSTS) or (has_costs and line.startswith("|"))
        row = ROW.match(line) if has_costs else None
        if row:
            parameters, gmac = config_costs(str(folder / row["config"]), size)
            line = f"{row[1]}| {parameters:.1f} | {gmac['all']:.0f} |"
        filled.append(line)
    return "\n".join(filled) + "\n"


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(argv)
    compat.ignore_known_warnings()
    with report_user_errors("fill_config_table.py"):
        README.write_text(fill(README.read_text(), README.parent, SIZE))


if __name__ == "__main__":
    sys.exit(main())
