"""The tests mirror the folders and files of erniem_fast; golden/ holds what other implementations computed."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
