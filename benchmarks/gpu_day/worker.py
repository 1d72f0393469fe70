"""Run a program with its words, and write the most memory that its tensors took on the GPU.

python worker.py REPORT.json PROGRAM.py WORDS...
"""

import json
import runpy
import sys

from dschat.train.memory_use import peak

if __name__ == "__main__":
    report, *sys.argv = sys.argv[1:]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        with open(report, "w", encoding="utf-8") as file:
            json.dump({"peak": peak()}, file)
