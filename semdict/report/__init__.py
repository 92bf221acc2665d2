"""One HTML page of whatever results there are: numbers, curves and pictures read from reports/ and runs/.

command.py parses, results.py reads, sections.py arranges, charts.py and pictures.py draw, page.html is the page.
"""
