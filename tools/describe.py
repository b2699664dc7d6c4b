"""Prints every option of a configuration file with its type, default and meaning: python tools/describe.py [FILTER]."""

from __future__ import annotations

import argparse
import textwrap

from detection.classification_task import ClassificationExperiment
from detection.config import describe
from detection.experiment import Experiment


def main() -> None:
    parser = argparse.ArgumentParser(description="Print every option with its type, default and meaning.")
    parser.add_argument("filter", nargs="?", default="", help="show only options whose name contains this")
    parser.add_argument("--crops", action="store_true", help="the options of tools/classify.py, not of a detector's")
    options = parser.parse_args()
    schema = ClassificationExperiment if options.crops else Experiment
    for name, kind, default, doc in describe(schema):
        if options.filter in name:
            print(f"{name} = {default}    ({kind})")
            if doc:
                print(textwrap.fill(doc, 110, initial_indent="    ", subsequent_indent="    "))


if __name__ == "__main__":
    main()
