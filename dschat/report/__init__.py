"""The page of a run: curves, sampled answers and settings in one file that needs no network.

1. records.py: what a run wrote, its metrics, answers and description
2. panels.py: which figures stand together in a curve
3. drawing.py: curves and distributions by matplotlib
4. page.py: the HTML file by Jinja2, and the PNG files beside it
5. card.py: README.md of each of its models

`python -m dschat.report OUTPUT` makes the page again.
"""
