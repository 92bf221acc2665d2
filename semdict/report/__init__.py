"""One HTML page of all results there are, read from reports/ and runs/.

command.py parses the arguments and writes the page, results.py reads the result files, sections.py arranges them,
images.py draws the curves and embeds the pictures, page.html is the template.
"""
