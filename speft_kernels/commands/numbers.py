"""Whole numbers of the command line, as types of its arguments."""

from __future__ import annotations

import argparse
import os
import re

from ..errors import shown


def count(text: str) -> int:
    """A number of things that are counted one by one."""
    # Unlike int(), which takes 1_0 for ten and has bounds beyond those of torch.
    number = int(text) if re.fullmatch("[0-9]{1,9}", text) else 0
    if not number:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number from 1 to 999999999")
    return number


def threads(text: str) -> int:
    """A number of threads to measure with, which would wait for each other on fewer cores."""
    number, cores = count(text), os.cpu_count() or 1
    if number > cores:
        raise argparse.ArgumentTypeError(f"{number} is more than this machine's {cores} cores")
    return number
