"""One HTML page of all results there are, read from reports/, runs/ and shards/.

command.py parses the arguments and writes the page; results.py reads the result files; sections.py arranges them, with
runs.py (runs side by side), words.py (patches of words) and provenance.py. parts.py, charts.py and pictures.py are what
they are made of; page.html, page.css and page.js are the template.
"""
