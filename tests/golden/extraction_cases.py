# ruff: noqa: RUF001
"""What is asked of PaddleNLP and of erniem_fast, with a tiny UIE-M: schemas and texts."""

import csv
import json
import lzma
import pathlib

GOLDEN = pathlib.Path(__file__).parent
PARALLEL = GOLDEN.parent.parent / "bench" / "data" / "parallel.tsv"

# Schemas with their languages; events have a trigger with arguments, opinions an aspect with options.
SCHEMAS = [
    ("zh", "密码"),
    ("zh", ["用户", "日期", "地点"]),
    ("zh", {"用户": ["密码", "日期"]}),
    ("zh", {"地震触发词": ["时间", "震级", "震中位置"]}),
    ("zh", {"评价维度": ["观点词", "情感倾向[正向,负向]"]}),
    ("zh", "情感倾向［正，负，中］"),
    ("zh", ["数据", {"用户": [{"网站": "日期"}, "邮件"]}]),
    ("en", ["user", "date"]),
    ("en", {"user": ["password", {"site": ["date"]}]}),
    ("en", [{"page": ["Sentiment classification [positive, negative]"]}, "Email [yes, no]"]),
]

# The numbers of those that are also asked with `split_sentence=True`.
SPLIT = (1, 2, 5)
CASES = [(lang, schema, False) for lang, schema in SCHEMAS] + [(*SCHEMAS[number], True) for number in SPLIT]


def texts():
    """Twenty texts, half Chinese and half English: short ones, some of several lines, and two that have to be cut."""
    with PARALLEL.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    found = []
    for language, name in (("zh", "translation"), ("en", "english")):
        lines = [row[name] for row in rows if row["lang"] == "zh"]
        lines = list(dict.fromkeys(line for line in lines if len(line) > (8 if language == "zh" else 20)))
        found += [*lines[:7], "\n".join(lines[7:9]), "　".join(lines[9:11]) + "！", "".join(lines[11:80])[:1100]]
    return found


def read_goldens():
    """What make_extraction.py wrote: `heads` (weights), `threshold`, `texts`, and `results` by case and text."""
    return json.loads(lzma.open(GOLDEN / "extraction.json.xz").read())
